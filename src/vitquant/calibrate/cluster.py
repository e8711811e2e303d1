"""Banks of ranges by clustering."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from vitquant.calibrate.statistic import Collector, Reservoir, Sample
from vitquant.numerics import Params, Quantizer


@dataclass(frozen=True)
class RangeClusters:
    """The bounds of a bank: k-means over the (low, high) points of all units of all calibration images.

    For an `InstanceGroups` format, whose `view` shows those points. Bounds are the clusters' means: the minimiser of
    the distance by which units pick their grid at run time (IGQ-ViT, arXiv:2404.00928, equations 4 to 6, as
    reconstructed in docs/methods/igq-vit.md). `restarts` k-means++ starts, the best one stays; an empty cluster is
    moved to the worst fitting point (scikit-learn does both). At most `capacity` points are kept for each site.
    """

    restarts: int = 4
    capacity: int = 2**15
    seed: int = 0

    def collector(self, seed: int) -> Collector:
        return Reservoir(2 * self.capacity, seed)

    def __call__(self, quantizer: Quantizer, sample: Sample) -> Params:
        low, high = means(sample.values, quantizer.groups, self.restarts, self.seed)  # type: ignore[attr-defined]
        return quantizer.fit(low, high)


def means(points: Tensor, count: int, restarts: int, seed: int) -> Tensor:
    """The centres of `count` clusters, sorted by height: (dims, points) → (dims, count).

    Fewer distinct points than clusters: each is a centre, the last one repeatedly.
    """
    data = points.T.double().cpu().numpy()
    centres = np.unique(data, axis=0)
    if len(centres) > count:
        with threadpool_limits(1):  # several threads add up in any order: not the same bytes twice
            centres = KMeans(count, n_init=restarts, random_state=seed).fit(data).cluster_centers_
    centres = centres[np.lexsort(centres.T)]
    centres = np.concatenate([centres, np.repeat(centres[-1:], count - len(centres), 0)])
    return torch.from_numpy(centres.T.copy()).to(points)
