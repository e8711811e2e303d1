"""The built-in model and images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitquant import digits
from vitquant.digits import DigitsImages, train
from vitquant.errors import UsageError
from vitquant.evaluate import measure
from vitquant.images import fingerprint
from vitquant.models import load, parse


def test_the_shipped_model_reads_digits() -> None:
    loaded = load(parse("digits"))
    report = measure(DigitsImages("val").batches(64), loaded.model)
    assert report.images == 360
    assert report.top1 is not None and report.top1 >= 97
    assert (loaded.classes, loaded.label_space, loaded.input_size) == (10, None, (1, 8, 8))
    assert digits.WEIGHTS.stat().st_size < 1_000_000


def test_without_its_weights_the_model_is_random() -> None:
    trained, random = load(parse("digits")), load(parse("digits"), pretrained=False)
    assert trained.model.state_dict().keys() == random.model.state_dict().keys()
    assert not torch.equal(trained.model.head.weight, random.model.head.weight)


def test_a_checkpoint_replaces_the_shipped_weights(tmp_path: Path) -> None:
    state = load_file(digits.WEIGHTS)
    state["head.bias"] += 1
    save_file(state, tmp_path / "mine.safetensors")
    loaded = load(parse("digits", tmp_path / "mine.safetensors"))
    assert torch.equal(loaded.model.head.bias, state["head.bias"].float())
    del state["head.bias"]
    save_file(state, tmp_path / "mine.safetensors")
    with pytest.raises(UsageError, match=r"does not fit digits: missing head\.bias"):
        load(parse("digits", tmp_path / "mine.safetensors"))


def test_the_splits_share_no_image_and_hold_every_digit() -> None:
    calib, val = DigitsImages("calib"), DigitsImages("val")
    assert (len(calib), len(val)) == (1437, 360)
    assert not set(calib.entries()) & set(val.entries())
    assert set(calib.labels().tolist()) == set(val.labels().tolist()) == set(range(10))
    assert fingerprint(calib) != fingerprint(val)


def test_samples_and_batches_are_those_of_any_images() -> None:
    images = DigitsImages("calib")
    drawn = images.sample(33, seed=5)
    assert drawn.entries() == images.sample(33, seed=5).entries() != images.sample(33, seed=6).entries()
    got = list(drawn.batches(16))
    assert [len(batch) for batch, _ in got] == [16, 16, 1]
    assert got[0][0].shape[1:] == (1, 8, 8)
    assert torch.equal(torch.cat([labels for _, labels in got if labels is not None]), drawn.labels())
    assert torch.equal(torch.cat(list(drawn.calibration(16))), torch.cat([batch for batch, _ in got]))


def test_a_picture_of_a_digit_is_prepared_like_the_data() -> None:
    images = DigitsImages("val")
    pixels = ((images[0] * digits.STD + digits.MEAN) * 255).round().byte()[0]
    picture = Image.fromarray(pixels.numpy()).convert("RGB")
    assert torch.allclose(load(parse("digits")).transform(picture), images[0], atol=0.01)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_is_repeatable(one_thread: None) -> None:
    first, second = train.train(epochs=1).state_dict(), train.train(epochs=1).state_dict()
    torch.manual_seed(0)
    untrained = digits.build().state_dict()
    for key, value in first.items():
        assert torch.equal(value, second[key])
    assert not torch.equal(first["head.weight"], untrained["head.weight"])


def test_jitter_moves_a_digit_a_little_and_keeps_the_background() -> None:
    images = next(DigitsImages("val").batches(360))[0]
    moved = train.jitter(images)
    assert torch.allclose(train.jitter(torch.full_like(images, -1.0)), torch.tensor(-1.0))
    assert not torch.equal(moved, images)
    assert torch.cosine_similarity(images.flatten(1), moved.flatten(1)).mean() > 0.8


@pytest.mark.slow
def test_the_script_trains_a_model_as_good_as_the_shipped_one(one_thread: None) -> None:
    assert train.accuracy(train.train()) >= 97
