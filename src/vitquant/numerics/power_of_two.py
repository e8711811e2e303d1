"""Affine grids whose channels differ by powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vitquant.numerics.granularity import PER_CHANNEL, Granularity
from vitquant.numerics.quantizer import Quantizer, round_ste
from vitquant.numerics.uniform import Uniform


class PowerOfTwoScale(NamedTuple):
    """Parameters of a grid with power-of-two factors.

    scale, zero: (1,), shared by all channels: the smallest step in the tensor's own units, and the code of 0.0.
    alpha: (channels,), integers 0 .. steps - 1.
    """

    scale: Tensor
    zero: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class PowerOfTwo(Quantizer):
    """x̂_c = scale · 2^alpha_c · (code - zero), code = clip(round(x / (scale · 2^alpha_c)) + zero, 0, 2^b - 1).

    The Power-of-Two Factor (PTF) of FQ-ViT (arXiv:2111.13824, section 3.2; released code): one step for the whole
    tensor, an exponent of log2(steps) bits for each channel, one zero-point. Integer arithmetic sees plain integers
    (code - zero) << alpha_c on one scale. x: (..., channels), the tensor's own units.

    `fit`: the largest step is (max - min) / (2^b - 1) over all channels, `scale` is 2^(steps - 1) times smaller and
    the zero-point follows from the largest step, so a channel's range shrinks around 0 by powers of two; alpha_c is
    the smallest exponent whose range still covers the channel. `calibrate.PowerOfTwoMse` chooses it by error, as
    the paper does. Deviation from the released code: the range is widened to hold 0 where it does not (there, the
    clipped zero-point distorts it silently). Raises NonFinite on a range with NaN or infinity.
    """

    granularity: Granularity = PER_CHANNEL
    steps: int = 4

    parameters: ClassVar[type] = PowerOfTwoScale

    def fit(self, low: Tensor, high: Tensor) -> PowerOfTwoScale:
        widest, zero = Uniform(self.bits).fit(low.min()[None], high.max()[None])
        scale = widest / 2 ** (self.steps - 1)
        needed = torch.maximum(high / (self.levels - 1 - zero).clamp(min=0.5), -low / zero.clamp(min=0.5)) / scale
        alpha = needed.clamp(min=1).log2().ceil().clamp(0, self.steps - 1)
        return PowerOfTwoScale(scale, zero, alpha)

    def resolve(self, x: Tensor, p: PowerOfTwoScale) -> PowerOfTwoScale:
        alpha = self.granularity.spread(p.alpha, x)
        return PowerOfTwoScale(p.scale.reshape(()), p.zero.reshape(()), alpha)

    def encode_resolved(self, x: Tensor, p: PowerOfTwoScale) -> Tensor:
        low, high = self.code_range
        return (round_ste(x / (p.scale * torch.exp2(p.alpha))) + p.zero).clamp(low, high)

    def decode_resolved(self, codes: Tensor, p: PowerOfTwoScale) -> Tensor:
        return (codes - p.zero) * (p.scale * torch.exp2(p.alpha))

    def describe(self) -> str:
        return f"{super().describe()} x 2^0..{self.steps - 1}"
