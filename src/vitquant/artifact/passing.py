"""One forward pass of a quantized model, with as little memory traffic as it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from math import lcm, prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitquant.artifact.operands import Activation, Constant
from vitquant.numerics import Quantizer, Workspace
from vitquant.numerics.quantizer import PART, runs_in_place
from vitquant.trace import Interceptor, Site, Transform
from vitquant.trace.decompose import COMPOSITES


class Passing(Interceptor):
    """Runs `model` with these operands; a quantized operand lives no longer than the call that reads it.

    All of them share one workspace, and fused attention is taken apart a few images at a time: its logits and
    probabilities, the largest tensors of a Vision Transformer, never leave the cache. The numbers are the same,
    because a format says how many images it must see together (`Quantizer.together`).
    """

    def __init__(self, model: nn.Module, operands: Mapping[Site, Activation | Constant]) -> None:
        workspace, transforms = Workspace(), dict[Site, Transform]()
        self._formats: dict[str, list[Quantizer]] = {}
        for site, operand in operands.items():
            transforms[site] = operand.forward
            if isinstance(operand, Activation):
                self._formats.setdefault(site.call.scope, []).append(operand.quantizer)
                if site.operand != "output":
                    transforms[site] = partial(operand.forward, workspace=workspace, slot=site.operand)
        super().__init__(model, transforms)

    def take_apart(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        whole = super().take_apart
        given = _ATTENTION.bind(*args, **kwargs).arguments if func is F.scaled_dot_product_attention else {}
        if not given or not runs_in_place(given["query"]):
            return whole(func, args, kwargs)
        query, mask = given["query"], given.get("attn_mask")
        rows = self._rows(query, given["key"])
        if rows >= len(query):
            return whole(func, args, kwargs)
        cut = ["query", "key", "value"]
        if mask is not None and mask.dim() == query.dim() and len(mask) > 1:
            cut.append("attn_mask")
        pieces = zip(*(given[name].split(rows) for name in cut), strict=True)
        parts = [given | dict(zip(cut, piece, strict=True)) for piece in pieces]
        return self.in_parts(lambda part: whole(func, (), part), parts)

    def _rows(self, query: Tensor, key: Tensor) -> int:
        """How many images' attention fits in the cache, if they need not be seen together; else all of them."""
        together = [format.together(query.dim()) for format in self._formats.get(self.scope, [])]
        if 0 in together or len(key) != len(query):
            return len(query)
        step, logits = lcm(*together), prod(query.shape[1:-1]) * key.shape[-2]
        return max(2 * PART // max(logits, 1) // step, 1) * step


_ATTENTION = signature(COMPOSITES[F.scaled_dot_product_attention])
