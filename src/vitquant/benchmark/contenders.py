"""What is measured: files prepared for engines, from the float model, from the artifact, and by other toolkits."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitquant.artifact import QuantizedModel
from vitquant.errors import UsageError
from vitquant.export import export

WEIGHTS = "float.safetensors"


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to run the model. kind: "float" (the baselines), "ours" or "peer". files: what a user would ship."""

    name: str
    kind: str
    engine: str
    model: Path
    files: tuple[Path, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(f.stat().st_size for f in self.files)


@dataclass(frozen=True)
class Missing:
    """A contender that could not be prepared or run, and why."""

    name: str
    kind: str
    reason: str


Prepared = list[Contender | Missing]


def prepare(
    artifact: QuantizedModel, model: nn.Module, calibration: Tensor, directory: Path, peers: bool = True
) -> Prepared:
    """Every contender, its files in `directory`. calibration: images for peers that calibrate."""
    found = _float(artifact, model, calibration, directory) + _ours(artifact, calibration, directory)
    return found + (_peers(artifact, model, calibration, directory) if peers else [])


def _float(artifact: QuantizedModel, model: nn.Module, images: Tensor, directory: Path) -> Prepared:
    graph = directory / "float.onnx"

    def pytorch(**options: bool) -> Callable[[], tuple[str, Path, list[Path], dict[str, Any]]]:
        return lambda: ("eager", _described(artifact, model, directory), [directory / WEIGHTS], options)

    def onnx() -> Path:
        return graph if graph.exists() else _float_onnx(model, images, graph)

    def openvino(precision: str) -> tuple[str, Path, list[Path], dict[str, Any]]:
        _need("openvino")
        path = directory / "float.xml"
        if not path.exists():
            _to_openvino(onnx(), path)
        return "openvino", path, _ir(path), {"precision": precision}

    def onnxruntime() -> tuple[str, Path, list[Path], dict[str, Any]]:
        _need("onnxruntime")
        return "onnxruntime", onnx(), [onnx()], {}

    return [
        _attempt("PyTorch FP32", "float", pytorch()),
        _attempt("PyTorch FP32 compiled", "float", pytorch(compile=True)),
        _attempt("PyTorch bf16 autocast", "float", pytorch(bf16=True)),
        _attempt("PyTorch bf16 autocast, compiled", "float", pytorch(bf16=True, compile=True)),
        _attempt("ONNX Runtime FP32", "float", onnxruntime),
        _attempt("OpenVINO FP32", "float", lambda: openvino("f32")),
        _attempt("OpenVINO bf16", "float", lambda: openvino("bf16")),
    ]


def _ours(artifact: QuantizedModel, images: Tensor, directory: Path) -> Prepared:
    def exported(format: str, engine: str, **options: Any) -> Callable[[], Any]:
        def make() -> tuple[str, Path, list[Path], dict[str, Any]]:
            _need(engine)
            path = directory / f"ours.{format}"
            suffix = {"onnx": "onnx", "openvino": "xml", "torch": "pt2"}[format]
            file = path / f"model.{suffix}"
            if not file.exists():
                export(artifact, images[:2], path, format, certify=False)
            return engine, file, _ir(file) if format == "openvino" else [file], options

        return make

    def integer(**options: bool) -> Callable[[], Any]:
        def make() -> tuple[str, Path, list[Path], dict[str, Any]]:
            _source(artifact)
            path = artifact.save(directory / "artifact")
            return "integer", path, sorted(path.iterdir()), options

        return make

    return [
        _attempt("ours, ONNX Runtime", "ours", exported("onnx", "onnxruntime")),
        _attempt("ours, OpenVINO", "ours", exported("openvino", "openvino", precision="f32")),
        _attempt("ours, OpenVINO, rest in bf16", "ours", exported("openvino", "openvino", precision="bf16")),
        _attempt("ours, torch.export (simulated)", "ours", exported("torch", "torch")),
        _attempt("ours, portable runtime", "ours", integer()),
        _attempt("ours, portable runtime, compiled", "ours", integer(compile=True)),
    ]


def _peers(artifact: QuantizedModel, model: nn.Module, images: Tensor, directory: Path) -> Prepared:
    graph = directory / "float.onnx"

    def dynamic() -> tuple[str, Path, list[Path], dict[str, Any]]:
        _need("onnxruntime")
        from onnxruntime.quantization import quantize_dynamic

        path = directory / "ort_dynamic.onnx"
        quantize_dynamic(_without_shapes(graph), path)
        return "onnxruntime", path, [path], {}

    def static() -> tuple[str, Path, list[Path], dict[str, Any]]:
        _need("onnxruntime")
        from onnxruntime.quantization import quantize_static

        path = directory / "ort_static.onnx"
        quantize_static(_without_shapes(graph), path, _Reader(images))
        return "onnxruntime", path, [path], {}

    def nncf(precision: str) -> tuple[str, Path, list[Path], dict[str, Any]]:
        _need("openvino", "nncf")
        path = directory / "nncf.xml"
        if not path.exists():
            _nncf(directory / "float.xml", images, path)
        return "openvino", path, _ir(path), {"precision": precision}

    def torchao() -> tuple[str, Path, list[Path], dict[str, Any]]:
        _need("torchao")
        return "eager", _described(artifact, model, directory), [], {"int8": True, "compile": True}

    return [
        _attempt("ONNX Runtime dynamic int8", "peer", dynamic),
        _attempt("ONNX Runtime static int8", "peer", static),
        _attempt("OpenVINO + NNCF int8", "peer", lambda: nncf("f32")),
        _attempt("OpenVINO + NNCF int8, rest in bf16", "peer", lambda: nncf("bf16")),
        _attempt("torchao dynamic int8, compiled", "peer", torchao),
    ]


def _attempt(name: str, kind: str, make: Callable[[], Any]) -> Contender | Missing:
    """What `make` prepares, or the reason why it cannot, in one line."""
    try:
        with _quiet():
            engine, model, files, options = make()
    except Exception as error:  # other people's toolkits fail in every way there is
        return Missing(name, kind, " ".join(f"{type(error).__name__}: {error}".split())[:200])
    return Contender(name, kind, engine, model, tuple(files), options)


def _need(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Toolkits tell of their work at length."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _source(artifact: QuantizedModel) -> Mapping[str, Any]:
    """How another process builds the model. Raises UsageError for a model of the user's own."""
    if artifact.provenance.model is None:
        raise UsageError("a model of your own cannot be built in another process")
    return artifact.provenance.model


def _described(artifact: QuantizedModel, model: nn.Module, directory: Path) -> Path:
    """The float model for another process: its source as JSON, its weights beside it."""
    path = directory / "float.json"
    if not path.exists():
        source = {**_source(artifact), "checkpoint": str(directory / WEIGHTS)}
        save_file({name: t.contiguous().clone() for name, t in model.state_dict().items()}, directory / WEIGHTS)
        path.write_text(json.dumps(source))
    return path


def _float_onnx(model: nn.Module, images: Tensor, path: Path) -> Path:
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    example = images[:2].clone()
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=batch, strict=False)
        names = {"input_names": ["image"], "output_names": ["logits"]}
        written = torch.onnx.export(program, (example,), dynamo=True, opset_version=20, verbose=False, **names)  # type: ignore[arg-type]
    assert written is not None
    written.save(path)
    return path


def _without_shapes(graph: Path) -> Any:
    """ONNX Runtime's quantizers stumble over the intermediate shapes that the exporter writes."""
    import onnx

    model = onnx.load(graph)
    del model.graph.value_info[:]
    return model


class _Reader:
    """Calibration images one by one, as ONNX Runtime wants them."""

    def __init__(self, images: Tensor) -> None:
        self.images = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image.numpy()}


def _to_openvino(graph: Path, path: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(graph), path, compress_to_fp16=False)


def _nncf(graph: Path, images: Tensor, path: Path) -> None:
    import nncf
    import openvino

    data = nncf.Dataset([image.numpy() for image in images.split(1)])
    settings = {"model_type": nncf.ModelType.TRANSFORMER, "preset": nncf.QuantizationPreset.MIXED}
    quantized = nncf.quantize(openvino.Core().read_model(graph), data, subset_size=len(images), **settings)
    openvino.save_model(quantized, path, compress_to_fp16=False)


def _ir(path: Path) -> list[Path]:
    return [path, path.with_suffix(".bin")]
