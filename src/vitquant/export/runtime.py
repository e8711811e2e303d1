"""Linears and convolutions on integer codes, through PyTorch's own int8 product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitquant.artifact import QuantizedModel
from vitquant.export.lower import Codes, Integers, lower
from vitquant.trace import CallKey, Interceptor, Site

SIGNED = 128
"""What turns unsigned codes into the signed ones that `torch._int_mm` takes."""


class IntegerProduct(nn.Module):
    """x̂·ŵᵀ + b as s_x·s_w·(Σ (c_x - 128)·c_w + (128 - z)·Σ c_w) + b, the sums in int32 without rounding.

    The activation's 8-bit codes c_x move by 128 so that they are signed; the weight's own sums take that and the
    zero-point z back. weight: its integers as (out, in).
    """

    weight: Tensor
    step: Tensor
    offset: Tensor

    def __init__(self, activation: Codes, weight: Integers) -> None:
        super().__init__()
        self.activation = activation
        values = weight.values.reshape(len(weight.values), -1)
        self.register_buffer("weight", values.T.contiguous())
        self.register_buffer("step", weight.step * activation.step)
        self.register_buffer("offset", (SIGNED - activation.zero) * values.int().sum(1, dtype=torch.int32))

    def codes(self, x: Tensor) -> Tensor:
        """x on the activation's grid, signed: int8 in x's shape."""
        a = self.activation
        codes = (x / a.step).round_().add_(a.zero).clamp_(a.low, a.high)
        return codes.sub_(SIGNED).to(torch.int8)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Σ (c_x - z)·c_w of signed codes (..., in): (..., out), int32, exact."""
        rows = codes.reshape(-1, codes.shape[-1])
        return (torch._int_mm(rows, self.weight) + self.offset).reshape(*codes.shape[:-1], -1)

    def scaled(self, sums: Tensor, bias: Tensor | None) -> Tensor:
        """The real numbers that the sums stand for."""
        out = sums * self.step
        return out if bias is None else out.add_(bias)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.scaled(self.accumulate(self.codes(input)), bias)

    def conv(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """conv2d of one group: patches as rows. Padding is real zeros, whose code is the zero-point."""
        ky, kx = weight.shape[-2:]
        (sy, sx), (dy, dx) = _pair(stride), _pair(dilation)
        if padding == "same":
            y, x = dy * (ky - 1), dx * (kx - 1)
            edges = (x // 2, x - x // 2, y // 2, y - y // 2)
        else:
            py, px = _pair(0 if padding == "valid" else padding)
            edges = (px, px, py, py)
        codes = F.pad(self.codes(input), edges, value=self.activation.zero - SIGNED)
        height, width = (
            (codes.shape[-2] - dy * (ky - 1) - 1) // sy + 1,
            (codes.shape[-1] - dx * (kx - 1) - 1) // sx + 1,
        )
        b, c, h, w = codes.stride()
        patches = codes.as_strided(
            (len(codes), height, width, codes.shape[1], ky, kx), (b, h * sy, w * sx, c, h * dy, w * dx)
        )
        sums = self.accumulate(patches.reshape(len(codes), height, width, -1))
        return self.scaled(sums, bias).permute(0, 3, 1, 2)


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)


class IntegerModel(nn.Module):
    """A quantized model whose linears and plain convolutions run on integers; the rest is simulated.

    Products whose operands engines would take as integers (see `vitquant.export.lower`) run here the same way.
    """

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        self.model = model.model
        lowered = lower(model)
        self.products: dict[CallKey, IntegerProduct] = {}
        for site in lowered:
            x, w = (lowered.get(Site(site.call, name)) for name in ("input", "weight"))
            if x is None or w is None or not isinstance(x.form, Codes) or not isinstance(w.form, Integers):
                continue
            channels = model.ledger.entries[f"{site.call}.input"].shape[1]
            if _covered(site.call, x.form, w.form, channels):
                self.products[site.call] = IntegerProduct(x.form, w.form)
        self.layers = nn.ModuleList(self.products.values())
        covered = {Site(call, name) for call in self.products for name in ("input", "weight")}
        self.places = nn.ModuleList(model.operands)
        self.transforms = {site: t for site, t in model.transforms().items() if site not in covered}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Run(self.model, self.transforms, self.products):
            return self.model(*args, **kwargs)


def _covered(call: CallKey, x: Codes, w: Integers, channels: int) -> bool:
    """Integers on both sides, the weight's scales on the product's outer axis; a convolution of one group."""
    plain = call.op == "linear" or (call.op == "conv" and w.values.ndim == 4 and w.values.shape[1] == channels)
    return plain and x.rounds and w.computed and w.axis == 0 and w.values.dtype == torch.int8


class _Run(Interceptor):
    """Sends the covered products to their integer form."""

    def __init__(self, model: nn.Module, transforms: Any, products: dict[CallKey, IntegerProduct]) -> None:
        super().__init__(model, transforms)
        self.products = products

    def call(self, key: CallKey, operation: Any, func: Callable[..., Any], args: list[Any], kwargs: Any) -> Any:
        product = self.products.get(key)
        if product is not None:
            func = product.linear if key.op == "linear" else product.conv
        return super().call(key, operation, func, args, kwargs)
