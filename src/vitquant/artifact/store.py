"""A quantized model on disk: a directory with config.json and model.safetensors. Nothing is pickled.

config.json says what is where; model.safetensors holds, for the site number i in the config's order,
`i.codes` (packed to the format's bits), `i.<parameter>`, `i.value` (rewritten constants), and under `float.` what
stays in floating point. Both files carry each other's check: the config holds the SHA-256 of the tensors and of
itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitquant.artifact.operands import Activation, Constant, Provenance, Weight
from vitquant.errors import ArtifactError, VitquantError
from vitquant.integer import Arithmetic
from vitquant.numerics import FORMATS, Granularity, Quantizer, pack, unpack
from vitquant.recipe.ledger import Entry, Ledger
from vitquant.trace import Site

CONFIG, TENSORS = "config.json", "model.safetensors"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that an artifact holds. model: the architecture; its `unneeded` parameters are not kept."""

    model: nn.Module
    operands: Mapping[Site, Activation | Constant]
    ledger: Ledger
    provenance: Provenance
    unneeded: set[str]
    arithmetic: Arithmetic | None = None


def save(contents: Contents, directory: Path) -> Path:
    """Write the artifact; the same model gives the same bytes. The directory is made if need be."""
    tensors: dict[str, Tensor] = {}
    sites = []
    for i, (site, operand) in enumerate(contents.operands.items()):
        assert isinstance(operand, (Activation, Constant))
        record, own = _record(operand)
        sites.append({"site": str(site), **record})
        tensors |= {f"{i}.{name}": t for name, t in own.items()}
    state = {n: t for n, t in contents.model.state_dict().items() if n not in contents.unneeded}
    tensors |= {f"float.{name}": t for name, t in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / TENSORS
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)
    config = {
        "format": "vitquant",
        "version": VERSION,
        "provenance": dataclasses.asdict(contents.provenance),
        "sites": sites,
        "ledger": dataclasses.asdict(contents.ledger),
        "unneeded": sorted(contents.unneeded),
        "arithmetic": None if contents.arithmetic is None else dataclasses.asdict(contents.arithmetic),
        "tensors_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    config = json.loads(json.dumps(config))
    config["config_sha256"] = _digest(config)
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return directory


def _record(operand: Activation | Constant) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config's entry and the tensors of one operand."""
    if isinstance(operand, Constant):
        return {"kind": "constant"}, {"value": operand.value}
    params = {name: _stored(name, value) for name, value in operand.params._asdict().items()}
    record = {"kind": "activation", "quantizer": quantizer_to_json(operand.quantizer)}
    if not isinstance(operand, Weight):
        return record, params
    low = operand.quantizer.code_range[0]
    codes = pack(operand.codes.int() - low, operand.quantizer.storage_bits)
    return {**record, "kind": "weight", "shape": list(operand.codes.shape)}, {**params, "codes": codes}


def _stored(name: str, value: Tensor) -> Tensor:
    """Zero-points are integers, on disk too."""
    return value.to(torch.int32) if name == "zero" else value


def load(directory: Path, build: Callable[[Provenance], nn.Module]) -> Contents:
    """Read an artifact back; `build` makes the architecture, whose weights do not matter.

    Raises ArtifactError naming the file and the field if anything is missing, truncated, edited or foreign.
    """
    config = read_config(directory)
    tensors = _read_tensors(directory / TENSORS, config["tensors_sha256"])
    provenance = _provenance(config)
    operands = {}
    for i, record in enumerate(config["sites"]):
        with _named(directory / CONFIG, f"sites[{i}]"):
            own = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == str(i)}
            operands[Site.parse(record["site"])] = _operand(record, own)
    model = build(provenance).eval()
    _fill(
        model,
        {n[len("float.") :]: t for n, t in tensors.items() if n.startswith("float.")},
        config,
        directory,
    )
    arithmetic = config["arithmetic"] and Arithmetic(**config["arithmetic"])
    return Contents(model, operands, _ledger(config), provenance, set(config["unneeded"]), arithmetic)


