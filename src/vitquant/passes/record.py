"""What enters and leaves one module for every calibration image, in memory or in memory-mapped files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vitquant.calibrate import Bench, Reached
from vitquant.errors import NoData
from vitquant.trace import Interceptor, Site, Transform
from vitquant.trace.intercept import tensors_in
from vitquant.trace.units import Unit


@dataclass
class Column:
    """One tensor of all calls. axis: where its images lie, several rows each perhaps (windows); None if it is the
    same for every image. data: (images, rows, ...), or the tensor itself."""

    data: Tensor
    axis: int | None

    def take(self, images: Tensor) -> Tensor:
        """The tensor as a call with just these images would have it."""
        if self.axis is None:
            return self.data
        return self.data[images].flatten(0, 1).movedim(0, self.axis)


@dataclass
class Record:
    """inputs: the distinct tensors among a module's arguments; `arguments` puts them back. output: its first
    tensor. operands: watched operands inside."""

    inputs: list[Column]
    output: Column
    operands: dict[Site, Column]
    leaves: list[Any]
    places: list[int | None]
    spec: TreeSpec
    images: int

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs of a call with these tensors; one that was passed twice is passed twice again."""
        leaves = [leaf if i is None else inputs[i] for leaf, i in zip(self.leaves, self.places, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass
class _Call:
    """One call of the module: its flattened arguments, its output, its watched operands."""

    leaves: list[Any]
    spec: TreeSpec
    output: Tensor
    operands: dict[Site, Tensor]

    def __post_init__(self) -> None:
        """Tensors that were passed more than once are kept once: models look at their identity."""
        unique: dict[int, int] = {}
        self.places = [
            unique.setdefault(id(leaf), len(unique)) if isinstance(leaf, Tensor) else None for leaf in self.leaves
        ]
        first = {place: leaf for leaf, place in zip(self.leaves, self.places, strict=True) if place is not None}
        self.inputs = [first[i].detach().clone() for i in range(len(unique))]

    def tensors(self) -> list[Tensor]:
        return [*self.inputs, self.output, *self.operands.values()]


def record(
    unit: Unit,
    bench: Bench,
    transforms: Mapping[Site, Transform],
    watched: Sequence[Site] = (),
    folder: Path | None = None,
) -> Record:
    """Run all images as far as the unit and keep what its module gets and gives, under `transforms`.

    watched: operands inside the unit to keep too, before their own transform. folder: where memory-mapped files
    are made; without it everything is held in memory. What grows with the batch belongs to the images; the rest
    (masks, positions) is kept once.
    """
    count = bench.images.total or sum(len(batch) for batch in bench.images)
    first = bench.images.first()
    one, two = (_call(unit, bench, first.repeat(n, 1, 1, 1), transforms, watched) for n in (1, 2))
    pairs = enumerate(zip(one.tensors(), two.tensors(), strict=True))
    columns = [_column(a, b, count, folder, i) for i, (a, b) in pairs]
    done = 0
    for batch in bench.images:
        call = _call(unit, bench, batch, transforms, watched)
        for column, x in zip(columns, call.tensors(), strict=True):
            if column.axis is not None:
                column.data[done : done + len(batch)] = x.movedim(column.axis, 0).unflatten(0, (len(batch), -1))
        done += len(batch)
    inputs = len(one.inputs)
    operands = dict(zip(watched, columns[inputs + 1 :], strict=True))
    leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in one.leaves]
    return Record(columns[:inputs], columns[inputs], operands, leaves, one.places, one.spec, count)


def _column(one: Tensor, two: Tensor, count: int, folder: Path | None, number: int) -> Column:
    """Room for a tensor of all images, after its shapes in a call with one and with two images."""
    grown = [a for a in range(one.ndim) if one.shape[a] != two.shape[a]]
    if not grown:
        return Column(one, None)
    moved = one.movedim(grown[0], 0)
    shape = torch.Size((count, *moved.shape))
    if folder is None:
        return Column(torch.empty(shape, dtype=one.dtype, device=one.device), grown[0])
    path = str(folder / f"{number}.bin")
    return Column(torch.from_file(path, shared=True, size=shape.numel(), dtype=one.dtype).view(shape), grown[0])


def _call(
    unit: Unit, bench: Bench, images: Tensor, transforms: Mapping[Site, Transform], watched: Sequence[Site]
) -> _Call:
    module = bench.model.get_submodule(unit.scope)
    seen: dict[Site, Tensor] = {}
    arguments: list[Any] = []
    found: list[_Call] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        arguments[:] = tree_flatten((args, kwargs))

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        leaves, spec = arguments
        found.append(_Call(leaves, spec, tensors_in(output)[0], {site: seen[site] for site in watched}))
        raise Reached

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with suppress(Reached), torch.no_grad(), Interceptor(bench.model, watching(transforms, seen, watched)):
            bench.model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise NoData(f"module '{unit}' did not run")
    return found[0]


def watching(
    transforms: Mapping[Site, Transform], seen: dict[Site, Tensor], watched: Sequence[Site]
) -> dict[Site, Transform]:
    """The same transforms, which also write the watched operands into `seen` as they arrive."""

    def watch(site: Site, then: Transform | None) -> Transform:
        def show(x: Tensor) -> Any:
            seen[site] = x
            return x if then is None else then(x)

        return show

    return {**transforms, **{site: watch(site, transforms.get(site)) for site in watched}}
