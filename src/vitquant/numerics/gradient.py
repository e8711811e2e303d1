"""How gradients pass a number format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitquant.numerics.quantizer import Params, Quantizer


class _StraightThrough(torch.autograd.Function):
    """y given; the gradient is that of clip(x, low, high) plus the rounding residual's share in the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
        above = x > high
        outside = (x < low).logical_or_(above)
        learned = any(ctx.needs_input_grad[2:])
        residual = (y - x).div_(scale).masked_fill_(outside, 0.0) if learned else None
        ctx.shapes = low.shape, high.shape, scale.shape
        ctx.save_for_backward(outside, above if learned else None, residual)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outside, above, residual = ctx.saved_tensors
        inner = grad.masked_fill(outside, 0.0)
        if residual is None:
            return inner, None, None, None, None
        low, high, scale = ctx.shapes
        beyond = grad - inner
        upper = beyond * above
        return (
            inner,
            None,
            beyond.sub_(upper).sum_to_size(low),
            upper.sum_to_size(high),
            residual.mul_(grad).sum_to_size(scale),
        )


def straight_through(quantizer: Quantizer, x: Tensor, p: Params) -> Tensor:
    """fake_quantize(x) with learned-step gradients, one definition for every format with a field `scale`.

    With low, high the format's end levels: dy/dx = 1 inside them, 0 outside; dy/dscale = (y - x) / scale inside,
    and outside what moves the end level, which also reaches the other parameters (LSQ, arXiv:1902.08153; LSQ+,
    arXiv:2004.09576, for zero-points). The value is bit for bit that of the run without gradients.
    """
    with torch.no_grad():
        y = quantizer.fake_quantize(x, p)
    p = quantizer.resolve(x.detach(), p)
    ends = [quantizer.decode_resolved(p.scale.new_tensor(float(code)), p) for code in quantizer.code_range]
    rising = bool(
        ends[0].flatten()[0] <= ends[1].flatten()[0]
    )  # a logarithmic grid's first code is its largest level
    low, high = ends if rising else reversed(ends)
    return _StraightThrough.apply(x, y, low, high, p.scale)


def stopped(quantizer: Quantizer, x: Tensor, p: Params) -> Tensor:
    """fake_quantize(x) where rounding has gradient 0: none for x, that of decoding for the parameters.

    What the released code of ADFQ-ViT computes. Elements that are kept exactly still pass their gradient.
    """
    p = quantizer.resolve(x, p)
    with torch.no_grad():
        codes = quantizer.encode_resolved(x, p)
    return quantizer.decode_resolved(codes, p)
