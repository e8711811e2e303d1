"""Reading the recorded flow of data: where a tensor came from, what role it plays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitquant.trace.operations import CONTRACTIONS
from vitquant.trace.site import CallKey, Role, Site

IMAGE = "image"
HIDDEN = -50.0
"""What is added to an attention logit to hide it: at most this."""

_LAYOUT = frozenset(
    """
    reshape view flatten ravel permute transpose swapaxes swapdims movedim moveaxis t T mT unbind chunk split
    split_with_sizes tensor_split hsplit vsplit __getitem__ __get__ contiguous to float half double bfloat16
    type type_as cpu cuda expand expand_as squeeze unsqueeze roll pad constant_pad_nd dropout dropout_ dropout2d
    alpha_dropout feature_dropout clone narrow select index_select gather take_along_dim flip repeat tile
    repeat_interleave view_as reshape_as unflatten detach cat concat concatenate stack hstack vstack dstack
    unfold fold pixel_shuffle pixel_unshuffle interpolate upsample masked_select as_subclass identity
    requires_grad_ channel_shuffle rot90 meshgrid broadcast_to broadcast_tensors unsafe_chunk unsafe_split
""".split()
)
_AFFINE = frozenset(
    """
    add sub rsub mul div true_divide neg __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__
    __imul__ __truediv__ __itruediv__ __neg__ add_ sub_ mul_ div_ addcmul addcdiv lerp masked_fill masked_fill_
    where clamp clamp_ clip nan_to_num
""".split()
)
_SUM = frozenset(
    """
    add sub rsub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ add_ sub_ addcmul lerp
""".split()
)
_PRODUCT = frozenset(
    """
    mul div __mul__ __rmul__ __imul__ __truediv__ __itruediv__ mul_ div_ true_divide
""".split()
)
_POOL = frozenset(
    """
    mean adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d max_pool2d amax
    adaptive_avg_pool3d logsumexp max_pool1d
""".split()
)
_NORM = frozenset(["normalize", "rsqrt", "sqrt", "norm", "vector_norm", "local_response_norm"])
_SHAPE_ONLY = frozenset(
    """
    zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full
    new_tensor
""".split()
)


@dataclass
class Node:
    """One recorded call whose result depends on the image.

    inputs: nodes that its data-dependent arguments came from. operands: for an operation, each operand's node
    (None for a constant) and shape. call: function and arguments, until `release`; sources: the node of every
    tensor among those arguments, None for a constant. factor: the number that a call multiplies its data by.
    """

    kind: str
    name: str
    scope: str
    key: CallKey | None
    inputs: tuple[int, ...]
    operands: Mapping[str, tuple[int | None, tuple[int, ...]]]
    shape: tuple[int, ...]
    call: tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]] | None = None
    sources: tuple[int | None, ...] = ()
    out_axis: int = 0
    factor: float | None = None

    def release(self) -> None:
        self.call = None


@dataclass(frozen=True)
class NormGroup:
    """A norm with learnable parameters whose every consumer is a linear that sees the norm's own channels."""

    norm: CallKey
    linears: tuple[CallKey, ...]


def kind_of(op: str, name: str, inputs: int) -> str:
    """What a call does to its data: the operation's own kind, or one of layout, scale, sum, product, pool..."""
    if op and op != "add":
        return op
    if name in _SHAPE_ONLY:
        return "constant"
    if name in _LAYOUT:
        return "layout"
    if op == "add" or name in _SUM:
        return "sum" if inputs > 1 else "scale"
    if name in _PRODUCT:
        return "product" if inputs > 1 else "scale"
    if name in _AFFINE:
        return "scale"
    if name in _POOL:
        return "pool"
    return "norm" if name in _NORM else "other"


def factor_of(name: str, args: Sequence[Any]) -> float | None:
    """The number that a call multiplies its data by, None if it does something else."""
    numbers = [a for a in args if isinstance(a, (int, float))]
    if name not in _PRODUCT or len(args) != 2 or len(numbers) != 1:
        return None
    if "div" not in name:
        return float(numbers[0])
    return 1.0 / numbers[0] if isinstance(args[0], Tensor) else None


