"""What can learn in a unit that is reconstructed: the rounding of weights, the steps of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitquant.errors import PlanError
from vitquant.numerics import Affine, Params, Quantizer
from vitquant.numerics.gradient import straight_through
from vitquant.numerics.uniform import TINY
from vitquant.recipe.state import State
from vitquant.trace import ACTIVATION_ROLES, Role, Site

FakeQuantize = Callable[[Quantizer, Tensor, Params], Tensor]


class Learner(Protocol):
    """One operand while it learns. tensors: the leaves that are trained."""

    tensors: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The operand as the unit sees it in this step."""

    def penalty(self, progress: float) -> Tensor | None:
        """A term of the loss at this share (0 to 1) of all iterations."""

    def result(self) -> tuple[Params, Tensor | None]:
        """What was learned: the format's parameters, and a weight's codes if they are not the nearest."""


class Trainable(Protocol):
    """A kind of variable. rate: Adam's learning rate. cosine: it falls to 0 along a half cosine."""

    @property
    def rate(self) -> float: ...

    @property
    def cosine(self) -> bool: ...

    def start(self, site: Site, state: State, fake_quantize: FakeQuantize) -> Learner | None:
        """A learner for a planned site of the unit, or None if this kind has nothing to learn there."""


@dataclass(frozen=True)
class AdaRound:
    """Learned rounding of weights: Ŵ = s · (clip(⌊W/s⌋ + h + z) - z), h = clip(σ(V)·(ζ - γ) + γ, 0, 1).

    V starts where h is the fractional part, so that training starts at the float weight. After `warmup`, a
    share of the iterations, the penalty strength · Σ (1 - |2h - 1|^β) with β from beta[0] to beta[1] linearly
    pushes every h to 0 or 1. In the end h = [V >= 0]. (AdaRound, arXiv:2004.10568; ADFQ-ViT's constants.)
    """

    rate: float = 3e-3
    cosine: bool = False
    strength: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    zeta: float = 1.1
    gamma: float = -0.1

    def start(self, site: Site, state: State, fake_quantize: FakeQuantize) -> Learner | None:
        weight = state.constant(site)
        if weight is None:
            return None
        quantizer, params = state.plan[site].quantizer, state.params[site]
        if not isinstance(params, Affine):
            raise PlanError(f"{site}: learned rounding is for affine grids, not {type(quantizer).__name__}")
        return _Rounding(self, quantizer, params, weight.detach())


class _Rounding:
    """The rounding of one weight."""

    def __init__(self, how: AdaRound, quantizer: Quantizer, params: Affine, weight: Tensor) -> None:
        self.how, self.quantizer, self.params = how, quantizer, params
        self.spread = quantizer.resolve(weight, params)
        steps = weight / self.spread.scale
        self.floor = steps.floor()
        rest = steps - self.floor
        logit = torch.log((rest - how.gamma) / (how.zeta - rest))
        self.tensors = [logit.requires_grad_()]

    def _up(self) -> Tensor:
        """h, between 0 (down) and 1 (up)."""
        return (self.tensors[0].sigmoid() * (self.how.zeta - self.how.gamma) + self.how.gamma).clamp(0, 1)

    def _codes(self, up: Tensor) -> Tensor:
        return (self.floor + up + self.spread.zero).clamp(*self.quantizer.code_range)

    def __call__(self, x: Tensor) -> Tensor:
        return self.quantizer.decode_resolved(self._codes(self._up()), self.spread)

    def penalty(self, progress: float) -> Tensor | None:
        how = self.how
        if progress < how.warmup:
            return None
        done = (progress - how.warmup) / (1 - how.warmup)
        beta = how.beta[0] + (how.beta[1] - how.beta[0]) * done
        return how.strength * (1 - (2 * self._up() - 1).abs().pow(beta)).sum()

    def result(self) -> tuple[Params, Tensor | None]:
        with torch.no_grad():
            return self.params, self._codes((self.tensors[0] >= 0).float())


@dataclass(frozen=True)
class LearnedStep:
    """Learned steps of activations of the given roles: the field `scale` of their parameters, all groups of it."""

    rate: float = 4e-5
    cosine: bool = True
    roles: tuple[Role, ...] = ACTIVATION_ROLES

    def start(self, site: Site, state: State, fake_quantize: FakeQuantize) -> Learner | None:
        if state.constant(site) is not None or state.trace.role(site) not in self.roles:
            return None
        return _Step(state.plan[site].quantizer, state.params[site], fake_quantize)


class _Step:
    """The step of one activation."""

    def __init__(self, quantizer: Quantizer, params: Params, fake_quantize: FakeQuantize) -> None:
        self.quantizer, self.params, self.fake_quantize = quantizer, params, fake_quantize
        self.tensors = [params.scale.detach().clone().requires_grad_()]

    def __call__(self, x: Tensor) -> Tensor:
        return self.fake_quantize(self.quantizer, x, self.params._replace(scale=self.tensors[0].clamp(min=TINY)))

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def result(self) -> tuple[Params, Tensor | None]:
        return self.params._replace(scale=self.tensors[0].detach().clamp(min=TINY)), None


@dataclass(frozen=True)
class LearnedWeight:
    """Weights themselves learn, through the format's straight-through gradient; their grid stays."""

    rate: float = 2e-5
    cosine: bool = True

    def start(self, site: Site, state: State, fake_quantize: FakeQuantize) -> Learner | None:
        weight = state.constant(site)
        if weight is None:
            return None
        return _Weight(state.plan[site].quantizer, state.params[site], weight)


class _Weight:
    """One weight tensor."""

    def __init__(self, quantizer: Quantizer, params: Params, weight: Tensor) -> None:
        self.quantizer, self.params = quantizer, params
        self.tensors = [weight.detach().clone().requires_grad_()]

    def __call__(self, x: Tensor) -> Tensor:
        return straight_through(self.quantizer, self.tensors[0], self.params)

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def result(self) -> tuple[Params, Tensor | None]:
        with torch.no_grad():
            return self.params, self.quantizer.encode(self.tensors[0], self.params)
