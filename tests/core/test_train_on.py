"""`data.train_on = "training+validation"`: who sees the validation images, and who never sees the test images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import (
    CPU,
    assert_same_weights,
    finish,
    start,
    tiny_config,
    tiny_images,
    weights,
    without_timings,
)
from pictures import fill, load, pixels, two_classes
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from headsearch.config import DataConfig, ProbeConfig, TrialConfig
from headsearch.core import epoch as epochs
from headsearch.core import probe_ouyang2025
from headsearch.core.autoencoder import autoencoder_key, train_autoencoder
from headsearch.core.feed import placed
from headsearch.core.identity import identities
from headsearch.core.images import ImageSet, Split, load_images
from headsearch.core.photos import Photos, squares
from headsearch.core.pretrain import Pretrained, check_steps
from headsearch.core.probe import evaluate
from headsearch.errors import SpecError
from headsearch.search.imagesets import image_key

BOTH = "training+validation"
PENALTIES = (1e-4, 1e-2, 1.0)


def joined(images: ImageSet) -> ImageSet:
    """The set as `load_images` gives it with the option."""
    parts = (images.validation, images.train)
    mixed = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    return replace(images, mixed=mixed, train_on=BOTH)


def both_config(**parts: Any) -> TrialConfig:
    return tiny_config(data={"train_on": BOTH}, **parts)


def sorted_rows(images: Tensor) -> Tensor:
    return torch.from_numpy(np.unique(images.flatten(1).numpy(), axis=0))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, ImageSet]:
    """With and without validation images among those that are trained on."""
    home = tmp_path_factory.mktemp("home")
    return load_images(DataConfig(), home=home), load_images(DataConfig(train_on=BOTH), home=home)


# --- which images -------------------------------------------------------------------------------------------


def test_splits_and_fingerprint_stay_and_training_images_are_both_splits(digits: Any) -> None:
    held_out, both = digits
    assert both.fingerprint == held_out.fingerprint
    assert both.counts == held_out.counts
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(both, name), getattr(held_out, name)
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert len(held_out.pretraining) == len(held_out.labelled) == len(held_out.train)
    assert len(both.pretraining) == len(both.labelled) == len(both.train) + len(both.validation)
    assert torch.equal(both.pretraining.images, torch.cat([both.validation.images, both.train.images]))
    assert torch.equal(both.labelled.labels, torch.cat([both.validation.labels, both.train.labels]))
    assert both.unlabelled == 0


def test_nothing_is_copied_and_a_device_gets_each_image_once(digits: Any) -> None:
    _, both = digits
    start = both.pretraining.images.data_ptr()
    size = both.validation.images.numel()
    assert (both.validation.images.data_ptr(), both.train.images.data_ptr()) == (start, start + size)
    moved = both.to(torch.device("meta"))
    assert (len(moved.train), len(moved.validation), len(moved.labelled)) == (
        len(both.train),
        len(both.validation),
        len(both.labelled),
    )
    assert moved.validation.images.untyped_storage() is not moved.test.images.untyped_storage()
    needed = 2 * (
        both.pretraining.images.nbytes + both.test.images.nbytes
    )  # half of what is free may be taken
    there = torch.device("meta")
    assert placed(both, there, free=needed).train.images.device.type == "meta"
    assert placed(both, there, free=needed - 1).train.images.device.type == "cpu"


@pytest.mark.parametrize("limit", [None, 6, 20])
def test_with_a_limit_the_training_split_is_thinned_and_validation_images_are_not(
    tmp_path: Path, limit: int | None
) -> None:
    root = fill(two_classes(tmp_path / "data"), {"unlabelled": 9}, seed=20)
    held_out, both = (load(root, limit=limit, train_on=which) for which in ("training", BOTH))
    assert both.counts == held_out.counts
    assert both.fingerprint == held_out.fingerprint
    count = 4 + len(held_out.train)
    assert both.pretraining.labels[:count].tolist() == [
        *held_out.validation.labels.tolist(),
        *held_out.train.labels.tolist(),
    ]
    assert both.pretraining.labels[count:].tolist() == [-1] * min(9, limit or 9)
    pictures = [split.images for split in (held_out.validation, held_out.pretraining)]
    assert torch.equal(both.pretraining.images, torch.cat(pictures))
    assert torch.equal(both.train.images, held_out.train.images)
    assert torch.equal(both.validation.images, held_out.validation.images)
    assert len(both.labelled) == count


@pytest.mark.parametrize("limit", [None, 6])
def test_photos_too(tmp_path: Path, limit: int | None) -> None:
    root = tmp_path / "data"
    for place, (folder, count) in enumerate({"train/a": 9, "train/b": 9, "test/a": 3, "test/b": 3}.items()):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            photo = Image.fromarray(pixels(100 * place + index, 40)).resize((30 + index, 20 + 2 * index))
            photo.save(root / folder / f"{index}.png")
    (root / "unlabelled").mkdir()
    for index in range(3):  # longer than any that has a label
        Image.fromarray(pixels(900 + index, 40)).resize((100, 90)).save(root / "unlabelled" / f"{index}.png")
    held_out, both = (load(root, limit=limit, image_size=16, train_on=which) for which in ("training", BOTH))
    assert isinstance(both.pretraining.images, Photos)
    expected = torch.cat([squares(part.images) for part in (held_out.validation, held_out.pretraining)])
    assert torch.equal(squares(both.pretraining.images), expected)
    assert torch.equal(squares(both.train.images), squares(held_out.train.images))
    assert torch.equal(squares(both.validation.images), squares(held_out.validation.images))
    assert both.unlabelled == 3
    whole = load(root, image_size=16).pretraining.images  # a range of the file: no rows are put together
    assert torch.equal(squares(both.pretraining.images)[-3:], squares(whole)[-3:])


def test_statistics_are_of_all_that_is_trained_on() -> None:
    plain = tiny_images()
    both = joined(plain)
    expected = both.pretraining.images.double().div(255)
    mean, std = both.normalization("zscore")
    torch.testing.assert_close(mean, expected.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, expected.transpose(0, 1).flatten(1).std(1, correction=0).float())
    # That paper's are of both splits in any case; no image counts twice.
    for ours, theirs in zip(
        both.normalization("zscore-schliebitz2024"), plain.normalization("zscore-schliebitz2024"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_configuration_without_the_option_is_named_as_before_there_was_one() -> None:
    plain, both = DataConfig(), DataConfig(train_on=BOTH)
    assert "train_on" not in plain.model_dump()
    assert "train_on" not in image_key(plain)
    assert "train_on" not in tiny_config().model_dump(mode="json")["data"]
    assert DataConfig.model_validate(both.model_dump()) == both
    assert DataConfig.model_validate_json(image_key(both)) == both
    assert image_key(plain) != image_key(both)
    images = tiny_images()
    assert not {*identities(tiny_config(), images)} & {*identities(both_config(), images)}
    assert "train_on" in DataConfig.model_json_schema()["properties"]


# --- the encoder --------------------------------------------------------------------------------------------


def trained(config: TrialConfig, images: ImageSet, home: Path) -> tuple[list[Any], Pretrained]:
    reports, pretrained = finish(start(config, images, home))
    return without_timings(reports), pretrained


def test_an_epoch_takes_steps_on_the_images_of_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = joined(tiny_images())
    seen: list[Tensor] = []
    given = epochs.batches

    def noted(*arguments: Any) -> Any:
        for pictures, labels in given(*arguments):
            seen.append(pictures.clone())
            yield pictures, labels

    monkeypatch.setattr(epochs, "batches", noted)
    config = both_config(training={"batch_size": 34, "epochs": 2})
    trained(config, images, tmp_path)
    assert [len(batch) for batch in seen] == [34] * 2 * 4  # (96 + 40) / 34
    for number in range(2):
        epoch = torch.cat(seen[4 * number : 4 * number + 4])
        assert torch.equal(sorted_rows(epoch), sorted_rows(images.pretraining.images))


def test_a_batch_may_be_as_large_as_both_splits() -> None:
    images = joined(tiny_images(train=20, validation=10))
    check_steps(both_config(training={"batch_size": 30}), images)
    with pytest.raises(SpecError, match="31 is more than the 30 training images"):
        check_steps(both_config(training={"batch_size": 31}), images)


def other(split: Split, seed: int = 3) -> Split:
    """Noise with other labels in its place."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, split.images.shape, generator=draw, dtype=torch.uint8)
    return Split(noise, (split.labels + 1) % 3)


