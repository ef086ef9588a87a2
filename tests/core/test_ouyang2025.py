"""Protocol `ouyang2025`: the probe that is trained along and the one trained afterwards, against plain loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, finish, start, tiny_config, tiny_images
from torch import Tensor, nn
from torch.nn import functional

from headsearch.config import TrialConfig, ViewsConfig
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.epoch import Batch, train_epoch
from headsearch.core.features import build_views
from headsearch.core.images import Split
from headsearch.core.learner import build_learner
from headsearch.core.objectives import nt_xent
from headsearch.core.pretrain import Pretrained
from headsearch.core.probe import evaluate
from headsearch.core.probe_ouyang2025 import train_offline
from headsearch.core.randomness import generator, initialisation
from headsearch.core.reporting import subset
from headsearch.core.views import Views

IMAGES = tiny_images()
STEPS, EPOCHS, BATCH = 3, 3, 32
ONLINE = 0.4
JOINT = {"kind": "joint"}

Rule = Callable[[Tensor, Tensor, Tensor, float], None]


def config_of(**parts: Any) -> TrialConfig:
    parts["probe"] = {"online_learning_rate": ONLINE, "offline_epochs": 2, **parts.get("probe", {})}
    return tiny_config(protocol="ouyang2025", **parts)


def sgd(w: Tensor, g: Tensor, v: Tensor, rate: float) -> None:
    """Momentum 0.9, in place, no decay."""
    v.mul_(0.9).add_(g)
    w.sub_(rate * v)


def lars(w: Tensor, g: Tensor, v: Tensor, rate: float, trust: float = 0.02) -> None:
    """You et al. 2017, momentum 0.9, no decay; biases move as in SGD with the rate in the velocity."""
    local = trust * w.norm() / g.norm() if w.ndim > 1 and w.norm() > 0 and g.norm() > 0 else 1.0
    v.mul_(0.9).add_(rate * local * g)
    w.sub_(v)


def clipped_lars(w: Tensor, g: Tensor, v: Tensor, rate: float) -> None:
    """A layer moves by at most the rate; at rate 0, the first of a warm-up, not at all."""
    local = min(float(0.02 * w.norm() / g.norm()) / rate, 1.0) if w.ndim > 1 and rate else 1.0
    v.mul_(0.9).add_(rate * local * g)
    w.sub_(v)


def half_cosine(step: int, total: int, peak: float) -> float:
    return peak * (1 + math.cos(math.pi * step / total)) / 2


class Probe:
    """A linear classifier with a rule of its own: logits, mean cross entropy and its gradient written out."""

    def __init__(self, layer: nn.Linear, rule: Rule) -> None:
        self.parameters = [p.detach().clone() for p in layer.parameters()]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.rule = rule

    def step(self, features: Tensor, labels: Tensor, rate: float) -> None:
        weight, bias = self.parameters
        slopes = (features.detach() @ weight.T + bias).softmax(1)
        slopes[torch.arange(len(labels)), labels] -= 1
        slopes /= len(labels)
        for p, v, g in zip(
            self.parameters, self.velocity, (slopes.T @ features.detach(), slopes.sum(0)), strict=True
        ):
            self.rule(p, g, v, rate)

    def assert_is(self, layer: nn.Linear, start: nn.Linear | None = None) -> None:
        for ours, theirs in zip(layer.parameters(), self.parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
        if start is not None:
            assert (start.weight - layer.weight).abs().max() > 1e-3, "it moved"


def batches(config: TrialConfig) -> list[tuple[Tensor, Tensor]]:
    """Views and labels of the first epoch's batches, drawn as training draws them."""
    order = torch.randperm(96, generator=generator(CPU, config.seed, "shuffle", 1))
    draws, views = generator(CPU, config.seed, "views", 1), build_views(config, IMAGES, CPU)
    rows = [order[BATCH * step : BATCH * (step + 1)] for step in range(STEPS)]
    return [(views.pair(IMAGES.train.images[r], draws), IMAGES.train.labels[r]) for r in rows]


