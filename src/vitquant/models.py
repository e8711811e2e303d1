"""Where a model comes from, and how to get it with its own preprocessing.

A model is named by a spec: a timm name (``deit_tiny_patch16_224``), ``hf:ORG/NAME`` or ``hf:LOCAL_DIR``,
``torchvision:NAME``, or ``digits``, the one built in. ``parse`` checks a spec, ``load`` builds what it names.
What ``Loaded`` holds besides the model and its transform is JSON: with it, ``load(source, pretrained=False,
config=..., preprocessing=...)`` rebuilds architecture and transform without any download.
"""

from __future__ import annotations

import difflib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from vitquant import digits
from vitquant.errors import ArtifactError, UsageError

KINDS = ("timm", "hf", "torchvision", "digits")
ACCEPTED = "a timm name, hf:ORG/NAME, hf:LOCAL_DIR, torchvision:NAME or digits"
Transform = Callable[[Image.Image], Tensor]

_CHECKPOINTS = (".safetensors", ".pth", ".pt")
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """Which model, and the file its weights come from (None: the ones its library publishes)."""

    kind: str
    name: str
    checkpoint: str | None = None

    def __str__(self) -> str:
        if self.kind in ("hf", "torchvision"):
            return f"{self.kind}:{self.name}"
        return self.name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Source:
        """The inverse of ``to_json``; ArtifactError if ``data`` is not what that writes."""
        fields: dict[str, Any] = {"kind": str, "name": str, "checkpoint": (str, type(None))}
        if (
            not isinstance(data, dict)
            or data.keys() != fields.keys()
            or not all(isinstance(data[field], kind) for field, kind in fields.items())
            or data["kind"] not in KINDS
        ):
            raise ArtifactError(f"not a model source: {data!r} (kind: {', '.join(KINDS)}; name; checkpoint)")
        return cls(**data)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and float32, with what it takes to feed it and to build it again.

    ``transform`` makes a float tensor (C, H, W) = ``input_size`` of an RGB image and is
    ``transform_from(preprocessing)``. ``label_space`` is ``"imagenet-1k"`` for a head of 1000 classes.
    ``config`` is a Hugging Face model's configuration, None for other kinds.
    """

    source: Source
    model: nn.Module
    transform: Transform
    preprocessing: dict[str, Any]
    classes: int
    label_space: str | None
    input_size: tuple[int, int, int]
    config: dict[str, Any] | None = None


def parse(spec: str, checkpoint: Path | None = None) -> Source:
    """The source that ``spec`` and ``checkpoint`` name; UsageError if there is no such model or file."""
    if checkpoint is not None and not checkpoint.is_file():
        raise UsageError(f"checkpoint {checkpoint} is not a file")
    if checkpoint is not None and checkpoint.suffix not in _CHECKPOINTS:
        raise UsageError(f"checkpoint {checkpoint} must end in {', '.join(_CHECKPOINTS)}")
    weights = None if checkpoint is None else str(checkpoint.resolve())
    prefix, colon, name = spec.partition(":")
    if spec == "digits":
        return Source("digits", spec, weights)
    if colon and prefix == "hf":
        if weights is not None:
            raise UsageError(f"{spec} brings its own weights: leave out the checkpoint, or use hf:LOCAL_DIR")
        return Source("hf", _hf_name(name))
    if colon and prefix == "torchvision":
        _require_known(name, torchvision.models.list_models(module=torchvision.models), "torchvision model")
        return Source("torchvision", name, weights)
    _require_timm(spec)
    return Source("timm", spec, weights)


def load(
    source: Source,
    *,
    pretrained: bool = True,
    config: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Loaded:
    """Build the model that ``source`` names, with its weights, or with random ones if not ``pretrained``.

    ``pretrained=False`` reads no checkpoint and never downloads; a Hugging Face model then needs ``config``
    and ``preprocessing``, as an earlier ``Loaded`` had them, unless its own are on this machine.
    ``preprocessing`` replaces the model's own. UsageError, in one line, if weights cannot be had or do not
    fit, or if the model has no classification head.
    """
    if source.kind == "hf":
        model, own, config = _hf(source, pretrained, config, preprocessing)
    elif source.kind == "timm":
        model, own = _timm(source, pretrained)
    elif source.kind == "torchvision":
        model, own = _torchvision(source, pretrained)
    else:
        model, own = _digits(source, pretrained)
    if pretrained and source.checkpoint is not None:
        _load_checkpoint(model, Path(source.checkpoint), source)
    preprocessing = own if preprocessing is None else preprocessing
    transform = transform_from(preprocessing)
    classes = _classes(source, model)
    return Loaded(
        source=source,
        model=model.eval().float(),
        transform=transform,
        preprocessing=preprocessing,
        classes=classes,
        label_space="imagenet-1k" if classes == 1000 and source.kind != "digits" else None,
        input_size=_input_size(source, transform),
        config=config,
    )


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a model returned: a tensor, an object with ``.logits``, a tuple or a dict."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise UsageError(f"the model returned {type(output).__name__}, with no tensor of logits in it")


def transform_from(preprocessing: dict[str, Any]) -> Transform:
    """The transform that a ``Loaded.preprocessing`` describes; ArtifactError if it describes none."""
    build: dict[str, Callable[[dict[str, Any]], Transform]] = {
        "timm": _timm_transform,
        "hf": _HfTransform,
        "torchvision": _tv_transform,
        "digits": _digits_transform,
    }
    settings = dict(preprocessing)
    kind = settings.pop("kind", None)
    if kind not in build:
        raise ArtifactError(f"no preprocessing of kind {kind!r} ({', '.join(build)})")
    try:
        return build[kind](settings)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(f"preprocessing of kind {kind!r} cannot be rebuilt: {_line(error)}") from error


def _timm(source: Source, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    download = pretrained and source.checkpoint is None
    if not download:
        model = timm.create_model(source.name)
    else:
        try:
            model = timm.create_model(source.name, pretrained=True)
        except Exception as error:  # hub, HTTP and file errors share no base
            raise _no_weights(source, error) from error
    return model, {"kind": "timm", **_json(resolve_model_data_config(model))}


def _timm_transform(settings: dict[str, Any]) -> Transform:
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return create_transform(**settings, is_training=False)


def _torchvision(source: Source, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    weights = torchvision.models.get_model_weights(source.name).DEFAULT
    if pretrained and source.checkpoint is None:
        try:
            model = torchvision.models.get_model(source.name, weights=weights, progress=False)
        except Exception as error:  # URL, HTTP and file errors share no base
            raise _no_weights(source, error) from error
    else:
        # Published weights may be for another image size than a ViT's default.
        size = {"image_size": weights.meta["min_size"][0]} if source.name.startswith("vit_") else {}
        model = torchvision.models.get_model(source.name, weights=None, **size)
    preset = weights.transforms()
    return model, {
        "kind": "torchvision",
        "resize_size": preset.resize_size,
        "crop_size": preset.crop_size,
        "interpolation": preset.interpolation.value,
        "antialias": preset.antialias,
        "mean": preset.mean,
        "std": preset.std,
    }


def _tv_transform(settings: dict[str, Any]) -> Transform:
    # The operations of torchvision's own preset, to the bit; its v2 ones round differently.
    interpolation = InterpolationMode(settings["interpolation"])
    return transforms.Compose(
        [
            transforms.Resize(settings["resize_size"], interpolation, antialias=settings["antialias"]),
            transforms.CenterCrop(settings["crop_size"]),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(settings["mean"], settings["std"]),
        ]
    )


def _digits(source: Source, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    model = digits.build()
    if pretrained and source.checkpoint is None:
        digits.load_weights(model)
    return model, {"kind": "digits", "size": [8, 8], "mean": [digits.MEAN], "std": [digits.STD]}


def _digits_transform(settings: dict[str, Any]) -> Transform:
    return transforms.Compose(
        [
            transforms.Grayscale(),
            transforms.Resize(settings["size"]),
            transforms.ToTensor(),
            transforms.Normalize(settings["mean"], settings["std"]),
        ]
    )


def _hf(
    source: Source, pretrained: bool, config: dict[str, Any] | None, preprocessing: dict[str, Any] | None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The model, its processor's settings and its configuration; never runs code from a repository."""
    transformers = _transformers()
    auto = transformers.AutoModelForImageClassification
    try:
        if pretrained:
            model, info = auto.from_pretrained(source.name, output_loading_info=True, trust_remote_code=False)
        else:
            stored = (
                transformers.AutoConfig.from_pretrained(source.name, local_files_only=True, trust_remote_code=False)
                if config is None
                else transformers.AutoConfig.for_model(**config)
            )
            model, info = auto.from_config(stored, trust_remote_code=False), {"missing_keys": []}
    except Exception as error:  # hub, HTTP, file and configuration errors share no base
        raise UsageError(f"{source} cannot be loaded: {_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"{source} has no weights for {_some(missing)}: a model fine-tuned to classify images is needed"
        )
    if preprocessing is None:
        preprocessing = _hf_preprocessing(source, pretrained)
    return model, preprocessing, json.loads(model.config.to_json_string(use_diff=False))


