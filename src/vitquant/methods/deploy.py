"""Methods for integer engines: every operation that is quantized has a fast kernel there.

Own. Activations on one asymmetric unsigned 8-bit grid for each tensor, ranges by percentiles; 8-bit weights on one
signed symmetric grid for each output channel, ranges by squared error; both at the inputs of linears and convolutions
only. That is what x86 engines multiply fastest. Attention products stay in floating point unless `attention` says so:
then queries, keys and values lie on one signed symmetric grid for each tensor, probabilities on an unsigned one.
"""

from __future__ import annotations

from vitquant.calibrate import MseGrid, Percentile
from vitquant.numerics import PER_OUTPUT, Uniform
from vitquant.passes import Fit
from vitquant.passes.compensate import Compensate
from vitquant.passes.exceptions import Exceptions
from vitquant.recipe import FLOAT, Bits, Pass, Recipe, Rule
from vitquant.trace import ACTIVATION_ROLES, Role

_W8A8, _W4A8 = Bits(8, 8), Bits(4, 8)
_FACTORS = (Role.QUERY, Role.KEY, Role.VALUE)
_BYTE = Rule(Uniform(8, PER_OUTPUT, symmetric=True), MseGrid())


def deploy_int8(bits: Bits = _W8A8, *, attention: bool = False) -> Recipe:
    """8-bit weights and activations for integer engines.

    attention: its two products too. Faster where what stays in floating point runs in float32, slower in bf16.
    """
    weight = Rule(Uniform(bits.weight, PER_OUTPUT, symmetric=True), MseGrid())
    return _deploy("deploy-int8", bits, weight, attention, (Fit(),))


def deploy_w4a8(bits: Bits = _W4A8, *, attention: bool = False, size: float = 0.14) -> Recipe:
    """Weights that are stored in 4 bits and multiplied as 8; their rounding is compensated layer by layer.

    4-bit grids are asymmetric: engines fold the shift into the integers. size: of the stored parameters, relative to
    32 bits each; what the 4-bit weights leave of it goes as 8 bits to those that lose most, see `Exceptions`.
    """
    weight = Rule(Uniform(bits.weight, PER_OUTPUT), MseGrid())
    passes = (Exceptions(_BYTE, size), Fit(), Compensate(most_bits=bits.weight))
    return _deploy("deploy-w4a8", bits, weight, attention, passes)


def _deploy(name: str, bits: Bits, weight: Rule, attention: bool, passes: tuple[Pass, ...]) -> Recipe:
    activation = Rule(Uniform(bits.activation), Percentile())
    factor = Rule(Uniform(bits.activation, symmetric=True), Percentile())
    return Recipe(
        name=name,
        bits=str(bits),
        cost="none: one scale and zero-point for each tensor",
        rules={
            **dict.fromkeys(ACTIVATION_ROLES, activation),
            **dict.fromkeys(_FACTORS, factor if attention else FLOAT),
            Role.PROBS: activation if attention else FLOAT,
            Role.IMAGE: Rule(Uniform(8), Percentile()),
            Role.WEIGHT: weight,
        },
        passes=passes,
    )
