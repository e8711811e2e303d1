"""Tell instance-wise formats what one instance is, and where its channels are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vitquant.calibrate import Bench
from vitquant.numerics import PER_CHANNEL, Granularity, InstanceGroups
from vitquant.recipe.state import Rule, State
from vitquant.trace import Site, SiteInfo


@dataclass(frozen=True)
class Instances:
    """Channel groups are chosen for each image (`by="image"`) or for each window (`by="window"`).

    Where a linear sees (batch · windows, tokens, channels), the observed shape for one image says how many windows
    make one image: its first axis. A convolution has its channels on axis 1.
    """

    by: str = "image"

    def __call__(self, state: State, bench: Bench) -> State:
        return replace(state, plan={s: self._told(s, rule, state.trace.sites[s]) for s, rule in state.plan.items()})

    def _told(self, site: Site, rule: Rule, info: SiteInfo) -> Rule:
        q = rule.quantizer
        if not isinstance(q, InstanceGroups) or q.granularity != PER_CHANNEL:
            return rule
        span = info.shape[0] if self.by == "image" else 1
        axes = Granularity((1,)) if site.call.op == "conv" else q.granularity
        return replace(rule, quantizer=replace(q, span=span, granularity=axes))
