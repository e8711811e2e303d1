"""The grid of a tensor's bulk: outliers are told apart first, then any search sees the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vitquant.calibrate.search import Percentile, Search
from vitquant.calibrate.statistic import Collector, Sample
from vitquant.errors import PlanError
from vitquant.numerics import OutlierAware, OutlierGrid, Params, Quantizer


@dataclass(frozen=True)
class Inliers:
    """For `OutlierAware`: `search` on the values with outliers set to 0 (they stay in the statistics).

    budget: if given, the fraction of elements that may be outliers; the threshold is then the smallest |x|
    that no more of the sample exceed, over all tokens, instead of the format's own. The parameters carry the
    fraction of outliers seen, which is what the format's cost is counted from. (ADFQ-ViT, arXiv:2407.02763,
    released code; the budget is our own.)
    """

    search: Search = field(default_factory=Percentile)
    budget: float | None = None

    def collector(self, seed: int) -> Collector:
        return self.search.collector(seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        if not isinstance(quantizer, OutlierAware):
            raise PlanError(f"the search for inliers is made for OutlierAware, not {type(quantizer).__name__}")
        size = sample.values.abs()
        threshold = torch.tensor(quantizer.threshold)
        if self.budget is not None:
            allowed = min(int(self.budget * size.numel()), size.numel() - 1)
            threshold = size.flatten().topk(allowed + 1).values[-1]  # just `allowed` values lie beyond it
        threshold = threshold.to(size)
        outlier = size > threshold
        inliers = Sample(
            torch.maximum(sample.low, -threshold).clamp(max=0),
            torch.minimum(sample.high, threshold).clamp(min=0),
            sample.values.masked_fill(outlier, 0.0),
        )
        scale, zero = self.search(quantizer.grid, inliers)
        fraction = outlier.to(size).mean(1)
        return OutlierGrid(scale, zero, threshold.expand_as(fraction).clone(), fraction)
