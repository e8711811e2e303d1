"""ADFQ-ViT: Activation-Distribution-Friendly post-training Quantization for Vision Transformers.

Neural Networks 186:107289 (2025), arXiv:2407.02763. The paper's equations could not be read; this follows its
abstract and the released code, and says where it does not. Three parts: per-patch grids with exact outliers after
LayerNorm, shift-log2 grids after GELU, and module-wise optimisation that also compares attention scores.

Deviations from the released code, by default: the image has 8 bits instead of the activations'; log grids have 2^b
levels, not 2^b + 1; the GELU shift is a constant, not the batch's minimum; 0 lies on the inlier grids; activation
grids are calibrated in floating point, not again on each unit's quantized input; every linear behind a norm gets
the per-patch grid (Swin's patch merging too).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitquant.calibrate import Bench, Inliers, Percentile, ScaleZero
from vitquant.errors import UsageError
from vitquant.numerics import PER_OUTPUT, PER_TENSOR, PER_TOKEN, Log, OutlierAware, ShiftLog, Uniform
from vitquant.passes import Fit
from vitquant.passes.learn import AdaRound, LearnedStep
from vitquant.passes.reconstruct import Loss, OutputError, Reconstruct, Seen
from vitquant.recipe import Bits, Recipe, Rule, State
from vitquant.recipe.recipe import Pass
from vitquant.trace import ACTIVATION_ROLES, Role, Site
from vitquant.trace.units import Unit

Form = Literal["intended", "as-released"]
PRODUCT_OPERANDS = (Role.QUERY, Role.KEY, Role.VALUE, Role.PROBS)
TEMPERATURE = 4.0
_W4A4 = Bits(4, 4)
TINY = 1e-12


def adfq_vit(
    bits: Bits = _W4A4,
    *,
    optimise: bool = True,
    form: Form = "intended",
    threshold: float = 5.0,
    budget: float | None = None,
    dynamic: bool = False,
    log_steps: int = 2,
    runtime_minimum: bool = False,
    extra_level: bool = False,
    image_bits: int = 8,
    strength: float = 0.01,
    iterations: int = 3000,
    batch: int = 32,
    attention: float | None = None,
    rounding_rate: float = 3e-3,
    step_rate: float = 4e-5,
    mix: float = 0.5,
    checkpoint: str | Path | None = None,
    cache: str | Path | None = None,
) -> Recipe:
    """Per-patch grids with exact outliers after norms, shift-log2 after GELU, module-wise optimisation.

    optimise: run the module-wise optimisation; without it the method is calibration only.

    form: "intended" has straight-through and learned-step gradients everywhere and the Kullback-Leibler divergence
    of attention scores over keys, from the floating-point scores; "as-released" stops gradients where the released
    code stops them, and takes the divergence over heads. threshold: |x| beyond which a post-LayerNorm element is
    kept exactly; budget: the fraction of them to allow instead. dynamic: token ranges found at run time, for
    inputs whose number of tokens changes. log_steps: 1 for log2, 2 for log√2. runtime_minimum, extra_level,
    image_bits (of the released code: those of the activations): the released code's choices as switches.
    attention: weight of the attention-score term. strength: of the rounding penalty. iterations, batch, rates, mix,
    checkpoint, cache: see `Reconstruct`.
    """
    if form not in ("intended", "as-released"):
        raise UsageError(f"form '{form}' is neither 'intended' nor 'as-released'")
    search, product = Percentile(), Rule(Uniform(bits.activation), ScaleZero())
    outlier = OutlierAware(bits.activation, PER_TENSOR if dynamic else PER_TOKEN, threshold, dynamic)
    shifted = ShiftLog(bits.activation, steps=log_steps, extra_zero=extra_level, runtime_minimum=runtime_minimum)
    reconstruct = Reconstruct(
        objective=AttentionScore(form, attention),
        trainables=(
            AdaRound(rounding_rate, strength=strength),
            LearnedStep(step_rate, roles=tuple(r for r in ACTIVATION_ROLES if r not in PRODUCT_OPERANDS)),
        ),
        iterations=iterations,
        batch=batch,
        mix=mix,
        stop_gradients=form == "as-released",
        checkpoint=None if checkpoint is None else Path(checkpoint),
        cache=None if cache is None else Path(cache),
    )
    passes: tuple[Pass, ...] = (Fit(), reconstruct) if optimise else (Fit(),)
    return Recipe(
        name="adfq-vit",
        source="arXiv:2407.02763",
        bits=str(bits),
        cost="a sparse product for the outliers, counted in bits and BOPs; one scale for each token; shifts",
        rules={
            **dict.fromkeys(ACTIVATION_ROLES, Rule(Uniform(bits.activation, include_zero=False), search)),
            Role.IMAGE: Rule(Uniform(image_bits, include_zero=False), search),
            Role.POST_NORM: Rule(outlier, Inliers(search, budget)),
            Role.QUERY: product,
            Role.KEY: product,
            Role.VALUE: product,
            Role.PROBS: Rule(Log(bits.probs, steps=log_steps, extra_zero=extra_level), search),
            Role.POST_ACT: Rule(shifted, search),
            Role.WEIGHT: Rule(Uniform(bits.weight, PER_OUTPUT, include_zero=False), search),
        },
        passes=passes,
    )


@dataclass(frozen=True)
class AttentionScore:
    """The output's squared error, and for a unit with attention the divergence of its scores (softmax outputs) S.

    intended: KL(S_fp || S_q) over keys, summed over queries, averaged over images and heads. as-released:
    10 · Σ KL(softmax(S_q / 4) || softmax(S_fp / 4)) / images, both softmaxes over the heads. weight: factor of the
    term, instead of 1 and 10.
    """

    form: Form = "intended"
    weight: float | None = None

    def __call__(self, unit: Unit, state: State, bench: Bench) -> Loss:
        sites = [s for s in state.trace.with_role(Role.PROBS) if unit.owns(s)]
        if self.form == "as-released":
            return AttentionLoss(sites, scores_over_heads, 10.0 if self.weight is None else self.weight)
        return AttentionLoss(sites, scores_over_keys, 1.0 if self.weight is None else self.weight)


@dataclass(frozen=True)
class AttentionLoss:
    """Squared output error + weight · divergence of the scores at `sites`."""

    sites: Sequence[Site]
    divergence: Callable[[Tensor, Tensor], Tensor]
    weight: float

    def __call__(self, seen: Seen) -> Tensor:
        loss = OutputError()(seen)
        for site in self.sites:
            loss = loss + self.weight * self.divergence(seen.operands[site], seen.targets[site])
        return loss


def scores_over_keys(quantized: Tensor, full: Tensor) -> Tensor:
    """KL(S_fp || S_q) over the last axis (keys); (images, heads, queries, keys)."""
    with torch.no_grad():
        entropy = -full.flatten().dot((full + TINY).log_().flatten())
    crossed = -full.flatten().dot((quantized + TINY).log().flatten())
    return (crossed - entropy) / (quantized.shape[0] * quantized.shape[-3])


def scores_over_heads(quantized: Tensor, full: Tensor) -> Tensor:
    """Σ KL(softmax(S_q / T) || softmax(S_fp / T)) / images, T = 4, both over the heads: the released code's term."""
    inputs = torch.log_softmax(full / TEMPERATURE, -3)
    return F.kl_div(inputs, torch.softmax(quantized / TEMPERATURE, -3), reduction="batchmean")
