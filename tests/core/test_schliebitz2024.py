"""Protocol, statistics and studies of Schliebitz et al. 2024 against loops and the authors' result files."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import tiny_images
from references import fresh_generator
from torch import Tensor, nn

from headsearch.config import DataConfig, TrialConfig
from headsearch.core.encoders import build_encoder
from headsearch.core.features import build_views
from headsearch.core.heads import describe_head
from headsearch.core.images import ImageSet, Split, load_images
from headsearch.core.optimizers import learning_rate
from headsearch.core.probe_schliebitz2024 import evaluate_schliebitz2024, split_rows, train_linear
from headsearch.core.randomness import generator, initialisation
from headsearch.errors import DataError, TrialFailure
from headsearch.spec import StudySpec
from headsearch.study_file import load_study

CPU = torch.device("cpu")
STUDIES = Path(__file__).resolve().parents[2] / "studies" / "schliebitz2024"
DATASETS = {
    # name: pixels, data.name, training images, batch, learning rate, steps an epoch (result files)
    "cifar10": (32, "cifar10", 45_000, 1280, 1.5, 35),
    "cifar100": (32, "cifar100", 45_000, 1280, 1.5, 35),
    "stl10": (96, "stl10", 4_500, 500, 0.5859375, 9),
    "imagenette": (128, "imagenette", 8_522, 392, 0.459375, 21),
    "aircraft": (128, "fgvc-aircraft", 6_000, 666, 0.78046875, 9),
}


# ---- statistics ----


def image_set(*counts: int, size: int = 5) -> ImageSet:
    rng = fresh_generator()

    def split(count: int) -> Split:
        # contrast and brightness differ between images, so that pooled and averaged deviations do
        low = rng.integers(0, 128, size=(count, 3, 1, 1))
        pixels = low + rng.integers(0, 128, size=(count, 3, size, size)) * rng.uniform(size=(count, 1, 1, 1))
        return Split(torch.from_numpy(pixels.astype(np.uint8)), torch.zeros(count, dtype=torch.int64))

    return ImageSet("test", ("a",), *(split(count) for count in counts), "")


def own_statistics(*splits: Split) -> tuple[np.ndarray, np.ndarray]:
    """Means over images of each image's channel means and sample standard deviations, pixel by pixel."""
    images = [image for split in splits for image in split.images.numpy()]
    means, deviations = np.zeros(3), np.zeros(3)
    for image in images:
        for channel in range(3):
            pixels = [int(value) / 255 for value in image[channel].ravel()]
            mean = math.fsum(pixels) / len(pixels)
            square = math.fsum((value - mean) ** 2 for value in pixels) / (len(pixels) - 1)
            means[channel] += mean / len(images)
            deviations[channel] += math.sqrt(square) / len(images)
    return means, deviations


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    for part, want in zip(found, wanted, strict=True):
        assert part.dtype == torch.float32
        np.testing.assert_allclose(part.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_statistics_are_means_of_each_images_own(monkeypatch, chunk):
    monkeypatch.setattr("headsearch.core.images.STATISTICS_VALUES", chunk)
    images = image_set(70, 9, 31)
    kind = "zscore-schliebitz2024"
    assert_close(images.normalization(kind), own_statistics(images.train, images.validation))
    assert_close(images.normalization(kind, "test"), own_statistics(images.test))
    pooled = images.normalization("zscore")[1]
    assert (images.normalization(kind)[1] < pooled).all(), "an average of deviations is below the pooled one"


@pytest.mark.parametrize("kind", ["none", "zscore"])
def test_other_kinds_have_one_normalization_for_all_splits(kind):
    images = image_set(20, 5, 7)
    for train, test in zip(images.normalization(kind), images.normalization(kind, "test"), strict=True):
        assert torch.equal(train, test)


def test_a_channel_without_deviation_is_only_shifted():
    flat = Split(torch.full((4, 3, 5, 5), 51, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    mean, deviation = ImageSet("test", ("a",), flat, flat, flat, "").normalization("zscore-schliebitz2024")
    assert mean.tolist() == pytest.approx([0.2] * 3)
    assert deviation.tolist() == [1.0] * 3


def test_a_limit_leaves_out_training_images_of_the_statistics(tmp_path):
    few = load_images(DataConfig(limit=40), home=tmp_path)
    wanted = own_statistics(few.train, few.validation)
    assert len(few.train) == 40
    assert_close(few.normalization("zscore-schliebitz2024"), wanted)


def test_views_take_the_statistics_of_the_split_they_are_of():
    images = image_set(30, 4, 12)
    config = TrialConfig(data=DataConfig(normalization="zscore-schliebitz2024"))
    for split, parts in (("train", (images.train, images.validation)), ("test", (images.test,))):
        mean, deviation = (part.reshape(1, 3, 1, 1) for part in own_statistics(*parts))
        plain = build_views(config, images, CPU, split=split).plain(images.test.images)
        wanted = (images.test.images.numpy() / 255 - mean) / deviation
        np.testing.assert_allclose(plain.numpy(), wanted, rtol=1e-4, atol=1e-5)
    default = build_views(config, images, CPU).plain(images.test.images)
    assert torch.equal(default, build_views(config, images, CPU, split="train").plain(images.test.images))


# ---- the probe ----


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (10_000, (7_000, 1_000, 2_000)),
        (8_000, (5_600, 800, 1_600)),
        (3_925, (2_748, 392, 785)),
        (3_333, (2_334, 333, 666)),
        (7, (5, 1, 1)),
    ],
)
def test_parts_have_the_papers_sizes_and_share_no_image(count, sizes):
    """Shares rounded down; images left over go to the parts in turn, from the first."""
    parts = split_rows(count)
    assert tuple(len(part) for part in parts) == sizes
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(42))
    assert torch.equal(torch.cat(parts), order)


