"""Specs, loading without a network, and preprocessing that survives JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from vitquant.errors import ArtifactError, UsageError
from vitquant.models import Loaded, Source, load, logits_of, parse, transform_from

TIMM = "test_vit"  # timm's own tiny one, 160 x 160


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def through_json(loaded: Loaded) -> Loaded:
    """What a saved artifact does: build the model again from JSON, without weights."""
    stored = json.loads(json.dumps([loaded.source.to_json(), loaded.config, loaded.preprocessing]))
    source, config, preprocessing = stored
    return load(Source.from_json(source), pretrained=False, config=config, preprocessing=preprocessing)


@pytest.fixture(scope="module")
def timm_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model(TIMM).state_dict()


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32
    )
    config.num_labels = 7
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(
    ("spec", "kind", "name"),
    [
        ("deit_tiny_patch16_224", "timm", "deit_tiny_patch16_224"),
        ("vit_base_patch16_224.augreg_in21k", "timm", "vit_base_patch16_224.augreg_in21k"),
        ("hf:google/vit-base-patch16-224", "hf", "google/vit-base-patch16-224"),
        ("torchvision:swin_t", "torchvision", "swin_t"),
        ("digits", "digits", "digits"),
    ],
)
def test_a_spec_parses_prints_and_survives_json(spec: str, kind: str, name: str) -> None:
    source = parse(spec)
    assert source == Source(kind, name, None)
    assert str(source) == spec
    assert Source.from_json(json.loads(json.dumps(source.to_json()))) == source


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("deit_tinny_patch16_224", "deit_tiny_patch16_224"),
        ("digit", "digits"),
        ("torchvision:vit_b_61", "vit_b_16"),
        ("vit_base_patch16_224.nonsense", "augreg"),
        ("hf:a/b/c", "ORG/NAME"),
        ("qqqqqqqqqqqqqqq", "nothing is close"),
        ("", "torchvision:NAME"),
    ],
)
def test_an_unknown_model_is_told_what_would_do(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_checked_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    Path("w.npz").touch()
    assert parse(TIMM, Path("w.pth")).checkpoint == str(tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"none\.pth is not a file"):
        parse(TIMM, Path("none.pth"))
    with pytest.raises(UsageError, match=r"w\.npz must end in \.safetensors"):
        parse(TIMM, Path("w.npz"))
    with pytest.raises(UsageError, match="brings its own weights"):
        parse("hf:a/b", Path("w.pth"))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "ftp", "name": "x", "checkpoint": None},
        {"kind": "timm", "name": 3, "checkpoint": None},
        [],
    ],
)
def test_a_foreign_source_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="not a model source"):
        Source.from_json(data)


@pytest.mark.parametrize("form", ["safetensors", "pth", "nested", "half"])
def test_a_timm_checkpoint_loads(form: str, tmp_path: Path, timm_state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / ("w.safetensors" if form in ("safetensors", "half") else "w.pth")
    if form == "safetensors":
        save_file(timm_state, path)
    elif form == "half":
        save_file({key: value.half() for key, value in timm_state.items()}, path)
    else:
        torch.save({"model": timm_state} if form == "nested" else timm_state, path)
    loaded = load(parse(TIMM, path))
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, timm_state[key].half().float() if form == "half" else timm_state[key])
    assert (loaded.classes, loaded.label_space, loaded.config) == (1000, "imagenet-1k", None)
    assert loaded.input_size == (3, 160, 160)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "garbage", "pickle"])
def test_a_checkpoint_that_does_not_fit_is_named(
    fault: str, tmp_path: Path, timm_state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "w.pth"
    state: dict[str, object] = dict(timm_state)
    if fault == "missing":
        del state["norm.weight"]
    elif fault == "unexpected":
        state["extra"] = torch.zeros(1)
    elif fault == "shape":
        state["head.bias"] = torch.zeros(10)
    elif fault == "pickle":
        state = {"model": SimpleNamespace()}
    torch.save(state, path)
    if fault == "garbage":
        path.write_bytes(b"not a checkpoint")
    messages = {
        "missing": r"w\.pth does not fit test_vit: missing norm\.weight$",
        "unexpected": r"does not fit test_vit: unexpected extra$",
        "shape": r"head\.bias is \[10\], the model's \[1000\]$",
        "garbage": r"w\.pth cannot be read",
        "pickle": r"w\.pth cannot be read",
    }
    with pytest.raises(UsageError, match=messages[fault]) as caught:
        load(parse(TIMM, path))
    assert "\n" not in str(caught.value)


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> nn.Module:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("timm.create_model", offline)
    monkeypatch.setattr("torchvision.models.get_model", offline)
    for spec in (TIMM, "torchvision:vit_b_16"):
        with pytest.raises(UsageError, match=rf"{spec} cannot be had \(no route\): pass --checkpoint FILE"):
            load(parse(spec))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UsageError, match="no classification head"):
        load(parse("vit_small_patch14_dinov2.lvd142m"), pretrained=False)


def test_timm_preprocessing_is_the_models_own_and_survives_json() -> None:
    loaded = load(parse(TIMM), pretrained=False)
    config = timm.data.resolve_model_data_config(loaded.model)
    theirs = timm.data.create_transform(**config, is_training=False)
    again = through_json(loaded)
    image = photo(300, 200)
    assert torch.equal(loaded.transform(image), theirs(image))
    assert torch.equal(again.transform(image), theirs(image))
    assert again.preprocessing == loaded.preprocessing


def test_a_stored_preprocessing_replaces_the_models_own() -> None:
    own = load(parse(TIMM), pretrained=False)
    other = {**own.preprocessing, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    loaded = load(parse(TIMM), pretrained=False, preprocessing=other)
    assert loaded.preprocessing == other
    image = photo(200, 200)
    assert torch.allclose(loaded.transform(image), own.transform(image) * 0.5 + 0.5, atol=1e-6)


def test_torchvision_preprocessing_is_that_of_the_weights(tmp_path: Path) -> None:
    state = torchvision.models.get_model("swin_t").state_dict()
    torch.save(state, tmp_path / "swin.pth")
    loaded = load(parse("torchvision:swin_t", tmp_path / "swin.pth"))
    theirs = torchvision.models.get_model_weights("swin_t").DEFAULT.transforms()
    image = photo(320, 400)
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())
    assert torch.equal(loaded.transform(image), theirs(image))
    assert torch.equal(through_json(loaded).transform(image), theirs(image))
    assert (loaded.input_size, loaded.label_space) == ((3, 224, 224), "imagenet-1k")


def test_a_torchvision_vit_is_built_for_its_weights_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    build = torchvision.models.get_model

    def without_memory(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.device("meta"):
            return build(*args, **kwargs)

    monkeypatch.setattr("torchvision.models.get_model", without_memory)
    loaded = load(parse("torchvision:vit_h_14"), pretrained=False)
    assert loaded.input_size == (3, 518, 518)
    assert loaded.model.image_size == 518


def test_a_hugging_face_folder_loads_and_is_built_again_without_it(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    copy = hf_folder.rename(tmp_path / "moved")
    loaded = load(parse(f"hf:{copy}"))
    theirs = transformers.AutoModelForImageClassification.from_pretrained(copy)
    image = photo(50, 40)
    pixels = transformers.AutoImageProcessor.from_pretrained(copy)(image, return_tensors="pt")["pixel_values"]
    copy.rename(hf_folder)  # gone from where the source says it is

    assert same_weights(loaded.model, theirs)
    assert torch.equal(loaded.transform(image), pixels[0])
    assert (loaded.classes, loaded.label_space, loaded.input_size) == (7, None, (3, 32, 32))
    assert logits_of(loaded.model(pixels)).shape == (1, 7)

    again = through_json(loaded)
    again.model.load_state_dict(loaded.model.state_dict())
    assert torch.equal(again.transform(image), pixels[0])
    assert torch.equal(again.model(pixels).logits, loaded.model(pixels).logits)
    assert again.config == loaded.config


def test_a_hugging_face_folder_without_a_processor_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    for file in hf_folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match=r"preprocessor_config\.json") as caught:
        load(parse(f"hf:{tmp_path}"))
    assert "\n" not in str(caught.value)


def test_a_hugging_face_backbone_without_a_head_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    import transformers

    transformers.ViTModel.from_pretrained(hf_folder).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no weights for classifier\.bias, classifier\.weight"):
        load(parse(f"hf:{tmp_path}"))


def test_an_empty_hugging_face_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"hf:{tmp_path} cannot be loaded") as caught:
        load(parse(f"hf:{tmp_path}"))
    assert "\n" not in str(caught.value)


def test_a_hugging_face_model_needs_transformers(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install vitquant\[hf\]"):
        load(parse(f"hf:{hf_folder}"))


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"kind": "magic"},
        {},
        {"kind": "timm", "colour": "blue"},
        {"kind": "torchvision", "resize_size": [256]},
        {"kind": "hf", "processor": {}},
    ],
)
def test_a_foreign_preprocessing_is_refused(preprocessing: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="preprocessing of kind") as caught:
        transform_from(preprocessing)
    assert "\n" not in str(caught.value)


def test_logits_are_found_in_what_models_return() -> None:
    logits, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert logits_of(logits) is logits
    assert logits_of(SimpleNamespace(hidden=other, logits=logits)) is logits
    assert logits_of((None, logits, other)) is logits
    assert logits_of({"loss": None, "out": logits}) is logits
    for nothing in (None, (), {"loss": 1.0}, "logits"):
        with pytest.raises(UsageError, match=type(nothing).__name__):
            logits_of(nothing)
