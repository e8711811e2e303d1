"""IGQ-ViT: Instance-Aware Group Quantization for Vision Transformers.

CVPR 2024, arXiv:2404.00928. Channels of every linear's input, and rows of the attention probabilities, are split into
groups for each image at run time, one uniform grid a group (sections 3.2, 3.3); how many groups a layer gets can be
chosen under a budget of bit-operations (section 3.4). There is no official code: what is inferred rather than known
is listed in docs/methods/igq-vit.md.
"""

from __future__ import annotations

from vitquant.calibrate import Percentile, RangeClusters
from vitquant.numerics import PER_OUTPUT, PER_ROW, InstanceGroups, Uniform
from vitquant.passes import AllocateGroups, Budget, Fit, Instances
from vitquant.recipe import Bits, Recipe, Rule
from vitquant.trace import ACTIVATION_ROLES, Role

_W4A4 = Bits(4, 4)


def igq_vit(
    bits: Bits = _W4A4,
    *,
    groups: int = 8,
    allocate: bool = False,
    ratio: float = 1.0,
    bops: int | None = None,
    instance: str = "image",
    head_bits: int | None = None,
) -> Recipe:
    """Channels and attention rows pick one of a few grids for each image at run time.

    groups: grids of a layer, or with `allocate=True` their average: the budget is what the fixed model needs, times
    `ratio`, or `bops` bit-operations. instance: "image" or "window" (where a model has windows). head_bits: of the
    classifier's input, by default those of the activations; it has one token, where groups would be a codebook, so
    it gets one grid.
    """
    search = Percentile()
    uniform = Uniform(bits.activation, include_zero=False)
    channels = InstanceGroups(bits.activation, groups=groups)
    rows = InstanceGroups(bits.probs, PER_ROW, groups=groups, from_zero=True)
    allocation = (AllocateGroups(Budget(groups, ratio, bops)),) if allocate or bops is not None else ()
    return Recipe(
        name="igq-vit",
        source="arXiv:2404.00928",
        bits=str(bits),
        cost="ranges and assignment for each image, and a floating-point sum of a linear's groups",
        rules={
            **dict.fromkeys(ACTIVATION_ROLES, Rule(channels, RangeClusters())),
            Role.IMAGE: Rule(Uniform(8, include_zero=False), search),
            **dict.fromkeys((Role.QUERY, Role.KEY, Role.VALUE), Rule(uniform, search)),
            Role.PROBS: Rule(rows, RangeClusters()),
            Role.POOLED: Rule(Uniform(head_bits or bits.activation, include_zero=False), search),
            Role.WEIGHT: Rule(Uniform(bits.weight, PER_OUTPUT, include_zero=False), search),
        },
        passes=(Instances(instance), Fit(), *allocation),
    )
