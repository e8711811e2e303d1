"""IGQ-ViT: run-time groups, their banks, the allocation, execution on integers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vitquant
from vitquant.artifact import Ledger
from vitquant.calibrate import Batches, Bench, RangeClusters, Reservoir
from vitquant.errors import UsageError
from vitquant.integer.grouped import grouped_rows
from vitquant.integer.linears import GroupedLinear
from vitquant.methods import igq_vit
from vitquant.numerics import PER_CHANNEL, PER_OUTPUT, PER_ROW, Granularity, InstanceGroups, Uniform
from vitquant.passes import AllocateGroups, Budget, Instances
from vitquant.passes.allocate import choose, grouped
from vitquant.recipe import Bits, Recipe, State, apply
from vitquant.trace import Role, observe
from vitquant.trace.replay import Tape

SEEDS = st.integers(0, 10_000)


def tokens(seed: int, *shape: int) -> Tensor:
    """Numbers whose channels have very different ranges, as after a LayerNorm."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(shape[-1], generator=g))
    return torch.randn(shape, generator=g) * spread + torch.randn(shape[-1], generator=g)


def bank_of(q: InstanceGroups, x: Tensor, restarts: int = 4) -> object:
    search = RangeClusters(restarts)
    collector = search.collector(0)
    collector.update(q.view(x))
    return search(q, collector.summary())


def tiny() -> nn.Module:
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    return timm.create_model(
        name, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    ).eval()


# the format


