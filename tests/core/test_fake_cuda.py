"""What a training tells a GPU to do, seen without one: no step waits, and none launches more than it may.

Waiting for the device, or copying from or to it, stops the host from running ahead. Launches are ATen calls that
launch at least one kernel: a small encoder on a GPU is as fast as the host launches. See `fake_cuda` for what is
not seen. Sizes do not matter, since nothing is computed: the sparse systems have all of their latents.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, Calls, counted, fake_cuda, launches
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from headsearch.config import TrialConfig
from headsearch.core import autoencoder, cuda_views, epoch, learner
from headsearch.core.draws import NUMBERS
from headsearch.core.encoders import feature_dim
from headsearch.core.features import (
    build_views,
    extract_features,
    images_at_once,
    resolve_precision,
    views_dtype,
)
from headsearch.core.images import ImageSet, Split
from headsearch.core.learner import build_learner
from headsearch.core.pretrain import Pretrained
from headsearch.core.probe_ouyang2025 import train_offline
from headsearch.core.probe_schliebitz2024 import EPOCHS, train_linear
from headsearch.core.steps import STEPS, Batch
from headsearch.core.views import Views
from headsearch.systems import SYSTEMS

BATCH = 64


class Launcher:
    """Stands in for the kernel of views: notes its launches."""

    shared_bytes, processors = 232_448, 132

    def __init__(self) -> None:
        self.launched = 0

    def launch(self, *_: object, **__: object) -> None:
        self.launched += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """A GPU on which views have their kernel, and a pretrained autoencoder for heads that ask for one."""
    launcher = Launcher()
    monkeypatch.setattr(cuda_views, "load", lambda _: launcher)
    monkeypatch.setattr(learner, "pretrained_embedding", embedding)
    with fake_cuda(monkeypatch):
        yield launcher


@pytest.fixture
def no_kernel(gpu: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without the kernel. A generator of CUDA needs a driver, so numbers come without."""
    monkeypatch.setattr(cuda_views, "load", lambda _: None)

    def draw(self: Views, count: int, _: object, firsts: int | None = None) -> Any:
        uniform = torch.rand(count, NUMBERS, device=self.device)
        return self.distribution.draws(uniform, count if firsts is None else firsts)

    monkeypatch.setattr(Views, "draw", draw)
    monkeypatch.setattr(Views, "stream", lambda *_: None)


def embedding(config: TrialConfig, _: ImageSet, hidden: int, **__: object) -> tuple[nn.Linear, str]:
    return nn.Linear(hidden, config.head.embedding_dim), "key"


def image_set(count: int = 10 * BATCH, size: int = 32) -> ImageSet:
    def split(rows: int) -> Split:
        images = torch.empty(rows, 3, size, size, dtype=torch.uint8, device=CUDA)
        return Split(images, torch.zeros(rows, dtype=torch.int64, device=CUDA))

    names = tuple(str(number) for number in range(10))
    return ImageSet("fake", names, split(count), split(BATCH), split(BATCH), fingerprint="fake")


def configured(**parts: Any) -> TrialConfig:
    tree: dict[str, Any] = {"training": {"batch_size": BATCH, "epochs": 3, "cuda_graph": False}}
    for name, part in parts.items():
        tree[name] = {**tree.get(name, {}), **part} if isinstance(part, dict) else part
    return TrialConfig.model_validate(tree)


class Training:
    """A learner on the GPU, and its steps as an epoch makes them."""

    def __init__(self, config: TrialConfig) -> None:
        self.config, self.images = config, image_set()
        self.learner = build_learner(config, self.images, CUDA, None)
        self.views = build_views(config, self.images, CUDA)
        self.precision = resolve_precision(config.training, CUDA)
        self.stream = self.views.stream(0, "views")
        self.steps = 0
        self.loss: Tensor | None = None

    def pair(self) -> Tensor:
        with torch.no_grad():
            return self.views.pair(self.images.train.images[:BATCH], self.stream)

    def batch(self, pair: Tensor) -> Batch:
        labels = self.images.train.labels[:BATCH]
        return Batch(self.learner, self.precision, pair, labels, self.steps, 10)

    def step(self) -> None:
        self.loss = STEPS[self.config.scheme.kind](self.batch(self.pair()))
        self.steps += 1


