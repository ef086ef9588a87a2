"""Folders of images: every format, damaged files, and layouts that are refused."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from headsearch.config import DataConfig
from headsearch.core.decoding import decode_file
from headsearch.core.folder import file_states
from headsearch.core.images import ImageSet, load_images
from headsearch.core.photos import squares
from headsearch.errors import DataError

SIZE = 16


def smooth(seed: int, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    """A colour gradient (H, W, 3), uint8, that survives JPEG nearly unchanged."""
    low, high = np.random.default_rng(seed).uniform(0, 255, (2, 3))
    ramp = np.linspace(0, 1, width)[None, :, None] * np.linspace(0.5, 1, height)[:, None, None]
    return np.rint(low + (high - low) * ramp).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, ten training and five test PNGs each."""
    for split, count in (("train", 10), ("test", 5)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(smooth(1000 * number + 100 * (split == "test") + index)).save(
                    folder / f"{index}.png"
                )
    return tmp_path / "data"


def load(root: Path, home: Path | None = None, **settings: object) -> ImageSet:
    config = DataConfig(name="folder", root=str(root), **{"validation_fraction": 0.2, **settings})
    return load_images(config, home=home or root.parent / "home")


def all_train(images: ImageSet) -> torch.Tensor:
    return torch.cat([images.train.images, images.validation.images])


def test_pixels_labels_and_splits(root: Path) -> None:
    images = load(root)
    assert (images.name, images.classes, images.skipped, images.image_size) == (
        "folder",
        ("cat", "dog"),
        (),
        SIZE,
    )
    assert (len(images.train), len(images.validation), len(images.test)) == (16, 4, 10)
    for split, offset, count in ((images.test, 100, 5), (images.train, 0, 10), (images.validation, 0, 10)):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        for image, label in zip(split.images, split.labels, strict=True):
            candidates = [smooth(1000 * int(label) + offset + index) for index in range(count)]
            assert any(np.array_equal(image.permute(1, 2, 0), pixels) for pixels in candidates)
    assert images.validation.labels.bincount().tolist() == [2, 2]
    both = all_train(images).flatten(1)
    assert len(both.unique(dim=0)) == 20


def odd_images(folder: Path) -> dict[str, np.ndarray]:
    """Files of every kind with the RGB pixels that each should give."""
    color = smooth(5)
    grey = color[..., 0]
    alpha = np.where(np.arange(SIZE) < SIZE // 2, 0, 255).astype(np.uint8)[None].repeat(SIZE, 0)
    on_white = np.where(alpha[..., None] > 0, color, 255).astype(np.uint8)
    grey3 = grey[..., None].repeat(3, 2)
    expected = {}

    def put(name: str, image: Image.Image, pixels: np.ndarray, **options: object) -> None:
        image.save(folder / name, **options)
        expected[name] = pixels

    put("a.jpg", Image.fromarray(color), color, quality=98, subsampling=0)
    put("b.JPEG", Image.fromarray(grey), grey3, quality=98)
    put("c.bmp", Image.fromarray(color), color)
    put("d.webp", Image.fromarray(color), color, lossless=True)
    put("e.tiff", Image.fromarray(color), color)
    palette = Image.fromarray(color).quantize(64)
    put("f.gif", palette, np.asarray(palette.convert("RGB")))
    put("g.png", palette, np.asarray(palette.convert("RGB")))
    put("h.png", Image.fromarray(np.dstack([color, alpha])), on_white)
    put("i.png", Image.fromarray(np.dstack([grey, alpha])), np.where(alpha[..., None] > 0, grey3, 255))
    put("j.png", Image.fromarray(grey.astype(np.uint16) * 257), grey3)
    put("k.tif", Image.fromarray(grey.astype(np.uint16) * 257), grey3)
    put("l.tif", Image.fromarray(grey.astype(np.int32) * 257), grey3)
    put("m.tif", Image.fromarray((grey / 255).astype(np.float32)), grey3)
    put("n.png", Image.fromarray(grey > 100), np.where(grey3 > 100, 255, 0))
    put("o.jpg", Image.fromarray(color).convert("CMYK"), color, quality=98)
    transparent = Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).convert("P")
    put("p.png", transparent, np.full((SIZE, SIZE, 3), 255), transparency=0)
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    put("q.jpg", Image.fromarray(color[::-1, ::-1]), color, quality=98, subsampling=0, exif=turned)
    return {name: np.asarray(pixels, dtype=np.uint8) for name, pixels in expected.items()}


def test_every_kind_of_image_decodes_to_its_colours(root: Path) -> None:
    folder = root / "train" / "cat"
    for name, pixels in odd_images(folder).items():
        decoded = decode_file(folder / name, SIZE).transpose(1, 2, 0)
        # JPEG (and CMYK's conversion) rounds; the others are exact
        tolerance = 6 if name.lower().endswith(("jpg", "jpeg")) else 0
        difference = np.abs(decoded.astype(int) - pixels).max()
        assert difference <= tolerance, (name, difference)
    assert len(all_train(load(root))) == 20 + 17


@pytest.mark.parametrize(("width", "height"), [(40, 40), (61, 40), (24, 53), (16, 17), (5, 9)])
def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path: Path, width: int, height: int) -> None:
    pixels = smooth(3, width, height)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ours = decode_file(tmp_path / "a.png", SIZE).astype(int)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    resized = tv.resize(image, [SIZE], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    theirs = tv.center_crop(resized, [SIZE, SIZE]).numpy().astype(int)
    # one pass instead of two: off by less than a source pixel where sides are odd
    assert np.abs(ours - theirs).max() <= 16
    assert np.abs(ours - theirs).mean() <= 4


def test_squeezed_an_image_keeps_its_edges_and_loses_its_proportions(tmp_path: Path) -> None:
    pixels = smooth(3, 61, 40)
    place = tmp_path / "photos"
    for split in ("train", "test"):
        for label in "ab":
            (place / split / label).mkdir(parents=True)
            for index in range(4):
                Image.fromarray(pixels).save(place / split / label / f"{index}.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    theirs = tv.resize(image, [SIZE, SIZE], antialias=True)
    squeezed = load(place, tmp_path, image_size=SIZE, resize="squeeze", validation_fraction=0.25)
    assert (squares(squeezed.test.images)[0].int() - theirs.int()).abs().max() <= 1
    cropped = load(place, tmp_path, image_size=SIZE, validation_fraction=0.25)
    assert squeezed.fingerprint != cropped.fingerprint


def test_large_photographs_are_decoded_in_part(tmp_path: Path) -> None:
    pixels = smooth(4, 640, 480)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    quick, whole = (decode_file(tmp_path / name, SIZE).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(quick - whole).max() <= 4


def test_size_comes_from_the_first_image_or_the_config(root: Path) -> None:
    Image.fromarray(smooth(1, 20, 31)).save(root / "train" / "cat" / "+.png")  # sorts before the digits
    assert load(root).image_size == 20
    assert load(root, image_size=12).image_size == 12


@pytest.mark.parametrize("side", [3, 1030])
def test_a_first_image_of_unusable_size_asks_for_one(root: Path, side: int) -> None:
    Image.fromarray(smooth(1, side, side)).save(root / "train" / "cat" / "+.png")
    with pytest.raises(DataError, match=rf"data.image_size: .*\+.png is {side} pixels .* from 4 to 1024"):
        load(root)
    assert load(root, image_size=8).image_size == 8


def test_links_are_followed_and_hidden_and_other_files_ignored(root: Path, tmp_path: Path) -> None:
    whole = load(root)
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"no image")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "deeper.png").mkdir()
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "README").write_text("no class")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(root / "train" / "dog", elsewhere)
    (root / "train" / "dog").symlink_to(elsewhere)
    shutil.move(root / "test" / "cat" / "0.png", tmp_path / "file.png")
    (root / "test" / "cat" / "0.png").symlink_to(tmp_path / "file.png")
    again = load(root)
    assert again.skipped == ()
    assert again.fingerprint == whole.fingerprint