class _Flow:
    """Questions about the recorded nodes."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.users: list[list[int]] = [[] for _ in nodes]
        for i, node in enumerate(nodes):
            for source in dict.fromkeys(node.inputs):
                self.users[source].append(i)

    def origin(self, index: int, through: tuple[str, ...] = ("layout", "scale")) -> int:
        """The node that really computed these numbers, looking through layout and scaling."""
        while self.nodes[index].kind in through:
            sources = {self.origin(i, through) for i in self.nodes[index].inputs}
            if len(sources) != 1:
                return index
            index = sources.pop()
        return index

    def is_softmax(self, index: int) -> bool:
        """The numbers are attention probabilities, perhaps masked, renormalised or mixed over heads."""
        node = self.nodes[self.origin(index)]
        if node.kind == "softmax":
            return True
        if node.kind == "product":
            return any(self.nodes[self.origin(i)].kind == "softmax" for i in node.inputs)
        if node.kind in CONTRACTIONS and self.weighted(node):
            return any(self.nodes[self.origin(i)].kind == "softmax" for i in node.inputs)
        return False

    @staticmethod
    def weighted(node: Node) -> bool:
        """One operand is a constant."""
        return any(source is None for name, (source, _) in node.operands.items() if name != "bias")

    def is_mix(self, index: int) -> bool:
        """A product of probabilities and values."""
        node = self.nodes[index]
        return node.kind in CONTRACTIONS and not self.weighted(node) and any(self.is_softmax(i) for i in node.inputs)

    def behind_softmax(self, softmax: int) -> Iterator[int]:
        """The products whose results are the logits of a softmax."""
        pending, seen = list(self.nodes[softmax].inputs), set()
        while pending:
            index = pending.pop()
            node = self.nodes[index]
            if index in seen:
                continue
            seen.add(index)
            if node.kind in CONTRACTIONS and not self.weighted(node):
                yield index
            elif node.kind in ("layout", "scale", "sum") or node.kind in CONTRACTIONS:
                pending += node.inputs

    def scores(self) -> set[int]:
        """The nodes whose results a softmax reads, directly or moved and scaled."""
        pending = [i for node in self.nodes if node.kind == "softmax" for i in node.inputs]
        seen: set[int] = set()
        while pending:
            index = pending.pop()
            if index not in seen:
                seen.add(index)
                pending += self.nodes[index].inputs if self.nodes[index].kind in ("layout", "scale") else ()
        return seen

    def heads(self) -> set[int]:
        """The contractions that give the model's output."""
        return {i for source in self.nodes[-1].inputs for i in self._givers(source)}

    def _givers(self, index: int) -> set[int]:
        node = self.nodes[index]
        if node.kind in CONTRACTIONS:
            return {index} if self.weighted(node) else set()
        if node.kind not in ("layout", "scale", "sum", "pool"):
            return set()
        found = [self._givers(i) for i in node.inputs]
        return set().union(*found) if all(found) else set()


def roles(nodes: Sequence[Node], constants: Mapping[Site, Tensor]) -> dict[Site, tuple[Role, tuple[int, ...], int]]:
    """Role, shape and (for weights) output axis of every site, in order of execution."""
    flow = _Flow(nodes)
    logits = {p for i, n in enumerate(nodes) if n.kind == "softmax" for p in flow.behind_softmax(i)}
    heads, scores = flow.heads(), flow.scores()
    found: dict[Site, tuple[Role, tuple[int, ...], int]] = {}
    for i, node in enumerate(nodes):
        if node.key is None:
            continue
        for operand, (source, shape) in node.operands.items():
            site = Site(node.key, operand)
            gives_logits = i in logits and not flow.is_mix(i)
            role = _role(flow, constants, i, operand, source, gives_logits, i in heads)
            if role is not None:
                found[site] = (role, shape, _out_axis(node, operand))
        role = _output_role(node, i in scores)
        if role is not None and not hides(node, constants):
            found[Site(node.key, "output")] = (role, node.shape, 0)
    return found


def _output_role(node: Node, scores: bool) -> Role | None:
    """scores: softmax reads this, perhaps moved or scaled."""
    if node.kind in CONTRACTIONS:
        return Role.PRODUCT
    if node.key is not None and node.key.op == "add":
        return Role.LOGITS if scores else Role.SUM if node.kind == "sum" else Role.EMBEDDING
    return {"norm": Role.NORM_OUTPUT, "softmax": Role.SOFTMAX_OUTPUT, "act": Role.ACT_OUTPUT}.get(node.kind)


def hides(node: Node, constants: Mapping[Site, Tensor]) -> bool:
    """The call adds an attention mask: a constant of which every value is 0 or so low that exp() of it is nothing."""
    if node.key is None or node.key.op != "add":
        return False
    added = [constants[s] for s in (Site(node.key, name) for name in node.operands) if s in constants]
    return any(bool(((c == 0) | (c <= HIDDEN)).all() and (c <= HIDDEN).any()) for c in added)


