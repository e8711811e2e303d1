"""torch.export: the fake-quantized program, its weights as integer codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitquant.artifact import QuantizedModel
from vitquant.artifact.operands import Weight
from vitquant.export.lower import outputs_of
from vitquant.trace import Interceptor


class _Decode(nn.Module):
    """A weight decoded from its codes whenever the program runs, so that only codes are stored."""

    codes: Tensor

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.quantizer, self.params = weight.quantizer, weight.params
        low, high = weight.quantizer.code_range
        kind = torch.uint8 if low >= 0 and high <= 255 else torch.int8 if high <= 127 else torch.int16
        self.register_buffer("codes", weight.codes.to(kind))

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer.decode(self.codes.float(), self.params)


class _Program(nn.Module):
    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        self.model, self.sites = model.model, model.sites
        self.places = nn.ModuleList(_Decode(o) if isinstance(o, Weight) else o for o in model.operands)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        with Interceptor(self.model, dict(zip(self.sites, self.places, strict=True))):
            return outputs_of(self.model(image))


def save(model: QuantizedModel, image: Tensor, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a program that `torch.export.load` runs without this package, batch dimension dynamic."""
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(_Program(model), (image,), dynamic_shapes=batch, strict=False)
    for name in model.unneeded:  # placeholders that nothing reads, which would be written out in full
        stored = program.state_dict.get(f"model.{name}")
        if stored is not None:
            program.state_dict[f"model.{name}"] = _emptied(stored)
    torch.export.save(program, path, extra_files={f"{name}.txt": value for name, value in metadata.items()})
    return path


def _emptied(stored: Tensor) -> Tensor:
    empty = torch.zeros(0, dtype=stored.dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(stored, nn.Parameter) else empty