@pytest.mark.parametrize(("count", "empty"), [(1, "validation"), (4, "test"), (6, "validation")])
def test_a_part_without_images_is_refused(count, empty):
    with pytest.raises(DataError, match=f"{count} test images leave none for the {empty} part"):
        split_rows(count)
    images = tiny_images(test=count)
    with pytest.raises(DataError, match=f"the {empty} part"):
        evaluate_schliebitz2024(pretrained(), images, TrialConfig(), CPU)


class Rate:
    """Falls tenfold when the best loss, by a relative 1e-4, is more than ten epochs old."""

    def __init__(self) -> None:
        self.value, self.best, self.bad = 1e-3, math.inf, 0

    def see(self, loss: float) -> None:
        improved = loss < self.best * (1 - 1e-4)
        self.best, self.bad = (loss, 0) if improved else (self.best, self.bad + 1)
        if self.bad > 10:
            self.value, self.bad = self.value / 10, 0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def reference(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int, seed: int
) -> SimpleNamespace:
    """Softmax regression in float64, batch by batch, with what the schedule saw."""
    (x, y), (held_x, held_y) = ((f.double().numpy(), t.numpy()) for f, t in (train, validation))
    with initialisation(seed, "schliebitz2024"):
        start = nn.Linear(x.shape[1], classes)
    weight, bias = (p.detach().double().numpy().copy() for p in (start.weight, start.bias))
    rate, rates, means, held_losses, kept = Rate(), [], [], [], []
    for epoch in range(1, 51):
        rates.append(rate.value)
        order = torch.randperm(len(x), generator=generator(CPU, seed, "schliebitz2024", epoch)).numpy()
        losses = []
        for begin in range(0, len(x), 32):
            rows = order[begin : begin + 32]
            scores = log_softmax(x[rows] @ weight.T + bias)
            losses.append(-scores[np.arange(len(rows)), y[rows]].mean())
            slope = (np.exp(scores) - np.eye(classes)[y[rows]]) / len(rows)
            weight -= rate.value * slope.T @ x[rows]
            bias -= rate.value * slope.sum(axis=0)
        rate.see(losses[-1])
        means.append(float(np.mean(losses)))
        scores = log_softmax(held_x @ weight.T + bias)
        held_losses.append(float(-scores[np.arange(len(held_y)), held_y].mean()))
        kept.append((weight.copy(), bias.copy()))
    best = int(np.argmin(held_losses))
    return SimpleNamespace(
        weight=kept[best][0], bias=kept[best][1], epoch=best + 1, loss=held_losses[best],
        rates=rates, means=means,
    )  # fmt: skip


