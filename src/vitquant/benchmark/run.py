"""The measurement: every contender in a process of its own, timed in turns within one window."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitquant.artifact import QuantizedModel
from vitquant.benchmark.contenders import Contender, Missing, prepare
from vitquant.benchmark.table import Row, Table, Timing
from vitquant.calibrate import Progress, silent
from vitquant.errors import ExportError
from vitquant.export.process import Process

INNER = 3
"""Batches of a turn; the first warms caches that the contender before has filled, and is not counted."""


def benchmark(
    artifact: QuantizedModel,
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    calibration: Tensor | None = None,
    *,
    batches: Sequence[int] = (1, 8),
    threads: int = 2,
    repeats: int = 20,
    peers: bool = True,
    progress: Progress = silent,
) -> Table:
    """Latency, throughput, peak memory, bytes on disk and (with labels) top-1 of every way to run the model.

    model: the floating-point model that the artifact came from. images: preprocessed (n, channels, height, width).
    labels: (n,) class indices. calibration: for the peers that calibrate; the first 32 images if not given.

    Each contender runs in its own process with `threads` threads; in every repeat each takes one turn, in order, so
    that whatever else the machine does falls on all alike. Reported are median and quartiles over repeats. What is
    not installed or fails is in `Table.missing` with the reason.
    """
    images = images.cpu().float()
    calibration = images[:32] if calibration is None else calibration.cpu().float()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        progress("preparing", 0, 1)
        prepared = prepare(artifact, model, calibration, directory, peers)
        np.savez(directory / "images.npz", image=images.numpy())
        np.savez(directory / "few.npz", image=images[: max(batches)].numpy())
        missing = [c for c in prepared if isinstance(c, Missing)]
        running: dict[Contender, Process] = {}
        try:
            for contender in (c for c in prepared if isinstance(c, Contender)):
                process = Process(contender.engine, contender.model, threads=threads, **contender.options)
                running[contender] = process
                progress("warming up", len(running), len(prepared))
                try:
                    for batch in batches:
                        process.ask(time=INNER, images=str(directory / "few.npz"), batch=batch)
                except ExportError as error:
                    running.pop(contender).__exit__()
                    missing.append(Missing(contender.name, contender.kind, str(error)))
            seconds = _turns(running, directory / "few.npz", batches, repeats, progress)
            rows = []
            for done, (contender, process) in enumerate(running.items()):
                progress("accuracy", done, len(running))
                peak = process.ask(peak=True)["bytes"]
                top1 = None if labels is None else _accuracy(process, directory, labels)
                timings = {b: Timing.of(b, seconds[contender, b]) for b in batches}
                rows.append(Row(contender.name, contender.kind, contender.bytes, peak, timings, top1))
        finally:
            for process in running.values():
                process.__exit__()
    settings = {"batches": list(batches), "threads": threads, "repeats": repeats, "images": len(images)}
    return Table(tuple(rows), tuple(missing), machine(), settings)


def _turns(
    running: dict[Contender, Process], images: Path, batches: Sequence[int], repeats: int, progress: Progress
) -> dict[tuple[Contender, int], list[float]]:
    """Seconds of a batch by contender and batch size, one number for each repeat."""
    seconds: dict[tuple[Contender, int], list[float]] = {(c, b): [] for c in running for b in batches}
    for repeat in range(repeats):
        progress("timing", repeat, repeats)
        for batch in batches:
            for contender, process in running.items():
                found = process.ask(time=INNER, images=str(images), batch=batch)["seconds"]
                seconds[contender, batch].append(sorted(found[1:])[len(found[1:]) // 2])
    return seconds


def _accuracy(process: Process, directory: Path, labels: Tensor) -> float:
    """Top-1 in percent."""
    outputs = directory / "outputs.npz"
    process.ask(images=str(directory / "images.npz"), outputs=str(outputs), batch=8)
    with np.load(outputs) as arrays:
        logits = arrays[str(list(arrays["names"]).index("logits"))]
    return float((logits.argmax(1) == labels.numpy()).mean() * 100)


def machine() -> dict[str, str]:
    """The processor by name, its threads, and the instructions that decide about int8 and bf16."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    wanted = ("avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16")
    flags = found.get("flags", found.get("Features", "")).split()
    return {
        "processor": found.get("model name", platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "instructions": " ".join(f for f in wanted if f in flags),
        "torch": torch.__version__,
    }
