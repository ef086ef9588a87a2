"""Where each data set's images come from: what identifies them, and how they are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headsearch.config import DataConfig
from headsearch.core.decoding import Decoded, Pictures, Pixels, Stored, decode_splits, fit_array, new_array
from headsearch.core.folder import file_states, list_folder, read_folder
from headsearch.core.imagecache import locked
from headsearch.core.imagenet100 import CLASSES as IMAGENET_100
from headsearch.core.photos import PhotoArray
from headsearch.core.splits import held_out, stratified_order
from headsearch.errors import DataError, WorldError
from headsearch.recipes import STORED_SIDES

PHOTO_SIZE = 128
"""Default side of imagenette and fgvc-aircraft, whose images come in all sizes (Schliebitz et al. 2024)."""
BANNER = 20
"""Height in pixels of the copyright notice under every fgvc-aircraft image."""


@dataclass(frozen=True)
class Source:
    """`identity` determines the pixels (JSON values); `read(scratch folder)` makes them."""

    identity: dict[str, object]
    read: Callable[[Path], Decoded]
    notes: Callable[[Sequence[str]], list[str]] = lambda _: []
    """What was found, used and ignored, lines for people, given the names of unreadable files."""


@dataclass(frozen=True)
class Torchvision:
    """One of torchvision's data sets: class name, folder that it unpacks to, arguments of both splits."""

    cls: str
    base: str
    train: dict[str, Any]
    test: dict[str, Any]
    unlabelled: str | None = None
    """File of images without labels below `base`, as the training split has them."""


TORCHVISION = {
    "cifar10": Torchvision("CIFAR10", "cifar-10-batches-py", {"train": True}, {"train": False}),
    "cifar100": Torchvision("CIFAR100", "cifar-100-python", {"train": True}, {"train": False}),
    "stl10": Torchvision(
        "STL10", "stl10_binary", {"split": "train"}, {"split": "test"}, unlabelled="unlabeled_X.bin"
    ),
    "fashion-mnist": Torchvision("FashionMNIST", "FashionMNIST", {"train": True}, {"train": False}),
    "imagenette": Torchvision("Imagenette", "imagenette2", {"split": "train"}, {"split": "val"}),
    "fgvc-aircraft": Torchvision(
        "FGVCAircraft",
        "fgvc-aircraft-2013b",
        {"split": "trainval", "annotation_level": "manufacturer"},
        {"split": "test", "annotation_level": "manufacturer"},
    ),
}
"""Splits are the official ones: stl10 with its 100,000 unlabelled images, imagenette tested on its `val`,
fgvc-aircraft with its 30 manufacturers as classes and without the banner at the bottom."""


def find_source(config: DataConfig, home: Path) -> Source:
    """Return the source that `config` names; fetch a torchvision data set first if that is allowed.

    Raises DataError if the data are not there, WorldError if they cannot be fetched.
    """
    if config.name == "digits":
        return Source(
            {"name": "digits", "image_size": config.image_size, **_whole(config)},
            lambda _: _read_digits(config),
        )
    if config.name == "folder":
        root = resolve_root(config.root or "")
        only = IMAGENET_100 if config.classes == "imagenet-100" else ()
        listing = list_folder(root, unlabelled=config.unlabelled, only=only)
        states = file_states(root, listing.names)
        return Source(
            {
                "name": "folder",
                "root": str(root),
                "image_size": config.image_size,
                "stored_side": config.stored_side,
                "classes": listing.classes,
                "files": states,
            },
            lambda scratch: read_folder(
                listing,
                config.image_size,
                config.max_unreadable_fraction,
                scratch,
                stored_side=config.stored_side,
            ),
            listing.lines,
        )
    dataset = TORCHVISION[config.name]
    root = resolve_root(config.root) if config.root is not None else home / "data"
    if not (root / dataset.base).is_dir():
        if not config.download:
            raise DataError(
                f"data.root: no {dataset.base} folder of {config.name} under {root}; point data.root "
                "to where it is, or set data.download = true"
            )
        _download(config.name, dataset, root)
    files = sorted(
        str(path.relative_to(root)) for path in (root / dataset.base).rglob("*") if not path.is_dir()
    )
    return Source(
        {
            "name": config.name,
            "root": str(root),
            "image_size": config.image_size,
            "stored_side": config.stored_side,
            "unlabelled": config.unlabelled,
            "files": file_states(root, files),
            **_whole(config),
        },
        lambda scratch: _read_torchvision(config, dataset, root, scratch),
    )


def resolve_root(root: str) -> Path:
    """`root` as an absolute path; a relative one is under $HEADSEARCH_DATA, else the working directory."""
    return (Path(os.environ.get("HEADSEARCH_DATA") or ".") / Path(root).expanduser()).resolve()


def _whole(config: DataConfig) -> dict[str, object]:
    """What the identity of arrays has that are kept whole; nothing where it is what it always was."""
    return {"whole": True} if config.has_another_side and not config.resize_first else {}


def _kept(images: Pixels, config: DataConfig) -> Stored:
    """An array's images (N, 3, H, W) as they are stored here: for views at another size, whole."""
    if config.has_another_side and not config.resize_first:
        return PhotoArray.of(images)
    return fit_array(images, config.image_size)