def damage(root: Path) -> list[str]:
    """Four files that cannot be read, among twenty in train; in sorted order."""
    cat = root / "train" / "cat"
    (cat / "4.png").write_bytes(b"not an image at all")
    (cat / "5.png").write_bytes((cat / "5.png").read_bytes()[:60])
    (cat / "6.png").write_bytes(b"")
    (cat / "7.png").unlink()
    (cat / "7.png").symlink_to("nowhere")
    return [f"train/cat/{number}.png" for number in (4, 5, 6, 7)]


def test_unreadable_files_are_left_out_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = damage(root)
    Image.fromarray(smooth(1)).save(root / "train" / "dog" / "x.jpg")
    file = root / "train" / "dog" / "x.jpg"
    file.write_bytes(file.read_bytes()[:-20])  # a truncated JPEG still has its header
    with caplog.at_level(logging.WARNING):
        images = load(root, max_unreadable_fraction=0.2)
    assert images.skipped == (*names, "train/dog/x.jpg")
    for name in images.skipped:
        assert any(str(root / name) in message for message in caplog.messages)
    left = [smooth(number) for number in (0, 1, 2, 3, 8, 9, *range(1000, 1010))]
    found = sorted(map(bytes, all_train(images).numpy()))
    assert found == sorted(pixels.transpose(2, 0, 1).tobytes() for pixels in left)
    assert torch.cat([images.train.labels, images.validation.labels]).bincount().tolist() == [6, 10]


