"""Names of the places where numbers flow, and the roles they play there."""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class CallKey(NamedTuple):
    """One call of an operation: the nth `op` inside the module at `scope` during one forward pass."""

    scope: str
    op: str
    ordinal: int

    def __str__(self) -> str:
        return f"{self.scope}:{self.op}{self.ordinal}"


class Site(NamedTuple):
    """One operand (or the output) of one call. Its printed form is its key in files and tables."""

    call: CallKey
    operand: str

    def __str__(self) -> str:
        return f"{self.call}.{self.operand}"

    @staticmethod
    def parse(text: str) -> Site:
        """The inverse of str(). Raises ValueError."""
        match = re.fullmatch(r"(.*):([a-z]+)(\d+)\.(\w+)", text)
        if match is None:
            raise ValueError(f"'{text}' is not a site")
        scope, op, ordinal, operand = match.groups()
        return Site(CallKey(scope, op, int(ordinal)), operand)


class Role(str, Enum):
    """What an operand is in a Vision Transformer, read from the flow of data, never from names."""

    IMAGE = "image"
    POST_NORM = "post-norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    PROBS = "attention probabilities"
    CONTEXT = "attention output"
    POST_ACT = "post-activation"
    RESIDUAL = "residual"
    POOLED = "pooled/head"
    WEIGHT = "weight"
    OTHER = "other"

    # Not operands of a contraction: a recipe that is silent about them leaves them in floating point.
    NORM_INPUT = "norm input"
    LOGITS = "attention logits"
    ACT_INPUT = "activation input"
    PRODUCT = "contraction output"
    SUM = "sum"
    EMBEDDING = "embedding"
    ADDEND = "added constant"
    NORM_OUTPUT = "norm output"
    SOFTMAX_OUTPUT = "softmax output"
    ACT_OUTPUT = "activation output"

    def __str__(self) -> str:
        return self.value


ACTIVATION_ROLES = (
    Role.IMAGE,
    Role.POST_NORM,
    Role.QUERY,
    Role.KEY,
    Role.VALUE,
    Role.PROBS,
    Role.CONTEXT,
    Role.POST_ACT,
    Role.RESIDUAL,
    Role.POOLED,
    Role.OTHER,
)
"""Every role that an activation operand of a contraction can have."""

CONTRACTION_ROLES = (*ACTIVATION_ROLES, Role.WEIGHT)
"""What a recipe must cover: all operands of linears, convolutions and matrix products."""
