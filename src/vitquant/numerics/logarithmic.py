"""Logarithmic grids: levels at equal ratios, for values in [0, scale]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vitquant.numerics.quantizer import Quantizer, checked_range
from vitquant.numerics.uniform import TINY

MANTISSA, BIAS = 23, 127
EXPONENT = 0xFF << MANTISSA
"""The bits of a positive float32 that make it a power of two."""
CARRY = 0x4AFB0C
"""Added to a float32's bits, carries into the exponent from a mantissa of √2 on: rounds log2 to nearest."""


class LogScale(NamedTuple):
    """Parameters of a logarithmic grid: the largest level, flat, one for each group."""

    scale: Tensor


@dataclass(frozen=True)
class Log(Quantizer):
    """x̂ = scale · 2^(-code / steps), code = round(t), t = -steps · log2(x / scale).

    steps = 1 is log2, steps = 2 is log√2 (RepQ-ViT, arXiv:2212.08254, section 3.3). The last code,
    2^b - 1, stands for exactly 0, so there are 2^b levels; it is taken by what lies more than half an octave
    below the smallest power. `extra_zero` reproduces the released RepQ-ViT code instead: all 2^b codes are powers,
    and one more, taken where t rounds beyond them, means 0: 2^b + 1 levels, which do not fit in b bits and are
    counted as log2(2^b + 1). x >= 0, any shape; x above `scale` takes the largest level.
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
        # log2 has no finite gradient at 0; what lies that low becomes 0 anyway.
        ratio = (x / p.scale).clamp(min=TINY)
        t = ratio.log2() * -self.steps
        codes = t + (self._nearest(ratio, t) - t).detach() if torch.is_grad_enabled() else self._nearest(ratio, t)
        return codes.clamp(0, self.levels - 2).masked_fill(ratio <= self._zero_below, self.levels - 1)

    def _nearest(self, ratio: Tensor, t: Tensor) -> Tensor:
        """round(t). Where the bits of ratio^steps say it, they do: the same on every device, whatever its log2."""
        if not self._by_bits or torch.compiler.is_compiling():
            return t.round()
        power = ratio.detach().float() ** self.steps
        return ((power.view(torch.int32) + CARRY >> MANTISSA) - BIAS).neg_().to(t.dtype)

    def decode_resolved(self, codes: Tensor, p: LogScale) -> Tensor:
        powers = torch.exp2(codes * (-1 / self.steps)) * p.scale
        return powers.masked_fill(codes == self.levels - 1, 0)

    def round_trip(self, x: Tensor, p: LogScale, out: Tensor) -> Tensor:
        if not self._by_bits or self.steps > 2 or x.dtype != torch.float32:
            return super().round_trip(x, p, out)
        torch.div(x, p.scale, out=out)
        torch.threshold_(out, self._zero_below, torch.nan).clamp_(2.0 ** ((2 - self.levels) / self.steps), 1)
        if self.steps == 2:
            out.square_()
        # 2^round(log2 out), exactly; the carry takes NaN out of the exponent, which leaves 0.
        out.view(torch.int32).add_(CARRY).bitwise_and_(EXPONENT)
        if self.steps == 2:  # the square root of 0 is slow on CPUs
            torch.threshold_(out.clamp_(min=TINY).sqrt_(), 1.5 * TINY**0.5, 0)
        return out.mul_(p.scale)

    @property
    def _zero_below(self) -> float:
        """x / scale up to which the code means 0: half an octave below the smallest power, or where its rounding
        ends."""
        return 2.0 ** (-(self.levels - 2) / self.steps - (0.5 / self.steps if self.extra_zero else 0.5))

    @property
    def _by_bits(self) -> bool:
        """Whether every power, raised to `steps`, is a normal float32."""
        return self.levels <= 126


class ShiftLogScale(NamedTuple):
    """Parameters of a shifted logarithmic grid, flat, one for each group. Levels reach from `minimum` to
    `minimum` + `scale`."""

    scale: Tensor
    minimum: Tensor


@dataclass(frozen=True)
class ShiftLog(Quantizer):
    """Shift-log2: x̂ = t̂ + m with t̂ the `Log` grid of t = x - m, for activations with a negative minimum m.

    steps: 1 = log2, 2 = log√2. The flushed code is the last one and decodes to m; exact 0 is not a level.
    m is constant, so that its share of a product folds into the bias, see `fold_minimum`: `floor`, the smallest
    value that GELU can give (-0.169971 at x = -0.7518, rounded away from 0), wherever the observed minimum lies
    in [floor, 0); else, as for other activations, the observed minimum. `runtime_minimum` takes x.min() of the
    whole tensor at run time instead (the released code): an image's result then depends on its batch.
    `extra_zero`: one level more than 2^b, as in `Log`. x: any shape, in the tensor's units.

    ADFQ-ViT (arXiv:2407.02763), shift-log2 quantizer; the name says log2, the released code is log√2 (default).
    Its guard of 1e-6 against log(0) is not needed here.
    """

    steps: int = 2
    extra_zero: bool = False
    floor: float = -0.17
    runtime_minimum: bool = False

    parameters: ClassVar[type] = ShiftLogScale

    @property
    def log(self) -> Log:
        """The format of what is shifted to be positive."""
        return Log(self.bits, self.granularity, self.steps, self.extra_zero)

    @property
    def levels(self) -> int:
        return self.log.levels

    def fit(self, low: Tensor, high: Tensor) -> ShiftLogScale:
        low, high = checked_range(low, high)
        minimum = torch.where((low >= self.floor) & (low < 0), self.floor, low)
        return ShiftLogScale(*self.log.fit(torch.zeros_like(low), high - minimum), minimum)

    def together(self, dims: int) -> int:
        return 0 if self.runtime_minimum else super().together(dims)

    def resolve(self, x: Tensor, p: ShiftLogScale) -> ShiftLogScale:
        scale, minimum = (self.granularity.spread(field, x) for field in p)
        return ShiftLogScale(scale, x.min() if self.runtime_minimum else minimum)

    def encode_resolved(self, x: Tensor, p: ShiftLogScale) -> Tensor:
        return self.log.encode_resolved(x - p.minimum, LogScale(p.scale))

    def decode_resolved(self, codes: Tensor, p: ShiftLogScale) -> Tensor:
        return self.log.decode_resolved(codes, LogScale(p.scale)) + p.minimum

    def round_trip(self, x: Tensor, p: ShiftLogScale, out: Tensor) -> Tensor:
        torch.sub(x, p.minimum, out=out)
        return self.log.round_trip(out, LogScale(p.scale), out).add_(p.minimum)


def fold_minimum(weight: Tensor, bias: Tensor | None, minimum: Tensor) -> Tensor:
    """The bias that carries a constant shift: (t̂ + m) Wᵀ + b = t̂ Wᵀ + (b + m · Σ_in W), exactly.

    weight: (out, in), as it is used (decoded). minimum: m, one value. Returns (out,), in the weight's dtype.
    """
    shift = weight.sum(1) * minimum
    return shift if bias is None else bias + shift
