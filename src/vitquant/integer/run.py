"""Run an unmodified model on integers: every tensor holds integers on a grid, every operation maps them to others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vitquant.errors import PlanError
from vitquant.integer.carriers import QUOTIENT_FRACTION, Carrier, Floats, Function, Integers, reach_of
from vitquant.integer.dyadic import dyadic, half
from vitquant.integer.layer_norm import NORM_BITS, channel_affine, fraction_bits, integer_epsilon, token_scale
from vitquant.integer.widths import norm_bounds, product_bound, width
from vitquant.numerics import Granularity, Log, Params, PowerOfTwo, Quantizer, Uniform
from vitquant.trace import CallKey, Interceptor, Site
from vitquant.trace.flow import factor_of, kind_of
from vitquant.trace.operations import Operation

ROUND_BITS, KEPT_BITS, SUM_BITS = 11, 12, 22
"""Bits of a requantizer's multiplier, of the accumulator's part that it multiplies, and of a term of a sum."""


@dataclass(frozen=True)
class Arithmetic:
    """How the operations between the operands are carried out: on integers, with dyadic rounding between grids.

    faithful: FQ-ViT's released arithmetic with its known flaws (the effective temperature of the integer exponential,
    its 30 fractional bits, multipliers of 8 bits rounded down, LayerNorm without epsilon).
    """

    faithful: bool = False

    def carrier(self, integers_only: bool) -> Carrier:
        """Integer tensors, or floating-point tensors that hold the same integers at the speed of a float model."""
        return Integers() if integers_only else Floats()


class Operand(Protocol):
    """What is known of a quantized operand; a constant's codes are in `codes`, which others lack."""

    quantizer: Quantizer

    @property
    def params(self) -> Params: ...


@dataclass(frozen=True)
class Grid:
    """What a tensor of integers v stands for: v · scale. bound: the largest |v| there can be; row_sum: the largest
    sum of |v| over the last axis, where more is known of it than bound · size; zero: where v + zero is known to be
    one of 0 .. 255."""

    scale: float
    bound: int
    row_sum: int | None = None
    zero: int | None = None


@dataclass(frozen=True)
class Target:
    """Where results are rounded to: integers u within low .. high on the step scale · 2^alpha, kept as u << alpha."""

    scale: float
    low: int
    high: int
    alpha: Tensor | None = None

    @property
    def grid(self) -> Grid:
        most = 0 if self.alpha is None else int(self.alpha.max())
        byte = most == 0 and self.low <= 0 and self.high - self.low <= 255
        bound = max(abs(self.low), abs(self.high)) << most
        return Grid(self.scale, bound, zero=-self.low if byte else None)

    @property
    def step(self) -> Tensor:
        """() or (channels,), float64."""
        alpha = torch.zeros(()) if self.alpha is None else self.alpha
        return torch.ldexp(torch.full_like(alpha, self.scale, dtype=torch.float64), alpha.double())

    @staticmethod
    def of(operand: Operand, site: Site) -> Target:
        """The grid of an operand. u = code - zero. Raises PlanError for a format without one integer zero-point."""
        quantizer, p = operand.quantizer, operand.params
        if not isinstance(quantizer, (Uniform, PowerOfTwo)) or p.scale.numel() != 1:
            raise PlanError(f"{site}: {quantizer.describe()} cannot be executed on integers")
        low, high = quantizer.code_range
        zero, alpha = int(p.zero), p.alpha.long() if isinstance(quantizer, PowerOfTwo) else None
        return Target(float(p.scale), low - zero, high - zero, alpha)


def grid_of(x: Any) -> Grid | None:
    """The grid of a tensor that this execution made, None for any other."""
    return getattr(x, "vitquant_grid", None) if isinstance(x, Tensor) else None


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """x, known to lie on this grid; a tensor object of its own if x is known to lie on another."""
    x = x.view(x.shape) if grid_of(x) not in (None, grid) else x
    x.vitquant_grid = grid  # type: ignore[attr-defined]
    return x


@dataclass(frozen=True)
class Compiled:
    """A call as a function of integers, where its result lies, and the bits of its widest accumulator."""

    function: Function
    grid: Grid
    width: int


