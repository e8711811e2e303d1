"""How many bits an accumulator needs, and whether its carrier has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitquant.errors import AccumulatorOverflow

EXACT = {torch.float32: 2**24, torch.float64: 2**53, torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
"""The largest magnitude below which each dtype holds every integer."""


def width(bound: int) -> int:
    """Bits of a two's complement register for integers of magnitude at most `bound`."""
    return bound.bit_length() + 1


def product_bound(terms: int, left: int, right: int) -> int:
    """Largest magnitude of a sum of `terms` products of integers of magnitude at most `left` and `right`."""
    return terms * left * right


def norm_bounds(channels: int, bound: int) -> tuple[int, int, int]:
    """Largest Σv, Σv² and C·Σv² of `channels` integers of magnitude at most `bound`: a LayerNorm's accumulators."""
    return channels * bound, channels * bound**2, channels**2 * bound**2


def fitting(bound: int, dtypes: Sequence[torch.dtype], what: str = "an accumulator") -> torch.dtype:
    """The first dtype that holds every integer up to `bound`. Raises AccumulatorOverflow if none does."""
    for dtype in dtypes:
        if bound <= EXACT[dtype]:
            return dtype
    raise AccumulatorOverflow(f"{what} needs {width(bound)} bits, more than {str(dtypes[-1])[6:]} holds exactly")
