"""Published methods, one short file each: a function from bit-widths to a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from vitquant.errors import UsageError
from vitquant.methods.adfq_vit import adfq_vit
from vitquant.methods.deploy import deploy_int8, deploy_w4a8
from vitquant.methods.fq_vit import fq_vit
from vitquant.methods.igq_vit import igq_vit
from vitquant.methods.plain import minmax, percentile
from vitquant.methods.repq_vit import repq_vit
from vitquant.recipe import Bits, Recipe

METHODS: Mapping[str, Callable[..., Recipe]] = {
    "minmax": minmax,
    "percentile": percentile,
    "repq-vit": repq_vit,
    "adfq-vit": adfq_vit,
    "fq-vit": fq_vit,
    "igq-vit": igq_vit,
    "deploy-int8": deploy_int8,
    "deploy-w4a8": deploy_w4a8,
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
    known = inspect.signature(METHODS[method]).parameters
    unknown = [name for name in options if name not in known or name == "bits"]
    if unknown:
        there = ", ".join(name for name in known if name != "bits") or "none"
        raise UsageError(f"method '{method}' has no option '{unknown[0]}'; its options: {there}")
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


__all__ = ["METHODS", "adfq_vit", "describe", "fq_vit", "igq_vit", "minmax", "percentile", "recipe", "repq_vit"]
