"""Splits, channel statistics and the digits against references."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from references import channel_statistics, fresh_generator
from sklearn.datasets import load_digits

from headsearch.config import DataConfig
from headsearch.core.images import ImageSet, Split, load_images
from headsearch.core.splits import stratified_order, validation_size


def image_set(images: torch.Tensor) -> ImageSet:
    train = Split(images, torch.zeros(len(images), dtype=torch.int64))
    other = Split(torch.zeros_like(images[:1]), torch.zeros(1, dtype=torch.int64))
    return ImageSet("test", ("a",), train, other, other, "")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> ImageSet:
    return load_images(DataConfig(), home=tmp_path_factory.mktemp("home"))


def test_zscore_is_the_training_images_pooled_mean_and_std():
    rng = fresh_generator()
    pixels = rng.integers(0, 256, size=(1500, 3, 7, 7), dtype=np.uint8) // np.array([[[[1]], [[2]], [[3]]]])
    mean, std = image_set(torch.from_numpy(pixels.astype(np.uint8))).normalization("zscore")
    want_mean, want_std = channel_statistics(pixels.astype(np.uint8))
    np.testing.assert_allclose(mean.numpy(), want_mean, rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), want_std, rtol=1e-6)


def test_zscore_holds_at_the_size_of_real_data_sets():
    """The sums of CIFAR-10's squared pixels times their count do not fit into 64 bits."""
    stripes = torch.zeros(3, 32, 32, dtype=torch.uint8)
    stripes[:, ::2] = 255
    mean, std = image_set(stripes.expand(30_000, 3, 32, 32)).normalization("zscore")
    np.testing.assert_allclose(mean.numpy(), 0.5, rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), 0.5, rtol=1e-6)


def test_zscore_of_the_digits(digits):
    mean, std = digits.normalization("zscore")
    want_mean, want_std = channel_statistics(digits.train.images.numpy())
    np.testing.assert_allclose(mean.numpy(), want_mean, rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), want_std, rtol=1e-6)


def test_no_normalization_is_the_identity(digits):
    mean, std = digits.normalization("none")
    assert (mean.tolist(), std.tolist()) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("fraction", [0.07, 0.1, 0.31, 0.5, 0.9])
def test_a_split_takes_its_share_of_every_class_once(fraction):
    rng = np.random.default_rng(int(fraction * 100))
    labels = rng.choice(4, size=997, p=[0.5, 0.3, 0.15, 0.05]).astype(np.int64)
    order = stratified_order(labels)
    assert sorted(order) == list(range(len(labels)))
    size = validation_size(labels[order], fraction, ("a", "b", "c", "d"))
    held, whole = Counter(labels[order[:size]].tolist()), Counter(labels.tolist())
    assert all(abs(held[c] - fraction * whole[c]) <= 0.5 + 1e-9 for c in whole)


def test_every_range_of_the_order_has_the_classes_in_proportion():
    labels = np.random.default_rng(5).choice(3, size=600, p=[0.6, 0.3, 0.1]).astype(np.int64)
    placed = labels[stratified_order(labels)]
    share = np.bincount(labels) / len(labels)
    prefix = np.concatenate([np.zeros((1, 3)), np.cumsum(np.eye(3)[placed], axis=0)])
    ideal = np.arange(len(labels) + 1)[:, None] * share
    # a prefix is off by rounding in each class, and by the others' rounding in its length
    assert np.abs(prefix - ideal).max(axis=0) == pytest.approx(0, abs=1 + 1.5)


def test_the_order_within_a_class_is_shuffled_and_repeatable():
    labels = np.zeros(500, dtype=np.int64)
    order = stratified_order(labels)
    assert (order == stratified_order(labels)).all()
    assert (order != stratified_order(labels, salt=1)).any()
    correlation = np.corrcoef(order, np.arange(500))[0, 1]
    assert abs(correlation) < 0.2  # 4.5 standard deviations


def test_the_digits_are_scikit_learns_each_once(digits):
    bunch = load_digits()
    want = Counter(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    got: Counter[tuple[bytes, int]] = Counter()
    for split in (digits.train, digits.validation, digits.test):
        assert (split.images == split.images[:, :1]).all(), "grey in three equal channels"
        got.update(zip((i[0].numpy().tobytes() for i in split.images), split.labels.tolist(), strict=True))
    assert got == want


def test_the_digits_splits_are_stratified(digits):
    whole = np.bincount(load_digits().target)
    test = np.bincount(digits.test.labels.numpy())
    validation = np.bincount(digits.validation.labels.numpy())
    assert np.abs(test - 0.2 * whole).max() <= 0.5 + 1e-9
    assert np.abs(validation - 0.1 * (whole - test)).max() <= 0.5 + 1e-9


def test_only_the_training_split_sees_a_limit(digits, tmp_path: Path):
    few = load_images(DataConfig(limit=101), home=tmp_path)
    assert len(few.train) == 101
    assert np.ptp(np.bincount(few.train.labels.numpy(), minlength=10)) == 1
    assert torch.equal(few.validation.images, digits.validation.images)
    assert torch.equal(few.test.images, digits.test.images)
    again = load_images(DataConfig(limit=101), home=tmp_path)
    assert torch.equal(again.train.images, few.train.images)
    whole = {image.numpy().tobytes() for image in digits.train.images}
    assert {image.numpy().tobytes() for image in few.train.images} <= whole
