"""A recipe: which role gets which number format, and which passes run in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

from vitquant.calibrate import Bench
from vitquant.errors import PlanError
from vitquant.numerics import PER_OUTPUT, Granularity
from vitquant.recipe.state import Rule, State
from vitquant.trace import CONTRACTION_ROLES, Role, Site, Trace


class Pass(Protocol):
    """One step of a method: decisions so far → decisions."""

    def __call__(self, state: State, bench: Bench) -> State: ...


FLOAT = None
"""Said of a role or a site that stays in floating point on purpose."""


@dataclass(frozen=True)
class Recipe:
    """A method, ready to run.

    rules: what each role gets; it must cover every role that a contraction of the model has (FLOAT is said
    aloud). passes: run in order. overrides: (pattern, rule) pairs; the pattern is matched against a site's
    printed form with * and ?, and the last that fits wins. source: the paper. bits: as the user said them.
    cost: what it costs at run time, in words.
    """

    name: str
    rules: Mapping[Role, Rule | None]
    passes: tuple[Pass, ...]
    source: str = "own"
    bits: str = ""
    overrides: tuple[tuple[str, Rule | None], ...] = ()
    cost: str = ""

    def plan(self, trace: Trace) -> dict[Site, Rule]:
        """The rule of every site that is to be quantized. Raises PlanError for a role without a rule."""
        plan = {}
        for site, info in trace.sites.items():
            if info.role in CONTRACTION_ROLES and info.role not in self.rules:
                raise PlanError(
                    f"recipe '{self.name}' has no rule for role '{info.role}' ({site}); it covers "
                    + ", ".join(sorted(map(str, self.rules)))
                )
            rule = self._rule(site, info.role)
            if rule is not None:
                plan[site] = _for_output_axis(rule, info.out_axis) if info.role is Role.WEIGHT else rule
        return plan

    def _rule(self, site: Site, role: Role) -> Rule | None:
        rule = self.rules.get(role)
        for pattern, other in self.overrides:
            if fnmatchcase(str(site), pattern):
                rule = other
        return rule


def _for_output_axis(rule: Rule, axis: int) -> Rule:
    """A rule for output channels, turned to the axis on which this weight has them."""
    if rule.quantizer.granularity != PER_OUTPUT or axis == 0:
        return rule
    return replace(rule, quantizer=replace(rule.quantizer, granularity=Granularity((axis,))))
