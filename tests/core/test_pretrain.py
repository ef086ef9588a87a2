from __future__ import annotations

import logging
import math
import time
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

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

from headsearch.config import Activation, DataConfig, TrialConfig
from headsearch.core import objectives
from headsearch.core.autoencoder import pretrained_embedding
from headsearch.core.checkpoint import AsyncCheckpoints, CheckpointFolder
from headsearch.core.images import ImageSet, Split, load_images
from headsearch.core.pretrain import describe_head
from headsearch.core.probe import evaluate
from headsearch.core.reporting import subset
from headsearch.errors import SpecError, TrialFailure

OPTIMIZERS = ["sgd", "lars", "adamw"]
IMAGES = tiny_images()


def autoencoder_head(**fields: Any) -> dict[str, Any]:
    return {"kind": "autoencoder", "embedding_dim": 8, "projection_dim": 4} | fields


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_same_config_gives_the_same_reports_and_weights(
    tmp_path: Path, optimizer: str, precision: str
) -> None:
    config = tiny_config(
        optimizer={"name": optimizer, "learning_rate": 0.01}, training={"precision": precision}
    )
    (first, a), (second, b) = (finish(start(config, IMAGES, tmp_path)) for _ in range(2))
    assert without_timings(first) == without_timings(second)
    assert_same_weights(a, b)
    assert a.precision == precision
    assert [report.epoch for report in first] == [1, 2, 3]


