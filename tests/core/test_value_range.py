"""Files wider than 8 bits: their value range is the data set's own, and what looks wrong is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import load, pixels, png16, two_classes
from PIL import Image

from headsearch.core.decoding import decode_file
from headsearch.core.images import ImageSet
from headsearch.core.value_range import doubts, full_range


def replaced(root: Path, write: Callable[[Path, np.ndarray], None], suffix: str) -> ImageSet:
    """The folder with each image written by `write` in place of its PNG, loaded."""
    for file in sorted(root.rglob("*.png")):
        with Image.open(file) as image:
            values = np.asarray(image)
        file.unlink()
        write(file.with_suffix(suffix), values)
    return load(root)


def notes(images: ImageSet) -> str:
    return "\n".join(images.notes)


def sixteen_bits(scale: float) -> Callable[[Path, np.ndarray], None]:
    return lambda path, values: Image.fromarray(np.rint(values[..., 0] * scale).astype(np.uint16)).save(path)


@pytest.mark.parametrize(
    ("bits", "suffix"), [(8, ".png"), (10, ".tif"), (12, ".png"), (14, ".tiff"), (16, ".png")]
)
def test_integers_of_any_width_in_16_bit_files_give_the_8_bit_image(
    tmp_path: Path, bits: int, suffix: str
) -> None:
    plain = two_classes(tmp_path / "plain")
    for file in plain.rglob("*.png"):
        with Image.open(file) as image:
            grey = np.asarray(image)[..., 0]
        Image.fromarray(grey).save(file)
    top = 2**bits - 1
    found = replaced(two_classes(tmp_path / "data"), sixteen_bits(top / 255), suffix)
    expected = load(plain)
    difference = (found.train.images.int() - expected.train.images.int()).abs()
    assert int(difference.max()) == 0
    assert f"0 is read as black, {top} as white" in notes(found)
    assert "30 files of integers wider than 8 bits" in notes(found)


@pytest.mark.parametrize(("channels", "bits"), [(3, 12), (3, 16), (4, 12), (3, 8)])
def test_colour_of_16_bits_keeps_all_of_them(tmp_path: Path, channels: int, bits: int) -> None:
    """PIL reads the upper byte only: 12 bits would be nearly black."""

    def write(path: Path, values: np.ndarray) -> None:
        deep = np.rint(values * ((2**bits - 1) / 255)).astype(np.uint16)
        opaque = np.full((*deep.shape[:2], channels - 3), 65535, dtype=np.uint16)
        png16(path, np.concatenate([deep, opaque], axis=2))

    expected = load(two_classes(tmp_path / "plain"))
    found = replaced(two_classes(tmp_path / "data"), write, ".png")
    assert int((found.train.images.int() - expected.train.images.int()).abs().max()) == 0


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_grey_and_alpha_of_16_bits_keep_all_of_them(tmp_path: Path, bits: int) -> None:
    """PIL reads the upper byte of these, too; a transparent pixel is white."""
    top = 2**bits - 1

    def write(path: Path, values: np.ndarray) -> None:
        deep = np.rint(values[..., :1] * (top / 255)).astype(np.uint16)
        alpha = np.full_like(deep, 65535)
        alpha[0, :3] = 0
        png16(path, np.concatenate([deep, alpha], axis=2))

    plain = two_classes(tmp_path / "plain")
    for file in plain.rglob("*.png"):
        with Image.open(file) as image:
            grey = np.asarray(image)[..., 0].copy()
        grey[0, :3] = 255
        Image.fromarray(grey).save(file)
    found = replaced(two_classes(tmp_path / "data"), write, ".png")
    assert torch.equal(found.train.images, load(plain).train.images)
    assert f"30 files of integers wider than 8 bits hold 0 to {top}; 0 is read as black" in notes(found)


@pytest.mark.parametrize(
    ("scale", "offset", "black", "white"),
    [
        (1 / 255, 0.0, "0", "1"),
        (1.0, 0.0, "0", "255"),
        (2 / 255, -1.0, "-1", "1"),
        (3.0, -300.0, "-300", "465"),
    ],
)
def test_floats_of_any_range(tmp_path: Path, scale: float, offset: float, black: str, white: str) -> None:
    root = two_classes(tmp_path / "data")
    first = root / "train" / "cat" / "0.png"
    Image.fromarray(np.dstack([np.arange(64, dtype=np.uint8).reshape(8, 8) * 4] * 3)).save(first)
    corners = np.asarray(Image.open(first)).copy()
    corners[0, 0], corners[7, 7] = 0, 255
    Image.fromarray(corners).save(first)

    def write(path: Path, values: np.ndarray) -> None:
        Image.fromarray((values[..., 0] * scale + offset).astype(np.float32)).save(path)

    found = replaced(root, write, ".tif")
    assert f"{black} is read as black, {white} as white" in notes(found)
    decoded = decode_file(root / "train" / "cat" / "0.tif", 8).astype(int)
    assert np.abs(decoded[0] - corners[..., 0]).max() <= 1


def test_the_range_is_that_of_all_files_not_of_each(tmp_path: Path) -> None:
    """Each on its own range, two classes that differ in brightness alone would look the same."""
    root = tmp_path / "data"
    for split, count in (("train", 10), ("test", 5)):
        for name, level in (("dark", 300), ("bright", 3000)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.full((8, 8), level + index, np.uint16)).save(
                    root / split / name / f"{index}.png"
                )
    images = load(root)
    means = [images.train.images[images.train.labels == label].float().mean() for label in (0, 1)]
    assert images.classes == ("bright", "dark")
    assert abs(float(means[0]) - 3004.5 / 4095 * 255) < 1
    assert abs(float(means[1]) - 304.5 / 4095 * 255) < 1


def test_values_that_are_no_numbers_are_black_and_do_not_set_the_range(tmp_path: Path) -> None:
    values = np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    decoded = decode_file(tmp_path / "a.tif", 8)[0]
    assert decoded[0, :3].tolist() == [0, 255, 0]
    assert decoded[7, 7] == 255
    assert len(np.unique(decoded)) > 60


def test_orientation_and_transparency_of_wide_files(tmp_path: Path) -> None:
    grey = (pixels(1)[..., 0].astype(np.uint16) * 257)[:, :, None]
    png16(tmp_path / "a.png", grey)
    turned = Image.open(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(tmp_path / "b.png", exif=exif)
    upright, upside_down = (decode_file(tmp_path / name, 8) for name in ("a.png", "b.png"))
    assert np.array_equal(upright, upside_down[:, ::-1, ::-1])
    clear = np.zeros((8, 8, 4), np.uint16)
    clear[..., :3] = 4095
    clear[4:, :, 3] = 65535
    clear[4:, :4, :3] = 0
    png16(tmp_path / "c.png", clear)
    decoded = decode_file(tmp_path / "c.png", 8)[0]
    assert decoded[0].tolist() == [255] * 8
    assert decoded[7].tolist() == [0] * 4 + [255] * 4


def test_ranges() -> None:
    assert full_range("integers", 0, 219) == (0, 255)
    assert full_range("integers", 3, 256) == (0, 1023)
    assert full_range("integers", 0, 1) == (0, 1)
    assert full_range("integers", -1024, 3071) == (-1024, 3071)
    assert full_range("integers", 0, 100_000) == (0, 100_000)
    assert full_range("floats", 0, 1) == (0, 1)
    assert full_range("floats", 0, 1.01) == (0, 255)
    assert full_range("floats", -0.5, 0.5) == (-1, 1)
    assert full_range("integers", 0, 0) == (0, 1)
    assert full_range("floats", -7, -7) == (-7, 0) or full_range("floats", -7, -7)[1] > -7


def test_doubtful_pixels_are_told() -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    assert doubts(whole) == []
    assert "use 4 of 256 levels" in doubts(whole // 64)[0]
    assert "nearly all pixels lie between 0 and 31" in doubts(whole // 8)[0]
    assert (
        "66% of the pixels are saturated (255)"
        in doubts(np.where(whole > 85, 255, whole).astype(np.uint8))[0]
    )
    black = np.where(whole > 250, whole, 0).astype(np.uint8)
    black[:, :, 0] = np.arange(8) * 30
    assert "pixels are black (0)" in doubts(np.where(whole > 240, whole, 0).astype(np.uint8))[-1]
    assert doubts(np.empty((0, 3, 8, 8), np.uint8)) == []


def test_8_bit_files_that_hold_few_values_are_doubted(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "data")
    found = replaced(root, lambda path, values: Image.fromarray(values // 32).save(path), ".png")
    assert "pixels use 8 of 256 levels; is that how these images should look?" in notes(found)
    assert notes(load(root)) == notes(found), "said again of what is in the cache"


@pytest.mark.parametrize("dark", ["rows", "whole images"])
def test_photos_are_doubted_for_all_of_their_pixels_not_for_the_first_rows(tmp_path: Path, dark: str) -> None:
    """A black sky over the first photo says nothing of the others."""
    root = two_classes(tmp_path / "data")
    for file in root.rglob("*.png"):
        values = pixels(1, 64)
        values[: 32 if dark == "rows" else 64] = 0
        Image.fromarray(values).save(file)
    said = notes(load(root, image_size=16))
    assert ("pixels are black (0)" in said) == (dark == "whole images")
    assert ("pixels use 1 of 256 levels" in said) == (dark == "whole images")
