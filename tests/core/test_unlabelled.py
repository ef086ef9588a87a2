"""Images without labels: pretraining uses them, nothing that needs a label does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, finish, start, tiny_config, tiny_images
from pictures import fill, load, two_classes
from torch import Tensor
from torch.nn import functional as F

from headsearch.config import TrialConfig
from headsearch.core import epoch as epochs
from headsearch.core.autoencoder import train_autoencoder
from headsearch.core.feed import placed
from headsearch.core.images import ImageSet, Split
from headsearch.core.learner import build_learner
from headsearch.core.pretrain import check_steps
from headsearch.core.probe import evaluate
from headsearch.errors import DataError, SpecError


def with_unlabelled(images: ImageSet, count: int, seed: int = 1) -> ImageSet:
    """The set with noise images without labels."""
    shape = (count, *images.train.images.shape[1:])
    loose = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    mixed = Split(
        torch.cat([images.train.images, loose]), torch.cat([images.train.labels, torch.full((count,), -1)])
    )
    return replace(images, mixed=mixed, fingerprint=f"{images.fingerprint}-{count}-{seed}")


def test_a_folders_unlabelled_images_follow_the_training_images(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "data")
    alone = load(root)
    fill(root, {"unlabelled": 3, "unlabelled/a/b": 4, "unlabelled/c": 2}, seed=20)
    (root / "unlabelled" / "c" / "list.csv").write_text("")
    images = load(root)
    assert images.counts == {"training": 16, "validation": 4, "test": 10, "unlabelled": 9}
    assert torch.equal(images.train.images, alone.train.images)
    assert torch.equal(images.train.labels, alone.train.labels)
    assert torch.equal(images.validation.images, alone.validation.images)
    assert images.pretraining.labels.tolist() == [*images.train.labels.tolist(), *[-1] * 9]
    assert torch.equal(images.pretraining.images[:16], images.train.images)
    assert len(images.pretraining.images[16:].flatten(1).unique(dim=0)) == 9
    assert images.fingerprint != alone.fingerprint
    assert "9 in unlabelled" in images.notes[0]
    assert "train/" not in str(images.notes[1:])


def test_they_are_mapped_into_memory_and_shared_with_the_training_images(tmp_path: Path) -> None:
    root = fill(two_classes(tmp_path / "data"), {"unlabelled": 50}, seed=20)
    images = load(root)
    start, end = images.pretraining.images.data_ptr(), images.train.images.data_ptr()
    assert start == end
    assert "train.npy" in Path("/proc/self/maps").read_text()
    whole = placed(images, CPU, free=0)
    assert whole.train.images.data_ptr() == start
    moved = images.to(torch.device("meta"))
    assert len(moved.train) == 16
    assert moved.unlabelled == 50


def test_a_limit_keeps_as_many_of_each_at_most(tmp_path: Path) -> None:
    root = fill(two_classes(tmp_path / "data"), {"unlabelled": 30}, seed=20)
    few, whole = load(root, limit=6), load(root)
    assert few.counts == whole.counts | {"training": 6, "unlabelled": 6}
    assert torch.equal(few.pretraining.images[6:], whole.pretraining.images[16:22])
    assert torch.equal(few.train.images, few.pretraining.images[:6])
    wide = load(root, limit=20)
    assert wide.counts == whole.counts | {"unlabelled": 20}
    assert len({few.fingerprint, whole.fingerprint, wide.fingerprint}) == 3


def test_without_train_half_of_the_test_images_are_the_labelled_ones(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", {"test/cat": 20, "test/dog": 20, "unlabelled/x": 40})
    images = load(root)
    assert images.counts == {"training": 16, "validation": 4, "test": 20, "unlabelled": 40}
    assert images.test.labels.bincount().tolist() == [10, 10]
    labelled = torch.cat([split.images for split in (images.train, images.validation, images.test)])
    assert len(labelled.flatten(1).unique(dim=0)) == 40
    assert any("there is no train" in note for note in images.notes)
    assert load(root).fingerprint == images.fingerprint


def test_what_cannot_be_probed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.root: .*/test is missing"):
        load(fill(tmp_path / "a", {"unlabelled": 9}))
    with pytest.raises(DataError, match=r"class 'dog' in test has too few images to train on half"):
        load(fill(tmp_path / "b", {"unlabelled": 9, "test/cat": 9, "test/dog": 1}))
    root = two_classes(tmp_path / "c")
    (root / "unlabelled").mkdir()
    with pytest.raises(DataError, match="unlabelled holds no image"):
        load(root)
    with pytest.raises(DataError, match=r"data.root: .*/train is missing"):
        load(fill(tmp_path / "d", {"unlabelled": 9, "test/cat": 9, "test/dog": 9}), unlabelled=False)


def test_unreadable_ones_are_named_and_the_switch_leaves_them_alone(tmp_path: Path) -> None:
    root = fill(two_classes(tmp_path / "data"), {"unlabelled/deep": 5}, seed=20)
    (root / "unlabelled/deep/3.png").write_bytes(b"")
    (root / "unlabelled/deep/z.png").symlink_to("gone")
    images = load(root, max_unreadable_fraction=0.2)
    assert images.skipped == ("unlabelled/deep/3.png", "unlabelled/deep/z.png")
    assert images.unlabelled == 4
    plain = load(root, unlabelled=False)
    assert plain.unlabelled == 0
    assert plain.skipped == ()
    assert plain.pretraining is plain.train
    assert any("unlabelled is not used" in note for note in plain.notes)


def test_pretraining_takes_steps_on_all_images_and_probes_on_labelled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = with_unlabelled(tiny_images(), 64)
    config = tiny_config()
    seen: list[Tensor] = []
    made = epochs.Batch.__init__

    def noted(self: Any, learner: Any, precision: Any, pair: Tensor, labels: Tensor, *rest: Any) -> None:
        seen.append(labels.clone())
        made(self, learner, precision, pair, labels, *rest)

    monkeypatch.setattr(epochs.Batch, "__init__", noted)
    reports, pretrained = finish(start(config, images, tmp_path))
    per_epoch = (96 + 64) // 32
    assert len(seen) == per_epoch * config.training.epochs
    for number in range(config.training.epochs):
        labels = torch.cat(seen[per_epoch * number : per_epoch * (number + 1)])
        assert (labels == -1).sum() == 64
        assert (labels >= 0).sum() == 96
    measured = evaluate(pretrained, images, config, device=CPU)
    assert measured.train_images == 96
    assert all(0 <= report.probe_accuracy <= 1 for report in reports)


def test_the_online_probe_learns_from_labelled_images_only(tmp_path: Path) -> None:
    config = TrialConfig.model_validate(tiny_config(protocol="ouyang2025").model_dump())
    images = with_unlabelled(tiny_images(), 64)
    learner = build_learner(config, images, CPU, tmp_path)
    assert learner.partly_labelled
    features = torch.randn(8, learner.online.in_features)
    labels = torch.tensor([0, -1, 2, -1])
    batch = epochs.Batch(learner, "fp32", torch.zeros(8, 3, 8, 8), labels, 0, 1)
    loss = batch.online_loss(features)
    kept = [0, 2, 4, 6]
    expected = F.cross_entropy(learner.online(features[kept]), torch.tensor([0, 2, 0, 2]))
    torch.testing.assert_close(loss, expected)
    gradients = [
        torch.autograd.grad(one, learner.online.weight, retain_graph=True)[0] for one in (loss, expected)
    ]
    torch.testing.assert_close(*gradients)
    batch.labels = torch.full((4,), -1)
    assert float(batch.online_loss(features).detach()) == 0.0
    reports, _ = finish(start(config, images, tmp_path))
    assert reports[-1].probe_accuracy > 0.3


def test_a_set_without_unlabelled_images_trains_as_ever(tmp_path: Path) -> None:
    images = tiny_images()
    assert images.pretraining is images.train
    learner = build_learner(tiny_config(protocol="ouyang2025"), images, CPU, tmp_path)
    assert not learner.partly_labelled


def test_statistics_steps_and_the_autoencoder_count_all_images() -> None:
    images = with_unlabelled(tiny_images(train=20), 30)
    mean, _ = images.normalization("zscore")
    torch.testing.assert_close(mean, images.pretraining.images.float().mean((0, 2, 3)) / 255)
    check_steps(tiny_config(training={"batch_size": 50}), images)
    with pytest.raises(SpecError, match="51 is more than the 50 training images"):
        check_steps(tiny_config(training={"batch_size": 51}), images)
    config = tiny_config(head={"kind": "autoencoder", "embedding_dim": 4, "projection_dim": 4})
    few, many = (
        train_autoencoder(config.autoencoder, of, 4, 4, CPU)[1] for of in (tiny_images(train=20), images)
    )
    assert few != many
