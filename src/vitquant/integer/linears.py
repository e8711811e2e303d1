"""Linears and convolutions on integers, one class for each kind of grid that their input may lie on.

Each takes the place of `F.linear`: `linear(x, weight, bias)` quantizes x, multiplies integers exactly (`Int8Product`)
and gives what the fake-quantized product gives, up to rounding of the last sum. The weight is held as its integers:
int8 `values` (out, in, ...) times a `step` for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitquant.integer.patches import Patches
from vitquant.integer.product import Int8Product
from vitquant.numerics import Affine, Bank, InstanceGroups, OutlierAware, OutlierGrid
from vitquant.numerics.quantizer import in_parts, runs_in_place


class UniformLinear(nn.Module):
    """x̂ = scale · (code - zero) for all of x, low <= code <= high, codes in 0 .. 255.

    y_o = scale · step_o · Σ_i (code_i - zero) · w_oi + bias_o
    """

    def __init__(self, scale: float, zero: int, low: int, high: int, values: Tensor, step: Tensor) -> None:
        super().__init__()
        self.scale, self.zero, self.low, self.high = scale, zero, low, high
        self.product = Int8Product(values.flatten(1), step * scale)

    def codes(self, x: Tensor) -> Tensor:
        """x on its grid: uint8 in x's shape."""
        if not runs_in_place(x):
            return (x / self.scale).round().add(self.zero).clamp(self.low, self.high).to(torch.uint8)
        out = torch.empty(x.shape, dtype=torch.uint8)
        for part, target in in_parts(x, out):
            target.copy_((part / self.scale).round_().add_(self.zero).clamp_(self.low, self.high))
        return out

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.product(self.codes(input), self.zero, bias)

    def conv(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """A convolution of one group. Padding is real zeros, whose code is the zero-point."""
        rows = Patches.of(weight, *args, **kwargs)(self.codes(input), self.zero)
        return self.product(rows, self.zero, bias).movedim(-1, 1)


class OutlierLinear(nn.Module):
    """GEMM(integer inliers) + SpMM(outliers), as ADFQ-ViT's per-patch outlier-aware grid is meant to be executed.

        y_no = scale_n · step_o · Σ_i (code_ni - zero_n) · w_oi + Σ_{i outlier} x_ni · ŵ_oi + bias_o

    The dense product's integers are signed bytes, up to 7 bits; its sums are scaled token by output. The outliers,
    one in a hundred and mostly in a few channels, are multiplied by those channels of the decoded weight.
    """

    decoded: Tensor

    def __init__(self, quantizer: OutlierAware, p: OutlierGrid, values: Tensor, step: Tensor) -> None:
        super().__init__()
        self.quantizer, self.p = quantizer, p
        self.product = Int8Product(values, step)
        self.register_buffer("decoded", (values * step.reshape(-1, 1)).T.contiguous())

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _part_by_part(self._part, input, bias, len(weight))

    def _part(self, x: Tensor, bias: Tensor | None) -> Tensor:
        settled = self.quantizer.resolve(x, self.p)
        steps = self.quantizer.encode_resolved(x, settled).sub_(settled.zero).to(torch.int8)
        out = self.product(steps).mul_(settled.scale)
        out = out if bias is None else out.add_(bias)
        outliers = settled.outliers.flatten(0, -2)
        channels = outliers.abs().amax(0).nonzero()[:, 0]
        out.flatten(0, -2).addmm_(outliers[:, channels], self.decoded[channels])
        return out


class GroupedLinear(nn.Module):
    """G integer products, one for each group of an instance's channels, summed in floating point (IGQ-ViT, section
    3.2).

        y_bno = Σ_g s_g · step_o · Σ_{c in C_bg} code_bnc · w_oc - Σ_c s_bc · z_bc · ŵ_oc + bias_o

    The inner sums are integers. The second term takes the zero-points back; it cannot be prepared in advance, since
    the groups C_bg depend on the instance, but it is one row for each.
    """

    decoded: Tensor

    def __init__(self, quantizer: InstanceGroups, p: Bank, values: Tensor, step: Tensor) -> None:
        super().__init__()
        self.quantizer, self.p = quantizer, p
        self.products = nn.ModuleList(Int8Product(values, step * scale) for scale in p.scale)
        self.register_buffer("decoded", values * step.reshape(-1, 1))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _part_by_part(self._part, input, bias, len(weight), self.quantizer.span)

    def _part(self, x: Tensor, bias: Tensor | None) -> Tensor:
        index = self.quantizer.assign(x, self.p)
        grid = Affine(self.p.scale[index], self.p.zero[index])
        codes = self.quantizer.encode_resolved(x, grid).to(torch.uint8)
        zeros = F.linear(-grid.scale * grid.zero, self.decoded, bias)
        out = zeros.expand(*x.shape[:-1], -1).contiguous()
        for g, product in enumerate(self.products):
            product(codes * (index == g).to(torch.uint8), onto=out)
        return out


def _part_by_part(
    run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, bias: Tensor | None, outputs: int, span: int = 1
) -> Tensor:
    """run(x, bias), x cut along its first axis into parts that fit the cache, multiples of `span`."""
    out = torch.empty(*x.shape[:-1], outputs, device=x.device)
    for part, target in in_parts(x, out, span=span):
        target.copy_(run(part, bias))
    return out
