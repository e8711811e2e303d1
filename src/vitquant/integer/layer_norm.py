"""LayerNorm on integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.errors import NonFinite
from vitquant.integer.dyadic import dyadic, half, isqrt, reciprocal

NORM_BITS = 11
"""Bits of a multiplier by default: the product with a 12-bit number stays below 2^23."""


@dataclass(frozen=True)
class TokenScale:
    """What one token's statistics make of its integers v: (v - mean) / σ ≈ (v·multiplier + offset) / 2^shift, in
    units of 2^-fraction; int64, (..., 1) each. `offset` rounds half up."""

    multiplier: Tensor
    offset: Tensor
    shift: Tensor


def fraction_bits(channels: int) -> int:
    """Fractional bits of a normalised value. It is at most √channels, so 12 bits hold it with its sign left out."""
    return 12 - ((channels - 1).bit_length() + 1) // 2


def integer_epsilon(eps: float, scale: float, channels: int) -> int:
    """The epsilon in the units of C²·variance of integers of step `scale`; at least 1, so that σ > 0."""
    return max(round(eps * channels**2 / scale**2), 1)


def token_scale(total: Tensor, squares: Tensor, channels: int, epsilon: int, bits: int, floor: bool) -> TokenScale:
    """The normalisation of a token from Σv and Σv², all in integers.

    D = C·Σv² - (Σv)² + epsilon is C² times the variance; σ = ⌊√D⌋; the multiplier ⌊C·2^fraction·2^shift / σ⌉ has
    `bits` bits; the offset is that of the mean. FQ-ViT (arXiv:2111.13824; released code) computes them per token in
    floating point, has no epsilon (0 here; a constant token then raises NonFinite) and rounds down (`floor`).
    """
    variance = channels * squares - total * total + epsilon
    sigma = isqrt(variance)
    if not epsilon and bool((sigma == 0).any()):
        raise NonFinite("LayerNorm without epsilon met a token whose channels are all equal")
    multiplier, shift = reciprocal(channels << fraction_bits(channels), sigma, bits, floor)
    mean = torch.div(2 * total * multiplier + channels, 2 * channels, rounding_mode="floor")
    return TokenScale(multiplier, half(shift) - mean, shift)


@dataclass(frozen=True)
class ChannelAffine:
    """γ and β on the output's grid: y = (n·multiplier + offset) / 2^shift for normalised n in units of 2^-fraction;
    int64, (channels,) each. `offset` rounds half up."""

    multiplier: Tensor
    offset: Tensor
    shift: Tensor


def channel_affine(gamma: Tensor, beta: Tensor, step: Tensor, fraction: int, bits: int, floor: bool) -> ChannelAffine:
    """γ/(step·2^fraction) as dyadic numbers and β/step in their units. step: the output's, () or (channels,)."""
    multiplier, shift = dyadic(gamma.double() / step / 2**fraction, bits, floor, most=14)
    offset = torch.ldexp(beta.double() / step, shift).round().clamp(-(2**22), 2**22).long()
    return ChannelAffine(multiplier, offset + half(shift), shift)


def integer_layer_norm(v: Tensor, scale: TokenScale, affine: ChannelAffine) -> Tensor:
    """LayerNorm of integers v (..., channels) as integers of the output's step, not clipped: two multiplications
    and two shifts an element (M of 8 or 11 bits)."""
    normalised = (v.long() * scale.multiplier + scale.offset) >> scale.shift
    return (normalised * affine.multiplier + affine.offset) >> affine.shift