@pytest.mark.parametrize("protocol", ["holdout", "ouyang2025"])
def test_test_images_change_the_test_accuracy_and_nothing_else(tmp_path: Path, protocol: str) -> None:
    images = joined(tiny_images())
    changed = replace(images, test=other(images.test))
    config = both_config(protocol=protocol, probe={"knn_train": "all", "offline_epochs": 2})
    (reports, first), (again, second) = (
        trained(config, of, tmp_path / str(number)) for number, of in enumerate((images, changed))
    )
    assert reports == again
    assert_same_weights(first, second)
    measured, remeasured = (
        evaluate(of, on, config, device=CPU) for of, on in ((first, images), (second, changed))
    )
    tests = [name for name in measured.details if "test" in name]
    assert measured.test_accuracy != remeasured.test_accuracy
    assert tests
    for found in (measured, remeasured):
        for name in tests:
            found.details.pop(name)
    assert replace(measured, test_accuracy=0.0) == replace(remeasured, test_accuracy=0.0)


def test_validation_images_change_the_encoder_only_where_they_are_trained_on(tmp_path: Path) -> None:
    plain = tiny_images()
    changed = replace(plain, validation=other(plain.validation))
    before, after = (trained(tiny_config(), of, tmp_path)[1] for of in (plain, changed))
    assert_same_weights(before, after)
    before, after = (trained(both_config(), joined(of), tmp_path)[1] for of in (plain, changed))
    ours, theirs = weights(before), weights(after)
    assert not torch.equal(ours["head.0.weight"], theirs["head.0.weight"])


