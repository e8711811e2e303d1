"""The results table: every method at the bit-widths it is made for, on one real model.

    python benchmarks/accuracy.py deit_tiny_patch16_224 --checkpoint W.safetensors --data DIR

One process for each row and seed, so that the peak memory is the row's own, `--jobs` of them at a time. Finished rows
are kept in OUTPUT/rows and not run again; so are the prepared images and the full-precision logits. Prints the table
in Markdown: mean over calibration seeds, the standard error of one accuracy, and the p-value of McNemar's paired test
against another row at the same bits (first seed of both), `repq-vit` unless the row names another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitquant
from vitquant import evaluate, models
from vitquant.export import engine
from vitquant.images import ImageFolder, find_split


class Row(NamedTuple):
    """One line of the table: a method at a bit-width with its options, how it is calibrated, and the name of the row
    that it is paired with, at the same bits unless it says others."""

    method: str
    bits: str
    images: int = 32
    options: str = "{}"
    seeds: tuple[int, ...] = (0, 1, 2)
    against: str = "repq-vit"

    @property
    def name(self) -> str:
        said = ", ".join(f"{k}={v}" for k, v in json.loads(self.options).items())
        return f"{self.method} ({said})" if said else self.method


ONE = (0,)
FAST = {"rounding_rate": 0.02, "step_rate": 3e-4}
"""The learning rates that suit a tenth of the paper's iterations."""
ROWS = [
    Row("minmax", "w8a8"),
    Row("percentile", "w8a8", seeds=ONE),
    Row("fq-vit", "w8a8", 100, '{"ptf": false, "lis": false}', ONE, "fq-vit"),
    Row("fq-vit", "w8a8", 100),
    Row("fq-vit", "w8a8-attn4", 100),
    Row("fq-vit", "w8a8-attn4", 100, '{"ptf": false, "lis": false}', ONE, "fq-vit"),
    Row("fq-vit", "w8a8-attn4", 100, '{"faithful": true}', ONE, "fq-vit"),
    Row("deploy-int8", "w8a8"),
    Row("deploy-int8", "w8a8", options='{"attention": true}', against="deploy-int8"),
    Row("deploy-w4a8", "w4a8", against="deploy-int8:w8a8"),
    Row("percentile", "w6a6", seeds=ONE),
    Row("repq-vit", "w6a6", seeds=ONE),
    Row("adfq-vit", "w6a6", options='{"optimise": false}', seeds=ONE),
    Row("igq-vit", "w6a6", seeds=ONE),
    Row("minmax", "w4a4", seeds=ONE),
    Row("percentile", "w4a4", seeds=ONE),
    Row("repq-vit", "w4a4", options='{"reparam": false}', seeds=ONE),
    Row("repq-vit", "w4a4", options='{"extra_zero": true}'),
    Row("repq-vit", "w4a4"),
    Row("adfq-vit", "w4a4", options='{"optimise": false}', against="repq-vit (reparam=False)"),
    Row("adfq-vit", "w4a4", 128, '{"optimise": false}', against="repq-vit (reparam=False)"),
    Row("adfq-vit", "w4a4", 128, json.dumps({"iterations": 300, **FAST}), ONE, "adfq-vit (optimise=False)"),
    Row(
        "adfq-vit",
        "w4a4",
        128,
        json.dumps({"form": "as-released", "iterations": 100, **FAST}),
        ONE,
        "adfq-vit (optimise=False)",
    ),
    Row("igq-vit", "w4a4"),
    Row("igq-vit", "w4a4", options='{"groups": 12}', against="igq-vit"),
    Row("igq-vit", "w4a4", options='{"allocate": true}', against="igq-vit"),
]