def _hf_preprocessing(source: Source, pretrained: bool) -> dict[str, Any]:
    try:
        processor = _transformers().AutoImageProcessor.from_pretrained(
            source.name, local_files_only=not pretrained, trust_remote_code=False
        )
    except Exception as error:  # hub, HTTP, file and configuration errors share no base
        raise UsageError(
            f"{source} has no usable preprocessor_config.json, which says how to prepare images: {_line(error)}"
        ) from error
    return {"kind": "hf", "processor": json.loads(processor.to_json_string())}


class _HfTransform:
    """A Hugging Face image processor as a transform."""

    def __init__(self, settings: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:  # a folder is what the library can pick a class from
            Path(folder, "preprocessor_config.json").write_text(json.dumps(settings["processor"]))
            self._processor = _transformers().AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )

    def __call__(self, image: Image.Image) -> Tensor:
        return self._processor(image, return_tensors="pt")["pixel_values"][0]


def _transformers() -> ModuleType:
    try:
        import transformers  # optional, and slow to import
    except ImportError as error:
        raise UsageError("a hf: model needs transformers: pip install vitquant[hf]") from error
    return transformers


def _hf_name(name: str) -> str:
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser().resolve())
    if not _REPO_ID.fullmatch(name):
        raise UsageError(f"hf:{name} is neither a folder nor of the form hf:ORG/NAME")
    return name


