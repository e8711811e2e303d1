"""All decisions taken so far about one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from vitquant.calibrate import MinMax, Search
from vitquant.integer import Arithmetic
from vitquant.numerics import Params, Quantizer
from vitquant.trace import Site, Trace, Transform


@dataclass(frozen=True)
class Rule:
    """What a role or a site gets: a number format, and the search that finds its parameters."""

    quantizer: Quantizer
    search: Search = field(default_factory=MinMax)


@dataclass(frozen=True)
class State:
    """plan: what each site gets. params: the parameters found. rewrites: constants replaced by exact identities.
    codes: integers chosen for a weight (learned rounding), where they are not simply the nearest.
    arithmetic: how the operations are carried out; None for torch's own, in floating point.

    Everything lossy lives in `params` and `codes`: running without them equals the original model. Passes return
    a new state; nothing is ever written to the model.
    """

    trace: Trace
    plan: Mapping[Site, Rule]
    params: Mapping[Site, Params] = field(default_factory=dict)
    rewrites: Mapping[Site, Tensor] = field(default_factory=dict)
    codes: Mapping[Site, Tensor] = field(default_factory=dict)
    arithmetic: Arithmetic | None = None

    def constant(self, site: Site) -> Tensor | None:
        """The weight, bias or norm parameter at a site as it stands; None for an activation."""
        return self.rewrites.get(site, self.trace.constants.get(site))

    def floating(self) -> State:
        """The same exact rewrites without anything lossy."""
        return replace(self, params={}, codes={})

    def transforms(self) -> dict[Site, Transform]:
        """What happens to each operand when the model runs under this state."""
        done: dict[Site, Transform] = {s: _always(x) for s, x in self.rewrites.items() if s not in self.params}
        for site, p in self.params.items():
            quantizer, constant = self.plan[site].quantizer, self.constant(site)
            if constant is None:
                done[site] = _fake_quantizer(quantizer, p)
            else:
                done[site] = _always(quantizer.decode(self.weight_codes(site), p))
        return done

    def weight_codes(self, site: Site) -> Tensor:
        """The integers of a quantized weight: those chosen for it, or the nearest."""
        constant = self.constant(site)
        assert constant is not None
        if site in self.codes:
            return self.codes[site]
        return self.plan[site].quantizer.encode(constant.detach(), self.params[site])


def _always(x: Tensor) -> Transform:
    return lambda _: x


def _fake_quantizer(quantizer: Quantizer, p: Params) -> Transform:
    return lambda x: quantizer.fake_quantize(x, p)
