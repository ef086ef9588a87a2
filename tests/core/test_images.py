"""Loading the digits: splits, limits, normalisation, devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from headsearch.config import DataConfig
from headsearch.core.device import pick_device
from headsearch.core.images import ImageSet, Split, load_images
from headsearch.core.photos import squares
from headsearch.errors import InputError


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


def test_digits(tmp_path: Path) -> None:
    images = load_images(DataConfig(), home=tmp_path)
    assert images.classes == tuple("0123456789")
    assert images.train.images.shape[1:] == (3, 8, 8)
    assert len(images.train) + len(images.validation) + len(images.test) == 1797
    assert abs(len(images.test) - 1797 / 5) < 5
    bunch = load_digits()
    pixels = np.rint(bunch.images / 16 * 255).astype(np.uint8)[:, None].repeat(3, 1)
    both = everything(images)
    whole = Split(torch.cat([both.images, images.test.images]), torch.cat([both.labels, images.test.labels]))
    assert_holds(whole, pixels, bunch.target)
    for split in (images.train, images.validation, images.test):
        shares = split.labels.bincount() / len(split)
        assert (shares - torch.from_numpy(np.bincount(bunch.target) / 1797)).abs().max() < 0.01


@pytest.mark.parametrize(("resize_first", "most"), [(True, 12), (False, 18)])
def test_digits_at_another_size(tmp_path: Path, *, resize_first: bool, most: float) -> None:
    """Bicubic where they are resized first; else bilinear, which smooths more."""
    small, large = (
        load_images(DataConfig(image_size=size, resize_first=resize_first), home=tmp_path) for size in (8, 24)
    )
    assert large.train.images.shape[1:] == (3, 24, 24)
    assert torch.equal(small.train.labels, large.train.labels)
    shrunk = squares(large.train.images).float().view(-1, 3, 8, 3, 8, 3).mean((3, 5))
    assert (shrunk - squares(small.train.images)).abs().mean() < most


def test_splits_depend_on_the_data_config_alone(tmp_path: Path) -> None:
    first = load_images(DataConfig(), home=tmp_path / "a")
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    again = load_images(DataConfig(), home=tmp_path / "b")
    assert again.fingerprint == first.fingerprint
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.validation.labels, again.validation.labels)


def test_limits_thin_training_only_and_are_nested(tmp_path: Path) -> None:
    rows = {}
    for limit in (100, 200, None):
        images = load_images(DataConfig(limit=limit), home=tmp_path)
        rows[limit] = {bytes(image) for image in images.train.images.numpy()}
        assert len(images.train) == (limit or 1295)
        assert (len(images.validation), len(images.test)) == (143, 359)
        if limit:
            assert images.train.labels.bincount().tolist() == [limit // 10] * 10
    assert rows[100] < rows[200] < rows[None]


def test_zscore_is_pooled_over_the_training_images(tmp_path: Path) -> None:
    pixels = torch.randint(
        0, 256, (5000, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels[:, 1] //= 3
    pixels[:, 2] = 200
    other = Split(torch.zeros(2, 3, 6, 6, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    images = ImageSet("x", ("a", "b"), Split(pixels, torch.zeros(5000, dtype=torch.int64)), other, other, "f")
    mean, std = images.normalization("zscore")
    unit = pixels.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, unit.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std[:2], unit.std((0, 2, 3))[:2], rtol=1e-6)
    assert std[2] == 1  # a constant channel is not divided by zero
    mean, std = images.normalization("none")
    assert mean.tolist() == [0, 0, 0]
    assert std.tolist() == [1, 1, 1]


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0", "", "cuda1"):
        with pytest.raises(InputError, match=r"device: .* is none of auto, cpu, cuda"):
            pick_device(name)
    with pytest.raises(InputError, match=r"device: cuda:99 is not there; available: cpu"):
        pick_device("cuda:99")


def test_sets_move_to_a_device(tmp_path: Path) -> None:
    images = load_images(DataConfig(limit=20), home=tmp_path)
    moved = images.to(torch.device("meta"))
    assert {split.images.device.type for split in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert moved.train.labels.device.type == "meta"
    assert moved.fingerprint == images.fingerprint