@given(SEEDS, st.sampled_from([2, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_one_group_is_per_tensor(seed: int, bits: int) -> None:
    x = tokens(seed, 2, 5, 6)
    low, high = x.min()[None], x.max()[None]
    grouped_, plain = InstanceGroups(bits, groups=1), Uniform(bits, include_zero=False)
    assert torch.equal(
        grouped_.fake_quantize(x, grouped_.fit(low, high)), plain.fake_quantize(x, plain.fit(low, high))
    )
    assert grouped_.extra_bops((1, 5, 6), 1000) == 0


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_as_many_groups_as_channels_is_the_upper_bound(seed: int) -> None:
    x = tokens(seed, 1, 7, 12)
    q, upper = InstanceGroups(4, groups=12), Uniform(4, PER_CHANNEL, include_zero=False)
    expected = upper.fake_quantize(x, upper.fit(x.amin((0, 1)), x.amax((0, 1))))
    torch.testing.assert_close(q.fake_quantize(x, bank_of(q, x)), expected, rtol=1e-5, atol=1e-5)


@given(SEEDS, st.sampled_from([1, 3, 8]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_codes_are_integers_in_range_and_decode_to_the_simulation(seed: int, groups: int, rows: bool) -> None:
    x = tokens(seed, 3, 2, 5, 5)
    q = InstanceGroups(4, PER_ROW, groups, from_zero=True) if rows else InstanceGroups(4, groups=groups)
    x = x.softmax(-1) if rows else x
    p = bank_of(q, x)
    settled = q.resolve(x, p)
    codes = q.encode_resolved(x, settled)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0 and codes.max() <= 15
    assert torch.equal(q.fake_quantize(x, p), q.decode_resolved(codes, settled))


def test_every_unit_picks_the_nearest_bounds_written_as_a_loop() -> None:
    x = tokens(0, 2, 4, 9)
    q = InstanceGroups(4, groups=3)
    p = bank_of(q, x)
    index = q.assign(x, p)
    for b in range(2):
        for c in range(9):
            values = x[b, :, c]
            distances = [
                (values.max() - u) ** 2 + (values.min() - low) ** 2 for low, u in zip(p.low, p.high, strict=True)
            ]
            assert index[b, 0, c] == int(torch.stack(distances).argmin())


def test_the_result_of_an_image_does_not_depend_on_its_batch() -> None:
    x = tokens(1, 4, 6, 8)
    q = InstanceGroups(4, groups=3)
    p = bank_of(q, x)
    assert torch.equal(q.fake_quantize(x, p)[2:3], q.fake_quantize(x[2:3], p))


def test_windows_of_one_image_share_their_groups_or_not() -> None:
    windows = tokens(2, 8, 5, 6) * torch.linspace(1, 9, 8)[:, None, None]  # 2 images of 4 windows
    by_image, by_window = InstanceGroups(4, groups=4, span=4), InstanceGroups(4, groups=4)
    p = bank_of(by_image, windows)
    shared = by_image.assign(windows, p).reshape(2, 4, 6)
    assert (shared == shared[:, :1]).all()
    own = by_window.assign(windows, p).reshape(2, 4, 6)
    assert not (own == own[:, :1]).all()
    whole = InstanceGroups(4, groups=4).assign(windows.reshape(2, 20, 6), p)
    assert torch.equal(shared[:, 0], whole[:, 0])
    with pytest.raises(UsageError, match="does not divide"):
        by_image.assign(windows[:6], p)


def test_gradient_is_straight_through_inside_the_range() -> None:
    x = tokens(3, 1, 5, 4).requires_grad_()
    q = InstanceGroups(8, groups=4)
    p = bank_of(q, x.detach())
    q.fake_quantize(x, p).sum().backward()
    codes = q.encode(x.detach(), p)
    assert x.grad is not None and (x.grad[(codes > 0) & (codes < 255)] == 1).all()


# the bank


def objective(q: InstanceGroups, points: Tensor, p: object) -> float:
    low, high = points
    return float(((low[:, None] - p.low) ** 2 + (high[:, None] - p.high) ** 2).amin(1).mean())  # type: ignore[attr-defined]


@given(SEEDS)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_more_groups_never_raise_the_mean_calibration_error(seed: int) -> None:
    x = tokens(seed, 4, 6, 24)
    formats = [InstanceGroups(4, groups=g) for g in (1, 2, 4, 8, 16)]
    errors = [objective(q, q.view(x), bank_of(q, x)) for q in formats]
    assert all(more <= fewer + 1e-9 for fewer, more in pairwise(errors))


def test_calibrated_banks_beat_random_ones() -> None:
    x = tokens(5, 8, 16, 64)
    q = InstanceGroups(4, groups=8)
    low, high = q.view(x)
    picks = torch.randperm(len(low), generator=torch.Generator().manual_seed(0))[:8]
    random = q.fit(low[picks], high[picks])
    assert objective(q, q.view(x), bank_of(q, x)) < objective(q, q.view(x), random)
    errors = [(q.fake_quantize(x, p) - x).square().mean() for p in (bank_of(q, x), random)]
    assert errors[0] < errors[1]


def test_fewer_distinct_channels_than_groups() -> None:
    x = tokens(6, 1, 5, 3)
    q = InstanceGroups(4, groups=8)
    p = bank_of(q, x)
    assert len(p.scale) == 8 and torch.isfinite(q.fake_quantize(x, p)).all()


def test_same_seed_same_bank_and_bounded_memory() -> None:
    x = tokens(7, 8, 6, 200)
    q = InstanceGroups(4, groups=8)
    first, second = bank_of(q, x), bank_of(q, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    collector = RangeClusters(capacity=100).collector(0)
    for _ in range(3):
        collector.update(q.view(x))
    assert collector.summary().values.shape == (2, 100)
    assert isinstance(collector, Reservoir)


# costs (specs C.3)


@pytest.mark.parametrize(("channels", "heads", "percent"), [(768, 12, 3.21), (384, 6, 6.2), (192, 3, 11.4)])
def test_overhead_at_sixteen_groups(channels: int, heads: int, percent: float) -> None:
    n, c, g = 197, channels, 16
    fc, row = InstanceGroups(4, groups=g), InstanceGroups(4, PER_ROW, groups=g, from_zero=True)
    linears = [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)]
    macs = sum(n * i * o for i, o in linears) + 2 * n * n * c
    extra = sum(fc.extra_bops((1, n, i), n * i * o) for i, o in linears)
    extra += row.extra_bops((1, heads, n, n), n * n * c)
    assert 100 * extra / (16 * macs) == pytest.approx(percent, abs=0.05 if percent > 5 else 0.005)


def test_extra_bops_by_hand() -> None:
    n, i, o, g, h = 5, 6, 7, 3, 2
    assert InstanceGroups(4, groups=g).extra_bops((1, n, i), n * i * o) == 32 * (
        n * o * (g - 1) + 2 * n * i + 3 * i * g
    )
    rows = InstanceGroups(4, PER_ROW, groups=g, from_zero=True)
    assert rows.extra_bops((1, h, n, n), 99) == 32 * (h * n * n + 2 * h * n * g)


# the allocation


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], int, int]:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(SEEDS))
    losses = rng.random((rows, columns)) * 10.0 ** draw(st.integers(-6, 3))
    costs = rng.integers(0, 10 ** draw(st.integers(1, 10)), (rows, columns))
    uniform = draw(st.integers(0, columns - 1))
    return losses, costs.tolist(), uniform, int(costs[:, uniform].sum())


@given(tables())
@settings(max_examples=60, deadline=None)
def test_a_budget_is_never_exceeded_and_uniform_never_beaten(
    table: tuple[np.ndarray, list[list[int]], int, int],
) -> None:
    losses, costs, uniform, budget = table
    picks = choose(losses, costs, budget)
    rows = range(len(costs))
    assert sum(costs[i][picks[i]] for i in rows) <= budget
    assert losses[rows, picks].sum() <= losses[:, uniform].sum() + 1e-5 * losses.max()


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_choice_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses, costs = rng.random((4, 3)), rng.integers(0, 100, (4, 3))
    budget = int(costs.min(1).sum()) + 60
    every = np.stack(np.meshgrid(*[range(3)] * 4), -1).reshape(-1, 4)
    rows = np.arange(4)
    best = min(losses[rows, e].sum() for e in every if costs[rows, e].sum() <= budget)
    picks = choose(losses, costs.tolist(), budget)
    assert losses[rows, picks].sum() == pytest.approx(best, abs=1e-5)


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="below the cheapest"):
        choose(np.zeros((2, 2)), [[5, 6], [5, 6]], 9)


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = tiny()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Bench(model, observe(model, images[:1]), Batches(images))


@pytest.mark.parametrize("budget", [Budget(4), Budget(4, ratio=0.97), Budget(8)])
def test_allocation_of_a_model(bench: Bench, budget: Budget) -> None:
    fixed = apply(igq_vit(Bits(4, 4), groups=4), bench)
    state = AllocateGroups(budget, candidates=(1, 2, 4, 8), images=4, batch=3)(fixed, bench)
    counts = [state.plan[s].quantizer.groups for s in grouped(state)]  # type: ignore[attr-defined]
    assert len(set(counts)) > 1
    assert all(len(state.params[s].scale) == g for s, g in zip(grouped(state), counts, strict=True))
    limit = budget.limit(fixed)
    assert Ledger.of(state).bops() <= limit
    if budget == Budget(4):
        assert limit == Ledger.of(fixed).bops()


def test_a_tape_gives_what_a_whole_run_gives(bench: Bench) -> None:
    images = next(iter(bench.images))
    tape = Tape.record(bench.model, images)
    for site in bench.trace.with_role(Role.POST_ACT, Role.PROBS, Role.POST_NORM):
        transforms = {site: lambda x: (x * 8).round() / 8}
        with torch.no_grad():
            assert torch.equal(tape.run(transforms), bench.run(images, transforms))
    assert torch.equal(tape.run({}), tape.output)


def test_a_tape_forgets_what_was_overwritten() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x += 1.0
            x.mul_(2.0)
            return self.second(x)

    model, x = InPlace().eval(), torch.randn(3, 4)
    tape = Tape.record(model, x)
    site = next(s for s in observe(model, x[:1]).sites if str(s) == "second:linear0.input")
    with torch.no_grad():
        expected = model.second(((model.first(x) + 1) * 2).round())
    for _ in range(2):
        assert torch.equal(tape.run({site: torch.round}), expected)


# the method


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5
    ).eval()


