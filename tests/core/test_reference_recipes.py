"""Twenty training steps of each recipe against its source's step, written anew; the views are given.

Networks are functions of named tensors, batch norm and losses are written out, the optimizers go tensor by
tensor. What is compared is where the weights are, and how far they have come: the second finds a rule that is
only a little wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from headsearch.config import TrialConfig
from headsearch.core.epoch import STEPS, Batch
from headsearch.core.images import ImageSet, Split
from headsearch.core.learner import Learner, build_learner
from headsearch.recipes import RECIPES

COUNT, CLASSES = 20, 4
LARS_STEPS, SGD_STEPS = 100, 10
"""Steps of an epoch: LARS is in its warm-up all along, SGD's cosine has its second rate."""
SMALL = 4
"""Batch of the recipes with SGD here, which sets their rates: at their own, so few images throw the network
about, and rounding grows to what is compared."""
Weights = dict[str, Tensor]
Rule = Callable[["Source", str, Tensor, Tensor, int], None]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Batch norm in training; a norm without offset has no ``bias``."""
    dims = [0] if x.ndim == 2 else [0, 2, 3]
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    y = (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"].view(shape)
    return y + w[f"{name}.bias"].view(shape) if f"{name}.bias" in w else y


def resnet(x: Tensor, w: Weights, *, padding: int | None, blocks: tuple[int, ...], first: bool) -> Tensor:
    """He et al. 2016 with basic blocks: a 3x3 stem of this padding, or 7x7 with pooling where it is None.

    The first block of a stage has a projection shortcut: of the first stage only if `first`.
    """
    if padding is None:
        x = F.max_pool2d(
            F.relu(norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), w, "bn1")), 3, 2, padding=1
        )
    else:
        x = F.relu(norm(F.conv2d(x, w["conv1.weight"], padding=padding), w, "bn1"))
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, w[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(F.relu(norm(y, w, f"{at}.bn1")), w[f"{at}.conv2.weight"], padding=1)
            y = norm(y, w, f"{at}.bn2")
            if block == 0 and (stage > 1 or first):
                x = norm(F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=stride), w, f"{at}.downsample.1")
            x = F.relu(y + x)
    return x.mean((2, 3))


def mlp(h: Tensor, w: Weights, *layers: str) -> Tensor:
    """Layers by kind and place in the head: ``linear0 norm1 relu linear3``."""
    for layer in layers:
        if layer == "relu":
            h = h.clamp(min=0)
        elif layer.startswith("norm"):
            h = norm(h, w, layer[4:])
        else:
            h = h @ w[f"{layer[6:]}.weight"].T
            h = h + w[f"{layer[6:]}.bias"] if f"{layer[6:]}.bias" in w else h
    return h


def nt_xent(a: Tensor, b: Tensor, temperature: float, scale: float) -> Tensor:
    """Chen et al. 2020, equation 1, over both views; google-research/simclr adds two means: `scale` 2."""
    z = torch.cat([a, b])
    z = z / z.square().sum(1, keepdim=True).sqrt()
    chances = (z @ z.T / temperature).exp() * (1 - torch.eye(len(z), dtype=z.dtype))
    positive = torch.cat([chances.diagonal(len(a)), chances.diagonal(-len(a))])
    return scale * (chances.sum(1) / positive).log().mean()


def barlow(a: Tensor, b: Tensor, weight: float, scale: float) -> Tensor:
    """Zbontar et al. 2021: standardised with the biased deviation and 1e-5, as an affine-free batch norm."""
    a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (a, b))
    correlation = a.T @ b / len(a)
    diagonal = correlation.diagonal()
    off = correlation.square().sum() - diagonal.square().sum()
    return scale * ((1 - diagonal).square().sum() + weight * off)


@dataclass
class Source:
    """A recipe's network, loss and update, as its source has them."""

    encoder: Callable[[Tensor, Weights], Tensor]
    head: Callable[[Tensor, Weights], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    rule: Rule
    peak: float
    epochs: int
    decay: float
    apart: bool = True
    classifier: float | None = None
    """Peak of the online classifier's rate."""
    velocity: dict[str, Tensor] | None = None

    def step(self, weights: dict[str, Weights], pair: Tensor, labels: Tensor, number: int) -> None:
        """Make one step; `weights` of encoder, head and perhaps classifier change in place."""
        leaves = {f"{part}/{name}": value for part, group in weights.items() for name, value in group.items()}
        for value in leaves.values():
            value.requires_grad_()
        a, b = pair.chunk(2)
        if self.apart:
            features = [self.encoder(view, weights["encoder"]) for view in (a, b)]
            projections = [self.head(h, weights["head"]) for h in features]
        else:
            both = self.encoder(pair, weights["encoder"])
            features, projections = list(both.chunk(2)), list(self.head(both, weights["head"]).chunk(2))
        loss = self.loss(*projections)
        if self.classifier is not None:
            for h in features:
                logits = h.detach() @ weights["online"]["weight"].T + weights["online"]["bias"]
                chosen = logits.log_softmax(1)[torch.arange(len(labels)), labels]
                loss = loss - chosen.mean() / 2
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        self.velocity = self.velocity or {}
        with torch.no_grad():
            for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
                value.requires_grad_(False)
                self.rule(self, name, value, gradient, number)


def solo_lars(source: Source, name: str, w: Tensor, g: Tensor, number: int) -> None:
    """solo-learn: warm-up over 10 epochs from 3e-5 for every group, LARS with clip, eta .02, no 1-d tensor."""
    peak = source.classifier if name.startswith("online/") else source.peak
    assert peak is not None
    assert source.velocity is not None
    lr = 3e-5 + number * (peak - 3e-5) / (10 * LARS_STEPS - 1)
    decay = 0.0 if name.startswith("online/") else source.decay
    if w.ndim != 1 and w.norm() != 0 and g.norm() != 0:
        rate = 0.02 * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
        g = (g + decay * w) * min(float(rate) / lr, 1.0)
    v = 0.9 * source.velocity.get(name, torch.zeros_like(w)) + g
    source.velocity[name] = v
    w -= lr * v


def google_lars(source: Source, name: str, w: Tensor, g: Tensor, number: int) -> None:
    """google-research: warm-up over 10 epochs from 0, rate in the velocity, eta .001, norms and biases plain."""
    assert source.velocity is not None
    lr, trust = source.peak * number / (10 * LARS_STEPS), 1.0
    if w.ndim > 1:
        g = g + source.decay * w
        if w.norm() > 0 and g.norm() > 0:
            trust = float(0.001 * w.norm() / g.norm())
    v = 0.9 * source.velocity.get(name, torch.zeros_like(w)) + lr * trust * g
    source.velocity[name] = v
    w -= v


def epoch_sgd(floor: float) -> Rule:
    """Make torch's SGD with momentum and decay on everything, its rate a cosine by the epoch to `floor` of it."""

    def rule(source: Source, name: str, w: Tensor, g: Tensor, number: int) -> None:
        assert source.velocity is not None
        share = (number // SGD_STEPS) / source.epochs
        lr = source.peak * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)
        g = g + source.decay * w
        v = 0.9 * source.velocity[name] + g if name in source.velocity else g
        source.velocity[name] = v
        w -= lr * v

    return rule


BLOCKS = (1, 1, 1, 1)
"""In each stage: the recipes' own depth, 18 or 34 layers, changes nothing about a step but its time."""


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(weights: None, progress: bool) -> nn.Module:
        assert weights is None
        assert not progress
        return ResNet(BasicBlock, list(BLOCKS))

    for name in ("resnet18", "resnet34"):
        monkeypatch.setattr(torchvision.models, name, build)


def network(padding: int | None, *, first: bool = False) -> Any:
    return lambda x, w: resnet(x, w, padding=padding, blocks=BLOCKS, first=first)


def head(*layers: str) -> Any:
    return lambda h, w: mlp(h, w, *layers)


TWO_LAYERS = head("linear0", "relu", "linear2")
BARLOW = head("linear0", "norm1", "relu", "linear3", "norm4", "relu", "linear6")


def solo(peak: float, classifier: float, *, epochs: int, padding: int | None, loss: str) -> Source:
    return Source(
        network(padding), BARLOW if loss == "barlow" else TWO_LAYERS,
        (lambda a, b: barlow(a, b, 0.0051, 0.1)) if loss == "barlow" else (lambda a, b: nt_xent(a, b, 0.2, 1.0)),
        solo_lars, peak, epochs, 1e-4, classifier=classifier,
    )  # fmt: skip


SOURCES: dict[str, Callable[[], Source]] = {
    "schliebitz2024": lambda: Source(
        network(None), TWO_LAYERS, lambda a, b: nt_xent(a, b, 0.5, 1.0), epoch_sgd(1 / 50),
        0.3 * SMALL / 256, 150, 1e-5,
    ),
    "ouyang2025-simclr-cifar": lambda: solo(0.4, 0.1, epochs=200, padding=2, loss="nt-xent"),
    "ouyang2025-barlow-cifar": lambda: solo(0.3, 0.15, epochs=200, padding=2, loss="barlow"),
    "ouyang2025-simclr-imagenet100": lambda: solo(0.3, 0.1, epochs=100, padding=None, loss="nt-xent"),
    "ouyang2025-barlow-imagenet100": lambda: solo(0.6, 0.2, epochs=100, padding=None, loss="barlow"),
    "google-research-cifar10": lambda: Source(
        network(1, first=True),
        head("linear0", "norm1", "relu", "linear3", "norm4", "relu", "linear6", "norm7"),
        lambda a, b: nt_xent(a, b, 0.5, 2.0), google_lars, 2.0, 1000, 1e-4, apart=False,
    ),
    "solo-learn-cifar": lambda: solo(0.4, 0.1, epochs=1000, padding=2, loss="nt-xent"),
    "lightly-cifar10": lambda: Source(
        network(1), head("linear0", "norm1", "relu", "linear3", "norm4"),
        lambda a, b: nt_xent(a, b, 0.5, 1.0), epoch_sgd(0.0), 0.06 * SMALL / 128, 200, 5e-4,
    ),
    "dkobak-cifar10": lambda: Source(
        network(1), TWO_LAYERS, lambda a, b: nt_xent(a, b, 0.5, 1.0), epoch_sgd(0.0), 0.06 * SMALL / 256, 100, 5e-4,
    ),
}  # fmt: skip


def views_of(step: int, name: str) -> tuple[Tensor, Tensor]:
    """Two views of images with a coarse pattern each, and labels; larger for a stem that shrinks them."""
    side = 32 if RECIPES[name].tree["encoder"]["stem"] == "imagenet" else 8
    count = 6
    draw = torch.Generator().manual_seed(step)
    coarse = torch.rand(count, 3, 4, 4, generator=draw).repeat(2, 1, 1, 1)
    smooth = F.interpolate(coarse, size=side, mode="bilinear")
    noise = torch.randn(2 * count, 3, side, side, generator=draw)
    return smooth * 2 - 1 + 0.2 * noise, torch.randint(CLASSES, (count,), generator=draw)


def image_set() -> ImageSet:
    empty = Split(torch.zeros(CLASSES, 3, 8, 8, dtype=torch.uint8), torch.arange(CLASSES))
    return ImageSet("cifar10", tuple("abcd"), empty, empty, empty, "none")


def trained(learner: Learner, steps: int) -> Learner:
    learner.encoder.train()
    learner.head.train()
    name = str(learner.config.recipe)
    an_epoch = LARS_STEPS if learner.config.optimizer.name == "lars" else SGD_STEPS
    for step in range(steps):
        pair, labels = views_of(step, name)
        batch = Batch(learner, "fp32", pair.double(), labels, step, an_epoch)
        # Losses too are of float64: 20 steps on few images amplify the rounding of float32.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", Tensor.double)
            STEPS[learner.config.scheme.kind](batch)
    return learner


def of(module: nn.Module) -> Weights:
    names = {
        name.removeprefix("network."): p.detach().double().clone() for name, p in module.named_parameters()
    }
    return {name.removeprefix("layers."): value for name, value in names.items()}


def parts(learner: Learner) -> Iterator[tuple[str, Weights]]:
    for name in ("encoder", "head", "online"):
        if (module := getattr(learner, name)) is not None:
            yield name, of(module)


def flat(weights: Weights) -> Tensor:
    return torch.cat([value.flatten() for value in weights.values()]).double()


def learner_of(name: str, tmp_path: Any, **changes: Any) -> Learner:
    recipe = RECIPES[name]
    batch = {} if recipe.tree["optimizer"]["name"] == "lars" else {"batch_size": SMALL}
    classifies = SOURCES[name]().classifier is not None
    config = TrialConfig.model_validate(
        {
            "recipe": name,
            "protocol": "ouyang2025" if classifies else "holdout",
            "encoder": {"pretrained": False},  # as they were drawn: the step is the same
            "training": {"epochs": recipe.epochs, "channels_last": False, **batch},
            **changes,
        }
    )
    learner = build_learner(config, image_set(), torch.device("cpu"), tmp_path)
    for network in (learner.encoder, learner.head, learner.online):
        if network is not None:
            network.double()
    return learner


def test_every_recipe_has_a_source() -> None:
    assert SOURCES.keys() >= RECIPES.keys()


@pytest.mark.slow
@pytest.mark.hostile
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps(name: str, tmp_path: Any) -> None:
    learner = learner_of(name, tmp_path)
    start = dict(parts(learner))
    theirs = {part: {key: value.clone() for key, value in group.items()} for part, group in start.items()}
    source = SOURCES[name]()
    for step in range(COUNT):
        pair, labels = views_of(step, name)
        source.step(theirs, pair.double(), labels, step)
    ours = dict(parts(trained(learner, COUNT)))
    for part in ours:
        got, want, before = flat(ours[part]), flat(theirs[part]), flat(start[part])
        moved = float((want - before).norm())
        assert moved > 1e-5 * float(before.norm()), part
        assert float((got - want).norm()) < 1e-3 * float(want.norm()), part
        assert float((got - want).norm()) < 0.01 * moved, part


@pytest.mark.slow
@pytest.mark.hostile
@pytest.mark.timeout(1200)
def test_a_rule_that_is_a_little_wrong_is_found(tmp_path: Any) -> None:
    """The former form of LARS, over the same 20 steps."""
    name = "solo-learn-cifar"
    learner = learner_of(name, tmp_path, optimizer={"lars_form": "you2017"})
    theirs = dict(parts(learner_of(name, tmp_path)))
    start, source = dict(parts(learner)), SOURCES[name]()
    for step in range(COUNT):
        pair, labels = views_of(step, name)
        source.step(theirs, pair.double(), labels, step)
    ours = dict(parts(trained(learner, COUNT)))
    moved = float((flat(theirs["encoder"]) - flat(start["encoder"])).norm())
    assert float((flat(ours["encoder"]) - flat(theirs["encoder"])).norm()) > 0.1 * moved
