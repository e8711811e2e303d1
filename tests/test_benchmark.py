"""The measurement: every contender is there or named with its reason, and spreads decide what is a difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import vitquant
from vitquant import models
from vitquant.artifact import Provenance
from vitquant.benchmark import Missing, Row, Table, Timing, benchmark
from vitquant.benchmark.contenders import prepare
from vitquant.digits import DigitsImages


def test_a_difference_inside_the_spread_is_not_called_one() -> None:
    steady = Timing.of(1, [1.0, 1.01, 1.02, 1.03])
    near, far = Timing.of(1, [1.0, 1.02, 1.04, 1.05]), Timing.of(1, [0.5, 0.51, 0.52, 0.53])
    rows = [Row("base", "float", 100, 1, {1: steady}), Row("near", "ours", 50, 1, {1: near})]
    rows.append(Row("far", "ours", 50, 1, {1: far}))
    table = Table(tuple(rows), (Missing("x", "peer", "not installed"),), {}, {"batches": [1]})
    assert table.ratio(rows[1], 1)[1] is False  # type: ignore[index]
    ratio, real = table.ratio(rows[2], 1)  # type: ignore[misc]
    assert real and 1.9 < ratio < 2.1
    text = table.text()
    assert "= 0.9" in text and "not measured: x: not installed" in text


def test_what_cannot_be_prepared_is_named_with_its_reason(tmp_path: Path) -> None:
    """A model of the user's own runs in this process and on the engines, but no other process can build it."""
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(48, 8)).eval(), torch.randn(4, 3, 4, 4)
    small = vitquant.quantize(model, images, "deploy-int8", "w8a8")
    found = {c.name: c for c in prepare(small, model, images, tmp_path, peers=False)}
    assert isinstance(found["PyTorch FP32"], Missing) and "another process" in found["PyTorch FP32"].reason
    assert not isinstance(found["ours, ONNX Runtime"], Missing)


@pytest.mark.slow  # torch.compile takes its minutes
def test_every_contender_is_measured_or_named(tmp_path: Path) -> None:
    loaded = models.load(models.parse("digits"))
    batches = DigitsImages("val").sample(8, 0).batches(8)
    images, labels = next(batches)
    provenance = Provenance(method={}, model=loaded.source.to_json(), preprocessing=loaded.preprocessing)
    small = vitquant.quantize(loaded.model, images, "deploy-int8", "w8a8", provenance=provenance)
    assert labels is not None
    table = benchmark(small, loaded.model, images, labels, batches=(1, 2), threads=1, repeats=2, peers=False)
    names = {r.name for r in table.rows} | {m.name for m in table.missing}
    assert {
        "PyTorch FP32",
        "ONNX Runtime FP32",
        "OpenVINO bf16",
        "ours, OpenVINO",
        "ours, portable runtime",
        "ours, portable runtime, compiled",
    } <= names
    assert all(m.reason for m in table.missing)
    rows = {r.name: r for r in table.rows}
    assert rows["ONNX Runtime FP32"].top1 >= 87.5 and rows["PyTorch FP32"].bytes > 400_000
    assert all(r.memory > 0 and r.timings[2].median > 0 for r in table.rows)
    saved = json.loads(table.save(tmp_path / "table.json").read_text())
    assert len(saved["rows"]) == len(table.rows) and len(saved["missing"]) == len(table.missing)
