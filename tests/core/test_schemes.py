"""Joint and alternating steps, against plain loops that follow their definitions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, finish, start, tiny_config, tiny_images, without_timings

from headsearch.config import TrialConfig
from headsearch.core import reporting
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.epoch import Batch, train_epoch
from headsearch.core.features import build_views
from headsearch.core.learner import Learner, build_learner
from headsearch.core.objectives import nt_xent
from headsearch.core.optimizers import learning_rate
from headsearch.core.probe import evaluate
from headsearch.core.randomness import generator
from headsearch.errors import SpecError, TrialFailure

IMAGES = tiny_images()
STEPS = 3


def config_of(**scheme: Any) -> TrialConfig:
    return tiny_config(scheme=scheme, optimizer={"momentum": 0.5, "weight_decay": 0.0})


def pairs(config: TrialConfig) -> list[torch.Tensor]:
    """The views of the first epoch's batches, drawn as training draws them."""
    order = torch.randperm(96, generator=generator(CPU, config.seed, "shuffle", 1))
    draws, views = generator(CPU, config.seed, "views", 1), build_views(config, IMAGES, CPU)
    return [views.pair(IMAGES.train.images[order[32 * s : 32 * s + 32]], draws) for s in range(STEPS)]


def trained(config: TrialConfig, home: Path) -> Learner:
    learner = build_learner(config, IMAGES, CPU, home)
    train_epoch(learner, 1, IMAGES.train, build_views(config, IMAGES, CPU), "fp32", warm=False)
    return learner


