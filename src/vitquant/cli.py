"""The command line: arguments in, calls to the package, tables out. Nothing is decided here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import vitquant
from vitquant import benchmark as benchmarking
from vitquant import evaluate as metrics
from vitquant import export as exporting
from vitquant import models
from vitquant.artifact import Provenance, QuantizedModel, read_config
from vitquant.digits import DigitsImages
from vitquant.errors import UsageError, VitquantError
from vitquant.images import ImageFolder, Images, find_split, fingerprint
from vitquant.methods import METHODS

app = typer.Typer(
    help="Low-bit Vision Transformers: quantize, evaluate, inspect, export.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
out = Console()
err = Console(stderr=True)

Checkpoint = Annotated[Path | None, typer.Option(help="Local weights (.safetensors, .pth) instead of a download.")]
Data = Annotated[Path | None, typer.Option(help="Image folder; calib/ (or train/) and val/ in it are found.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Seed = Annotated[int, typer.Option(help="Decides which images calibrate, and every random draw.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at a time.")]


@app.command(rich_help_panel="Work")
def quantize(
    model: Annotated[
        str, typer.Argument(help="timm name, hf:ORG/NAME, hf:DIR, torchvision:NAME or digits.")
    ] = "digits",
    checkpoint: Checkpoint = None,
    data: Data = None,
    method: Annotated[str, typer.Option(help="See `vitquant methods`.")] = "repq-vit",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations: w4a4, w8a8, w8a8-attn4.")] = "w4a4",
    images: Annotated[int, typer.Option(min=1, help="How many images calibrate.")] = 32,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="Directory of the artifact.")] = Path("vitquant-out"),
    device: Device = "cpu",
    batch: Batch = 32,
    option: Annotated[list[str] | None, typer.Option("--set", help="An option of the method: NAME=VALUE.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Quantize a model and save the artifact.

    Without arguments: the bundled digits model, with its accuracy before and after.

        vitquant quantize
        vitquant quantize deit_tiny_patch16_224 --checkpoint W.safetensors --data DIR --method repq-vit --bits w4a4
    """
    loaded = models.load(models.parse(model, checkpoint))
    drawn = _images(loaded, data, "calib").sample(images, seed)
    network = loaded.model.to(_device(device))
    provenance = Provenance(
        method={},
        images={"count": len(drawn), "fingerprint": fingerprint(drawn)},
        model=loaded.source.to_json(),
        preprocessing=loaded.preprocessing,
        model_config=loaded.config,
        label_space=loaded.label_space,
    )
    with _progress() as bar:
        quantized = vitquant.quantize(
            network,
            _On(drawn.calibration(batch), device),
            method,
            bits,
            seed=seed,
            batch=batch,
            progress=bar,
            provenance=provenance,
            **_options(option),
        )
    quantized.save(output)
    summary: dict[str, Any] = {
        "output": str(output),
        "method": quantized.provenance.method,
        "bytes": _size(output),
        "bits": quantized.ledger.bits(),
        "bops": quantized.ledger.bops(),
    }
    if loaded.source.kind == "digits":
        summary |= _before_and_after(loaded, quantized, data, device)
    _show(f"{model} → {output}", summary)
    _write(json_file, summary)


@app.command(rich_help_panel="Work")
def evaluate(
    model: Annotated[str, typer.Argument(help="An artifact's directory, or a model as in `quantize`.")],
    checkpoint: Checkpoint = None,
    data: Data = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many images, drawn by --seed.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    batch: Batch = 32,
    json_file: JsonFile = None,
) -> None:
    """Measure accuracy, closeness to the full-precision model, and cost.

    vitquant evaluate OUT --data DIR --json FILE
    vitquant evaluate deit_tiny_patch16_224 --checkpoint W.safetensors --data DIR
    """
    if Path(model).is_dir():
        report = _evaluate_artifact(Path(model), checkpoint, data, limit, seed, device, batch)
    else:
        report = _evaluate_model(model, checkpoint, data, limit, seed, device, batch)
    _show(f"evaluation of {model}", report)
    _write(json_file, report)


