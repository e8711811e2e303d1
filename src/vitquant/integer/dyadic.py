"""Multiplication by a real number as an integer multiplication and a shift."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dyadic(NamedTuple):
    """Real numbers as multiplier / 2^shift; int64 tensors of one shape. A multiplier carries the number's sign."""

    multiplier: Tensor
    shift: Tensor


def dyadic(x: Tensor, bits: int = 8, floor: bool = False, most: int = 31) -> Dyadic:
    """x ≈ M / 2^N, |M| of `bits` bits: N = bits - 1 - ⌊log2 |x|⌋ within 0 .. most, |M| = ⌊|x|·2^N⌉ within 2^bits - 1.

    FQ-ViT (arXiv:2111.13824; released code) has bits = 8 and `floor`, which makes |x| 0.28 % too small on average;
    rounding to nearest is the default. x: float64, any shape.
    """
    magnitude = x.double().abs()
    shift = (bits - 1 - magnitude.clamp(min=2.0**-62).log2().floor()).clamp(0, most)
    scaled = torch.ldexp(magnitude, shift)
    multiplier = (scaled.floor() if floor else scaled.round()).clamp(max=2**bits - 1)
    return Dyadic((multiplier * x.sign()).long(), shift.long())


def half(shift: Tensor) -> Tensor:
    """What to add before a right shift by `shift` so that it rounds half up."""
    return (1 << shift) >> 1


def shift_right(x: Tensor, shift: Tensor) -> Tensor:
    """⌊x / 2^shift + 1/2⌋ on integers."""
    return (x + half(shift)) >> shift


def floor_log2(x: Tensor) -> Tensor:
    """⌊log2 x⌋ of positive integers, by comparisons alone."""
    powers = 1 << torch.arange(1, 63, device=x.device)
    return torch.bucketize(x, powers, right=True)


def isqrt(x: Tensor) -> Tensor:
    """⌊√x⌋ of integers 0 <= x < 2^62: Newton's iteration on integers, from above."""
    root = 1 << ((floor_log2(x.clamp(min=1)) >> 1) + 1)
    for _ in range(6):  # the start is off by less than a factor of 2: each step doubles the correct bits
        root = torch.minimum(root, (root + x // root.clamp(min=1)) >> 1)
    return root


def reciprocal(numerator: int, x: Tensor, bits: int, floor: bool = False) -> Dyadic:
    """numerator / x ≈ M / 2^N with M of `bits` bits, found at run time by integer divisions and comparisons; x > 0.

    N is the largest shift, at most 31, at which M stays below 2^bits (at N = 0 it is cut off there).
    """
    shift = torch.zeros_like(x)
    for step in (16, 8, 4, 2, 1):
        fits = torch.div(numerator << (shift + step), x, rounding_mode="floor") < 2**bits
        shift = shift + step * fits.long()
    ratio = torch.div(numerator << (shift + 1), x, rounding_mode="floor")
    return Dyadic(((ratio if floor else ratio + 1) >> 1).clamp(max=2**bits - 1), shift)


def divide(x: Tensor, by: Tensor) -> Tensor:
    """⌊x / by + 1/2⌋ on integers, by > 0."""
    return torch.div(2 * x + by, 2 * by, rounding_mode="floor")