def read_config(directory: Path) -> dict[str, Any]:
    """The checked config.json of an artifact. Raises ArtifactError."""
    path = directory / CONFIG
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; '{directory}' is not a vitquant artifact")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); truncated or not an artifact") from None
    if not isinstance(config, dict) or config.get("format") != "vitquant":
        raise ArtifactError(f"{path}: field 'format' is not 'vitquant'; this is not a vitquant artifact")
    if config.get("version") != VERSION:
        found = config.get("version")
        raise ArtifactError(f"{path}: field 'version' is {found}; this release reads version {VERSION}")
    for name in ("provenance", "sites", "ledger", "unneeded", "arithmetic", "tensors_sha256", "config_sha256"):
        if name not in config:
            raise ArtifactError(f"{path}: field '{name}' is missing")
    for i, record in enumerate(config["sites"]):
        with _named(path, f"sites[{i}]"):
            Site.parse(record["site"])
            if "quantizer" in record:
                quantizer_from_json(record["quantizer"])
    if _digest(config) != config["config_sha256"]:
        raise ArtifactError(f"{path}: field 'config_sha256' does not match: the file was edited or damaged")
    return config


def _digest(config: Mapping[str, Any]) -> str:
    content = {k: v for k, v in config.items() if k != "config_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); truncated or damaged") from None
    if found != expected:
        raise ArtifactError(f"{path}: does not match field 'tensors_sha256' of {CONFIG}: edited or foreign")
    return tensors


class _named:
    """Tells errors inside with the file and the field they come from."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyError):
            raise ArtifactError(f"{self.path}: field '{self.name}.{error.args[0]}' is missing") from None
        if isinstance(error, (ValueError, TypeError, AttributeError, VitquantError)):
            raise ArtifactError(f"{self.path}: field '{self.name}': {error}") from None


def _operand(record: Mapping[str, Any], own: Mapping[str, Tensor]) -> Activation | Constant:
    if record["kind"] == "constant":
        return Constant(own["value"])
    quantizer = quantizer_from_json(record["quantizer"])
    params = quantizer.parameters(*(own[name].float() for name in quantizer.parameters._fields))  # type: ignore[attr-defined]
    if record["kind"] == "activation":
        return Activation(quantizer, params)
    codes = unpack(own["codes"], quantizer.storage_bits, tuple(record["shape"]))
    return Weight(quantizer, params, codes + quantizer.code_range[0])


def _fill(model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path) -> None:
    """Load what stayed in floating point; exactly the unneeded entries may be absent."""
    try:
        missing, unexpected = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"{directory / TENSORS}: does not fit the model: {first}") from None
    lost = [n for n in missing if n not in config["unneeded"]]
    if lost or unexpected:
        what = f"lacks '{lost[0]}'" if lost else f"has '{unexpected[0]}', which the model does not"
        raise ArtifactError(f"{directory / TENSORS}: does not fit the model: it {what}")


def _provenance(config: Mapping[str, Any]) -> Provenance:
    with _named(Path(CONFIG), "provenance"):
        return Provenance(**config["provenance"])
    raise AssertionError  # the context manager above re-raises


def _ledger(config: Mapping[str, Any]) -> Ledger:
    entries = {n: Entry(**{**e, "shape": tuple(e["shape"])}) for n, e in config["ledger"]["entries"].items()}
    return Ledger(entries, config["ledger"]["macs"])


def quantizer_to_json(quantizer: Quantizer) -> dict[str, Any]:
    """A format as plain JSON: its class's name and its fields."""
    return {"type": type(quantizer).__name__, **dataclasses.asdict(quantizer)}


def quantizer_from_json(record: Mapping[str, Any]) -> Quantizer:
    """The inverse. Raises ValueError for a type or a field that is not known, UsageError for bits out of range."""
    fields = dict(record)
    name = fields.pop("type")
    if name not in FORMATS:
        raise ValueError(f"quantizer type '{name}' is not one of {', '.join(FORMATS)}")
    grain = fields.pop("granularity")
    granularity = Granularity(tuple(grain["axes"]), grain["group"])
    return FORMATS[name](granularity=granularity, **fields)
