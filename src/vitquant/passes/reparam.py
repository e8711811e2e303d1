"""Exact rewrites that trade scales between neighbouring layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitquant.calibrate import Bench
from vitquant.numerics import PER_CHANNEL, PER_TENSOR, Affine
from vitquant.recipe.state import State
from vitquant.trace import CallKey, NormGroup, Site


@dataclass(frozen=True)
class ScaleReparam:
    """LayerNorm-to-linear scale reparameterisation (RepQ-ViT, arXiv:2212.08254, section 3.2).

    A norm's output with channel-wise (s, z), read by linears only, becomes layer-wise (s̃, z̃) with
    s̃ = mean s, z̃ = round(mean z), r = s / s̃, d = z - z̃:

        γ' = γ / r,   β' = β / r + s̃·d,   W' = W·diag(r),   b' = b - W'(s̃·d)

    The float function is unchanged and the codes of the linears' inputs are the same integers as before. The
    weights' parameters are dropped, since W' has another range. Deviation from the released code: z̃ is
    rounded, so that it is an integer zero-point.
    """

    def __call__(self, state: State, bench: Bench) -> State:
        for group in state.trace.norm_groups:
            if _eligible(group, state):
                state = _moved(group, state)
        return state


def _eligible(group: NormGroup, state: State) -> bool:
    sites = [Site(key, "input") for key in group.linears]
    return all(s in state.params and state.plan[s].quantizer.granularity == PER_CHANNEL for s in sites)


def _moved(group: NormGroup, state: State) -> State:
    plan, params, rewrites = dict(state.plan), dict(state.params), dict(state.rewrites)
    scale, zero = params[Site(group.linears[0], "input")]  # the linears read one tensor: one grid
    shared = Affine(scale.mean()[None], zero.mean().round()[None])
    r = scale / shared.scale
    shift = shared.scale * (zero - shared.zero)
    rewrites |= scaled_norm(state, group.norm, r, shift)
    for key in group.linears:
        site = Site(key, "input")
        plan[site] = replace(plan[site], quantizer=replace(plan[site].quantizer, granularity=PER_TENSOR))
        params[site] = shared
        params.pop(Site(key, "weight"), None)
        rewrites |= scaled_linear(state, key, r, shift)
    return replace(state, plan=plan, params=params, rewrites=rewrites)


def scaled_norm(state: State, norm: CallKey, r: Tensor, shift: Tensor) -> dict[Site, Tensor]:
    """The norm's parameters such that its output x becomes x / r + shift; r, shift: (channels,)."""
    weight, bias = Site(norm, "weight"), Site(norm, "bias")
    gamma, beta = _wide(state, weight), _wide(state, bias)
    return {weight: (gamma / r.double()).float(), bias: (beta / r.double() + shift.double()).float()}


def scaled_linear(state: State, linear: CallKey, r: Tensor, shift: Tensor) -> dict[Site, Tensor]:
    """The linear's parameters such that the input x / r + shift gives what x gave."""
    weight, bias = Site(linear, "weight"), Site(linear, "bias")
    scaled = _wide(state, weight) * r.double()
    old = state.constant(bias)
    start = torch.zeros(len(scaled), dtype=torch.float64, device=scaled.device) if old is None else old.double()
    return {weight: scaled.float(), bias: (start - scaled @ shift.double()).float()}


def _wide(state: State, site: Site) -> Tensor:
    """A constant in float64: a rewrite rounds once, when it is done."""
    constant = state.constant(site)
    assert constant is not None
    return constant.detach().double()
