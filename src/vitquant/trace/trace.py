"""What a model did in one forward pass: its operations, how data flowed, and the role of each operand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitquant.errors import TraceError, UnknownContraction
from vitquant.trace.flow import IMAGE, Node, NormGroup, factor_of, kind_of, norm_groups, roles
from vitquant.trace.intercept import Interceptor, tensors_in
from vitquant.trace.operations import CONTRACTIONS, Operation
from vitquant.trace.site import CallKey, Role, Site


@dataclass(frozen=True)
class SiteInfo:
    """One operand as observed for a batch of one image.

    role: what it is. shape: of the observed tensor. out_axis: for a weight, its output-channel axis.
    """

    role: Role
    shape: tuple[int, ...]
    out_axis: int = 0


@dataclass(frozen=True)
class Trace:
    """The observed forward pass.

    sites: every operand that can be quantized, in order of execution. constants: the tensors that reach an
    operation without depending on the image (weights, biases, norm parameters), by site. macs: multiply-
    accumulates per image of every contraction. norm_groups: norms whose every consumer is a linear.
    uses: for every parameter and buffer, the sites that it reaches as a whole; None stands for any other use.
    """

    sites: Mapping[Site, SiteInfo]
    constants: Mapping[Site, Tensor]
    macs: Mapping[CallKey, int]
    norm_groups: Sequence[NormGroup]
    uses: Mapping[str, frozenset[Site | None]]
    nodes: Sequence[Node]

    def role(self, site: Site) -> Role:
        return self.sites[site].role

    def with_role(self, *wanted: Role) -> list[Site]:
        """The sites that have one of these roles, in order of execution."""
        return [s for s, info in self.sites.items() if info.role in wanted]

    def unneeded(self, replaced: Mapping[Site, Any]) -> set[str]:
        """Parameters that no run reads any more once the constants at the sites `replaced` are given."""
        return {name for name, sites in self.uses.items() if all(s in replaced for s in sites)}


_MORE_CONTRACTIONS = frozenset(
    """
    mv dot vdot addmv addr _trilinear bilinear _cdist_forward lstm gru mkldnn_rnn_layer linear matmul
    _native_multi_head_attention _transformer_encoder_layer_fwd _euclidean_dist
""".split()
)
"""Products that torch's own flop counter does not know of."""