def accuracy_of(found: SimpleNamespace, features: Tensor, labels: Tensor) -> float:
    logits = features.double().numpy() @ found.weight.T + found.bias
    return float((logits.argmax(axis=1) == labels.numpy()).mean())


@functools.cache
def rows(kind: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Features of 490 and 70 images: classes that can be told apart, or labels that mean nothing."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 4, size=560)
    if kind == "classes":
        features = np.abs(rng.normal(size=(4, 24))[labels] + rng.normal(size=(560, 24)))
    else:
        features = 2 * np.abs(rng.normal(size=(560, 160)))
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    return (x[:490], y[:490]), (x[490:], y[490:])


@pytest.mark.parametrize("kind", ["classes", "noise"])
def test_the_probe_is_plain_sgd_at_its_best_validation_epoch(kind):
    train, validation = rows(kind)
    wanted = reference(train, validation, 4, seed=3)
    probe, epoch, loss = train_linear(train, validation, 4, seed=3)
    assert (epoch, loss) == (wanted.epoch, pytest.approx(wanted.loss, rel=1e-5))
    np.testing.assert_allclose(probe.weight.detach().numpy(), wanted.weight, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(probe.bias.detach().numpy(), wanted.bias, rtol=1e-3, atol=1e-5)
    # so that keeping the last epoch would show
    assert (wanted.epoch == 50) == (kind == "classes")


def test_the_rate_falls_on_a_plateau_of_the_last_batch_alone():
    """Lightning's scheduler sees the value logged last; up to there the epochs' means would keep the rate."""
    train, validation = rows("classes")
    wanted = reference(train, validation, 4, seed=3)
    fall = next(epoch for epoch, value in enumerate(wanted.rates) if value < 1e-3)
    means = Rate()
    for mean in wanted.means[:fall]:
        means.see(mean)
    assert means.value == 1e-3


def test_a_probe_that_diverges_is_a_trial_failure():
    train, validation = rows("classes")
    with pytest.raises(TrialFailure, match="finite") as caught:
        train_linear((train[0] * math.nan, train[1]), validation, 4, seed=3)
    assert caught.value.reason == "non_finite_loss"


def pretrained(*modules: nn.Module) -> Any:
    """What the protocol uses of a pretraining: an encoder that hands its pixels on."""
    return SimpleNamespace(encoder=nn.Sequential(nn.Flatten(), *modules), precision="fp32")


@functools.cache
def images() -> ImageSet:
    """Every fourth test label is wrong, so that no probe is perfect."""
    found = tiny_images(train=30, validation=12, test=400, size=6)
    labels = found.test.labels.clone()
    labels[::4] = (labels[::4] + 1) % 3
    return replace(found, test=replace(found.test, labels=labels))


def evaluation(of: ImageSet | None = None, *modules: nn.Module, seed: int = 3, kind: str = "none"):
    config = TrialConfig(data=DataConfig(normalization=kind), seed=seed)
    return evaluate_schliebitz2024(pretrained(*modules), of or images(), config, CPU)


@pytest.mark.parametrize("kind", ["none", "zscore-schliebitz2024"])
def test_accuracies_are_those_of_a_slow_probe_on_the_test_split(kind):
    test = images().test
    mean, deviation = own_statistics(test) if kind != "none" else (np.zeros(3), np.ones(3))
    pixels = (test.images.numpy() / 255 - mean.reshape(1, 3, 1, 1)) / deviation.reshape(1, 3, 1, 1)
    features = torch.tensor(pixels.reshape(len(test), -1), dtype=torch.float32)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(42))
    train, validation, scored = (
        (features[part], test.labels[part]) for part in (order[:280], order[280:320], order[320:])
    )
    wanted = reference(train, validation, 3, seed=3)
    found = evaluation(kind=kind)
    assert found.probe_accuracy == accuracy_of(wanted, *validation)
    assert found.test_accuracy == accuracy_of(wanted, *scored)
    assert (found.train_images, found.validation_images, found.test_images) == (280, 40, 80)
    assert found.details == {
        "split_of": "test",
        "best_epoch": wanted.epoch,
        "validation_loss": pytest.approx(wanted.loss, rel=1e-5),
    }
    assert 0.4 < found.test_accuracy < 1.0


def test_only_test_images_have_a_say_and_the_scored_part_none_in_the_choice():
    found = evaluation()
    nothing = Split(torch.zeros_like(images().train.images), torch.zeros_like(images().train.labels))
    assert evaluation(replace(images(), train=nothing, validation=nothing)) == found
    labels = images().test.labels.clone()
    scored = split_rows(len(labels))[2]
    labels[scored] = (labels[scored] + 1) % 3
    again = evaluation(replace(images(), test=replace(images().test, labels=labels)))
    assert (again.probe_accuracy, again.details) == (found.probe_accuracy, found.details)
    assert again.test_accuracy < found.test_accuracy


def test_it_repeats_itself_and_leaves_torchs_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = evaluation()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert evaluation() == found
    assert evaluation(seed=4).details["validation_loss"] != found.details["validation_loss"]


def test_the_encoder_is_in_evaluation_mode():
    assert evaluation(None, nn.Dropout(0.5)) == evaluation()


# ---- the studies ----


@functools.cache
def study(name: str) -> StudySpec:
    return load_study(STUDIES / f"{name}.toml")


def first(name: str) -> TrialConfig:
    return study(name).trial_config(*study(name).cells()[0])


def rate(config: TrialConfig, step: int, steps: int) -> float:
    return learning_rate(
        config.optimizer,
        step=step,
        steps_per_epoch=steps,
        epochs=config.training.epochs,
        batch_size=config.training.batch_size,
    )


@pytest.mark.parametrize("name", DATASETS)
def test_studies_are_the_papers_grid_and_its_ablation(name):
    pixels, data, _, batch, _, _ = DATASETS[name]
    grid, frozen = study(f"grid-{name}"), study(f"frozen-{name}")
    assert (grid.trials, frozen.trials) == (144, 18)
    assert (grid.name, frozen.name) == (f"schliebitz2024-grid-{name}", f"schliebitz2024-frozen-{name}")
    configs = [spec.trial_config(*cell) for spec in (grid, frozen) for cell in spec.cells()]
    for config in configs:
        assert (config.protocol, config.seed, config.recipe) == ("schliebitz2024", 42, "schliebitz2024")
        assert (config.data.name, config.data.image_size) == (data, pixels)
        assert (config.training.batch_size, config.training.epochs) == (batch, 150)
        assert config.autoencoder == TrialConfig().autoencoder
    assert all(config.head.kind == "mlp" or config.head.frozen for config in configs[:144])
    assert len({config.model_dump_json() for config in configs[:144]}) == 144
    assert {(c.head.activation, c.data.normalization) for c in configs[144:]} == {("sigmoid", "none")}


@pytest.mark.parametrize("name", DATASETS)
def test_the_learning_rate_is_the_papers(name):
    """Three tenths per 256 images, then a cosine per epoch down to a fiftieth, as torch's scheduler has it."""
    _, _, count, batch, peak, steps = DATASETS[name]
    config = first(f"grid-{name}")
    assert count // batch == steps
    (flat,) = {rate(config, step, steps) for step in range(steps)}
    assert flat == pytest.approx(peak, rel=1e-12)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=150, eta_min=peak / 50)
    for epoch in range(150):
        wanted = pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert rate(config, epoch * steps, steps) == wanted
        assert rate(config, (epoch + 1) * steps - 1, steps) == wanted
        optimizer.step()
        scheduler.step()
    assert rate(config, 150 * steps, steps) == pytest.approx(peak / 50, rel=1e-9)


