"""Images that are stored as one array, at another size: views are torchvision's crops of the stored ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import loose_stl10, make_cifar10, make_stl10
from torch import Tensor
from torchvision.transforms import v2

from headsearch.config import DataConfig, ViewsConfig
from headsearch.core.images import ImageSet, load_images
from headsearch.core.photos import Photos, squares
from headsearch.core.views import Views
from headsearch.search.imagesets import image_key

CROPS = ViewsConfig(jitter_strength=0.0, grayscale_probability=0.0)
IDENTITY = torch.zeros(3), torch.ones(3)
IMPLEMENTATIONS = {"kernel": True, "whole batches": False}
SIZES = {"digits": (8, [5, 12]), "cifar10": (32, [16, 48]), "stl10": (96, [64, 128])}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torchvision accept small stand-ins, whose checksums are not the official ones."""
    monkeypatch.setattr("torchvision.datasets.STL10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def loaded(name: str, folder: Path, **settings: Any) -> ImageSet:
    if not (folder / "data").exists():
        {"stl10": make_stl10, "cifar10": make_cifar10}.get(name, Path.mkdir)(folder / "data")
    return load_images(DataConfig(name=name, validation_fraction=0.34, **settings), home=folder)


def both(name: str, folder: Path, size: int) -> tuple[Tensor, Photos]:
    """The images at their stored size, and at another: the same ones in the same order."""
    stored, made = loaded(name, folder).pretraining, loaded(name, folder, image_size=size).pretraining
    assert isinstance(stored.images, Tensor)
    assert isinstance(made.images, Photos)
    assert torch.equal(stored.labels, made.labels)
    return stored.images, made.images


def unit(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def views_of(size: int, implementation: str) -> Views:
    views = Views(CROPS, size, IDENTITY)
    views._fused = IMPLEMENTATIONS[implementation]
    return views


CASES = [(name, size) for name, (_, sizes) in SIZES.items() for size in sizes]


@pytest.mark.parametrize(("name", "size"), CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_are_crops_of_the_stored_images_resized_as_torchvision_does(
    tmp_path: Path, name: str, size: int, implementation: str
) -> None:
    stored, made = both(name, tmp_path, size)
    side, count = SIZES[name][0], 20
    views = views_of(size, implementation)
    draws = views.draw(2 * count, torch.Generator().manual_seed(0), photos=made[:count])
    ours = views.apply(made[:count], draws)
    assert ours.shape == (2 * count, 3, size, size)
    assert (draws.box == draws.box.round()).all()
    assert float((draws.box[:, :2] + draws.box[:, 2:]).max()) <= side
    for row in range(2 * count):
        number = int(draws.view[row])
        left, top, width, height = map(int, draws.box[row])
        original = pil(stored[number % count])
        theirs = v2.functional.resized_crop(original, top, left, height, width, [size, size])
        theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.flip[row] else theirs
        assert (ours[number] - unit(theirs)).abs().max() < 0.005


@pytest.mark.parametrize(("name", "size"), CASES)
def test_crops_are_drawn_as_by_torchvision_on_the_stored_images(tmp_path: Path, name: str, size: int) -> None:
    stored, made = both(name, tmp_path, size)
    draws = views_of(size, "kernel").draw(12_000, torch.Generator().manual_seed(0), photos=made)
    transform = v2.RandomResizedCrop(size, scale=(CROPS.crop_scale_min, 1.0))
    torch.manual_seed(0)
    original = pil(stored[0])
    theirs = [transform.make_params([original]) for _ in range(6000)]
    for place, key in ((2, "width"), (3, "height"), (0, "left"), (1, "top")):
        expected = torch.tensor([float(box[key]) for box in theirs])
        assert abs(float(draws.box[:, place].mean() / expected.mean()) - 1) < 0.05


@pytest.mark.parametrize(("name", "size"), CASES)
def test_plain_images_are_resized_as_torchvision_does(tmp_path: Path, name: str, size: int) -> None:
    stored, made = both(name, tmp_path, size)
    theirs = torch.stack([unit(v2.Resize(size)(pil(image))) for image in stored[:30]])
    for implementation in IMPLEMENTATIONS:
        difference = views_of(size, implementation).plain(made[:30]) - theirs
        assert difference.abs().max() < 0.005
    assert squares(made[:2]).shape == (2, 3, size, size)


def test_unlabelled_images_of_stl10_are_kept_whole_too(tmp_path: Path) -> None:
    images = loaded("stl10", tmp_path, image_size=64)
    assert images.counts == {"training": 30, "validation": 10, "test": 20, "unlabelled": 50}
    photos = images.pretraining.images[30:]
    assert isinstance(photos, Photos)
    side = 3 * 96 * 96
    found = sorted(bytes(photos.data[at : at + side].numpy()) for at in photos.offsets.tolist())
    assert found == sorted(map(bytes, np.ascontiguousarray(loose_stl10())))


def test_at_their_own_size_they_are_what_they_were_to_the_bit(tmp_path: Path) -> None:
    for size in (None, 8):
        for first in (True, False):
            images = loaded("digits", tmp_path, image_size=size, resize_first=first)
            assert isinstance(images.train.images, Tensor)
    images = load_images(DataConfig(image_size=8), home=tmp_path)
    assert images.fingerprint == "75b683cf752055b93239df210d27e28a"


def test_resized_first_they_are_what_editions_1_and_2_had_to_the_bit(tmp_path: Path) -> None:
    config = DataConfig(image_size=12, resize_first=True)
    images = load_images(config, home=tmp_path)
    assert images.fingerprint == "87d632b5cdbbc50ac6757fd0aeaff4b7"
    whole = load_images(DataConfig(image_size=12), home=tmp_path)
    assert whole.fingerprint != images.fingerprint
    assert "resize_first" not in image_key(config)
    assert image_key(config) != image_key(DataConfig(image_size=12))
    for size in (None, 8):
        assert "resize_first" not in image_key(DataConfig(image_size=size))


def test_two_sizes_of_one_set_are_told_apart(tmp_path: Path) -> None:
    found = {load_images(DataConfig(image_size=size), home=tmp_path).fingerprint for size in (5, 8, 12, 24)}
    assert len(found) == 4
