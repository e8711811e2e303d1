"""See and rewrite the operands of every operation of an unmodified model while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vitquant.errors import IncompleteRun
from vitquant.trace.decompose import COMPOSITES
from vitquant.trace.operations import Operation, recognise
from vitquant.trace.site import CallKey, Site

Transform = Callable[[Any], Any]
"""What happens to an operand on its way into a call (or to the output on its way out)."""


class Interceptor(TorchFunctionMode):
    """While active, every operation of `model` gets its operands through `transforms`.

    A quantizer, a rewritten weight and an observer are all the same thing here: a function of an operand.
    Nothing is written to the model. Fused attention is taken apart first, so that its inner products
    are operations too. Scopes are known for the whole model, so a sub-module may be run alone.
    """

    def __init__(self, model: nn.Module, transforms: Mapping[Site, Transform] | None = None) -> None:
        super().__init__()
        # torch.export wraps modules in proxies that share their attribute dictionary: the dictionary is
        # the identity that survives.
        self._names = {id(vars(m)): name for name, m in reversed(list(model.named_modules()))}
        self._calls: dict[CallKey, dict[str, Transform]] = {}
        for site, transform in (transforms or {}).items():
            self._calls.setdefault(site.call, {})[site.operand] = transform
        self._handles: list[RemovableHandle] = []
        self._scopes: list[str] = [""]
        self._ordinals: Counter[tuple[str, str]] = Counter()
        self._visited = 0
        self._fastpath = True

    def __enter__(self) -> Interceptor:
        self._scopes, self._ordinals, self._visited = [""], Counter(), 0
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # else whole encoder layers run as one fused kernel
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        for handle in self._handles:
            handle.remove()

    @property
    def scope(self) -> str:
        """Path of the module that is running."""
        return self._scopes[-1]

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._scopes.append(self._names.get(id(vars(module)), self.scope))

    def _leave_module(self, module: nn.Module, _: Any, __: Any) -> None:
        self._scopes.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES and self.opens(func):
            return self._resume(self.take_apart, func, args, kwargs)
        operation, args = recognise(func, args)
        if operation is None:
            return self.other(func, args, kwargs)
        bound, kwargs = operation.bind(args, kwargs)
        return self.call(self._key(operation), operation, func, bound, kwargs)

    def _key(self, operation: Operation) -> CallKey:
        scope = self.scope
        ordinal = self._ordinals[scope, operation.op]
        self._ordinals[scope, operation.op] += 1
        return CallKey(scope, operation.op, ordinal)

    def _resume(self, step: Callable[..., Any], *args: Any) -> Any:
        """step(*args) with the interception on again: torch switches it off inside __torch_function__."""
        TorchFunctionMode.__enter__(self)
        try:
            return step(*args)
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def call(
        self,
        key: CallKey,
        operation: Operation,
        func: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """One operation, its arguments bound in the order of `operation.names`."""
        transforms = self._calls.get(key)
        if transforms is None:
            return func(*args, **kwargs)
        self._visited += 1
        for operand, transform in transforms.items():
            if operand != "output":
                position = operation.operands[operand]
                args[position] = transform(args[position])
        out = func(*args, **kwargs)
        return transforms["output"](out) if "output" in transforms else out

    def opens(self, func: Callable[..., Any]) -> bool:
        """Whether a fused function is taken apart where the model calls it now."""
        return True

    def take_apart(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A fused function in the visible steps that it stands for, each of which comes back to this interceptor."""
        return COMPOSITES[func](*args, **kwargs)

    def in_parts(self, step: Callable[[Any], Tensor], parts: Iterable[Any]) -> Tensor:
        """step(part) of every part, joined along axis 0; all under the same keys, since the model makes one call."""
        ordinals, visited, results = self._ordinals.copy(), self._visited, []
        for part in parts:
            self._ordinals, self._visited = ordinals.copy(), visited
            results.append(step(part))
        return torch.cat(results)

    def other(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Any other torch function."""
        return func(*args, **kwargs)

    def check_complete(self) -> None:
        """Raises IncompleteRun unless every planned call was made once since the mode was entered."""
        if self._visited == len(self._calls):
            return
        missed = [k for k in self._calls if k.ordinal >= self._ordinals[k.scope, k.op]]
        raise IncompleteRun(
            f"{self._visited} of {len(self._calls)} planned calls were made; missing: "
            + (", ".join(map(str, missed[:5])) or "none, some were made twice")
        )


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in nested arguments, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]
