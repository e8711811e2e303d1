"""The pieces of a model that are optimised one after the other, found from the flow of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vitquant.trace.flow import Node, _Flow
from vitquant.trace.operations import CONTRACTIONS
from vitquant.trace.site import CallKey, Role, Site
from vitquant.trace.trace import Trace


@dataclass(frozen=True)
class Unit:
    """A module to run, and the products inside it that belong together.

    scope: path of the smallest module that holds all `calls`; "" is the model itself. The module may hold other
    products too (a whole block where a model has no module for its MLP alone); those belong to other units.
    """

    scope: str
    calls: tuple[CallKey, ...]

    def holds(self, site: Site) -> bool:
        """The site is used when the unit's module runs."""
        return not self.scope or f"{site.call.scope}.".startswith(f"{self.scope}.")

    def owns(self, site: Site) -> bool:
        """The site is an operand of the unit's own products."""
        return site.call in self.calls

    def __str__(self) -> str:
        return self.scope or "the model"


def units(trace: Trace) -> list[Unit]:
    """Attention, MLP, and every other product with a weight as a unit of its own, in the order in which they end.

    An attention's unit: the projections that its queries, keys and values come from, its two products, and the
    linear that reads the result. An MLP's: a linear that reads an activation function, and what the function
    reads. Groups that share a product are one unit. (ADFQ-ViT's modules, arXiv:2407.02763.)
    """
    flow = _Flow(trace.nodes)
    groups = [set(_attention(flow, i)) for i in range(len(trace.nodes)) if flow.is_mix(i)]
    groups += [set(_mlp(flow, i)) for i, n in enumerate(trace.nodes) if _has_role(trace, n, Role.POST_ACT)]
    groups += [{i} for i, n in enumerate(trace.nodes) if _weighted(flow, n)]
    merged: list[set[int]] = []
    for group in groups:
        touching = [g for g in merged if g & group]
        merged = [g for g in merged if not g & group] + [group.union(*touching)]
    with_weight = [sorted(g) for g in merged if any(_weighted(flow, trace.nodes[i]) for i in g)]
    return [_unit(trace.nodes[i] for i in g) for g in sorted(with_weight, key=max)]


def blocks(trace: Trace) -> list[Unit]:
    """The same with each attention joined with the MLP after it, run as the smallest module that holds both.

    The blocks of BRECQ (arXiv:2102.05426), where a model's modules allow it.
    """
    found: list[Unit] = []
    for unit in units(trace):
        attends = bool(found) and any(c.op == "matmul" for c in found[-1].calls)
        if attends and len(unit.calls) > 1 and not any(c.op == "matmul" for c in unit.calls):
            attention = found.pop()
            unit = Unit(_common([attention.scope, unit.scope]), attention.calls + unit.calls)
        found.append(unit)
    return found


def _unit(nodes: Iterable[Node]) -> Unit:
    calls = tuple(n.key for n in nodes if n.key is not None)
    return Unit(_common([c.scope for c in calls]), calls)


def _common(scopes: list[str]) -> str:
    """The deepest module that holds all of these."""
    paths = [s.split(".") for s in scopes]
    shared = 0
    while all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    return ".".join(paths[0][:shared])


def _has_role(trace: Trace, node: Node, role: Role) -> bool:
    sites = [Site(node.key, operand) for operand in node.operands] if node.key is not None else []
    return any(s in trace.sites and trace.role(s) is role for s in sites)


def _weighted(flow: _Flow, node: Node) -> bool:
    return node.kind in CONTRACTIONS and flow.weighted(node)


def _attention(flow: _Flow, mix: int) -> Iterator[int]:
    """The products of one attention: its own, the projections before it, the linear after it."""
    yield mix
    logits = {p for i in _behind(flow, mix, lambda n: n.kind == "softmax") for p in flow.behind_softmax(i)}
    yield from logits
    for product in (mix, *logits):
        yield from _behind(flow, product, lambda n: _weighted(flow, n))
    yield from _ahead(flow, mix)


def _mlp(flow: _Flow, index: int) -> Iterator[int]:
    """A linear that reads an activation function, and the products behind that function."""
    yield index
    yield from _behind(flow, index, lambda n: n.kind in CONTRACTIONS)


def _behind(flow: _Flow, start: int, wanted: Callable[[Node], bool]) -> Iterator[int]:
    """The nearest nodes before `start` that are wanted; another product ends the search on its way."""
    pending, seen = list(flow.nodes[start].inputs), set()
    while pending:
        index = pending.pop()
        node = flow.nodes[index]
        if index in seen:
            continue
        seen.add(index)
        if wanted(node):
            yield index
        elif node.kind not in CONTRACTIONS:
            pending += node.inputs


def _ahead(flow: _Flow, start: int) -> Iterator[int]:
    """The nearest products with a weight after `start`, if nothing is added on the way."""
    pending = list(flow.users[start])
    while pending:
        index = pending.pop()
        node = flow.nodes[index]
        if _weighted(flow, node):
            yield index
        elif node.kind in ("layout", "scale", "norm"):
            pending += flow.users[index]
