"""Reconstruction: the units of a model learn, one after the other, to give what they gave in floating point."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitquant.calibrate import Bench
from vitquant.errors import ArtifactError, NonFinite, UsageError
from vitquant.numerics.gradient import stopped, straight_through
from vitquant.passes.learn import AdaRound, FakeQuantize, LearnedStep, Learner, Trainable
from vitquant.passes.record import Record, record, watching
from vitquant.recipe.state import State
from vitquant.trace import Interceptor, Site, Trace, Transform
from vitquant.trace.intercept import tensors_in
from vitquant.trace.units import Unit, units


@dataclass(frozen=True)
class Seen:
    """What a loss sees in one step.

    output, target: of the unit, quantized and in floating point. operands, targets: the watched operands in both
    runs, before their quantization. images: the numbers of the batch's images. transforms: the unit as it is now,
    for losses that run more than the unit.
    """

    output: Tensor
    target: Tensor
    operands: Mapping[Site, Tensor]
    targets: Mapping[Site, Tensor]
    images: Tensor
    transforms: Mapping[Site, Transform]


class Loss(Protocol):
    """The distance of one unit to its floating-point self. sites: operands inside it that the loss compares."""

    @property
    def sites(self) -> Sequence[Site]: ...

    def __call__(self, seen: Seen) -> Tensor: ...


Objective = Callable[[Unit, State, Bench], Loss]
"""Makes a unit's loss; gradients of the model, Hessians and the like are gathered here, once."""


@dataclass(frozen=True)
class OutputError:
    """Squared error of the output, summed over axis 1 (tokens; channels of images) and averaged over the rest."""

    sites: tuple[Site, ...] = ()

    def __call__(self, seen: Seen) -> Tensor:
        return (seen.output - seen.target).square().sum(1).mean()


@dataclass(frozen=True)
class LeastSquares:
    """The objective that asks for `OutputError` of every unit (BRECQ and QDrop without their weighting)."""

    def __call__(self, unit: Unit, state: State, bench: Bench) -> Loss:
        return OutputError()


Found = tuple[dict[Site, Any], dict[Site, Tensor]]
"""What a unit has learned: parameters and codes by site."""


