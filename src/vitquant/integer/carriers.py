"""Two ways to hold the same integers: in floating-point tensors, which is fast, and in integer tensors.

Both compute the same functions of integers. `Floats` may do so because every intermediate number is an integer, or
one divided by a power of two, of at most 24 (float32) or 53 bits (float64), so nothing is ever rounded unasked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitquant.integer.dyadic import half, reciprocal
from vitquant.integer.patches import Patches
from vitquant.integer.product import Int8Product, bytes_of, int8_sums
from vitquant.integer.softmax import exp_bits, exp_reach, ibert_exp, integer_exp, log_quotient
from vitquant.integer.widths import fitting

Function = Callable[..., Tensor]
Exponentials = tuple[Tensor, Tensor]
"""Integer exponentials and the sums of their rows."""
QUOTIENT_BITS, QUOTIENT_FRACTION = 11, 8
"""Multiplier of 1/Σ for uniform probabilities, and fractional bits of 1/step in it."""


class Carrier(Protocol):
    """What an execution on integers needs. Shifts round down; constants are int64 tensors."""

    def hold(self, x: Tensor, bound: int) -> Tensor:
        """Integers of magnitude at most `bound`, in any dtype, in this carrier's."""

    def stage(
        self, multiplier: Tensor, offset: Tensor, shift: Tensor, bound: int, kept: int | None = None
    ) -> Function:
        """x → ⌊(x·multiplier + offset) / 2^shift⌋; x may be overwritten. bound: of the largest product; kept: of the
        largest one whose result is not clipped afterwards (a rounding beyond it is monotone and changes nothing)."""

    def weighted_sum(self, left: Tensor, right: Tensor, offset: Tensor, shift: Tensor, bound: int) -> Function:
        """(x, y) → ⌊(x·left + y·right + offset) / 2^shift⌋."""

    def raised(self, alpha: Tensor) -> Function:
        """x → x · 2^alpha; x may be overwritten."""

    def linear(self, weight: Tensor, bias: Tensor, shift: Tensor, bound: int, zero: int | None = None) -> Function:
        """x → ⌊(x·weightᵀ + bias) / 2^shift⌋; shift: (), or (outputs,). zero: with it added, x is one of 0 .. 255."""

    def conv(
        self, func: Function, weight: Tensor, bias: Tensor, shift: Tensor, bound: int, settings: Any
    ) -> Function:
        """x → ⌊(x * weight + bias) / 2^shift⌋ for the convolution `func` with these further arguments."""

    def matmul(self, shift: Tensor, bound: int) -> Function:
        """(x, y) → ⌊x·y / 2^shift⌋."""

    def totals(self, v: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        """Σv and Σv² over the last axis, int64, the axis kept."""

    def lookup(self, table: Tensor, bound: int) -> Function:
        """x → table[x + bound] for -bound <= x <= bound."""

    def exponentials(
        self, scale: float, terms: int, limit: int, reach: int, bits: int | None, faithful: bool
    ) -> Callable[[Tensor], Exponentials]:
        """x → exp(scale·(x - max x)) as integers and their row sums. terms: in a row; limit: of max x - x; reach: the
        distance from which on nothing changes; bits: of the fraction, None for as many as the sum leaves room for."""

    def logarithmic(self, parts: Exponentials, top: int) -> Tensor:
        """2^(top - L) with L = `log_quotient`, 0 where L > top."""

    def quotient(self, parts: Exponentials, inverse_step: int, high: int) -> Tensor:
        """⌊E / Σ · inverse_step / 2^8⌉, at most `high`."""


class Floats:
    """Integers in float32, or in float64 where 24 bits are too few. For simulation at the speed of a float model."""

    dtypes = (torch.float32, torch.float64)

    def hold(self, x: Tensor, bound: int) -> Tensor:
        return x.to(fitting(bound, self.dtypes))

    def stage(
        self, multiplier: Tensor, offset: Tensor, shift: Tensor, bound: int, kept: int | None = None
    ) -> Function:
        dtype = fitting(bound if kept is None else kept, self.dtypes)
        factor, start = _scaled(multiplier, shift, dtype), _scaled(offset, shift, dtype)
        return lambda x: x.to(dtype).mul_(factor).add_(start).floor_()

    def weighted_sum(self, left: Tensor, right: Tensor, offset: Tensor, shift: Tensor, bound: int) -> Function:
        dtype = fitting(bound, self.dtypes)
        a, b, start = (_scaled(t, shift, dtype) for t in (left, right, offset))
        return lambda x, y: torch.mul(x.to(dtype), a).addcmul_(y.to(dtype), b).add_(start).floor_()

    def raised(self, alpha: Tensor) -> Function:
        factor = (1 << alpha).float()
        return lambda x: x.mul_(factor)

    def linear(self, weight: Tensor, bias: Tensor, shift: Tensor, bound: int, zero: int | None = None) -> Function:
        dtype = fitting(bound, self.dtypes)
        b = _scaled(bias, shift, dtype)
        if zero is not None and dtype == torch.float32 and weight.device.type == "cpu" and _are_bytes(weight):
            product = Int8Product(weight, _scaled(torch.ones_like(bias), shift, dtype))
            return lambda x: product(bytes_of(x, zero), zero, b).floor_()
        w = _scaled(weight, shift.reshape(-1, 1), dtype)
        return lambda x: F.linear(x.to(dtype), w, b).floor_()

    def conv(
        self, func: Function, weight: Tensor, bias: Tensor, shift: Tensor, bound: int, settings: Any
    ) -> Function:
        dtype = fitting(bound, self.dtypes)
        columns = shift.reshape(-1, *[1] * (weight.dim() - 1))
        w, b = _scaled(weight, columns, dtype), _scaled(bias, shift, dtype)
        args, kwargs = settings
        return lambda x: func(x.to(dtype), w, b, *args, **kwargs).floor_()

    def matmul(self, shift: Tensor, bound: int) -> Function:
        dtype, factor = fitting(bound, self.dtypes), 2.0 ** -int(shift)
        if factor == 1:
            return lambda x, y: torch.matmul(x.to(dtype), y.to(dtype))
        return lambda x, y: torch.matmul(x.to(dtype), y.to(dtype) * factor).floor_()

    def totals(self, v: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        channels = v.shape[-1]
        fitting(channels * bound**2, self.dtypes, "a sum of squares")
        narrow = fitting(bound**2, self.dtypes)
        total = v.sum(-1, keepdim=True, dtype=fitting(channels * bound, self.dtypes))
        return total.long(), v.to(narrow).square().sum(-1, keepdim=True, dtype=torch.float64).long()

    def lookup(self, table: Tensor, bound: int) -> Function:
        values = table.float()
        return lambda x: values.index_select(0, x.to(torch.int32).add_(bound).flatten()).view(x.shape)

    def exponentials(
        self, scale: float, terms: int, limit: int, reach: int, bits: int | None, faithful: bool
    ) -> Callable[[Tensor], Exponentials]:
        table = _exp(torch.arange(-reach, 1), scale, terms, bits, faithful)
        values = table.to(fitting(terms * int(table.max()), self.dtypes, "the sum of a softmax"))

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            place = x.to(torch.int32).sub_(x.amax(-1, keepdim=True).to(torch.int32).sub_(reach))
            if limit > reach:
                place.clamp_(min=0)
            exps = values.index_select(0, place.flatten()).view(x.shape)
            return exps, exps.sum(-1, keepdim=True)

        return run

    def logarithmic(self, parts: Exponentials, top: int) -> Tensor:
        exps, sums = parts
        # t as a floating-point number is m·2^L: half a unit added to m carries into the exponent from 1.5 on, and
        # the exponent's bits alone are a power of two. Division by E = 0 gives infinity, whose inverse is 0.
        t = torch.div(sums, exps, out=exps).add_(0.5).floor_()
        kind, mantissa = (torch.int32, 23) if t.dtype == torch.float32 else (torch.int64, 52)
        exponent = (2 ** (8 if mantissa == 23 else 11) - 1) << mantissa
        t.view(kind).add_(1 << (mantissa - 1)).bitwise_and_(exponent)
        return t.reciprocal_().mul_(2.0**top).floor_().float()

    def quotient(self, parts: Exponentials, inverse_step: int, high: int) -> Tensor:
        exps, sums = parts
        multiplier, shift = reciprocal(inverse_step, sums.long(), QUOTIENT_BITS)
        factor = _scaled(multiplier, shift + QUOTIENT_FRACTION, exps.dtype)
        return exps.mul_(factor).add_(0.5).floor_().clamp_(max=high)


class Integers:
    """Integers in int32, or in int64 where 31 bits are too few."""

    dtypes = (torch.int32, torch.int64)

    def hold(self, x: Tensor, bound: int) -> Tensor:
        return x.to(fitting(bound, self.dtypes))

    def stage(
        self, multiplier: Tensor, offset: Tensor, shift: Tensor, bound: int, kept: int | None = None
    ) -> Function:
        dtype = fitting(bound, self.dtypes)
        factor, start, shift = multiplier.to(dtype), offset.to(dtype), shift.to(dtype)
        return lambda x: ((x.to(dtype) * factor + start) >> shift).to(torch.int32)

    def weighted_sum(self, left: Tensor, right: Tensor, offset: Tensor, shift: Tensor, bound: int) -> Function:
        dtype = fitting(bound, self.dtypes)
        a, b, start, by = (t.to(dtype) for t in (left, right, offset, shift))
        return lambda x, y: ((x.to(dtype) * a + y.to(dtype) * b + start) >> by).to(torch.int32)

    def raised(self, alpha: Tensor) -> Function:
        return lambda x: x << alpha.to(x.dtype)

    def linear(self, weight: Tensor, bias: Tensor, shift: Tensor, bound: int, zero: int | None = None) -> Function:
        dtype = fitting(bound, self.dtypes)
        b, shift = bias.to(dtype), shift.to(dtype)
        if zero is not None and dtype == torch.int32 and _are_bytes(weight):
            w8 = weight.to(torch.int8)
            return lambda x: (int8_sums((x + zero).to(torch.uint8), w8, zero) + b) >> shift
        w = weight.to(dtype).T
        return lambda x: (torch.matmul(x.to(dtype), w) + b) >> shift

    def conv(
        self, func: Function, weight: Tensor, bias: Tensor, shift: Tensor, bound: int, settings: Any
    ) -> Function:
        args, kwargs = settings
        run, patches = self.linear(weight.flatten(1), bias, shift, bound), Patches.of(weight, *args, **kwargs)
        return lambda x: run(patches(x)).movedim(-1, 1)

    def matmul(self, shift: Tensor, bound: int) -> Function:
        dtype, by = fitting(bound, self.dtypes), int(shift)
        return lambda x, y: torch.matmul(x.to(dtype), y.to(dtype)) >> by

    def totals(self, v: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        fitting(v.shape[-1] * bound**2, self.dtypes, "a sum of squares")
        v = v.long()
        return v.sum(-1, keepdim=True), (v * v).sum(-1, keepdim=True)

    def lookup(self, table: Tensor, bound: int) -> Function:
        values = table.int()
        return lambda x: values[x.long() + bound]

    def exponentials(
        self, scale: float, terms: int, limit: int, reach: int, bits: int | None, faithful: bool
    ) -> Callable[[Tensor], Exponentials]:
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            distance = (x - x.amax(-1, keepdim=True)).long().clamp(min=-reach)
            exps = _exp(distance, scale, terms, bits, faithful)
            return exps, exps.sum(-1, keepdim=True)

        fitting(terms * int(_exp(torch.zeros((), dtype=torch.long), scale, terms, bits, faithful)), self.dtypes)
        return run

    def logarithmic(self, parts: Exponentials, top: int) -> Tensor:
        exps, sums = parts
        level = log_quotient(exps, sums)
        return torch.where(level > top, 0, 1 << (top - level).clamp(min=0)).to(fitting(2**top, self.dtypes))

    def quotient(self, parts: Exponentials, inverse_step: int, high: int) -> Tensor:
        exps, sums = parts
        multiplier, shift = reciprocal(inverse_step, sums, QUOTIENT_BITS)
        shift = shift + QUOTIENT_FRACTION
        return ((exps * multiplier + half(shift)) >> shift).clamp(max=high).int()


def _are_bytes(weight: Tensor) -> bool:
    return int(weight.min()) >= -128 and int(weight.max()) <= 127


def _scaled(x: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """x / 2^shift, exactly."""
    return torch.ldexp(x.double(), -shift.double()).to(dtype)


def _exp(distance: Tensor, scale: float, terms: int, bits: int | None, faithful: bool) -> Tensor:
    """The integer exponential of distances <= 0; bits: of its fraction, None for all that `terms` leave room for."""
    if faithful:
        return ibert_exp(distance, scale)
    return integer_exp(distance, scale, exp_bits(terms) if bits is None else min(bits, exp_bits(terms)))


def reach_of(scale: float, terms: int, faithful: bool) -> int:
    """The distance below the maximum from which on the exponential does not change."""
    return exp_reach(scale, 30 if faithful else exp_bits(terms), faithful)
