"""The grid of a tensor's bulk: outliers are told apart first, then any search sees the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vitquant.calibrate.search import Percentile, Search
from vitquant.calibrate.statistic import Collector, Sample, quantiles
from vitquant.errors import PlanError
from vitquant.numerics import OutlierAware, OutlierGrid, Params, Quantizer


@dataclass(frozen=True)
class Inliers:
    """For `OutlierAware`: `search` on the values with outliers set to 0 (they stay in the statistics).

    budget: if given, the fraction of elements that may be outliers; the threshold is then the (1 - budget)
    quantile of |x| over all tokens instead of the format's own. The parameters carry the fraction of outliers
    seen, which is what the format's cost is counted from. (ADFQ-ViT, arXiv:2407.02763, released code; the
    budget is our own.)
    """

    search: Search = Percentile()
    budget: float | None = None

    def collector(self, seed: int) -> Collector:
        return self.search.collector(seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        if not isinstance(quantizer, OutlierAware):
            raise PlanError(f"the search for inliers is made for OutlierAware, not {type(quantizer).__name__}")
        size = sample.values.abs()
        threshold = torch.tensor(quantizer.threshold)
        if self.budget is not None:
            threshold = quantiles(size.reshape(1, -1), (1 - self.budget,)).reshape(())
        threshold = threshold.to(size)
        outlier = size > threshold
        inliers = Sample(
            sample.low.clamp(min=-threshold, max=0),
            sample.high.clamp(min=0, max=threshold),
            sample.values.masked_fill(outlier, 0.0),
        )
        grid = self.search(quantizer.grid, inliers)
        fraction = outlier.to(size).mean(1)
        return OutlierGrid(*grid, threshold.expand_as(fraction).clone(), fraction)
