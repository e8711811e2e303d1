"""The whole path: quantize, run, save, load; errors in the user's words."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fleet import LISTED
from torch import nn

import vitquant
from vitquant import FLOAT, Bits, Recipe, Role, Rule, State
from vitquant.artifact.passing import Passing
from vitquant.calibrate import Batches, Bench, MinMax, MseGrid, Percentile, Reservoir, Sample, quantiles
from vitquant.errors import ArtifactError, DataError, FloatDrift, NoData, NonFinite, PlanError, UsageError
from vitquant.methods import repq_vit
from vitquant.numerics import PER_CHANNEL, PER_OUTPUT, PER_TENSOR, Affine, InstanceGroups, Log, ShiftLog, Uniform
from vitquant.passes import Fit, ScaleReparam
from vitquant.trace import ACTIVATION_ROLES, Interceptor, Site, observe


class Tiny(nn.Module):
    """One transformer block of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


@pytest.fixture
def tiny() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    return Tiny(), torch.randn(6, 3, 16, 16)


QUICK = {"adfq-vit": {"iterations": 4}}
"""Options that shorten what is long by design."""


@pytest.mark.parametrize("method", list(vitquant.METHODS))
def test_every_method_quantizes_saves_and_loads(method: str, tiny: tuple, tmp_path: Path) -> None:
    model, images = tiny
    quantized = vitquant.quantize(model, images, method, "w8a8", **QUICK.get(method, {}))
    logits = quantized(images)
    assert (logits - model(images)).norm() < 0.2 * model(images).norm()
    quantized.save(tmp_path)
    again = vitquant.load(tmp_path, model=Tiny())
    assert torch.equal(again(images), logits)
    assert again.table() == quantized.table()
    assert again.ledger == quantized.ledger


def test_the_users_model_is_never_modified(tiny: tuple) -> None:
    model, images = tiny
    model.train()
    before = copy.deepcopy(model.state_dict())
    vitquant.quantize(model, images, "repq-vit", "w4a4")
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_same_seed_same_bytes(tiny: tuple, tmp_path: Path) -> None:
    model, images = tiny
    for name, seed in (("a", 1), ("b", 1)):
        vitquant.quantize(model, images, "repq-vit", "w4a4", seed=seed).save(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_are_stored_in_their_bits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 512), nn.GELU(), nn.Linear(512, 256))
    weights = 768 * 512 + 512 * 256
    sizes = {}
    for bits in ("w2a8", "w3a8", "w4a8", "w8a8"):
        vitquant.quantize(model, torch.randn(2, 3, 16, 16), "minmax", bits).save(tmp_path / bits)
        sizes[bits] = (tmp_path / bits / "model.safetensors").stat().st_size
    for bits, size in sizes.items():
        assert 0 < size - weights * int(bits[1]) / 8 < 14_000  # scales, zero-points, biases, the header


def _codes(model: nn.Module, images: torch.Tensor, state: State, site: Site) -> torch.Tensor:
    """The codes at a site when the model runs in floating point under the state's rewrites."""
    seen = []
    q, p = state.plan[site].quantizer, state.params[site]
    watch = {site: lambda x: seen.append(q.encode(x, p)) or x}
    with torch.no_grad(), Interceptor(model, {**state.floating().transforms(), **watch}):
        model(images)
    return seen[0]


def test_reparameterised_codes_are_those_of_the_channel_wise_grid(tiny: tuple) -> None:
    """RepQ-ViT's identity: after the rewrite, layer-wise grids give the same integers."""
    model, images = tiny
    bench = Bench(model.eval(), observe(model, images[:1]), Batches(images))
    recipe = repq_vit(Bits(8, 4))
    before = Fit()(State(bench.trace, recipe.plan(bench.trace)), bench)
    after = ScaleReparam()(before, bench)
    sites = bench.trace.with_role(Role.POST_NORM)
    assert len(sites) == 2
    for site in sites:
        assert before.plan[site].quantizer.granularity == PER_CHANNEL
        assert after.plan[site].quantizer.granularity == PER_TENSOR
        same = _codes(model, images, before, site) == _codes(model, images, after, site)
        assert same.float().mean() > 0.999  # a tie may fall the other way in float32


