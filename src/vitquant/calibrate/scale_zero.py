"""A uniform grid's step and zero-point, searched together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.calibrate.search import CHUNK
from vitquant.calibrate.statistic import Collector, Reservoir, Sample
from vitquant.numerics import Affine, Params, Quantizer


@dataclass(frozen=True)
class ScaleZero:
    """The (step, integer zero-point) with the smallest mean |x - x̂|^power, of `steps` · 2^b candidates.

    Steps are i / `steps` of the one that spans the observed range, i = 1 .. `steps`; every code is tried as the
    zero-point. That holds the one-sided search of the released code: for x >= 0 no zero-point beats 0. Values
    are summed up in a histogram of `bins` equal bins, each at the mean of what fell into it, so that the cost
    does not grow with their number; the error of that is below half a bin. ADFQ-ViT (arXiv:2407.02763,
    released code: 100 steps, power 2.4; there every value is visited).
    """

    steps: int = 100
    power: float = 2.4
    bins: int = 2048
    capacity: int = 2**19

    def collector(self, seed: int) -> Collector:
        return Reservoir(self.capacity, seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        full = quantizer.fit(sample.low.clamp(max=0), sample.high.clamp(min=0))
        first, last = quantizer.code_range
        ratios = torch.arange(1, self.steps + 1, device=sample.low.device) / self.steps
        zeros = torch.arange(first, last + 1.0, device=sample.low.device)
        ratio, zero = (grid.reshape(-1, 1) for grid in torch.meshgrid(ratios, zeros, indexing="ij"))
        candidates = Affine(ratio * full.scale, zero.expand(-1, len(full.scale)))
        centres, weights = _histogram(sample.values, self.bins)
        best = self._errors(quantizer, candidates, centres, weights).argmin(0, keepdim=True)
        return Affine(*(field.gather(0, best)[0] for field in candidates))

    def _errors(self, quantizer: Quantizer, candidates: Affine, centres: Tensor, weights: Tensor) -> Tensor:
        """Σ weight · |x - x̂|^power of every candidate for every group, a bounded number of elements at a time."""
        rows = max(CHUNK // centres.numel(), 1)
        errors = []
        with torch.no_grad():
            for scale, zero in zip(*(field.split(rows) for field in candidates), strict=True):
                p = Affine(scale[..., None], zero[..., None])
                error = quantizer.decode_resolved(quantizer.encode_resolved(centres, p), p).sub_(centres)
                errors.append(error.abs_().pow_(self.power).mul_(weights).sum(-1))
        return torch.cat(errors)


def _histogram(values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Mean and share of the values of each bin: (groups, n) → (groups, bins) twice; an empty bin weighs 0."""
    low, high = values.aminmax(dim=1, keepdim=True)
    width = ((high - low) / bins).clamp(min=1e-30)
    index = ((values - low) / width).long().clamp_(max=bins - 1)
    empty = values.new_zeros(len(values), bins)
    count = empty.scatter_add(1, index, torch.ones_like(values))
    total = empty.scatter_add(1, index, values)
    return total / count.clamp(min=1), count / values.shape[1]
