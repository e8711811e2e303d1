"""The results table: every method at the bit-widths it is made for, on one real model.

    python benchmarks/accuracy.py deit_tiny_patch16_224 --checkpoint W.safetensors --data DIR --output results/accuracy

One process for each row and seed, so that the peak memory is the row's own; finished rows are kept in OUTPUT/rows and
not run again. Prints the table in Markdown: mean over calibration seeds, the standard error of one accuracy, and the
p-value of McNemar's paired test against `repq-vit` at the same bits (first seed of both).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, NamedTuple

import torch
import typer

import vitquant
from vitquant import evaluate, models
from vitquant.images import ImageFolder, find_split

PAIRED_WITH = "repq-vit"


class Row(NamedTuple):
    """One line of the table: a method at a bit-width with its options, and how it is calibrated."""

    method: str
    bits: str
    images: int = 32
    options: str = "{}"
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def name(self) -> str:
        said = ", ".join(f"{k}={v}" for k, v in json.loads(self.options).items())
        return f"{self.method} ({said})" if said else self.method


ROWS = [
    Row("minmax", "w8a8"),
    Row("percentile", "w8a8"),
    Row("fq-vit", "w8a8", 100, '{"ptf": false, "lis": false}'),
    Row("fq-vit", "w8a8", 100),
    Row("fq-vit", "w8a8-attn4", 100),
    Row("minmax", "w6a6"),
    Row("percentile", "w6a6"),
    Row("repq-vit", "w6a6"),
    Row("adfq-vit", "w6a6"),
    Row("igq-vit", "w6a6"),
    Row("minmax", "w4a4"),
    Row("percentile", "w4a4"),
    Row("repq-vit", "w4a4", options='{"reparam": false}'),
    Row("repq-vit", "w4a4"),
    Row("repq-vit", "w4a4", options='{"extra_zero": true}'),
    Row("adfq-vit", "w4a4"),
    Row("igq-vit", "w4a4"),
    Row("igq-vit", "w4a4", options='{"groups": 12}'),
]


def main(
    model: str = "deit_tiny_patch16_224",
    checkpoint: Annotated[Path | None, typer.Option()] = None,
    data: Annotated[Path, typer.Option()] = Path("data"),
    output: Annotated[Path, typer.Option()] = Path("results/accuracy"),
    only: Annotated[str, typer.Option(help="Run only rows whose method and bits contain this.")] = "",
    limit: Annotated[int | None, typer.Option(help="Evaluate on so many images only.")] = None,
    threads: int = 2,
    row: Annotated[str, typer.Option(hidden=True)] = "",
    seed: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run the missing rows, print the table."""
    if row:
        torch.set_num_threads(threads)
        found = _run(Row(**json.loads(row)), seed, model, checkpoint, data, limit)
        print(json.dumps(found))
        return
    rows = [r for r in ROWS if only in f"{r.method} {r.bits}"]
    (output / "rows").mkdir(parents=True, exist_ok=True)
    for r in rows:
        for s in r.seeds:
            kept = output / "rows" / f"{r.name} {r.bits} {r.images} {s}.json".replace("/", "-")
            if not kept.exists():
                print(f"{r.name} {r.bits} seed {s}", file=sys.stderr, flush=True)
                task = ["--row", json.dumps(r._asdict()), "--seed", str(s)]
                done = subprocess.run(
                    [sys.executable, *sys.argv, *task], check=True, stdout=subprocess.PIPE, text=True
                )
                kept.write_text(done.stdout.splitlines()[-1])
    print(_table(rows, output))


def _run(
    row: Row, seed: int, name: str, checkpoint: Path | None, data: Path, limit: int | None
) -> dict[str, Any]:
    loaded = models.load(models.parse(name, checkpoint))
    calib, val = (
        ImageFolder(find_split(data, kind), loaded.transform, loaded.label_space, loaded.classes)
        for kind in ("calib", "val")
    )
    batches = calib.sample(row.images, seed).calibration(32)
    begin, cpu = time.perf_counter(), time.process_time()
    options = json.loads(row.options)
    quantized = vitquant.quantize(loaded.model, batches, row.method, row.bits, seed=seed, **options)
    spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = _size(quantized)
    images = val if limit is None else val.sample(limit, 0)
    report = evaluate.measure(images.batches(32), quantized, loaded.model)
    return {
        "top1": report.top1,
        "agreement": report.agreement,
        "kl": report.kl,
        "correct": report.correct,
        "standard_error": report.standard_error(),
        "bits": quantized.ledger.bits(),
        "gbops": quantized.ledger.bops() / 1e9,
        "megabytes": size / 1e6,
        "peak_gigabytes": peak,
        **spent,
    }


def _size(quantized: vitquant.QuantizedModel) -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        quantized.save(folder)
        return sum(f.stat().st_size for f in Path(folder).iterdir())


def _table(rows: list[Row], output: Path) -> str:
    lines = [
        "| method | bits | calibration images | top-1 (± s.e.) | over seeds | agreement | p, paired "
        f"with {PAIRED_WITH} | bits W / A | GBOPs | artifact MB | CPU s | peak GB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    found = {r: [_kept(output, r, s) for s in r.seeds] for r in rows}
    for r, runs in found.items():
        base = next((v[0] for k, v in found.items() if (k.name, k.bits) == (PAIRED_WITH, r.bits)), None)
        lines.append(_line(r, runs, base))
    return "\n".join(lines)


def _kept(output: Path, row: Row, seed: int) -> dict[str, Any]:
    return json.loads((output / "rows" / f"{row.name} {row.bits} {row.images} {seed}.json").read_text())


def _line(row: Row, runs: list[dict[str, Any]], base: dict[str, Any] | None) -> str:
    def average(name: str) -> float:
        return mean(run[name] for run in runs)

    paired = "" if base is None else f"{evaluate.mcnemar(runs[0]['correct'], base['correct']):.2g}"
    seeds = " ".join(f"{run['top1']:.1f}" for run in runs)
    spread = f" (σ {stdev(run['top1'] for run in runs):.1f})" if len(runs) > 1 else ""
    bits = runs[0]["bits"]
    return (
        f"| {row.name} | {row.bits} | {row.images} | {average('top1'):.1f} ± {average('standard_error'):.1f} "
        f"| {seeds}{spread} | {average('agreement'):.1f} | {paired} "
        f"| {bits['weight']:.2f} / {bits['activation']:.2f} | {average('gbops'):.1f} | {average('megabytes'):.2f} "
        f"| {average('cpu_seconds'):.0f} | {average('peak_gigabytes'):.2f} |"
    )


if __name__ == "__main__":
    typer.run(main)