def test_dead_norm_channels_do_no_harm(tiny: tuple) -> None:
    model, images = tiny
    with torch.no_grad():
        model.norm1.weight[:2] = 0
        model.norm1.bias[:2] = torch.tensor([0.0, 0.7])
    quantized = vitquant.quantize(model, images, "repq-vit", "w8a8")
    assert (quantized(images) - model(images)).norm() < 0.1 * model(images).norm()


def test_a_recipe_of_the_users_own(tiny: tuple) -> None:
    model, images = tiny
    recipe = Recipe(
        "mine",
        {
            **dict.fromkeys(ACTIVATION_ROLES, FLOAT),
            Role.POST_ACT: Rule(Uniform(6), MseGrid()),
            Role.WEIGHT: Rule(Uniform(4, PER_OUTPUT, symmetric=True)),
        },
        passes=(Fit(),),
        overrides=(("head:*", Rule(Uniform(8, PER_OUTPUT))), ("head:*.input", FLOAT), ("stem:*", FLOAT)),
    )
    entries = vitquant.quantize(model, images, recipe).ledger.entries
    assert entries["mlp.2:linear0.input"].bits == 6
    assert entries["head:linear0.weight"].bits == 8
    assert entries["head:linear0.input"].bits == entries["stem:conv0.weight"].bits == 32


def test_a_recipe_must_cover_every_role(tiny: tuple) -> None:
    model, images = tiny
    with pytest.raises(PlanError, match="no rule for role 'image'"):
        vitquant.quantize(model, images, Recipe("partial", {Role.WEIGHT: FLOAT}, ()))


def test_a_rewrite_that_is_not_exact_is_caught(tiny: tuple) -> None:
    from dataclasses import dataclass, replace

    @dataclass(frozen=True)
    class Wrong:
        def __call__(self, state, bench):
            site = state.trace.with_role(Role.WEIGHT)[1]
            return replace(state, rewrites={site: state.constant(site) * 1.01})

    model, images = tiny
    base = vitquant.methods.minmax(Bits(8, 8))
    with pytest.raises(FloatDrift, match="Wrong"):
        vitquant.quantize(model, images, Recipe("wrong", base.rules, (Fit(), Wrong())))


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.full((2, 3, 16, 16), torch.nan), NonFinite, "stem:conv0.input"),
        (torch.zeros(0, 3, 16, 16), NoData, "no calibration image"),
        (iter([torch.zeros(1, 3, 16, 16)]), DataError, "re-iterable"),
        ([1, 2], DataError, "must be a tensor"),
    ],
)
def test_bad_images_are_named(images: object, error: type[Exception], words: str, tiny: tuple) -> None:
    with pytest.raises(error, match=words):
        vitquant.quantize(tiny[0], images, "minmax", "w8a8")


@pytest.mark.parametrize(
    ("method", "bits", "words"),
    [("repqvit", "w4a4", "did you mean 'repq-vit'"), ("minmax", "4/4", "w4a4"), ("minmax", "w1a8", "must be 2 to 8")],
)
def test_bad_arguments_are_named(method: str, bits: str, words: str, tiny: tuple) -> None:
    with pytest.raises(UsageError, match=words):
        vitquant.quantize(tiny[0], tiny[1], method, bits)


def _edit(config: dict, path: str, value: object) -> dict:
    *parents, last = path.split(".")
    place = config
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", "other", "field 'format'"),
        ("version", 99, "field 'version' is 99"),
        ("sites.0.quantizer", {"type": "Evil", "granularity": {"axes": [], "group": 1}}, r"sites\[0\].*Evil"),
        ("sites.0.site", "nonsense", r"sites\[0\].*not a site"),
        ("provenance.seed", 5, "config_sha256"),
    ],
)
def test_edited_artifacts_are_refused(path: str, value: object, words: str, tiny: tuple, tmp_path: Path) -> None:
    vitquant.quantize(*tiny, "minmax", "w8a8").save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(_edit(json.loads(file.read_text()), path, value)))
    with pytest.raises(ArtifactError, match=words) as caught:
        vitquant.load(tmp_path, model=Tiny())
    assert "config.json" in str(caught.value)


