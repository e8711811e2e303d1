"""Units of optimisation are found from the flow of data, whatever the modules are called."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from vitquant.trace import Site, observe
from vitquant.trace.units import Unit, blocks, units


def small_deit(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": depth, "num_heads": 3, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", **options).eval()


def small_swin() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
    return timm.create_model("swin_tiny_patch4_window7_224", **options).eval()


def small_torchvision() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=10).eval()


def small_hf() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval()


def found(model: nn.Module, size: int) -> list[Unit]:
    return units(observe(model, torch.randn(1, 3, size, size)))


def test_deit_attention_and_mlp_are_separate_units_in_network_order() -> None:
    wanted = ["patch_embed.proj", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head"]
    assert [u.scope for u in found(small_deit(), 32)] == wanted


def test_swin_downsampling_is_a_unit_of_its_own() -> None:
    scopes = [u.scope for u in found(small_swin(), 56)]
    assert scopes[:3] == ["patch_embed.proj", "layers.0.blocks.0.attn", "layers.0.blocks.0.mlp"]
    assert scopes[5] == "layers.1.downsample.reduction" and scopes[-1] == "head.fc" and len(scopes) == 11


@pytest.mark.parametrize("make", [small_torchvision, small_hf])
def test_other_libraries_give_the_same_structure(make: object) -> None:
    got = found(make(), 32)  # type: ignore[operator]
    kinds = [sorted(c.op for c in u.calls if c.op == "matmul") for u in got]
    assert [len(k) for k in kinds] == [0, 2, 0, 2, 0, 0]
    assert [sum(c.op != "matmul" for c in u.calls) >= 2 for u in got] == [False, True, True, True, True, False]


@pytest.mark.parametrize("make, size", [(small_deit, 32), (small_swin, 56), (small_torchvision, 32), (small_hf, 32)])
def test_every_product_with_a_weight_is_in_one_unit(make: object, size: int) -> None:
    trace = observe(make(), torch.randn(1, 3, size, size))  # type: ignore[operator]
    calls = [c for u in units(trace) for c in u.calls]
    assert len(calls) == len(set(calls))
    weighted = {s.call for s in trace.constants if s.operand == "weight" and s.call in trace.macs}
    assert weighted <= set(calls)
    assert all(u.holds(Site(c, "input")) for u in units(trace) for c in u.calls)


def test_blocks_join_an_attention_with_its_mlp() -> None:
    trace = observe(small_swin(), torch.randn(1, 3, 56, 56))
    scopes = [u.scope for u in blocks(trace)]
    assert scopes[1:3] == ["layers.0.blocks.0", "layers.0.blocks.1"] and "layers.1.downsample.reduction" in scopes


class _Bare(nn.Module):
    """A model without modules for its parts, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 12) for _ in range(3))
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.last(x + self.c(torch.nn.functional.silu(self.a(x)) * self.b(x)))


def test_a_gated_mlp_without_a_module_is_one_unit_of_the_whole_model() -> None:
    got = units(observe(_Bare(), torch.randn(1, 3, 2, 2)))
    assert [(u.scope, len(u.calls)) for u in got] == [("", 3), ("last", 1)]
