"""The observers of FQ-ViT that are not a range or a grid of ranges: moving averages, and the power-of-two factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.calibrate.search import mean_errors
from vitquant.calibrate.statistic import Collector, Reservoir, Sample, quantiles
from vitquant.errors import NoData, UsageError
from vitquant.numerics import Params, PowerOfTwo, PowerOfTwoScale, Quantizer


class MovingRange:
    """The range of each batch, averaged: m ← m + momentum · (range of this batch - m), from the first batch on.

    tail: 0 for the batch's extremes, else its quantiles `tail` and 1 - `tail`.
    """

    def __init__(self, momentum: float, tail: float) -> None:
        self.momentum, self.tail = momentum, tail
        self._range: Tensor | None = None

    def update(self, x: Tensor) -> None:
        sample = Sample.of(x)
        ends = quantiles(x, (self.tail, 1 - self.tail)) if self.tail else torch.stack([sample.low, sample.high])
        self._range = ends if self._range is None else self._range + self.momentum * (ends - self._range)

    def summary(self) -> Sample:
        if self._range is None:
            raise NoData("no calibration image reached this site")
        low, high = self._range
        return Sample(low, high, self._range.T)


@dataclass(frozen=True)
class MovingAverage:
    """The moving average of the batches' ranges (FQ-ViT, released code: EMA, and Percentile with tail = 1e-5).

    The first batch dominates when batches are few: after 10 of them it still weighs 0.91.
    """

    momentum: float = 0.01
    tail: float = 0.0

    def collector(self, seed: int) -> Collector:
        return MovingRange(self.momentum, self.tail)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        return quantizer.fit(sample.low, sample.high)


@dataclass(frozen=True)
class PowerOfTwoMse:
    """The exponent of every channel with the smallest mean squared error on that channel; ties to the smallest.

    FQ-ViT (arXiv:2111.13824, section 3.2). Deviation from the released code, which looks at the last calibration
    batch only: a uniform sample of the whole stream, in bounded memory (`capacity` values, all channels together).
    """

    capacity: int = 2**18

    def collector(self, seed: int) -> Collector:
        return Reservoir(self.capacity, seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        if not isinstance(quantizer, PowerOfTwo):
            raise UsageError(f"PowerOfTwoMse searches exponents, which {quantizer.describe()} does not have")
        scale, zero, _ = quantizer.fit(sample.low, sample.high)
        shape = (quantizer.steps, len(sample.low))
        alphas = torch.arange(quantizer.steps, dtype=scale.dtype, device=scale.device)[:, None].expand(shape)
        candidates = PowerOfTwoScale(scale.expand(shape), zero.expand(shape), alphas)
        best = mean_errors(quantizer, sample.values, candidates).argmin(0)
        return PowerOfTwoScale(scale, zero, best.to(scale.dtype))


@dataclass(frozen=True)
class Fixed:
    """A range that is known beforehand: nothing is calibrated."""

    low: float
    high: float

    def collector(self, seed: int) -> Collector:
        return Reservoir(capacity=0, seed=seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        return quantizer.fit(torch.full_like(sample.low, self.low), torch.full_like(sample.high, self.high))
