"""Vision transformers of every family, with random weights: `FLEET[name]()` gives (model, image)."""

from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn

Build = Callable[[], tuple[nn.Module, Tensor]]


def _finish(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = [p for p in model.parameters()][-2:]  # many heads start at zero, which would hide differences
    with torch.no_grad():
        for p in head:
            p.normal_(0, 0.05, generator=generator)
    return model.eval(), torch.randn(2, *shape, generator=generator)


def _timm(name: str, **kwargs: object) -> Build:
    def build() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs)
        return _finish(model, model.pretrained_cfg["input_size"])

    return build


def _torchvision(name: str) -> Build:
    def build() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return _finish(torchvision.models.get_model(name, weights=None), (3, 224, 224))

    return build


def _hf(kind: str, size: int, **settings: object) -> Build:
    def build() -> tuple[nn.Module, Tensor]:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(image_size=size, num_labels=10, **settings)
        return _finish(getattr(transformers, f"{kind}ForImageClassification")(config), (3, size, size))

    return build


_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}

LISTED: dict[str, Build] = {
    "timm deit": _timm("deit_tiny_patch16_224"),
    "timm vit": _timm("vit_small_patch16_224"),
    "timm swin": _timm("swin_tiny_patch4_window7_224"),
    "timm beit": _timm("beit_base_patch16_224", depth=2),
    "timm eva02": _timm("eva02_tiny_patch14_224", num_classes=10),
    "torchvision vit": _torchvision("vit_b_16"),
    "torchvision swin": _torchvision("swin_t"),
    "hf vit": _hf("ViT", 32, intermediate_size=96, **_SMALL),
    "hf swin": _hf("Swin", 64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "hf dinov2": _hf("Dinov2", 32, **_SMALL),
}

UNLISTED: dict[str, Build] = {
    "distilled": _timm("deit_tiny_distilled_patch16_224", depth=2),
    "talking heads": _timm("cait_xxs24_224", depth=2),
    "cross-attention of two scales": _timm("crossvit_tiny_240"),
    "convolutional": _timm("levit_128s"),
    "hybrid": _timm("mobilevit_xxs"),
    "post-norm, cosine": _timm("swinv2_tiny_window8_256", depths=(1, 1, 1, 1)),
    "channel attention": _timm("xcit_nano_12_p16_224", depth=2),
    "factorised attention": _timm("coat_tiny"),
    "inner and outer": _timm("tnt_s_patch16_224", depth=2),
    "pooled attention": _timm("mvitv2_tiny"),
    "gated position": _timm("convit_tiny", depth=2),
    "linear attention": _timm("efficientvit_b0"),
    "attention pooling": _timm("vit_base_patch16_siglip_224", depth=2, num_classes=10),
    "relative position by einsum": _timm("samvit_base_patch16_224", depth=2),
    "mask units": _timm("hiera_tiny_224", stages=(1, 1, 1, 1)),
    "token pooling": _timm("pit_ti_224"),
}
