"""The command line as a person uses it: the forms relied on from outside, and every mistake in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vitquant import METHODS, cli
from vitquant.models import load, parse


def run(*words: object) -> int:
    """Exit code of `vitquant words...`."""
    argv, sys.argv = sys.argv, ["vitquant", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = argv
    return 0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "out"
    assert run("quantize", "--output", folder, "--json", folder.parent / "quantize.json") == 0
    return folder


def test_the_embedded_default(artifact: Path) -> None:
    said = json.loads((artifact.parent / "quantize.json").read_text())
    assert said["full_precision_top1"] > 97 and said["top1"] > 90
    assert said["bytes"] == sum(f.stat().st_size for f in artifact.iterdir())
    assert {f.name for f in artifact.iterdir()} == {"config.json", "model.safetensors"}


def test_evaluate_tells_everything(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("evaluate", artifact, "--json", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    needed = {"top1", "top5", "images", "agreement", "kl", "bytes", "bits", "bops", "seconds", "sqnr", "worst_sqnr"}
    assert needed <= report.keys()
    assert report["bits"]["weight"] == 4 and 4 <= report["bits"]["activation"] < 4.1
    assert report["images"] == 360 and report["agreement"] > 90 and 0 < report["kl"] < 0.5
    assert len(report["worst_sqnr"]) == 10
    decibels = [row["db"] for row in report["worst_sqnr"]]
    assert decibels == sorted(decibels) and decibels[0] == min(v for v in report["sqnr"].values() if v is not None)
    assert "SQNR" in capsys.readouterr().out


def test_evaluate_full_precision(tmp_path: Path) -> None:
    assert run("evaluate", "digits", "--json", tmp_path / "r.json", "--limit", 100) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["top1"] > 95 and report["images"] == 100 and report["agreement"] is None
    assert report["bits"] == {"weight": 32.0, "activation": 32.0}


def test_looking(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("sites", "digits", "--json", tmp_path / "s.json") == 0
    rows = json.loads((tmp_path / "s.json").read_text())["sites"]
    assert {"query", "key", "value", "attention probabilities", "weight"} <= {r["role"] for r in rows}
    assert run("methods", "--json", tmp_path / "m.json") == 0
    methods = json.loads((tmp_path / "m.json").read_text())["methods"]
    assert [m["name"] for m in methods] == list(METHODS)
    assert all(m["source"] and m["summary"] and m["cost"] and m["sites"] and m["bits"] for m in methods)
    assert run("inspect", artifact, "--json", tmp_path / "i.json") == 0
    assert "Uniform4" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes(artifact: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert run("quantize", "--output", tmp_path / name, "--seed", seed) == 0
    tensors = [p / "model.safetensors" for p in (artifact, tmp_path / "same", tmp_path / "other")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes() != tensors[2].read_bytes()
    assert (artifact / "config.json").read_bytes() == (tmp_path / "same" / "config.json").read_bytes()


def test_export_certifies(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--output", tmp_path / "onnx", "--images", 64, "--json", tmp_path / "e.json")
    assert run("export", artifact, "--format", "onnx", *words) == 0
    assert "exact" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())
    assert run("export", artifact, "--format", "tensorflow", "--output", tmp_path / "tf") == 2


def test_help_has_examples(capsys: pytest.CaptureFixture) -> None:
    assert run("quantize", "--help") == 0
    assert "vitquant quantize deit_tiny_patch16_224 --checkpoint" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images and one file that is none, in two classes named by wnid."""
    root = tmp_path_factory.mktemp("images")
    for i, wnid in enumerate(("n01440764", "n01443537")):
        (root / wnid).mkdir()
        for j in range(2):
            Image.new("RGB", (40, 40), (60 * i, 90 * j, 9)).save(root / wnid / f"{j}.png")
    (root / "n01440764" / "broken.jpg").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(0)
    save_file(load(parse("deit_tiny_patch16_224"), pretrained=False).model.state_dict(), path)
    return path


MISTAKES = {
    "unknown model": (["quantize", "deit_tinny_patch16_224"], "deit_tiny_patch16_224"),
    "unknown method": (["quantize", "--method", "repq"], "repq-vit"),
    "bits out of range": (["quantize", "--bits", "w9a4"], "2 to 8"),
    "bits malformed": (["quantize", "--bits", "4bit"], "w4a4"),
    "no checkpoint": (["quantize", "deit_tiny_patch16_224", "--checkpoint", "gone.safetensors"], "gone.safetensors"),
    "no data": (["quantize", "torchvision:vit_b_16x"], "torchvision model"),
    "no folder": (["quantize", "digits", "--data", "/nowhere"], "/nowhere"),
    "not an artifact": (["evaluate", "."], "not a vitquant artifact"),
    "unknown option": (["quantize", "--nonsense"], "--nonsense"),
    "too few images": (["quantize", "--images", "99999"], "99999"),
    "no such device": (["quantize", "--device", "warp9"], "warp9"),
    "unknown method option": (["quantize", "--set", "colour=blue"], "colour"),
    "bad method option": (["quantize", "--set", "colour"], "NAME=VALUE"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    assert run(*words) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_named_and_counted(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = ("quantize", "deit_tiny_patch16_224", "--checkpoint", weights, "--output", tmp_path / "out")
    assert run(*model, "--data", folder, "--images", 5, "--method", "minmax") == 2
    said = capsys.readouterr().err
    assert "1 of 5" in said and "broken.jpg" in said


def test_nan_is_named_by_its_site(folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import load_file

    state = load_file(weights)
    state["blocks.3.mlp.fc1.bias"][0] = torch.nan
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "a.png")
    model = ("quantize", "deit_tiny_patch16_224", "--checkpoint", tmp_path / "w.safetensors")
    assert (
        run(*model, "--data", tmp_path / "data", "--images", 1, "--method", "minmax", "--output", tmp_path / "o") == 2
    )
    assert "blocks.3.mlp.fc2:linear0.input" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_repq_vit_on_the_real_deit_tiny(shared_data: Path, tmp_path: Path) -> None:
    """The released RepQ-ViT code gets 64.2 (mean of three seeds) on these weights and images."""
    model = ("--checkpoint", shared_data / "deit_tiny" / "deit_tiny_patch16_224.safetensors")
    data = ("--data", shared_data / "imagenet")
    words = ("--method", "repq-vit", "--bits", "w4a4", "--images", 32, "--seed", 0, "--output", tmp_path / "out")
    assert run("quantize", "deit_tiny_patch16_224", *model, *data, *words) == 0
    assert run("evaluate", tmp_path / "out", *data, "--json", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["top1"] > 61 and report["images"] == 1000
