"""Folders of images: splits, labels, samples, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitquant.errors import DataError, UsageError
from vitquant.images import ImageFolder, find_split, fingerprint


def to_tensor(image: Image.Image) -> Tensor:
    """A transform: the mean colour, so that an image is known by its value."""
    assert image.mode == "RGB"
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1))[:, None, None]


def paint(path: Path, value: int = 0, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (16, 16), value).save(path)


def folder(root: Path, count: int = 10, name: str = "{:02d}.png") -> ImageFolder:
    for i in range(count):
        paint(root / name.format(i), i)
    return ImageFolder(root, to_tensor)


def values(images: ImageFolder) -> list[int]:
    return [int(images[i].mean()) for i in range(len(images))]


@pytest.mark.parametrize(
    ("present", "kind", "found"),
    [
        (["calib", "train", "val"], "calib", "calib"),
        (["train", "val"], "calib", "train"),
        (["calib", "val"], "val", "val"),
        (["n01440764"], "val", "."),
        (["n01440764"], "calib", "."),
    ],
)
def test_the_split_is_found(tmp_path: Path, present: list[str], kind: str, found: str) -> None:
    for name in present:
        (tmp_path / name).mkdir()
    assert find_split(tmp_path, kind) == tmp_path / found  # type: ignore[arg-type]


def test_one_splits_images_never_stand_in_for_the_others(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="has val/ but not calib/ nor train/"):
        find_split(tmp_path, "calib")
    with pytest.raises(DataError, match="not a folder"):
        find_split(tmp_path / "absent", "val")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").touch()
    (tmp_path / "class" / "._hidden.jpg").touch()
    with pytest.raises(DataError, match="holds no image"):
        ImageFolder(tmp_path, to_tensor)
    with pytest.raises(DataError, match="not a folder"):
        ImageFolder(tmp_path / "absent", to_tensor)


def test_a_flat_folder_streams_without_labels(tmp_path: Path) -> None:
    got = list(folder(tmp_path).batches(4))
    assert [images.shape for images, _ in got] == [(4, 3, 1, 1), (4, 3, 1, 1), (2, 3, 1, 1)]
    assert [labels for _, labels in got] == [None, None, None]
    assert torch.cat([images for images, _ in got])[:, 0].flatten().tolist() == list(range(10))


def test_worker_processes_give_the_same_batches(tmp_path: Path) -> None:
    images = folder(tmp_path)
    alone, helped = (torch.cat([batch for batch, _ in images.batches(3, n)]) for n in (0, 2))
    assert torch.equal(alone, helped)


def test_calibration_can_be_iterated_again_and_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    batches = folder(tmp_path).calibration(4)
    before = torch.get_rng_state()
    first, second = torch.cat(list(batches)), torch.cat(list(batches))
    assert len(batches) == 3
    assert torch.equal(first, second) and len(first) == 10
    assert torch.equal(torch.get_rng_state(), before)


def test_every_colour_mode_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        paint(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}", mode=mode)
    assert len(torch.cat(list(ImageFolder(tmp_path, to_tensor).calibration(5)))) == 5


def test_a_sample_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    images = folder(tmp_path / "a", 50)
    for i in reversed(range(50)):  # another order on disk
        paint(tmp_path / "b" / f"{i:02d}.png", i)
    drawn = values(images.sample(20, seed=3))
    assert len(set(drawn)) == 20
    assert values(ImageFolder(tmp_path / "b", to_tensor).sample(20, seed=3)) == drawn
    assert values(images.sample(5, seed=3)) == drawn[:5]
    assert values(images.sample(20, seed=4)) != drawn
    assert len(images) == 50


def test_a_sample_larger_than_the_folder_names_both_numbers(tmp_path: Path) -> None:
    images = folder(tmp_path, 3)
    with pytest.raises(DataError, match="holds 3 images, fewer than the 4 asked for"):
        images.sample(4, seed=0)
    for size in (0, -1):
        with pytest.raises(UsageError, match=f"at least 1 image, not {size}"):
            images.sample(size, seed=0)
        with pytest.raises(UsageError, match=f"at least 1 image, not {size}"):
            images.calibration(size)


def test_unreadable_images_are_counted_and_five_are_named(tmp_path: Path) -> None:
    images = folder(tmp_path, 40)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "00.jpg")
    (tmp_path / "00.jpg").write_bytes((tmp_path / "00.jpg").read_bytes()[:-500])  # its header is in order
    for i in range(6):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    images = ImageFolder(tmp_path, to_tensor)
    message = r"7 of 41 images in .* cannot be read: 00\.jpg, 00\.png, 01\.png, 02\.png, 03\.png, \.\.\.$"
    for start in (images.calibration, images.batches, lambda size: images.sample(41, seed=0)):
        with pytest.raises(DataError, match="7 of 41 images"):
            start(8)
    with pytest.raises(DataError, match=message):
        images.check()


def test_an_image_lost_after_the_check_is_named(tmp_path: Path) -> None:
    images = folder(tmp_path, 2)
    batches = images.calibration(1)
    (tmp_path / "01.png").unlink()
    with pytest.raises(DataError, match=r"01\.png cannot be read"):
        list(batches)


def test_wnids_map_to_the_thousand_classes_however_few_are_present(tmp_path: Path) -> None:
    for wnid in ("n15075141", "n01440764", "n02123045"):
        paint(tmp_path / wnid / "a.png")
    ((_, labels),) = ImageFolder(tmp_path, to_tensor, "imagenet-1k", 1000).batches(8)
    assert labels is not None
    assert labels.tolist() == [0, 281, 999]


def test_a_sample_keeps_its_images_labels(tmp_path: Path) -> None:
    for label in range(12):
        paint(tmp_path / str(label) / "a.png", label)
    images = ImageFolder(tmp_path, to_tensor, "imagenet-1k", 1000).sample(7, seed=0)
    ((batch, labels),) = images.batches(8)
    assert labels is not None
    assert labels.tolist() == batch[:, 0].flatten().tolist()  # by number: 10 is not between 1 and 2


@pytest.mark.parametrize("name", ["n99999999", "tench", "1000", "-1"])
def test_a_folder_that_is_no_imagenet_class_is_named(tmp_path: Path, name: str) -> None:
    paint(tmp_path / "n01440764" / "a.png")
    paint(tmp_path / name / "a.png")
    images = ImageFolder(tmp_path, to_tensor, "imagenet-1k", 1000)
    with pytest.raises(DataError, match=f"class folder {name}, none of the 1000"):
        images.batches(2)
    assert len(images.calibration(2)) == 1  # needs no labels


def test_other_label_spaces_take_the_sorted_folders(tmp_path: Path) -> None:
    for name in ("cat", "ant", "bee"):
        paint(tmp_path / name / "a.png")
    ((_, labels),) = ImageFolder(tmp_path, to_tensor, classes=3).batches(8)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="has 3 class folders, the model 10 classes"):
        ImageFolder(tmp_path, to_tensor, classes=10).batches(8)
    paint(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"outside any, such as loose\.png"):
        ImageFolder(tmp_path, to_tensor, classes=3).batches(8)


def test_a_fingerprint_tells_selections_apart_and_not_orders(tmp_path: Path) -> None:
    images = folder(tmp_path, 10)
    assert fingerprint(images.sample(10, 0)) == fingerprint(images)
    assert fingerprint(images.sample(9, 0)) != fingerprint(images)
    before = fingerprint(images)
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes() + b"x")
    assert fingerprint(images) != before
    assert len(before) == 64