def test_damaged_artifacts_are_refused(tiny: tuple, tmp_path: Path) -> None:
    vitquant.quantize(*tiny, "minmax", "w8a8").save(tmp_path)
    tensors, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:200])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read"):
        vitquant.load(tmp_path, model=Tiny())
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    tensors.write_bytes(bytes(flipped))
    with pytest.raises(ArtifactError, match="tensors_sha256"):
        vitquant.load(tmp_path, model=Tiny())
    tensors.write_bytes(whole)
    with pytest.raises(UsageError, match="model of your own"):
        vitquant.load(tmp_path)
    with pytest.raises(ArtifactError, match="does not fit the model"):
        vitquant.load(tmp_path, model=nn.Linear(3, 3))
    config.write_text(config.read_text()[:300])
    with pytest.raises(ArtifactError, match=r"config.json: not valid JSON"):
        vitquant.load(tmp_path, model=Tiny())
    tensors.unlink()
    with pytest.raises(ArtifactError, match="not a vitquant artifact"):
        vitquant.load(tmp_path / "nowhere")


def test_hugging_face_models_run_by_keyword() -> None:
    model, images = LISTED["hf vit"]()
    quantized = vitquant.quantize(model, images, "repq-vit", "w8a8")
    assert torch.equal(quantized(pixel_values=images).logits, quantized(images).logits)


def test_sites_are_parsed_from_the_artifact(tiny: tuple) -> None:
    quantized = vitquant.quantize(*tiny, "repq-vit", "w4a4")
    assert all(Site.parse(name) for name in quantized.ledger.entries)
    bits = quantized.ledger.bits()
    assert bits["weight"] == 4 and 4 < bits["activation"] < 5  # the image has 8


def test_bops_count_every_product() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 2))
    quantized = vitquant.quantize(model, torch.randn(4, 3, 2, 2), "minmax", "w4a6")
    entries = quantized.ledger.entries
    first = entries["1:linear0.input"].bits  # the image stays at 8
    assert quantized.ledger.bops() == 12 * 8 * 4 * first + 8 * 2 * 4 * 6


# Calibration -----------------------------------------------------------------------------------------------------


def test_reservoir_is_bounded_exact_in_range_and_unbiased() -> None:
    torch.manual_seed(0)
    reservoir, seen = Reservoir(capacity=4000, seed=1), []
    for i in range(20):
        x = torch.randn(2, 1000) + i
        seen.append(x)
        reservoir.update(x)
    sample, everything = reservoir.summary(), torch.cat(seen, 1)
    assert sample.values.shape == (2, 2000)
    assert torch.equal(sample.low, everything.amin(1)) and torch.equal(sample.high, everything.amax(1))
    assert (sample.values.mean(1) - everything.mean(1)).abs().max() < 0.5  # standard error 0.13


def test_reservoir_does_not_depend_on_the_batching() -> None:
    x = torch.randn(1, 500)
    whole, parts = Reservoir(10_000, 3), Reservoir(10_000, 3)
    whole.update(x)
    for part in x.split(100, 1):
        parts.update(part)
    assert torch.equal(whole.summary().values.sort().values, parts.summary().values.sort().values)


def test_quantiles_agree_with_torch_and_have_no_size_limit() -> None:
    x = torch.randn(3, 1001)
    levels = (0.999, 0.5, 0.001, 0.9)
    assert torch.allclose(quantiles(x, levels), torch.quantile(x, torch.tensor(levels), dim=1), atol=1e-6)
    large = torch.arange(2.0**24 + 2**20).reshape(1, -1)  # torch.quantile refuses more than 2**24
    assert quantiles(large, (0.9999,)).item() == pytest.approx(0.9999 * (large.numel() - 1), rel=1e-6)


def test_percentile_clips_outliers_where_min_max_does_not() -> None:
    x = torch.cat([torch.randn(1, 100_000), torch.tensor([[1000.0]])], 1)
    q, sample = Uniform(8), Sample.of(x)
    assert MinMax()(q, sample).scale.item() > 3
    inner = x[x.abs() < 5]
    clipped = Percentile((0.999, 0.9999))(q, sample)
    assert clipped.scale.item() < 0.1
    assert (q.fake_quantize(inner, clipped) - inner).abs().mean() < 0.05