def main(
    model: Annotated[str, typer.Argument()] = "deit_tiny_patch16_224",
    checkpoint: Annotated[Path | None, typer.Option()] = None,
    data: Annotated[Path, typer.Option()] = Path("data"),
    output: Annotated[Path, typer.Option()] = Path("results/accuracy"),
    only: Annotated[str, typer.Option(help="Run only rows whose method and bits contain this.")] = "",
    jobs: Annotated[int, typer.Option(help="Rows at a time.")] = 2,
    threads: Annotated[int, typer.Option(help="Of each row.")] = 1,
    row: Annotated[str, typer.Option(hidden=True)] = "",
    seed: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run the missing rows, print the table."""
    if row:
        torch.set_num_threads(threads)
        print(json.dumps(_run(Row(**json.loads(row)), seed, model, checkpoint, data, output)))
        return
    (output / "rows").mkdir(parents=True, exist_ok=True)
    _prepare(model, checkpoint, data, output)
    rows = [r for r in ROWS if only in f"{r.method} {r.bits}"]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda task: _ensure(*task, output), [(r, s) for r in rows for s in r.seeds]))
    print(_table(rows, output))


def _ensure(row: Row, seed: int, output: Path) -> None:
    """Run a row in a process of its own, unless it was run before."""
    kept = _file(output, row, seed)
    if kept.exists():
        return
    task = ["--row", json.dumps(row._asdict()), "--seed", str(seed)]
    done = subprocess.run([sys.executable, *sys.argv, *task], check=True, stdout=subprocess.PIPE, text=True)
    kept.write_text(done.stdout.splitlines()[-1])
    print(
        f"{row.name} {row.bits} seed {seed}: {json.loads(kept.read_text())['top1']:.1f}", file=sys.stderr, flush=True
    )


def _prepare(name: str, checkpoint: Path | None, data: Path, output: Path) -> None:
    """Validation images, labels and full-precision logits, computed once for all rows."""
    path = output / "val.safetensors"
    if path.exists():
        return
    loaded = models.load(models.parse(name, checkpoint))
    folder = ImageFolder(find_split(data, "val"), loaded.transform, loaded.label_space, loaded.classes)
    images, labels, logits = [], [], []
    with torch.no_grad():
        for x, y in folder.batches(32):
            images.append(x)
            labels.append(y)
            logits.append(loaded.model(x))
    tensors = {"images": torch.cat(images), "labels": torch.cat(labels), "logits": torch.cat(logits)}
    save_file(tensors, path)
    top1 = (tensors["logits"].argmax(1) == tensors["labels"]).float().mean()
    print(f"full precision: {100 * top1:.1f}", file=sys.stderr)


def _run(row: Row, seed: int, name: str, checkpoint: Path | None, data: Path, output: Path) -> dict[str, Any]:
    loaded = models.load(models.parse(name, checkpoint))
    calib = ImageFolder(find_split(data, "calib"), loaded.transform, loaded.label_space, loaded.classes)
    batches = calib.sample(row.images, seed).calibration(32)
    begin, cpu = time.perf_counter(), time.process_time()
    options = json.loads(row.options)
    quantized = vitquant.quantize(loaded.model, batches, row.method, row.bits, seed=seed, **options)
    spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    peak = engine.peak() / 1e9
    val = load_file(output / "val.safetensors")
    expected = iter(val["logits"].split(32))
    pairs = zip(val["images"].split(32), val["labels"].split(32), strict=True)
    report = evaluate.measure(pairs, quantized, lambda _: next(expected))
    return {
        "top1": report.top1,
        "agreement": report.agreement,
        "kl": report.kl,
        "correct": report.correct,
        "standard_error": report.standard_error(),
        "bits": quantized.ledger.bits(),
        "gbops": quantized.ledger.bops() / 1e9,
        "megabytes": _size(quantized) / 1e6,
        "peak_gigabytes": peak,
        **spent,
    }


def _file(output: Path, row: Row, seed: int) -> Path:
    return output / "rows" / f"{row.name} {row.bits} {row.images} {seed}.json"


def _size(quantized: vitquant.QuantizedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(folder)
        return sum(f.stat().st_size for f in Path(folder).iterdir())


def _table(rows: list[Row], output: Path) -> str:
    lines = [
        "| method | bits | calibration images | top-1 (± s.e.) | over seeds | agreement | McNemar's p "
        "| bits W / A | GBOPs | artifact MB | CPU s | peak GB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines.append(_full_precision(output))
    found = {r: [_kept(output, r, s) for s in r.seeds] for r in rows}
    for r, runs in found.items():
        wanted = r.against if ":" in r.against else f"{r.against}:{r.bits}"
        same = [k for k in found if k is not r and f"{k.name}:{k.bits}" == wanted]
        base = found[max(same, key=lambda k: k.images == r.images)][0] if same else None
        lines.append(_line(r, runs, base))
    return "\n".join(lines)


def _full_precision(output: Path) -> str:
    with safe_open(output / "val.safetensors", "pt") as val:
        correct = (val.get_tensor("logits").argmax(1) == val.get_tensor("labels")).float()
    error = (correct.mean() * (1 - correct.mean()) / len(correct)) ** 0.5
    said = f"{100 * correct.mean():.1f} ± {100 * error:.1f}"
    return f"| full precision | fp32 | | {said} | | 100.0 | | 32 / 32 | | | | |"


def _kept(output: Path, row: Row, seed: int) -> dict[str, Any]:
    return json.loads(_file(output, row, seed).read_text())


def _line(row: Row, runs: list[dict[str, Any]], base: dict[str, Any] | None) -> str:
    def average(name: str) -> float:
        return mean(run[name] for run in runs)

    paired = "" if base is None else f"{evaluate.mcnemar(runs[0]['correct'], base['correct']):.2g} vs {row.against}"
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
