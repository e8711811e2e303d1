"""What is seen of a model: sites, roles, completeness; and that looking changes nothing."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from fleet import LISTED, UNLISTED
from torch import nn

import vitquant
from vitquant.errors import IncompleteRun, UnknownContraction, UnsupportedComposite
from vitquant.models import logits_of
from vitquant.trace import ACTIVATION_ROLES, CallKey, Interceptor, Role, Site, observe


def spread_of(trace: vitquant.Trace) -> Counter[Role]:
    return Counter(info.role for info in trace.sites.values())


LARGE = ("factorised attention", "cross-attention of two scales")


@pytest.mark.parametrize(
    "name",
    [*(n for n in [*LISTED, *UNLISTED] if n not in LARGE), *(pytest.param(n, marks=pytest.mark.slow) for n in LARGE)],
)
def test_interception_changes_nothing_and_a_quantized_run_visits_what_was_planned(name: str) -> None:
    model, images = {**LISTED, **UNLISTED}[name]()
    with torch.no_grad():
        before = logits_of(model(images))
        with Interceptor(model):
            seen = logits_of(model(images))
        assert (seen - before).norm() <= 1e-5 * before.norm()
        large = sum(p.numel() for p in model.parameters()) > 15e6  # searching so many weights would take long
        quantized = vitquant.quantize(model, images[:1], "minmax" if large else "repq-vit", "w8a8")
        after = logits_of(quantized(images))  # raises IncompleteRun if a planned site was missed
    assert (after - before).norm() < 0.4 * before.norm()
    assert (after - before).norm() > 0
    planned = {s for s in quantized.sites if s.operand not in ("bias",)}
    expected = [s for s, i in observe(model, images[:1]).sites.items() if i.role in vitquant.CONTRACTION_ROLES]
    assert planned >= set(expected)


@pytest.mark.parametrize(
    "name",
    [
        *(n for n in LISTED if n not in ("timm vit", "timm swin", "torchvision vit", "torchvision swin")),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("timm swin", "torchvision vit", "torchvision swin")),
    ],
)
def test_exported_graph_gives_the_live_output(name: str) -> None:
    model, images = LISTED[name]()
    quantized = vitquant.quantize(model, images[:1], "repq-vit", "w4a4")
    with torch.no_grad():
        live = logits_of(quantized(images))
        exported = torch.export.export(quantized, (images,)).module()
        assert torch.equal(logits_of(exported(images)), live)


def test_roles_of_deit() -> None:
    model, images = LISTED["timm deit"]()
    trace = observe(model, images[:1])
    roles = spread_of(trace)
    each = (Role.QUERY, Role.KEY, Role.VALUE, Role.PROBS, Role.CONTEXT, Role.POST_ACT, Role.LOGITS)
    assert all(roles[r] == 12 for r in each)
    assert roles[Role.POST_NORM] == 24 and roles[Role.WEIGHT] == 50
    assert roles[Role.IMAGE] == roles[Role.POOLED] == 1 and roles[Role.OTHER] == 0
    assert trace.role(Site(CallKey("head", "linear", 0), "input")) is Role.POOLED
    assert len(trace.norm_groups) == 25
    assert sum(trace.macs.values()) == pytest.approx(1.254e9, rel=1e-3)


def test_roles_of_swin() -> None:
    model, images = LISTED["timm swin"]()
    roles = spread_of(observe(model, images[:1]))
    assert roles[Role.QUERY] == roles[Role.PROBS] == roles[Role.POST_ACT] == 12
    assert roles[Role.POST_NORM] == 27 and roles[Role.OTHER] == 0


@pytest.mark.parametrize("name", ["talking heads", "cross-attention of two scales", "gated position", "mask units"])
def test_attention_is_found_in_other_designs(name: str) -> None:
    model, images = UNLISTED[name]()
    roles = spread_of(observe(model, images[:1]))
    assert roles[Role.QUERY] == roles[Role.KEY] == roles[Role.VALUE] > 0
    assert roles[Role.PROBS] >= roles[Role.VALUE] and roles[Role.CONTEXT] > 0


class Attend(nn.Module):
    """A user's own cross-attention, through nn.MultiheadAttention in its general form."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 4, 16))
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **kwargs)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        mask[:, -1] = True
        query = self.latent.expand(len(x), -1, -1) + tokens.mean(1, keepdim=True)
        out, weights = self.attention(query, tokens, tokens, key_padding_mask=mask)
        return self.head(out.mean(1)) + weights.sum() * 0


@pytest.mark.parametrize("kwargs", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}])
def test_general_multi_head_attention_is_taken_apart(kwargs: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, images = Attend(**kwargs).eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad(), Interceptor(model):
        taken_apart = model(images)
    assert torch.allclose(taken_apart, model(images), atol=1e-5)
    roles = spread_of(observe(model, images[:1]))
    assert roles[Role.QUERY] == roles[Role.KEY] == roles[Role.PROBS] == roles[Role.VALUE] == roles[Role.CONTEXT] == 1


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_with_masks_is_taken_apart(causal: bool) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.reshape(2, 4, 6, 8)
            mask = None if causal else torch.eye(6, dtype=torch.bool).logical_not()
            return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], mask, is_causal=causal, enable_gqa=True)

    model, x = Model(), torch.randn(2, 192)
    with Interceptor(model):
        seen = model(x)
    assert torch.allclose(seen, model(x), atol=1e-6)


