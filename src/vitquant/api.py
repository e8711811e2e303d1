"""The whole toolkit in three calls: quantize, load, observe."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitquant import models
from vitquant.artifact import Provenance, QuantizedModel
from vitquant.calibrate import Batches, Bench, Progress, silent
from vitquant.errors import UsageError
from vitquant.methods import recipe as recipe_of
from vitquant.recipe import Recipe, apply
from vitquant.trace import Trace
from vitquant.trace import observe as observe_model


def quantize(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    method: str | Recipe = "repq-vit",
    bits: str = "w4a4",
    *,
    seed: int = 0,
    batch: int = 32,
    progress: Progress = silent,
    provenance: Provenance | None = None,
    **options: Any,
) -> QuantizedModel:
    """A low-bit version of `model`, which is not changed.

    images: preprocessed calibration images (n, channels, height, width), or a re-iterable of such batches; no
    labels. method: a name from `vitquant.methods.METHODS`, or a recipe of your own; `options` go to the named
    method. bits: "w4a4", "w8a8", "w8a8-attn4". The result runs like the model, has `.save(dir)` and `.table()`.

    Raises UsageError for unknown names and bits out of range, NonFinite naming the site where NaN appears,
    UnknownContraction where the model multiplies tensors unseen.

    >>> import torch, vitquant
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> small = vitquant.quantize(net, torch.randn(4, 3, 2, 2), method="minmax", bits="w8a8")
    >>> small(torch.randn(5, 3, 2, 2)).shape
    torch.Size([5, 2])
    """
    recipe = recipe_of(method, bits, **options)
    model = copy.deepcopy(model).eval()
    batches = Batches(images, batch)
    bench = Bench(model, observe_model(model, batches.first()), batches, seed, progress)
    state = apply(recipe, bench)
    given = provenance or Provenance(method={})
    said = {"name": recipe.name, "source": recipe.source, "bits": recipe.bits}
    images_said = {"count": batches.total, **given.images}
    full = replace(given, method=said, seed=seed, versions=_versions(), images=images_said)
    return QuantizedModel.of(model, state, full)


def load(directory: str | Path, model: nn.Module | None = None) -> QuantizedModel:
    """A saved model, ready to run: no calibration, no download; its logits equal those before saving bit for bit.

    model: the architecture, needed only if a model of your own was quantized; its weights do not matter.
    Raises ArtifactError naming the file and the field.
    """

    def build(provenance: Provenance) -> nn.Module:
        if model is not None:
            return copy.deepcopy(model)
        if provenance.model is None:
            raise UsageError(f"'{directory}' holds a model of your own: pass it, load('{directory}', model=...)")
        source = models.Source.from_json(dict(provenance.model))
        config = provenance.model_config
        return models.load(source, pretrained=False, config=None if config is None else dict(config)).model

    return QuantizedModel.load(directory, build)


def observe(model: nn.Module, image: Tensor) -> Trace:
    """What the model does with one image (1, channels, height, width): its sites, their roles, its costs."""
    return observe_model(copy.deepcopy(model).eval(), image)


def _versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {name: importlib.metadata.version(name) for name in ("vitquant", "torch", "timm")}
