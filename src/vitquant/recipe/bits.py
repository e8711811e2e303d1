"""Bit-widths as people say them: w4a4, w8a8-attn4."""

from __future__ import annotations

import re
from typing import NamedTuple

from vitquant.errors import UsageError


class Bits(NamedTuple):
    """Bits of weights, of activations, and (if said apart) of the attention probabilities."""

    weight: int
    activation: int
    attention: int | None = None

    @staticmethod
    def parse(text: str) -> Bits:
        """'w4a4' or 'w8a8-attn4'. Raises UsageError, also for a width outside 2 to 8."""
        match = re.fullmatch(r"w(\d+)a(\d+)(?:-attn(\d+))?", text.strip().lower())
        if match is None:
            raise UsageError(f"bits '{text}' are not of the form w4a4 or w8a8-attn4")
        bits = Bits(*(None if g is None else int(g) for g in match.groups()))  # type: ignore[arg-type]
        for name, value in zip(Bits._fields, bits, strict=True):
            if value is not None and not 2 <= value <= 8:
                raise UsageError(f"bits '{text}': {name} bits must be 2 to 8, not {value}")
        return bits

    @property
    def probs(self) -> int:
        """Bits of the attention probabilities."""
        return self.activation if self.attention is None else self.attention

    def __str__(self) -> str:
        tail = "" if self.attention is None else f"-attn{self.attention}"
        return f"w{self.weight}a{self.activation}{tail}"
