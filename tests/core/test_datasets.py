"""torchvision's data sets, as small copies in their own formats."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from headsearch.config import DataConfig
from headsearch.core.datasets import TORCHVISION
from headsearch.core.images import ImageSet, Split, load_images
from headsearch.errors import DataError, WorldError


def everything(images: ImageSet) -> Split:
    """Original training data: both splits."""
    return Split(
        torch.cat([images.validation.images, images.train.images]),
        torch.cat([images.validation.labels, images.train.labels]),
    )


def assert_holds(split: Split, pixels: np.ndarray, labels: np.ndarray) -> None:
    """`split` has just these images (N, 3, H, W) with their labels, in any order."""
    found = sorted(zip(map(bytes, split.images.numpy()), split.labels.tolist(), strict=True))
    assert found == sorted(zip(map(bytes, np.ascontiguousarray(pixels)), labels.tolist(), strict=True))


RNG = np.random.default_rng(0)


def noise(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def cycle(count: int, classes: int) -> np.ndarray:
    return np.arange(count) % classes


def make_cifar10(root: Path) -> tuple[Any, ...]:
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    train, test, labels = noise(100, 3, 32, 32), noise(20, 3, 32, 32), cycle(100, 10)
    for batch in range(5):
        part = slice(20 * batch, 20 * batch + 20)
        content = {"data": train[part].reshape(20, -1), "labels": labels[part].tolist()}
        (base / f"data_batch_{batch + 1}").write_bytes(pickle.dumps(content))
    (base / "test_batch").write_bytes(
        pickle.dumps({"data": test.reshape(20, -1), "labels": labels[:20].tolist()})
    )
    names = [f"class{index}" for index in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return train, labels, test, labels[:20], tuple(names)


def make_cifar100(root: Path) -> tuple[Any, ...]:
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    train, test, labels = noise(300, 3, 32, 32), noise(100, 3, 32, 32), cycle(300, 100)
    for name, pixels in (("train", train), ("test", test)):
        content = {"data": pixels.reshape(len(pixels), -1), "fine_labels": labels[: len(pixels)].tolist()}
        (base / name).write_bytes(pickle.dumps(content))
    names = [f"class{index}" for index in range(100)]
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    return train, labels, test, labels[:100], tuple(names)


def make_stl10(root: Path) -> tuple[Any, ...]:
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    train, test, labels = noise(40, 3, 96, 96), noise(20, 3, 96, 96), cycle(40, 10)
    for name, pixels in (("train", train), ("test", test)):
        pixels.transpose(0, 1, 3, 2).tofile(base / f"{name}_X.bin")  # columns first
        (labels[: len(pixels)] + 1).astype(np.uint8).tofile(base / f"{name}_y.bin")
    loose_stl10().transpose(0, 1, 3, 2).tofile(base / "unlabeled_X.bin")
    names = [f"class{index}" for index in range(10)]
    (base / "class_names.txt").write_text("\n".join(names))
    return train, labels, test, labels[:20], tuple(names)


def loose_stl10() -> np.ndarray:
    """Its unlabelled images."""
    return np.random.default_rng(9).integers(0, 256, (50, 3, 96, 96), dtype=np.uint8)


def make_fashion_mnist(root: Path) -> tuple[Any, ...]:
    base = root / "FashionMNIST" / "raw"
    base.mkdir(parents=True)
    train, test, labels = noise(40, 28, 28), noise(20, 28, 28), cycle(40, 10)
    for name, pixels in (("train", train), ("t10k", test)):
        count = len(pixels)
        (base / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes()
        )
        (base / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, count) + labels[:count].astype(np.uint8).tobytes()
        )
    names = tuple(torchvision.datasets.FashionMNIST.classes)
    return train[:, None].repeat(3, 1), labels, test[:, None].repeat(3, 1), labels[:20], names


MAKERS = {
    "cifar10": make_cifar10,
    "cifar100": make_cifar100,
    "stl10": make_stl10,
    "fashion-mnist": make_fashion_mnist,
}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torchvision accept small stand-ins, whose checksums are not the official ones."""
    for cls in (torchvision.datasets.CIFAR10, torchvision.datasets.STL10):
        monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MAKERS)
def test_torchvision_arrays(name: str, tmp_path: Path) -> None:
    train, train_labels, test, test_labels, classes = MAKERS[name](tmp_path / "data")
    images = load_images(
        DataConfig(name=name, validation_fraction=0.34), home=tmp_path
    )  # home/data is the default
    assert images.classes == classes
    assert_holds(everything(images), train, train_labels)
    assert_holds(images.test, test, test_labels)
    again = load_images(
        DataConfig(name=name, validation_fraction=0.34, root=str(tmp_path / "data")), home=tmp_path / "other"
    )
    assert again.fingerprint == images.fingerprint
    small = load_images(DataConfig(name=name, validation_fraction=0.34, image_size=10), home=tmp_path)
    assert small.test.images.shape == (len(test), 3, 10, 10)


