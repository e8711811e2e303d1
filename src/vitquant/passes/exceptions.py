"""Which weights are worth more bits, under a budget of size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vitquant.calibrate import Bench
from vitquant.passes.allocate import choose, divergence
from vitquant.passes.fit import fit_weight
from vitquant.recipe.state import Rule, State
from vitquant.trace import Site
from vitquant.trace.replay import Tape


@dataclass(frozen=True)
class Exceptions:
    """`rule`, of more bits, for the weights whose planned bits cost the most, as many as fit into `size` (own).

        minimise Σ_w Φ_w(rule of w)  subject to  stored bits <= size · 32 · parameters

    Φ_w(rule) = mean over images of KL(p_FP || p), p from the model with weight w alone quantized. Stored are each
    weight's codes and all other parameters in 32 bits; a file's own overhead comes on top. Where the planned bits
    alone take more, there are no exceptions. Measured on the first `images` calibration images, whose intermediate
    results are kept. Runs before weights are fitted. The model's output must be logits, classes on the last axis.
    """

    rule: Rule
    size: float
    images: int = 8

    def __call__(self, state: State, bench: Bench) -> State:
        weights = {s: w for s in state.plan if (w := state.constant(s)) is not None}
        rows = {site: (state.plan[site], self.rule) for site in weights}
        costs = [[rule.quantizer.storage_bits * weights[s].numel() for rule in row] for s, row in rows.items()]
        total = sum(p.numel() for p in bench.model.parameters())
        rest = 32 * (total - sum(w.numel() for w in weights.values()))
        budget = max(int(self.size * 32 * total) - rest, sum(planned for planned, _ in costs))
        best = choose(self._losses(rows, state, bench), costs, budget)
        chosen = {site: row[i] for (site, row), i in zip(rows.items(), best, strict=True)}
        return replace(state, plan={**state.plan, **chosen})

    def _losses(self, rows: dict[Site, tuple[Rule, Rule]], state: State, bench: Bench) -> np.ndarray:
        """Φ, (weights, 2)."""
        images = next(iter(replace(bench.images, size=self.images)))
        tape, losses = Tape.record(bench.model, images), np.zeros((len(rows), 2))
        for i, (site, row) in enumerate(rows.items()):
            for j, rule in enumerate(row):
                p = fit_weight(site, replace(state, plan={**state.plan, site: rule}))
                losses[i, j] = divergence(tape, site, rule, p) / len(images)
            bench.progress("measuring weights", i + 1, len(rows))
        return losses
