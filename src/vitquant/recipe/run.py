"""Run a recipe: observe, plan, then pass after pass, each checked."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.calibrate import Bench
from vitquant.errors import FloatDrift, PlanError
from vitquant.recipe.recipe import Recipe
from vitquant.recipe.state import State
from vitquant.trace.intercept import tensors_in

DRIFT = 1e-4
"""Root-mean-square change of the output, relative to its own, that rounding of exact rewrites may cause."""


def apply(recipe: Recipe, bench: Bench) -> State:
    """All decisions that the recipe takes for the bench's model.

    Raises FloatDrift if a pass changed the float function, PlanError if a planned site has no parameters in
    the end, and whatever the passes raise.
    """
    state = State(bench.trace, recipe.plan(bench.trace))
    image = bench.images.first()
    with torch.no_grad():
        before = tensors_in(_leaves(bench.run(image, {})))
    for step in recipe.passes:
        state = step(state, bench)
        if state.rewrites:
            _check_drift(step, before, state, bench, image)
    missing = [str(s) for s in state.plan if s not in state.params]
    if missing:
        raise PlanError(f"recipe '{recipe.name}' left {len(missing)} sites unfitted: {', '.join(missing[:5])}")
    return state


def _leaves(output: object) -> object:
    return output.to_tuple() if hasattr(output, "to_tuple") else output


def _check_drift(step: object, before: list[Tensor], state: State, bench: Bench, image: Tensor) -> None:
    with torch.no_grad():
        after = tensors_in(_leaves(bench.run(image, state.floating().transforms())))
    for old, new in zip(before, after, strict=True):
        drift = (new - old).double().norm() / old.double().norm().clamp(min=1e-30)
        if drift > DRIFT and (new - old).abs().max() > 1e-6:
            raise FloatDrift(f"{step} changed the float output by {drift:.1e} of its size; allowed is {DRIFT:.0e}")
