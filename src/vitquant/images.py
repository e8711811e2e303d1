"""Images from a folder, as batches: for calibration without labels, for evaluation with them.

``Images`` is what the rest of the package works with; ``ImageFolder`` is the one on disk, and
``vitquant.digits.DigitsImages`` the one built in.
"""

from __future__ import annotations

import hashlib
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from vitquant.errors import DataError, UsageError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SPLITS = {"calib": ("calib", "train"), "val": ("val",)}
_NAMED = 5  # files named in one message; the rest are counted


def find_split(root: Path, kind: Literal["calib", "val"]) -> Path:
    """Where to read: ``root/calib`` or ``root/train`` to calibrate, ``root/val`` to evaluate, else ``root``.

    A ``root`` that holds only the other purpose's folder is a DataError: falling back to all of it would
    calibrate on the very images that are evaluated. So is a ``root`` that is no folder.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder of images")
    for name in _SPLITS[kind]:
        if (root / name).is_dir():
            return root / name
    for other in _SPLITS["val" if kind == "calib" else "calib"]:
        if (root / other).is_dir():
            wanted = " nor ".join(f"{name}/" for name in _SPLITS[kind])
            raise DataError(f"{root} has {other}/ but not {wanted}: add it, or name the folder of images itself")
    return root


class Images(Dataset[Tensor], ABC):
    """A sequence of preprocessed images, read one by one: ``images[i]`` is a float tensor (C, H, W)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor: ...

    @abstractmethod
    def labels(self) -> Tensor | None:
        """Class indices, int64 (len(self),); None where the images carry no labels."""

    @abstractmethod
    def entries(self) -> list[str]:
        """One line for each image that identifies it, in order."""

    @abstractmethod
    def check(self) -> None:
        """Raise DataError if an image cannot be read."""

    @abstractmethod
    def _select(self, indices: Sequence[int]) -> Self: ...

    @abstractmethod
    def __str__(self) -> str: ...

    def sample(self, n: int, seed: int) -> Self:
        """``n`` images drawn without replacement, checked to be readable.

        The draw depends on the images' names and the seed alone, and a smaller draw with the same seed is
        the beginning of a larger one. DataError if there are fewer than ``n`` images.
        """
        if n < 1:
            raise UsageError(f"a sample needs at least 1 image, not {n}")
        if n > len(self):
            raise DataError(f"{self} holds {len(self)} images, fewer than the {n} asked for")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        drawn = self._select(order[:n])
        drawn.check()
        return drawn

    def batches(self, size: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Stream (images (B, C, H, W), labels (B,) or None) in order; the last batch may be smaller.

        Labels are mapped and every image is checked before the first batch: DataError comes early.
        """
        labels = self.labels()
        self.check()
        return _labelled(self.calibration(size, workers), labels)

    def calibration(self, size: int, workers: int = 0) -> DataLoader[Tensor]:
        """Batches of images (B, C, H, W) without labels, re-iterable; ``len`` is the number of batches."""
        if size < 1:
            raise UsageError(f"a batch needs at least 1 image, not {size}")
        self.check()
        # Without a generator of its own the loader would draw from torch's global one.
        return DataLoader(self, batch_size=size, num_workers=workers, generator=torch.Generator())


def _labelled(images: DataLoader[Tensor], labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    start = 0
    for batch in images:
        yield batch, None if labels is None else labels[start : start + len(batch)]
        start += len(batch)


def fingerprint(images: Images) -> str:
    """SHA-256, in hex, over the selected images' names and sizes, whatever their order."""
    return hashlib.sha256("\n".join(sorted(images.entries())).encode()).hexdigest()


class ImageFolder(Images):
    """``root/CLASS/image.jpg`` (labelled by folder) or ``root/image.jpg`` (no labels), in sorted order.

    Labels, when asked for: in the label space ``"imagenet-1k"`` a folder is a wnid (``n01440764``) or a class
    index (``0`` to ``999``), and any of the 1000 may be absent. Otherwise the folders must be as many as the
    model's ``classes``, and their sorted order is the classes' order.
    """

    def __init__(
        self,
        root: Path,
        transform: Callable[[Image.Image], Tensor],
        label_space: str | None = None,
        classes: int | None = None,
    ) -> None:
        """DataError if ``root`` is no folder or holds no image."""
        if not root.is_dir():
            raise DataError(f"{root} is not a folder of images")
        self.root = root
        self._transform = transform
        self._label_space = label_space
        self._classes = classes
        self._folders = _listing(root, folders=True)
        self._names = _listing(root, folders=False)
        for folder in self._folders:
            self._names += [f"{folder}/{name}" for name in _listing(root / folder, folders=False)]
        self._checked = False
        if not self._names:
            raise DataError(f"{root} holds no image, directly or one folder down ({', '.join(SUFFIXES)})")

    def __str__(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Tensor:
        path = self.root / self._names[index]
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds
            raise DataError(f"{path} cannot be read: {error}") from error
        return self._transform(rgb)

    def entries(self) -> list[str]:
        """``name size-in-bytes`` of each file, the name relative to the root."""
        return [f"{name} {(self.root / name).stat().st_size}" for name in self._names]

    def check(self) -> None:
        """Decode every selected file once, coarsely; DataError counts those that fail and names five."""
        if self._checked:
            return
        with ThreadPoolExecutor() as pool:
            readable = list(pool.map(_readable, (self.root / name for name in self._names)))
        bad = [name for name, good in zip(self._names, readable, strict=True) if not good]
        if bad:
            named = ", ".join(bad[:_NAMED]) + (", ..." if len(bad) > _NAMED else "")
            raise DataError(f"{len(bad)} of {len(self)} images in {self.root} cannot be read: {named}")
        self._checked = True

    def labels(self) -> Tensor | None:
        """Class indices, int64 (len(self),), or None for a flat folder; DataError if folders fit no class."""
        if not self._folders:
            return None
        loose = [name for name in self._names if "/" not in name]
        if loose:
            raise DataError(f"{self.root} mixes class folders with images outside any, such as {loose[0]}")
        index = self._class_index()
        return torch.tensor([index[name.split("/")[0]] for name in self._names])

    def _class_index(self) -> dict[str, int]:
        if self._label_space == "imagenet-1k":
            wnids = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}
            return {folder: _imagenet_index(folder, wnids, self.root) for folder in self._folders}
        if len(self._folders) != self._classes:
            raise DataError(
                f"{self.root} has {len(self._folders)} class folders, the model {self._classes} classes: "
                "labels need one folder for each class"
            )
        return {folder: i for i, folder in enumerate(self._folders)}

    def _select(self, indices: Sequence[int]) -> Self:
        subset = copy(self)
        subset._names = [self._names[i] for i in indices]
        return subset


def _listing(folder: Path, *, folders: bool) -> list[str]:
    """Sorted names of the visible sub-folders, or of the visible images, directly in ``folder``."""
    with os.scandir(folder) as found:
        return sorted(
            entry.name
            for entry in found
            if not entry.name.startswith(".")
            and (entry.is_dir() if folders else entry.is_file() and entry.name.lower().endswith(SUFFIXES))
        )


def _imagenet_index(folder: str, wnids: dict[str, int], root: Path) -> int:
    if folder in wnids:
        return wnids[folder]
    if folder.isascii() and folder.isdigit() and int(folder) < len(wnids):
        return int(folder)
    raise DataError(
        f"{root} has the class folder {folder}, none of the 1000 ImageNet classes "
        "(a wnid such as n01440764, or an index from 0 to 999)"
    )


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            # Image.verify() sees only a JPEG's header; a decode at 1/8 scale is cheap and finds a cut file.
            image.draft("RGB", (1, 1))
            image.load()
    except Exception:  # Pillow's decoders raise many kinds
        return False
    return True
