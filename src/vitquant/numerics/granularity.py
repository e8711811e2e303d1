"""Which elements of a tensor share one set of grid parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Granularity:
    """The axes that keep parameters of their own; every other axis shares.

    With `axes = (a, ...)` there is one group for each index along those axes. With `group = n`, n
    consecutive indices of the (single) axis share one group; n must divide the axis, else the last
    group is smaller. Parameters are stored flat, one value for each group.

    >>> import torch
    >>> PER_CHANNEL.view(torch.zeros(2, 197, 192)).shape
    torch.Size([192, 394])
    """

    axes: tuple[int, ...] = ()
    group: int = 1

    def view(self, x: Tensor) -> Tensor:
        """x as (groups, elements): the shape in which every statistic and every search sees it."""
        kept = tuple(a % x.ndim for a in self.axes)
        rest = tuple(a for a in range(x.ndim) if a not in kept)
        count = _size(x, kept)
        flat = x.permute(*kept, *rest).reshape(count, -1)
        if self.group == 1:
            return flat
        if count % self.group:
            raise ValueError(f"axis of size {count} does not divide into groups of {self.group}")
        return flat.reshape(count // self.group, -1)

    def spread(self, p: Tensor, x: Tensor) -> Tensor:
        """Flat parameters `p` (groups,) in a shape that broadcasts against `x`."""
        if not self.axes:
            return p.reshape(())
        if self.group > 1:
            p = p.repeat_interleave(self.group)
        kept = {a % x.ndim for a in self.axes}
        return p.reshape([n if a in kept else 1 for a, n in enumerate(x.shape)])

    def __str__(self) -> str:
        name = _NAMES.get(self.axes, f"axes {self.axes}")
        return f"group of {self.group} x {name}" if self.group > 1 else name


def _size(x: Tensor, axes: tuple[int, ...]) -> int:
    count = 1
    for a in axes:
        count *= x.shape[a]
    return count


PER_TENSOR = Granularity()
PER_OUTPUT = Granularity((0,))
"""A weight's output channels: axis 0 of (out, in, ...)."""
PER_CHANNEL = Granularity((-1,))
"""An activation's channels: the last axis of (batch, tokens, channels)."""
PER_TOKEN = Granularity((-2,))
"""An activation's tokens: the axis before the last of (batch, tokens, channels)."""
PER_HEAD = Granularity((-3,))
"""The heads of an attention operand (batch, heads, tokens, dim)."""

_NAMES = {(): "tensor", (0,): "output", (-1,): "channel", (-2,): "token", (-3,): "head"}


def per_group(size: int, axis: int = -1) -> Granularity:
    """`size` consecutive indices of `axis` share one set of parameters."""
    return Granularity((axis,), size)
