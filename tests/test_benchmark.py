"""The measurement: every contender is there or named with its reason, and spreads decide what is a difference."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch

import vitquant
from vitquant.benchmark import Missing, Row, Table, Timing, benchmark


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


def test_every_contender_is_measured_or_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=10
    ).eval()
    images = torch.randn(4, 3, 32, 32)
    small = vitquant.quantize(model, images, method="deploy-int8", bits="w8a8")
    labels = model(images).argmax(1)
    table = benchmark(small, model, images, labels, batches=(1, 2), threads=1, repeats=2, peers=False)
    names = {r.name for r in table.rows} | {m.name for m in table.missing}
    assert {
        "PyTorch FP32",
        "ONNX Runtime FP32",
        "OpenVINO bf16",
        "ours, OpenVINO",
        "ours, torch int8 runtime",
    } <= names
    assert all(m.reason for m in table.missing)
    rows = {r.name: r for r in table.rows}
    assert rows["ONNX Runtime FP32"].top1 == 100.0
    assert all(r.memory > 0 and r.timings[2].median > 0 for r in table.rows)
    saved = json.loads(table.save(tmp_path / "table.json").read_text())
    assert len(saved["rows"]) == len(table.rows) and len(saved["missing"]) == len(table.missing)
