"""The built-in default: a small ViT and scikit-learn's handwritten digits, so that everything runs at once.

1797 grey images of 8 × 8 pixels, split once and for all into 1437 for training and calibration and 360 for
validation. ``python -m vitquant.digits.train`` makes the weights that come with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor, nn
from typing_extensions import Self

from vitquant.images import Images

WEIGHTS = Path(__file__).with_name("weights.safetensors")
MEAN, STD = 0.5, 0.5  # of pixels in [0, 1]


def build() -> nn.Module:
    """The architecture, with random weights: (B, 1, 8, 8) -> logits (B, 10), 16 patches and a class token."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=4
    )


def load_weights(model: nn.Module) -> None:
    """Give ``model``, from ``build``, the weights that come with the package."""
    model.load_state_dict(load_file(WEIGHTS))


class DigitsImages(Images):
    """The digits, preprocessed (1, 8, 8): split ``"calib"`` (which also trained the model) or ``"val"``."""

    def __init__(self, split: Literal["calib", "val"]) -> None:
        from sklearn.datasets import load_digits  # slow to import, and only the digits need it
        from sklearn.model_selection import train_test_split

        data = load_digits()
        calib, val = train_test_split(range(len(data.target)), test_size=0.2, stratify=data.target, random_state=0)
        self._split = split
        self._indices = sorted(calib if split == "calib" else val)
        self._pixels = (torch.from_numpy(data.images).float()[:, None] / 16 - MEAN) / STD
        self._targets = torch.from_numpy(data.target).long()

    def __str__(self) -> str:
        return f"digits ({self._split})"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        return self._pixels[self._indices[index]]

    def labels(self) -> Tensor:
        """The digits 0 to 9, int64 (len(self),)."""
        return self._targets[self._indices]

    def entries(self) -> list[str]:
        """``digits INDEX`` of each image, the index into scikit-learn's data set."""
        return [f"digits {index}" for index in self._indices]

    def check(self) -> None:
        """Nothing to check: the images are in memory."""

    def _select(self, indices: Sequence[int]) -> Self:
        subset = copy(self)
        subset._indices = [self._indices[i] for i in indices]
        return subset
