"""A convolution as a product of rows: what every window sees, flattened as the weight is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vitquant.errors import PlanError

Sizes = int | Sequence[int]


@dataclass(frozen=True)
class Patches:
    """x (batch, channels, *sizes) → (batch, *positions, channels · kernel), so that conv(x, W) = rows · W.flatten(1)ᵀ
    with the channels last.

    For each axis: kernel size, stride, padding before and behind, dilation.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @staticmethod
    def of(
        weight: Tensor, stride: Sizes = 1, padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1
    ) -> Patches:
        """From a weight (out, in, *kernel) and torch's further arguments. Raises PlanError for groups."""
        if groups != 1:
            raise PlanError("a convolution of groups has no product of integers here")
        kernel = tuple(weight.shape[2:])
        steps, gaps = _each(stride, len(kernel)), _each(dilation, len(kernel))
        if padding == "same":
            whole = [gap * (k - 1) for gap, k in zip(gaps, kernel, strict=True)]
            edges = tuple((n // 2, n - n // 2) for n in whole)
        else:
            edges = tuple((n, n) for n in _each(0 if isinstance(padding, str) else padding, len(kernel)))
        return Patches(kernel, steps, edges, gaps)

    def __call__(self, x: Tensor, fill: int = 0) -> Tensor:
        """fill: what stands for 0 at the edges."""
        x = F.pad(x, [n for pair in reversed(self.padding) for n in pair], value=fill)
        for axis, (k, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(axis + 2, gap * (k - 1) + 1, step)[..., ::gap]
        return x.movedim(1, 1 + len(self.kernel)).flatten(1 + len(self.kernel))


def _each(value: Sizes, axes: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * (axes // len(sizes))
