"""Published methods, one short file each: a function from bit-widths to a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from vitquant.errors import UsageError
from vitquant.methods.plain import minmax, percentile
from vitquant.methods.repq_vit import repq_vit
from vitquant.recipe import Bits, Recipe

METHODS: Mapping[str, Callable[..., Recipe]] = {
    "minmax": minmax,
    "percentile": percentile,
    "repq-vit": repq_vit,
}
"""Every method by the name that the command line knows."""


def recipe(method: str | Recipe, bits: str | Bits = "w4a4", **options: Any) -> Recipe:
    """The recipe of a method by name, or the user's own unchanged. Raises UsageError for unknown names."""
    if isinstance(method, Recipe):
        return method
    if method not in METHODS:
        near = get_close_matches(method, METHODS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"unknown method '{method}'{hint} There are: {', '.join(METHODS)}")
    return METHODS[method](Bits.parse(bits) if isinstance(bits, str) else bits, **options)


def describe(name: str) -> dict[str, Any]:
    """A method for a table: paper, default bits, summary, what each role gets, cost at run time."""
    built = METHODS[name]()
    rules = {
        role.value: "float32" if rule is None else rule.quantizer.describe() for role, rule in built.rules.items()
    }
    summary = (METHODS[name].__doc__ or "").strip().split("\n\n")[0]
    return {
        "name": name,
        "source": built.source,
        "bits": built.bits,
        "summary": " ".join(summary.split()),
        "sites": rules,
        "cost": built.cost,
    }


__all__ = ["METHODS", "describe", "minmax", "percentile", "recipe", "repq_vit"]