def _out_axis(node: Node, operand: str) -> int:
    """The output-channel axis of a constant operand."""
    if node.kind == "matmul":
        return -1 if operand == "right" else -2
    return node.out_axis


def _role(
    flow: _Flow,
    constants: Mapping[Site, Tensor],
    index: int,
    operand: str,
    source: int | None,
    gives_logits: bool,
    gives_output: bool,
) -> Role | None:
    node = flow.nodes[index]
    if node.kind not in CONTRACTIONS:
        inputs = {"norm": Role.NORM_INPUT, "softmax": Role.LOGITS, "act": Role.ACT_INPUT}
        if node.key is not None and node.key.op == "add":
            return Role.ADDEND if source is None and not hides(node, constants) else None
        return inputs.get(node.kind) if operand == "input" and source is not None else None
    if operand == "bias":
        return None
    if source is None:
        return Role.WEIGHT
    if flow.is_softmax(source):
        return Role.PROBS
    if flow.is_mix(index):
        return Role.VALUE
    if gives_logits:
        return Role.QUERY if operand in ("left", "input") else Role.KEY
    if gives_output:
        return Role.POOLED
    return _role_of_origin(flow, source)


def _role_of_origin(flow: _Flow, source: int) -> Role:
    origin = flow.origin(source)
    node = flow.nodes[origin]
    if flow.is_mix(origin):
        return Role.CONTEXT
    if node.kind == "product":
        kinds = {flow.nodes[flow.origin(i)].kind for i in node.inputs}
        if "norm" in kinds:  # a norm written by hand: x · rsqrt(mean(x²))
            return Role.POST_NORM
        return Role.POST_ACT if "act" in kinds else Role.OTHER
    by_kind = {
        "image": Role.IMAGE,
        "norm": Role.POST_NORM,
        "act": Role.POST_ACT,
        "sum": Role.RESIDUAL,
        "pool": Role.POOLED,
    }
    return by_kind.get(node.kind, Role.OTHER)


def norm_groups(nodes: Sequence[Node], constants: Mapping[Site, Tensor]) -> list[NormGroup]:
    """Norms whose affine parameters can trade a scale and a shift with the linears that alone read them.

    The norm must have weight and bias; every consumer must be a linear's input with a constant weight; and what
    happens between must move whole tokens only. The last is tried out: the channel numbers, sent the same way,
    must arrive in order and without padding.
    """
    flow = _Flow(nodes)
    groups = []
    for i, node in enumerate(nodes):
        if node.kind != "norm" or node.key is None:
            continue
        affine = [constants.get(Site(node.key, name)) for name in ("weight", "bias")]
        if any(p is None or p.shape != node.shape[-1:] for p in affine):
            continue
        linears = _linears_reading(flow, i, node.shape[-1])
        if linears and all(Site(key, "weight") in constants for key in linears):
            groups.append(NormGroup(node.key, tuple(linears)))
    return groups


def _linears_reading(flow: _Flow, index: int, channels: int) -> list[CallKey] | None:
    """The linears that read a node, directly or through layout; None if anything else does."""
    found: list[CallKey] = []
    for user in flow.users[index]:
        node = flow.nodes[user]
        if node.kind == "linear" and node.key is not None and node.operands["input"][0] == index:
            found.append(node.key)
        elif node.kind == "layout" and _keeps_channels(node, index, channels):
            deeper = _linears_reading(flow, user, channels)
            if deeper is None:
                return None
            found += deeper
        else:
            return None
    return found


def _keeps_channels(node: Node, index: int, channels: int) -> bool:
    """Sending the channel numbers through this call gives the channel numbers, nothing dropped or padded in."""
    if node.call is None:
        return False
    func, args, kwargs = node.call
    leaves, spec = tree_flatten((args, dict(kwargs)))
    numbers, remaining = torch.arange(1.0, channels + 1), iter(node.sources)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if next(remaining) == index:
            if leaf.shape[-1] != channels:
                return False
            leaves[i] = numbers.to(leaf.device, leaf.dtype).expand(leaf.shape)
        elif leaf.is_floating_point():  # joined with numbers that do not come from the norm
            return False
    args, kwargs = tree_unflatten(leaves, spec)
    out = func(*args, **kwargs)
    results = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
    return all(t.shape[-1:] == (channels,) and torch.equal(t, numbers.to(t).expand(t.shape)) for t in results)
