"""Methods for integer engines: every operation that is quantized has a fast kernel there.

Own. Activations on one asymmetric unsigned 8-bit grid for each tensor, weights on one signed symmetric grid for
each output channel, both at the inputs of linears and convolutions only: what x86 engines multiply fastest. What
else a Vision Transformer does stays in floating point: at its sizes the conversions around an integer attention
product cost what the product saves.
"""

from __future__ import annotations

from vitquant.calibrate import MinMax, MseGrid, Percentile, Search
from vitquant.numerics import PER_CHANNEL, PER_OUTPUT, Uniform
from vitquant.passes import Fit, ScaleReparam
from vitquant.passes.compensate import Compensate
from vitquant.recipe import FLOAT, Bits, Pass, Recipe, Rule
from vitquant.trace import ACTIVATION_ROLES, Role

ATTENTION = (Role.QUERY, Role.KEY, Role.PROBS, Role.VALUE)


def deploy_int8(bits: Bits = Bits(8, 8), *, attention: bool = False, reparam: bool = False, act: int = 0) -> Recipe:
    return _deploy("deploy-int8", bits, attention, reparam, act, ())


def deploy_w4a8(bits: Bits = Bits(4, 8), *, attention: bool = False, reparam: bool = False, act: int = 0, comp: bool = True, patch: int = 8, head: int = 4, damping: float = 0.01) -> Recipe:
    return _deploy("deploy-w4a8", bits, attention, reparam, act, (Compensate(damping),) if comp else (), patch, head)


def _deploy(name: str, bits: Bits, attention: bool, reparam: bool, act: int, passes: tuple[Pass, ...], patch: int = 8, head: int = 8) -> Recipe:
    search: Search = (MinMax(), Percentile(), Percentile((0.9999, 0.99999, 1.0)), MseGrid())[act]
    activation = Rule(Uniform(bits.activation), search)
    weight = Rule(Uniform(bits.weight, PER_OUTPUT, symmetric=True), MseGrid())
    post_norm = Rule(Uniform(bits.activation, PER_CHANNEL), search) if reparam else activation
    return Recipe(
        name=name,
        bits=str(bits),
        rules={
            **dict.fromkeys(ACTIVATION_ROLES, activation),
            **dict.fromkeys(ATTENTION, activation if attention else FLOAT),
            Role.POST_NORM: post_norm,
            Role.WEIGHT: weight,
        },
        overrides=(("patch_embed*.weight", Rule(Uniform(patch, PER_OUTPUT, symmetric=True), MseGrid())),("head*.weight", Rule(Uniform(head, PER_OUTPUT, symmetric=True), MseGrid())),),
        passes=(*((Fit(), ScaleReparam(), Fit()) if reparam else (Fit(),)), *passes),
    )
