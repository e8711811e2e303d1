"""Choose a weight's integers so that the layer's output, not each weight, comes out nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitquant.calibrate import Bench, Sample
from vitquant.errors import NoData
from vitquant.numerics import PER_CHANNEL, PER_OUTPUT, Params, Quantizer
from vitquant.recipe.state import State
from vitquant.trace import Site


class Gram:
    """Sums x·xᵀ over a stream of (channels, n) tensors, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def update(self, x: Tensor) -> None:
        product = (x @ x.T).double()
        self.total = product if self.total is None else self.total + product

    def summary(self) -> Sample:
        if self.total is None:
            raise NoData("no calibration image reached this site")
        return Sample.of(self.total)


@dataclass(frozen=True)
class Compensate:
    """Rounds column by column and lets the later columns make up for the error (GPTQ, arXiv:2210.17323).

    For ŵ on the fitted grid of each output channel, minimises (w - ŵ) H (w - ŵ)ᵀ greedily, H = XᵀX + λI with X the
    layer's inputs over the calibration images (in floating point, under the exact rewrites) and λ = `damping` ·
    mean diag H. Columns run in the order of falling diagonal. All rows at once; columns in turn, for each depends on
    those before. Covers linears with one grid for each output channel; others keep the nearest integers. Changes
    nothing but `State.codes`: the grids stay as they were fitted. Needs fitted weights.
    """

    damping: float = 0.01
    most_bits: int = 4
    """Weights with more bits lose nothing worth the effort."""

    def __call__(self, state: State, bench: Bench) -> State:
        weights = [s for s in state.params if self._covers(s, state)]
        grams = {Site(s.call, "input"): Gram() for s in weights}
        if not grams:
            return state
        collectors = {s: (PER_CHANNEL, gram) for s, gram in grams.items()}
        bench.sweep(state.floating().transforms(), collectors, "correlations")
        codes = dict(state.codes)
        for done, site in enumerate(weights):
            bench.progress("compensating", done, len(weights))
            weight, gram = state.constant(site), grams[Site(site.call, "input")].total
            assert weight is not None and gram is not None
            codes[site] = compensated(
                weight.detach(), gram, state.plan[site].quantizer, state.params[site], self.damping
            )
        return replace(state, codes=codes)

    def _covers(self, site: Site, state: State) -> bool:
        linear = site.call.op == "linear" and site.operand == "weight"
        quantizer = state.plan[site].quantizer
        return linear and quantizer.granularity == PER_OUTPUT and quantizer.bits <= self.most_bits


def compensated(
    weight: Tensor, gram: Tensor, quantizer: Quantizer, p: Params, damping: float, block: int = 64
) -> Tensor:
    """The integers of `weight` (out, in), in float32. gram: (in, in), XᵀX. block: columns updated together."""
    order = gram.diagonal().argsort(descending=True)
    h = gram[order][:, order]
    h = h + damping * h.diagonal().mean().clamp(min=1e-12) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    # Row i of the upper Cholesky factor of H⁻¹ says how column i's error spreads over the columns after it.
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    w = weight.float()[:, order].clone()
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
