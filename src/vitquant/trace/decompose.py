"""Fused functions as the visible steps that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitquant.errors import UnsupportedComposite


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as q·kᵀ, softmax and ·v; (..., tokens, dim) each."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return _attend(query * scale, key, value, attn_mask, dropout_p)[0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ + mask)·v and the probabilities; a boolean mask says what is seen."""
    logits = torch.matmul(query, key.transpose(-2, -1))
    if mask is not None:
        boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(mask.logical_not(), -torch.inf) if boolean else logits + mask
    probs = torch.softmax(logits, -1)
    if dropout_p:
        probs = F.dropout(probs, dropout_p)
    return torch.matmul(probs, value), probs


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """multi_head_attention_forward in visible steps; query (length, batch, dim), or without the batch.

    Raises UnsupportedComposite for static keys and values, which no Vision Transformer uses.
    """
    if static_k is not None or static_v is not None:
        raise UnsupportedComposite("multi_head_attention_forward with static_k or static_v")
    batched, one = query.dim() == 3, query is key and key is value
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    # The linears see the batch first, as they do in every other model: instances and tokens are on known axes.
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if not use_separate_proj_weight and one:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)  # type: ignore[arg-type]
    else:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        if not use_separate_proj_weight and in_proj_weight is not None:
            weights = in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        triples = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(x, w, b) for x, w, b in triples)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    length, batch, dim = q.shape
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
    extra = k.shape[0] - key.shape[1]
    mask = _merged_mask(attn_mask, key_padding_mask, batch, num_heads, extra, q.dtype)

    q, k, v = (t.reshape(t.shape[0], batch, num_heads, dim // num_heads).permute(1, 2, 0, 3) for t in (q, k, v))
    dropout_p = dropout_p if training else 0.0
    weights_out = None
    if need_weights:
        context, probs = _attend(q * (dim // num_heads) ** -0.5, k, v, mask, dropout_p)
        weights_out = probs.mean(1) if average_attn_weights else probs
    else:
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    context = context.permute(0, 2, 1, 3).reshape(batch, length, dim)
    out = F.linear(context, out_proj_weight, out_proj_bias).transpose(0, 1)
    if batched:
        return out, weights_out
    return out.squeeze(1), None if weights_out is None else weights_out.squeeze(0)


def _merged_mask(
    attn_mask: Tensor | None,
    padding: Tensor | None,
    batch: int,
    heads: int,
    extra: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one additive mask (batch or 1, heads or 1, queries or 1, keys)."""
    mask = None
    if attn_mask is not None:
        mask = F.pad(_additive(attn_mask, dtype), (0, extra))
        mask = mask.reshape(batch, heads, *mask.shape[-2:]) if mask.dim() == 3 else mask[None, None]
    if padding is not None:
        keys = F.pad(_additive(padding, dtype), (0, extra)).reshape(batch, 1, 1, -1)
        mask = keys if mask is None else mask + keys
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = hidden) as numbers to add; others unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


COMPOSITES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
}
