"""How many run-time groups each site gets, under a budget of bit-operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.optimize import milp
from torch import Tensor

from vitquant.calibrate import Bench
from vitquant.errors import UsageError
from vitquant.numerics import InstanceGroups, Params
from vitquant.passes.fit import search
from vitquant.recipe.ledger import Ledger
from vitquant.recipe.state import Rule, State
from vitquant.trace import Site
from vitquant.trace.intercept import tensors_in
from vitquant.trace.replay import Tape

CANDIDATES = (1, 2, 4, 6, 8, 10, 12, 16, 24)


@dataclass(frozen=True)
class Budget:
    """At most as many bit-operations as the whole model needs with `groups` groups at every site, times `ratio`;
    or `bops`, said outright."""

    groups: int = 8
    ratio: float = 1.0
    bops: int | None = None

    def limit(self, state: State) -> int:
        """The budget in bit-operations for one image."""
        if self.bops is not None:
            return self.bops
        fixed = {s: with_groups(state.plan[s], self.groups) for s in grouped(state)}
        return int(self.ratio * Ledger.of(replace(state, plan={**state.plan, **fixed})).bops())


@dataclass(frozen=True)
class AllocateGroups:
    """The number of groups of every `InstanceGroups` site, by an exact integer programme (IGQ-ViT, section 3.4).

        minimise Σ_l Φ_l(G_l)  subject to  bops(model with G_1, G_2, ...) <= budget

    Φ_l(G) = mean over images of KL(p_FP || p), p from the model with only site l quantized, by G groups; operations
    before the site are not run again. The KL divergence and the programme are the paper's; the single-layer
    protocol, `candidates` and the model of costs are reconstructed. Φ is measured on the first `images` calibration
    images, `batch` at a time (their intermediate results are kept). Runs after `Fit`: the rest of the state is priced
    as it stands. The model's output must be logits, classes on the last axis.

    Raises UsageError if not even the cheapest choice is within the budget.
    """

    budget: Budget = Budget()
    candidates: tuple[int, ...] = CANDIDATES
    images: int = 16
    batch: int = 8

    def __call__(self, state: State, bench: Bench) -> State:
        options = self._options(state, bench)
        losses = self._losses(options, bench)
        costs = [[_bops(state, site, rule) for rule, _ in row] for site, row in options.items()]
        rest = Ledger.of(state).bops() - sum(_bops(state, site, state.plan[site]) for site in options)
        best = choose(losses, costs, self.budget.limit(state) - rest)
        chosen = {site: row[i] for (site, row), i in zip(options.items(), best, strict=True)}
        return replace(
            state,
            plan={**state.plan, **{site: rule for site, (rule, _) in chosen.items()}},
            params={**state.params, **{site: p for site, (_, p) in chosen.items()}},
        )

    def _options(self, state: State, bench: Bench) -> dict[Site, list[tuple[Rule, Params]]]:
        """Every site's rule and bank for each candidate, from one sweep in floating point."""
        rules = {site: state.plan[site] for site in grouped(state)}
        collectors = {s: (rule.quantizer, rule.search.collector(bench.seed)) for s, rule in rules.items()}
        bench.sweep(state.floating().transforms(), collectors)
        options = {}
        for done, (site, rule) in enumerate(rules.items(), 1):
            sample = collectors[site][1].summary()
            row = [with_groups(rule, count) for count in self.candidates]
            options[site] = [(r, search(r, sample, site)) for r in row]
            bench.progress("clustering", done, len(rules))
        return options

    def _losses(self, options: Mapping[Site, Sequence[tuple[Rule, Params]]], bench: Bench) -> np.ndarray:
        """Φ, (sites, candidates)."""
        losses = np.zeros((len(options), len(self.candidates)))
        seen = 0
        for images in replace(bench.images, size=self.batch):
            images = images[: self.images - seen]
            if not len(images):
                break
            tape = Tape.record(bench.model, images)
            for i, (site, row) in enumerate(options.items()):
                losses[i] += [divergence(tape, site, rule, p) for rule, p in row]
                bench.progress("measuring", seen * len(options) + i + 1, self.images * len(options))
            seen += len(images)
        return losses / seen


def choose(losses: np.ndarray, costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One column of each row: the least sum of losses among those whose sum of costs is within the budget.

    A multiple-choice knapsack, solved to optimality (HiGHS through scipy.optimize.milp). losses: (rows, columns);
    costs: likewise, integers. Raises UsageError if there is no such choice.
    """
    price = np.array(costs, dtype=np.int64)
    cheapest = price.min(1)
    if cheapest.sum() > budget:
        raise UsageError(f"the budget is {cheapest.sum() - budget} bit-operations below the cheapest allocation")
    price = price - cheapest[:, None]
    spare = limit = int(budget - cheapest.sum())
    loss = losses - losses.min(1, keepdims=True)
    one_each = np.kron(np.eye(len(price)), np.ones(price.shape[1]))
    while True:
        solution = milp(
            (loss / max(loss.max(), 1e-300)).ravel(),
            integrality=np.ones(price.size),
            bounds=(0, 1),
            constraints=[(one_each, 1, 1), (price.reshape(1, -1) / max(spare, 1), -np.inf, limit / max(spare, 1))],
            options={"mip_rel_gap": 0},
        )
        picks = solution.x.reshape(price.shape).argmax(1)
        excess = int(np.take_along_axis(price, picks[:, None], 1).sum()) - spare
        if excess <= 0:
            return picks.tolist()
        limit -= excess  # the solver's tolerance let it through


def grouped(state: State) -> list[Site]:
    """The sites whose number of groups can be chosen, in order of execution."""
    return [s for s in state.trace.sites if s in state.plan and isinstance(state.plan[s].quantizer, InstanceGroups)]


def with_groups(rule: Rule, count: int) -> Rule:
    """The rule with another number of groups."""
    changed: Any = {"groups": count}
    return replace(rule, quantizer=replace(rule.quantizer, **changed))


def _bops(state: State, site: Site, rule: Rule) -> int:
    return rule.quantizer.extra_bops(state.trace.sites[site].shape, state.trace.macs.get(site.call, 0))


def divergence(tape: Tape, site: Site, rule: Rule, p: Params) -> float:
    """KL(p_FP || p) summed over the tape's images, p with this site alone quantized."""
    output = tape.run({site: lambda x: rule.quantizer.fake_quantize(x, p)})
    return float(F.kl_div(log_probs(output), log_probs(tape.output), reduction="sum", log_target=True))


def log_probs(output: Any) -> Tensor:
    """Of a model's output, whose first tensor is logits, classes on the last axis; float64."""
    logits = tensors_in(output.to_tuple() if hasattr(output, "to_tuple") else output)[0]
    return F.log_softmax(logits.double(), -1)
