"""How good a model is on labelled images, and how close to its reference, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from vitquant.errors import DataError, NonFinite, UsageError
from vitquant.models import logits_of


@dataclass(frozen=True)
class Report:
    """What one pass over the images measured. Accuracies and agreement are in percent, KL in nats.

    ``top1``, ``top5`` and ``correct`` (top-1, one bool for each image in order) are None without labels,
    ``top5`` also with fewer than 5 classes; ``agreement`` (same top-1 as the reference) and ``kl`` (mean of
    KL(reference || model) over images) are None without a reference. ``seconds``: the model's forward alone.
    """

    images: int
    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    correct: tuple[bool, ...] | None
    seconds: float

    def standard_error(self) -> float | None:
        """Binomial standard error of ``top1``, in percentage points; None without labels."""
        if self.top1 is None:
            return None
        return math.sqrt(self.top1 * (100 - self.top1) / self.images)


def measure(
    batches: Iterable[tuple[Tensor, Tensor | None]],
    model: Callable[[Tensor], Any],
    reference: Callable[[Tensor], Any] | None = None,
    *,
    total: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Run ``model``, and ``reference`` if given, over (images (B, C, H, W), labels (B,) or None).

    Holds one batch at a time. ``progress(done, total)`` is called after each batch, in images; ``total`` only
    passes through. Raises DataError without images, or with neither labels nor a reference; NonFinite, naming
    the batch, if logits hold NaN or infinity.
    """
    done, seconds, kl, agreed, in_top5 = 0, 0.0, 0.0, 0, 0
    correct: list[bool] = []
    labelled, classes = True, 0
    for number, (images, labels) in enumerate(batches):
        if labels is None and reference is None:
            raise DataError("the images have no labels and there is no reference model: nothing to measure")
        where = f"batch {number} (images {done} to {done + len(images) - 1})"
        images = images.to(device)
        begin = perf_counter()
        logits = _logits(model, images)  # on the CPU: the copy waits for a GPU to finish
        seconds += perf_counter() - begin
        _require_finite(logits, "model", where)
        if reference is not None:
            expected = _logits(reference, images)
            _require_finite(expected, "reference model", where)
            agreed += int((logits.argmax(1) == expected.argmax(1)).sum())
            kl += _kl(expected, logits)
        labelled = labelled and labels is not None
        if labels is not None:
            correct += (logits.argmax(1) == labels).tolist()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            in_top5 += int((best == labels[:, None]).sum())
        done += len(images)
        classes = logits.shape[1]
        if progress is not None:
            progress(done, total)
    if not done:
        raise DataError("no image came to measure on")
    return Report(
        images=done,
        top1=100 * sum(correct) / done if labelled else None,
        top5=100 * in_top5 / done if labelled and classes >= 5 else None,
        agreement=100 * agreed / done if reference is not None else None,
        kl=kl / done if reference is not None else None,
        correct=tuple(correct) if labelled else None,
        seconds=seconds,
    )


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Exact two-sided p-value of McNemar's test that two models, run on the same images, are equally good."""
    if len(correct_a) != len(correct_b):
        raise UsageError(f"a paired test needs the same images: {len(correct_a)} and {len(correct_b)} came")
    only_a = sum(a and not b for a, b in zip(correct_a, correct_b, strict=True))
    only_b = sum(b and not a for a, b in zip(correct_a, correct_b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b).pvalue)


def _logits(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Logits (B, classes), float64 on the CPU, whatever the model returns them in."""
    with torch.no_grad():
        return logits_of(model(images)).to("cpu", torch.float64)


def _require_finite(logits: Tensor, whose: str, where: str) -> None:
    if not bool(logits.isfinite().all()):
        raise NonFinite(f"the {whose}'s logits hold NaN or infinity in {where}")


def _kl(reference: Tensor, logits: Tensor) -> float:
    """Sum over images of KL(softmax(reference) || softmax(logits)), in nats."""
    log_p, log_q = reference.log_softmax(1), logits.log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum())
