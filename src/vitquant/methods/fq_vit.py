"""FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer.

IJCAI 2022, arXiv:2111.13824. Every tensor is quantized and every operation is done on integers: power-of-two
factors on the residual stream (section 3.2), integer LayerNorm with dyadic multipliers, Log-Int-Softmax (section
3.3), and, where the released code simulates, dyadic rounding between all grids, so that the model runs on integer
tensors.

Differs from the released code: exponents are chosen on a sample of all calibration images, not on the last batch;
statistics are those of the floating-point model throughout (there, the softmax is already quantized in the last
batch); ranges are widened to hold 0; log2 codes have 2^b levels, zero included; the exponential has base 2 exactly
and as many fractional bits as its sum leaves room for; LayerNorm has its epsilon, and a multiplier per token and one
per channel in place of one for each pair; multipliers are rounded, with 11 bits; 8-bit attention probabilities come
from the same integer exponential, not from a softmax in floating point; biases are integers on their accumulator's
scale; GELU is a table. `faithful=True` brings back the released exponential with its 30 fractional bits, the 8-bit
multipliers rounded down, LayerNorm without epsilon, and the 2^b + 1 levels.
"""

from __future__ import annotations

from collections.abc import Mapping

from vitquant.calibrate import Fixed, MinMax, MovingAverage, MseGrid, PowerOfTwoMse, Search
from vitquant.errors import UsageError
from vitquant.integer import Arithmetic
from vitquant.numerics import PER_OUTPUT, Log, PowerOfTwo, Uniform
from vitquant.passes import FitShared, OnIntegers
from vitquant.recipe import Bits, Recipe, Rule
from vitquant.trace import ACTIVATION_ROLES, Role

OBSERVERS: Mapping[str, Search] = {
    "minmax": MinMax(),
    "ema": MovingAverage(),
    "percentile": MovingAverage(tail=1e-5),
    "omse": MseGrid(),
}
LIS_BITS = 5
"""Most bits of log2 attention: its smallest power has 2^b - 2 fractional bits."""

_W8A8 = Bits(8, 8)


def fq_vit(
    bits: Bits = _W8A8,
    *,
    observer: str = "minmax",
    ptf: bool = True,
    lis: bool | None = None,
    faithful: bool = False,
) -> Recipe:
    """Everything quantized and executed on integers: residual stream, LayerNorm and softmax included.

    observer: minmax, ema, percentile or omse, for the activations that are not on power-of-two grids. lis: log2
    attention (default: wherever its bits are at most 5), else uniform. `ptf=False, lis=False` is plain min-max with
    LayerNorm and softmax quantized. faithful: the released arithmetic, flaws included."""
    if observer not in OBSERVERS:
        raise UsageError(f"fq-vit: unknown observer '{observer}'; there are {', '.join(OBSERVERS)}")
    logarithmic = bits.probs <= LIS_BITS if lis is None else lis
    if logarithmic and bits.probs > LIS_BITS:
        raise UsageError(f"fq-vit: log2 attention has at most {LIS_BITS} bits, not {bits.probs}")
    plain = Rule(Uniform(bits.activation), OBSERVERS[observer])
    residual = Rule(PowerOfTwo(bits.activation), PowerOfTwoMse()) if ptf else plain
    # Probabilities are bounded: nothing is calibrated.
    log, uniform = Log(bits.probs, extra_zero=faithful), Uniform(bits.probs)
    probs = Rule(log if logarithmic else uniform, Fixed(0.0, 1.0) if logarithmic else MinMax())
    return Recipe(
        name="fq-vit",
        source="arXiv:2111.13824",
        bits=str(bits),
        cost="a multiplier and a shift for each LayerNorm token; shifts in place of products for attention · V",
        rules={
            **dict.fromkeys(ACTIVATION_ROLES, plain),
            **dict.fromkeys((Role.PRODUCT, Role.LOGITS, Role.NORM_OUTPUT, Role.ACT_INPUT, Role.ACT_OUTPUT), plain),
            **dict.fromkeys((Role.SUM, Role.EMBEDDING, Role.NORM_INPUT), residual),
            **dict.fromkeys((Role.PROBS, Role.SOFTMAX_OUTPUT), probs),
            Role.IMAGE: Rule(Uniform(8), MinMax()),
            Role.ADDEND: Rule(Uniform(bits.activation), MinMax()),
            Role.WEIGHT: Rule(Uniform(bits.weight, PER_OUTPUT, symmetric=True, full_range=True), MinMax()),
        },
        passes=(FitShared(), OnIntegers(Arithmetic(faithful))),
    )
