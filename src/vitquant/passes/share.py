"""One tensor, one grid: operands that only move a quantized tensor about inherit its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from vitquant.calibrate import Bench
from vitquant.integer import Arithmetic
from vitquant.numerics import Params, PowerOfTwo
from vitquant.passes.fit import Fit
from vitquant.recipe.state import Rule, State
from vitquant.trace import Role, Site
from vitquant.trace.flow import Node


class Tie(NamedTuple):
    """An operand is the output `source`, moved and multiplied by `factor`. direct: neither moved nor multiplied."""

    source: Site
    factor: float
    direct: bool


@dataclass(frozen=True)
class FitShared:
    """Fit every output once; what only moves or scales it inherits its grid, codes unchanged (own).

    The planned outputs are those of FQ-ViT (arXiv:2111.13824; released code): one quantizer behind every operation. A
    norm's input that is an output itself decides that output's format (the power-of-two factor belongs to the
    residual stream). Inputs of norms and softmaxes that are tied need no format of their own and leave the plan.
    """

    def __call__(self, state: State, bench: Bench) -> State:
        ties = {s: t for s in state.plan for t in [_tie(s, state)] if t is not None}
        plan = dict(state.plan)
        for site, tie in ties.items():
            if tie.direct and state.trace.role(site) is Role.NORM_INPUT:
                plan[tie.source] = plan[site]
        # How channels were moved is not known: only the tensor itself keeps a grid that differs between channels.
        ties = {s: t for s, t in ties.items() if s in plan and (t.direct or _shared(t, plan) or _bare(s, state))}
        fitted = Fit()(replace(state, plan={s: r for s, r in plan.items() if s not in ties}), bench)
        plan, params = dict(fitted.plan), dict(fitted.params)
        for site, tie in ties.items():
            if not _bare(site, state):
                rule = plan[tie.source]
                plan[site], params[site] = rule, _scaled(params[tie.source], tie.factor)
        order = {site: i for i, site in enumerate(state.trace.sites)}
        return replace(fitted, plan=dict(sorted(plan.items(), key=lambda item: order[item[0]])), params=params)


@dataclass(frozen=True)
class OnIntegers:
    """The result is executed by this arithmetic."""

    arithmetic: Arithmetic

    def __call__(self, state: State, bench: Bench) -> State:
        return replace(state, arithmetic=self.arithmetic)


def _bare(site: Site, state: State) -> bool:
    """The site is no operand of a contraction: tied, it needs no format."""
    return state.trace.role(site) in (Role.NORM_INPUT, Role.LOGITS, Role.ACT_INPUT)


def _shared(tie: Tie, plan: Mapping[Site, Rule]) -> bool:
    return not isinstance(plan[tie.source].quantizer, PowerOfTwo)


def _tie(site: Site, state: State) -> Tie | None:
    """The planned output that a planned input is, or None if it was computed in between."""
    nodes = state.trace.nodes
    if site.operand == "output":
        return None
    reader = next(n for n in nodes if n.key == site.call)
    index = reader.operands[site.operand][0]
    factor, moved = 1.0, False
    while index is not None:
        node: Node = nodes[index]
        if node.key is not None and Site(node.key, "output") in state.plan:
            return Tie(Site(node.key, "output"), factor, not moved)
        if node.kind == "scale" and node.key is None:
            if node.factor is None or node.factor <= 0:
                return None
            factor *= node.factor
        elif node.kind not in ("layout", "scale"):  # an added constant without an output site is an attention mask
            return None
        moved = True
        index = node.inputs[0]
    return None


def _scaled(p: Params, factor: float) -> Params:
    return p._replace(scale=p.scale * factor)
