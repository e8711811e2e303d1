"""Softmax on integers: the exponential as a polynomial and shifts, the quotient as a logarithm or a multiplier."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitquant.errors import AccumulatorOverflow
from vitquant.integer.dyadic import divide, floor_log2, half

A, B = 0.35815147, 0.96963238
"""exp(r) ≈ A·r² + B·r + 1 on (-ln 2, 0] (I-BERT, arXiv:2101.01321)."""
FRACTION = 15


def integer_exp(x: Tensor, scale: float, bits: int) -> Tensor:
    """⌊2^bits · exp(scale · x)⌉, nearly: x <= 0, int64; the result is an integer of at most bits + 1 bits.

    I-BERT's polynomial as FQ-ViT uses it, with one change: scale / ln 2 is a multiplier with 30 fractional bits
    applied to x, so the powers are exactly those of 2. The paper's ⌊-ln 2 / scale⌋ makes the base e^(scale·⌈ln 2 /
    scale⌉), an error of temperature (see `ibert_exp`). `bits` is chosen so that a row's sum fits its accumulator.
    """
    steps = -x * round(scale * math.log2(math.e) * 2**30)
    k = (steps >> 30).clamp(max=62 - FRACTION)
    r = (steps & (2**30 - 1)) >> (30 - FRACTION)  # x·scale = -(k + r / 2^15)·ln 2
    a, b = round(A * math.log(2) ** 2 * 2**FRACTION), round(B * math.log(2) * 2**FRACTION)
    p = ((((a * r) >> FRACTION) - b) * r >> FRACTION) + 2**FRACTION
    shift = k + FRACTION
    return ((p << bits) + half(shift)) >> shift


def ibert_exp(x: Tensor, scale: float, bits: int = 30) -> Tensor:
    """The integer exponential of FQ-ViT's released code, its flaws included; x <= 0, int64.

    X0 = ⌊-0.6931 / S⌋, x ← max(x, n·X0), k = ⌊x / X0⌋, r = x - k·X0, b = ⌊(B/A)/S⌋, c = ⌊(1/A)/S²⌋,
    E = max(⌊((r + b)·r + c)·2^(n - k)⌋, 0): a common scale A·S²/2^n cancels in the quotient. With n = 30 as there,
    E does not fit 32 bits, and the effective temperature is |X0|·S / ln 2.
    """
    x0 = math.floor(-0.6931 / scale)
    x = x.clamp(min=bits * x0)
    k = torch.div(x, x0, rounding_mode="floor")
    r = x - k * x0
    b, c = math.floor(B / A / scale), math.floor(1 / A / scale**2)
    polynomial = (r + b) * r + c
    return (polynomial << (bits - k).clamp(min=0)).clamp(min=0)


def exp_reach(scale: float, bits: int, faithful: bool) -> int:
    """How far below the maximum x still makes a difference: the exponential is constant from there on."""
    reach = -bits * math.floor(-0.6931 / scale) if faithful else math.ceil((bits + 2) * math.log(2) / scale)
    if reach > 2**22:
        raise AccumulatorOverflow(f"attention logits with a step of {scale:.1e} need a table of {reach} exponentials")
    return reach


def log_quotient(exps: Tensor, sums: Tensor) -> Tensor:
    """L ≈ log2(Σ / E): t = ⌊Σ/E + 1/2⌋, L = ⌊log2 t⌋, plus 1 from t = 1.5·2^L on; E = 0 gives 62.

    Log-Int-Softmax (LIS) of FQ-ViT (arXiv:2111.13824, section 3.3). exps, sums: int64, broadcastable.
    """
    t = divide(sums, exps.clamp(min=1))
    level = floor_log2(t)
    level = level + (t - (1 << level) >= (1 << level) >> 1).long() * (t > 1).long()
    return torch.where(exps > 0, level, 62)


def log_int_softmax(x: Tensor, scale: float, bits: int = 4, *, faithful: bool = False) -> Tensor:
    """Codes of log2 attention probabilities, 0 .. 2^bits - 1: p ≈ 2^-code; from integer logits of step `scale`.

    The last code stands for 0, so that a code takes `bits` bits. `faithful`: the released code's exponential, and
    its zero beside all 2^bits powers; a probability of 0 is then the code 2^bits.
    """
    distance = x - x.amax(-1, keepdim=True)
    exps = ibert_exp(distance, scale) if faithful else integer_exp(distance, scale, exp_bits(x.shape[-1]))
    return log_quotient(exps, exps.sum(-1, keepdim=True)).clamp(max=2**bits - 1 + faithful)


def exp_bits(terms: int) -> int:
    """Fractional bits of the exponential such that the sum of `terms` of them stays below 2^23."""
    return max(22 - max(terms - 1, 1).bit_length(), 4)
