"""The portable runtime: exact integer products, and the simulated model's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitquant
from vitquant.artifact import QuantizedModel
from vitquant.artifact.operands import Activation
from vitquant.errors import ExportError, PlanError
from vitquant.export.runtime import IntegerModel, compiled
from vitquant.integer.linears import UniformLinear
from vitquant.integer.patches import Patches
from vitquant.integer.product import Int8Product, bytes_of, int8_sums
from vitquant.trace import CallKey, Interceptor, Site

METHODS = [
    ("deploy-int8", "w8a8", {}),
    ("deploy-w4a8", "w4a8", {"size": 0.5}),
    ("repq-vit", "w4a4", {}),
    ("adfq-vit", "w4a4", {"optimise": False, "threshold": 1.5}),
    ("igq-vit", "w4a4", {"groups": 3}),
]


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    ).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([0, 2, "same", "valid"]),
    st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_is_a_product_of_patches(
    axes: int, kernel: int, stride: int, dilation: int, padding: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stride = 1 if padding == "same" else stride
    x = torch.randint(-9, 9, (2, 3, *[6, 7, 8][:axes]), generator=generator).double()
    weight = torch.randint(-9, 9, (4, 3, *[kernel, 2, 3][:axes]), generator=generator).double()
    convolve = getattr(nn.functional, f"conv{axes}d")
    rows = Patches.of(weight, stride, padding, dilation=dilation)(x)
    expected = convolve(x, weight, None, stride, padding, dilation)
    assert torch.equal((rows @ weight.flatten(1).T).movedim(-1, 1), expected)


def test_a_convolution_of_groups_has_no_patches() -> None:
    with pytest.raises(PlanError, match="groups"):
        Patches.of(torch.zeros(4, 1, 3, 3), groups=2)


@given(st.sampled_from([torch.uint8, torch.int8]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_product_of_bytes_is_exact(kind: torch.dtype, inner: int, outputs: int, seed: int) -> None:
    """Extremes included, with what packs the weight and with what does not."""
    generator, info = torch.Generator().manual_seed(seed), torch.iinfo(kind)
    codes = torch.randint(info.min, info.max + 1, (2, 3, inner), generator=generator, dtype=kind)
    weight = torch.randint(-128, 128, (outputs, inner), generator=generator, dtype=torch.int8)
    codes[0], weight[0] = info.max, -128
    wanted = (codes.long() - 3) @ weight.long().T
    assert torch.equal(int8_sums(codes, weight, 3).long(), wanted)
    step, bias, onto = (torch.rand(outputs, generator=generator) for _ in range(3))
    product = Int8Product(weight, step)
    assert torch.equal(Int8Product(weight, torch.ones(1))(codes, 3).long(), wanted)
    expected = wanted * step + bias
    for packed in (product._packed, None):
        product._packed = packed
        torch.testing.assert_close(product(codes, 3, bias), expected)
        start = onto.expand_as(expected).contiguous()
        torch.testing.assert_close(product(codes, 3, bias, onto=start), expected + onto)


def test_bytes_of_integers_that_do_not_fit_the_cache() -> None:
    x = torch.randint(-7, 249, (3, 300_000)).float()
    assert torch.equal(bytes_of(x, 7).float(), x + 7)


@pytest.mark.parametrize(("name", "bits", "options"), METHODS)
def test_every_product_on_integers_is_the_simulated_one(name: str, bits: str, options: dict[str, object]) -> None:
    """Product by product, on what arrives there: to 1e-5."""
    model = vitquant.quantize(vit(), images(4), name, bits, **options)
    fast = IntegerModel(model)
    mode = Compare(model, fast)
    with torch.no_grad(), mode:
        model.model(images())
    assert mode.compared == set(fast.products) and fast.products
    assert not any(call.op == "conv" for call in fast.floating)


class Compare(Interceptor):
    """Runs the simulated model, and every product's integer form beside it on the same operands."""

    def __init__(self, model: QuantizedModel, fast: IntegerModel) -> None:
        super().__init__(model.model, model.transforms())
        self.products, self.places, self.compared = fast.products, model.transforms(), set[CallKey]()

    def call(self, key: CallKey, operation: Any, func: Any, args: list[Any], kwargs: Any) -> Any:
        arrived = list(args)
        wanted = super().call(key, operation, func, args, kwargs)
        product: Any = self.products.get(key)
        if product is not None:
            rewritten = self.places.get(Site(key, "bias"))
            arrived[2] = arrived[2] if rewritten is None else rewritten(arrived[2])
            found = (product.linear if key.op == "linear" else product.conv)(*arrived, **kwargs)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
            self.compared.add(key)
        return wanted


def test_codes_are_the_formats_own() -> None:
    model = vitquant.quantize(vit(), images(4), "deploy-int8")
    places = dict(zip(model.sites, model.operands, strict=True))
    for call, product in IntegerModel(model).products.items():
        operand = places[Site(call, "input")]
        assert isinstance(product, UniformLinear) and isinstance(operand, Activation)
        x = torch.randn(5, 7) * product.scale * 100
        assert torch.equal(product.codes(x).float(), operand.quantizer.encode(x, operand.params))


def test_what_stays_in_floating_point_is_named() -> None:
    fast = IntegerModel(vitquant.quantize(vit(), images(4), "adfq-vit", "w4a4", optimise=False))
    reasons = set(fast.floating.values())
    assert any("batched" in r for r in reasons) and any("ShiftLog4" in r for r in reasons)
    assert not set(fast.floating) & set(fast.products)


class Kernels(TorchDispatchMode):
    """The names of all kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "fused"), [("deploy-int8", True), ("minmax", False)])
def test_attention_stays_fused_where_nothing_inside_is_quantized(name: str, fused: bool) -> None:
    fast = IntegerModel(vitquant.quantize(vit(), images(4), name, "w8a8"))
    kernels = Kernels()
    with torch.no_grad(), kernels:
        fast(images())
    assert any("attention" in n for n in kernels.names) is fused


def test_fq_vit_runs_under_its_own_arithmetic_and_gives_the_same_bits() -> None:
    model = vitquant.quantize(vit(), images(4), "fq-vit", "w8a8")
    with torch.no_grad():
        assert torch.equal(IntegerModel(model)(images()), model(images()))


@pytest.mark.slow  # torch.compile takes its time
@pytest.mark.parametrize(
    ("method", "options"),
    [("deploy-int8", {}), ("repq-vit", {}), ("adfq-vit", {"optimise": False, "threshold": 1.5}), ("igq-vit", {})],
)
def test_compiled_it_computes_the_same_for_any_number_of_images(method: str, options: dict[str, object]) -> None:
    """Up to a rounding that falls the other way: a step of one grid among many."""
    model = vitquant.quantize(vit(), images(4), method, "w8a8", **options)
    run = compiled(model)
    for count in (1, 3, 2):
        with torch.no_grad():
            wanted = model(images(count))
        assert float((run(images(count)) - wanted).norm() / wanted.norm()) < 0.02


def test_what_cannot_be_compiled_is_said() -> None:
    with pytest.raises(ExportError, match="an execution on integers"):
        compiled(vitquant.quantize(vit(), images(4), "fq-vit", "w8a8"))