def test_parameters_are_those_that_the_authors_logged():
    """simclr_trainable_params and simclr_non_trainable_params of simclr-eval.csv, and of the ablation's file."""
    counts = {}
    untrained = first("grid-cifar10").encoder.model_copy(update={"pretrained": False})
    backbone = sum(p.numel() for p in build_encoder(untrained, 32).parameters())
    for name in ("grid-cifar10", "frozen-cifar10"):
        for params, seed in study(name).cells():
            config = study(name).trial_config(params, seed)
            head, facts = config.head, describe_head(config)
            hidden = head.width if head.kind == "mlp" else head.embedding_dim
            kind = "mlp" if head.kind == "mlp" else "frozen" if head.frozen else "trainable"
            trainable = facts.trainable_head_parameters
            found = backbone + trainable, facts.head_parameters - trainable
            assert counts.setdefault((kind, hidden, head.projection_dim), found) == found
    logged = {  # of frozen heads: embedding dim, frozen parameters, trainable ones at projection dim 32, 64, 128
        128: (65_664, 21_288_800, 21_292_928, 21_301_184),
        256: (131_328, 21_292_896, 21_301_120, 21_317_568),
        512: (262_656, 21_301_088, 21_317_504, 21_350_336),
    }
    wanted = {}
    for hidden, (frozen, *trainable) in logged.items():
        for dim, count in zip((32, 64, 128), trainable, strict=True):
            wanted["frozen", hidden, dim] = count, frozen
            wanted["mlp", hidden, dim] = wanted["trainable", hidden, dim] = count + frozen, 0
    assert counts == wanted
    assert counts["mlp", 512, 128] == (21_612_992, 0), "one cell as it stands in the file"