class _Witness(TorchDispatchMode):
    """Sees every kernel that multiplies and accumulates; each must run inside an operation that is known."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.recorder.multiplied(str(packet), flop_registry[packet](*args, **kwargs, out_val=out) // 2)
        elif packet.__name__ in _MORE_CONTRACTIONS:
            self.recorder.multiplied(str(packet), 0)
        return out


class _Recorder(Interceptor):
    """Runs the model once and writes down a node for every call whose result depends on the image."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__(model)
        self.nodes = [Node("image", IMAGE, "", None, (), {}, tuple(image.shape))]
        self.constants: dict[Site, Tensor] = {}
        self.macs: dict[CallKey, int] = {}
        self.uses: dict[str, set[Site | None]] = {}
        self._source = {id(image): 0}
        self._roots: dict[int, frozenset[str]] = {}
        self._alive: list[Any] = [image]  # an id means something only while its tensor lives
        self._open: CallKey | None = None
        self._running = ""
        self._unseen: list[str] = []  # raised at the end: an interpreter in between would wrap the error
        tensors = [*model.named_parameters(remove_duplicate=False)]
        for name, tensor in [*tensors, *model.named_buffers(remove_duplicate=False)]:
            self._roots[id(tensor)] = self._roots.get(id(tensor), frozenset()) | {name}
            self.uses[name] = set()

    def multiplied(self, kernel: str, macs: int) -> None:
        """A product ran: count it for the open operation, or note that nobody announced it."""
        if self._open is None:
            where = f"in module '{self.scope}'" if self.scope else "in the model itself"
            who = self._running or "a scripted or compiled module"
            self._unseen.append(
                f"{who} ({where}) multiplies tensors ({kernel}) in a way that cannot be intercepted, "
                "so it would stay in floating point unseen; rewrite it with linear, conv, matmul or einsum"
            )
            return
        self.macs[self._open] = self.macs.get(self._open, 0) + macs

    def call(
        self,
        key: CallKey,
        operation: Operation,
        func: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        self._open = key
        try:
            out = func(*args, **kwargs)
        finally:
            self._open = None
        self._record(operation.op, func, args, kwargs, out, key, operation)
        return out

    def other(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        self._running = getattr(func, "__name__", str(func))
        try:
            out = func(*args, **kwargs)
        finally:
            name, self._running = self._running, ""
        self._record(name, func, args, kwargs, out, None, None)
        return out

    def _record(
        self,
        name: str,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        out: Any,
        key: CallKey | None,
        operation: Operation | None,
    ) -> None:
        given, results = tensors_in(args, kwargs), tensors_in(out)
        if not results:
            return
        sources = tuple(self._source.get(id(t)) for t in given)
        inputs = tuple(s for s in sources if s is not None)
        self._alive += [*given, *results]
        if not inputs:
            roots = frozenset().union(*(self._roots.get(id(t), frozenset()) for t in given))
            self._roots.update({id(t): roots for t in results})
            return
        operands = self._operands(key, operation, args)
        self._note_uses(given, operands, key)
        kind = kind_of(operation.op if operation else "", name, len(inputs))
        if kind == "constant":  # zeros_like(x) takes the shape of x, not its numbers
            return
        node = Node(kind, name, self.scope, key, inputs, operands, tuple(results[0].shape))
        node.call, node.sources = (func, tuple(args), kwargs), sources
        node.out_axis = operation.out_axis if operation else 0
        node.factor = factor_of(name, args) if kind == "scale" and key is None else None
        self.nodes.append(node)
        self._source.update({id(t): len(self.nodes) - 1 for t in results})

    def _operands(
        self, key: CallKey | None, operation: Operation | None, args: Any
    ) -> dict[str, tuple[int | None, tuple[int, ...]]]:
        """Where each operand came from (None = a constant, which is kept) and its shape."""
        if key is None or operation is None:
            return {}
        found: dict[str, tuple[int | None, tuple[int, ...]]] = {}
        for operand, position in operation.operands.items():
            x = args[position] if position < len(args) else None
            if isinstance(x, Tensor):
                found[operand] = (self._source.get(id(x)), tuple(x.shape))
                if id(x) not in self._source:
                    self.constants[Site(key, operand)] = x
        return found

    def _note_uses(self, given: list[Tensor], operands: Mapping[str, Any], key: CallKey | None) -> None:
        """Which constants this call reads: as an operand that can be replaced, or otherwise (None)."""
        own: dict[int, Site] = {}
        if key is not None and key.op in (*CONTRACTIONS, "norm", "add"):
            sites = [Site(key, operand) for operand in operands]
            own = {id(self.constants[s]): s for s in sites if s in self.constants}
        for t in given:
            for name in self._roots.get(id(t), ()):
                self.uses[name].add(own.get(id(t)))

    def finish(self, output: Any) -> Trace:
        if self._unseen:
            raise UnknownContraction(self._unseen[0])
        if hasattr(output, "to_tuple"):
            output = output.to_tuple()
        sources = tuple(self._source[id(t)] for t in tensors_in(output) if id(t) in self._source)
        if not sources:
            raise TraceError("the model's output does not depend on the image as far as its calls show")
        self.nodes.append(Node("output", "output", "", None, sources, {}, ()))
        found = roles(self.nodes, self.constants)
        sites = {site: SiteInfo(role, shape, out_axis) for site, (role, shape, out_axis) in found.items()}
        groups = norm_groups(self.nodes, self.constants)
        for node in self.nodes:  # their tensors have served
            node.release()
        uses = {name: frozenset(sites) for name, sites in self.uses.items()}
        macs = {key: n for key, n in self.macs.items() if any(s.call == key for s in sites)}
        return Trace(sites, self.constants, macs, groups, uses, self.nodes)


def observe(model: nn.Module, image: Tensor) -> Trace:
    """Run `model(image)` once, in floating point, and record what it did.

    image: (1, channels, height, width). The model is not changed and should be in eval mode. Raises
    UnknownContraction where tensors are multiplied in a function that cannot be intercepted, and
    UnsupportedComposite for a fused call that cannot be taken apart; both name the place.
    """
    with torch.no_grad():
        recorder = _Recorder(model, image)
        with _Witness(recorder), recorder:
            output = model(image)
        return recorder.finish(output)
