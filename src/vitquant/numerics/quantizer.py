"""A number format: how real numbers map to integer codes, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import log2
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vitquant.errors import NonFinite, UsageError
from vitquant.numerics.granularity import PER_TENSOR, Granularity

MAX_BITS = 16
"""Codes are carried in float32, which holds every integer of up to 24 bits exactly."""


PART = 2**18
"""Elements that go through a chain of in-place steps together: 1 MiB, within a core's cache."""


class Affine(NamedTuple):
    """Parameters of an affine grid, flat, one for each group.

    scale: the step, in the tensor's own units, > 0. zero: the code of 0.0, an integer.
    """

    scale: Tensor
    zero: Tensor


Params = Any
"""A NamedTuple of flat tensors, one value for each group of the quantizer's granularity."""


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity (straight-through).

    `x + (round(x) - x)` gives round(x) exactly: the difference is at most half a unit and has no more
    significant bits than x.
    """
    return x + (x.round() - x).detach() if torch.is_grad_enabled() else x.round()


@dataclass(frozen=True)
class Quantizer(ABC):
    """A number format of `bits` bits. Frozen and without tensors: parameters are passed in.

    A format has at most 2**bits levels; `levels` says how many, and `effective_bits` what an element
    costs to store.
    """

    bits: int
    granularity: Granularity = PER_TENSOR

    parameters: ClassVar[type] = Affine
    """The NamedTuple of this format's parameters. A field named `zero` holds integers."""
    static: ClassVar[bool] = True
    """False where `resolve` works through all that x holds, which is then done part by part."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise UsageError(f"{type(self).__name__}: bits must be 1 to {MAX_BITS}, not {self.bits}")

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def effective_bits(self) -> float:
        return log2(self.levels)

    def mean_bits(self, p: Params) -> float:
        """Effective bits of an element under these parameters, which may say what is kept beside the codes."""
        return self.effective_bits

    @property
    def storage_bits(self) -> int:
        """Whole bits that a stored code takes."""
        return (self.levels - 1).bit_length()

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return 0, self.levels - 1

    def view(self, x: Tensor) -> Tensor:
        """x as (groups, elements): what calibration gathers statistics of. A format whose parameters describe
        something else than x's own elements (ranges of channels, say) shows that instead."""
        return self.granularity.view(x)

    @abstractmethod
    def fit(self, low: Tensor, high: Tensor) -> Params:
        """Parameters that cover [low, high], flat (groups,). Raises NonFinite on NaN or infinity."""

    def resolve(self, x: Tensor, p: Params) -> Params:
        """The parameters that x is encoded with, in shapes that broadcast against it.

        A static format only spreads `p`; one whose grid depends on x itself (run-time ranges, groups, outliers)
        settles that here.
        """
        return type(p)(*(self.granularity.spread(field, x) for field in p))

    def together(self, dims: int) -> int:
        """How many consecutive indices of axis 0 of a tensor of `dims` axes are encoded with no look at the others;
        0: only all of them."""
        return 0 if 0 in {a % dims for a in self.granularity.axes} else 1

    @abstractmethod
    def encode_resolved(self, x: Tensor, p: Params) -> Tensor:
        """Codes of x: integer-valued, in x's dtype and shape, within `code_range`. p: from `resolve`."""

    @abstractmethod
    def decode_resolved(self, codes: Tensor, p: Params) -> Tensor:
        """The real numbers that the codes stand for, in x's own units. p: from `resolve`."""

    def encode(self, x: Tensor, p: Params) -> Tensor:
        """Codes of x: integer-valued, in x's dtype and shape, within `code_range`."""
        return self.encode_resolved(x, self.resolve(x, p))

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """The real numbers that the codes of a static format stand for, in x's own units."""
        return self.decode_resolved(codes, self.resolve(codes, p))

    def fake_quantize(self, x: Tensor, p: Params, workspace: Workspace | None = None, slot: str = "") -> Tensor:
        """decode(encode(x)), differentiable by the straight-through estimator.

        workspace, slot: where the result may lie, if it is read before the slot is asked for again.
        """
        if not runs_in_place(x):
            p = self.resolve(x, p)
            return self.decode_resolved(self.encode_resolved(x, p), p)
        # Memory traffic is what this costs: a part that fits in the cache goes through all steps at once.
        out = workspace.like(x, slot) if workspace else torch.empty_like(x)
        for part, target, own in self._parts(x, out, p):
            self.round_trip(part, own, target)
        return out

    def _parts(self, x: Tensor, out: Tensor, p: Params) -> Iterable[tuple[Tensor, Tensor, Params]]:
        """x and out in parts that fit the cache, with their resolved parameters."""
        if x.dim() < 2:
            return [(x, out, self.resolve(x, p))]
        together = self.together(x.dim())
        if together and not self.static:
            # Memory is read in order once; ranges of channels would read it column by column.
            copies = (target.copy_(part) for part, target in in_parts(x, out, span=together))
            return ((copy, copy, self.resolve(copy, p)) for copy in copies)
        resolved, parts = self.resolve(x, p), in_parts(x, out)
        rows = len(parts[0][0])
        cut = [f.split(rows) if f.dim() == x.dim() and len(f) == len(x) else (f,) * len(parts) for f in resolved]
        own = (type(resolved)(*fields) for fields in zip(*cut, strict=True))
        return ((part, target, mine) for (part, target), mine in zip(parts, own, strict=True))

    def round_trip(self, x: Tensor, p: Params, out: Tensor) -> Tensor:
        """decode(encode(x)) written into `out`; no gradient. p: from `resolve`."""
        return out.copy_(self.decode_resolved(self.encode_resolved(x, p), p))

    def extra_bops(self, shape: tuple[int, ...], macs: int = 0) -> int:
        """Bit-operations that the format itself needs at run time, per image.

        shape: of the tensor, for one image. macs: multiply-accumulates of the product that reads it.
        """
        return 0

    def describe(self) -> str:
        """The format in a few words, for tables."""
        return f"{type(self).__name__}{self.bits} / {self.granularity}"


class Workspace:
    """Memory for results that are read at once: each slot's tensor gives way to the next one in the same slot.

    Fresh memory is what large operands cost most on a CPU, more than their arithmetic.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, x: Tensor, slot: str) -> Tensor:
        """A dense tensor of x's shape and type, its contents undefined. Its matrices lie one after the other, which
        spares a batched product its copy, and each as x's do; channels that are last stay last."""
        held = self._slots.get((slot, x.dtype))
        if held is None or held.numel() < x.numel():
            held = self._slots[slot, x.dtype] = torch.empty(x.numel(), dtype=x.dtype)
        free = held[: x.numel()]
        if x.dim() < 3 or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            return held.as_strided(x.shape, torch.empty_like(x, device="meta").stride())
        if x.stride(-2) < x.stride(-1):
            return free.view(x.mT.shape).mT
        return free.view(x.shape)


def runs_in_place(x: Tensor) -> bool:
    """Whether work on x is worth cutting into parts of overwritten memory: on a CPU, with no graph being recorded."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.device.type == "cpu"


def in_parts(*tensors: Tensor, span: int = 1) -> list[tuple[Tensor, ...]]:
    """The tensors cut alike along axis 0, into parts of about `PART` elements of the first one and of a multiple of
    `span` indices."""
    x = tensors[0]
    rows = max(PART * len(x) // max(x.numel(), 1) // span, 1) * span
    return list(zip(*(t.split(rows) for t in tensors), strict=True))


def checked_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range as float32 after a check that it is finite."""
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NonFinite("a range to be quantized holds NaN or infinity")
    return low.float(), high.float()
