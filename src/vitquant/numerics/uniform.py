"""Affine grids: equally spaced levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.numerics.quantizer import Affine, Quantizer, checked_range, round_ste

TINY = 2.0**-126
"""The smallest normal float32: a scale below it would turn x / scale into infinity."""
NARROW = 2.0**-14
"""A range this narrow, relative to its distance from 0, counts as one value: its zero-point would not be exact."""
FAR = 2.0**23
"""Steps beyond every code and zero-point; what lies further saturates anyway."""


@dataclass(frozen=True)
class Uniform(Quantizer):
    """x̂ = scale · (code - zero), code = clip(round(x / scale) + zero), zero an integer.

    Asymmetric (default): codes 0 .. 2^b - 1, scale = (high - low) / (2^b - 1), zero = round(-low / scale).
    Symmetric: signed codes -2^(b-1) .. 2^(b-1) - 1, zero = 0, scale = max|x| / (2^(b-1) - 1); with
    `full_range`, max|x| / (2^(b-1) - 1/2), so that both end codes are in use (FQ-ViT's weights).

    `include_zero` widens an asymmetric range to hold 0. Without it the zero-point may lie outside the codes
    (RepQ-ViT). A constant group keeps its value exactly; one that is constantly 0 takes the mean scale of
    the others. x: any shape, units of the tensor. Raises NonFinite on a range with NaN or infinity.
    """

    symmetric: bool = False
    include_zero: bool = True
    full_range: bool = False

    @property
    def code_range(self) -> tuple[int, int]:
        return (-self.levels // 2, self.levels // 2 - 1) if self.symmetric else (0, self.levels - 1)

    def fit(self, low: Tensor, high: Tensor) -> Affine:
        low, high = checked_range(low, high)
        if self.symmetric:
            top = (self.levels - 1) / 2 if self.full_range else max(self.levels // 2 - 1, 1)
            scale = _positive(torch.maximum(low.abs(), high.abs()) / top)
            return Affine(scale, torch.zeros_like(scale))
        constant = high - low <= NARROW * torch.maximum(low.abs(), high.abs())
        zeroed = constant | self.include_zero
        low = torch.where(zeroed, low.clamp(max=0), low)
        high = torch.where(zeroed, high.clamp(min=0), high)
        top = self.levels - 1
        scale = _positive(high / top - low / top)
        return Affine(scale, (-low / scale).round())

    def encode_resolved(self, x: Tensor, p: Affine) -> Tensor:
        low, high = self.code_range
        if torch.is_grad_enabled():
            return (round_ste((x / p.scale).clamp(-FAR, FAR)) + p.zero).clamp(low, high)
        return (x / p.scale).round_().add_(p.zero).clamp_(low, high)

    def decode_resolved(self, codes: Tensor, p: Affine) -> Tensor:
        return (codes - p.zero) * p.scale

    def round_trip(self, x: Tensor, p: Affine, out: Tensor) -> Tensor:
        low, high = self.code_range
        torch.div(x, p.scale, out=out).round_()
        if p.zero.ndim:
            out.add_(p.zero).clamp_(low, high).sub_(p.zero)
        else:  # clipped before the zero-point is added: what is added would only be taken away again
            zero = float(p.zero)
            out.clamp_(low - zero, high - zero)
        return out.mul_(p.scale)


def _positive(scale: Tensor) -> Tensor:
    """`scale` with a usable value where a group is constantly zero."""
    live = scale >= TINY
    rest = scale[live].mean() if bool(live.any()) else scale.new_ones(())
    return torch.where(live, scale, torch.where(scale > 0, TINY, rest))