def test_seed_changes_the_reports(tmp_path: Path) -> None:
    a, b = (finish(start(tiny_config(seed=seed), IMAGES, tmp_path))[0] for seed in (0, 1))
    assert all(x.loss != y.loss for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_interrupted_anywhere_and_resumed_is_as_if_it_had_not_been(
    tmp_path: Path, optimizer: str, interrupted: int
) -> None:
    config = tiny_config(
        optimizer={"name": optimizer, "learning_rate": 0.01, "warmup_epochs": 1.5},
        head=autoencoder_head(activation="tanh"),
    )
    expected, whole = finish(start(config, IMAGES, tmp_path))
    checkpoints = AsyncCheckpoints(CheckpointFolder(tmp_path / "checkpoints"))
    training = start(config, IMAGES, tmp_path, checkpoints)
    before = [next(training) for _ in range(interrupted)]
    training.close()
    after, resumed = finish(start(config, IMAGES, tmp_path, CheckpointFolder(tmp_path / "checkpoints")))
    assert after[:interrupted] == before
    assert without_timings(after) == without_timings(expected)
    assert_same_weights(resumed, whole)
    assert resumed.autoencoder == whole.autoencoder
    seconds = [report.train_seconds for report in after]
    assert seconds == sorted(seconds)
    assert resumed.train_seconds == seconds[-1]


def test_interrupted_at_every_epoch(tmp_path: Path) -> None:
    expected, whole = finish(start(tiny_config(), IMAGES, tmp_path))
    checkpoints = AsyncCheckpoints(CheckpointFolder(tmp_path / "checkpoints"))
    for done in range(1, 4):
        training = start(tiny_config(), IMAGES, tmp_path, checkpoints)
        reports = [next(training) for _ in range(done)]
        training.close()
        assert without_timings(reports) == without_timings(expected[:done])
    _, resumed = finish(start(tiny_config(), IMAGES, tmp_path, checkpoints))
    assert_same_weights(resumed, whole)


def test_damaged_checkpoint_costs_an_epoch_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = finish(start(tiny_config(), IMAGES, tmp_path))
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    training = start(tiny_config(), IMAGES, tmp_path, checkpoints)
    next(training)
    next(training)
    training.close()
    newest = max(checkpoints.path.iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed, _ = finish(start(tiny_config(), IMAGES, tmp_path, checkpoints))
    assert "damaged" in caplog.text
    assert without_timings(resumed) == without_timings(expected)


def test_checkpoint_is_there_before_its_report(tmp_path: Path) -> None:
    """Unless a thread writes it: then after a flush."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for report in start(tiny_config(), IMAGES, tmp_path, folder):
        state = folder.load()
        assert state is not None
        assert state["epoch"] == report.epoch == len(state["reports"])
    folder.remove()
    checkpoints = AsyncCheckpoints(folder)
    for report in start(tiny_config(), IMAGES, tmp_path, checkpoints):
        checkpoints.flush()
        state = folder.load()
        assert state is not None
        assert state["epoch"] == report.epoch == len(state["reports"])


def test_checkpoint_of_another_config_or_image_set_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for config, images in [
        (tiny_config(), IMAGES),
        (tiny_config(objective={"temperature": 0.4}), IMAGES),
        (tiny_config(objective={"temperature": 0.4}), tiny_images(train=120)),
    ]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            training = start(config, images, tmp_path, checkpoints)
            report = next(training)
            training.close()
        assert report.epoch == 1
        assert ("another config" in caplog.text) == (images is not IMAGES or config != tiny_config())


def test_a_checkpoint_of_other_images_waits_until_they_are_back(tmp_path: Path) -> None:
    """Another folder was mounted for a while: what had been trained before is not trained again."""
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    training = start(tiny_config(), IMAGES, tmp_path, checkpoints)
    first = [next(training), next(training)]
    training.close()
    training = start(tiny_config(), tiny_images(train=120), tmp_path, checkpoints)
    next(training)
    training.close()
    whole, _ = finish(start(tiny_config(), IMAGES, tmp_path, checkpoints))
    assert whole[:2] == first
    straight, _ = finish(start(tiny_config(), IMAGES, tmp_path))
    assert without_timings(whole) == without_timings(straight)


def test_suspended_training_is_not_disturbed_by_others(tmp_path: Path) -> None:
    configs = [tiny_config(seed=1), tiny_config(seed=2, training={"precision": "bf16"})]
    alone = [finish(start(config, IMAGES, tmp_path)) for config in configs]
    a, b = (start(config, IMAGES, tmp_path) for config in configs)
    first = [next(a), next(b), next(b)]
    torch.manual_seed(77)
    torch.rand(5)
    rest_a, trained_a = finish(a)
    rest_b, trained_b = finish(b)
    assert without_timings([first[0], *rest_a]) == without_timings(alone[0][0])
    assert without_timings([*first[1:], *rest_b]) == without_timings(alone[1][0])
    assert_same_weights(trained_a, alone[0][1])
    assert_same_weights(trained_b, alone[1][1])
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_time_spent_suspended_is_not_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def read() -> float:
        nonlocal clock
        clock += 1.0
        return clock

    monkeypatch.setattr(time, "perf_counter", read)
    training = start(tiny_config(), IMAGES, tmp_path)
    first = next(training)
    clock += 1000.0
    second = next(training)
    assert first.train_seconds < 10
    assert second.train_seconds - first.train_seconds < 10
    assert 0 < second.views_per_second <= 192


def test_global_generator_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    config = tiny_config(head=autoencoder_head())
    _, pretrained = finish(start(config, IMAGES, tmp_path))
    evaluate(pretrained, IMAGES, config, device=CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("first_layer", ["pretrained", "random"])
def test_frozen_layer_stays_to_the_bit_and_a_trainable_one_moves(
    tmp_path: Path, optimizer: str, frozen: bool, first_layer: str
) -> None:
    config = tiny_config(
        optimizer={"name": optimizer, "learning_rate": 0.1, "weight_decay": 0.1},
        head=autoencoder_head(frozen=frozen, first_layer=first_layer),
    )
    untrained = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 0})})
    before = weights(finish(start(untrained, IMAGES, tmp_path))[1])
    _, pretrained = finish(start(config, IMAGES, tmp_path))
    after = weights(pretrained)
    for name in ("head.0.weight", "head.0.bias"):
        assert torch.equal(before[name], after[name]) == frozen
    assert not torch.equal(before["head.2.weight"], after["head.2.weight"])
    frozen_parameters = pretrained.head_parameters - pretrained.trainable_head_parameters
    assert frozen_parameters == (32 * 8 + 8 if frozen else 0)


def test_first_layer_is_the_autoencoders(tmp_path: Path) -> None:
    config = tiny_config(head=autoencoder_head())
    layer, key = pretrained_embedding(config, IMAGES, 32, device=CPU, home=tmp_path)
    _, pretrained = finish(start(config, IMAGES, tmp_path))
    after = weights(pretrained)
    assert torch.equal(after["head.0.weight"], layer.weight)
    assert torch.equal(after["head.0.bias"], layer.bias)
    assert pretrained.autoencoder == key


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "none"},
        {"kind": "linear", "projection_dim": 3},
        {"kind": "mlp", "depth": 3, "width": 8, "batch_norm": True, "projection_dim": 1},
        autoencoder_head(first_layer="random"),
    ],
    ids=lambda head: head["kind"],
)
def test_result_is_as_described_before_training(tmp_path: Path, head: dict[str, Any]) -> None:
    config = tiny_config(head=head)
    facts = describe_head(config)
    reports, pretrained = finish(start(config, IMAGES, tmp_path))
    for field in ("projection_dim", "feature_dim", "head_parameters", "trainable_head_parameters"):
        assert getattr(pretrained, field) == getattr(facts, field)
    assert pretrained.autoencoder is None
    assert pretrained.head(torch.randn(4, facts.feature_dim)).shape == (4, facts.projection_dim)
    assert all(1 <= report.projection_rank <= facts.projection_dim + 1e-6 for report in reports)
    assert all(1 <= report.feature_rank <= facts.feature_dim for report in reports)


@pytest.mark.parametrize("activation", typing.get_args(Activation))
def test_every_activation_trains(tmp_path: Path, activation: Activation) -> None:
    config = tiny_config(head={"activation": activation}, training={"epochs": 1})
    reports, pretrained = finish(start(config, IMAGES, tmp_path))
    assert math.isfinite(reports[0].loss)
    untrained = finish(start(tiny_config(training={"epochs": 0}), IMAGES, tmp_path))[1]
    assert not torch.equal(weights(pretrained)["head.0.weight"], weights(untrained)["head.0.weight"])


def test_no_epochs_is_the_untrained_encoder(tmp_path: Path) -> None:
    config = tiny_config(training={"epochs": 0, "batch_size": 4096})
    reports, pretrained = finish(start(config, IMAGES, tmp_path))
    assert reports == []
    assert (pretrained.train_seconds, pretrained.views_per_second) == (0.0, 0.0)
    assert pretrained.encoder(torch.rand(2, 3, 8, 8)).shape == (2, 32)


def test_last_smaller_batch_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    loss = objectives.nt_xent

    def spy(projections: torch.Tensor, temperature: float, scale: float) -> torch.Tensor:
        sizes.append(len(projections))
        return loss(projections, temperature, scale)

    monkeypatch.setattr(objectives, "nt_xent", spy)
    next(start(tiny_config(training={"batch_size": 40}, probe={"measures": False}), IMAGES, tmp_path))
    assert sizes == [80, 80]


@pytest.mark.parametrize("batch_size", [96, 97])
def test_batch_must_fit_the_training_split(tmp_path: Path, batch_size: int) -> None:
    training = start(tiny_config(training={"batch_size": batch_size, "epochs": 1}), IMAGES, tmp_path)
    if batch_size == 96:
        assert next(training).epoch == 1
    else:
        with pytest.raises(SpecError, match=r"^training\.batch_size: 97 is more than the 96 training images"):
            next(training)


def poisoned() -> ImageSet:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"test split read: {name}")

    return replace(IMAGES, test=typing.cast(Split, Untouchable()))


def test_test_split_has_no_part_in_training(tmp_path: Path) -> None:
    nothing = Split(torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    config = tiny_config(head=autoencoder_head(), data={"normalization": "zscore"})
    expected, _ = finish(start(config, IMAGES, tmp_path / "a"))
    for folder, images in [("b", replace(IMAGES, test=nothing)), ("c", poisoned())]:
        reports, _ = finish(start(config, images, tmp_path / folder))
        assert without_timings(reports) == without_timings(expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_diverging_training_is_a_trial_failure(tmp_path: Path, name: str) -> None:
    config = tiny_config(
        optimizer={"name": name, "learning_rate": 1e4, "momentum": 0.99, "weight_decay": 1e4}
    )
    with pytest.raises(TrialFailure, match=r"^epoch \d: ") as caught:
        finish(start(config, IMAGES, tmp_path))
    assert caught.value.reason == "non_finite_loss"


def test_images_that_are_all_alike_are_a_collapse(tmp_path: Path) -> None:
    grey = torch.full((96, 3, 8, 8), 128, dtype=torch.uint8)
    images = replace(IMAGES, train=replace(IMAGES.train, images=grey))
    images = replace(images, validation=Split(grey[:40], IMAGES.validation.labels))
    with pytest.raises(TrialFailure, match="epoch 1") as caught:
        next(start(tiny_config(), images, tmp_path))
    assert caught.value.reason == "collapsed"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "host"],
)
def test_running_out_of_memory_is_a_trial_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(objectives, "nt_xent", fail)
    with pytest.raises(TrialFailure, match=r"^out of memory: .+") as caught:
        next(start(tiny_config(), IMAGES, tmp_path))
    assert caught.value.reason == "out_of_memory"
    assert "\n" not in str(caught.value)


def test_other_errors_pass_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(objectives, "nt_xent", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        next(start(tiny_config(), IMAGES, tmp_path))


def test_report_probe_sees_a_fixed_share_of_each_split(tmp_path: Path) -> None:
    split = Split(torch.arange(90).view(90, 1, 1, 1), torch.arange(90) // 30)
    config = tiny_config(probe={"report_images": 60})
    a, b = subset(split, config.probe.report_images), subset(split, 60)
    assert torch.equal(a.images, b.images)
    assert len(a.images.unique()) == 60
    assert torch.equal(a.labels, a.images.flatten() // 30)
    assert all(10 <= count <= 30 for count in a.labels.bincount())


DIGITS: dict[str, Any] = {
    "views": {
        "crop_scale_min": 0.4,
        "flip_probability": 0.0,
        "jitter_strength": 0.8,
        "grayscale_probability": 0.0,
    },
    "probe": {"penalties": [1e-4], "iterations": 100},
}


def test_it_learns_digits(tmp_path: Path) -> None:
    """The mean accuracy on test images over three seeds rises well above the untrained encoder's."""
    images = load_images(DataConfig(), home=tmp_path)

    def accuracy(epochs: int, seed: int) -> float:
        training = {"epochs": epochs, "batch_size": 128}
        config = TrialConfig.model_validate(DIGITS | {"training": training, "seed": seed})
        _, pretrained = finish(start(config, images, tmp_path))
        return evaluate(pretrained, images, config, device=CPU).test_accuracy

    trained, untrained = (sum(accuracy(epochs, seed) for seed in range(3)) / 3 for epochs in (4, 0))
    assert trained > untrained + 0.03
