"""Logarithmic grids: levels at equal ratios, for values in [0, scale]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vitquant.numerics.quantizer import Quantizer, checked_range, round_ste
from vitquant.numerics.uniform import TINY


class LogScale(NamedTuple):
    """Parameters of a logarithmic grid: the largest level, flat, one for each group."""

    scale: Tensor


@dataclass(frozen=True)
class Log(Quantizer):
    """x̂ = scale · 2^(-code / steps), code = round(-steps · log2(x / scale)).

    steps = 1 is log2, steps = 2 is log√2 (RepQ-ViT, arXiv:2212.08254, section 3.3). The last code,
    2^b - 1, stands for exactly 0, so there are 2^b levels. `extra_zero` reproduces the released RepQ-ViT
    code instead: all 2^b codes are powers, and one more means 0: 2^b + 1 levels, which do not fit in b
    bits and are counted as log2(2^b + 1). x >= 0, any shape; x above `scale` takes the largest level.
    """

    steps: int = 1
    extra_zero: bool = False

    parameters: ClassVar[type] = LogScale

    @property
    def levels(self) -> int:
        return 2**self.bits + self.extra_zero

    def fit(self, low: Tensor, high: Tensor) -> LogScale:
        _, high = checked_range(low, high)
        return LogScale(torch.where(high >= TINY, high, 1.0))

    def encode_resolved(self, x: Tensor, p: LogScale) -> Tensor:
        if torch.is_grad_enabled():
            # log2 has no finite gradient at 0; what lies that low decodes to 0 anyway.
            codes = round_ste((x / p.scale).clamp(min=TINY).log2() * -self.steps)
            return codes.clamp(0, self.levels - 1)
        codes = (x / p.scale).clamp_(min=TINY).log2_().mul_(-self.steps)
        return codes.round_().clamp_(0, self.levels - 1)

    def decode_resolved(self, codes: Tensor, p: LogScale) -> Tensor:
        powers = torch.exp2(codes / -self.steps) * p.scale
        return torch.where(codes >= self.levels - 1, 0.0, powers)
