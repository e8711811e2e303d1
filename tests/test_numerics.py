"""Laws that every number format obeys, and worked values."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitquant.errors import NonFinite, UsageError
from vitquant.numerics import (
    PER_CHANNEL,
    PER_HEAD,
    PER_OUTPUT,
    PER_TENSOR,
    PER_TOKEN,
    Affine,
    Granularity,
    Log,
    LogScale,
    Quantizer,
    Uniform,
    pack,
    packed_size,
    per_group,
    unpack,
)

GRAINS = [PER_TENSOR, PER_OUTPUT, PER_CHANNEL, PER_TOKEN, PER_HEAD, per_group(2)]
bits = st.integers(2, 8)
grains = st.sampled_from(GRAINS)
uniforms = st.builds(
    Uniform, bits, grains, symmetric=st.booleans(), include_zero=st.booleans(), full_range=st.booleans()
)
logs = st.builds(Log, bits, grains, steps=st.integers(1, 3), extra_zero=st.booleans())
formats = st.one_of(uniforms, logs)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """(batch, heads, tokens, channels) of wildly different sizes, with constant and denormal channels."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5)), 2 * draw(st.integers(1, 4)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    x = x * 10.0 ** draw(st.integers(-30, 30)) + draw(st.sampled_from([0.0, 1.0, -50.0]))
    kind = draw(
        st.sampled_from(["plain", "constant", "zero", "denormal", "one constant channel", "one zero channel"])
    )
    if kind == "constant":
        x = torch.full(shape, draw(st.sampled_from([-3.5, 7.25, 1e-20])))
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "denormal":
        x = torch.full(shape, 1e-42)
    elif kind == "one constant channel":
        x[..., 0] = 4.0
    elif kind == "one zero channel":
        x[..., 0] = 0.0
    return x


def fitted(q: Quantizer, x: torch.Tensor):
    rows = q.granularity.view(x)
    return q.fit(rows.amin(1), rows.amax(1))


@settings(max_examples=300, deadline=None)
@given(formats, tensors())
def test_codes_are_integers_within_the_range(q: Quantizer, x: torch.Tensor) -> None:
    codes = q.encode(x, fitted(q, x))
    low, high = q.code_range
    assert torch.equal(codes, codes.round())
    assert codes.min() >= low and codes.max() <= high
    assert high - low + 1 == q.levels <= 2**q.bits + (isinstance(q, Log) and q.extra_zero)


@settings(max_examples=300, deadline=None)
@given(formats, tensors(), st.booleans())
def test_fake_quantize_is_decode_of_encode(q: Quantizer, x: torch.Tensor, grad: bool) -> None:
    p = fitted(q, x)
    with torch.set_grad_enabled(grad):
        y = q.fake_quantize(x.clone().requires_grad_(grad), p)
    with torch.no_grad():
        expected = q.decode(q.encode(x, p), p)
    assert torch.equal(y, expected)
    assert torch.isfinite(y).all()


@settings(max_examples=200, deadline=None)
@given(formats, tensors())
def test_no_more_levels_than_codes(q: Quantizer, x: torch.Tensor) -> None:
    q = replace(q, granularity=PER_TENSOR)
    values = q.fake_quantize(torch.cat([x.flatten(), torch.linspace(-60, 60, 3000)]), fitted(q, x))
    assert len(values.unique()) <= q.levels


@settings(max_examples=200, deadline=None)
@given(uniforms, tensors())
def test_uniform_error_is_half_a_step_inside_the_range(q: Uniform, x: torch.Tensor) -> None:
    p = fitted(q, x)
    scale = q.granularity.spread(p.scale, x)
    error = (q.fake_quantize(x, p) - x).abs()
    # Symmetric grids end one half step early at the top with full_range; rounding in float32 costs a little more.
    slack = 1e-5 * x.abs() + 2e-38
    assert (error <= scale * (1.0 if q.symmetric and q.full_range else 0.501) + slack).all()


@settings(max_examples=200, deadline=None)
@given(uniforms, tensors())
def test_uniform_zero_points_are_integers(q: Uniform, x: torch.Tensor) -> None:
    zero = fitted(q, x).zero
    assert torch.equal(zero, zero.round())
    if q.include_zero and not q.symmetric:
        assert zero.min() >= 0 and zero.max() <= 2**q.bits - 1
    if q.symmetric:
        assert (zero == 0).all()


@settings(max_examples=100, deadline=None)
@given(formats, st.sampled_from([torch.inf, -torch.inf, torch.nan]))
def test_infinite_ranges_raise(q: Quantizer, bad: float) -> None:
    with pytest.raises(NonFinite):
        q.fit(torch.tensor([-1.0]), torch.tensor([bad]))


