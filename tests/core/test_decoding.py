"""How files are opened and shared among threads; what is decoded is the same."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import load, pixels, two_classes
from PIL import Image

from headsearch.core import decoding
from headsearch.core.decoding import decode_splits
from headsearch.core.photos import PhotoArray, Photos


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is opened by PIL."""
    found: Counter[str] = Counter()
    plain = Image.open

    def counting(path: Path, *args: Any) -> Image.Image:
        found[f"{path.parent.name}/{path.name}"] += 1
        return plain(path, *args)

    monkeypatch.setattr(Image, "open", counting)
    return found


def noise_files(folder: Path, count: int, side: int = 8) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{index:03}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(pixels(index, side)).save(path)
    return paths


def test_squares_are_opened_once_but_for_the_first(tmp_path: Path, opened: Counter[str]) -> None:
    paths = noise_files(tmp_path / "a", 50)
    read, _ = decode_splits({tmp_path / "raw.npy": paths}, 8, stored_side=64)
    assert opened == {f"a/{path.name}": 1 for path in paths} | {"a/000.png": 2}
    expected = np.stack([pixels(index).transpose(2, 0, 1) for index in range(50)])
    images = read[tmp_path / "raw.npy"].images
    assert isinstance(images, np.ndarray)
    assert np.array_equal(images, expected)


@pytest.mark.parametrize("odd", [0, 20, 49])
def test_one_file_of_another_size_makes_photos_wherever_it_stands(tmp_path: Path, odd: int) -> None:
    paths = noise_files(tmp_path / "a", 50)
    Image.fromarray(pixels(odd, 10)[:, :9]).save(paths[odd])
    read, _ = decode_splits({tmp_path / "raw.npy": paths}, 8, stored_side=64)
    images = read[tmp_path / "raw.npy"].images
    assert isinstance(images, PhotoArray)
    assert images.shapes[odd].tolist() == [10, 9, 10, 9]
    assert images.shapes[odd - 1].tolist() == [8, 8, 8, 8]
    for index, found in enumerate(images.chunks()):
        with Image.open(paths[index]) as image:
            assert np.array_equal(found, np.asarray(image).transpose(2, 0, 1).ravel())


def test_a_damaged_file_of_another_size_is_left_out_and_the_rest_stay_squares(tmp_path: Path) -> None:
    """A PNG of another size whose end is missing was never decoded: it does not change the others."""
    paths = noise_files(tmp_path / "a", 10)
    Image.fromarray(pixels(4, 64)).save(paths[4])
    paths[4].write_bytes(paths[4].read_bytes()[:-100])
    read, _ = decode_splits({tmp_path / "raw.npy": paths}, 8, stored_side=64)
    found = read[tmp_path / "raw.npy"]
    assert isinstance(found.images, np.ndarray)
    assert list(found.failures) == [4]
    assert not found.images[4].any()


def test_a_photo_that_lies_on_its_side_is_no_square(tmp_path: Path) -> None:
    paths = noise_files(tmp_path / "a", 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels(9)).save(paths[1], exif=turned)
    read, _ = decode_splits({tmp_path / "raw.npy": paths}, 8, stored_side=64)
    images = read[tmp_path / "raw.npy"].images
    assert isinstance(images, np.ndarray)
    assert np.array_equal(images[1], np.rot90(pixels(9), -1).transpose(2, 0, 1))


@pytest.mark.parametrize(("size", "cores", "threads"), [(900, 16, 1), (20_000, 16, 3), (110_000, 2, 2)])
def test_small_files_are_decoded_by_few_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, cores: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    paths = [tmp_path / f"{index}.jpg" for index in range(600)]
    for path in paths[1:]:
        path.write_bytes(b"\0" * size)
    assert decoding._threads(paths) == threads  # the first is missing
    assert decoding._threads(paths[:1]) == decoding._threads([]) == 1


def test_any_number_of_threads_decodes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "data", train=40)
    found = set()
    for threads in (1, 5):
        monkeypatch.setattr(decoding, "_threads", lambda _, count=threads: count)
        found.add(load(root).fingerprint)
        (root / "train" / "cat" / "0.png").touch()  # decoded again
    assert len(found) == 1


def square_folder(root: Path, odd: int) -> Path:
    """30 noise images of 8 x 8 pixels, of which `odd` are made larger."""
    two_classes(root)
    for index in range(odd):
        Image.fromarray(pixels(index, 9)).save(root / "train" / "cat" / f"{index}.png")
    return root


def test_few_images_that_make_photos_of_all_are_counted_and_named(tmp_path: Path) -> None:
    root = square_folder(tmp_path / "data", 3)
    (root / "train" / "cat" / "2.png").write_bytes(b"damaged")
    images = load(root, image_size=8, max_unreadable_fraction=0.1)
    assert isinstance(images.train.images, Photos)
    line = (
        "2 of 29 images are not 8 x 8 pixels: train/cat/0.png, train/cat/1.png; because of them all are cropped as "
        "photos are, which takes longer"
    )
    assert line in images.notes
    assert line in load(root, image_size=8, max_unreadable_fraction=0.1).notes  # out of the cache


@pytest.mark.parametrize(("odd", "size"), [(0, 8), (4, 8), (0, 12)])
def test_squares_and_photos_are_not_remarked_upon(tmp_path: Path, odd: int, size: int) -> None:
    """Where many have another size, photos are what is meant."""
    images = load(square_folder(tmp_path / "data", odd), image_size=size)
    assert isinstance(images.train.images, Photos) == (odd > 0 or size != 8)
    assert not any("because of them" in line for line in images.notes)
