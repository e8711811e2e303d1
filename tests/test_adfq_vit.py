"""ADFQ-ViT: its formats, searches and losses, and the method as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vitquant
from vitquant.calibrate import Inliers, MinMax, Sample, ScaleZero
from vitquant.errors import UsageError
from vitquant.integer.linears import OutlierLinear
from vitquant.methods.adfq_vit import AttentionScore, scores_over_heads, scores_over_keys
from vitquant.numerics import (
    PER_OUTPUT,
    PER_TENSOR,
    PER_TOKEN,
    OutlierAware,
    ShiftLog,
    ShiftLogScale,
    Uniform,
    fold_minimum,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(*shape: int, seed: int = 0) -> Tensor:
    x = noise(*shape, seed=seed)
    x.view(-1)[::37] *= 8
    return x


def grid_of(quantizer: OutlierAware, x: Tensor, budget: float | None = None) -> tuple:
    return Inliers(budget=budget)(quantizer, Sample.of(quantizer.granularity.view(x)))


formats = st.sampled_from(
    [OutlierAware(b, g, 3.0, d) for b in (2, 4, 8) for g, d in ((PER_TOKEN, False), (PER_TENSOR, True))]
    + [ShiftLog(b, PER_TENSOR, s) for b in (3, 4, 6) for s in (1, 2)]
    + [ShiftLog(4, extra_zero=True), ShiftLog(4, runtime_minimum=True)]
)


@settings(max_examples=60, deadline=None)
@given(formats, st.integers(0, 99), st.floats(1e-2, 1e3))
def test_laws(quantizer: OutlierAware | ShiftLog, seed: int, size: float) -> None:
    x = with_outliers(2, 5, 24, seed=seed) * size
    low, high = quantizer.granularity.view(x).aminmax(dim=1)
    p = quantizer.fit(low, high)
    resolved = quantizer.resolve(x, p)
    codes = quantizer.encode_resolved(x, resolved)
    assert torch.equal(codes, codes.round()) and codes.unique().numel() <= quantizer.levels
    assert codes.min() >= quantizer.code_range[0] and codes.max() <= quantizer.code_range[1]
    with torch.no_grad():
        assert torch.equal(quantizer.fake_quantize(x, p), quantizer.decode_resolved(codes, resolved))


@pytest.mark.parametrize("dynamic", [False, True])
def test_outliers_are_exact_and_inliers_within_half_a_step(dynamic: bool) -> None:
    x = with_outliers(4, 7, 48)
    quantizer = OutlierAware(4, PER_TENSOR if dynamic else PER_TOKEN, 3.0, dynamic)
    p = quantizer.fit(*quantizer.granularity.view(x).aminmax(dim=1))
    y, large = quantizer.fake_quantize(x, p), x.abs() > 3
    assert bool(large.any()) and torch.equal(y[large], x[large])
    step = quantizer.resolve(x, p).scale.expand_as(x)
    assert bool(((y - x).abs() <= 0.501 * step)[~large].all())


@pytest.mark.parametrize("dynamic", [False, True])
def test_execution_as_gemm_plus_spmm_equals_the_simulation(dynamic: bool) -> None:
    x, weight, bias = with_outliers(3, 7, 48), noise(20, 48, seed=1), noise(20, seed=2)
    quantizer = OutlierAware(4, PER_TENSOR if dynamic else PER_TOKEN, 3.0, dynamic)
    p = grid_of(quantizer, x)
    for weights in (Uniform(4, PER_OUTPUT), Uniform(8, PER_OUTPUT, symmetric=True)):
        grid = weights.fit(*weight.aminmax(dim=1))
        codes = weights.encode(weight, grid)
        simulated = nn.functional.linear(quantizer.fake_quantize(x, p), weights.decode(codes, grid), bias)
        values = codes - grid.zero[:, None]
        executed = OutlierLinear(quantizer, p, values, grid.scale).linear(x, weight, bias)
        assert torch.allclose(executed, simulated, rtol=1e-5, atol=1e-5 * float(simulated.abs().max()))


def test_the_dynamic_variant_takes_any_number_of_tokens_and_the_static_one_says_why_not() -> None:
    x, longer = with_outliers(2, 7, 24), with_outliers(2, 9, 24)
    dynamic, static = OutlierAware(4, PER_TENSOR, 3.0, True), OutlierAware(4, threshold=3.0)
    assert dynamic.fake_quantize(longer, grid_of(dynamic, x)).shape == longer.shape
    with pytest.raises(UsageError, match=r"7 tokens.*dynamic=True"):
        static.fake_quantize(longer, grid_of(static, x))


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.1])
def test_a_budget_sets_the_threshold_and_its_cost_is_counted(budget: float) -> None:
    x = with_outliers(8, 7, 96)
    p = grid_of(OutlierAware(4), x, budget)
    observed = (x.abs() > p.threshold[0]).float().mean().item()
    assert observed <= budget + 1e-6 and observed >= budget - 0.002
    assert float(p.fraction.mean()) == pytest.approx(observed, abs=1e-6)
    assert OutlierAware(4).mean_bits(p) == pytest.approx(4 + 48 * observed, abs=1e-4)


def test_shift_log_worked_values() -> None:
    x = torch.tensor([-0.16997, -0.1, 0.0, 0.5, 3.0])
    p = ShiftLogScale(torch.tensor([4.0]), torch.tensor([-0.17]))
    wanted = torch.tensor([-0.17, -0.1075, 0.0068, 0.5371, 2.6584])
    for quantizer, flushed in ((ShiftLog(4), 15), (ShiftLog(4, extra_zero=True), 16)):
        assert quantizer.encode(x, p).tolist() == [flushed, 12, 9, 5, 1]
        assert torch.allclose(quantizer.decode(quantizer.encode(x, p), p), wanted, atol=6e-5)


def test_the_shift_is_gelus_minimum_or_the_observed_one() -> None:
    low, high = torch.tensor([-0.16, -0.278, 0.0]), torch.ones(3)
    assert ShiftLog(4).fit(low, high).minimum.tolist() == pytest.approx([-0.17, -0.278, 0.0])
    gelu = nn.functional.gelu(torch.linspace(-5, 5, 20001, dtype=torch.float64))
    assert -0.17 < float(gelu.min()) < -0.16997


def test_the_runtime_minimum_depends_on_the_batch_and_the_constant_does_not() -> None:
    x = nn.functional.gelu(noise(2, 5, 24))
    x[1].clamp_(min=0.0)
    for quantizer, alone in ((ShiftLog(4), True), (ShiftLog(4, runtime_minimum=True), False)):
        p = quantizer.fit(x.min()[None], x.max()[None])
        assert torch.equal(quantizer.fake_quantize(x, p)[1:], quantizer.fake_quantize(x[1:], p)) is alone


def test_the_shift_folds_exactly_into_the_bias() -> None:
    quantizer, x = ShiftLog(4), nn.functional.gelu(noise(3, 5, 24))
    p = quantizer.fit(x.min()[None], x.max()[None])
    weight, bias, y = noise(8, 24, seed=1).double(), noise(8, seed=2).double(), quantizer.fake_quantize(x, p).double()
    for b in (bias, None):
        folded = nn.functional.linear(y - p.minimum.double(), weight, fold_minimum(weight, b, p.minimum.double()))
        assert torch.allclose(folded, nn.functional.linear(y, weight, b), rtol=1e-12, atol=1e-12)


def brute_force(x: Tensor, bits: int, steps: int) -> float:
    """The least mean |x - x̂|^2.4 over all candidates, one after the other."""
    full, best = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / (2**bits - 1), float("inf")
    for i in range(1, steps + 1):
        for zero in range(2**bits):
            scale = full * i / steps
            y = ((x / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
            best = min(best, float((x - y).abs().pow(2.4).mean()))
    return best


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_scale_zero_search_finds_the_best_of_all_candidates(shift: float) -> None:
    x = with_outliers(400) + shift
    quantizer = Uniform(3)
    p = ScaleZero(steps=20)(quantizer, Sample.of(x[None]))
    error = float((x - quantizer.fake_quantize(x, p)).abs().pow(2.4).mean())
    assert error <= brute_force(x, 3, 20) * 1.005
    widest = MinMax()(quantizer, Sample.of(x[None]))
    assert error < float((x - quantizer.fake_quantize(x, widest)).abs().pow(2.4).mean())


def test_both_score_terms_are_zero_for_equal_scores_and_have_their_definitions() -> None:
    full, low = (torch.softmax(noise(2, 3, 5, 5, seed=s) * 2, -1) for s in (1, 2))
    assert abs(float(scores_over_keys(full, full))) < 1e-5 and abs(float(scores_over_heads(full, full))) < 1e-6
    keys = (full * (full.log() - low.log())).sum((-1, -2)).mean()
    assert float(scores_over_keys(low, full)) == pytest.approx(float(keys), rel=1e-4)
    p, q = torch.softmax(low / 4, 1), torch.softmax(full / 4, 1)
    assert float(scores_over_heads(low, full)) == pytest.approx(float((p * (p.log() - q.log())).sum() / 2), rel=1e-3)
    assert AttentionScore("as-released") != AttentionScore("intended")


def small() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", **options).eval()


@pytest.mark.parametrize("form", ["intended", "as-released"])
def test_both_forms_run_and_survive_saving(form: str, tmp_path: Path) -> None:
    model, x = small(), noise(6, 3, 32, 32)
    options = {"form": form, "iterations": 4, "threshold": 2.0}
    quantized = vitquant.quantize(model, x, "adfq-vit", "w4a4", **options)  # type: ignore[arg-type]
    loaded = vitquant.load(quantized.save(tmp_path / "saved"), model)
    assert torch.equal(quantized(x), loaded(x)) and not torch.equal(quantized(x), model(x))
    bits = quantized.ledger.bits()
    assert bits["weight"] == 4 and bits["activation"] > 4.1


def test_released_choices_are_switches() -> None:
    options = {"extra_level": True, "runtime_minimum": True, "image_bits": 4, "log_steps": 1, "dynamic": True}
    table = vitquant.quantize(small(), noise(4, 3, 32, 32), "adfq-vit", "w4a4", optimise=False, **options).table()
    assert "4.087" in table and "OutlierAware4 / tensor" in table
    with pytest.raises(UsageError, match="as-released"):
        vitquant.quantize(small(), noise(4, 3, 32, 32), "adfq-vit", form="released")


def test_gradients_reach_values_and_fc1_only_in_the_intended_form() -> None:
    """As released, the output's error gives the first linear of an MLP no gradient at all."""
    from vitquant.numerics.gradient import stopped, straight_through

    quantizer, x = ShiftLog(4), noise(2, 5, 24)
    weight = noise(24, 24, seed=1).requires_grad_()
    p = quantizer.fit(torch.tensor([-0.17]), torch.tensor([3.0]))
    for fake_quantize, reached in ((straight_through, True), (stopped, False)):
        y = fake_quantize(quantizer, nn.functional.gelu(x @ weight.T), p)
        assert (y.requires_grad and bool(torch.autograd.grad(y.sum(), weight)[0].any())) is reached


def test_per_token_grids_find_the_tokens_in_every_library() -> None:
    """torchvision's attention is given its tokens first; 17 of them, not the images, have a grid each."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 1, 3, 24, 48, num_classes=10).eval()
    quantized = vitquant.quantize(model, noise(3, 3, 32, 32), "adfq-vit", "w4a4", optimise=False)
    sizes = [len(o.scale) for o in quantized.operands if isinstance(getattr(o, "quantizer", None), OutlierAware)]
    assert sizes == [17, 17] and quantized(noise(5, 3, 32, 32)).shape == (5, 10)