def test_static_keys_are_refused_by_name() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = torch.eye(8)
            args = (8, 2, w.repeat(3, 1), None, None, None, False, 0.0, w, None)
            return F.multi_head_attention_forward(x, x, x, *args, static_k=torch.zeros(2, 1, 4))[0]

    with pytest.raises(UnsupportedComposite, match="static_k"):
        observe(Model(), torch.randn(1, 1, 8))


class Hidden(nn.Module):
    """A model whose products run where they cannot be intercepted."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.block = {
            "lstm": lambda: nn.LSTM(8, 8),
            "bilinear": lambda: nn.Bilinear(8, 8, 8),
            "scripted": lambda: torch.jit.script(nn.Linear(8, 8)),
        }.get(kind, nn.Identity)()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "lstm":
            return self.block(x)[0]
        if self.kind == "bilinear":
            return self.block(x, x)
        if self.kind == "cdist":
            return torch.cdist(x, x)
        if self.kind == "three-way einsum":
            return torch.einsum("ijk,ilk,ijl->ij", x, x, torch.cdist(x, x))
        return self.block(x)


@pytest.mark.parametrize("kind", ["lstm", "bilinear", "scripted", "cdist", "three-way einsum"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_products_out_of_sight_are_named(kind: str) -> None:
    with pytest.raises(UnknownContraction, match="multiplies tensors") as caught:
        observe(Hidden(kind).eval(), torch.randn(1, 3, 8))
    assert kind.split()[-1] in str(caught.value) or kind == "three-way einsum"


class Calls(nn.Module):
    """The same products written in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(input=x, weight=self.weight)
        x = x @ self.weight.T
        x = torch.einsum("bij,jk->bik", x, self.weight)
        x = torch.einsum("bij,bkj->bik", [x, x]) @ x
        x = x / x.norm()
        x = torch.baddbmm(x, x.transpose(1, 2) @ x, x[:, :8])
        x = torch.addmm(torch.zeros(8), x.reshape(-1, 8), self.weight).reshape(x.shape)
        return torch.tensordot(x, self.weight, 1).__rmatmul__(x.transpose(1, 2))


def test_every_spelling_of_a_product_is_seen() -> None:
    torch.manual_seed(0)
    model, x = Calls(), torch.randn(1, 8, 8)
    quantized = vitquant.quantize(model, x, "minmax", "w8a8")
    calls = {s.call for s in quantized.sites}
    assert Counter(c.op for c in calls) == {"linear": 1, "matmul": 9}
    assert (quantized(x) - model(x)).norm() < 0.2 * model(x).norm()


class Normed(nn.Module):
    """A norm whose output goes to a linear by way of some layout."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.linear, self.more = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if self.kind == "windows":
            return self.linear(y.reshape(-1, 2, 4, 8).roll(1, 1).flatten(0, 1))
        if self.kind == "padded":
            return self.linear(F.pad(y, (0, 0, 0, 3)))
        if self.kind == "transposed":
            return self.linear(y.transpose(1, 2))
        if self.kind == "regrouped":
            return self.more(y.reshape(len(x), 4, 16))
        if self.kind == "flipped":
            return self.linear(y.flip(-1))
        if self.kind == "also an output":
            return self.linear(y) + y
        return self.linear(y)


@pytest.mark.parametrize(
    ("kind", "eligible"),
    [
        ("direct", True),
        ("windows", True),
        ("padded", False),
        ("transposed", False),
        ("regrouped", False),
        ("flipped", False),
        ("also an output", False),
    ],
)
def test_norm_groups_are_those_that_can_be_rewritten_exactly(kind: str, eligible: bool) -> None:
    trace = observe(Normed(kind), torch.randn(1, 8, 8))
    assert len(trace.norm_groups) == eligible


def test_shared_modules_are_separate_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).relu())

    trace = observe(Twice(), torch.randn(1, 8))
    assert [str(s) for s in trace.with_role(*ACTIVATION_ROLES)] == ["layer:linear0.input", "layer:linear1.input"]


def test_a_missed_site_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    wrong = Site(CallKey("0", "linear", 7), "input")
    with Interceptor(model, {wrong: lambda x: x}) as mode:
        model(torch.randn(2, 4))
    with pytest.raises(IncompleteRun, match="linear7"):
        mode.check_complete()


def test_site_names_round_trip() -> None:
    model, images = LISTED["hf swin"]()
    for site in observe(model, images[:1]).sites:
        assert Site.parse(str(site)) == site


def test_parameters_that_are_still_read_are_known() -> None:
    model, images = LISTED["timm deit"]()
    trace = observe(model, images[:1])
    weights = {s: None for s in trace.with_role(Role.WEIGHT)}
    dead = trace.unneeded(weights)
    assert dead == {n for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}
