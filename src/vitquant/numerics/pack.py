"""Integer codes ↔ bytes, b bits an element, no bit wasted."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in [0, 2^bits - 1], any shape, as uint8 (ceil(numel · bits / 8),), most significant bit first."""
    flat = codes.reshape(-1).to(torch.int64).cpu().numpy()
    if flat.size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise ValueError(f"codes from {flat.min()} to {flat.max()} do not fit in {bits} bits")
    wide = flat.astype(">u2").view(np.uint8).reshape(-1, 2)
    rows = np.unpackbits(wide, axis=1)[:, 16 - bits :]
    return torch.from_numpy(np.packbits(rows.reshape(-1)))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: int32 codes of the given shape. Raises ValueError if the length is off."""
    count = math.prod(shape)
    if packed.numel() != packed_size(count, bits):
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    rows = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    wide = np.pad(rows, ((0, 0), (16 - bits, 0)))
    return torch.from_numpy(np.packbits(wide, axis=1).view(">u2").astype(np.int32).reshape(shape))


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return math.ceil(count * bits / 8)
