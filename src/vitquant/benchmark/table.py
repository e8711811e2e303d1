"""The results as rows, as text, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from vitquant.benchmark.contenders import Missing
from vitquant.errors import ExportError


@dataclass(frozen=True)
class Timing:
    """Seconds of one batch: median and quartiles over the repeats."""

    batch: int
    median: float
    low: float
    high: float

    @staticmethod
    def of(batch: int, seconds: list[float]) -> Timing:
        low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return Timing(batch, median(seconds), low, high)

    @property
    def throughput(self) -> float:
        """Images a second."""
        return self.batch / self.median

    def differs(self, other: Timing) -> bool:
        """The spreads do not overlap."""
        return self.low > other.high or other.low > self.high


@dataclass(frozen=True)
class Row:
    """bytes: on disk. memory: largest resident memory of the process that did nothing else, engine included.
    top1: percent, where there were labels."""

    name: str
    kind: str
    bytes: int
    memory: int
    timings: Mapping[int, Timing]
    top1: float | None = None


@dataclass(frozen=True)
class Table:
    """machine, settings: what the numbers hold for."""

    rows: tuple[Row, ...]
    missing: tuple[Missing, ...]
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]

    def baseline(self, batch: int) -> Row | None:
        """The fastest floating-point contender, bf16 included."""
        rows = [r for r in self.rows if r.kind == "float"]
        return min(rows, key=lambda r: r.timings[batch].median, default=None)

    def ratio(self, row: Row, batch: int) -> tuple[float, bool] | None:
        """How many times as fast as the baseline, and whether that is more than the spread."""
        base = self.baseline(batch)
        if base is None:
            return None
        own, other = row.timings[batch], base.timings[batch]
        return other.median / own.median, own.differs(other)

    def to_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            said = asdict(row)
            for batch, timing in said["timings"].items():
                found = self.ratio(row, batch)
                timing["throughput"] = row.timings[batch].throughput
                timing["ratio"], timing["beyond_spread"] = found if found is not None else (None, None)
            rows.append(said)
        missing = [asdict(m) for m in self.missing]
        return {"machine": dict(self.machine), "settings": dict(self.settings), "rows": rows, "missing": missing}

    def save(self, path: str | Path) -> Path:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return Path(path)

    def text(self) -> str:
        """A Markdown table. "=" marks a ratio inside the spread: no difference was measured."""
        batches = list(self.settings["batches"])
        head = ["", "top-1 %", "MB", "peak MB"]
        head += [f"batch {b}: {what}" for b in batches for what in ("ms", "img/s", "ratio")]
        body = [self._cells(row, batches) for row in self.rows]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        rule = ["-" * w for w in widths]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in (head, rule, *body)
        ]
        lines += ["", *(f"not measured: {m.name}: {m.reason}" for m in self.missing)]
        bases = [f"batch {b}: {base.name}" for b in batches if (base := self.baseline(b)) is not None]
        lines += [f"ratio: speed against the fastest floating point ({'; '.join(bases)}); = means inside the spread"]
        lines += [", ".join(f"{k} {v}" for k, v in {**self.machine, **self.settings}.items())]
        return "\n".join(lines)

    def _cells(self, row: Row, batches: list[int]) -> list[str]:
        accuracy = "" if row.top1 is None else f"{row.top1:.1f}"
        cells = [row.name, accuracy, f"{row.bytes / 1e6:.2f}" if row.bytes else "", f"{row.memory / 1e6:.0f}"]
        for batch in batches:
            t, found = row.timings[batch], self.ratio(row, batch)
            spread = max(t.high - t.median, t.median - t.low)
            cells += [f"{t.median * 1e3:.2f} ± {spread * 1e3:.2f}", f"{t.throughput:.0f}"]
            cells.append("" if found is None else f"{'' if found[1] else '= '}{found[0]:.2f}")
        return cells

    def plot(self, path: str | Path) -> Path:
        """Accuracy against latency (first batch size) and against size. Raises ExportError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ExportError("the plot needs matplotlib: pip install matplotlib") from None
        rows = [r for r in self.rows if r.top1 is not None]
        batch = self.settings["batches"][0]
        figure = Figure(figsize=(12, 5), layout="constrained")
        for axes, label in zip(
            figure.subplots(1, 2, sharey=True), (f"ms at batch {batch}", "MB on disk"), strict=True
        ):
            for row in rows:
                x = row.timings[batch].median * 1e3 if label.startswith("ms") else row.bytes / 1e6
                if not x:
                    continue
                axes.plot(x, row.top1, {"float": "ks", "ours": "ro", "peer": "b^"}[row.kind])
                axes.annotate(row.name, (x, row.top1), fontsize=6, xytext=(3, 3), textcoords="offset points")
            axes.set(xlabel=label, ylabel="top-1 %", xscale="log")
        figure.savefig(path)
        return Path(path)