def _require_timm(name: str) -> None:
    if not timm.is_model(name):
        _require_known(name, [*timm.list_models(), "digits"], "model")
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        known = timm.list_pretrained(f"{architecture}.*")
        raise UsageError(f"timm knows no weights {tag!r} of {architecture}: {_some(known, 5)}") from error


def _require_known(name: str, known: list[str], what: str) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "nothing is close"
    raise UsageError(f"unknown {what} {name!r}: {hint} (a model is {ACCEPTED})")


def _load_checkpoint(model: nn.Module, path: Path, source: Source) -> None:
    """Strictly load a state dict, bare or under ``model`` or ``state_dict`` as training scripts write it."""
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a foreign or cut file fails in many ways
        raise UsageError(f"checkpoint {path} cannot be read: {_line(error)}") from error
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(getattr(state[key], 'shape', ()))}, the model's {list(own[key].shape)}"
        for key in own
        if key in state and getattr(state[key], "shape", None) != own[key].shape
    ]
    faults = [f"{what} {_some(keys)}" for what, keys in [("missing", missing), ("unexpected", unexpected)] if keys]
    faults += shapes[:1]
    if faults:
        raise UsageError(f"checkpoint {path} does not fit {source}: {'; '.join(faults)}")
    model.load_state_dict(state)


def _classes(source: Source, model: nn.Module) -> int:
    module: Any = model  # each library has its own attribute
    if source.kind == "hf":
        classes = int(module.config.num_labels)
    elif source.kind == "timm":
        classes = int(module.num_classes)
    else:
        classes = 10 if source.kind == "digits" else 1000
    if classes < 1:
        raise UsageError(f"{source} has no classification head: choose a model with one")
    return classes


def _input_size(source: Source, transform: Transform) -> tuple[int, int, int]:
    """The shape that images of two different forms both get, as batches need it."""
    square, wide = (transform(Image.new("RGB", size)).shape for size in [(320, 320), (480, 320)])
    if square != wide:
        raise UsageError(f"{source} prepares images to different sizes ({list(square)}, {list(wide)}): no batches")
    channels, height, width = square
    return channels, height, width


def _no_weights(source: Source, error: Exception) -> UsageError:
    return UsageError(f"weights of {source} cannot be had ({_line(error)}): pass --checkpoint FILE")


def _some(items: list[str], n: int = 3) -> str:
    more = f" and {len(items) - n} more" if len(items) > n else ""
    return ", ".join(items[:n]) + more


def _line(error: Exception) -> str:
    """An error's message up to its first line break."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))
