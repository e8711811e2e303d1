"""From number formats to what integer engines know: one verdict for every operand.

Engines know one thing: integers of at most 8 bits on an affine grid. A format fits exactly if all its levels are
integer multiples of one step, whatever its name: then its values pass through uint8 unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.artifact import QuantizedModel
from vitquant.artifact.operands import Activation, Constant, Weight
from vitquant.numerics import Params, Quantizer, Uniform
from vitquant.trace import CallKey, Interceptor, Site
from vitquant.trace.intercept import tensors_in


class Kind(str, Enum):
    """How faithfully an engine's own arithmetic carries an operand."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    FLOAT = "floating-point fallback"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Verdict:
    """What became of one operand. error: largest change of a level, relative to the largest level."""

    site: str
    role: str
    format: str
    kind: Kind
    how: str
    error: float = 0.0


@dataclass(frozen=True)
class Codes:
    """An activation as a byte: x̂ = step · (code - zero), low <= code <= high, signed where low < 0.

    rounds: the grid's own rounding is the format's, so nothing has to be computed before it.
    """

    step: float
    zero: int
    low: int
    high: int
    rounds: bool


@dataclass(frozen=True)
class Integers:
    """A weight as integers: ŵ = step · values.

    values: of the weight's shape, int8 where they fit. step: (1,) or one for each index of `axis`. bits: of the
    stored integers, 4 or 8. shift: where given, as long as step; what is stored is then values + shift, unsigned.
    computed: the product runs on integers; else they are multiplied out first.
    """

    values: Tensor
    step: Tensor
    axis: int | None
    bits: int
    shift: Tensor | None = None
    computed: bool = True

    def moved(self, permutation: list[int]) -> Integers:
        """The same weight with its axes permuted."""
        axis = None if self.axis is None else permutation.index(self.axis)
        return replace(self, values=self.values.permute(permutation), axis=axis)


@dataclass(frozen=True)
class Lowering:
    """A verdict, and the integers where there are any."""

    verdict: Verdict
    form: Codes | Integers | None


def lower(model: QuantizedModel, approximate: bool = False) -> dict[Site, Lowering]:
    """The verdict of every quantized operand, in the model's order.

    approximate: put activations whose levels are on no uint8 grid on the nearest one, instead of leaving their
    products in floating point.
    """
    done = {}
    for site, operand in zip(model.sites, model.operands, strict=True):
        if isinstance(operand, Constant):
            continue
        assert isinstance(operand, Activation)
        kind, how, error, form = (
            _weight(operand)
            if isinstance(operand, Weight)
            else _activation(operand, approximate, signed=site.operand in _PAIR)
        )
        entry = model.ledger.entries[str(site)]
        done[site] = Lowering(Verdict(str(site), entry.role, entry.format, kind, how, error), form)
    for call in products(model):
        done |= _in_floating_point(call, done, model)
    return done


def _in_floating_point(call: CallKey, lowered: dict[Site, Lowering], model: QuantizedModel) -> dict[Site, Lowering]:
    """What changes if one operand of a product has no integers: then none has.

    No engine here has a kernel for the mixture, and none should be tempted to quantize the other operand on its own.
    """
    names = [n for n in ("input", "weight", "left", "right") if f"{call}.{n}" in model.ledger.entries]
    sites = {n: Site(call, n) for n in names}
    without = [n for n, s in sites.items() if s not in lowered or lowered[s].form is None]
    if not without:
        return {}
    changed = {}
    for name in names:
        if name not in without:
            old = lowered[sites[name]]
            stored = old.verdict.how.partition(",")[0]
            how = f"{stored}, but computed in floating point as the product's {without[0]} is"
            form = replace(old.form, computed=False) if isinstance(old.form, Integers) else None
            changed[sites[name]] = Lowering(replace(old.verdict, kind=Kind.FLOAT, how=how), form)
    return changed


