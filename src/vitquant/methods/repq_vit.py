"""RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers.

ICCV 2023, arXiv:2212.08254. Channel-wise grids after LayerNorm are calibrated, then folded into layer-wise ones
(section 3.2); log√2 grids for attention probabilities (section 3.3). Differs from the released code: the
zero-point is rounded to an integer, and the log grid has 2^b levels, not 2^b + 1 (`extra_zero=True` gives those).
"""

from __future__ import annotations

from vitquant.calibrate import Percentile
from vitquant.numerics import PER_CHANNEL, PER_OUTPUT, Log, Uniform
from vitquant.passes import Fit, ScaleReparam
from vitquant.recipe import Bits, Recipe, Rule
from vitquant.trace import ACTIVATION_ROLES, Role

_W4A4 = Bits(4, 4)


def repq_vit(bits: Bits = _W4A4, *, reparam: bool = True, extra_zero: bool = False) -> Recipe:
    """Channel-wise grids after LayerNorm, folded into layer-wise ones; log√2 grids for attention probabilities.

    `reparam=False` is the ablation without the rewrite: layer-wise grids after LayerNorm."""
    uniform = Uniform(bits.activation, include_zero=False)
    weight = Uniform(bits.weight, PER_OUTPUT, include_zero=False)
    post_norm = Uniform(bits.activation, PER_CHANNEL, include_zero=False) if reparam else uniform
    search = Percentile()
    return Recipe(
        name="repq-vit",
        source="arXiv:2212.08254",
        bits=str(bits),
        cost="none for the linears; a shift and one of two scales for attention · V",
        rules={
            **dict.fromkeys(ACTIVATION_ROLES, Rule(uniform, search)),
            Role.IMAGE: Rule(Uniform(8, include_zero=False), search),
            Role.POST_NORM: Rule(post_norm, search),
            Role.PROBS: Rule(Log(bits.probs, steps=2, extra_zero=extra_zero), search),
            Role.WEIGHT: Rule(weight, search),
        },
        passes=(Fit(), ScaleReparam(), Fit()) if reparam else (Fit(),),
    )