def test_the_autoencoder_sees_them_and_has_a_cache_of_its_own() -> None:
    plain = tiny_images()
    config = tiny_config(head={"kind": "autoencoder", "embedding_dim": 4, "projection_dim": 4})
    keys = [autoencoder_key(config, of, 4, CPU) for of in (plain, joined(plain))]
    assert len(set(keys)) == 2
    few, many = (train_autoencoder(config.autoencoder, of, 4, 4, CPU)[1] for of in (plain, joined(plain)))
    assert few != many


# --- the probes ---------------------------------------------------------------------------------------------


def flat() -> Pretrained:
    """An encoder whose features are the pixels."""
    return Pretrained(nn.Flatten(), nn.Identity(), 192, 192, 0, 0, 0.0, 0.0, None, "fp32")


def raw(*splits: Split) -> np.ndarray:
    return np.concatenate([split.images.flatten(1).double().numpy() / 255 for split in splits])


def scikit(penalty: float, *splits: Split) -> Any:
    """A function that scores scikit-learn's probe, fitted on `splits` standardised by their own figures."""
    x, y = raw(*splits), np.concatenate([split.labels.numpy() for split in splits])
    mean, std = x.mean(axis=0), x.std(axis=0)
    std = np.where(std > 1e-12, std, 1.0)
    model = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=20_000).fit((x - mean) / std, y)
    return lambda split: model.score((raw(split) - mean) / std, split.labels.numpy())