def assert_learnt(training: Training) -> None:
    """The steps went through the code: there is a loss, and a gradient for all that is trained."""
    assert training.loss is not None
    assert (training.loss.device, training.loss.dtype, training.loss.ndim) == (CUDA, torch.float32, 0)
    for part in (training.learner.encoder, training.learner.head, training.learner.online):
        for name, weight in part.named_parameters() if part else ():
            assert weight.device == CUDA
            assert (weight.grad is not None) is weight.requires_grad, name


def assert_never_waits(config: TrialConfig, steps: int = 2) -> Training:
    training = Training(config)
    calls = counted(lambda: [training.step() for _ in range(steps)])
    assert not calls.waits()
    assert calls.launches
    assert_learnt(training)
    return training


# What is counted


def test_what_waits_for_the_device_is_seen(gpu: Launcher) -> None:
    here, there = torch.ones(4), torch.ones(4, device=CUDA)
    places = torch.zeros(2, dtype=torch.int64)
    cases: dict[str, tuple[Callable[[], object], int, int]] = {
        "number": (lambda: float(there[0]), 1, 0),
        "condition": (lambda: bool((there > 0).all()), 1, 0),
        "list": (lambda: there.tolist(), 1, 0),
        "rows": (lambda: there.nonzero(), 1, 0),
        "mask": (lambda: there[there > 0], 1, 0),
        "to the host": (lambda: there.cpu(), 0, 1),
        "from the host": (lambda: here.to(CUDA), 0, 1),
        "numbers": (lambda: torch.tensor([1.0, 2.0], device=CUDA), 0, 1),
        "over": (lambda: there.copy_(here), 0, 1),
        "index": (lambda: there[places], 0, 1),
        "computed": (lambda: there + 2.0 * there.sum(), 0, 0),
        "argument": (lambda: there * torch.tensor(2.0), 0, 0),
    }
    for name, (call, reads, copies) in cases.items():
        with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException), Calls() as calls:
            call()
        assert (calls.reads.total(), calls.copies.total()) == (reads, copies), name


def test_what_launches_is_counted(gpu: Launcher) -> None:
    rows = torch.ones(4, 6, device=CUDA)
    assert not launches(lambda: torch.empty_like(rows.T[1:].unsqueeze(0).expand(2, -1, -1)))
    assert launches(lambda: (rows @ rows.T).relu_().sum()) == Counter(mm=1, relu_=1, sum=1)
    assert not launches(lambda: torch.ones(4, 6) + 1)


def test_gradients_are_those_of_autograd() -> None:
    """The walk through the graph in place of autograd's engine, on real numbers."""
    from fake_cuda import gradients

    draw = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(shape, generator=draw, requires_grad=True) for shape in ((5, 3), (4, 3)))
    bias = torch.randn(4, generator=draw, requires_grad=True)
    hidden = nn.functional.linear(rows, weight, bias)
    loss = (hidden.relu() * hidden.exp()).sum() + weight.square().mean() + (hidden.T @ hidden)[0, 1]
    want = torch.autograd.grad(loss, (rows, weight, bias, hidden), retain_graph=True)
    for ours, theirs in zip(gradients(loss, (rows, weight, bias, hidden)), want, strict=True):
        torch.testing.assert_close(ours, theirs)


