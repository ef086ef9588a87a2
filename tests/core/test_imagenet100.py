"""ImageNet-100: the list's 100 classes are taken out of a folder of ImageNet."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from pictures import load, pixels
from PIL import Image
from pydantic import ValidationError

from headsearch.config import DataConfig
from headsearch.core.imagenet100 import CLASSES
from headsearch.errors import DataError, InputError
from headsearch.search.imagesets import image_key

OTHERS = ("n01440764", "n01443537", "n15075141")
"""Classes of ImageNet that are not in the list."""


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """All of the list's classes and three others, under train/ and val/ as ImageNet has them."""
    root = tmp_path / "imagenet"
    image = tmp_path / "one.png"
    Image.fromarray(pixels(0)).save(image)
    for split, count in (("train", 3), ("val", 1)):
        for name in (*CLASSES, *OTHERS):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                (root / split / name / f"{index}.JPEG").symlink_to(image)
    return root


def test_the_list_has_100_ids_and_is_that_of_the_sources() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 100
    assert list(CLASSES) == sorted(CLASSES)
    assert all(re.fullmatch(r"n\d{8}", name) for name in CLASSES)
    # of the sorted lines of imagenet100.txt of HobbitLong/CMC
    digest = hashlib.sha256("\n".join(CLASSES).encode()).hexdigest()
    assert digest == "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746"


@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_the_100_are_taken_out_of_imagenet(imagenet: Path, test_folder: str) -> None:
    (imagenet / "val").rename(imagenet / test_folder)
    images = load(imagenet, classes="imagenet-100", validation_fraction=0.34)
    assert images.classes == CLASSES
    assert images.counts == {"training": 200, "validation": 100, "test": 100, "unlabelled": 0}
    lines = "\n".join(images.notes)
    assert f"400 images used (300 in train, 100 in {test_folder}), 0 unreadable, 6 ignored" in lines
    assert "ignored 6 folders of other classes than data.classes has: train/n01440764, " in lines


def test_all_classes_of_the_folder_are_used_unless_asked(imagenet: Path) -> None:
    with pytest.raises(DataError, match="test is missing"):
        load(imagenet, validation_fraction=0.34)
    (imagenet / "val").rename(imagenet / "test")
    assert len(load(imagenet, validation_fraction=0.34).classes) == 103


def test_where_test_is_there_val_is_not_used(imagenet: Path) -> None:
    shutil.copytree(imagenet / "val", imagenet / "test", symlinks=True)
    images = load(imagenet, classes="imagenet-100", validation_fraction=0.34)
    assert "ignored 1 beside train, test and unlabelled: val" in images.notes


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_classes_are_named(imagenet: Path, split: str) -> None:
    for name in CLASSES[:2]:
        shutil.rmtree(imagenet / split / name)
    with pytest.raises(DataError) as error:
        load(imagenet, classes="imagenet-100")
    folder = imagenet / split
    assert str(error.value) == (
        f"data.classes: {folder} lacks 2 of the 100 classes: {CLASSES[0]}, {CLASSES[1]}"
    )
    assert isinstance(error.value, InputError)  # exit code 2


def test_an_unreadable_image_of_val_is_counted_as_such(imagenet: Path) -> None:
    broken = imagenet / "val" / CLASSES[0] / "1.JPEG"
    broken.write_bytes(b"broken")
    images = load(imagenet, classes="imagenet-100", validation_fraction=0.34)
    assert images.skipped == (f"val/{CLASSES[0]}/1.JPEG",)
    assert "400 images used (300 in train, 100 in val), 1 unreadable" in images.notes[0]
    (imagenet / "val" / CLASSES[0] / "0.JPEG").unlink()
    with pytest.raises(DataError, match=rf"no image in .*/val/{CLASSES[0]} can be read"):
        load(imagenet, classes="imagenet-100", validation_fraction=0.34)


def test_it_is_of_folders_only() -> None:
    with pytest.raises(ValidationError, match=r"data\.classes: 'imagenet-100' is for data\.name = 'folder'"):
        DataConfig(name="cifar10", classes="imagenet-100")


def test_studies_from_before_keep_the_names_of_their_images() -> None:
    assert "classes" not in image_key(DataConfig(name="folder", root="a"))
    assert "imagenet-100" in image_key(DataConfig(name="folder", root="a", classes="imagenet-100"))
