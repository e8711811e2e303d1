"""How much each token of each product's output matters to what the model says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitquant.calibrate import Bench
from vitquant.passes.allocate import log_probs
from vitquant.recipe.state import State
from vitquant.trace import CallKey, Site, Transform

IMAGES = 8
"""Images whose gradients are held at once."""


def token_importance(
    calls: Sequence[CallKey], state: State, bench: Bench, samples: int = 4
) -> dict[CallKey, list[Tensor]]:
    """Mean over y of Σ_o (∂ log p_y / ∂z_o)² for every token z of every call's output, in floating point.

    The labels y are drawn from the model's own p: a diagonal of the Fisher information, which is what the model's
    divergence from itself looks like near zero; no true label is needed. For each call one tensor for each batch of
    calibration images: (images, ..., tokens), as the output without its last axis. The model's output must be
    logits, classes on the last axis.
    """
    random = torch.Generator(bench.images.first().device).manual_seed(bench.seed)
    found: dict[CallKey, list[Tensor]] = {call: [] for call in calls}
    for done, batch in enumerate(bench.images):
        bench.progress("weighing tokens", done * len(batch), bench.images.total)
        parts = [_of(calls, part, state, bench, samples, random) for part in batch.split(IMAGES)]
        for i, call in enumerate(calls):
            found[call].append(torch.cat([part[i] for part in parts]))
    return found


def _of(
    calls: Sequence[CallKey], images: Tensor, state: State, bench: Bench, samples: int, random: torch.Generator
) -> list[Tensor]:
    """The same for a few images."""
    outputs: dict[CallKey, Tensor] = {}

    def keeping(call: CallKey) -> Transform:
        def keep(y: Tensor) -> Tensor:
            outputs[call] = y if y.requires_grad else y.requires_grad_()
            return y

        return keep

    exact = state.floating().transforms()
    with torch.enable_grad():
        output = bench.run(images, {**exact, **{Site(call, "output"): keeping(call) for call in calls}})
        log_p = log_probs(output)
    kept = [outputs[call] for call in calls]
    sums = [torch.zeros(y.shape[:-1], device=y.device) for y in kept]
    for _ in range(samples):
        label = torch.multinomial(log_p.detach().exp(), 1, generator=random)
        likelihood = log_p.gather(-1, label).sum()
        gradients = torch.autograd.grad(likelihood, kept, retain_graph=True, materialize_grads=True)
        sums = [total + g.square().sum(-1) / samples for total, g in zip(sums, gradients, strict=True)]
    return sums
