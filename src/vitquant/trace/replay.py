"""Run a model on the same images again and again, each time only from the first changed operand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.trace.intercept import Interceptor, Transform, tensors_in
from vitquant.trace.operations import Operation
from vitquant.trace.site import CallKey, Site


@dataclass(frozen=True)
class Tape:
    """What every operation of `model` gave for `images`, in order of execution.

    It holds all intermediate results: about 40 MB an image for DeiT-Tiny, so record few images at a time.
    """

    model: nn.Module
    images: Tensor
    results: Mapping[CallKey, Any]
    output: Any

    @staticmethod
    def record(model: nn.Module, images: Tensor) -> Tape:
        """Run the model once, untransformed."""
        mode = _Recording(model)
        with torch.no_grad(), mode:
            output = model(images)
        return Tape(model, images, mode.unmodified(), output)

    def run(self, transforms: Mapping[Site, Transform]) -> Any:
        """The model's output under `transforms`; operations before the first transformed one are not run again."""
        order = {key: i for i, key in enumerate(self.results)}
        start = min((order.get(site.call, 0) for site in transforms), default=len(order))
        known = {key: result for key, result in self.results.items() if order[key] < start}
        with torch.no_grad(), _Replaying(self.model, transforms, known) as mode:
            output = self.model(self.images)
        mode.check_complete()
        return output


class _Recording(Interceptor):
    """Keeps the result of every operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._results: dict[CallKey, tuple[Any, int]] = {}

    def call(
        self, key: CallKey, operation: Operation, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        out = super().call(key, operation, func, args, kwargs)
        self._results[key] = out, _version(out)
        return out

    def unmodified(self) -> dict[CallKey, Any]:
        """The results that nothing has written into since; the others have to be computed again."""
        return {key: out for key, (out, version) in self._results.items() if _version(out) == version}


class _Replaying(Interceptor):
    """Gives known results instead of computing them."""

    def __init__(self, model: nn.Module, transforms: Mapping[Site, Transform], known: Mapping[CallKey, Any]) -> None:
        super().__init__(model, transforms)
        self._known = known

    def call(
        self, key: CallKey, operation: Operation, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        return self._known[key] if key in self._known else super().call(key, operation, func, args, kwargs)


def _version(out: Any) -> int:
    """Counts in-place changes of the tensors."""
    return sum(t._version for t in tensors_in(out))