class IntegerRun(Interceptor):
    """While active, `model` computes on integers; only the image and the output are real numbers.

    operands: the format, parameters and (for constants) codes of every site. Each tensor carries v = code - zero,
    shifted left by alpha on a power-of-two grid; scales are known outside the tensors. What a call needs (integer
    weights, biases on the accumulator's scale, multipliers, shifts, tables) is worked out on its first run and kept
    in `compiled`, with the accumulator's width. outputs: if given, the integers that every call returned are put
    there. Raises PlanError for an operation that cannot be done on integers, AccumulatorOverflow for one that needs
    more bits than there are.
    """

    def __init__(
        self,
        model: nn.Module,
        operands: Mapping[Site, Operand],
        carrier: Carrier,
        faithful: bool = False,
        compiled: dict[Any, Compiled] | None = None,
        outputs: dict[CallKey, Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        self.operands = operands
        self.carrier = carrier
        self.faithful = faithful
        self.compiled: dict[Any, Compiled] = {} if compiled is None else compiled
        self.outputs = outputs

    @staticmethod
    def real(output: Any) -> Any:
        """A model's output with the one final scale applied to every tensor of integers in it."""

        def decoded(x: Any) -> Any:
            grid = grid_of(x)
            return x if grid is None else x.float() * grid.scale

        return tree_map(decoded, output)

    def call(
        self,
        key: CallKey,
        operation: Operation,
        func: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        data = [name for name, position in operation.operands.items() if self._is_data(key, name, args, position)]
        if not data:
            return func(*args, **kwargs)
        handlers = {
            "linear": self._linear,
            "conv": self._conv,
            "matmul": self._matmul,
            "norm": self._norm,
            "softmax": self._softmax,
            "act": self._act,
            "add": self._add,
        }
        out = handlers[operation.op](key, operation, func, args, kwargs)
        if self.outputs is not None:
            self.outputs[key] = out
        return out

    def _is_data(self, key: CallKey, name: str, args: list[Any], position: int) -> bool:
        if position >= len(args) or grid_of(args[position]) is not None:
            return position < len(args)
        return key.op != "add" and Site(key, name) in self.operands and name in ("input", "left", "right")

    def _once(self, key: Any, device: torch.device, build: Callable[[], Compiled]) -> Compiled:
        key = (key, device)
        if key not in self.compiled:
            self.compiled[key] = build()
        return self.compiled[key]

    def _operand(self, site: Site) -> Operand:
        if site not in self.operands:
            raise PlanError(f"{site} has no number format: an integer-only execution needs one for every tensor")
        return self.operands[site]

    def _target(self, key: CallKey) -> Target:
        site = Site(key, "output")
        return Target.of(self._operand(site), site)

    def _constant(self, site: Site, given: Tensor | None) -> Tensor | None:
        """A bias or a norm's parameter: as an exact rewrite left it, or the model's own."""
        value = getattr(self.operands.get(site), "value", given)
        return None if value is None else value.detach()

    def _enter(self, site: Site, x: Tensor) -> Tensor:
        """x on the grid of the site that it arrives at: encoded if it is the image, rounded if its step differs."""
        grid, operand = grid_of(x), self.operands.get(site)
        if grid is None:
            target, known = Target.of(self._operand(site), site), self._operand(site)
            codes = known.quantizer.encode(x.float(), known.params) - known.params.zero
            return on_grid(self.carrier.hold(codes, target.grid.bound), target.grid)
        if operand is None or isinstance(operand.quantizer, Log):
            return x

        def build() -> Compiled:
            target = Target.of(operand, site)
            if target.alpha is None and abs(target.scale / grid.scale - 1) < 1e-6:
                return Compiled(lambda x: x, grid, 0)
            shift, finish = self._rounding(grid.scale / target.step, target, grid.bound)
            first = self.carrier.stage(torch.ones_like(shift), torch.zeros_like(shift), shift, grid.bound)
            return Compiled(lambda x: finish(first(x.clone())), target.grid, width(grid.bound << ROUND_BITS))

        compiled = self._once(site, x.device, build)
        return on_grid(compiled.function(x), compiled.grid)

    def _rounding(self, ratio: Tensor, target: Target, bound: int) -> tuple[Tensor, Function]:
        """Rounding of accumulators to a target whose step is 1 / ratio of theirs: u = ⌊acc·ratio⌉, clipped.

        First a shift right, which the caller does, to the KEPT_BITS bits that reach the target at all; then a dyadic
        multiplier. What the first shift cuts off is half a unit on average, and put back with the offset.
        """
        edge = max(abs(target.low), abs(target.high)) + 1
        shift = ((edge / ratio).log2().ceil() - KEPT_BITS).clamp(0, 40).long()
        multiplier, by = dyadic(torch.ldexp(ratio, shift), 8 if self.faithful else ROUND_BITS, self.faithful)
        offset = half(by) + torch.where(shift > 0, multiplier >> 1, 0)
        kept = ((edge + 1) << int(by.max())) + 2**ROUND_BITS
        largest = int(((bound >> shift) + 1).max()) * 2**ROUND_BITS + int(offset.max())
        stage = self.carrier.stage(multiplier, offset, by, largest, kept)
        raised = None if target.alpha is None else self.carrier.raised(target.alpha)

        def finish(acc: Tensor) -> Tensor:
            u = stage(acc).clamp_(target.low, target.high)
            return u if raised is None else raised(u)

        return shift, finish

    def _product(
        self, key: CallKey, x: Tensor, bias: Tensor | None, build: Callable[..., Function], axes: int
    ) -> Compiled:
        """A linear or a convolution; axes: how many there are behind the channels of its output."""
        grid, site = grid_of(x), Site(key, "weight")
        assert grid is not None
        operand = self._operand(site)
        quantizer, p, target = operand.quantizer, operand.params, self._target(key)
        if not isinstance(quantizer, Uniform) or quantizer.granularity not in (Granularity((0,)), Granularity()):
            raise PlanError(f"{site}: {quantizer.describe()} cannot be executed on integers")
        codes: Tensor = operand.codes.float()  # type: ignore[attr-defined]
        weight = (codes - quantizer.granularity.spread(p.zero, codes)).long()
        scale = grid.scale * p.scale.double().expand(len(weight))
        start = torch.zeros_like(scale) if bias is None else bias.double() / scale
        integer_bias = start.round().clamp(-(2**50), 2**50).long()
        bound = int((weight.abs().flatten(1).sum(1) * grid.bound + integer_bias.abs()).max())
        columns = (-1, *[1] * axes)
        shift, finish = self._rounding((scale / target.step).reshape(columns), target, bound)
        function = build(weight, integer_bias, shift.flatten(), bound)
        return Compiled(lambda x: finish(function(x)), target.grid, width(bound))

    def _run(self, compiled: Compiled, *x: Tensor) -> Tensor:
        return on_grid(compiled.function(*x), compiled.grid)

    def _linear(self, key: CallKey, _: Operation, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        x = self._enter(Site(key, "input"), args[0])
        bias = self._constant(Site(key, "bias"), args[2] if len(args) > 2 else None)
        grid = grid_of(x)
        assert grid is not None

        def build(weight: Tensor, start: Tensor, shift: Tensor, bound: int) -> Function:
            return self.carrier.linear(weight, start, shift, bound, grid.zero)

        return self._run(self._once(key, x.device, lambda: self._product(key, x, bias, build, 0)), x)

    def _conv(self, key: CallKey, _: Operation, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        x = self._enter(Site(key, "input"), args[0])
        bias = self._constant(Site(key, "bias"), args[2] if len(args) > 2 else None)
        settings = (args[3:], kwargs)

        def build(weight: Tensor, start: Tensor, shift: Tensor, bound: int) -> Function:
            return self.carrier.conv(func, weight, start, shift, bound, settings)

        axes = args[1].dim() - 2
        return self._run(self._once(key, x.device, lambda: self._product(key, x, bias, build, axes)), x)

    def _matmul(self, key: CallKey, op: Operation, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        if set(op.operands.values()) != {0, 1} or kwargs:
            raise PlanError(f"{key}: {func.__name__} is not done on integers; a plain matrix product is")
        x, y = (self._enter(Site(key, name), args[op.operands[name]]) for name in ("left", "right"))

        def build() -> Compiled:
            left, right, target = grid_of(x), grid_of(y), self._target(key)
            assert left is not None and right is not None
            rows = left.row_sum
            bound = product_bound(x.shape[-1], left.bound, right.bound) if rows is None else rows * right.bound
            ratio = torch.tensor(left.scale * right.scale / target.scale, dtype=torch.float64, device=x.device)
            shift, finish = self._rounding(ratio, target, bound)
            function = self.carrier.matmul(shift, bound)
            return Compiled(lambda x, y: finish(function(x, y)), target.grid, width(bound))

        return self._run(self._once((key, x.shape[-1]), x.device, build), x, y)

    def _norm(self, key: CallKey, op: Operation, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        if op.names[1] != "normalized_shape" or "bias" not in op.names or len(tuple(args[1])) != 1:
            raise PlanError(f"{key}: {func.__name__} is not done on integers; LayerNorm over the last axis is")
        x = self._enter(Site(key, "input"), args[0])
        eps = args[4] if len(args) > 4 else kwargs.get("eps", 1e-5)

        def build() -> Compiled:
            grid, target, channels = grid_of(x), self._target(key), x.shape[-1]
            assert grid is not None
            one = torch.ones(channels, dtype=torch.float64, device=x.device)
            gamma = self._constant(Site(key, "weight"), args[2] if len(args) > 2 else None)
            beta = self._constant(Site(key, "bias"), args[3] if len(args) > 3 else None)
            epsilon = 0 if self.faithful else integer_epsilon(eps, grid.scale, channels)
            bits = 8 if self.faithful else min(NORM_BITS, 22 - grid.bound.bit_length())
            fraction = fraction_bits(channels)
            affine = channel_affine(
                one if gamma is None else gamma,
                0 * one if beta is None else beta,
                target.step,
                fraction,
                8 if self.faithful else NORM_BITS,
                self.faithful,
            )
            first = 2 * (grid.bound << bits) + (1 << 15)
            normalised = int(1.25 * channels**0.5 * 2**fraction) + 1  # a quarter for the rounding of small σ
            second = normalised * 2**NORM_BITS + int(affine.offset.abs().max())
            stage = self.carrier.stage(affine.multiplier, affine.offset, affine.shift, second)
            raised = None if target.alpha is None else self.carrier.raised(target.alpha)

            def run(v: Tensor) -> Tensor:
                total, squares = self.carrier.totals(v, grid.bound)
                token = token_scale(total, squares, channels, epsilon, bits, self.faithful)
                n = self.carrier.stage(token.multiplier, token.offset, token.shift, first)(v.clone())
                u = stage(n).clamp_(target.low, target.high)
                return u if raised is None else raised(u)

            return Compiled(run, target.grid, width(norm_bounds(channels, grid.bound)[2]))

        return self._run(self._once(key, x.device, build), x)

    def _softmax(self, key: CallKey, _: Operation, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        x = self._enter(Site(key, "input"), args[0])
        if (args[1] if len(args) > 1 else kwargs.get("dim")) not in (-1, x.dim() - 1):
            raise PlanError(f"{key}: a softmax on integers is over the last axis")

        def build() -> Compiled:
            grid, operand, terms = grid_of(x), self._operand(Site(key, "output")), x.shape[-1]
            assert grid is not None
            quantizer, carrier = operand.quantizer, self.carrier
            logarithmic = isinstance(quantizer, Log) and quantizer.steps == 1
            faithful = self.faithful and logarithmic  # the released code has a float softmax for uniform codes
            reach = reach_of(grid.scale, terms, faithful)
            bits = None if logarithmic else 12
            exponentials = carrier.exponentials(grid.scale, terms, 2 * grid.bound, reach, bits, faithful)
            if logarithmic:
                top = quantizer.levels - 2
                out = Grid(2.0**-top, 2**top, 3 * 2**top // 2)
                return Compiled(lambda x: carrier.logarithmic(exponentials(x), top), out, 24)
            target = self._target(key)
            inverse = round(2**QUOTIENT_FRACTION / target.scale)
            out = replace(target.grid, row_sum=round(1.01 / target.scale) + terms)
            return Compiled(lambda x: carrier.quotient(exponentials(x), inverse, target.high), out, 24)

        return self._run(self._once((key, x.shape[-1]), x.device, build), x)

    def _act(self, key: CallKey, _: Operation, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        x = self._enter(Site(key, "input"), args[0])

        def build() -> Compiled:
            grid, site = grid_of(x), Site(key, "output")
            assert grid is not None
            operand = self._operand(site)
            values = torch.arange(-grid.bound, grid.bound + 1, device=x.device) * grid.scale
            codes = operand.quantizer.encode(func(values.float(), *args[1:], **kwargs), operand.params)
            target = Target.of(operand, site)
            return Compiled(self.carrier.lookup(codes - operand.params.zero, grid.bound), target.grid, 8)

        return self._run(self._once(key, x.device, build), x)

    def _add(self, key: CallKey, _: Operation, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        if kwargs.get("alpha", 1) != 1:
            raise PlanError(f"{key}: a sum on integers has no factor alpha")
        x, y = args[:2]
        if grid_of(x) is None:
            x, y = y, x
        name = "right" if x is args[0] else "left"
        grid = grid_of(x)
        assert grid is not None
        if grid_of(y) is not None:
            terms = self._once(key, x.device, lambda: self._sum(key, grid, grid_of(y)))
            return self._run(terms, x, y)
        site = Site(key, name)
        codes, term = self._constant_term(site, y, grid)
        constant = self.carrier.hold(codes.to(x.device), term.bound)
        if site not in self.operands:  # an attention mask: it is added as it is and clips nothing
            return on_grid(x + constant, Grid(grid.scale, grid.bound + term.bound))
        return self._run(self._once(key, x.device, lambda: self._sum(key, grid, term)), x, constant)

    def _constant_term(self, site: Site, value: Any, grid: Grid) -> tuple[Tensor, Grid]:
        """A constant as integers: by its own format, or on the grid of what it joins."""
        operand = self.operands.get(site)
        if operand is not None:
            return operand.codes - operand.params.zero, Target.of(operand, site).grid  # type: ignore[attr-defined]
        codes = (torch.as_tensor(value).detach().double() / grid.scale).round()
        return codes, Grid(grid.scale, int(codes.abs().max()))

    def _sum(self, key: CallKey, left: Grid, right: Grid | None) -> Compiled:
        """(x, y) → ⌊(x·M + y·M' ) / 2^N⌉, clipped, with one shift N for both."""
        assert right is not None
        target = self._target(key)
        step = target.step
        ratios = [grid.scale / step for grid in (left, right)]
        most = torch.stack([r * grid.bound for r, grid in zip(ratios, (left, right), strict=True)]).amax(0)
        shift = (SUM_BITS - 1 - most.log2().ceil()).clamp(0, 24).long()
        first, second = (torch.ldexp(r, shift).round().long() for r in ratios)
        bound = int((first * left.bound + second * right.bound + half(shift)).max())
        stage = self.carrier.weighted_sum(first, second, half(shift), shift, bound)
        raised = None if target.alpha is None else self.carrier.raised(target.alpha)

        def run(x: Tensor, y: Tensor) -> Tensor:
            u = stage(x, y).clamp_(target.low, target.high)
            return u if raised is None else raised(u)

        return Compiled(run, target.grid, width(bound))

    def other(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Data that is moved keeps its integers; a factor changes the scale alone; a mean is a sum."""
        grids = {g for g in map(grid_of, tree_leaves((args, kwargs))) if g is not None}
        if not grids:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        grid = next(iter(grids))
        kind = kind_of("", name, 1)
        factor = factor_of(name, args)
        if factor is not None and factor > 0:
            x = next(a for a in args if isinstance(a, Tensor))
            return on_grid(x, replace(grid, scale=grid.scale * factor))
        if name == "mean":
            return self._mean(grid, *args, **kwargs)
        if name in _CASTS:
            return args[0]
        if name in _QUESTIONS:
            return func(*args, **kwargs)
        if len(grids) > 1 or kind not in ("layout", "constant") or name in _MIXES:
            raise PlanError(f"{name} in module '{self.scope}' is not done on integers")
        joined: Any = args
        if name in _JOINS:
            joined = tree_map(lambda t: self._joining(t, grid), args)
        out = func(*joined, **kwargs)
        if kind == "layout":
            same = name in _SAME
            kept = grid if same else replace(grid, row_sum=None)
            bound = max(g.bound for g in map(grid_of, tree_leaves(joined)) if g is not None)
            kept = replace(kept, bound=bound, zero=None if name in _JOINS else grid.zero)
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    on_grid(t, kept)
        return out

    def _joining(self, x: Any, grid: Grid) -> Any:
        """A constant that is joined to data, on the data's grid and with as many bits as it needs there."""
        if not isinstance(x, Tensor) or grid_of(x) is not None:
            return x
        codes = (x.detach().double() / grid.scale).round()
        bound = max(int(codes.abs().max()), grid.bound)
        return on_grid(self.carrier.hold(codes, bound), replace(grid, bound=bound))

    def _mean(self, grid: Grid, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
        axes = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
        count = 1
        for axis in axes:
            count *= x.shape[axis]
        held = self.carrier.hold(x, grid.bound * count)
        total = held.sum(tuple(axes), keepdim=keepdim, dtype=held.dtype)
        return on_grid(total, Grid(grid.scale / count, grid.bound * count))


_CASTS = frozenset(["to", "float", "half", "double", "bfloat16", "type", "type_as"])
_QUESTIONS = frozenset(["dim", "size", "numel", "nelement", "ndimension", "stride", "is_floating_point", "__len__"])
"""Asked of a tensor, not of its numbers."""
_MIXES = frozenset(["interpolate", "upsample", "fold"])
_JOINS = frozenset(["cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"])
_SAME = frozenset(["dropout", "dropout_", "contiguous", "clone", "detach", "identity"])
