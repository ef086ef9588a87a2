"""What a folder of images says of itself: everything found is used, or ignored with a reason."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import fill, load, pixels, two_classes
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from headsearch.core.folder import EXTENSIONS, list_folder
from headsearch.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_classes(tmp_path / "data")


def said(root: Path) -> str:
    return "\n".join(load(root, max_unreadable_fraction=0.5).notes)


def test_everything_that_torchvision_takes_is_taken(root: Path) -> None:
    assert set(IMG_EXTENSIONS) <= EXTENSIONS
    for number, extension in enumerate(IMG_EXTENSIONS):
        folder = root / "train" / "dog" / "deep" / str(number)
        folder.mkdir(parents=True)
        image = Image.fromarray(pixels(number))
        (image.convert("L") if extension == ".pgm" else image).save(folder / f"x{extension.upper()}")
    (root / "train" / "cat" / "more.png").mkdir()  # a folder, whatever its name
    Image.fromarray(pixels(1)).save(root / "train" / "cat" / "more.png" / "inside.JFIF", format="JPEG")
    theirs = ImageFolder(root / "train")
    ours = list_folder(root)
    names = {(os.path.relpath(path, root), label) for path, label in theirs.samples}
    assert names | {("train/cat/more.png/inside.JFIF", 0)} == set(ours.train)
    images = load(root)
    assert images.skipped == ()
    assert images.counts == {"training": 24, "validation": 6, "test": 10, "unlabelled": 0}
    assert "40 images used (30 in train, 10 in test), 0 unreadable, 0 ignored" in images.notes[0]


def test_what_is_ignored_is_counted_with_its_reason(root: Path) -> None:
    cat = root / "train" / "cat"
    for index in range(5):
        (cat / f"{index}.txt").write_text("no image")
    (cat / ".DS_Store").write_text("hidden")
    (cat / "noext").write_text("no image")
    (root / "train" / "stray.png").write_bytes((cat / "0.png").read_bytes())
    (root / "valid").mkdir()
    (root / "README.md").write_text("about")
    os.mkfifo(cat / "pipe.png")  # to open it would wait for ever
    lines = said(root)
    assert "41 entries found; 30 images used" in lines
    assert "11 ignored" in lines
    for reason in (
        "ignored 5 not named like an image (.txt): train/cat/0.txt, train/cat/1.txt, train/cat/2.txt and 2 more",
        "ignored 1 hidden: train/cat/.DS_Store",
        "ignored 1 not named like an image (no extension): train/cat/noext",
        "ignored 1 not in a class folder: train/stray.png",
        "ignored 2 beside train, test and unlabelled: README.md, valid",
        "ignored 1 that are no regular files: train/cat/pipe.png",
    ):
        assert reason in lines


def test_links_that_lead_nowhere_or_in_circles_are_named(root: Path) -> None:
    dog = root / "train" / "dog"
    (root / "train" / "fox").symlink_to("gone")
    (dog / "notes").symlink_to("gone")
    (dog / "circle").symlink_to("..")
    (dog / "itself").symlink_to("itself")
    (dog / "0.png").unlink()
    (dog / "0.png").symlink_to("gone.png")
    images = load(root, max_unreadable_fraction=0.5)
    lines = "\n".join(images.notes)
    assert "ignored 3 links that lead nowhere: train/dog/itself, train/dog/notes, train/fox" in lines
    assert "ignored 1 links to a folder above them: train/dog/circle" in lines
    assert images.skipped == ("train/dog/0.png",)


def test_a_folder_that_two_links_lead_to_is_taken_twice_as_torchvision_does(
    root: Path, tmp_path: Path
) -> None:
    fill(tmp_path, {"more": 3})
    for name in ("one", "two"):
        (root / "train" / "dog" / name).symlink_to(tmp_path / "more")
    assert len(list_folder(root).train) == len(ImageFolder(root / "train").samples) == 26


def test_class_names_that_look_equal_are_one_class(root: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (root / "train" / "dog").rename(root / "train" / composed)
    (root / "test" / "dog").rename(root / "test" / decomposed)
    listing = list_folder(root)
    assert listing.classes == (composed, "cat")
    fill(root, {f"train/{decomposed}": 4}, seed=9)
    merged = load(root)
    assert len(merged.classes) == 2
    assert merged.train.labels.bincount().sum() + len(merged.validation) == 24
    assert "look the same: they are one class" in "\n".join(merged.notes)


def test_a_flat_folder_has_the_fingerprint_that_it_always_had(root: Path) -> None:
    """Studies of earlier versions go on: what they recorded is still the name of these pixels."""
    gradient = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        Image.fromarray(gradient + np.uint8(number)).save(file)
    assert load(root).fingerprint == "d81dfe0d17af397ce42bcfff47f09327"


@pytest.mark.parametrize("kind", ["png", "jpg", "missing"])
def test_an_unreadable_file_deep_down_is_named(root: Path, kind: str) -> None:
    deep = root / "test" / "dog" / "a" / "b"
    deep.mkdir(parents=True)
    if kind == "missing":
        (deep / "x.png").symlink_to("/nowhere/x.png")
        name = "x.png"
    else:
        name = f"x.{kind}"
        Image.fromarray(pixels(3, 64)).save(deep / name)
        (deep / name).write_bytes((deep / name).read_bytes()[:-50])
    assert load(root, max_unreadable_fraction=0.5).skipped == (f"test/dog/a/b/{name}",)
    with pytest.raises(DataError, match=rf"1 of 31 images are unreadable.*test/dog/a/b/{name}"):
        load(root, max_unreadable_fraction=0.0)


def test_a_class_whose_images_are_all_deeper_is_one_and_an_empty_one_is_refused(root: Path) -> None:
    (root / "train" / "dog").rename(root / "train" / "x")
    (root / "train" / "dog" / "deeper").mkdir(parents=True)
    shutil.move(root / "train" / "x", root / "train" / "dog" / "deeper" / "x")
    assert load(root).counts["training"] == 16
    shutil.rmtree(root / "train" / "dog" / "deeper" / "x")
    with pytest.raises(DataError, match="train/dog holds no image"):
        load(root)
