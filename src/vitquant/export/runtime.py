"""The portable runtime: a quantized model on PyTorch's integer products, whatever its formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor

from vitquant.artifact import QuantizedModel
from vitquant.artifact.operands import Activation, Weight
from vitquant.artifact.passing import Passing
from vitquant.errors import ExportError
from vitquant.export.lower import codes_of, integers_of, products
from vitquant.integer.linears import GroupedLinear, OutlierLinear, UniformLinear
from vitquant.numerics import PER_CHANNEL, InstanceGroups, OutlierAware
from vitquant.trace import CallKey, Site

SIGNED_BITS = 7
"""The widest codes whose distance from the zero-point is a signed byte."""


KINDS = (UniformLinear, OutlierLinear, GroupedLinear)
"""The integer forms of products."""


class IntegerModel(nn.Module):
    """A quantized model whose linears and plain convolutions run on integers; the rest is simulated.

    It gives what the model gives, up to rounding of the products' last sums. products: what runs on integers.
    floating: the other products, and why. A model with an `Arithmetic` of its own (FQ-ViT) runs under that, which
    leaves nothing in floating point and gives the same bits.

    kinds: the integer forms to use, where a product has one.
    """

    def __init__(self, model: QuantizedModel, kinds: tuple[type[nn.Module], ...] = KINDS) -> None:
        super().__init__()
        self.quantized = model
        self.products: dict[CallKey, nn.Module] = {}
        self.floating: dict[CallKey, str] = {}
        if model.arithmetic is None:
            for call in products(model):
                found = _product(call, model)
                if isinstance(found, kinds):
                    self.products[call] = found
                else:
                    self.floating[call] = found if isinstance(found, str) else f"{type(found).__name__} is left out"
        self.layers = nn.ModuleList(self.products.values())
        covered = {Site(call, name) for call in self.products for name in ("input", "weight")}
        self.simulated = {site: o for site, o in zip(model.sites, model.operands, strict=True) if site not in covered}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.quantized.arithmetic is not None:
            return self.quantized(*args, **kwargs)
        with _Run(self.quantized.model, self.simulated, self.products):
            return self.quantized.model(*args, **kwargs)


def compiled(model: QuantizedModel) -> Callable[[Tensor], Any]:
    """The model as one compiled program: no Python between operations, rounding joined with what comes before it.

    Products on one grid for all of their input run on integers. Outliers and run-time groups, whose integer forms
    take longer than what a compiler makes of the simulation, stay simulated. Through `torch.export` and
    `torch.compile`, on the first images and again when their number changes; that takes one to three minutes and a
    C++ compiler. Its numbers differ from the model's as those of another engine do: by last bits, and by the
    roundings that these turn. Raises ExportError for an execution on integers (FQ-ViT): thousands of small steps, on
    which the compiler was not done after ten minutes.
    """
    if model.arithmetic is not None:
        raise ExportError("the portable runtime does not compile an execution on integers, as FQ-ViT's")
    runtime = IntegerModel(model, (UniformLinear,))
    run: Callable[[Tensor], Any] | None = None

    def frozen(images: Tensor) -> Any:
        nonlocal run
        # Packed weights must be constants, whenever a new size is compiled.
        with torch.inference_mode(False), torch.no_grad(), inductor.patch(freezing=True):
            if run is None:
                run = torch.compile(_program(runtime, images[:1]))
            return run(images)

    return frozen


def _program(model: IntegerModel, image: Tensor) -> nn.Module:
    """Every operation of the model, for any number of images."""
    batch = (({0: torch.export.Dim("batch", min=1, max=1024)},),)
    two = image.repeat(2, *[1] * (image.dim() - 1))
    return torch.export.export(model, (two,), dynamic_shapes=batch, strict=False).module()


def _product(call: CallKey, model: QuantizedModel) -> nn.Module | str:
    """The integer form of a product, or the reason why there is none."""
    places = dict(zip(model.sites, model.operands, strict=True))
    x, w = places.get(Site(call, "input")), places.get(Site(call, "weight"))
    if call.op not in ("linear", "conv"):
        return "PyTorch has no batched product of integers"
    if not isinstance(x, Activation) or not isinstance(w, Weight):
        return "an operand is in floating point"
    form = integers_of(w)
    if form is None or form.axis != 0 or form.bits > 8 or form.values.element_size() > 1:
        return "the weight is not a signed byte for each value and a scale for each output"
    channels = model.ledger.entries[f"{call}.input"].shape[1]
    if call.op == "conv" and (form.values.ndim != 4 or form.values.shape[1] != channels):
        return "a convolution of groups"
    codes, quantizer = codes_of(x), x.quantizer
    if codes is not None and codes.rounds:
        return UniformLinear(codes.step, codes.zero, codes.low, codes.high, form.values, form.step)
    if isinstance(quantizer, OutlierAware) and call.op == "linear" and quantizer.bits <= SIGNED_BITS:
        return OutlierLinear(quantizer, x.params, form.values, form.step)
    if isinstance(quantizer, InstanceGroups) and call.op == "linear" and quantizer.granularity == PER_CHANNEL:
        return GroupedLinear(quantizer, x.params, form.values, form.step)
    return f"{quantizer.describe()} has no product of bytes"


class _Run(Passing):
    """Sends the covered products to their integer form. Attention stays fused where nothing inside is quantized."""

    def __init__(self, model: nn.Module, operands: Mapping[Site, Any], covered: dict[CallKey, Any]) -> None:
        super().__init__(model, operands)
        self.covered = covered
        self.inside = {site.call.scope for site in operands if site.call.op not in ("linear", "conv", "norm")}

    def opens(self, func: Callable[..., Any]) -> bool:
        return func is not F.scaled_dot_product_attention or self.scope in self.inside

    def call(self, key: CallKey, operation: Any, func: Callable[..., Any], args: list[Any], kwargs: Any) -> Any:
        product = self.covered.get(key)
        if product is not None:
            func = product.linear if key.op == "linear" else product.conv
        return super().call(key, operation, func, args, kwargs)
