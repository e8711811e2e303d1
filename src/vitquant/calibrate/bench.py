"""The model, its trace and the calibration images: all that a pass may use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitquant.calibrate.statistic import Collector
from vitquant.errors import CalibrationError, DataError, NoData
from vitquant.trace import Interceptor, Site, Trace, Transform


class Progress(Protocol):
    """Told about long work: what is being done, how much of it is done, how much there is."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


class Viewer(Protocol):
    """Says as what a tensor is seen: a granularity, or a number format."""

    def view(self, x: Tensor) -> Tensor: ...


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Batches:
    """Images as a re-iterable stream of (n, channels, height, width) batches, at most `size` images each."""

    source: Iterable[Tensor]
    size: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.source, Iterator):
            raise DataError("images must be re-iterable (a tensor, a list or a loader), not an iterator")

    def __iter__(self) -> Iterator[Tensor]:
        batches = [self.source] if isinstance(self.source, Tensor) else self.source
        for batch in batches:
            if not isinstance(batch, Tensor) or batch.dim() < 2:
                raise DataError(f"a batch of images must be a tensor (n, ...), not {type(batch).__name__}")
            yield from batch.split(self.size)

    @property
    def total(self) -> int:
        """How many images there are, or 0 if the source cannot tell without being read."""
        if isinstance(self.source, (list, tuple)):
            return sum(len(batch) for batch in self.source)
        dataset: Any = getattr(self.source, "dataset", self.source)  # a DataLoader's length counts batches
        return len(dataset) if hasattr(dataset, "__len__") else 0

    def first(self) -> Tensor:
        """The first image, as a batch of one. Raises NoData if there is none."""
        for batch in self:
            if len(batch):
                return batch[:1]
        raise NoData("no calibration image was given")


@dataclass(frozen=True)
class Bench:
    """model: in eval mode, never written to. trace: of that model. images: the calibration stream."""

    model: nn.Module
    trace: Trace
    images: Batches
    seed: int = 0
    progress: Progress = silent

    def run(self, image: Tensor, transforms: Mapping[Site, Transform]) -> Any:
        """The model's output with every operand sent through its transform; all of them must be used."""
        with Interceptor(self.model, transforms) as mode:
            output = self.model(image)
        mode.check_complete()
        return output

    def sweep(
        self,
        transforms: Mapping[Site, Transform],
        collectors: Mapping[Site, tuple[Viewer, Collector]],
        what: str = "calibrating",
    ) -> None:
        """Run all images under `transforms` and show every wanted operand, as it would have been, to its collector.

        Raises CalibrationError with the site's name if a collector refuses what it sees.
        """
        seeing = {
            site: _watched(site, viewer, collector, transforms.get(site))
            for site, (viewer, collector) in collectors.items()
        }
        done = 0
        with torch.no_grad():
            for batch in self.images:
                self.run(batch, {**transforms, **seeing})
                done += len(batch)
                self.progress(what, done, self.images.total)

    def operand(self, site: Site, images: Tensor, transforms: Mapping[Site, Transform]) -> Tensor:
        """The operand that arrives at a site, before its own transform; the run ends there."""

        found: list[Tensor] = []

        def take(x: Tensor) -> Any:
            found.append(x)
            raise Reached

        with torch.no_grad(), suppress(Reached):
            self.run(images, {**transforms, site: take})
        if not found:
            raise NoData(f"no image reached {site}")
        return found[0]


class Reached(Exception):
    """What was wanted of a run is there: the rest of the model need not run."""


def _watched(site: Site, viewer: Viewer, collector: Collector, then: Transform | None) -> Transform:
    """A transform that shows the operand to the collector and goes on as planned."""

    def watch(x: Tensor) -> Any:
        try:
            collector.update(viewer.view(x.detach()))
        except CalibrationError as error:
            raise type(error)(f"{site} (shape {tuple(x.shape)}): {error}") from None
        return x if then is None else then(x)

    return watch
