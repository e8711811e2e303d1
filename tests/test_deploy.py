"""The deployment methods' own passes: exceptions by sensitivity, compensated rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import vitquant
from vitquant.calibrate import Batches, Bench, MinMax, MseGrid
from vitquant.methods import deploy_w4a8
from vitquant.numerics import PER_OUTPUT, Uniform
from vitquant.passes import Fit
from vitquant.passes.compensate import Compensate, _correlations, compensated
from vitquant.passes.exceptions import Exceptions
from vitquant.passes.importance import token_importance
from vitquant.recipe import FLOAT, Recipe, Rule, State
from vitquant.trace import ACTIVATION_ROLES, Role, Site, observe

BYTE = Rule(Uniform(8, PER_OUTPUT, symmetric=True), MseGrid())


class Mlp(nn.Module):
    """Two wide linears behind a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        self.first, self.second, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.nn.functional.gelu(self.first(self.norm(x)))).mean(1))


def bench(model: nn.Module) -> Bench:
    images = torch.randn(32, 12, 32, generator=torch.Generator().manual_seed(1)) @ torch.randn(32, 32).softmax(0)
    return Bench(model, observe(model, images[:1]), Batches(images, 8))


def planned(on: Bench, bits: int = 4) -> State:
    weight = Rule(Uniform(bits, PER_OUTPUT), MinMax())
    rules = {**dict.fromkeys(ACTIVATION_ROLES, Rule(Uniform(8))), Role.WEIGHT: weight}
    return State(on.trace, Recipe("test", rules, ()).plan(on.trace))


def weight_bits(state: State) -> dict[str, int]:
    return {str(s): r.quantizer.bits for s, r in state.plan.items() if state.constant(s) is not None}


def stored(state: State, model: nn.Module) -> float:
    """Of 32 bits for every parameter."""
    weights = {s: w for s in state.plan if (w := state.constant(s)) is not None}
    total = sum(p.numel() for p in model.parameters())
    rest = total - sum(w.numel() for w in weights.values())
    bits = sum(state.plan[s].quantizer.bits * w.numel() for s, w in weights.items())
    return (bits + 32 * rest) / (32 * total)


@pytest.mark.parametrize("size", [0.17, 0.19, 0.22, 0.25])
def test_exceptions_keep_to_the_budget_and_use_it(size: float) -> None:
    model = Mlp().eval()
    on = bench(model)
    state = planned(on)
    least = stored(state, model)
    found = Exceptions(BYTE, size)(state, on)
    assert least < stored(found, model) <= size
    assert 8 in weight_bits(found).values()  # every size here has room for the smallest weight


def test_without_room_there_are_no_exceptions() -> None:
    on = bench(Mlp().eval())
    assert set(weight_bits(Exceptions(BYTE, 0.01)(planned(on), on)).values()) == {4}


def test_the_exception_is_the_weight_that_suffers_most() -> None:
    """A weight with one huge element in every row loses all others at 4 bits."""
    model = Mlp().eval()
    with torch.no_grad():
        model.second.weight[:, 0] = 40 * model.second.weight.abs().max()
    on = bench(model)
    state = planned(on)
    room = stored(state, model) + 4 * model.second.weight.numel() / (32 * sum(p.numel() for p in model.parameters()))
    bits = weight_bits(Exceptions(BYTE, room + 1e-3)(state, on))
    assert [site for site, b in bits.items() if b == 8] == ["second:linear0.weight"]


def output_error(state: State, on: Bench) -> float:
    with torch.no_grad():
        pairs = [(on.run(x, {}), on.run(x, state.transforms())) for x in on.images]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_compensation_brings_the_output_nearer() -> None:
    on = bench(Mlp().eval())
    nearest = Fit()(planned(on, bits=3), on)
    better = Compensate(damping=0.1, ridge=0.1)(nearest, on)
    weights = {str(s) for s in nearest.plan if nearest.constant(s) is not None}
    assert {str(s) for s in better.codes} == weights - {"head:linear0.weight"}  # it sees 32 rows of 32 numbers
    assert output_error(better, on) < 0.8 * output_error(nearest, on)
    assert all(c.min() >= 0 and c.max() <= 7 and torch.equal(c, c.round()) for c in better.codes.values())


def test_compensation_sees_the_quantized_model_where_activations_stay_in_floating_point() -> None:
    """Weights alone are quantized: a later layer's inputs still differ from the floating-point model's."""
    on = bench(Mlp().eval())
    rules = {**dict.fromkeys(ACTIVATION_ROLES, FLOAT), Role.WEIGHT: Rule(Uniform(2, PER_OUTPUT), MinMax())}
    fitted = Fit()(State(on.trace, Recipe("test", rules, ()).plan(on.trace)), on)
    even = [torch.ones(8, 12) for _ in range(4)]
    gram, cross = _correlations(Site.parse("second:linear0.input"), even, fitted, on)
    assert not torch.allclose(gram, cross, rtol=1e-3)


def test_tokens_that_the_output_does_not_see_have_no_importance() -> None:
    """Only the first token reaches the head; the same seed gives the same shares."""

    class First(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(self.norm(x)))[:, 0])

    on = bench(First().eval())
    call, last = Site.parse("second:linear0.input").call, Site.parse("head:linear0.input").call
    found = token_importance([call, last], planned(on), on)
    assert [g.shape for g in found[call]] == [(8, 12)] * 4 and found[last][0].shape == (8,)
    seen = torch.cat(found[call])
    assert bool((seen[:, 0] > 0).all()) and not seen[:, 1:].any()
    assert torch.equal(seen, torch.cat(token_importance([call, last], planned(on), on)[call]))
    assert all(p.grad is None for p in on.model.parameters())


def test_compensation_of_uncorrelated_inputs_is_rounding() -> None:
    quantizer, weight = Uniform(4, PER_OUTPUT), torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    p = quantizer.fit(weight.amin(1), weight.amax(1))
    assert torch.equal(compensated(weight, torch.eye(16).double(), quantizer, p), quantizer.encode(weight, p))


def test_an_operand_is_what_arrives_at_its_site() -> None:
    """`Bench.operand` stops there; the result is that of a whole run, earlier operands transformed."""
    model = Mlp().eval()
    on = bench(model)
    x, site = on.images.first(), Site.parse("second:linear0.input")
    earlier = {Site.parse("first:linear0.input"): lambda x: 2 * x}
    expected = torch.nn.functional.gelu(model.first(2 * model.norm(x)))
    torch.testing.assert_close(on.operand(site, x, earlier), expected)


def test_the_recipe_reports_its_exceptions() -> None:
    model = Mlp().eval()
    images = torch.randn(8, 12, 32, generator=torch.Generator().manual_seed(1))
    result = vitquant.quantize(model, images, replace(deploy_w4a8(size=1.0), name="mine"))
    assert result.ledger.bits()["weight"] == 8
