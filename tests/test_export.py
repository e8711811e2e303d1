"""Files for real engines: what they hold, that engines compute the same, and how failures are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import vitquant
from vitquant import QuantizedModel
from vitquant.artifact.operands import Weight
from vitquant.errors import ExportError, UsageError
from vitquant.export import Kind, export, lower
from vitquant.export.lower import Codes, Integers, Lowering
from vitquant.export.parity import compare
from vitquant.export.process import Process
from vitquant.numerics import Log, Uniform
from vitquant.numerics.granularity import PER_CHANNEL
from vitquant.trace import Site


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    ).eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
        num_classes=10,
    ).eval()  # fmt: skip


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module, method: str = "deploy-int8", bits: str = "w8a8", **options: object) -> QuantizedModel:
    return vitquant.quantize(model, images(8), method=method, bits=bits, **options)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("build", [vit, swin, hugging_face])
def test_engines_compute_what_the_artifact_does(build: object, attention: bool, format: str, tmp_path: Path) -> None:
    model = quantized(build(), attention=attention)  # type: ignore[operator]
    report = export(model, images(), tmp_path, format)
    assert report.ok, report.summary()
    certificate = report.certificate
    assert certificate is not None and certificate.worst < 1e-5
    # Every activation that is quantized, every product that has a quantized operand, and the logits were compared.
    sites = [str(s) for s in model.sites if s.operand in ("input", "left", "right")]
    assert set(sites) <= {layer.site for layer in certificate.layers}
    assert {v.kind for v in report.verdicts} == {Kind.EXACT}
    signed = {v.role for v in report.verdicts if v.how == "int8 grid"}
    assert signed == ({"query", "key", "value"} if attention else set())
    saved = json.loads((tmp_path / f"{report.path.name}.report.json").read_text())
    assert saved["certificate"]["ok"] and len(saved["verdicts"]) == len(report.verdicts)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize(("method", "bits"), [("fq-vit", "w8a8-attn4"), ("adfq-vit", "w4a4"), ("igq-vit", "w4a4")])
def test_research_formats_are_computed_too(method: str, bits: str, format: str, tmp_path: Path) -> None:
    """FQ-ViT on OpenVINO: the bytes of the embedding's result, flattened and transposed there, came out wrong.
    Layer by layer: random weights put the first two classes within a step of each other."""
    options = {"optimise": False} if method == "adfq-vit" else {}
    model = vitquant.quantize(vit(), images(8), method=method, bits=bits, **options)
    report = export(model, images(), tmp_path, format)
    assert report.certificate is not None and report.certificate.worst < 1e-5, report.summary()
    why = [v.how for v in report.verdicts if v.site == "patch_embed.proj:conv0.output"]
    assert ["OpenVINO" in how for how in why] == ([format == "openvino"] if method == "fq-vit" else [])


def test_a_file_runs_any_batch_and_says_what_it_is(tmp_path: Path) -> None:
    model = quantized(vit())
    report = export(model, images(), tmp_path, "onnx", certify=False)
    session = onnxruntime.InferenceSession(report.path)
    for count in (1, 3):
        x = images(count)
        found = session.run(["logits"], {"image": x.numpy()})[0]
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=0, atol=0.05)
    props = {p.key: p.value for p in onnx.load(report.path).metadata_props}
    assert props["method"] == "deploy-int8" and props["bits"] == "w8a8" and props["classes"] == "10"
    assert "preprocessing" in props


@pytest.mark.parametrize("method", ["deploy-int8", "deploy-w4a8"])
def test_four_bit_weights_are_stored_in_four_bits(method: str, tmp_path: Path) -> None:
    """deploy-int8 is symmetric (int4), deploy-w4a8 asymmetric (uint4, a shift); both decode to the weight."""
    model = quantized(vit(), method, "w4a8")
    path = export(model, images(), tmp_path, "onnx", certify=False).path
    graph = onnx.load(path).graph
    stored = {i.name: i for i in graph.initializer}
    weights = {s: o for s, o in zip(model.sites, model.operands, strict=True) if isinstance(o, Weight)}
    checked = 0
    for site, weight in weights.items():
        codes = stored[f"{site}.codes"]
        if weight.quantizer.bits != 4:
            continue
        checked += 1
        signed = weight.quantizer.code_range[0] < 0
        assert codes.data_type == (TensorProto.INT4 if signed else TensorProto.UINT4)
        assert len(codes.raw_data) == (weight.codes.numel() + 1) // 2
        values = torch.from_numpy(numpy_helper.to_array(codes).astype(np.int32))
        if not signed:
            values = values - torch.from_numpy(numpy_helper.to_array(stored[f"{site}.shift"]).copy())
        scale = torch.from_numpy(numpy_helper.to_array(stored[f"{site}.scale"]).copy())
        if values.shape[-1] == len(scale) and site.call.op == "linear":  # as the engine multiplies, (in, out)
            decoded = (values * scale).T
        else:
            decoded = values * scale.reshape(-1, *[1] * (values.ndim - 1))
        assert torch.equal(decoded, weight.decoded)
    assert checked >= 8
    floats = sum(len(i.raw_data) for i in graph.initializer if i.data_type == TensorProto.FLOAT)
    assert floats < 0.2 * 4 * sum(w.codes.numel() for w in weights.values())  # no weight is there twice


def test_three_bit_log2_is_a_uint8_grid_and_is_certified(tmp_path: Path) -> None:
    """PROBS as log2: every level is a multiple of 2^-6 of the largest; log√2 at 4 bits is not, and stays floating."""
    from vitquant.methods import repq_vit
    from vitquant.recipe import Bits, Recipe, Rule
    from vitquant.trace import Role

    base = repq_vit(Bits(8, 8))
    verdicts = {}
    for name, quantizer in {"log2": Log(3), "log√2": Log(4, steps=2)}.items():
        rules = {**base.rules, Role.PROBS: Rule(quantizer)}
        recipe = Recipe(name, rules, base.passes)
        model = vitquant.quantize(vit(), images(8), method=recipe)
        report = export(model, images(), tmp_path / name, "onnx")
        assert report.ok, report.summary()
        verdicts[name] = {v.kind for v in report.verdicts if v.role == Role.PROBS.value}
    assert verdicts == {"log2": {Kind.EXACT}, "log√2": {Kind.FLOAT}}


def test_an_approximation_says_its_error() -> None:
    model = quantized(vit(), "repq-vit", "w8a8-attn4")
    plain, near = lower(model), lower(model, approximate=True)
    site = next(s for s, low in plain.items() if low.verdict.kind is Kind.FLOAT and "Log" in low.verdict.how)
    verdict = near[site].verdict
    assert verdict.kind is Kind.APPROXIMATE and 0 < verdict.error <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("zero", "bits", "expected"),
    [(120.0, 8, (120, 0, 255)), (-20.0, 4, (0, 20, 35)), (200.0, 4, (200, 0, 15)), (300.0, 8, None), (-3.0, 8, None)],
)
def test_zero_points_outside_the_codes_move_or_fall_back(
    zero: float, bits: int, expected: tuple[int, int, int] | None
) -> None:
    from vitquant.artifact.operands import Activation
    from vitquant.export.lower import _activation
    from vitquant.numerics import Affine

    quantizer = Uniform(bits, include_zero=False)
    params = Affine(torch.tensor([0.1]), torch.tensor([zero]))
    kind, _, _, form = _activation(Activation(quantizer, params), False)
    if expected is None:
        assert kind is Kind.FLOAT and form is None
        return
    assert (form.zero, form.low, form.high) == expected
    x = torch.randn(1000) * 10 - zero * 0.1
    codes = (x / form.step).round().add(form.zero).clamp(form.low, form.high)
    assert torch.equal((codes - form.zero) * form.step, quantizer.fake_quantize(x, params))


def test_a_wrong_result_is_found_and_named(tmp_path: Path) -> None:
    """The certificate compares against the artifact, so a file with one scale off must name that operand."""
    model = quantized(vit())
    lowered = lower(model)
    site = next(s for s in model.sites if str(s) == "blocks.1.mlp.fc1:linear0.input")
    form = lowered[site].form
    assert isinstance(form, Codes)
    wrong = Codes(form.step * 1.01, form.zero, form.low, form.high, form.rounds)
    from vitquant.export import onnx as to_onnx
    from vitquant.export import parity
    from vitquant.export.lower import MarkedModel

    changed = {**lowered, site: Lowering(lowered[site].verdict, wrong)}
    traced = to_onnx.trace(MarkedModel(model, changed), images(2))
    graph, names = to_onnx.realise(traced, changed, {}, taps=lambda _: True)
    onnx.save(graph, tmp_path / "tapped.onnx")
    found = parity.run("onnxruntime", tmp_path / "tapped.onnx", images(2), lambda _: None)
    tensors = {s: found[n] for s, n in names.items()}
    layers = compare(model, images(2), changed, {**tensors, "logits": found["logits"]})
    assert [layer.site for layer in layers if not layer.ok] == [str(site)]
    failing = parity.Certificate("onnxruntime", layers, 1.0, 2, 0.5)
    assert not failing.ok and str(site) in str(failing.failure)


def test_channel_scales_fall_back_and_keep_the_product_whole() -> None:
    from vitquant.methods import minmax
    from vitquant.recipe import Bits, Recipe, Rule
    from vitquant.trace import Role

    base = minmax(Bits(8, 8))
    rules = {**base.rules, Role.POST_NORM: Rule(Uniform(8, PER_CHANNEL))}
    model = vitquant.quantize(vit(), images(8), method=Recipe("channels", rules, base.passes))
    lowered = lower(model)
    for site, low in lowered.items():
        if low.verdict.role == Role.POST_NORM.value:
            assert low.verdict.kind is Kind.FLOAT and low.form is None
            weight = lowered[Site(site.call, "weight")]
            assert isinstance(weight.form, Integers) and not weight.form.computed
            assert weight.verdict.kind is Kind.FLOAT


class Strange(nn.Module):
    """Uses an operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.strange = nn.Linear(12, 4), Bessel()

    def forward(self, x: Tensor) -> Tensor:
        return self.strange(self.head(x.flatten(1)))


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_a_missing_operator_is_named_with_its_place(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 2, 2)
    model = vitquant.quantize(Strange(), x, method="minmax", bits="w8a8")
    with pytest.raises(ExportError, match=r"^strange: .*bessel_j0"):
        export(model, x, tmp_path, "onnx")


def test_an_engine_that_refuses_or_dies_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with Process("onnxruntime", tmp_path / "model.onnx") as process, pytest.raises(ExportError) as refused:
        process.ask(peak=True)
    assert "\n" not in str(refused.value) and "model.onnx" in str(refused.value)
    with Process("onnxruntime", tmp_path / "model.onnx") as process, pytest.raises(ExportError, match="SIGKILL"):
        process.process.kill()
        process.ask(peak=True)


def test_the_program_of_torch_export_is_the_simulation(tmp_path: Path) -> None:
    model = quantized(vit(), "repq-vit", "w4a8")
    report = export(model, images(), tmp_path, "torch")
    assert report.ok, report.summary()
    x = images(3)
    program = torch.export.load(report.path).module()
    with torch.no_grad():
        assert torch.equal(program(x)[0], model(x))


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="onnx, openvino, torch"):
        export(quantized(vit()), images(), tmp_path, "tensorrt")


def test_eight_bit_asymmetric_weights_stay_integers(tmp_path: Path) -> None:
    report = export(quantized(vit(), "minmax", "w8a8"), images(), tmp_path, "onnx")
    assert report.ok, report.summary()
    assert all(v.kind is Kind.EXACT for v in report.verdicts if v.role == "weight")