def slow_knn(bank: np.ndarray, known: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> float:
    """One image after another: the three nearest by cosine vote with exp(similarity / 0.07)."""
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    right = 0
    for row, label in zip(rows, labels, strict=True):
        similarities = unit @ (row / np.linalg.norm(row))
        votes = np.zeros(10)
        for nearest in np.argsort(-similarities)[:3]:
            votes[known[nearest]] += np.exp((similarities[nearest] - 1) / 0.07)
        right += int(votes.argmax() == label)
    return right / len(rows)


def measured(images: ImageSet, **probe: Any) -> Any:
    config = TrialConfig(
        data=DataConfig(train_on=images.train_on),
        probe=ProbeConfig(**{"penalties": PENALTIES, "iterations": 300, **probe}),
    )
    return evaluate(flat(), images, config, device=CPU)


def test_the_probe_is_scikit_learns_fitted_on_both_splits_with_the_penalty_of_one(digits: Any) -> None:
    held_out, both = digits
    scores = {penalty: scikit(penalty, both.train)(both.validation) for penalty in PENALTIES}
    chosen = max(sorted(scores, reverse=True), key=lambda penalty: scores[penalty])
    found, before = measured(both), measured(held_out)
    assert (found.details["penalty"], found.probe_accuracy) == (chosen, scores[chosen])
    assert (before.details["penalty"], before.probe_accuracy) == (chosen, scores[chosen])
    assert found.test_accuracy == scikit(chosen, both.train, both.validation)(both.test)
    assert before.test_accuracy == scikit(chosen, both.train)(both.test) != found.test_accuracy
    assert found.train_images == len(both.train) + len(both.validation) == before.train_images + 143


def test_the_test_split_does_not_choose_the_penalty(digits: Any) -> None:
    """Test labels on which another penalty's probe is right everywhere choose nothing."""
    _, both = digits
    found = measured(both)
    shifted = replace(both, test=replace(both.test, labels=(both.test.labels + 1) % 10))
    again = measured(shifted)
    assert (again.details, again.probe_accuracy) == (found.details, found.probe_accuracy)
    assert again.test_accuracy < 0.2 < found.test_accuracy


def test_neighbours_of_test_images_are_all_that_was_trained_on(digits: Any) -> None:
    held_out, both = digits
    found = measured(both, penalties=(1e-2,), knn_train="all", knn_neighbours=3)
    before = measured(held_out, penalties=(1e-2,), knn_train="all", knn_neighbours=3)
    labels = [split.labels.numpy() for split in (both.train, both.validation, both.test)]
    train, validation, test = (raw(split) for split in (both.train, both.validation, both.test))
    bank = np.concatenate([train, validation]), np.concatenate(labels[:2])
    assert found.details["knn_test_accuracy"] == slow_knn(*bank, test, labels[2])
    # A validation image that is its own neighbour would be right nearly always.
    alone = slow_knn(train, labels[0], validation, labels[1])
    assert found.details["knn_validation_accuracy"] == alone < 1.0
    assert before.details["knn_test_accuracy"] == slow_knn(train, labels[0], test, labels[2])


def test_probes_of_layers_are_fitted_on_both_splits(tmp_path: Path) -> None:
    images = joined(tiny_images())
    config = both_config(probe={"layers": True, "penalties": [1e-2], "iterations": 200})
    _, pretrained = trained(config, images, tmp_path)
    found = evaluate(pretrained, images, config, device=CPU)
    nothing = nn.Sequential(pretrained.encoder, pretrained.head).eval()
    rows = [
        nothing(split.images.float() / 255).detach().double().numpy()
        for split in (images.train, images.validation, images.test)
    ]
    x, y = np.concatenate(rows[:2]), torch.cat([images.train.labels, images.validation.labels]).numpy()
    model = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-8, max_iter=20_000)
    model.fit((x - x.mean(0)) / x.std(0), y)
    score = model.score((rows[2] - x.mean(0)) / x.std(0), images.test.labels.numpy())
    assert found.details["layers"]["z"]["test"] == score


def test_both_probes_of_ouyang2025_learn_from_the_labels_of_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = both_config(protocol="ouyang2025", probe={"offline_epochs": 1, "offline_batch_size": 34})
    images = joined(tiny_images())
    _, pretrained = trained(config, images, tmp_path)
    seen: list[Tensor] = []
    given = probe_ouyang2025.batches

    def noted(*arguments: Any) -> Any:
        for pictures, labels in given(*arguments):
            seen.append(pictures.clone())
            yield pictures, labels

    monkeypatch.setattr(probe_ouyang2025, "batches", noted)
    found = evaluate(pretrained, images, config, device=CPU)
    assert torch.equal(sorted_rows(torch.cat(seen)), sorted_rows(images.labelled.images))
    assert found.train_images == 136
    # Other labels of the validation images make another online probe.
    labels = (images.validation.labels + 1) % 3
    relabelled = joined(replace(tiny_images(), validation=Split(images.validation.images, labels)))
    _, changed = trained(config, relabelled, tmp_path)
    assert_same_weights(pretrained, changed)
    assert not torch.equal(pretrained.online.weight, changed.online.weight)