@dataclass(frozen=True)
class Reconstruct:
    """Optimise unit after unit on the calibration images with Adam.

    objective: gives each unit its loss. trainables: what learns. split: the units. iterations: steps of each unit,
    with `batch` images each. mix: probability that an element of the unit's input comes from the quantized
    prefix; else it is the floating-point one (0: floating-point inputs, 1: quantized prefix, 0.5: QDrop and
    ADFQ-ViT). drop: probability that an element of a quantized activation keeps its float value in training
    (QDrop, arXiv:2203.05740). stop_gradients: rounding of activations passes no gradient, instead of
    straight-through and learned-step gradients. The target is always what the unit gives in floating point on
    floating-point inputs.

    checkpoint: a folder that takes every finished unit; a run that was cut off, started again with the same
    settings, goes on after it and ends with the same bytes. cache: a folder for memory-mapped files that hold the
    units' inputs and targets; without it they are held in memory. Each unit draws from a generator of its own.
    Raises UsageError for a checkpoint of another run, NonFinite where a loss is NaN or infinite.
    """

    objective: Objective = LeastSquares()
    trainables: tuple[Trainable, ...] = (AdaRound(), LearnedStep())
    iterations: int = 3000
    batch: int = 32
    mix: float = 0.5
    drop: float = 0.0
    stop_gradients: bool = False
    split: Callable[[Trace], Sequence[Unit]] = field(default=units, repr=False)
    checkpoint: Path | None = field(default=None, repr=False)
    cache: Path | None = field(default=None, repr=False)

    def __call__(self, state: State, bench: Bench) -> State:
        todo = self.split(bench.trace)
        saved = None if self.checkpoint is None else Checkpoint(self.checkpoint, _identity(self, todo, state, bench))
        clock = _Clock(bench, len(todo), self.iterations)
        for number, unit in enumerate(todo):
            found = saved.read(number, state) if saved else None
            if found is None:
                found = self._learn(number, unit, state, bench, clock)
                if saved:
                    saved.write(number, found)
            params, codes = found
            state = replace(state, params={**state.params, **params}, codes={**state.codes, **codes})
        return state

    def _learn(self, number: int, unit: Unit, state: State, bench: Bench, clock: _Clock) -> Found:
        loss = self.objective(unit, state, bench)
        with ExitStack() as stack:
            folders = [self._folder(stack) for _ in range(2)]
            whole = record(unit, bench, state.floating().transforms(), loss.sites, folders[0])
            prefix = record(unit, bench, state.transforms(), (), folders[1]) if self.mix else whole
            return self._train(number, unit, state, bench, loss, whole, prefix, clock)

    def _folder(self, stack: ExitStack) -> Path | None:
        if self.cache is None:
            return None
        self.cache.mkdir(parents=True, exist_ok=True)
        return Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.cache)))

    def _train(
        self,
        number: int,
        unit: Unit,
        state: State,
        bench: Bench,
        loss: Loss,
        whole: Record,
        prefix: Record,
        clock: _Clock,
    ) -> Found:
        fake_quantize = stopped if self.stop_gradients else straight_through
        learners, groups = self._learners(unit, state, fake_quantize)
        random = torch.Generator(bench.images.first().device).manual_seed(bench.seed * 1_000_003 + number)
        fixed = _inside(unit, state, fake_quantize)
        transforms: dict[Site, Transform] = {**fixed, **learners}
        if self.drop:
            transforms |= {s: _dropping(transforms[s], self.drop, random) for s in _activations(unit, state)}
        seen: dict[Site, Tensor] = {}
        watched = watching(transforms, seen, loss.sites)
        module = bench.model.get_submodule(unit.scope)
        optimiser = (
            torch.optim.Adam([{"params": tensors, "lr": how.rate} for how, tensors in groups]) if groups else None
        )
        for step in range(self.iterations if optimiser else 0):
            images = torch.randperm(whole.images, generator=random, device=random.device)[: self.batch]
            args, kwargs = whole.arguments(self._inputs(images, whole, prefix, random))
            with Interceptor(bench.model, watched) as mode:
                output = tensors_in(module(*args, **kwargs))[0]
            mode.check_complete()
            targets = {site: whole.operands[site].take(images) for site in loss.sites}
            value = loss(Seen(output, whole.output.take(images), seen, targets, images, transforms))
            penalties = [p for x in learners.values() if (p := x.penalty(step / self.iterations)) is not None]
            _step(optimiser, groups, value + sum(penalties), step / self.iterations)
            clock.tell(number, unit, step, value)
        found = {site: learner.result() for site, learner in learners.items()}
        codes = {site: codes for site, (_, codes) in found.items() if codes is not None}
        return {site: params for site, (params, _) in found.items()}, codes

    def _learners(
        self, unit: Unit, state: State, fake_quantize: FakeQuantize
    ) -> tuple[dict[Site, Learner], list[tuple[Trainable, list[Tensor]]]]:
        """A learner for every site of the unit that some trainable takes (the first does), grouped by trainable."""
        learners: dict[Site, Learner] = {}
        groups: list[tuple[Trainable, list[Tensor]]] = []
        for how in self.trainables:
            mine: dict[Site, Learner] = {}
            for site in state.params:
                if unit.owns(site) and site not in learners:
                    learner = how.start(site, state, fake_quantize)
                    mine |= {} if learner is None else {site: learner}
            learners |= mine
            if mine:
                groups.append((how, [t for learner in mine.values() for t in learner.tensors]))
        return learners, groups

    def _inputs(self, images: Tensor, whole: Record, prefix: Record, random: torch.Generator) -> list[Tensor]:
        """The batch's inputs: every element from the quantized prefix with probability `mix`."""
        if self.mix in (0, 1):
            return [column.take(images) for column in (prefix if self.mix else whole).inputs]
        mixed = []
        for full, low in zip(whole.inputs, prefix.inputs, strict=True):
            x = full.take(images)
            if full.axis is not None and x.is_floating_point():
                x = torch.where(_coin(x, self.mix, random), low.take(images), x)
            mixed.append(x)
        return mixed


def _step(optimiser: Any, groups: Sequence[tuple[Trainable, list[Tensor]]], loss: Tensor, progress: float) -> None:
    """One step of Adam; gradients of the trained tensors alone are computed."""
    tensors = [t for _, own in groups for t in own]
    for tensor, grad in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
        tensor.grad = grad
    for group, (how, _) in zip(optimiser.param_groups, groups, strict=True):
        group["lr"] = how.rate * (0.5 * (1 + math.cos(math.pi * progress)) if how.cosine else 1.0)
    optimiser.step()