@pytest.mark.parametrize("quantizer", [Uniform(3), Uniform(3, symmetric=True), Log(3, steps=2)])
def test_mse_grid_is_the_best_of_its_candidates(quantizer: object) -> None:
    x = torch.randn(2, 500).abs()
    rows = Sample.of(x)
    grain = quantizer.__class__(**{**quantizer.__dict__, "granularity": PER_OUTPUT})
    best = grain.fake_quantize(x, MseGrid(30)(grain, rows)).sub(x).square().mean(1)
    for ratio in torch.linspace(1, 0.11, 30):
        other = grain.fake_quantize(x, grain.fit(rows.low * ratio, rows.high * ratio)).sub(x).square().mean(1)
        assert (best <= other * (1 + 1e-5)).all()


def test_calibration_memory_does_not_grow_with_images() -> None:
    reservoir = Reservoir(capacity=1000)
    for _ in range(50):
        reservoir.update(torch.randn(1, 5000))
    assert reservoir.summary().values.numel() == 1000


def test_affine_parameters_survive_pickling_free_storage() -> None:
    p = Affine(torch.tensor([0.1]), torch.tensor([-300.0]))
    assert Uniform(4, include_zero=False).decode(torch.tensor([0.0]), p).item() == pytest.approx(30.0)


class Masked(Tiny):
    """Attention under a mask of each image's own, and under one for all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        own = x.mean(-1)[:, None, None]
        own = nn.functional.scaled_dot_product_attention(q, k, v, own)
        both = own + nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=q.mean((0, 1, 3))[None, None, None]
        )
        return self.head(both.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("build", [Tiny, Masked])
@pytest.mark.parametrize(("method", "span"), [("repq-vit", 1), ("adfq-vit", 1), ("igq-vit", 1), ("igq-vit", 2)])
def test_attention_of_a_few_images_at_a_time_is_that_of_all(
    build: type[nn.Module], method: str, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model, images = build(), torch.randn(6, 3, 16, 16)
    quantized = vitquant.quantize(model, images, method, "w8a8", **QUICK.get(method, {}))
    for operand in quantized.operands:
        if isinstance(getattr(operand, "quantizer", None), InstanceGroups):
            operand.quantizer = dataclasses.replace(operand.quantizer, span=span)
    sizes = []
    join = Passing.in_parts
    monkeypatch.setattr(
        Passing, "in_parts", lambda self, step, parts: sizes.append(len(parts)) or join(self, step, parts)
    )
    with torch.no_grad():
        whole = quantized(images)
        assert not sizes
        monkeypatch.setattr("vitquant.artifact.passing.PART", 1)
        torch.testing.assert_close(quantized(images), whole, rtol=1e-4, atol=1e-5)
    assert sizes and set(sizes) == {6 // span}


def test_attention_stays_whole_where_a_format_looks_at_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Tiny(), torch.randn(6, 3, 16, 16)
    quantized = vitquant.quantize(model, images, "repq-vit", "w8a8")
    query = quantized.operands[[s.operand for s in quantized.sites].index("left")]
    query.quantizer = ShiftLog(8, runtime_minimum=True)
    query.names, query.minimum = ("scale", "minimum"), torch.zeros(1)
    monkeypatch.setattr("vitquant.artifact.passing.PART", 1)
    monkeypatch.setattr(Passing, "in_parts", lambda *_: pytest.fail("taken apart"))
    with torch.no_grad():
        assert quantized(images).isfinite().all()


class Shared(Tiny):
    """All images attend to the same keys and values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k.mean(0, keepdim=True), v.mean(0, keepdim=True))
        return self.head(x.transpose(1, 2).flatten(2).mean(1))


def test_attention_stays_whole_where_images_share_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = vitquant.quantize(Shared(), torch.randn(6, 3, 16, 16), "minmax", "w8a8")
    monkeypatch.setattr("vitquant.artifact.passing.PART", 1)
    with torch.no_grad():
        assert quantized(torch.randn(6, 3, 16, 16)).isfinite().all()
