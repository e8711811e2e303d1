"""Latency, size and accuracy on real engines: one table for each model and method.

    python benchmarks/engines.py --checkpoint deit_tiny.safetensors --data DIR

DeiT-Tiny with these weights, DeiT-Small with random ones (its accuracy means nothing and is not measured); batches of
1 and 8. Other toolkits are measured beside deploy-int8; the research methods on DeiT-Tiny alone. Tables as Markdown
on stdout, as JSON and pictures in OUTPUT.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import timm
import torch
import typer
from safetensors.torch import save_file

import vitquant
from vitquant import models
from vitquant.artifact import Provenance
from vitquant.benchmark import benchmark
from vitquant.images import ImageFolder, find_split

TINY, SMALL = "deit_tiny_patch16_224", "deit_small_patch16_224"


class Run(NamedTuple):
    """One table. peers: other toolkits beside it. small: on DeiT-Small too."""

    method: str
    bits: str
    options: dict[str, Any]
    peers: bool = False
    small: bool = True

    @property
    def name(self) -> str:
        said = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.method} ({said})" if said else self.method


RUNS = (
    Run("deploy-int8", "w8a8", {}, peers=True),
    Run("deploy-int8", "w8a8", {"attention": True}, peers=True),
    Run("deploy-w4a8", "w4a8", {}),
    Run("fq-vit", "w8a8-attn4", {}, small=False),
    Run("adfq-vit", "w4a4", {"optimise": False}, small=False),
    Run("igq-vit", "w4a4", {}, small=False),
)


def main(
    checkpoint: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()] = Path("results/engines"),
    images: Annotated[int, typer.Option(help="Labelled images for accuracy.")] = 1000,
    threads: int = 2,
    repeats: int = 10,
    only: Annotated[str, typer.Option(help="Only if model and method contain this.")] = "",
) -> None:
    """Print the tables."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        random = Path(scratch, "random.safetensors")
        torch.manual_seed(0)
        save_file(timm.create_model(SMALL).state_dict(), random)
        for name, weights in ((TINY, checkpoint), (SMALL, random)):
            for run in RUNS:
                if only in f"{name} {run.name}" and (run.small or name == TINY):
                    _measure(name, run, weights, data, output, images if name == TINY else 0, threads, repeats)


def _measure(
    name: str, run: Run, weights: Path, data: Path, output: Path, images: int, threads: int, repeats: int
) -> None:
    loaded = models.load(models.parse(name, weights))
    folders = [
        ImageFolder(find_split(data, split), loaded.transform, loaded.label_space, loaded.classes)
        for split in ("calib", "val")
    ]
    calibration = torch.cat(list(folders[0].sample(32, 0).calibration(32)))
    drawn = folders[1].sample(images or 8, 0)
    pictures = torch.cat(list(drawn.calibration(32)))
    provenance = Provenance({"name": run.name, "bits": run.bits}, model=loaded.source.to_json())
    artifact = vitquant.quantize(
        loaded.model, calibration, run.method, run.bits, provenance=provenance, **run.options
    )
    table = benchmark(
        artifact,
        loaded.model,
        pictures,
        drawn.labels() if images else None,
        calibration,
        threads=threads,
        repeats=repeats,
        peers=run.peers,
        progress=lambda what, done, total: print(f"{what} {done}/{total}", file=sys.stderr),
    )
    print(f"\n### {name}, {run.name} {run.bits}\n\n{table.text()}\n", flush=True)
    table.save(output / f"{name} {run.name}.json")
    if images:
        table.plot(output / f"{name} {run.name}.png")


if __name__ == "__main__":
    typer.run(main)
