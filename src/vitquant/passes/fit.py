"""Find the parameters of every planned site that has none yet."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitquant.calibrate import Bench, Sample
from vitquant.errors import CalibrationError
from vitquant.numerics import Params
from vitquant.recipe.state import Rule, State
from vitquant.trace import Site


@dataclass(frozen=True)
class Fit:
    """Weights from their values, activations from one sweep of the calibration images in floating point."""

    def __call__(self, state: State, bench: Bench) -> State:
        missing = [s for s in state.plan if s not in state.params]
        weights = {s: fit_weight(s, state) for s in missing if state.constant(s) is not None}
        collectors = {
            s: (rule.quantizer, rule.search.collector(bench.seed))
            for s in missing
            if s not in weights
            for rule in [state.plan[s]]
        }
        if collectors:
            bench.sweep(state.floating().transforms(), collectors)
        found = {s: search(state.plan[s], collector.summary(), s) for s, (_, collector) in collectors.items()}
        return replace(state, params={**state.params, **weights, **found})


def fit_weight(site: Site, state: State) -> Params:
    """The parameters of a weight, from all its values as they stand."""
    weight = state.constant(site)
    assert isinstance(weight, Tensor)
    rule = state.plan[site]
    return search(rule, Sample.of(rule.quantizer.view(weight.detach())), site)


def search(rule: Rule, sample: Sample, site: Site) -> Params:
    """The rule's search, its errors told with the site's name."""
    try:
        return rule.search(rule.quantizer, sample)
    except CalibrationError as error:
        raise type(error)(f"{site}: {error}") from None
