"""What is quantized how, and what that costs: the facts behind every table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from vitquant.recipe.state import State
from vitquant.trace import CONTRACTION_ROLES, Role

FLOAT_BITS = 32


@dataclass(frozen=True)
class Entry:
    """One operand. shape: for one image. bits: effective bits of an element; 32 where it stays floating."""

    role: str
    shape: tuple[int, ...]
    bits: float = FLOAT_BITS
    format: str = "float32"
    extra_bops: int = 0

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Ledger:
    """entries: every operand of a contraction and every other quantized one, by site name, in order of execution.
    macs: multiply-accumulates per image, by call name."""

    entries: Mapping[str, Entry]
    macs: Mapping[str, int]

    @staticmethod
    def of(state: State) -> Ledger:
        """The ledger of a finished state."""
        entries = {}
        for site, info in state.trace.sites.items():
            if site in state.plan:
                q = state.plan[site].quantizer
                extra = q.extra_bops(info.shape, state.trace.macs.get(site.call, 0))
                bits = q.mean_bits(state.params[site])
                entries[str(site)] = Entry(info.role.value, info.shape, bits, q.describe(), extra)
            elif info.role in CONTRACTION_ROLES:
                entries[str(site)] = Entry(info.role.value, info.shape)
        return Ledger(entries, {str(key): n for key, n in state.trace.macs.items()})

    def bits(self) -> dict[str, float]:
        """Effective bits of an element, averaged over all weights, and over all activations of contractions."""
        weights = [e for e in self.entries.values() if e.role == Role.WEIGHT.value]
        names = {r.value for r in CONTRACTION_ROLES if r is not Role.WEIGHT}
        activations = [e for e in self.entries.values() if e.role in names]
        return {"weight": _mean_bits(weights), "activation": _mean_bits(activations)}

    def bops(self) -> int:
        """Bit-operations per image: Σ MACs · (bits of one operand) · (bits of the other), plus the formats' own work.

        An operation on floating-point numbers counts 32 bit-operations, as in IGQ-ViT (arXiv:2404.00928).
        """
        total: float = sum(e.extra_bops for e in self.entries.values())
        for call, macs in self.macs.items():
            operands = [self.entries.get(f"{call}.{name}") for name in ("input", "weight", "left", "right")]
            total += macs * prod(e.bits for e in operands if e is not None)
        return round(total)


def _mean_bits(entries: list[Entry]) -> float:
    count = sum(e.elements for e in entries)
    return round(sum(e.bits * e.elements for e in entries) / count, 4) if count else float(FLOAT_BITS)
