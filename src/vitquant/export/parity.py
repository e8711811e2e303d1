"""The parity certificate: what an engine computes, against the artifact, product by product."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitquant.artifact import QuantizedModel
from vitquant.artifact.operands import Activation, Weight
from vitquant.export.lower import Kind, Lowering, outputs_of, products, tap_of
from vitquant.export.process import Process, Where
from vitquant.trace import Interceptor, Site

TOLERANCE = 1e-5
"""Largest error of an operand or a product, relative to the largest number in it."""


@dataclass(frozen=True)
class Layer:
    """One comparison: the worst element's error, relative to the largest number in the tensor."""

    site: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Certificate:
    """layers: every quantized operand and every product, with the reference's inputs. agreement: share of images
    with the artifact's top-1, of the file as it is shipped; at least `least` is required, see `agreement`."""

    engine: str
    layers: tuple[Layer, ...]
    agreement: float
    images: int
    least: float

    @property
    def ok(self) -> bool:
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """What is wrong, in one line that names the layer; None if nothing is."""
        for layer in self.layers:
            if not layer.ok:
                return (
                    f"{self.engine} differs from the artifact first at {layer.site}: "
                    f"relative error {layer.error:.1e}, allowed is {layer.allowed:.0e}"
                )
        if self.agreement < self.least:
            return (
                f"{self.engine} agrees with the artifact on {self.agreement:.1%} of {self.images} images (top-1), "
                f"required are {self.least:.0%}; no single layer is at fault"
            )
        return None

    @property
    def worst(self) -> float:
        """The largest error of any layer."""
        return max((layer.error for layer in self.layers), default=0.0)


def run(engine: str, model: Path, images: Tensor, where: Where, batch: int = 8) -> dict[str, Tensor]:
    """Every output of a file on an engine, in a process of its own.

    where: finds the site in an engine's message. Raises ExportError in one line if the engine fails or dies.
    """
    with tempfile.TemporaryDirectory() as scratch, Process(engine, model, where=where) as process:
        inputs, outputs = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        np.savez(inputs, image=images.cpu().numpy())
        process.ask(images=str(inputs), outputs=str(outputs), batch=batch)
        with np.load(outputs) as arrays:
            return {str(n): torch.from_numpy(arrays[str(i)]) for i, n in enumerate(arrays["names"])}


def compare(
    model: QuantizedModel,
    image: Tensor,
    lowered: Mapping[Site, Lowering],
    tensors: Mapping[str, Tensor],
    unseen: frozenset[Site] = frozenset(),
) -> tuple[Layer, ...]:
    """Every operand and product of an engine's run, each against the artifact's arithmetic on the same inputs.

    tensors: what the engine had, by marker. The artifact runs on `image` beside it; after each comparison it goes on
    with the engine's tensor, so a rounding that falls the other way at a tie stays in its layer. An operand passes
    if it lies between those of inputs moved by the tolerance. unseen: results of products that the engine could not
    be asked for; the artifact computes them, and the next operand shows them.
    """
    layers: list[Layer] = []

    def operand(site: Site, place: Activation, low: Lowering) -> Callable[[Tensor], Tensor]:
        def check(x: Tensor) -> Tensor:
            found = tensors[str(site)]
            margin = TOLERANCE * x.abs().max()
            below, above = place(x - margin), place(x + margin)
            size = torch.maximum(below.abs().max(), above.abs().max())
            error = torch.maximum(torch.minimum(below, above) - found, found - torch.maximum(below, above))
            allowed = TOLERANCE + (low.verdict.error if low.verdict.kind is Kind.APPROXIMATE else 0.0)
            layers.append(Layer(str(site), _ratio(error.clamp(min=0), size), allowed))
            return found

        return check

    def product(name: str) -> Callable[[Tensor], Tensor]:
        def check(x: Tensor) -> Tensor:
            found = tensors[name]
            layers.append(layer(name, found, x))
            return found

        return check

    transforms: dict[Site, Any] = model.transforms()
    for site, place in zip(model.sites, model.operands, strict=True):
        if isinstance(place, Activation) and not isinstance(place, Weight):
            transforms[site] = operand(site, place, lowered[site])
    for call in products(model):
        if tap_of(call) in unseen:
            continue
        site, tap = Site(call, "output"), product(str(tap_of(call)))
        then = transforms.get(site)
        transforms[site] = tap if then is None else _both(tap, then)
    with torch.no_grad(), Interceptor(model.model, transforms) as mode:
        outputs = outputs_of(model.model(image))
    mode.check_complete()
    return (*layers, layer("logits", tensors["logits"], outputs[0]))


def layer(name: str, found: Tensor, expected: Tensor) -> Layer:
    """A plain comparison of two tensors."""
    return Layer(name, _ratio((found - expected).abs(), expected.abs().max()), TOLERANCE)


def _both(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _ratio(error: Tensor, size: Tensor) -> float:
    """The largest error relative to `size`; NaN counts as infinite."""
    return float((error.max() / size.clamp(min=1e-30)).nan_to_num(nan=torch.inf))


def agreement(model: QuantizedModel, images: Tensor, logits: Tensor, batch: int = 8) -> tuple[float, float]:
    """Share of images on which `logits` have the artifact's top-1, and the share that is required.

    Required is 0.9 of what the artifact reaches against itself on images moved by 1e-6 of their range, less two
    standard errors: at low bits one rounding that falls the other way changes many after it, in any engine.
    """
    moved = images + 1e-6 * images.abs().max() * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, near = (torch.cat([outputs_of(model(x))[0].argmax(1) for x in v.split(batch)]) for v in (images, moved))
    steady = float((own == near).float().mean())
    share = min(steady, 0.98)
    least = 0.9 * steady - 2 * (share * (1 - share) / len(images)) ** 0.5
    return float((own == logits.argmax(1)).float().mean()), max(least, 0.0)