@pytest.mark.parametrize(
    ("scheme", "optimizer", "rule"),
    [
        (JOINT, {"name": "sgd"}, sgd),
        (JOINT, {"name": "sgd", "weight_decay": 0.1, "decay_all": True}, sgd),
        ({"kind": "joint", "steps_per_batch": 2}, {"name": "sgd"}, sgd),
        ({"kind": "alternating", "head_steps": 2}, {"name": "sgd"}, sgd),
        ({"kind": "alternating", "encoder_uses": "previous"}, {"name": "sgd"}, sgd),
        ({"kind": "alternating", "batches": "fresh"}, {"name": "sgd"}, sgd),
        (JOINT, {"name": "lars", "trust_coefficient": 0.02}, lars),
        (JOINT, {"name": "lars", "trust_coefficient": 0.02, "clip": True, "decay_all": True}, clipped_lars),
    ],
    ids=["sgd", "decay", "repeated", "same", "previous", "fresh", "lars", "clipped"],
)
def test_online_probe_of_an_epoch(
    scheme: dict[str, Any], optimizer: dict[str, Any], rule: Rule, tmp_path: Path
) -> None:
    """Encoder and head by torch's optimizers or ours; the probe by its formula, at its own rate."""
    # a rate at which the encoder hardly moves, so that rounding in it cannot reach the probe; the probe's
    # own follows the schedule and not that rate
    config = config_of(scheme=scheme, optimizer={"learning_rate": 1e-6, **optimizer})
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    assert learner.online is not None
    encoder, initial = copy.deepcopy(learner.encoder).train(), copy.deepcopy(learner.online)
    probe = Probe(initial, rule)
    # one step a batch, whatever the scheme makes of it
    for number, (pair, labels) in enumerate(batches(config)):
        rate = half_cosine(number, STEPS * EPOCHS, ONLINE * BATCH / 256)
        probe.step(encoder(pair), torch.cat([labels, labels]), rate)
    train_epoch(learner, 1, IMAGES.train, build_views(config, IMAGES, CPU), "fp32", warm=False)
    probe.assert_is(learner.online, initial)