@pytest.mark.usefixtures("unchecked")
def test_stl10s_unlabelled_images_are_pretrained_on(tmp_path: Path) -> None:
    make_stl10(tmp_path / "data")
    config = DataConfig(name="stl10", validation_fraction=0.34)
    images = load_images(config, home=tmp_path)
    assert images.counts == {"training": 30, "validation": 10, "test": 20, "unlabelled": 50}
    loose = images.pretraining.images[30:]
    assert sorted(map(bytes, loose.numpy())) == sorted(map(bytes, np.ascontiguousarray(loose_stl10())))
    assert torch.equal(images.pretraining.images[:30], images.train.images)
    without = load_images(config.model_copy(update={"unlabelled": False}), home=tmp_path)
    assert without.counts == images.counts | {"unlabelled": 0}
    assert torch.equal(without.train.images, images.train.images)
    assert without.fingerprint != images.fingerprint
    small = load_images(config.model_copy(update={"image_size": 12}), home=tmp_path)
    assert small.pretraining.images.shape == (80, 3, 12, 12)


def test_imagenette(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 3)):
        for wnid in ("n01440764", "n03028079"):
            folder = tmp_path / "imagenette2" / split / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(noise(1, 150 + index, 200, 3)[0]).save(folder / f"{index}.JPEG")
    images = load_images(
        DataConfig(name="imagenette", root=str(tmp_path), validation_fraction=0.25), home=tmp_path / "home"
    )
    assert images.classes == ("tench", "church")
    assert images.image_size == 128
    assert (len(images.train), len(images.validation), len(images.test)) == (6, 2, 6)


def test_fgvc_aircraft_loses_its_banner(tmp_path: Path) -> None:
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    (base / "images").mkdir(parents=True)
    (base / "manufacturers.txt").write_text("ATR\nDouglas Aircraft Company\n")
    for split, count in (("trainval", 8), ("test", 4)):
        lines = []
        for index in range(count):
            pixels = np.full((84, 64, 3), 50, dtype=np.uint8)
            pixels[-20:] = 255  # the banner; blocks of 8 rows blur JPEG's edge at row 64 not at all
            Image.fromarray(pixels).save(base / "images" / f"{split}{index}.jpg", quality=100)
            lines.append(f"{split}{index} {('ATR', 'Douglas Aircraft Company')[index % 2]}\n")
        (base / f"images_manufacturer_{split}.txt").write_text("".join(lines))
    config = DataConfig(name="fgvc-aircraft", root=str(tmp_path), validation_fraction=0.25, image_size=64)
    images = load_images(config, home=tmp_path / "home")
    assert images.classes == ("ATR", "Douglas Aircraft Company")
    assert (len(images.train), len(images.validation), len(images.test)) == (6, 2, 4)
    assert (images.test.images.int() - 50).abs().max() <= 2
    damaged = base / "images" / "test1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(DataError, match=r"data.root: 1 damaged images, first .*test1.jpg"):
        load_images(config, home=tmp_path / "home")


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_missing_data_are_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    base = TORCHVISION[name].base
    with pytest.raises(DataError, match=rf"data.root: no {base} folder .* set data.download = true"):
        load_images(DataConfig(name=name, root=str(tmp_path)), home=tmp_path)


def test_damaged_data_are_named_with_the_remedy(tmp_path: Path) -> None:
    make_cifar10(tmp_path)
    with pytest.raises(
        DataError, match=r"data.root: .*cifar-10-batches-py is incomplete or damaged .* - remove it and"
    ):
        load_images(DataConfig(name="cifar10", root=str(tmp_path)), home=tmp_path / "home")


@pytest.mark.usefixtures("unchecked")
def test_a_download_is_moved_into_place_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: torchvision.datasets.CIFAR10) -> None:
        (Path(self.root) / self.base_folder).mkdir()
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", broken)
    config = DataConfig(name="cifar10", root=str(tmp_path / "data"), download=True)
    with pytest.raises(WorldError, match=r"cifar10 could not be downloaded to .*\(no route to host\)"):
        load_images(config, home=tmp_path)
    assert not (tmp_path / "data" / "cifar-10-batches-py").exists()
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "download", lambda self: make_cifar10(Path(self.root)) and None
    )
    assert len(load_images(config, home=tmp_path).test) == 20
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", broken)
    assert len(load_images(config, home=tmp_path).test) == 20  # not fetched again
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        ".cifar-10-batches-py.lock",
        "cifar-10-batches-py",
    ]
