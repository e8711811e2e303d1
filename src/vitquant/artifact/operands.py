"""What stands at the sites of a quantized model, and where the model comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.numerics import Params, Quantizer, Workspace


@dataclass(frozen=True)
class Provenance:
    """Where a quantized model comes from, as written into its config.json.

    method: name, paper and bits of the recipe. seed: of the calibration. versions: of the libraries. images: how
    many and their fingerprint. model: the source's JSON, or None for a model of the user's own.
    preprocessing, model_config: what rebuilds the transform and the architecture. label_space: names the classes.
    """

    method: Mapping[str, str]
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    preprocessing: Mapping[str, Any] | None = None
    model_config: Mapping[str, Any] | None = None
    label_space: str | None = None


class Activation(nn.Module):
    """An operand that is quantized as it arrives."""

    def __init__(self, quantizer: Quantizer, params: Params) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.names = params._fields
        for name, value in params._asdict().items():
            self.register_buffer(name, value.detach().clone(), persistent=False)

    @property
    def params(self) -> Params:
        return self.quantizer.parameters(*(getattr(self, name) for name in self.names))

    def forward(self, x: Tensor, workspace: Workspace | None = None, slot: str = "") -> Tensor:
        return self.quantizer.fake_quantize(x, self.params, workspace, slot)


class Weight(Activation):
    """A constant operand, kept as integer codes and decoded once."""

    codes: Tensor
    decoded: Tensor

    def __init__(self, quantizer: Quantizer, params: Params, codes: Tensor) -> None:
        super().__init__(quantizer, params)
        kind = torch.int16 if quantizer.storage_bits > 7 else torch.int8
        self.register_buffer("codes", codes.to(kind), persistent=False)
        self.register_buffer("decoded", quantizer.decode(codes.float(), self.params), persistent=False)

    def forward(self, x: Tensor, workspace: Workspace | None = None, slot: str = "") -> Tensor:
        return self.decoded


class Constant(nn.Module):
    """A constant operand that an exact rewrite has changed."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().clone(), persistent=False)

    def forward(self, x: Tensor | None) -> Tensor:
        return self.value