def test_online_probe_beside_an_encoder_that_learns(tmp_path: Path) -> None:
    """The same with an encoder at a usual rate: its features of each step are those before that step."""
    config = config_of(optimizer={"learning_rate": 0.3, "weight_decay": 0.0})
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    assert learner.online is not None
    encoder, head = copy.deepcopy(learner.encoder).train(), copy.deepcopy(learner.head).train()
    initial = copy.deepcopy(learner.online)
    probe, both = Probe(initial, sgd), [*encoder.parameters(), *head.parameters()]
    plain = torch.optim.SGD(both, lr=1.0, momentum=0.9)
    for number, (pair, labels) in enumerate(batches(config)):
        features = encoder(pair)
        plain.param_groups[0]["lr"] = half_cosine(number, STEPS * EPOCHS, 0.3 * BATCH / 256)
        plain.zero_grad()
        nt_xent(head(features), 0.5).backward()
        plain.step()
        probe.step(features, labels.repeat(2), half_cosine(number, STEPS * EPOCHS, ONLINE * BATCH / 256))
    train_epoch(learner, 1, IMAGES.train, build_views(config, IMAGES, CPU), "fp32", warm=False)
    for ours, theirs in zip(learner.online.parameters(), probe.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_no_gradient_of_the_online_loss_reaches_encoder_or_head(tmp_path: Path) -> None:
    config = config_of()
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    assert learner.online is not None
    pair, labels = batches(config)[0]
    batch = Batch(learner, "fp32", pair, labels, 0, STEPS)
    features = batch.features()
    features.retain_grad()
    loss = batch.online_loss(features)
    assert isinstance(loss, Tensor)
    wanted = -(learner.online(features).log_softmax(1)[torch.arange(64), labels.repeat(2)]).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    loss.backward()
    assert features.grad is None
    for module in (learner.encoder, learner.head):
        assert all(p.grad is None for p in module.parameters())
    assert learner.online.weight.grad is not None
    assert learner.online.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "scheme", [JOINT, {"kind": "alternating", "head_steps": 1}], ids=["joint", "alternating"]
)
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_networks_are_the_same_without_it(optimizer: str, scheme: dict[str, Any], tmp_path: Path) -> None:
    parts = {"optimizer": {"name": optimizer, "learning_rate": 0.01}, "scheme": scheme}
    alone = finish(start(tiny_config(**parts), IMAGES, tmp_path))[1]
    beside = finish(start(config_of(**parts), IMAGES, tmp_path))[1]
    for part in ("encoder", "head"):
        ours, theirs = getattr(alone, part).state_dict(), getattr(beside, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def features_of(encoder: nn.Module, split: Split) -> Tensor:
    return copy.deepcopy(encoder).eval()(split.images.float() / 255)


def share_right(layer: nn.Linear, encoder: nn.Module, split: Split) -> float:
    logits = features_of(encoder, split) @ layer.weight.T + layer.bias
    return sum(
        int(row.argmax()) == int(label) for row, label in zip(logits, split.labels, strict=True)
    ) / len(split)


@pytest.mark.parametrize("report_images", [64, 17])
def test_each_accuracy_is_that_of_its_probe_on_its_images(report_images: int, tmp_path: Path) -> None:
    config = config_of(probe={"report_images": report_images, "online_learning_rate": 3.0})
    reports, pretrained = finish(start(config, IMAGES, tmp_path))
    online = pretrained.online
    assert online is not None
    reported = subset(IMAGES.validation, report_images)
    assert len(reported) == min(report_images, 40)
    assert reports[-1].probe_accuracy == pytest.approx(share_right(online, pretrained.encoder, reported))
    found = evaluate(pretrained, IMAGES, config, device=CPU)
    assert found.probe_accuracy == pytest.approx(share_right(online, pretrained.encoder, IMAGES.validation))
    assert found.test_accuracy == pytest.approx(share_right(online, pretrained.encoder, IMAGES.test))
    assert (found.train_images, found.validation_images, found.test_images) == (96, 40, 24)
    offline = train_offline(pretrained, IMAGES, config, CPU)
    assert found.details == {
        "probe": "online",
        "offline_validation_accuracy": share_right(offline, pretrained.encoder, IMAGES.validation),
        "offline_test_accuracy": share_right(offline, pretrained.encoder, IMAGES.test),
    }


MANY = tiny_images(train=600)
"""Two whole batches of 256 an epoch, and a third that is dropped."""


def pretrained_on(images: Any, home: Path, **parts: Any) -> tuple[TrialConfig, Pretrained]:
    config = config_of(training={"epochs": 1, "batch_size": 96}, **parts)
    return config, finish(start(config, images, home))[1]


def solo_lars(w: Tensor, g: Tensor, v: Tensor, rate: float) -> None:
    """solo-learn, utils/lars.py: rate after the momentum; decay 1e-4 and clip on what is no bias."""
    if w.ndim > 1:
        local = 0.02 * w.norm() / (g.norm() + 1e-4 * w.norm() + 1e-8)
        g = min(float(local) / rate, 1.0) * (g + 1e-4 * w)
    v.mul_(0.9).add_(g)
    w.sub_(rate * v)


def warmed(step: int, steps: int, epochs: int, peak: float) -> float:
    """LinearWarmupCosineAnnealingLR in closed form: 10 epochs, here a fifth, from 3e-5."""
    warm, total = steps * epochs // 5, steps * epochs
    if step < warm:
        return 3e-5 + step * (peak - 3e-5) / (warm - 1)
    return half_cosine(step - warm, total - warm, peak)


OFFLINE: dict[str, tuple[Rule, Callable[[int, int, int, float], float]]] = {
    "lars": (solo_lars, warmed),
    "lars-without-warmup": (lars, lambda step, steps, epochs, peak: half_cosine(step, steps * epochs, peak)),
    "sgd": (sgd, lambda step, steps, _epochs, peak: peak * 0.1 ** sum(step // steps >= e for e in (6, 8))),
}
"""Rule and rate, from step, steps of an epoch, epochs and peak."""


@pytest.mark.parametrize("kind", OFFLINE)
@pytest.mark.parametrize(("images", "size"), [(MANY, 256), (IMAGES, 48)], ids=["many", "few"])
def test_offline_probe_by_a_plain_loop(kind: str, images: Any, size: int, tmp_path: Path) -> None:
    epochs, peak = 10, 0.5 * size / 256
    config, pretrained = pretrained_on(
        images, tmp_path, seed=3, data={"normalization": "zscore"},
        probe={
            "offline": kind, "offline_epochs": epochs, "offline_learning_rate": 0.5, "offline_batch_size": size,
        },
    )  # fmt: skip
    encoder = copy.deepcopy(pretrained.encoder).eval()
    with initialisation(3, "offline probe"):
        layer = nn.Linear(32, 3)
    rule, rate = OFFLINE[kind]
    probe, pixels = Probe(layer, rule), images.train.images
    mean, std = (f(pixels.double() / 255, dim=(0, 2, 3)).float() for f in (torch.mean, torch.std))
    crops = ViewsConfig(crop_scale_min=0.08, jitter_probability=0, grayscale_probability=0)
    steps = len(images.train) // size
    for epoch in range(epochs):
        order = torch.randperm(len(images.train), generator=generator(CPU, 3, "offline order", epoch))
        draws = generator(CPU, 3, "offline views", epoch)
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            with torch.no_grad():
                views = Views(crops, 8, (mean, std))(pixels[rows], draws)
                number = epoch * steps + step
                probe.step(encoder(views), images.train.labels[rows], rate(number, steps, epochs, peak))
    probe.assert_is(train_offline(pretrained, images, config, CPU), layer)


def test_neighbours_may_be_all_training_images(tmp_path: Path) -> None:
    """As lightly's benchmark: k 200, temperature 0.1, each vote exp(cosine / temperature), by a plain loop."""
    options = {"knn_train": "all", "knn_neighbours": 50, "knn_temperature": 0.1, "report_images": 10}
    config = config_of(training={"epochs": 1, "batch_size": 96}, probe=options)
    reports, pretrained = finish(start(config, IMAGES, tmp_path))
    encoder = pretrained.encoder.eval()

    def features(split: Split) -> Tensor:
        with torch.no_grad():
            return functional.normalize(encoder(split.images.float() / 255).double())

    bank = features(IMAGES.train)

    def right(split: Split) -> float:
        hits = 0
        for row, label in zip(features(split), split.labels, strict=True):
            votes = [0.0] * 3
            for value, neighbour in zip(*(bank @ row).topk(50), strict=True):
                votes[int(IMAGES.train.labels[neighbour])] += math.exp(float(value) / 0.1)
            hits += votes.index(max(votes)) == int(label)
        return hits / len(split)

    said = evaluate(pretrained, IMAGES, config, device=CPU)
    assert said.details["knn_validation_accuracy"] == pytest.approx(right(IMAGES.validation))
    assert said.details["knn_test_accuracy"] == pytest.approx(right(IMAGES.test))
    assert reports[-1].measures["knn_accuracy"] == pytest.approx(right(subset(IMAGES.validation, 10)))
    holdout = evaluate(pretrained, IMAGES, config.model_copy(update={"protocol": "holdout"}), device=CPU)
    assert holdout.details["knn_test_accuracy"] == said.details["knn_test_accuracy"]
    few = config.model_copy(update={"probe": config.probe.model_copy(update={"knn_train": "report"})})
    assert "knn_test_accuracy" not in evaluate(pretrained, IMAGES, few, device=CPU).details


def test_offline_probe_leaves_encoder_and_global_stream_alone(tmp_path: Path) -> None:
    config, pretrained = pretrained_on(IMAGES, tmp_path)
    pretrained.encoder.train()  # it must not be this that the features are made in
    pretrained.encoder.zero_grad()
    before = copy.deepcopy(pretrained.encoder.state_dict())
    stream = torch.get_rng_state()
    first, second = (train_offline(pretrained, IMAGES, config, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), stream)
    after = pretrained.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in pretrained.encoder.parameters())
    assert torch.equal(first.weight, second.weight)
    other = train_offline(pretrained, IMAGES, config.model_copy(update={"seed": 1}), CPU)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_online_probe_goes_on_where_it_was(optimizer: str, stop: int, tmp_path: Path) -> None:
    config = config_of(optimizer={"name": optimizer, "learning_rate": 0.01, "warmup_epochs": 1})
    whole, parted = (CheckpointFolder(tmp_path / name) for name in ("whole", "parted"))
    reports, pretrained = finish(start(config, IMAGES, tmp_path, whole))
    training = start(config, IMAGES, tmp_path, parted)
    for _ in range(stop):
        next(training)
    training.close()
    again, resumed = finish(start(config, IMAGES, tmp_path, parted))
    assert [r.probe_accuracy for r in again] == [r.probe_accuracy for r in reports]
    assert resumed.online is not None
    assert pretrained.online is not None
    for ours, theirs in zip(resumed.online.parameters(), pretrained.online.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (folder.load() for folder in (parted, whole))
    assert ours is not None
    assert theirs is not None
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    states = [saved["optimizer"]["state"] for saved in (ours, theirs)]
    parameters = [place for group in ours["optimizer"]["param_groups"] for place in group["params"]]
    assert states[0].keys() == states[1].keys() == set(parameters), "the probe's two among them"
    for place in parameters:
        assert states[0][place].keys() == states[1][place].keys() != set()
        assert all(torch.equal(value, states[1][place][name]) for name, value in states[0][place].items())
