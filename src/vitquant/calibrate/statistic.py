"""Gathering numbers from a stream of tensors in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitquant.errors import NoData, NonFinite


@dataclass(frozen=True)
class Sample:
    """What is known of a tensor's values after a sweep.

    low, high: exact range, (groups,). values: (groups, n), all values or a uniform random subset of them.
    """

    low: Tensor
    high: Tensor
    values: Tensor

    @staticmethod
    def of(x: Tensor) -> Sample:
        """Everything that `x` (groups, elements) holds. Raises NonFinite on NaN or infinity."""
        return Sample(*_finite_range(x), x)


class Collector(Protocol):
    """Sees a site's tensor batch by batch, as (groups, elements), and sums it up."""

    def update(self, x: Tensor) -> None: ...

    def summary(self) -> Sample: ...


class Reservoir:
    """Exact range and a uniform random sample of at most `capacity` values, whatever the stream's length.

    Every column (one element of each group) draws a random key; the columns with the smallest keys stay. So
    the sample is uniform without replacement, and all groups keep the same columns. With `capacity` 0 only
    the range is kept. Own; the key trick is the classical one for distributed reservoir sampling.
    """

    def __init__(self, capacity: int = 2**19, seed: int = 0) -> None:
        self.capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._range: tuple[Tensor, Tensor] | None = None
        self._values: Tensor | None = None
        self._keys = torch.empty(0)

    def update(self, x: Tensor) -> None:
        low, high = _finite_range(x)
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high
        if self.capacity:
            self._sample(x)

    def _sample(self, x: Tensor) -> None:
        limit = max(self.capacity // x.shape[0], 1)
        keys = torch.rand(x.shape[1], generator=self._generator)
        if len(self._keys) >= limit:  # what lies above the largest kept key cannot enter
            entering = (keys < self._keys.max()).nonzero().flatten()
            x, keys = x[:, entering.to(x.device)], keys[entering]
        values = x if self._values is None else torch.cat([self._values, x], 1)
        keys = torch.cat([self._keys, keys])
        if len(keys) > limit:
            kept = keys.topk(limit, largest=False).indices.sort().values
            values, keys = values[:, kept.to(values.device)], keys[kept]
        self._values, self._keys = values.clone() if values is x else values, keys

    def summary(self) -> Sample:
        if self._range is None:
            raise NoData("no calibration image reached this site")
        low, high = self._range
        return Sample(low, high, self._values if self._values is not None else low[:, None])


def _finite_range(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.shape[1]:
        raise NoData("an empty tensor has no range")
    low, high = x.amin(1), x.amax(1)  # aminmax along an axis is several times slower
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise NonFinite(f"{bad} of {x.numel()} values are NaN or infinity")
    return low, high


def quantiles(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Quantiles of each row, linearly interpolated: (groups, n) → (len(levels), groups).

    Only the tails that the levels need are sorted, so the size of the rows is not limited.
    """
    return torch.stack([_quantile(values, level) for level in levels])


def _quantile(values: Tensor, level: float) -> Tensor:
    if level < 0.5:
        return -_quantile(-values, 1 - level)
    position = level * (values.shape[1] - 1)
    below = int(position)
    tail = values.topk(values.shape[1] - below, dim=1).values  # descending: ends with rank `below`
    lower, upper = tail[:, -1], tail[:, -2] if tail.shape[1] > 1 else tail[:, -1]
    return lower + (upper - lower) * (position - below)
