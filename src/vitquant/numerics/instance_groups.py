"""Run-time groups: every channel or row of every instance picks one grid of a small bank."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vitquant.errors import UsageError
from vitquant.numerics.granularity import PER_CHANNEL, Granularity
from vitquant.numerics.quantizer import Affine, Quantizer
from vitquant.numerics.uniform import Uniform

FLOAT_OP = 32
"""Bit-operations that one operation on floating-point numbers counts as (IGQ-ViT)."""


class Bank(NamedTuple):
    """A bank of affine grids, each (groups,), and the bounds by which they are picked.

    low, high: bounds in the tensor's units. scale, zero: the grids, as in `Affine`.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class InstanceGroups(Quantizer):
    """A bank of `groups` uniform grids; each unit of each instance uses the one with the nearest bounds.

    unit c of instance i:  π = argmin_g (max x_ic - high_g)² + (min x_ic - low_g)²
                           x̂ = scale_π · (code - zero_π), code = clip(round(x / scale_π) + zero_π, 0, 2^b - 1)

    The bank is fixed after calibration, only π depends on x. (IGQ-ViT, arXiv:2404.00928, sections 3.2 and 3.3; the
    distance is reconstructed, see docs/methods/igq-vit.md.)

    granularity: the axes that index the units of an instance; PER_CHANNEL for inputs of linears (batch, ...,
    channels), PER_ROW for attention probabilities (batch, heads, rows, keys). span: how many consecutive indices of
    axis 0 make one instance (windows that belong to one image); axis 0 must be a multiple of it. from_zero: x is
    never negative and every range starts at 0, so only maxima are compared. include_zero: as in `Uniform`.

    Units of the tensor; ties go to the first grid. With one group nothing is computed at run time: a static grid.
    Raises UsageError for less than one group or an axis 0 that does not divide into instances, NonFinite in `fit`.
    """

    granularity: Granularity = PER_CHANNEL
    groups: int = 8
    span: int = 1
    from_zero: bool = False
    include_zero: bool = False

    parameters: ClassVar[type] = Bank
    static: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1 or self.span < 1:
            raise UsageError(f"{type(self).__name__}: groups and span must be at least 1")

    def together(self, dims: int) -> int:
        return self.span

    @property
    def grid(self) -> Uniform:
        """The format of one group."""
        return Uniform(self.bits, include_zero=self.include_zero)

    def view(self, x: Tensor) -> Tensor:
        """The ranges of all units of all instances as points: (2, units), lows above highs."""
        return torch.stack([bound.reshape(-1) for bound in self.ranges(x)])

    def fit(self, low: Tensor, high: Tensor) -> Bank:
        """The bank with these bounds, (groups,) each."""
        return Bank(low.float(), high.float(), *self.grid.fit(low, high))

    def ranges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of every unit: (instances, span or 1, ...) with the shared axes of size 1."""
        x = self._instances(x)
        units = {a % (x.ndim - 1) + 1 for a in self.granularity.axes}
        shared = [a for a in range(1, x.ndim) if a not in units]
        high = x.amax(shared, keepdim=True)
        return (torch.zeros_like(high) if self.from_zero else x.amin(shared, keepdim=True)), high

    def assign(self, x: Tensor, p: Bank) -> Tensor:
        """The grid of every unit, as int64 indices in a shape that broadcasts against x."""
        low, high = self.ranges(x)
        column = (-1, *[1] * high.dim())
        distance = (high - p.high.view(column)).square_()
        if not self.from_zero:
            distance += (low - p.low.view(column)).square_()
        index = distance.min(0).indices  # half the time of argmin; of equal distances the first, too
        return index.expand(-1, self.span, *index.shape[2:]).flatten(0, 1)

    def resolve(self, x: Tensor, p: Bank) -> Affine:
        if self.groups == 1:
            return Affine(p.scale.reshape(()), p.zero.reshape(()))
        index = self.assign(x.detach(), p)
        return Affine(p.scale.take(index), p.zero.new_zeros(()) if self.from_zero else p.zero.take(index))

    def encode_resolved(self, x: Tensor, p: Affine) -> Tensor:
        return self.grid.encode_resolved(x, p)

    def decode_resolved(self, codes: Tensor, p: Affine) -> Tensor:
        return self.grid.decode_resolved(codes, p)

    def round_trip(self, x: Tensor, p: Affine, out: Tensor) -> Tensor:
        if self.from_zero:  # then every zero-point is 0
            return torch.div(x, p.scale, out=out).round_().clamp_(0, self.levels - 1).mul_(p.scale)
        return self.grid.round_trip(x, p, out)

    def extra_bops(self, shape: tuple[int, ...], macs: int = 0) -> int:
        """Ranges, assignment, and the floating-point sum of the groups' products, if units lie along its inner axis.

        32 · (bounds · elements + (bounds + 1) · units · G + outputs · (G - 1)), bounds = 1 with `from_zero`, else 2.
        """
        if self.groups == 1:
            return 0
        bounds = 1 if self.from_zero else 2
        inner = (len(shape) - 1) in {a % len(shape) for a in self.granularity.axes}
        sums = macs // shape[-1] * (self.groups - 1) if inner else 0
        return FLOAT_OP * (bounds * prod(shape) + (bounds + 1) * self._units(shape) * self.groups + sums)

    def describe(self) -> str:
        what = "row" if self.granularity == PER_ROW else str(self.granularity)
        return f"{type(self).__name__}{self.bits} / {self.groups} groups of {what}s"

    def _units(self, shape: tuple[int, ...]) -> int:
        kept = {a % len(shape) for a in self.granularity.axes} - {0}
        return shape[0] // self.span * prod(shape[a] for a in kept)

    def _instances(self, x: Tensor) -> Tensor:
        """x as (instances, span, ...)."""
        if x.shape[0] % self.span:
            raise UsageError(f"an axis of {x.shape[0]} does not divide into instances of {self.span}")
        return x.unflatten(0, (-1, self.span))


PER_ROW = Granularity((-3, -2))
"""The rows (one for each query token) of attention probabilities (batch, heads, rows, keys)."""
