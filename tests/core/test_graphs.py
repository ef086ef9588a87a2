"""A recorded step is the step: only what is filled in before a replay may differ from one to the next."""

from __future__ import annotations

import itertools
import logging

import pytest
import replayed
from networks import CPU, assert_same_weights, finish, start, tiny_config, tiny_images, without_timings

from headsearch.core import graphs
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.control import EveryEpoch
from headsearch.core.features import build_views
from headsearch.core.learner import build_learner
from headsearch.core.pretrain import pretrain
from headsearch.core.stages import Stages
from headsearch.errors import TrainingStopped

IMAGES = tiny_images()
GRAPHED = {"training": {"cuda_graph": True}}
CONFIGS = {
    "sgd": {"optimizer": {"warmup_epochs": 1.0}},
    "lars": {"optimizer": {"name": "lars", "learning_rate": 0.3, "weight_decay": 0.01}},
    "lars with clipping from a rate of 0": {
        "optimizer": {"name": "lars", "clip": True, "trust_coefficient": 0.02, "warmup_epochs": 1.0}
    },
    "adamw": {"optimizer": {"name": "adamw", "learning_rate": 0.01}},
    "two steps a batch": {"scheme": {"kind": "joint", "steps_per_batch": 2}},
    "online probe": {"protocol": "ouyang2025"},
    "dropout": {"head": {"kind": "mlp", "width": 8, "projection_dim": 4, "dropout": 0.5}},
    "frozen layer": {"head": {"kind": "mlp", "width": 8, "projection_dim": 4, "frozen": True}},
}


def without_graph(tree):
    return tiny_config(**tree)


def with_graph(tree):
    return tiny_config(**{**tree, "training": {**tree.get("training", {}), "cuda_graph": True}})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_training_equals_one_made_step_by_step(tmp_path, monkeypatch, name):
    plain = finish(start(without_graph(CONFIGS[name]), IMAGES, tmp_path))
    made = replayed.install(monkeypatch)
    recorded = finish(start(with_graph(CONFIGS[name]), IMAGES, tmp_path))
    assert without_timings(recorded[0]) == without_timings(plain[0])
    assert_same_weights(recorded[1], plain[1])
    (graph,) = made
    assert (graph.warmed, graph.replays) == (graphs.WARM_STEPS, 3 * 3 - graphs.WARM_STEPS)


def test_a_recorded_training_goes_on_from_any_step_to_the_bit(tmp_path, monkeypatch):
    replayed.install(monkeypatch)
    config = with_graph({"head": {"kind": "mlp", "width": 8, "projection_dim": 4, "dropout": 0.5}})
    expected, whole = finish(start(config, IMAGES, tmp_path))

    class StopAt(EveryEpoch):
        def __init__(self, step: int) -> None:
            self.left = step

        def at_step(self):
            self.left -= 1
            return "go on" if self.left else "stop"

    for step in (1, 4, 5, 6):
        folder = CheckpointFolder(tmp_path / str(step))
        with pytest.raises(TrainingStopped):
            finish(
                pretrain(config, IMAGES, device=CPU, home=tmp_path, checkpoints=folder, control=StopAt(step))
            )
        state = folder.load()
        assert all(type(group["lr"]) is float for group in state["optimizer"]["param_groups"])
        reports, pretrained = finish(start(config, IMAGES, tmp_path, folder))
        assert without_timings(reports) == without_timings(expected)
        assert_same_weights(pretrained, whole)


def test_two_recorded_trainings_are_equal_to_the_bit(tmp_path, monkeypatch):
    replayed.install(monkeypatch)
    first, second = (finish(start(with_graph({}), IMAGES, tmp_path)) for _ in range(2))
    assert without_timings(first[0]) == without_timings(second[0])
    assert_same_weights(first[1], second[1])


def test_each_replay_has_its_own_batch_rate_and_views(tmp_path, monkeypatch):
    """What is filled in is really read: same batch, same rate or same views would show here."""
    made = replayed.install(monkeypatch)
    config = with_graph({})
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    views = build_views(config, IMAGES, CPU)
    step = graphs.graphed_step(learner, views, "fp32")
    assert step is graphs.graphed_step(learner, views, "fp32"), "one graph for all epochs"
    seen, rates = [], []
    learner.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    learner.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(float(optimizer.param_groups[0]["lr"]))
    )
    images, labels = IMAGES.train.images[:32], IMAGES.train.labels[:32]
    for number in range(graphs.WARM_STEPS):
        step(images, labels, number, 3)
    step(images, labels, 3, 3)
    place = step._images.data_ptr()
    step(images, labels, 4, 3)
    step(IMAGES.train.images[32:64], labels, 5, 3)
    assert step._images.data_ptr() == place
    assert made[0].replays == 3
    assert all(not one.equal(other) for one, other in itertools.pairwise(seen))
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 6
    assert step._images.equal(IMAGES.train.images[32:64])


def test_where_recording_fails_steps_are_made_one_by_one(tmp_path, monkeypatch, caplog):
    plain = finish(start(without_graph({}), IMAGES, tmp_path))
    made = replayed.install(monkeypatch, fails=True)
    with caplog.at_level(logging.WARNING, logger=graphs.__name__):
        ours = finish(start(with_graph({}), IMAGES, tmp_path))
    assert without_timings(ours[0]) == without_timings(plain[0])
    assert_same_weights(ours[1], plain[1])
    assert made[0].replays == 0
    assert [record.message for record in caplog.records] == [
        "training.cuda_graph: the step could not be recorded, operation not permitted when stream is capturing"
    ], "once"


def test_on_a_cpu_nothing_is_recorded(tmp_path):
    plain = finish(start(without_graph({}), IMAGES, tmp_path))
    ours = finish(start(with_graph({}), IMAGES, tmp_path))
    assert without_timings(ours[0]) == without_timings(plain[0])


def test_a_recorded_training_is_measured_beside_recorded_parts(tmp_path, monkeypatch):
    made = replayed.install(monkeypatch)
    config = with_graph({})
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    stages = Stages(learner, IMAGES.train, build_views(config, IMAGES, CPU), "fp32")
    step, *parts = made
    before = step.replays
    assert before > 0, "warm before anything is timed"
    for part in (stages.encoder, stages.make_views, stages.head, stages.optimizer):
        part(4)
    assert ([each.replays for each in parts], step.replays) == ([4, 4, 4, 4], before)
    stages.epoch(3)
    assert ([each.replays for each in parts], step.replays) == ([4, 4, 4, 4], before + 3)


@pytest.mark.parametrize(
    "tree", [{"scheme": {"kind": "alternating"}}, {"training": {"compile_encoder": "default"}}]
)
def test_steps_that_are_not_alike_and_compiled_encoders_have_no_graph(tmp_path, monkeypatch, tree):
    made = replayed.install(monkeypatch)
    config = with_graph(tree)
    learner = build_learner(config, IMAGES, CPU, tmp_path)
    assert graphs.graphed_step(learner, build_views(config, IMAGES, CPU), "fp32") is None
    assert made == []