def planned(recipe: Recipe, model: nn.Module, size: int) -> State:
    image = torch.randn(1, 3, size, size)
    return apply(recipe, Bench(model, observe(model, image), Batches(image)))


def test_swin_by_image_and_by_window() -> None:
    model = swin()
    for instance, expected in (("image", {1, 4}), ("window", {1})):
        state = planned(igq_vit(groups=2, instance=instance), model, 56)
        spans = {state.plan[s].quantizer.span for s in grouped(state)}  # type: ignore[attr-defined]
        assert spans == expected


def test_a_convolution_has_its_channels_on_axis_one(bench: Bench) -> None:
    trace = bench.trace
    conv = next(s for s in trace.sites if s.call.op == "conv" and s.operand == "input")
    rule = replace(apply(igq_vit(groups=2), bench).plan[conv], quantizer=InstanceGroups(4, groups=2))
    state = Instances()(State(trace, {conv: rule}), bench)
    assert state.plan[conv].quantizer.granularity == Granularity((1,))


def test_batch_first_attention_of_torch_is_batch_first_here() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    trace = observe(layer, torch.randn(1, 5, 8))
    shapes = {info.shape for site, info in trace.sites.items() if info.role in (Role.POST_NORM, Role.CONTEXT)}
    assert shapes == {(1, 5, 8)}


