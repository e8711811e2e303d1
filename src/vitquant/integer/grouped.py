"""Products whose activation picks its grids at run time, executed on integers.

Both functions take integer codes and give what the fake-quantized product gives, up to rounding of the last sum.
Integers are int32 tensors; a sum of n products of b-bit codes needs 2·b + log2(n) bits, so 32 are enough for 8-bit
codes and up to 32768 channels; zero-points may be large, so their corrections are int64. `grouped_linear` takes G
times the memory of its output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitquant.numerics import Affine, Bank


def grouped_linear(
    codes: Tensor, index: Tensor, bank: Bank, weight: Tensor, grid: Affine, bias: Tensor | None = None
) -> Tensor:
    """A linear layer on channel groups: G integer products, then a floating-point sum (IGQ-ViT, section 3.2).

        y[b,n,o] = s_w[o] · Σ_g s_g · A_g[b,n,o] + bias[o],   A_g = Σ_{c in C_g} (q[b,n,c] - z_g) (w[o,c] - z_w[o])

    A_g is an integer: the codes' product less the corrections for both zero-points. z_g · Σ_{c in C_g} (w - z_w)
    cannot be prepared in advance, since C_g depends on the instance: a product of 0/1 memberships with the weight.

    codes: (batch, ..., in), of the activation. index: every channel's grid, as `InstanceGroups.assign` gives it.
    bank: (G,) each. weight: codes (out, in). grid: scale and zero of the weight, (out,) each. All groups run as
    one batched product.
    """
    flat = codes.reshape(len(codes), -1, codes.shape[-1]).int()
    member = F.one_hot(index.reshape(len(codes), -1), len(bank.scale)).movedim(-1, 1).int()  # (batch, G, in)
    steps = (weight.int() - grid.zero[:, None].int()).T
    products = (flat[:, None] * member[:, :, None]) @ steps  # (batch, G, tokens, out)
    corrections = bank.zero.long()[:, None] * (member @ steps)  # (batch, G, out)
    sums = (products - corrections[:, :, None]).float()
    out = torch.einsum("bgno,g->bno", sums, bank.scale) * grid.scale
    out = out.reshape(*codes.shape[:-1], len(weight))
    return out if bias is None else out + bias


def grouped_rows(codes: Tensor, rows: Affine, right: Tensor, grid: Affine) -> Tensor:
    """A product whose left operand has a grid for each row, as attention · V: one integer product, its rows scaled.

        y[..., n, d] = s_n · s_v · Σ_m (q[..., n, m] - z_n) (v[..., m, d] - z_v)

    codes: (..., n, m). rows: scale and zero, (..., n, 1) each (`InstanceGroups.resolve`). right: codes (..., m, d).
    grid: of `right`, in shapes that broadcast and are the same along m.
    """
    return ((codes.int() - rows.zero.int()) @ (right.int() - grid.zero.int())).float() * (rows.scale * grid.scale)