def test_too_many_unreadable_files_are_refused_whether_cached_or_not(root: Path) -> None:
    damage(root)
    wanted = r"data.max_unreadable_fraction: 4 of 30 images .* more than {}: train/cat/4.png, .* and 1 more"
    with pytest.raises(DataError, match=wanted.format("0.01")):
        load(root)
    assert len(load(root, max_unreadable_fraction=0.5).skipped) == 4
    with pytest.raises(DataError, match=wanted.format("0.1")):
        load(root, max_unreadable_fraction=0.1)


def test_a_mended_file_is_read_again(root: Path) -> None:
    damage(root)
    broken = load(root, max_unreadable_fraction=0.5)
    shutil.copy(root / "train" / "cat" / "0.png", root / "train" / "nowhere")
    (root / "train" / "cat" / "7.png").unlink()
    (root / "train" / "cat" / "7.png").symlink_to("../nowhere")
    mended = load(root, max_unreadable_fraction=0.5)
    assert len(broken.skipped) == 4
    assert len(mended.skipped) == 3
    assert mended.fingerprint != broken.fingerprint


def test_permission_is_part_of_a_files_state(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing it alters neither size nor time, yet a file that was left out must be read again."""
    before = file_states(root, ["train/cat/0.png"])
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert file_states(root, ["train/cat/0.png"]) != before


def test_a_class_without_a_readable_image_is_refused(root: Path) -> None:
    for file in (root / "test" / "dog").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"data.root: no image in .*/test/dog can be read"):
        load(root, max_unreadable_fraction=1.0)


def test_layouts_that_are_refused(root: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            load(root)

    shutil.rmtree(root / "test" / "dog")
    refused(r"data.root: train and test under .* only one of them has dog")
    (root / "test" / "dog").mkdir()
    refused(r"data.root: .*/test/dog holds no image")
    shutil.rmtree(root / "test")
    refused(r"data.root: .*/test is missing")
    shutil.copytree(root / "train", root / "test")
    shutil.rmtree(root / "train" / "dog")
    refused(r"data.root: .*/train has 1 class folders; at least 2")
    shutil.rmtree(root / "train")
    refused(r"data.root: .*/train is missing")
    with pytest.raises(DataError, match=r"data.root: .* is not a folder"):
        load(tmp_path / "nothing")


def test_a_relative_root_is_under_headsearch_data_or_the_working_directory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(name="folder", root="data", validation_fraction=0.2)
    monkeypatch.delenv("HEADSEARCH_DATA", raising=False)
    monkeypatch.chdir(root.parent)
    here = load_images(config, home=tmp_path / "home")
    monkeypatch.chdir("/")
    with pytest.raises(DataError, match=r"data.root: /data is not a folder"):
        load_images(config, home=tmp_path / "home")
    monkeypatch.setenv("HEADSEARCH_DATA", str(root.parent))
    assert load_images(config, home=tmp_path / "home").fingerprint == here.fingerprint


def test_the_fingerprint_is_of_the_content(root: Path, tmp_path: Path) -> None:
    first = load(root)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert load(copy).fingerprint == first.fingerprint
    assert load(root, validation_fraction=0.3).fingerprint != first.fingerprint
    assert load(root, limit=8).fingerprint != first.fingerprint
    assert load(root, limit=16).fingerprint == first.fingerprint
    assert load(root, normalization="zscore").fingerprint == first.fingerprint
    file = copy / "train" / "cat" / "0.png"
    state = file.stat()
    Image.fromarray(smooth(77)).save(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert load(copy).fingerprint != first.fingerprint


def test_warnings_of_pil_stay_inside(root: Path) -> None:
    file = root / "train" / "cat" / "x.jpg"
    # an Exif block that promises five entries and has none
    Image.fromarray(smooth(2)).save(file, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05")
    with pytest.warns(UserWarning, match="EXIF"), Image.open(file) as image:
        image.getexif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(root).skipped == ()