class Plain:
    """SGD with momentum over named parameters, written out."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]

    def step(self, loss: torch.Tensor, rate: float) -> None:
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True)
        with torch.no_grad():
            for p, v, g in zip(self.parameters, self.velocity, gradients, strict=True):
                v.mul_(0.5).add_(g)
                p.sub_(rate * v)


def rate_at(config: TrialConfig, step: int) -> float:
    return learning_rate(config.optimizer, step=step, steps_per_epoch=STEPS, epochs=3, batch_size=32)


def assert_same(learner: Learner, encoder: torch.nn.Module, head: torch.nn.Module, home: Path) -> None:
    """Both came to the same weights, measured by how far they moved.

    Most differ by rounding alone. A ReLU that it switches on one side only turned them by up to 7 % of their
    way; another order or number of steps, by 55 % and more.
    """
    start = build_learner(learner.config, IMAGES, CPU, home)
    for ours, theirs, before in (
        (learner.encoder, encoder, start.encoder),
        (learner.head, head, start.head),
    ):
        way = flat(theirs) - flat(before)
        assert (flat(ours) - flat(theirs)).norm() < 0.15 * way.norm()


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("uses", ["updated", "previous"])
@pytest.mark.parametrize("head_steps", [1, 3])
def test_alternating_on_the_same_batch(uses: str, head_steps: int, tmp_path: Path) -> None:
    config = config_of(kind="alternating", head_steps=head_steps, encoder_uses=uses)
    built = build_learner(config, IMAGES, CPU, tmp_path)
    encoder, head = copy.deepcopy(built.encoder).train(), copy.deepcopy(built.head).train()
    outer, inner = Plain(encoder), Plain(head)
    for step, pair in enumerate(pairs(config)):
        rate = rate_at(config, step)
        features = encoder(pair)
        if uses == "previous":
            outer.step(nt_xent(head(features), 0.5), rate)
        for _ in range(head_steps):
            inner.step(nt_xent(head(features.detach()), 0.5), rate)
        if uses == "updated":
            outer.step(nt_xent(head(features), 0.5), rate)
    assert_same(trained(config, tmp_path), encoder, head, tmp_path)


def test_alternating_on_fresh_batches(tmp_path: Path) -> None:
    config = config_of(kind="alternating", head_steps=1, batches="fresh")
    built = build_learner(config, IMAGES, CPU, tmp_path)
    encoder, head = copy.deepcopy(built.encoder).train(), copy.deepcopy(built.head).train()
    outer, inner = Plain(encoder), Plain(head)
    for step, pair in enumerate(pairs(config)):
        loss = nt_xent(head(encoder(pair)), 0.5)
        (outer if step % 2 else inner).step(loss, rate_at(config, step))
    assert_same(trained(config, tmp_path), encoder, head, tmp_path)


@pytest.mark.parametrize("repeats", [1, 2])
def test_joint_steps_on_each_batch(repeats: int, tmp_path: Path) -> None:
    config = config_of(kind="joint", steps_per_batch=repeats)
    built = build_learner(config, IMAGES, CPU, tmp_path)
    encoder, head = copy.deepcopy(built.encoder).train(), copy.deepcopy(built.head).train()
    both = Plain(encoder, head)
    for step, pair in enumerate(pairs(config)):
        for _ in range(repeats):
            both.step(nt_xent(head(encoder(pair)), 0.5), rate_at(config, step))
    assert_same(trained(config, tmp_path), encoder, head, tmp_path)


def test_views_that_are_encoded_apart_have_batch_statistics_of_their_own(tmp_path: Path) -> None:
    config = config_of(kind="joint").model_copy(
        update={"training": tiny_config(training={"encode_views": "apart"}).training}
    )
    built = build_learner(config, IMAGES, CPU, tmp_path)
    encoder, head = copy.deepcopy(built.encoder).train(), copy.deepcopy(built.head).train()
    both = Plain(encoder, head)
    for step, pair in enumerate(pairs(config)):
        projections = [head(encoder(view)) for view in pair.chunk(2)]
        both.step(nt_xent(torch.cat(projections), 0.5), rate_at(config, step))
    learner = trained(config, tmp_path)
    assert_same(learner, encoder, head, tmp_path)
    norms = [module for module in learner.encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms[0].num_batches_tracked == 2 * STEPS


def test_fresh_batches_must_reach_the_encoder(tmp_path: Path) -> None:
    def begin(head_steps: int) -> None:
        next(start(config_of(kind="alternating", batches="fresh", head_steps=head_steps), IMAGES, tmp_path))

    begin(8)
    with pytest.raises(SpecError, match=r"scheme\.head_steps: 9 steps .* it can be at most 8"):
        begin(9)


def test_head_has_its_own_optimizer(tmp_path: Path) -> None:
    still = config_of(kind="alternating", head_optimizer={"learning_rate": 1e-30, "momentum": 0.0})
    before = build_learner(still, IMAGES, CPU, tmp_path)
    after = trained(still, tmp_path)
    for name, value in before.head.named_parameters():
        assert torch.equal(value, dict(after.head.named_parameters())[name])
    assert not torch.equal(next(before.encoder.parameters()), next(after.encoder.parameters()))


def test_redrawn_head_is_new_each_time_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    config = config_of(kind="alternating", head_steps=2)
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    seen = [next(learner.head.parameters()).detach().clone()]
    for times in (1, 2, 1):
        learner.redraw_head(times)
        seen.append(next(learner.head.parameters()).detach().clone())
    assert torch.equal(seen[1], seen[3])
    assert not any(torch.equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert not learner.head_optimizer.state


def test_reset_happens_after_that_many_encoder_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    number = 0
    original = Batch.features

    def features(self: Batch) -> torch.Tensor:
        nonlocal number
        number = self.number
        return original(self)

    monkeypatch.setattr(Batch, "features", features)
    monkeypatch.setattr(Learner, "redraw_head", lambda _, times: calls.append((number, times)))
    finish(start(config_of(kind="alternating", reset_steps=4), IMAGES, tmp_path))
    assert calls == [(3, 1), (7, 2)]  # nine steps in three epochs; called before steps 4 and 8 have features


@pytest.mark.parametrize(
    "parts",
    [
        {"scheme": {"kind": "alternating", "head_steps": 2, "reset_steps": 2}},
        {"scheme": {"kind": "alternating", "batches": "fresh"}},
        {"objective": {"kind": "barlow-twins", "bottleneck_weight": 1e-3}},
        {"head": {"kind": "mlp", "width": 8, "projection_dim": 4, "dropout": 0.5}},
        {"head": {"kind": "sparse", "latents": 40, "k": 5}, "optimizer": {"name": "lars", "clip": True}},
        {"training": {"keep": "best_validation_loss"}},
        {"protocol": "ouyang2025"},
    ],
    ids=["reset", "fresh", "barlow", "dropout", "sparse", "best", "online"],
)
@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_and_resumed_it_is_the_same(parts: dict[str, Any], stop: int, tmp_path: Path) -> None:
    config = tiny_config(**parts)
    whole, result = finish(start(config, IMAGES, tmp_path))
    folder = CheckpointFolder(tmp_path / "checkpoint")
    training = start(config, IMAGES, tmp_path, folder)
    for _ in range(stop):
        next(training)
    training.close()
    again, resumed = finish(start(config, IMAGES, tmp_path, folder))
    assert without_timings(again) == without_timings(whole)
    for part in ("encoder", "head"):
        ours, theirs = getattr(result, part).state_dict(), getattr(resumed, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.kept_epoch == result.kept_epoch


def test_dropout_leaves_the_global_stream_alone_and_differs_between_epochs(tmp_path: Path) -> None:
    config = tiny_config(head={"kind": "mlp", "width": 8, "projection_dim": 4, "dropout": 0.5})
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    finish(start(config, IMAGES, tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_kept_epoch_has_the_smallest_validation_loss(tmp_path: Path) -> None:
    config = tiny_config(
        training={"keep": "best_validation_loss", "epochs": 5}, optimizer={"learning_rate": 3.0}
    )
    reports, kept = finish(start(config, IMAGES, tmp_path))
    losses = [report.measures["validation_loss"] for report in reports]
    assert kept.kept_epoch == 1 + losses.index(min(losses))
    # the encoder is that epoch's: its validation loss, by hand, over the one whole batch of 32
    with torch.no_grad():
        features = kept.encoder.eval()(build_views(config, IMAGES, CPU).plain(IMAGES.validation.images[:32]))
        projections = kept.head.eval()(features).repeat(2, 1)
    assert float(nt_xent(projections, 0.5)) == pytest.approx(min(losses), rel=1e-5)


def test_online_probe_does_not_touch_the_encoder(tmp_path: Path) -> None:
    """Its loss is part of the step (solo-learn), and no gradient of it may reach the features."""
    plain = finish(start(tiny_config(), IMAGES, tmp_path))[1]
    with_probe = finish(start(tiny_config(protocol="ouyang2025"), IMAGES, tmp_path))[1]
    ours, theirs = plain.encoder.state_dict(), with_probe.encoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert with_probe.online is not None
    assert with_probe.online.weight.abs().sum() > 0


def test_collapse_is_a_trial_failure(tmp_path: Path) -> None:
    # Two levels of a head whose projections start near zero and a huge shift: all projections alike.
    images = tiny_images()
    images.train.images.fill_(7)
    images.validation.images.fill_(7)
    with pytest.raises(TrialFailure) as caught:
        finish(start(tiny_config(), images, tmp_path))
    assert caught.value.reason == "collapsed"


@pytest.mark.parametrize(("levels", "ranks", "fails_at"), [
    (0, [1.0, 2.0, 2.0], 1),
    (6, [1.0, 2.0, 1.0], None),
    (6, [2.0, 1.0, 1.0], 3),
])  # fmt: skip
def test_discretised_projections_may_coincide_for_an_epoch(
    levels: int, ranks: list[float], fails_at: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(ranks)
    monkeypatch.setattr(reporting, "effective_rank", lambda rows: next(found) if rows.shape[1] == 4 else 5.0)
    head = {"kind": "mlp", "width": 8, "projection_dim": 4, "levels": levels}
    folder, failed_at = CheckpointFolder(tmp_path / "checkpoint"), None
    for epoch in (1, 2, 3):  # taken up again after every epoch
        training = start(tiny_config(head=head), IMAGES, tmp_path, folder)
        try:
            for _ in range(epoch):
                next(training)
        except TrialFailure:
            failed_at = epoch
            break
        training.close()
    assert failed_at == fails_at


@pytest.mark.parametrize("stop", [0, 2])
def test_kept_epoch_has_its_own_online_probe(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(reporting.Reporter, "_validation_loss", lambda _: next(losses))
    config = tiny_config(protocol="ouyang2025", training={"keep": "best_validation_loss"},
                         probe={"online_learning_rate": 3.0, "offline_epochs": 1})  # fmt: skip
    folder, saved = CheckpointFolder(tmp_path / "checkpoint"), []
    training = start(config, IMAGES, tmp_path, folder)
    for _ in range(stop):
        next(training)
        saved.append(folder.load()["online"])
    training.close()
    reports, kept = finish(start(config, IMAGES, tmp_path, folder))
    assert kept.kept_epoch == 2
    if stop:
        assert all(torch.equal(value, saved[1][name]) for name, value in kept.online.state_dict().items())
    assert evaluate(kept, IMAGES, config, device=CPU).probe_accuracy == reports[1].probe_accuracy
