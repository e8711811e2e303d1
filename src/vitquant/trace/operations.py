"""The operations that are seen: which torch functions they are and where their operands stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Operation:
    """A kind of call. `names` are the leading parameters in order, so that every call can be bound to them;
    `operands` maps an operand's name to its position; `out_axis` is the weight's output-channel axis."""

    op: str
    names: tuple[str, ...]
    operands: Mapping[str, int]
    out_axis: int = 0

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional arguments in the order of `names`, whatever mixture the caller used."""
        given = [n for n in self.names[len(args) :] if n in kwargs]
        if not given and len(args) >= len(self.names):
            return list(args), kwargs
        kwargs = dict(kwargs)
        bound = list(args)
        for name in self.names[len(args) :]:
            if name in kwargs or name in ("weight", "bias"):
                bound.append(kwargs.pop(name, None))
            else:
                break
        return bound, kwargs


CONTRACTIONS = ("linear", "conv", "matmul")
"""Operations that multiply and accumulate: their operands are what a bit-width is about."""

_LINEAR = Operation("linear", ("input", "weight", "bias"), {"input": 0, "weight": 1, "bias": 2})
_CONV = Operation("conv", ("input", "weight", "bias"), {"input": 0, "weight": 1, "bias": 2})
_CONV_T = Operation("conv", ("input", "weight", "bias"), {"input": 0, "weight": 1, "bias": 2}, out_axis=1)
_MATMUL = Operation("matmul", ("input", "other"), {"left": 0, "right": 1})
_MM = Operation("matmul", ("input", "mat2"), {"left": 0, "right": 1})
_RMATMUL = Operation("matmul", ("other", "input"), {"left": 1, "right": 0})
_ADDMM = Operation("matmul", ("input", "mat1", "mat2"), {"left": 1, "right": 2})
_BADDBMM = Operation("matmul", ("input", "batch1", "batch2"), {"left": 1, "right": 2})
_TENSORDOT = Operation("matmul", ("a", "b"), {"left": 0, "right": 1})
_EINSUM = Operation("matmul", ("equation", "left", "right"), {"left": 1, "right": 2})
_SOFTMAX = Operation("softmax", ("input", "dim"), {"input": 0})
_ACT = Operation("act", ("input",), {"input": 0})
_ADD = Operation("add", ("input", "other"), {"left": 0, "right": 1})
_LAYER_NORM = Operation("norm", ("input", "normalized_shape", "weight", "bias"), {"input": 0, "weight": 2, "bias": 3})
_RMS_NORM = Operation("norm", ("input", "normalized_shape", "weight"), {"input": 0, "weight": 2})
_GROUP_NORM = Operation("norm", ("input", "num_groups", "weight", "bias"), {"input": 0, "weight": 2, "bias": 3})
_BATCH_NORM = Operation("norm", ("input",), {"input": 0})

T = torch.Tensor
_ACTS = """
    gelu silu relu relu6 leaky_relu elu celu selu hardswish hardtanh hardsigmoid mish softplus prelu tanh
    sigmoid relu_ sigmoid_ tanh_ silu_
""".split()


def _all(operation: Operation, *functions: Any) -> dict[Callable[..., Any], Operation]:
    return {f: operation for f in functions if f is not None}


def _named(names: list[str]) -> list[Any]:
    """The functions of these names, wherever torch offers them."""
    return [getattr(space, n, None) for n in names for space in (F, torch, T)]


OPERATIONS: Mapping[Callable[..., Any], Operation] = {
    **_all(_LINEAR, F.linear),
    **_all(_CONV, torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d),
    **_all(_CONV_T, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    **_all(_CONV_T, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    **_all(_MATMUL, torch.matmul, T.matmul, T.__matmul__, torch.inner, T.inner),
    **_all(_MATMUL, torch.linalg.matmul, torch.linalg.vecdot),
    **_all(_MM, torch.mm, T.mm, torch.bmm, T.bmm),
    **_all(_RMATMUL, T.__rmatmul__),
    **_all(_ADDMM, torch.addmm, T.addmm),
    **_all(_BADDBMM, torch.baddbmm, T.baddbmm, torch.addbmm, T.addbmm),
    **_all(_TENSORDOT, torch.tensordot),
    **_all(_EINSUM, torch.einsum),
    **_all(_SOFTMAX, F.softmax, torch.softmax, T.softmax),
    **_all(_ACT, *_named(_ACTS)),
    **_all(_ADD, torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__),
    **_all(_LAYER_NORM, F.layer_norm, torch.layer_norm),
    **_all(_RMS_NORM, *_named(["rms_norm"])),
    **_all(_GROUP_NORM, F.group_norm),
    **_all(_BATCH_NORM, F.batch_norm, F.instance_norm),
}


def recognise(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Operation | None, tuple[Any, ...]]:
    """The operation that a call is, or None, and its arguments (those of einsum without nesting).

    An einsum of one tensor only moves data about; one of three or more is left to be reported as unknown.
    """
    operation = OPERATIONS.get(func)
    if operation is not _EINSUM:
        return operation, args
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    return (operation if len(operands) == 2 else None), (equation, *operands)