# ---- CIFAR-10 itself, as JPEG files ----


@pytest.fixture(scope="module")
def cifar10(cifar10_folder, tmp_path_factory) -> ImageSet:
    """Decoded once for all tests below."""
    config = DataConfig(name="folder", root=str(cifar10_folder), image_size=32)
    return load_images(config, home=tmp_path_factory.mktemp("home"))


@pytest.mark.slow
def test_cifar10_has_the_papers_splits_and_steps(cifar10):
    config = first("grid-cifar10")
    assert (len(cifar10.train), len(cifar10.validation), len(cifar10.test)) == (45_000, 5_000, 10_000)
    assert (cifar10.image_size, len(cifar10.classes)) == (32, 10)
    assert config.data.validation_fraction == 0.1
    steps = len(cifar10.train) // config.training.batch_size
    assert steps == 35
    assert {rate(config, step, steps) for step in range(steps)} == {1.5}
    assert [len(part) for part in split_rows(len(cifar10.test))] == [7_000, 1_000, 2_000]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "means", "deviations"),
    [
        ("train", (0.49140, 0.48216, 0.44653), (0.20230, 0.19941, 0.20096)),
        ("test", (0.49421, 0.48513, 0.45041), (0.20199, 0.19912, 0.20113)),
    ],
)
def test_cifar10_has_the_papers_statistics(cifar10, split, means, deviations):
    """simclr-train.csv, of the original pixels."""
    mean, deviation = cifar10.normalization("zscore-schliebitz2024", split)
    assert mean.tolist() == pytest.approx(means, abs=0.003)
    assert deviation.tolist() == pytest.approx(deviations, abs=0.003)
