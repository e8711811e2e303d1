"""How far each operand moved: signal-to-quantization-noise ratios, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitquant.artifact import QuantizedModel
from vitquant.artifact.operands import Activation, Weight
from vitquant.trace import Interceptor, Site, Transform


@dataclass
class _Noise:
    """Sums over everything a site has seen."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.signal += float(x.double().square().sum())
        self.noise += float((x.double() - y.double()).square().sum())

    def decibels(self) -> float:
        if self.noise == 0 or self.signal == 0:
            return math.inf if self.noise == 0 else -math.inf
        return 10 * math.log10(self.signal / self.noise)


def sqnr(model: QuantizedModel, images: Iterable[Tensor]) -> dict[str, float]:
    """10·log10(Σx² / Σ(x - x̂)²) in dB of every quantized activation, as it arrives in the quantized model.

    images: batches (n, channels, height, width). Infinite where nothing is lost. Weights are not among them: the
    artifact does not keep what they were.
    """
    sums: dict[Site, _Noise] = {}
    transforms = dict(model.transforms())
    for site, operand in zip(model.sites, model.operands, strict=True):
        if isinstance(operand, Activation) and not isinstance(operand, Weight):
            sums[site] = _Noise()
            transforms[site] = _measured(transforms[site], sums[site])
    with torch.no_grad():
        for batch in images:
            with Interceptor(model.model, transforms):
                model.model(batch)
    return {str(site): noise.decibels() for site, noise in sums.items()}


def worst(values: Mapping[str, float], count: int = 10) -> list[tuple[str, float]]:
    """The sites with the lowest ratios, lowest first."""
    return sorted(values.items(), key=lambda item: item[1])[:count]


def _measured(then: Transform, noise: _Noise) -> Transform:
    def measure(x: Tensor) -> Any:
        y = then(x)
        noise.add(x, y)
        return y

    return measure
