"""The reconstruction engine: what learns, what it learns from, and that it can be cut off and goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vitquant
from vitquant.artifact import QuantizedModel
from vitquant.calibrate import Batches, Bench, MinMax
from vitquant.errors import ArtifactError, UsageError
from vitquant.numerics import PER_OUTPUT, PER_TENSOR, Log, Uniform
from vitquant.numerics.gradient import stopped, straight_through
from vitquant.passes import Fit
from vitquant.passes.learn import AdaRound, LearnedStep, LearnedWeight
from vitquant.passes.reconstruct import Reconstruct
from vitquant.passes.record import record
from vitquant.recipe import Recipe, Rule, State
from vitquant.trace import ACTIVATION_ROLES, Role, observe
from vitquant.trace.units import units

SETTINGS = Reconstruct(iterations=12, batch=4, trainables=(AdaRound(0.05), LearnedStep(1e-3)))


def deit() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", **options).eval()


def images(count: int = 6, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def fitted(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[State, Bench]:
    plan = {
        **dict.fromkeys(ACTIVATION_ROLES, Rule(Uniform(4))),
        Role.PROBS: Rule(Log(4, PER_TENSOR, 2)),
        Role.WEIGHT: Rule(Uniform(3, PER_OUTPUT), MinMax()),
    }
    recipe = Recipe("test", plan, (Fit(),))
    bench = Bench(model, observe(model, x[:1]), Batches(x, 4), seed)
    return Fit()(State(bench.trace, recipe.plan(bench.trace)), bench), bench


def same(a: State, b: State) -> bool:
    params = all(torch.equal(x, y) for s in a.params for x, y in zip(a.params[s], b.params[s], strict=True))
    return params and a.codes.keys() == b.codes.keys() and all(torch.equal(a.codes[s], b.codes[s]) for s in a.codes)


def output_error(state: State, bench: Bench, x: Tensor) -> float:
    with torch.no_grad():
        return float((bench.run(x, state.transforms()) - bench.model(x)).square().mean())


def test_reconstruction_brings_the_output_nearer() -> None:
    state, bench = fitted(deit(), images(16))
    learned = replace(SETTINGS, iterations=30, batch=16)(state, bench)
    assert output_error(learned, bench, images(16)) < 0.8 * output_error(state, bench, images(16))
    assert learned.floating().transforms() == {}


def test_learned_codes_are_what_is_saved_and_each_is_floor_or_ceiling(tmp_path: Path) -> None:
    model = deit()
    state, bench = fitted(model, images())
    learned = SETTINGS(state, bench)
    quantized = QuantizedModel.of(model, learned, vitquant.artifact.Provenance(method={}))
    loaded = vitquant.load(quantized.save(tmp_path / "saved"), model)
    assert torch.equal(quantized(images()), loaded(images()))
    moved = 0
    for site, codes in learned.codes.items():
        operand = dict(zip(loaded.sites, loaded.operands, strict=True))[site]
        assert torch.equal(operand.codes.float(), codes)
        weight, quantizer = state.constant(site), state.plan[site].quantizer
        assert weight is not None
        p = quantizer.resolve(weight, state.params[site])
        assert bool(((codes - p.zero - weight / p.scale).abs() <= 1.001).all())
        moved += int((codes != quantizer.encode(weight, state.params[site])).sum())
    assert moved > 0


def test_same_seed_same_result_and_the_model_is_untouched() -> None:
    model, x = deit(), images()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    first, second = (SETTINGS(*fitted(model, x)) for _ in range(2))
    assert same(first, second)
    assert not same(first, SETTINGS(*fitted(model, x, seed=1)))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bytes(tmp_path: Path) -> None:
    state, bench = fitted(deit(), images())
    wanted = SETTINGS(state, bench)
    told: list[str] = []

    def kill(what: str, done: int, total: int) -> None:
        told.append(what)
        if what.startswith("blocks.0.mlp"):
            raise _Killed

    settings = replace(SETTINGS, checkpoint=tmp_path)
    with pytest.raises(_Killed):
        settings(state, replace(bench, progress=kill))
    assert any("loss" in what and "min left" in what for what in told)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["run.json", "unit0000.safetensors", "unit0001.safetensors"]
    told.clear()
    resumed = settings(state, replace(bench, progress=lambda what, *_: told.append(what)))
    assert same(resumed, wanted) and not any(what.startswith("blocks.0.attn") for what in told)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    state, bench = fitted(deit(), images())
    quick = replace(SETTINGS, iterations=1, checkpoint=tmp_path)
    quick(state, bench)
    with pytest.raises(UsageError, match="other settings"):
        replace(quick, iterations=2)(state, bench)
    with pytest.raises(UsageError, match="other settings"):
        quick(*fitted(deit(), images() + 1))
    part = tmp_path / "unit0001.safetensors"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="unit0001"):
        quick(state, bench)


def test_activations_on_disk_give_the_same_result_and_leave_nothing(tmp_path: Path) -> None:
    state, bench = fitted(deit(), images())
    assert same(replace(SETTINGS, cache=tmp_path)(state, bench), SETTINGS(state, bench))
    assert list(tmp_path.iterdir()) == []


def test_settings_change_what_is_learned() -> None:
    state, bench = fitted(deit(), images())
    quick = replace(SETTINGS, iterations=3)
    plain = quick(state, bench)
    for other in ({"mix": 0.0}, {"mix": 1.0}, {"drop": 0.5}, {"stop_gradients": True}):
        assert not same(replace(quick, **other)(state, bench), plain)  # type: ignore[arg-type]


def test_weights_themselves_can_learn() -> None:
    state, bench = fitted(deit(), images(16))
    learned = replace(SETTINGS, iterations=30, batch=8, trainables=(LearnedWeight(2e-3),))(state, bench)
    assert output_error(learned, bench, images(16)) < output_error(state, bench, images(16))


def test_windows_and_masks_are_recorded_by_image() -> None:
    torch.manual_seed(0)
    options = {"img_size": 56, "embed_dim": 12, "depths": (2,), "num_heads": (2,), "num_classes": 10}
    model = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    bench = Bench(model, observe(model, images(1, 56)), Batches(images(5, 56), 2))
    shifted = units(bench.trace)[3]
    assert shifted.scope == "layers.0.blocks.1.attn"
    kept = record(shifted, bench, {})
    windows, mask = kept.inputs
    assert windows.data.shape == (5, 4, 49, 12) and mask.axis is None
    chosen = torch.tensor([4, 1])
    args, kwargs = kept.arguments([c.take(chosen) for c in kept.inputs])
    with torch.no_grad():
        again = model.get_submodule(shifted.scope)(*args, **kwargs)
    assert torch.allclose(again, kept.output.take(chosen), atol=1e-6)


def test_straight_through_is_the_learned_step_gradient() -> None:
    quantizer = Uniform(3)
    x = torch.tensor([-3.0, -0.4, 0.3, 0.6, 9.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    p = quantizer.parameters(scale, torch.tensor([2.0]))
    y = straight_through(quantizer, x, p)
    assert torch.equal(y, quantizer.fake_quantize(x.detach(), p))
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    inside = sum(round(v / 0.5) - v / 0.5 for v in (-0.4, 0.3, 0.6))
    assert scale.grad is not None and scale.grad.item() == pytest.approx(-2 + inside + 5, abs=1e-5)


def test_stopped_gradients_reach_the_step_but_not_the_input() -> None:
    quantizer = Uniform(3)
    x = torch.tensor([-3.0, -0.4, 0.3, 0.6, 9.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    y = stopped(quantizer, x, quantizer.parameters(scale, torch.tensor([2.0])))
    y.sum().backward()
    assert x.grad is None and scale.grad is not None and scale.grad.item() == pytest.approx(-2 - 1 + 1 + 1 + 5)
