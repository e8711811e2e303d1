"""The result: a model that runs under its quantization, saves itself and explains itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitquant.artifact.operands import Activation, Constant, Provenance, Weight
from vitquant.artifact.passing import Passing
from vitquant.artifact.store import Contents, load, save
from vitquant.errors import PlanError
from vitquant.integer import Arithmetic, IntegerRun
from vitquant.recipe import State
from vitquant.recipe.ledger import Ledger
from vitquant.trace import Site


class QuantizedModel(nn.Module):
    """Runs `model`, unchanged, with its operands quantized.

    operands: what happens at each site. unneeded: parameters of `model` that no run reads any more; they are
    emptied, so that what runs is what is saved. Called as the model itself is.
    """

    def __init__(
        self,
        model: nn.Module,
        operands: Mapping[Site, Activation | Constant],
        ledger: Ledger,
        provenance: Provenance,
        unneeded: set[str],
        arithmetic: Arithmetic | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.sites = tuple(operands)
        self.operands = nn.ModuleList(operands.values())
        self.ledger = ledger
        self.provenance = provenance
        self.unneeded = unneeded
        self.arithmetic = arithmetic
        self._compiled: dict[bool, dict[Any, Any]] = {False: {}, True: {}}
        _empty(model, unneeded)
        self.eval()

    @staticmethod
    def of(model: nn.Module, state: State, provenance: Provenance) -> QuantizedModel:
        """Freeze a finished state. `model` is copied, never changed."""
        operands: dict[Site, Activation | Constant] = {}
        with torch.no_grad():
            for site, value in state.rewrites.items():
                if site not in state.params:
                    operands[site] = Constant(value)
            for site, params in state.params.items():
                quantizer, constant = state.plan[site].quantizer, state.constant(site)
                if constant is None:
                    operands[site] = Activation(quantizer, params)
                else:
                    operands[site] = Weight(quantizer, params, state.weight_codes(site))
        replaced = {s: o for s, o in operands.items() if isinstance(o, (Weight, Constant))}
        unneeded = state.trace.unneeded(replaced)
        ledger = Ledger.of(state)
        return QuantizedModel(copy.deepcopy(model), operands, ledger, provenance, unneeded, state.arithmetic)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.arithmetic is not None:
            return self._on_integers(False, args, kwargs)
        with Passing(self.model, dict(zip(self.sites, self.operands, strict=True))) as mode:  # type: ignore[arg-type]
            output = self.model(*args, **kwargs)
        mode.check_complete()
        return output

    def integers(self, *args: Any, **kwargs: Any) -> Any:
        """The same run with nothing but integer tensors between the image and the output; the same numbers.

        Raises PlanError if the method is not made for it.
        """
        if self.arithmetic is None:
            raise PlanError(f"{self.provenance.method.get('name', 'this recipe')} is not executed on integers")
        return self._on_integers(True, args, kwargs)

    def execution(self, integers_only: bool) -> IntegerRun:
        """The mode in which the model computes on integers, held in integer or in floating-point tensors."""
        assert self.arithmetic is not None
        operands: dict[Site, Any] = dict(zip(self.sites, self.operands, strict=True))
        carrier = self.arithmetic.carrier(integers_only)
        return IntegerRun(self.model, operands, carrier, self.arithmetic.faithful, self._compiled[integers_only])

    @torch.no_grad()
    def _on_integers(self, integers_only: bool, args: Any, kwargs: Any) -> Any:
        mode = self.execution(integers_only)
        with mode:
            output = self.model(*args, **kwargs)
        return mode.real(output)

    def transforms(self) -> dict[Site, Any]:
        """What happens to each operand, by site."""
        return {site: operand.forward for site, operand in zip(self.sites, self.operands, strict=True)}

    def save(self, directory: str | Path) -> Path:
        """Write config.json and model.safetensors; see `vitquant.artifact.store`."""
        contents = Contents(
            self.model,
            dict(zip(self.sites, self.operands, strict=True)),  # type: ignore[arg-type]
            self.ledger,
            self.provenance,
            self.unneeded,
            self.arithmetic,
        )
        return save(contents, Path(directory))

    @staticmethod
    def load(directory: str | Path, build: Callable[[Provenance], nn.Module]) -> QuantizedModel:
        """Read an artifact back; see `vitquant.artifact.store`."""
        found = load(Path(directory), build)
        return QuantizedModel(
            found.model, found.operands, found.ledger, found.provenance, found.unneeded, found.arithmetic
        )

    def table(self) -> str:
        """Every operand of a product: site, role, format, shape for one image, effective bits."""
        rows = [
            (name, e.role, e.format, "x".join(map(str, e.shape)), f"{e.bits:.4g}")
            for name, e in self.ledger.entries.items()
        ]
        head = ("site", "role", "format", "shape", "bits")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]]
        return "\n".join(line.rstrip() for line in lines)


def _empty(model: nn.Module, names: set[str]) -> None:
    """Give these parameters and buffers zeros that take no memory."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and prefix + name in names:
                    tensor.data = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