@app.command(rich_help_panel="Deploy")
def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact's directory.")],
    format: Annotated[str, typer.Option(help="onnx, openvino or torch.")] = "onnx",
    output: Annotated[Path | None, typer.Option(help="Directory; by default FORMAT inside the artifact.")] = None,
    data: Data = None,
    images: Annotated[int, typer.Option(min=1, help="Images that the certificate compares.")] = 32,
    approximate: Annotated[bool, typer.Option(help="Allow formats that an engine only approximates.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a file for an engine, and certify that it computes what the artifact computes.

    Prints a verdict for every site: exact, approximate, or left in floating point. Exit code 1 if the file's layers
    or its predictions differ from the artifact's.

        vitquant export OUT --format onnx --data DIR
        vitquant export OUT --format openvino --output DEPLOY
    """
    model = vitquant.load(artifact)
    loaded = _rebuilt(model.provenance)
    drawn = _images(loaded, data, "val").sample(images, 0)
    place = output or artifact / format
    batch = torch.cat(list(drawn.calibration(images)))
    with err.status(f"exporting to {format}, then comparing layer by layer"):
        report = exporting.export(model, batch, place, format, approximate=approximate)  # type: ignore[arg-type]
    out.print(report.summary(), markup=False, highlight=False)
    _write(json_file, report.to_json())
    if not report.ok:
        failure = report.certificate.failure if report.certificate else "no certificate"
        err.print(f"vitquant: {report.path} differs from the artifact: {failure}", style="red", markup=False)
        raise typer.Exit(1)


@app.command(rich_help_panel="Deploy")
def benchmark(
    artifact: Annotated[Path, typer.Argument(help="An artifact's directory.")],
    checkpoint: Checkpoint = None,
    data: Data = None,
    images: Annotated[int, typer.Option(min=1, help="Labelled images for accuracy.")] = 200,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=2)] = 20,
    peers: Annotated[bool, typer.Option(help="Also other toolkits' int8, where installed.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Accuracy against latency and size, as a picture.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure latency, throughput, memory, size and accuracy, interleaved, against floating point and other toolkits.

    vitquant benchmark OUT --data DIR --json FILE --plot FILE.png
    """
    model = vitquant.load(artifact)
    loaded, reference = _reference(models.Source.from_json(_source(model)), checkpoint, model.provenance)
    if reference is None:
        raise UsageError("the baselines need the full-precision weights: pass --checkpoint")
    drawn = _images(loaded, data, "val").sample(images, 0)
    calibration = torch.cat(list(_images(loaded, data, "calib").sample(32, 0).calibration(32)))
    pictures = torch.cat(list(drawn.calibration(32)))
    with _progress() as bar:
        table = benchmarking.benchmark(
            model,
            reference,
            pictures,
            drawn.labels(),
            calibration,
            threads=threads,
            repeats=repeats,
            peers=peers,
            progress=bar,
        )
    out.print(table.text(), markup=False, highlight=False, soft_wrap=True)
    _write(json_file, table.to_json())
    if plot is not None:
        table.plot(plot)


@app.command(rich_help_panel="Look")
def sites(
    model: Annotated[str, typer.Argument(help="A model as in `quantize`; its weights do not matter.")] = "digits",
    every: Annotated[bool, typer.Option("--all", help="Also norms, softmax, sums and outputs.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Show every site of a model that can be quantized, and its role.

    vitquant sites swin_tiny_patch4_window7_224
    vitquant sites hf:my-vit --all
    """
    loaded = models.load(models.parse(model), pretrained=model.startswith("hf:"))
    trace = vitquant.observe(loaded.model, torch.zeros(1, *loaded.input_size))
    rows: list[dict[str, Any]] = [
        {"site": str(site), "role": info.role.value, "shape": list(info.shape), "macs": trace.macs.get(site.call)}
        for site, info in trace.sites.items()
        if every or info.role in vitquant.CONTRACTION_ROLES
    ]
    table = _sites_table("role", "shape of one image", "MACs", title=str(loaded.source))
    for row in rows:
        table.add_row(row["site"], row["role"], "x".join(map(str, row["shape"])), f"{row['macs'] or 0:,}")
    out.print(table)
    out.print(f"{len(rows)} sites, {sum(trace.macs.values()) / 1e9:.2f} G multiply-accumulates per image")
    _write(json_file, {"model": str(loaded.source), "sites": rows})


@app.command(rich_help_panel="Look")
def inspect(
    artifact: Annotated[Path, typer.Argument(help="An artifact's directory.")],
    json_file: JsonFile = None,
) -> None:
    """Show what is quantized how in an artifact: site, role, format, bits.

    vitquant inspect OUT
    """
    config = read_config(artifact)
    table = _sites_table("role", "format", "shape of one image", "bits", title=str(artifact))
    for name, entry in config["ledger"]["entries"].items():
        shape = "x".join(map(str, entry["shape"]))
        table.add_row(name, entry["role"], entry["format"], shape, f"{entry['bits']:.4g}")
    out.print(table)
    _write(json_file, config)


@app.command(rich_help_panel="Look")
def methods(json_file: JsonFile = None) -> None:
    """List the methods: their papers, what they do to which site, what they cost at run time."""
    rows = [vitquant.methods.describe(name) for name in METHODS]
    for row in rows:
        table = Table(
            "role", "format", title=f"{row['name']}  ({row['source']}, {row['bits']})", title_justify="left"
        )
        for role, what in row["sites"].items():
            table.add_row(role, what)
        out.print(table)
        out.print(f"{row['summary']}\nAt run time: {row['cost']}\n", highlight=False)
    _write(json_file, {"methods": rows})


def main() -> None:
    """The console entry: a user's mistake is one line and exit code 2, never a traceback."""
    try:
        app(standalone_mode=False)
    except VitquantError as error:
        _fail(str(error))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors
            raise
        _fail(error.format_message())


def _fail(message: str) -> None:
    err.print(f"vitquant: {' '.join(message.split())}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


class _On:
    """Batches moved to a device as they come; a re-iterable like what it wraps."""

    def __init__(self, batches: Any, device: str) -> None:
        self.batches, self.device, self.dataset = batches, device, batches.dataset

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.to(self.device) for batch in self.batches)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar for each piece of work, as `vitquant.calibrate.Progress` tells it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done)

        yield tell


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is read as JSON where it is JSON, else as text."""
    options = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair} is not of the form NAME=VALUE")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[name.replace("-", "_")] = value
    return options


def _images(loaded: models.Loaded, data: Path | None, split: Any) -> Images:
    """The images of a split: the folder given, or the bundled digits."""
    if data is not None:
        return ImageFolder(find_split(data, split), loaded.transform, loaded.label_space, loaded.classes)
    if loaded.source.kind == "digits":
        return DigitsImages(split)
    raise UsageError(f"{loaded.source} needs images: pass --data DIR")


def _measure(
    loaded: models.Loaded,
    model: nn.Module,
    reference: nn.Module | None,
    images: Images,
    device: str,
    batch: int,
) -> metrics.Report:
    with _progress() as bar:
        return metrics.measure(
            images.batches(batch),
            model.to(_device(device)),
            None if reference is None else reference.to(_device(device)),
            total=len(images),
            device=device,
            progress=lambda done, total: bar("evaluating", done, total),
        )


def _evaluate_model(
    spec: str, checkpoint: Path | None, data: Path | None, limit: int | None, seed: int, device: str, batch: int
) -> dict[str, Any]:
    loaded = models.load(models.parse(spec, checkpoint))
    images = _limited(_images(loaded, data, "val"), limit, seed)
    report = _measure(loaded, loaded.model, None, images, device, batch)
    trace = vitquant.observe(loaded.model.cpu(), torch.zeros(1, *loaded.input_size))
    size = sum(t.numel() * t.element_size() for t in loaded.model.state_dict().values())
    bits = {"weight": 32.0, "activation": 32.0}
    return {**_said(report), "bytes": size, "bits": bits, "bops": sum(trace.macs.values()) * 32 * 32}


def _evaluate_artifact(
    directory: Path,
    checkpoint: Path | None,
    data: Path | None,
    limit: int | None,
    seed: int,
    device: str,
    batch: int,
) -> dict[str, Any]:
    model = vitquant.load(directory)
    said = model.provenance
    loaded, reference = _reference(models.Source.from_json(_source(model)), checkpoint, said)
    images = _limited(_images(loaded, data, "val"), limit, seed)
    report = _measure(loaded, model, reference, images, device, batch)
    first = (x.to(device) for x, _ in islice(images.batches(batch), max(1, 64 // batch)))
    ratios = metrics.sqnr(model, first)
    return {
        **_said(report),
        "bytes": _size(directory),
        "bits": model.ledger.bits(),
        "bops": model.ledger.bops(),
        "method": dict(said.method),
        "worst_sqnr": [{"site": s, "db": _finite(v)} for s, v in metrics.worst(ratios)],
        "sqnr": {s: _finite(v) for s, v in ratios.items()},
    }


def _reference(
    source: models.Source, checkpoint: Path | None, said: Provenance
) -> tuple[models.Loaded, nn.Module | None]:
    """The full-precision model that the artifact came from; without its weights, only how to feed it."""
    if checkpoint is not None:
        source = models.parse(str(source), checkpoint)
    try:
        loaded = models.load(source)
        return loaded, loaded.model
    except VitquantError as error:
        err.print(f"no full-precision reference, so no agreement and no KL: {error}", style="yellow", markup=False)
    return _rebuilt(said), None


def _source(model: QuantizedModel) -> dict[str, Any]:
    assert model.provenance.model is not None  # load() has refused a model of the user's own
    return dict(model.provenance.model)


def _rebuilt(said: Provenance) -> models.Loaded:
    """How to feed an artifact's model; its weights are not read."""
    config = None if said.model_config is None else dict(said.model_config)
    preprocessing = None if said.preprocessing is None else dict(said.preprocessing)
    source = models.Source.from_json(dict(said.model or {}))
    return models.load(source, pretrained=False, config=config, preprocessing=preprocessing)


def _limited(images: Images, limit: int | None, seed: int) -> Images:
    return images if limit is None or limit >= len(images) else images.sample(limit, seed)


def _said(report: metrics.Report) -> dict[str, Any]:
    names = ("top1", "top5", "images", "agreement", "kl", "seconds")
    said = {name: getattr(report, name) for name in names}
    return {**said, "standard_error": report.standard_error()}


def _before_and_after(
    loaded: models.Loaded, quantized: QuantizedModel, data: Path | None, device: str
) -> dict[str, Any]:
    images = _images(loaded, data, "val")
    before = _measure(loaded, loaded.model, None, images, device, 64)
    after = _measure(loaded, quantized, loaded.model, images, device, 64)
    return {"full_precision_top1": before.top1, **_said(after)}


def _size(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.iterdir() if f.is_file())


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _show(title: str, report: dict[str, Any]) -> None:
    table = Table("what", "value", title=title, title_justify="left")
    for name, value in report.items():
        if name == "worst_sqnr":
            for row in value:
                table.add_row(f"SQNR {row['site']}", "no loss" if row["db"] is None else f"{row['db']:.1f} dB")
        elif name != "sqnr":
            table.add_row(name.replace("_", " "), _text(value))
    out.print(table)


def _sites_table(*columns: str, title: str) -> Table:
    """A table whose first column holds names of sites, never cut: they are what is copied from it."""
    table = Table(title=title)
    table.add_column("site", overflow="fold", min_width=40)
    for name in columns:
        table.add_column(name)
    return table


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
