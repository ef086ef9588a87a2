"""What `headsearch bench` measures: shapes and meaning, not numbers, which are the machine's."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import pytest
import torch
from networks import CPU, tiny_config, tiny_images

from headsearch.config import TrialConfig
from headsearch.core import benchmark
from headsearch.core import stages as stages_module
from headsearch.core.benchmark import measure, noise
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.features import build_views
from headsearch.core.learner import build_learner
from headsearch.core.memory import PeakMemory
from headsearch.core.reporting import Reporter
from headsearch.core.stages import Measure, Stages, seconds_of
from headsearch.errors import SpecError


def make_stages(tmp_path, **tree):
    config, images = tiny_config(**tree), tiny_images()
    learner = build_learner(config, images, CPU, tmp_path)
    return Stages(learner, images.train, build_views(config, images, CPU), "fp32")


def weights(module):
    return copy.deepcopy(module.state_dict())


def same(before, module):
    return all(before[name].equal(value) for name, value in module.state_dict().items())


def test_a_measure_is_median_and_range():
    assert Measure.of([3.0, 1.0, 2.0]) == Measure(2.0, 1.0, 3.0)


def test_the_limit_is_the_encoders_passes_and_moves_nothing(tmp_path, monkeypatch):
    stages = make_stages(tmp_path)
    passes = []
    first = next(stages.learner.encoder.parameters())
    stages.learner.encoder.register_forward_hook(lambda *_: passes.append("forward"))
    first.register_post_accumulate_grad_hook(lambda _: passes.append("backward"))
    learned = {name: p.detach().clone() for name, p in stages.learner.encoder.named_parameters()}
    stages.encoder(3)
    # Both views at once, as this configuration trains.
    assert passes == ["forward", "backward"] * 3
    assert all(learned[name].equal(p) for name, p in stages.learner.encoder.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stages.learner.encoder.parameters())


def test_an_epoch_trains_and_its_views_differ_from_the_last(tmp_path):
    stages = make_stages(tmp_path)
    before, seen = weights(stages.learner.encoder), []
    stages.learner.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    stages.epoch(2)
    stages.epoch(2)
    assert len(seen) == 4
    assert not any(seen[0].equal(other) for other in seen[1:])
    assert not same(before, stages.learner.encoder)


def test_more_steps_than_an_epoch_has_are_several_epochs(tmp_path):
    stages = make_stages(tmp_path)
    per_epoch = len(stages.train) // stages.batch_size
    epochs = stages.epochs
    stages.epoch(3 * per_epoch)
    assert stages.epochs == epochs + 3


@pytest.mark.parametrize("scheme", [{"kind": "joint"}, {"kind": "alternating", "head_steps": 2}])
def test_steps_of_the_optimizer_change_no_weight(tmp_path, scheme):
    stages = make_stages(tmp_path, scheme=scheme)
    before = weights(stages.learner.encoder), weights(stages.learner.head)
    stages.head(1)
    stages.optimizer(3)
    assert same(before[0], stages.learner.encoder)
    assert same(before[1], stages.learner.head)


def test_the_heads_stage_leaves_the_encoder_alone(tmp_path):
    stages = make_stages(tmp_path)
    stages.learner.encoder.zero_grad()
    called = []
    stages.learner.encoder.register_forward_hook(lambda *_: called.append(1))
    stages.head(2)
    assert called == []
    assert all(p.grad is None for p in stages.learner.encoder.parameters())
    assert all(p.grad is not None for p in stages.learner.head.parameters())


def test_the_heads_stage_keeps_its_features_when_an_encoder_uses_its_memory_again(tmp_path):
    """As one does that is compiled with CUDA graphs: each call overwrites what the last one returned."""
    config, images = tiny_config(), tiny_images()
    learner = build_learner(config, images, CPU, tmp_path)
    last = []

    def encode(views):
        for features in last:
            features.data.fill_(torch.nan)
        last[:] = [learner.encoder(views)]
        return last[0]

    learner.encode = encode
    stages = Stages(learner, images.train, build_views(config, images, CPU), "fp32")
    stages.encoder(1)
    stages.head(1)
    assert stages.features.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in learner.head.parameters())


def test_a_saved_learner_can_be_loaded(tmp_path):
    stages = make_stages(tmp_path)
    folder = CheckpointFolder(tmp_path / "there")
    stages.save(folder)
    assert folder.load()["encoder"].keys() == stages.learner.encoder.state_dict().keys()


def test_each_repeat_has_its_own_share(tmp_path, monkeypatch):
    """The share is the median of ratios within a round, not the ratio of medians."""
    times = {"epoch": iter([4.0, 9.0, 5.0]), "encoder": iter([2.0, 9.0, 4.0])}

    def told(call, device):
        call()
        return next(times.get(getattr(call, "func", call).__name__, iter([1.0])))

    monkeypatch.setattr(benchmark, "seconds_of", told)
    monkeypatch.setattr(benchmark, "_steps", lambda *_: 1)
    found = measure(
        tiny_config(), tiny_images(), device=CPU, home=tmp_path, repeats=3, seconds=0.0, probe=False
    )
    assert (found.share.median, found.share.low, found.share.high) == (0.8, 0.5, 1.0)
    assert found.step_seconds == 5.0
    assert found.probe_seconds is None


@pytest.mark.parametrize("tree", [{}, {"head": {"kind": "autoencoder"}}, {"protocol": "ouyang2025"}])
def test_everything_is_measured_on_real_parts(tmp_path, tree):
    images = tiny_images()
    config = tiny_config(**tree)
    found = measure(config, images, device=CPU, home=tmp_path, repeats=2, seconds=0.01, probe=True)
    assert found.training.low <= found.training.median <= found.training.high
    assert set(found.stages) == {"encoder", "views", "head and loss", "optimizer"}
    assert (
        min(*found.stages.values(), found.report_seconds, found.checkpoint_seconds, found.probe_seconds) > 0
    )
    assert found.epoch_seconds == found.step_seconds * (len(images.train) // config.training.batch_size)
    assert found.report_images == config.probe.report_images + len(images.validation)
    assert found.peak_bytes is None or found.peak_bytes > 1 << 20
    assert list((tmp_path / "checkpoints").iterdir()) == [], "nothing is left on the disk"


def test_a_whole_trial_is_timed_from_its_second_epoch_to_its_last_checkpoint(tmp_path, monkeypatch):
    """Real training, reports and files; a slow disk and a slow report must show in what is not steps."""
    save, report = CheckpointFolder.save, Reporter.measure
    monkeypatch.setattr(CheckpointFolder, "save", lambda *given: (time.sleep(0.5), save(*given))[1])
    monkeypatch.setattr(Reporter, "measure", lambda *given: (time.sleep(0.3), report(*given))[1])
    found = measure(
        tiny_config(),
        tiny_images(),
        device=CPU,
        home=tmp_path,
        repeats=1,
        seconds=0.0,
        probe=False,
        trial=True,
    ).trial
    assert 0.8 <= found.rest_seconds <= found.seconds
    assert found.rest_share == found.rest_seconds / found.bare_seconds
    assert found.share == found.bare_seconds / found.seconds < 1


@pytest.mark.hostile
def test_reports_and_checkpoints_take_at_most_a_twentieth_of_the_encoders_time(tmp_path):
    """As many images as CIFAR-10 leaves for training; everything measured in one run."""
    config = TrialConfig.model_validate({"encoder": {"name": "small-resnet"}})
    found = measure(
        config,
        noise(45_000, 32),
        device=CPU,
        home=tmp_path,
        repeats=1,
        seconds=0.0,
        probe=False,
        trial=True,
    ).trial
    assert found.rest_share <= 0.05


def test_a_batch_that_does_not_fit_is_refused(tmp_path):
    config = tiny_config(training={"batch_size": 128, "epochs": 1})
    with pytest.raises(SpecError, match="batch_size: 128 is more than the 96 training images"):
        measure(config, tiny_images(), device=CPU, home=tmp_path, repeats=1, seconds=0.0, probe=False)


def test_noise_has_all_classes_in_every_split():
    images = noise(90, 8)
    assert [len(split) for split in (images.train, images.validation, images.test)] == [90, 10, 18]
    for split in (images.train, images.validation, images.test):
        assert set(split.labels.tolist()) == set(range(10))
    assert not images.train.images[:10].equal(images.validation.images)


def test_the_peak_is_of_what_is_inside():
    with PeakMemory(CPU) as quiet:
        pass
    with PeakMemory(CPU) as loud:
        torch.ones(64 << 20)
    if quiet.found is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert loud.found - quiet.found > 200 << 20
    with PeakMemory(CPU) as again:
        pass
    assert again.found < loud.found


def test_a_call_is_timed(monkeypatch):
    ticks = iter([1.0, 3.5])
    monkeypatch.setattr(stages_module.time, "perf_counter", lambda: next(ticks))
    assert seconds_of(lambda: None, CPU) == 2.5


def test_memory_that_is_kept_is_not_asked_for_again():
    """In a process of its own: it stays so for good."""
    code = (
        "import resource, torch\n"
        "from headsearch.core.memory import free_memory, keep_memory\n"
        "def asked():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5):\n"
        "        torch.zeros(16 << 20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first, kept = asked(), keep_memory()\n"
        "second = min(asked() for _ in range(5))\n"
        "free_memory(torch.device('cpu'))\n"
        "print(first, kept, second, asked())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, kept, second, freed = done.stdout.split()
    if kept == "False":
        pytest.skip("another C library than glibc")
    assert int(second) < int(first) / 100
    assert int(freed) > 100 * int(second)
