"""Products of 8-bit codes with 8-bit weights, their sums exact, on the machine's integer units."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitquant.numerics.quantizer import in_parts

SIGNED = 128
"""What turns unsigned codes into the signed ones that `torch._int_mm` takes."""
ROWS, COLUMNS = 32, 8
"""`torch._int_mm` takes more than 16 rows, and multiples of 8 of everything else, on GPUs."""


class Int8Product(nn.Module):
    """codes (..., in) → (Σ_i (c_i - zero) · w_oi) · step_o + bias_o, float32; the sums are int32 without rounding.

    weight: its integers, int8 (out, in). step: (out,), or one for all. codes: uint8 or int8. On a CPU the weight is
    packed once for oneDNN's quantized linear, if that is there and exact; else `torch._int_mm` multiplies.
    """

    weight: Tensor
    step: Tensor

    def __init__(self, weight: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(torch.int8).contiguous())
        self.register_buffer("step", step.float().expand(len(weight)).contiguous())
        packs = weight.device.type == "cpu" and onednn_is_exact()
        self._packed = torch.ops.onednn.qlinear_prepack(self.weight, None) if packs else None

    def forward(self, codes: Tensor, zero: int = 0, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """onto: float32 (..., out) that the result is added to, in place."""
        if self._packed is not None and codes.device.type == "cpu":
            return _onednn(codes, zero, self._packed, self.step, bias, onto)
        out = int8_sums(codes, self.weight, zero) * self.step
        out = out if bias is None else out.add_(bias)
        return out if onto is None else onto.add_(out)


def bytes_of(x: Tensor, zero: int) -> Tensor:
    """x + zero as uint8: x holds integers in floating point, part by part so that they stay in the cache."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for part, target in in_parts(x, out):
        target.copy_(part + zero)
    return out


def int8_sums(codes: Tensor, weight: Tensor, zero: int = 0) -> Tensor:
    """Σ_i (c_i - zero) · w_oi in int32: codes (..., in) uint8 or int8, weight (out, in) int8."""
    rows = codes.reshape(-1, codes.shape[-1])
    moved = SIGNED if codes.dtype == torch.uint8 else 0
    if moved:
        rows = rows.to(torch.int16).sub_(moved).to(torch.int8)
    m, n = rows.shape[0], weight.shape[0]
    inner = -rows.shape[1] % COLUMNS
    rows = F.pad(rows, (0, inner, 0, max(ROWS - m, -m % COLUMNS)))
    padded = F.pad(weight, (0, inner, 0, -n % COLUMNS))
    multiply = torch._int_mm if _int_mm_is_exact(codes.device) else _slowly
    sums = multiply(rows, padded.T)[:m, :n]
    sums = sums + (moved - zero) * weight.sum(1, dtype=torch.int32)
    return sums.reshape(*codes.shape[:-1], n)


@lru_cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's quantized linear is there, and does not saturate where the largest products meet: without
    VNNI, some processors add pairs of products in 16 bits."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    codes = torch.tensor([255, 0, 255, 1], dtype=torch.uint8).repeat_interleave(64).reshape(2, 128)
    weight = torch.tensor([127, -128], dtype=torch.int8)[:, None].expand(2, 128).contiguous()
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    wanted = (codes.long() - 3) @ weight.long().T
    return torch.equal(_onednn(codes, 3, packed, torch.ones(2), None).long(), wanted)


@lru_cache
def _int_mm_is_exact(device: torch.device) -> bool:
    rows = torch.tensor([127, -128], dtype=torch.int8, device=device).repeat(32, 32)
    columns = torch.full((64, 8), -128, dtype=torch.int8, device=device)
    return torch.equal(torch._int_mm(rows, columns), _slowly(rows, columns))


def _slowly(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() @ right.double()).int()


def _onednn(
    codes: Tensor, zero: int, packed: Tensor, step: Tensor, bias: Tensor | None, onto: Tensor | None = None
) -> Tensor:
    """The scales are the weight's; those of the codes and of the result are 1."""
    zeros = torch.zeros(len(step), dtype=torch.int32)
    inputs, weights, result = (codes, 1.0, zero), (packed, step, zeros), (1.0, 0, torch.float32)
    if onto is None:
        return torch.ops.onednn.qlinear_pointwise(*inputs, *weights, bias, *result, "none", [], "")
    added: Any = (1.0, 0, "sum", 1.0, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.binary(*inputs, *weights, onto, bias, *result, *added)
