"""Speed as ratios to the full-precision forward pass, measured in one run, interleaved.

    python benchmarks/speed.py deit_tiny_patch16_224 --checkpoint W.safetensors --data DIR

For each method: CPU seconds to quantize, in units of one full-precision forward pass over as many images; and the
time of a fake-quantized forward pass over that of a full-precision one on the same batch, taken in turns. Medians
with the range of the middle half. One thread. Then what optimisation adds to ADFQ-ViT: CPU seconds of a step of one
unit, batches of 32, from the difference between runs of 1 and of 11 steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import vitquant
from vitquant import models
from vitquant.images import ImageFolder, find_split
from vitquant.trace.units import units

METHODS = ("minmax:w8a8", "repq-vit:w4a4", "fq-vit:w8a8-attn4", "adfq-vit:w4a4", "igq-vit:w4a4")
OPTIONS: dict[str, dict[str, Any]] = {"adfq-vit": {"optimise": False}}
STEPS = 10


def main(
    model: Annotated[str, typer.Argument()] = "deit_tiny_patch16_224",
    checkpoint: Annotated[Path | None, typer.Option()] = None,
    data: Annotated[Path, typer.Option()] = Path("data"),
    images: int = 32,
    batch: int = 32,
    repeats: int = 9,
    methods: Annotated[list[str] | None, typer.Option("--method")] = None,
    threads: int = 1,
    steps: bool = True,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    loaded = models.load(models.parse(model, checkpoint))
    folder = ImageFolder(find_split(data, "calib"), loaded.transform, loaded.label_space, loaded.classes)
    x = torch.cat(list(folder.sample(images, 0).calibration(batch)))
    forward = _cpu(lambda: _forward(loaded.model, x, batch))
    print(f"full precision: {images / forward:.0f} images per CPU second, {threads} thread(s), batches of {batch}\n")
    print("| method | quantize, CPU s | in forward passes | evaluation over full precision (middle half) |")
    print("|---|--:|--:|--:|")
    for spec in methods or METHODS:
        name, bits = spec.split(":")
        begin = time.process_time()
        quantized = vitquant.quantize(loaded.model, x, name, bits, batch=batch, **OPTIONS.get(name, {}))
        spent = time.process_time() - begin
        low, middle, high = _ratio(quantized, loaded.model, x[:batch], repeats)
        row = f"| {name} {bits} | {spent:.1f} | {spent / forward:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        print(row, flush=True)
    if steps:
        few, many = (_optimised(loaded.model, x, 1 + extra) for extra in (0, STEPS))
        count = len(units(vitquant.observe(loaded.model, x[:1])))
        print(f"\nadfq-vit w4a4: {(many - few) / STEPS / count:.3f} CPU s for a step of a unit, {count} units")


def _optimised(model: nn.Module, x: Tensor, iterations: int) -> float:
    """CPU seconds of ADFQ-ViT with this many steps for each unit."""
    begin = time.process_time()
    vitquant.quantize(model, x, "adfq-vit", "w4a4", iterations=iterations)
    return time.process_time() - begin


def _forward(model: nn.Module, x: Tensor, batch: int) -> None:
    with torch.no_grad():
        for part in x.split(batch):
            model(part)


def _cpu(work: Callable[[], None]) -> float:
    """CPU seconds, the median of three."""
    taken = []
    for _ in range(3):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return median(taken)


def _ratio(quantized: nn.Module, full: nn.Module, x: Tensor, repeats: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of time(quantized) / time(full), pairs taken one after the other."""
    pairs = []
    for _ in range(repeats + 1):
        taken = []
        for model in (full, quantized):
            begin = time.perf_counter()
            _forward(model, x, len(x))
            taken.append(time.perf_counter() - begin)
        pairs.append(taken[1] / taken[0])
    low, middle, high = quantiles(pairs[1:], n=4)  # the first pair warms up
    return low, middle, high


if __name__ == "__main__":
    typer.run(main)