def without_bytes(lowered: dict[Site, Lowering], op: str, why: str) -> dict[Site, Lowering]:
    """The same, with the results of every operation `op` rounded in floating point, to the same levels."""
    changed = {}
    for site, old in lowered.items():
        if site.call.op == op and site.operand == "output" and old.form is not None:
            how = f"{old.verdict.how}, but rounded in floating point: {why}"
            changed[site] = Lowering(replace(old.verdict, kind=Kind.FLOAT, how=how), None)
    return lowered | changed


_Result = tuple[Kind, str, float, Any]

_PAIR = ("left", "right")
"""The operands of a product of two activations."""


def _activation(operand: Activation, approximate: bool, signed: bool = False) -> _Result:
    """signed: a signed byte without a zero-point where the levels fit into one. Engines multiply two activations
    fastest so, and an activation by a weight fastest as an unsigned byte."""
    quantizer, name = operand.quantizer, type(operand.quantizer).__name__
    reason = f"{name} is computed in floating point"
    if quantizer.granularity.axes:
        return (
            Kind.FLOAT,
            f"{reason}: engines have no integer product for scales of each {quantizer.granularity}",
            0,
            None,
        )
    levels = _levels(quantizer, operand.params)
    if levels is None:
        return Kind.FLOAT, f"{reason}: its levels depend on the data", 0, None
    grid = _on_integers(levels, _steps(levels, operand.params))
    if grid is not None:
        low, high = int(grid[0].min()), int(grid[0].max())
        signed = signed and -128 <= low < 0 and high <= 127
        zero = 0 if signed else max(0, -low)
        if signed or zero + max(high, 0) <= 255:
            rounds = type(quantizer) is Uniform
            grid_of = f"{'int8' if signed else 'uint8'} grid"
            how = grid_of if rounds else f"{name} rounds in floating point; its levels are a {grid_of}"
            return Kind.EXACT, how, 0, Codes(float(grid[1]), zero, low + zero, high + zero, rounds)
    if approximate and float(levels.min()) >= 0:
        step = levels.max() / 255
        error = float(((levels / step).round() * step - levels).abs().max() / levels.max())
        how = f"{name} rounds in floating point; its levels move to the nearest of a uint8 grid"
        return Kind.APPROXIMATE, how, error, Codes(float(step), 0, 0, 255, False)
    return Kind.FLOAT, f"{reason}: its levels are on no uint8 grid", 0, None


def _weight(operand: Weight) -> _Result:
    quantizer, name = operand.quantizer, type(operand.quantizer).__name__
    if len(quantizer.granularity.axes) > 1:
        return Kind.FLOAT, f"{name} is stored decoded: engines have scales along one axis only", 0, None
    levels = _levels(quantizer, operand.params)
    grid = None if levels is None else _on_integers(levels, _steps(levels, operand.params))
    if grid is None:
        return Kind.FLOAT, f"{name} is stored decoded: its levels are on no integer grid", 0, None
    decoded = operand.decoded
    step = quantizer.granularity.spread(grid[1], decoded)
    values = (decoded / step).round()
    if not torch.equal(values * step, decoded):
        return Kind.FLOAT, f"{name} is stored decoded: its values are not those of its codes", 0, None
    axis = quantizer.granularity.axes[0] % decoded.ndim if quantizer.granularity.axes else None
    values, flat = values.to(torch.int16), step.reshape(-1)
    low = grid[0].min(0).values
    span = int((grid[0].max(0).values - low).max())
    shift = -quantizer.granularity.spread(low, decoded).reshape(-1).to(torch.int32)
    if int(values.min()) < -128 or int(values.max()) > 127:
        if span <= 255 and int(shift.min()) >= 0 and int(shift.max()) <= 255:
            return Kind.EXACT, "uint8 with zero-points", 0, Integers(values, flat, axis, 8, shift)
        return Kind.FLOAT, f"{name} is stored decoded: its integers need more than 8 bits", 0, None
    values = values.to(torch.int8)
    if int(values.min()) >= -8 and int(values.max()) <= 7:
        return Kind.EXACT, "int4 stored, int8 computed", 0, Integers(values, flat, axis, 4)
    if span <= 15:
        return Kind.EXACT, "uint4 stored, int8 computed", 0, Integers(values, flat, axis, 4, shift)
    return Kind.EXACT, "int8", 0, Integers(values, flat, axis, 8)


