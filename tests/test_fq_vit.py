"""FQ-ViT: worked values, laws, and the same integers in floating-point and in integer tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitquant
from vitquant.artifact import QuantizedModel
from vitquant.calibrate import MovingAverage, PowerOfTwoMse, Sample
from vitquant.errors import AccumulatorOverflow, NonFinite, PlanError, UsageError
from vitquant.integer import (
    Floats,
    dyadic,
    fitting,
    ibert_exp,
    integer_exp,
    isqrt,
    log_int_softmax,
    log_quotient,
    norm_bounds,
    token_scale,
    width,
)
from vitquant.integer.layer_norm import channel_affine, fraction_bits, integer_epsilon, integer_layer_norm
from vitquant.numerics import PowerOfTwo, PowerOfTwoScale

LOGITS = torch.tensor([40, 35, 30, 20, 0, -60])


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model.eval()


IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def both(model: QuantizedModel, images: Tensor) -> list[dict[str, Tensor]]:
    """Every integer that every operation returned, in both executions."""
    runs = []
    for integers_only in (False, True):
        mode, outputs = model.execution(integers_only), {}
        mode.outputs = outputs
        with torch.no_grad(), mode:
            model.model(images)
        runs.append({str(key): x for key, x in outputs.items()})
    return runs


# --- worked values (specs, D.6)


def test_ibert_exponential_and_log_int_softmax_give_the_worked_values() -> None:
    exps = ibert_exp(LOGITS - LOGITS.max(), 0.1)
    assert exps.tolist() == [299573968896, 181462368256, 111132278784, 41070624768, 5670699008, 15007744]
    total = exps.sum()
    assert ((2 * total + exps) // (2 * exps)).tolist() == [2, 4, 6, 16, 113, 42573]
    assert log_quotient(exps, total).tolist() == [1, 2, 3, 4, 7, 15]
    assert log_int_softmax(LOGITS, 0.1, faithful=True).tolist() == [1, 2, 3, 4, 7, 15]
    assert log_int_softmax(LOGITS, 0.1).tolist() == [1, 2, 3, 4, 7, 15]


@pytest.mark.parametrize(("x", "m", "n"), [(0.3, 153, 9), (1.0, 128, 7), (0.017, 139, 13)])
def test_dyadic_numbers_give_the_worked_values(x: float, m: int, n: int) -> None:
    assert [t.item() for t in dyadic(torch.tensor(x), floor=True)] == [m, n]


def test_power_of_two_factor_gives_the_worked_values() -> None:
    quantizer = PowerOfTwo(8)
    values = torch.tensor([[-2.3, 0.4, 1.1, 5.0], [-100.0, 155.0, 3.0, 7.0]])
    p = PowerOfTwoMse()(quantizer, Sample.of(values))
    assert (p.scale.item(), p.zero.item(), p.alpha[0].item()) == (0.125, 100, 0)
    errors = []
    for alpha in range(4):
        fixed = PowerOfTwoScale(p.scale, p.zero, torch.tensor([alpha, 3.0]))
        errors.append((quantizer.fake_quantize(values.T, fixed)[:, 0] - values[0]).square().mean().item())
    assert errors == pytest.approx([0.00094, 0.00562, 0.01500, 0.06500], abs=1e-5)


# --- laws


@given(st.lists(st.integers(0, 2**61), min_size=1, max_size=50))
def test_isqrt_is_exact(values: list[int]) -> None:
    assert isqrt(torch.tensor(values)).tolist() == [math.isqrt(v) for v in values]


@given(st.floats(1e-6, 1e6), st.integers(4, 12))
def test_a_dyadic_number_is_off_by_at_most_half_a_unit(x: float, bits: int) -> None:
    m, n = dyadic(torch.tensor(x, dtype=torch.float64), bits)
    if 0 < n < 31:
        assert abs(m.item() / 2 ** n.item() / x - 1) <= 2.0 ** -(bits - 1)


@settings(deadline=None)
@given(st.floats(0.001, 0.7))
def test_the_exponential_has_the_right_temperature_where_the_released_one_has_not(scale: float) -> None:
    x = -torch.arange(0, math.ceil(5 / scale))
    true = torch.exp(x.double() * scale)
    ours = integer_exp(x, scale, 16).double() / 2**16
    assert (ours - true).abs().max() < 4e-3
    assert bool((ours.diff() <= 0).all())


def test_the_released_exponential_has_another_temperature() -> None:
    scale = 0.4  # ⌊-0.6931 / 0.4⌋ = -2: the base is e^0.8, not 2
    released = ibert_exp(torch.tensor([0, -10]), scale).double()
    assert (released[1] / released[0]).log() / (10 * scale) == pytest.approx(-math.log(2) / 0.8, rel=0.02)
    assert released[0] > 2**31


@given(st.integers(0, 2**31), st.integers(2, 300))
def test_log_int_softmax_of_a_row_sums_to_at_most_one_and_a_half(seed: int, terms: int) -> None:
    x = torch.randint(-128, 128, (4, terms), generator=torch.Generator().manual_seed(seed))
    codes = log_int_softmax(x, 0.05)
    assert codes.min() >= 0 and codes.max() <= 15
    assert torch.exp2(-codes.double()).where(codes < 15, 0).sum(-1).max() <= 1.5


@given(st.integers(0, 2**31))
def test_power_of_two_codes_are_their_own_fixed_point(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 7, generator=generator) * torch.exp2(torch.randint(-4, 4, (7,), generator=generator))
    quantizer = PowerOfTwo(8)
    p = quantizer.fit(x.amin((0, 1)), x.amax((0, 1)))
    codes = quantizer.encode(x, p)
    assert codes.min() >= 0 and codes.max() <= 255 and torch.equal(codes, codes.round())
    assert torch.equal(quantizer.fake_quantize(x, p), quantizer.decode(codes, p))
    assert torch.equal(quantizer.encode(quantizer.decode(codes, p), p), codes)


def test_searched_exponents_are_never_worse_than_any_fixed_one() -> None:
    x = torch.randn(6, 400) * torch.tensor([0.1, 0.5, 1, 4, 20, 60])[:, None]
    quantizer = PowerOfTwo(8)
    found = PowerOfTwoMse()(quantizer, Sample.of(x))
    best = (quantizer.fake_quantize(x.T, found) - x.T).square().mean(0)
    for alpha in range(4):
        other = found._replace(alpha=torch.full((6,), float(alpha)))
        assert bool((best <= (quantizer.fake_quantize(x.T, other) - x.T).square().mean(0)).all())


def test_the_moving_average_starts_at_the_first_batch() -> None:
    collector = MovingAverage(momentum=0.25).collector(0)
    for top in (4.0, 8.0):
        collector.update(torch.tensor([[0.0, top]]))
    assert collector.summary().high.item() == 5.0


@pytest.mark.parametrize("channels", [48, 192, 768])
def test_integer_layer_norm_is_close_to_the_real_one(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    v = torch.randint(-2040, 2041, (50, channels), generator=generator)
    gamma, beta = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    scale, step, fraction = 0.01, 0.05, fraction_bits(channels)
    epsilon = integer_epsilon(1e-6, scale, channels)
    token = token_scale(v.sum(-1, keepdim=True), (v * v).sum(-1, keepdim=True), channels, epsilon, 11, False)
    affine = channel_affine(gamma, beta, torch.tensor(step, dtype=torch.float64), fraction, 11, False)
    y = integer_layer_norm(v, token, affine) * step
    true = nn.functional.layer_norm(v.double() * scale, (channels,), gamma.double(), beta.double(), 1e-6)
    assert (y - true).abs().max() < 0.75 * step


def test_a_constant_token_is_fatal_without_an_epsilon_and_harmless_with_one() -> None:
    total, squares = torch.tensor([[48 * 7]]), torch.tensor([[48 * 49]])
    token = token_scale(total, squares, 48, 1, 11, False)
    assert ((7 * token.multiplier + token.offset) >> token.shift).item() == 0
    with pytest.raises(NonFinite, match="epsilon"):
        token_scale(total, squares, 48, 0, 8, True)


def test_accumulator_widths_are_computed_and_checked() -> None:
    # specs, A.1: 42 bits at C = 1024 and 46 at C = 4096, magnitudes up to 255 << 3
    assert [width(norm_bounds(c, 2040)[2]) - 1 for c in (1024, 4096)] == [42, 46]
    assert fitting(2**31 - 1, (torch.int32, torch.int64)) == torch.int32
    assert fitting(2**31, (torch.int32, torch.int64)) == torch.int64
    with pytest.raises(AccumulatorOverflow, match="55 bits"):
        fitting(2**53 + 1, Floats.dtypes)


# --- the whole model

VARIANTS = [
    ("w8a8", {}),
    ("w8a8-attn4", {}),
    ("w4a4", {}),
    ("w8a8-attn4", {"faithful": True}),
    ("w8a8", {"faithful": True, "observer": "percentile"}),
    ("w8a8-attn4", {"ptf": False, "lis": False, "observer": "omse"}),
]


@pytest.mark.parametrize(("bits", "options"), VARIANTS)
def test_integer_tensors_and_the_simulation_hold_the_same_integers(bits: str, options: dict[str, object]) -> None:
    model = vitquant.quantize(tiny(), IMAGES, "fq-vit", bits, **options)
    simulated, integers = both(model, IMAGES)
    assert len(simulated) == 28
    for name, x in integers.items():
        assert not x.is_floating_point(), name
        assert torch.equal(x.double(), simulated[name].double()), name
    assert torch.equal(model(IMAGES), model.integers(IMAGES))


def test_every_tensor_of_the_table_is_quantized_and_the_result_is_near_the_float_model() -> None:
    net = tiny()
    model = vitquant.quantize(net, IMAGES, "fq-vit", "w8a8-attn4")
    entries = model.ledger.entries
    assert all(e.bits <= 8 for e in entries.values())
    formats = {e.role: e.format.split()[0] for e in entries.values()}
    assert formats["sum"] == formats["embedding"] == "PowerOfTwo8"
    assert formats["attention probabilities"] == "Log4"
    assert {"norm output", "softmax output", "activation output", "contraction output", "added constant"} <= set(
        formats
    )
    with torch.no_grad():
        error = (model(IMAGES) - net(IMAGES)).norm() / net(IMAGES).norm()
    assert error < 0.2
    assert {c.width for c in model._compiled[False].values()} and max(
        c.width for c in model._compiled[False].values()
    ) < 54


def test_saved_and_loaded_it_gives_the_same_logits(tmp_path: Path) -> None:
    model = vitquant.quantize(tiny(), IMAGES, "fq-vit", "w8a8-attn4", faithful=True)
    loaded = vitquant.load(model.save(tmp_path), model=tiny(1))
    assert loaded.arithmetic == model.arithmetic and model.arithmetic is not None and model.arithmetic.faithful
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert torch.equal(loaded.integers(IMAGES), model(IMAGES))


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(UsageError, match="observer"):
        vitquant.quantize(tiny(), IMAGES, "fq-vit", "w8a8", observer="median")
    with pytest.raises(UsageError, match="at most 5 bits"):
        vitquant.quantize(tiny(), IMAGES, "fq-vit", "w8a8", lis=True)
    with pytest.raises(PlanError, match="not executed on integers"):
        vitquant.quantize(tiny(), IMAGES, "minmax", "w8a8").integers(IMAGES)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.head(x.flatten(1)[:, :48])
            return h * torch.sigmoid(h)

    model = vitquant.quantize(Gated().eval(), IMAGES, "fq-vit", "w8a8")
    with pytest.raises(PlanError, match="mul"):
        model(IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w8a8-attn4"])
def test_swin_with_masks_and_position_tables_gives_the_same_integers(bits: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model("swin_tiny_patch4_window7_224").eval()
    images = torch.randn(2, 3, 224, 224)
    model = vitquant.quantize(net, images, "fq-vit", bits)
    simulated, integers = both(model, images[:1])
    assert all(torch.equal(x.double(), simulated[name].double()) for name, x in integers.items())
    with torch.no_grad():
        assert (model(images) - net(images)).norm() / net(images).norm() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w8a8-attn4"])
def test_the_real_deit_gives_the_same_integers(shared_data: Path, bits: str) -> None:
    net = timm.create_model("deit_tiny_patch16_224")
    timm.models.load_checkpoint(net, str(shared_data / "deit_tiny" / "deit_tiny_patch16_224.safetensors"))
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = vitquant.quantize(net.eval(), images, "fq-vit", bits)
    simulated, integers = both(model, images[:2])
    assert all(torch.equal(x.double(), simulated[name].double()) for name, x in integers.items())
    assert torch.equal(model(images), model.integers(images))