def _activations(unit: Unit, state: State) -> list[Site]:
    return [s for s in state.params if unit.owns(s) and state.constant(s) is None]


def _inside(unit: Unit, state: State, fake_quantize: FakeQuantize) -> dict[Site, Transform]:
    """All that happens when the unit's module runs alone; what does not learn is computed once."""
    held = replace(
        state,
        params={s: p for s, p in state.params.items() if unit.holds(s)},
        rewrites={s: x for s, x in state.rewrites.items() if unit.holds(s)},
        codes={s: x for s, x in state.codes.items() if unit.holds(s)},
    )
    activations = {s: _quantizing(fake_quantize, state, s) for s in held.params if state.constant(s) is None}
    with torch.no_grad():
        return {**held.transforms(), **activations}


def _quantizing(fake_quantize: FakeQuantize, state: State, site: Site) -> Transform:
    quantizer, p = state.plan[site].quantizer, state.params[site]
    return lambda x: fake_quantize(quantizer, x, p)


def _dropping(then: Transform, probability: float, random: torch.Generator) -> Transform:
    return lambda x: torch.where(_coin(x, probability, random), x, then(x))


def _coin(x: Tensor, probability: float, random: torch.Generator) -> Tensor:
    """True with this probability, for every element of x."""
    return torch.rand(x.shape, generator=random, device=x.device) < probability


class _Clock:
    """Tells the progress: unit, loss, remaining time at the pace so far."""

    def __init__(self, bench: Bench, units: int, iterations: int) -> None:
        self.bench, self.units, self.iterations = bench, units, iterations
        self.started, self.steps = time.monotonic(), 0

    def tell(self, number: int, unit: Unit, step: int, loss: Tensor) -> None:
        self.steps += 1
        if step % 20 and step + 1 != self.iterations:
            return
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFinite(f"the reconstruction loss of '{unit}' is {value} after {step} steps")
        done, total = number * self.iterations + step + 1, self.units * self.iterations
        left = (time.monotonic() - self.started) / self.steps * (total - done)
        self.bench.progress(f"{unit}: loss {value:.4g}, {left / 60:.1f} min left", done, total)


class Checkpoint:
    """A folder with one safetensors file for each finished unit, and what run they belong to.

    Raises UsageError if the folder holds another run's units, ArtifactError if a file cannot be read.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / "run.json"
        if not manifest.exists():
            _replace(manifest, lambda path: path.write_text(json.dumps({"run": identity}) + "\n"))
        try:
            found = json.loads(manifest.read_text())["run"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ArtifactError(f"{manifest}: cannot be read; remove the folder to start anew") from None
        if found != identity:
            raise UsageError(f"checkpoint '{folder}' belongs to a run with other settings, images or weights")

    def _path(self, number: int) -> Path:
        return self.folder / f"unit{number:04d}.safetensors"

    def write(self, number: int, found: Found) -> None:
        """Keep a unit. The file appears whole or not at all."""
        params, codes = found
        tensors = {f"{site}.{name}": t for site, p in params.items() for name, t in p._asdict().items()}
        tensors |= {f"{site}.codes": t.to(torch.int16) for site, t in codes.items()}
        whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        _replace(self._path(number), lambda path: save_file(whole, path))

    def read(self, number: int, state: State) -> Found | None:
        """A unit that was kept, or None."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ArtifactError(f"{path}: cannot be read ({error})") from None
        by_site: dict[Site, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            site, _, own = name.rpartition(".")
            by_site.setdefault(Site.parse(site), {})[own] = tensor.to(state.params[Site.parse(site)][0].device)
        codes = {site: own.pop("codes").float() for site, own in by_site.items() if "codes" in own}
        return {site: state.plan[site].quantizer.parameters(**own) for site, own in by_site.items()}, codes


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_suffix(".part")
    write(part)
    os.replace(part, path)


def _identity(settings: Reconstruct, todo: Sequence[Unit], state: State, bench: Bench) -> str:
    """A digest of everything that the result depends on."""
    digest = hashlib.sha256(f"{settings!r} {bench.seed} {list(map(str, todo))}".encode())
    for site, rule in state.plan.items():
        digest.update(f"{site} {rule}".encode())
    constants = [state.constant(site) for site in state.trace.constants]
    params = [t for p in state.params.values() for t in p]
    for tensor in [*constants, *params, *state.codes.values(), *bench.images]:
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