def codes_of(operand: Activation) -> Codes | None:
    """An activation as bytes, if all its levels are multiples of one step."""
    return _activation(operand, approximate=False)[3]


def integers_of(operand: Weight) -> Integers | None:
    """A weight as integers, if all its values are multiples of a step for each output."""
    return _weight(operand)[3]


def _levels(quantizer: Quantizer, p: Params) -> Tensor | None:
    """Every level of every group, (levels, groups); None where the levels depend on the data."""
    if type(quantizer).resolve is not Quantizer.resolve:
        return None
    low, high = quantizer.code_range
    codes = torch.arange(low, high + 1, dtype=torch.float32, device=p[0].device)[:, None]
    return quantizer.decode_resolved(codes.expand(-1, len(p[0])), p)


def _steps(levels: Tensor, p: Params) -> list[Tensor]:
    """Candidates for the step of a grid: the format's own scale, and the smallest level."""
    smallest = torch.where(levels == 0, torch.inf, levels.abs()).min(0).values
    own = getattr(p, "scale", None)
    return [s for s in (own, smallest) if s is not None and s.shape == smallest.shape]


def _on_integers(levels: Tensor, steps: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """(integers, step) with integers · step equal to the levels bit for bit, for the first step that does it."""
    for step in steps:
        integers = (levels / step).round()
        if torch.equal(integers * step, levels) and bool((integers.abs() < 2**15).all()):
            return integers, step
    return None


DOMAIN = "vitquant"
"""Of the markers, which stand in the traced graph where operands are and are replaced in the written one."""


def mark(x: Tensor, site: Site) -> Tensor:
    """x, with a node in the exported ONNX graph that says which site it is."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Site", (x,), attrs={"site": str(site)}, dtype=x.dtype, shape=x.shape, version=1
    )


class Marked(nn.Module):
    """An operand whose place can be found in the exported graph. Integers take over what `form` covers."""

    def __init__(self, site: Site, operand: nn.Module | None, form: Codes | Integers | None) -> None:
        super().__init__()
        self.site, self.form, self.operand = site, form, operand

    def forward(self, x: Tensor) -> Tensor:
        covered = isinstance(self.form, Codes) and self.form.rounds
        if self.operand is not None and not covered:
            x = self.operand(x)
        return mark(x, self.site)


class MarkedModel(nn.Module):
    """What is traced for engines: the model under its quantization, every operand and product marked.

    Gives the tensors of the model's output as a tuple.
    """

    def __init__(self, model: QuantizedModel, lowered: dict[Site, Lowering]) -> None:
        super().__init__()
        self.model = model.model
        places: dict[Site, nn.Module] = {}
        for site, operand in zip(model.sites, model.operands, strict=True):
            found = lowered.get(site)
            places[site] = operand if found is None else Marked(site, operand, found.form)
        for call in products(model):
            site = Site(call, "output")
            tap = Marked(tap_of(call), None, None)
            places[site] = nn.Sequential(tap, places[site]) if site in places else tap
        self.sites, self.places = tuple(places), nn.ModuleList(places.values())

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        with Interceptor(self.model, dict(zip(self.sites, self.places, strict=True))):
            output = self.model(image)
        return outputs_of(output)


def products(model: QuantizedModel) -> list[CallKey]:
    """The calls that multiply and have a quantized operand."""
    names = dict.fromkeys(s.call for s in model.sites if s.operand != "output")
    return [call for call in names if str(call) in model.ledger.macs]


def tap_of(call: CallKey) -> Site:
    """The name of a product's result before anything is done to it."""
    return Site(call, "result")


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a model returned, in order."""
    return tuple(tensors_in(output.to_tuple() if hasattr(output, "to_tuple") else output))
