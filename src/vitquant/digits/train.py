"""Train the built-in digits model: ``python -m vitquant.digits.train --output FILE``.

About a minute on one thread. The same machine and library versions give the same bytes every time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitquant.digits import MEAN, STD, DigitsImages, build

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, EMA = 80, 64, 2e-3, 0.2, 0.99
JITTER = torch.tensor([0.15, 0.1, 0.12, 0.12])  # radians, share, and two moves in half image widths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    output = parser.parse_args().output
    torch.set_num_threads(1)  # the order of a sum is then the same every time
    model = train()
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, output)
    print(f"{output}: {accuracy(model):.2f} % of the validation digits")


def train(epochs: int = EPOCHS) -> nn.Module:
    """The trained model: an average over the last steps, not a pick by validation accuracy."""
    torch.manual_seed(0)
    images, labels = next(DigitsImages("calib").batches(2000))
    assert labels is not None
    model = build().train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for chosen in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
            loss = cross_entropy(model(jitter(images[chosen])), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
    return averaged.module.eval()


def jitter(images: Tensor) -> Tensor:
    """Turn, scale and move each image (B, 1, 8, 8) a little: up to 0.15 rad, 10 % and half a pixel."""
    angle, scale, right, down = (torch.rand(4, len(images)) * 2 - 1) * JITTER[:, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    rows = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = affine_grid(rows, list(images.shape), align_corners=False)
    background = -MEAN / STD  # what lies outside an image; grid_sample fills in zero
    return grid_sample(images - background, grid, align_corners=False) + background


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Percent of the validation digits that ``model`` gets right."""
    images, labels = next(DigitsImages("val").batches(1000))
    return 100 * float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
