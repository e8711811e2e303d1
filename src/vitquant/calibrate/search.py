"""From a sample of a tensor's values to the parameters of its number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitquant.calibrate.statistic import Collector, Reservoir, Sample, quantiles
from vitquant.numerics import Params, Quantizer

CHUNK = 2**22
"""Elements that a search holds at once, all candidates together: 16 MiB."""


class Search(Protocol):
    """Chooses a format's parameters, and says what has to be gathered for that."""

    def collector(self, seed: int) -> Collector: ...

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params: ...


@dataclass(frozen=True)
class MinMax:
    """The range that was seen, without clipping."""

    def collector(self, seed: int) -> Collector:
        return Reservoir(capacity=0, seed=seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        return quantizer.fit(sample.low, sample.high)


@dataclass(frozen=True)
class Percentile:
    """The two-sided percentile range with the smallest mean squared error on the tensor itself.

    Candidates are [quantile(1 - p), quantile(p)] for p in `levels`, chosen for each group on its own
    (RepQ-ViT, arXiv:2212.08254, released code).
    """

    levels: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    capacity: int = 2**19

    def collector(self, seed: int) -> Collector:
        return Reservoir(self.capacity, seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        high = quantiles(sample.values, self.levels)
        low = quantiles(sample.values, tuple(1 - p for p in self.levels))
        return least_error(quantizer, sample.values, low, high)


@dataclass(frozen=True)
class MseGrid:
    """The seen range shrunk at both ends by the factor with the smallest mean squared error.

    Candidates are r · [low, high] for `steps` factors r from 1 down to `least`, for each group on its own
    (OMSE; FQ-ViT uses 90 steps of 0.01).
    """

    steps: int = 90
    least: float = 0.11
    capacity: int = 2**17

    def collector(self, seed: int) -> Collector:
        return Reservoir(self.capacity, seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        ratios = torch.linspace(1, self.least, self.steps, device=sample.low.device)[:, None]
        return least_error(quantizer, sample.values, ratios * sample.low, ratios * sample.high)


def least_error(quantizer: Quantizer, values: Tensor, low: Tensor, high: Tensor) -> Params:
    """The parameters of the best candidate range for each group.

    values: (groups, n). low, high: (candidates, groups). Ties go to the first candidate.
    """
    candidates = quantizer.fit(low, high)
    best = mean_errors(quantizer, values, candidates).argmin(0, keepdim=True)
    return type(candidates)(*(field.gather(0, best)[0] for field in candidates))


def mean_errors(quantizer: Quantizer, values: Tensor, candidates: Params) -> Tensor:
    """Mean squared error of every candidate: fields (candidates, groups) → (candidates, groups).

    All candidates and groups at once, a bounded number of elements at a time.
    """
    p = type(candidates)(*(field[..., None] for field in candidates))
    shape = candidates[0].shape
    columns = max(CHUNK // shape.numel(), 1)
    total = torch.zeros(shape, dtype=torch.float64, device=values.device)
    with torch.no_grad():
        for part in values.split(columns, 1):
            error = quantizer.decode_resolved(quantizer.encode_resolved(part, p), p).sub_(part)
            total += error.square_().sum(-1)
    return total / values.shape[1]
