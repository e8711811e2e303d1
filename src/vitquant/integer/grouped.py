"""Attention's second product where every row of the probabilities picks its grid at run time, on integers."""

from __future__ import annotations

from torch import Tensor

from vitquant.numerics import Affine


def grouped_rows(codes: Tensor, rows: Affine, right: Tensor, grid: Affine) -> Tensor:
    """A product whose left operand has a grid for each row, as attention · V: one integer product, its rows scaled.

        y[..., n, d] = s_n · s_v · Σ_m (q[..., n, m] - z_n) (v[..., m, d] - z_v)

    codes: (..., n, m). rows: scale and zero, (..., n, 1) each (`InstanceGroups.resolve`). right: codes (..., m, d).
    grid: of `right`, in shapes that broadcast and are the same along m. Sums are int32: enough for 8-bit codes and
    32768 keys.
    """
    return ((codes.int() - rows.zero.int()) @ (right.int() - grid.zero.int())).float() * (rows.scale * grid.scale)
