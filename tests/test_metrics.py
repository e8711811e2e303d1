"""Accuracy, agreement and divergence against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitquant.errors import DataError, NonFinite, UsageError
from vitquant.evaluate import Report, mcnemar, measure
from vitquant.images import ImageFolder
from vitquant.models import load, parse

# "Images" that are their own logits: 4 of them, 6 classes.
LOGITS = torch.tensor(
    [
        [9.0, 1, 2, 3, 4, 5],  # says 0
        [9.0, 1, 2, 3, 4, 5],
        [0.0, 8, 1, 2, 3, 4],  # says 1
        [0.0, 8, 1, 2, 3, 4],
    ]
)
LABELS = torch.tensor([0, 1, 1, 5])  # right, wrong and last, right, wrong but second


def batches(size: int = 3) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(LOGITS.split(size), LABELS.split(size), strict=True))


def identity(images: Tensor) -> Tensor:
    return images


def test_accuracies_are_percent_over_all_images_whatever_the_batches() -> None:
    for size in (1, 3, 4):
        report = measure(batches(size), identity)
        assert (report.images, report.top1, report.top5) == (4, 50.0, 75.0)
        assert report.correct == (True, False, True, False)
        assert (report.agreement, report.kl) == (None, None)
        assert report.standard_error() == pytest.approx(25.0)


def test_agreement_and_kl_are_measured_against_the_reference() -> None:
    def other(images: Tensor) -> Tensor:
        return torch.stack([images[:, 1], images[:, 0], *images.T[2:]], 1) if images[0, 0] == 0 else images

    p, q = LOGITS[2].softmax(0), LOGITS[2][[1, 0, 2, 3, 4, 5]].softmax(0)
    expected = float((p * (p / q).log()).sum()) / 2  # two images in four differ
    report = measure(batches(2), other, identity)
    assert report.agreement == 50.0
    assert report.kl == pytest.approx(expected, rel=1e-6)


def test_a_model_agrees_with_itself() -> None:
    report = measure(batches(), identity, identity)
    assert (report.agreement, report.kl) == (100.0, 0.0)


def test_without_labels_only_the_reference_is_measured() -> None:
    unlabelled = [(images, None) for images in LOGITS.split(2)]
    report = measure(unlabelled, identity, lambda images: images.flip(1))
    assert (report.top1, report.top5, report.correct, report.standard_error()) == (None, None, None, None)
    assert report.agreement == 0.0
    with pytest.raises(DataError, match="nothing to measure"):
        measure(unlabelled, identity)


def test_five_of_four_classes_is_no_measure() -> None:
    assert measure([(LOGITS[:, :4], LABELS)], identity).top5 is None


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no image"):
        measure([], identity)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_name_the_batch_and_the_model(value: float) -> None:
    def broken(images: Tensor) -> Tensor:
        return torch.where(images == 8, value, images)  # only in the last two images

    with pytest.raises(NonFinite, match=r"the model's logits .* in batch 1 \(images 2 to 3\)"):
        measure(batches(2), broken, identity)
    with pytest.raises(NonFinite, match=r"the reference model's logits .* in batch 1 \(images 2 to 3\)"):
        measure(batches(2), identity, broken)


def test_outputs_of_any_form_and_precision_are_measured_and_no_graph_is_kept() -> None:
    linear = torch.nn.Linear(6, 6)
    seen = []

    def model(images: Tensor) -> dict[str, Tensor]:
        seen.append(linear(images))
        return {"logits": images.bfloat16()}

    assert measure(batches(), model).top1 == 50.0
    assert not any(output.requires_grad for output in seen)


def test_progress_and_seconds() -> None:
    calls: list[tuple[int, int]] = []
    report = measure(batches(3), identity, total=4, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 4), (4, 4)]
    assert 0 < report.seconds < 5


def test_the_standard_error_is_in_percentage_points() -> None:
    report = Report(1000, 85.0, None, None, None, None, 0.0)
    assert report.standard_error() == pytest.approx(100 * math.sqrt(0.85 * 0.15 / 1000))


def test_mcnemar_is_the_exact_binomial_test_on_the_disagreements() -> None:
    a = [True] * 8 + [False] * 2 + [True] * 90
    b = [False] * 8 + [True] * 2 + [True] * 90
    assert mcnemar(a, b) == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 2**10)
    assert mcnemar(a, b) == mcnemar(b, a)
    assert mcnemar(a, a) == 1.0
    with pytest.raises(UsageError, match="3 and 2"):
        mcnemar([True] * 3, [True] * 2)


def deit(shared_data: Path) -> tuple[ImageFolder, torch.nn.Module]:
    checkpoint = shared_data / "deit_tiny" / "deit_tiny_patch16_224.safetensors"
    loaded = load(parse("deit_tiny_patch16_224", checkpoint))
    root = shared_data / "imagenet" / "val"
    return ImageFolder(root, loaded.transform, loaded.label_space, loaded.classes), loaded.model


def test_deit_tiny_is_accurate_on_real_images(shared_data: Path) -> None:
    images, model = deit(shared_data)
    report = measure(images.sample(64, seed=0).batches(32), model)
    assert report.top1 is not None and report.top1 > 70


@pytest.mark.slow
def test_deit_tiny_has_its_known_accuracy(shared_data: Path) -> None:
    images, model = deit(shared_data)
    report = measure(images.batches(50), model)
    assert report.images == 1000
    assert report.top1 == pytest.approx(85.0, abs=0.3)
