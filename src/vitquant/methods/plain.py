"""The two plain baselines: every operand uniform, per tensor; weights per output channel."""

from __future__ import annotations

from vitquant.calibrate import MinMax, Percentile, Search
from vitquant.numerics import PER_OUTPUT, Uniform
from vitquant.passes import Fit
from vitquant.recipe import Bits, Recipe, Rule
from vitquant.trace import ACTIVATION_ROLES, Role

_W8A8 = Bits(8, 8)


def minmax(bits: Bits = _W8A8) -> Recipe:
    """Min-max ranges everywhere. What every toolkit does first; at 4 bits it destroys a Vision Transformer."""
    return _plain("minmax", bits, MinMax())


def percentile(bits: Bits = _W8A8) -> Recipe:
    """The same with ranges chosen among three percentiles by mean squared error."""
    return _plain("percentile", bits, Percentile())


def _plain(name: str, bits: Bits, search: Search) -> Recipe:
    activation = Rule(Uniform(bits.activation), search)
    return Recipe(
        name=name,
        bits=str(bits),
        cost="none: one scale and zero-point for each tensor",
        rules={
            **dict.fromkeys(ACTIVATION_ROLES, activation),
            Role.IMAGE: Rule(Uniform(8), search),
            Role.PROBS: Rule(Uniform(bits.probs), search),
            Role.WEIGHT: Rule(Uniform(bits.weight, PER_OUTPUT), search),
        },
        passes=(Fit(),),
    )
