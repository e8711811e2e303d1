"""Choose a weight's integers so that the layer's output, not each weight, comes out nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitquant.calibrate import Bench
from vitquant.numerics import PER_OUTPUT, Params, Quantizer
from vitquant.numerics.uniform import TINY
from vitquant.passes.importance import token_importance
from vitquant.recipe.state import State
from vitquant.trace import Site

ROWS = 4
"""Tokens seen for each input channel below which a layer's statistics say too little to choose integers by: a head
behind pooling sees one token an image."""


@dataclass(frozen=True)
class Compensate:
    """Layer by layer, the integers that bring the quantized model's output nearest to the floating-point one's.

    For a linear with input x in floating point and x̂ in the model quantized so far, all of its layers before this
    one included, two steps minimise Σ g · ‖W x - Ŵ x̂‖² over tokens:

        W̃ = (W Σ g x x̂ᵀ + λW) (Σ g x̂ x̂ᵀ + λI)⁻¹, λ = `ridge`     the weights that make up for what came before
        Ŵ = argmin (W̃ - Ŵ) H (W̃ - Ŵ)ᵀ, H = Σ g x̂ x̂ᵀ + μI, μ = `damping`, column after column, each error
            spread over the columns after it

    The second is GPTQ's (arXiv:2210.17323), with columns in the order of falling diagonal; the first is least
    squares, and g = `even` + a token's share of the model's Fisher information (`token_importance`), mean 1 + `even`
    (own). λ and μ are in units of the mean diagonal of Σ g x̂ x̂ᵀ: few images show little of what a layer will see, and
    the first step overfits them sooner than the second.

    Runs after everything is fitted, covers linears with one grid for each output channel that see at least `ROWS`
    tokens for each input channel; others keep the nearest integers. Changes nothing but `State.codes`: grids stay as
    fitted. The model's output must be logits.
    """

    damping: float = 0.1
    ridge: float = 3.0
    even: float = 0.1
    most_bits: int = 4
    """Weights with more bits lose nothing worth the effort."""

    def __call__(self, state: State, bench: Bench) -> State:
        weights = [s for s in state.trace.sites if s in state.params and self._covers(s, state)]
        importance = token_importance([s.call for s in weights], state, bench) if weights else {}
        for done, site in enumerate(weights):
            bench.progress("compensating", done, len(weights))
            shares = torch.cat([g.flatten() for g in importance[site.call]])
            if len(shares) < ROWS * state.trace.constants[site].shape[1]:
                continue
            scale = 1 / shares.mean().clamp(min=TINY)
            weighing = [g * scale + self.even for g in importance[site.call]]
            codes = {**state.codes, site: self._codes(site, weighing, state, bench)}
            state = replace(state, codes=codes)
        return state

    def _covers(self, site: Site, state: State) -> bool:
        linear = site.call.op == "linear" and site.operand == "weight"
        quantizer = state.plan[site].quantizer
        return linear and quantizer.granularity == PER_OUTPUT and quantizer.bits <= self.most_bits

    def _codes(self, site: Site, weighing: Sequence[Tensor], state: State, bench: Bench) -> Tensor:
        weight = state.constant(site)
        assert weight is not None
        gram, cross = _correlations(Site(site.call, "input"), weighing, state, bench)
        unit = gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram)).to(gram)
        # W̃ = W + W (Σ g x x̂ᵀ - Σ g x̂ x̂ᵀ) (Σ g x̂ x̂ᵀ + λI)⁻¹
        better = weight.detach().double()
        factor = torch.linalg.cholesky(gram + self.ridge * unit)
        better = better + torch.cholesky_solve((better @ (cross - gram)).T, factor).T
        h = gram + self.damping * unit
        return compensated(better.float(), h, state.plan[site].quantizer, state.params[site])


def _correlations(site: Site, weighing: Sequence[Tensor], state: State, bench: Bench) -> tuple[Tensor, Tensor]:
    """Σ g x̂ x̂ᵀ and Σ g x x̂ᵀ, (in, in), over all tokens of all images, in float64. weighing: g of each batch."""
    full, low = state.floating().transforms(), state.transforms()
    gram, cross = torch.zeros(()), torch.zeros(())
    for batch, weights in zip(bench.images, weighing, strict=True):
        x = bench.operand(site, batch, full).flatten(0, -2)
        arriving = bench.operand(site, batch, low)
        x_hat = (low[site](arriving) if site in low else arriving).flatten(0, -2)
        weighed = (x_hat * weights.flatten()[:, None]).T
        gram = gram + (weighed @ x_hat).double()
        cross = cross + (weighed @ x).T.double()
    return gram, cross


def compensated(weight: Tensor, h: Tensor, quantizer: Quantizer, p: Params, block: int = 64) -> Tensor:
    """Integers of `weight` (out, in) that minimise (w - ŵ) h (w - ŵ)ᵀ greedily, in float32. h: (in, in), positive
    definite. All rows at once; columns in turn, for each depends on those before. block: columns updated together."""
    order = h.diagonal().argsort(descending=True)
    # Row i of the upper Cholesky factor of h⁻¹ says how column i's error spreads over the columns after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w = weight[:, order].clone()
    codes = torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for i in range(start, stop):
            codes[:, i] = quantizer.encode_resolved(w[:, i], p)
            error = (w[:, i] - quantizer.decode_resolved(codes[:, i], p)) / upper[i, i]
            w[:, i + 1 : stop] -= error[:, None] * upper[i, i + 1 : stop]
            errors[:, i - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes[:, order.argsort()]