def _read_digits(config: DataConfig) -> Decoded:
    """scikit-learn's 1,797 digits, pixels 0..16 scaled to 0..255; a fifth of each class is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    images = _kept(_three_channels(grey), config)
    order = stratified_order(labels, salt=1)
    count = held_out(labels[order], 0.2)
    test, train = np.sort(order[:count]), np.sort(order[count:])
    classes = tuple(str(name) for name in bunch.target_names)
    return Decoded(
        classes,
        Pictures(images[train], labels[train]),
        Pictures(images[test], labels[test]),
        len(labels),
        view_side=config.image_size or STORED_SIDES["digits"],
    )


def _read_torchvision(config: DataConfig, dataset: Torchvision, root: Path, scratch: Path) -> Decoded:
    import torchvision.datasets

    make = getattr(torchvision.datasets, dataset.cls)
    splits: list[Pictures] = []
    notes: list[str] = []
    classes: tuple[str, ...] = ()
    for split, arguments in (("train", dataset.train), ("test", dataset.test)):
        try:
            found = make(root=str(root), download=False, **arguments)
        except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(
                f"data.root: {root / dataset.base} is incomplete or damaged ({' '.join(str(error).split())}) "
                "- remove it and set data.download = true to fetch it again"
            ) from error
        images: Stored
        if hasattr(found, "loader"):
            images, labels, said = _read_photos(found, config, scratch / f"{split}.raw.npy")
            notes += said
        else:
            images, labels = _read_arrays(found, config)
        splits.append(Pictures(images, np.asarray(labels, dtype=np.int64)))
        names = getattr(found, "classes", None) or range(int(splits[0].labels.max()) + 1)
        # imagenette gives each class several names
        classes = tuple(name[0] if isinstance(name, tuple) else str(name) for name in names)
    loose = None
    if config.unlabelled and dataset.unlabelled is not None:
        loose = _read_unlabelled(root / dataset.base / dataset.unlabelled, config, scratch)
    total = sum(len(split.labels) for split in splits) + (0 if loose is None else len(loose))
    side = config.image_size or PHOTO_SIZE
    return Decoded(classes, splits[0], splits[1], total, unlabelled=loose, notes=tuple(notes), view_side=side)


def _read_unlabelled(path: Path, config: DataConfig, scratch: Path) -> Stored:
    """STL-10's unlabelled images (N, 3, S, S), mapped from their file where they keep their size.

    torchvision has checked the file with those of the training split. Its images are columns first.
    """
    try:
        stored = STORED_SIDES["stl10"]
        raw = np.memmap(path, np.uint8, "r").reshape(-1, 3, stored, stored).transpose(0, 1, 3, 2)
    except (OSError, ValueError) as error:
        raise DataError(f"data.root: {path} is incomplete or damaged ({error})") from error
    if not config.has_another_side:
        return raw
    side = config.image_size if config.resize_first else stored
    out = new_array(scratch / "unlabelled.raw.npy", (len(raw), 3, side or stored, side or stored))
    for start in range(0, len(raw), 1024):
        out[start : start + 1024] = fit_array(raw[start : start + 1024], side)
    return _kept(out, config)


def _read_arrays(found: Any, config: DataConfig) -> tuple[Stored, Any]:
    """Read what torchvision keeps as one array: (N, 3, H, W), (N, H, W, 3) or grey (N, H, W)."""
    data = np.asarray(found.data)
    if data.ndim == 3:
        data = _three_channels(data)
    elif data.shape[1] != 3:
        data = data.transpose(0, 3, 1, 2)
    return _kept(data, config), found.labels if hasattr(found, "labels") else found.targets


def _read_photos(found: Any, config: DataConfig, target: Path) -> tuple[Stored, Any, list[str]]:
    """Read what torchvision keeps as files."""
    if config.name == "imagenette":
        paths, labels, trim = *zip(*found._samples, strict=True), 0
    else:
        paths, labels, trim = found._image_files, found._labels, BANNER
    read, notes = decode_splits(
        {target: [Path(path) for path in paths]},
        config.image_size or PHOTO_SIZE,
        stored_side=config.stored_side,
        trim_bottom=trim,
    )
    images, failures = read[target].images, read[target].failures
    if failures:
        first = min(failures)
        raise DataError(f"data.root: {len(failures)} damaged images, first {paths[first]}: {failures[first]}")
    return images, labels, notes


def _three_channels(grey: Pixels) -> Pixels:
    """(N, H, W) as (N, 3, H, W), so that every encoder sees the input it was made for."""
    return np.repeat(grey[:, None], 3, axis=1)


def _download(name: str, dataset: Torchvision, root: Path) -> None:
    """Fetch into a folder of its own and move it when it is whole: a killed download leaves no half."""
    import torchvision.datasets

    with locked(root / f".{dataset.base}.lock"):
        if (root / dataset.base).is_dir():
            return
        part = root / f".{dataset.base}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            getattr(torchvision.datasets, dataset.cls)(root=str(part), download=True, **dataset.train)
            (part / dataset.base).rename(root / dataset.base)
        except (OSError, RuntimeError) as error:
            raise WorldError(
                f"{name} could not be downloaded to {root} ({' '.join(str(error).split())}); put its "
                f"{dataset.base} folder there by hand"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