def test_saves_loads_and_shows_its_groups(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = vitquant.quantize(tiny(), images, "igq-vit", "w4a4", groups=3)
    again = vitquant.load(model.save(tmp_path / "a"), model=tiny())
    assert torch.equal(model(images), again(images))
    assert "3 groups of channels" in again.table() and "3 groups of rows" in again.table()
    assert '"groups": 3' in (tmp_path / "a" / "config.json").read_text()


# execution on integers


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@given(SEEDS, st.sampled_from([1, 4, 8]), st.sampled_from([4, 8]))
@settings(max_examples=20, deadline=None)
def test_grouped_linear_equals_the_simulation(seed: int, groups: int, bits: int) -> None:
    x, w, bias = tokens(seed, 3, 7, 24), tokens(seed + 1, 10, 24), tokens(seed + 2, 10)
    q, wq = InstanceGroups(bits, groups=groups), Uniform(bits, PER_OUTPUT, symmetric=True)
    p, grid = bank_of(q, x), wq.fit(w.amin(1), w.amax(1))
    expected = nn.functional.linear(q.fake_quantize(x, p).double(), wq.fake_quantize(w, grid).double(), bias.double())
    found = GroupedLinear(q, p, wq.encode(w, grid), grid.scale).linear(x, w, bias)
    assert relative(found, expected.float()) < 1e-5


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_grouped_rows_equal_the_simulation(seed: int) -> None:
    probs, value = tokens(seed, 2, 3, 9, 9).softmax(-1), tokens(seed + 1, 2, 3, 9, 4)
    q, vq = InstanceGroups(4, PER_ROW, 4, from_zero=True), Uniform(4, include_zero=False)
    p, grid = bank_of(q, probs), vq.fit(value.min()[None], value.max()[None])
    expected = q.fake_quantize(probs, p).double() @ vq.fake_quantize(value, grid).double()
    found = grouped_rows(q.encode(probs, p), q.resolve(probs, p), vq.encode(value, grid), grid)
    assert relative(found, expected.float()) < 1e-5