# No step waits


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_system_waits_in_a_step(name: str, gpu: Launcher) -> None:
    training = assert_never_waits(configured(system=name))
    assert training.precision == "bf16"
    assert gpu.launched == 2


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"training": {"precision": "fp32"}},
    "lars": {"optimizer": {"name": "lars"}},
    "clipped lars": {"optimizer": {"name": "lars", "clip": True}},
    "adamw": {"optimizer": {"name": "adamw", "learning_rate": 1e-3}},
    "views apart": {"system": "lightly", "training": {"encode_views": "apart"}},
    "rows before columns": {"training": {"channels_last": False}},
    "probe trained along": {"protocol": "ouyang2025"},
    "two steps a batch": {"scheme": {"kind": "joint", "steps_per_batch": 2}},
    "alternating": {"scheme": {"kind": "alternating", "head_steps": 2}},
    "previous head": {"scheme": {"kind": "alternating", "encoder_uses": "previous"}},
    "fresh batches": {"protocol": "ouyang2025", "scheme": {"kind": "alternating", "batches": "fresh"}},
    "other optimizer": {
        "scheme": {"kind": "alternating", "head_optimizer": {"name": "adamw", "learning_rate": 1e-3}}
    },
    "dropout": {"system": "dropout", "training": {"precision": "fp32"}},
    "unit length": {"head": {"kind": "linear", "normalize_input": True}},
    "levels": {"head": {"kind": "mlp", "levels": 5, "activation": "gelu"}},
    "penalty": {"objective": {"kind": "nt-xent", "bottleneck_weight": 1e-3}},
    "blurred": {"views": {"blur_probability": 0.5, "solarize_probability": 0.2}},
    "large": {"encoder": {"name": "resnet18"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_waits_in_a_step(name: str, gpu: Launcher) -> None:
    assert_never_waits(configured(**VARIANTS[name]))


@pytest.mark.parametrize("name", ["fp32", "blurred"])
def test_nor_does_a_step_whose_views_have_no_kernel(name: str, no_kernel: None) -> None:
    assert_never_waits(configured(**VARIANTS[name]))


def test_a_head_that_is_drawn_anew_is_copied_to_the_device_and_no_more(gpu: Launcher) -> None:
    config = configured(scheme={"kind": "alternating", "reset_steps": 2})
    training = Training(config)
    weights = len(training.learner.head.state_dict())
    copies = []
    for _ in range(5):
        calls = counted(training.step)
        assert not calls.reads
        copies.append(calls.copies.total())
    assert copies == [0, 0, weights, 0, weights]


@pytest.mark.parametrize("steps", [2, 5])
def test_an_epoch_waits_twice_whatever_its_length(
    steps: int, gpu: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the order of its images, and for its mean loss."""
    monkeypatch.setattr(
        epoch, "streams", lambda *_: contextlib.nullcontext()
    )  # CUDA's global generator needs a driver
    training = Training(configured())
    train = Split(*(part[: steps * BATCH] for part in vars(training.images.train).values()))

    def run() -> None:
        epoch.train_epoch(training.learner, 1, train, training.views, training.precision, warm=True)

    calls = counted(run, answer=1.0)
    assert calls.reads == Counter(_local_scalar_dense=1)
    assert calls.copies == Counter(_to_copy=1)
    assert gpu.launched == steps


# Other loops that train


def test_no_step_of_the_offline_probe_waits(gpu: Launcher) -> None:
    config = configured(protocol="ouyang2025", probe={"offline_epochs": 2})
    dim = feature_dim(config.encoder)

    def trained(steps: int) -> Calls:
        images = image_set(count=256 * steps)
        encoder = build_learner(config, images, CUDA, None).encoder
        pretrained = Pretrained(encoder, nn.Identity(), dim, dim, 0, 0, 0.0, 0.0, None, "bf16")
        return counted(lambda: train_offline(pretrained, images, config, CUDA))

    once, often = trained(1), trained(4)
    assert gpu.launched == 2 * (1 + 4)
    assert not once.reads + often.reads
    assert once.copies == often.copies
    assert once.copies.total() <= 8  # the probe, what the views are made with, and the order of each epoch


@pytest.mark.parametrize("rows", [64, 320])
def test_the_probe_on_test_images_waits_twice_an_epoch(rows: int, gpu: Launcher) -> None:
    def part(count: int) -> tuple[Tensor, Tensor]:
        return torch.empty(count, 16, device=CUDA), torch.zeros(count, dtype=torch.int64, device=CUDA)

    calls = counted(lambda: train_linear(part(rows), part(40), 10, 0), answer=0.5)
    assert calls.reads == Counter(_local_scalar_dense=2 * EPOCHS)
    assert calls.copies.total() == 2 + EPOCHS  # the probe's weights, and each epoch's order


@pytest.mark.parametrize("batches", [2, 6])
def test_an_autoencoder_waits_twice_an_epoch(batches: int, gpu: Launcher) -> None:
    config = configured(autoencoder={"epochs": 3, "batch_size": 32}).autoencoder
    images = image_set(count=32 * batches)
    calls = counted(lambda: autoencoder.train_autoencoder(config, images, 16, 8, CUDA), answer=0.5)
    assert calls.reads == Counter(_local_scalar_dense=3)
    assert calls.copies.total() == 8 + 3


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_features_come_without_waiting(precision: str, gpu: Launcher) -> None:
    training = Training(configured(training={"precision": precision}))
    images = training.images.train.images
    made: list[Tensor] = []
    calls = counted(
        lambda: made.append(
            extract_features(training.learner.encoder, images, training.views, training.precision)
        )
    )
    assert not calls.waits()
    assert (made[0].dtype, made[0].shape, made[0].device) == (torch.float32, (len(images), 128), CUDA)


# How much is launched


def test_views_without_the_kernel(no_kernel: None) -> None:
    assert launches(Training(configured()).pair).total() <= 330
    assert launches(Training(configured(**VARIANTS["blurred"])).pair).total() <= 350


@pytest.mark.parametrize("name", ["fp32", "blurred", "rows before columns"])
def test_views_by_the_kernel(name: str, gpu: Launcher) -> None:
    """The kernel itself, and the counter of its random numbers."""
    training = Training(configured(**VARIANTS[name]))
    made = launches(training.pair)
    assert gpu.launched == 1
    assert made.total() + gpu.launched <= 2


HEADS = {
    "simclr": 55,
    "barlow-twins": 80,
    "ouyang2025-simclr-sparse": 70,
    "ouyang2025-simclr-regularised": 155,
}
"""Launches of head and loss, forward and backward, by system. Of `simclr`'s, 34 are forward."""


@pytest.mark.parametrize(("name", "budget"), HEADS.items())
def test_head_and_loss(name: str, budget: int, gpu: Launcher) -> None:
    training = Training(configured(system=name))
    batch = training.batch(training.pair())
    features = batch.features().detach().requires_grad_()
    made = launches(lambda: batch.loss(features).backward())
    assert budget * 0.8 < made.total() <= budget


@pytest.mark.parametrize("name", ["ouyang2025-simclr-sparse", "ouyang2025-barlow-sparse"])
def test_sparse_heads_neither_scatter_nor_sort_for_their_gradients(name: str, gpu: Launcher) -> None:
    """One sort a selection: it tells which entries each latent has."""
    training = Training(configured(system=name))
    training.step()
    made = launches(training.step)
    assert made["sort"] == 1
    scattering = {
        "index_put_",
        "index_put",
        "_index_put_impl_",
        "index_add_",
        "_embedding_bag_dense_backward",
    }
    assert not scattering & made.keys()


OPTIMIZERS = {"sgd": 2, "adamw": 4, "lars": 26}
"""Launches of a step after the first, for two groups of weights. LARS multiplies a list of tensors by a list of
numbers that are on the device: a GPU makes one launch a weight of each of these calls."""


@pytest.mark.parametrize("encoder", ["small-resnet", "resnet18"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, encoder: str, gpu: Launcher) -> None:
    config = configured(encoder={"name": encoder}, optimizer={"name": name, "clip": name == "lars"})
    training = Training(config)
    training.step()
    assert launches(training.learner.optimizer.step).total() <= OPTIMIZERS[name]


ENCODERS = {"small-resnet": 62, "resnet18": 106}
"""Launches of the forward pass alone."""


@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_beside_its_encoder(name: str, gpu: Launcher) -> None:
    """Views, head, loss and optimizer together launch about as much as a small encoder's forward pass does."""
    training = Training(configured(encoder={"name": name}))
    training.step()
    step, launched = launches(training.step).total(), gpu.launched
    batch = training.batch(training.pair())
    forward = launches(batch.features).total()
    features = batch.features()
    encoder = forward + launches(lambda: features.backward(torch.ones_like(features))).total()
    assert forward <= ENCODERS[name]
    assert step + launched - 1 <= encoder + 62


# Types and sizes on a GPU


def test_views_come_in_what_the_first_convolution_computes_in(gpu: Launcher) -> None:
    assert Training(configured()).pair().dtype == torch.bfloat16
    assert Training(configured(**VARIANTS["fp32"])).pair().dtype == torch.float32
    assert views_dtype(torch.device("cpu"), "bf16") == torch.float32
    plain = Training(configured())
    assert plain.views.plain(plain.images.test.images).dtype == torch.bfloat16


def test_views_in_bf16_save_a_cast_and_change_no_number(gpu: Launcher) -> None:
    training = Training(configured())
    cast = launches(training.batch(training.pair().float()).features)
    assert launches(training.batch(training.pair()).features) == cast - Counter(_to_copy=1)


@pytest.mark.parametrize(
    ("size", "on_cpu", "on_gpu"),
    [(8, 16_384, 16_384), (32, 1024, 1024), (64, 256, 1024), (96, 113, 910), (224, 20, 167), (2048, 1, 2)],
)
def test_images_that_go_through_an_encoder_at_once(size: int, on_cpu: int, on_gpu: int) -> None:
    assert images_at_once(size * size, torch.device("cpu")) == on_cpu
    assert images_at_once(size * size, CUDA) == on_gpu