@settings(max_examples=100, deadline=None)
@given(formats, tensors())
def test_straight_through_gradient(q: Quantizer, x: torch.Tensor) -> None:
    x = x.clamp(-1e3, 1e3).requires_grad_()
    q.fake_quantize(x, fitted(q, x.detach())).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_straight_through_is_the_identity_inside_and_zero_outside() -> None:
    q, p = Uniform(4), Affine(torch.tensor([0.5]), torch.tensor([3.0]))
    x = torch.tensor([-9.0, -1.0, 0.3, 2.0, 99.0], requires_grad=True)
    q.fake_quantize(x, p).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_uniform_worked_values() -> None:
    q = Uniform(2)
    p = q.fit(torch.tensor([-1.0]), torch.tensor([2.0]))
    assert (p.scale.item(), p.zero.item()) == (1.0, 1.0)
    assert q.encode(torch.tensor([-5.0, -1.0, 0.4, 0.6, 2.0, 9.0]), p).tolist() == [0, 0, 1, 2, 3, 3]
    assert q.fake_quantize(torch.tensor([-5.0, 0.4, 9.0]), p).tolist() == [-1, 0, 2]


def test_symmetric_full_range_divides_by_half_the_levels() -> None:
    p = Uniform(8, symmetric=True, full_range=True).fit(torch.tensor([-1.0]), torch.tensor([1.0]))
    assert p.scale.item() == pytest.approx(1 / 127.5)
    assert Uniform(8, symmetric=True).fit(torch.tensor([-1.0]), torch.tensor([0.5])).scale.item() == pytest.approx(
        1 / 127
    )


def test_log_worked_values() -> None:
    x = torch.tensor([1.0, 0.75, 0.5, 0.36, 0.25, 2.0**-6, 2.0**-7, 2.0**-7.1, 0.0])
    q, p = Log(3), LogScale(torch.tensor([1.0]))
    assert q.encode(x, p).tolist() == [0, 0, 1, 1, 2, 6, 7, 7, 7]
    assert q.fake_quantize(x, p).tolist() == [1, 1, 0.5, 0.5, 0.25, 2.0**-6, 0, 0, 0]
    root = Log(4, steps=2).fake_quantize(torch.tensor([0.7, 0.5, 2.0**-7, 2.0**-8.1]), p)
    assert root.tolist() == pytest.approx([2**-0.5, 0.5, 2**-7, 0])
    extra = Log(4, steps=2, extra_zero=True)
    assert extra.levels == 17 and extra.storage_bits == 5 and extra.effective_bits > 4
    assert extra.fake_quantize(torch.tensor([2.0**-7.5, 2.0**-8]), p).tolist() == pytest.approx([2**-7.5, 0])


def test_constant_groups_are_kept_exactly_and_dead_ones_take_the_mean_scale() -> None:
    q = Uniform(4, PER_CHANNEL, include_zero=False)
    x = torch.tensor([[0.0, 5.0, -3.0, 1.0], [0.0, 5.0, -3.0, 2.0]])
    p = fitted(q, x)
    assert torch.allclose(q.fake_quantize(x, p), x, rtol=1e-6)
    assert p.scale[0] == pytest.approx(p.scale[1:].mean().item())


@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**31))
def test_pack_round_trip(width: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**width, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, width)
    assert packed.numel() == packed_size(count, width) == -(-count * width // 8)
    assert torch.equal(unpack(packed, width, (count,)).long(), codes)


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit in 4 bits"):
        pack(torch.tensor([16]), 4)
    with pytest.raises(ValueError, match="cannot hold"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, (2,))


@pytest.mark.parametrize("width", [0, 17, -1])
def test_bits_out_of_range(width: int) -> None:
    with pytest.raises(UsageError, match="bits must be"):
        Uniform(width)


@pytest.mark.parametrize(
    ("grain", "groups"),
    [(PER_TENSOR, 1), (PER_OUTPUT, 2), (PER_HEAD, 3), (PER_TOKEN, 5), (PER_CHANNEL, 4), (per_group(2), 2)],
)
def test_granularity_view_and_spread_agree(grain: Granularity, groups: int) -> None:
    x = torch.randn(2, 3, 5, 4)
    rows = grain.view(x)
    assert rows.shape[0] == groups and rows.numel() == x.numel()
    largest = grain.spread(rows.amax(1), x)
    assert (x <= largest).all()
    assert torch.equal(grain.view((x == largest).float()).amax(1), torch.ones(groups))


def test_a_workspace_keeps_the_order_of_axes_and_its_slots_apart() -> None:
    """Slots do not overlap; the next result in a slot takes the memory of the last; values are those without it."""
    from vitquant.numerics import Workspace

    memory, quantizer, x = Workspace(), Uniform(4), torch.randn(2, 3, 5).transpose(1, 2)
    p = quantizer.fit(x.min()[None], x.max()[None])
    with torch.no_grad():
        left = quantizer.fake_quantize(x, p, memory, "left")
        kept = left.clone()
        right = quantizer.fake_quantize(2 * x, p, memory, "right")
        assert torch.equal(left, kept) and left.data_ptr() != right.data_ptr()
        assert left.stride() == torch.empty_like(x).stride()
        assert torch.equal(left, quantizer.fake_quantize(x, p))
        again = quantizer.fake_quantize(x[:1], p, memory, "left")
        assert again.data_ptr() == left.data_ptr() and torch.equal(again, kept[:1])
