"""A training stopped inside an epoch goes on from that step as if it had not been stopped, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, assert_same_weights, finish, start, tiny_config, tiny_images, without_timings

from headsearch.config import TrialConfig
from headsearch.core.checkpoint import AsyncCheckpoints, CheckpointFolder
from headsearch.core.control import Verdict
from headsearch.core.pretrain import pretrain
from headsearch.errors import TrainingStopped, TrialFailure

IMAGES = tiny_images()
STEPS = 3
EPOCHS = 3
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"training": {"precision": "bf16"}},
    "dropout": {"head": {"kind": "mlp", "depth": 2, "width": 8, "projection_dim": 4, "dropout": 0.5}},
    "adamw": {"optimizer": {"name": "adamw", "learning_rate": 0.01, "warmup_epochs": 1.5}},
    "lars": {"optimizer": {"name": "lars", "learning_rate": 0.3}},
    "two steps a batch": {"scheme": {"kind": "joint", "steps_per_batch": 2}},
    "same batches": {"scheme": {"kind": "alternating", "head_steps": 2, "batches": "same", "reset_steps": 4}},
    "fresh batches": {"scheme": {"kind": "alternating", "head_steps": 1, "batches": "fresh", "reset_steps": 2}},
    "online probe": {"protocol": "ouyang2025", "head": {"kind": "mlp", "width": 8, "projection_dim": 4}},
    "best epoch kept": {"training": {"keep": "best_validation_loss"}},
}  # fmt: skip


class Scripted:
    """Answers `verdict` at the steps named, counted over the process; saves after `epochs` only."""

    def __init__(self, verdict: Verdict, *steps: int, epochs: tuple[int, ...] = ()) -> None:
        self.verdict, self.steps, self.epochs = verdict, steps, epochs
        self.asked = 0
        self.begun: list[int] = []

    def at_epoch(self, epoch: int) -> None:
        self.begun.append(epoch)

    def at_step(self) -> Verdict:
        self.asked += 1
        return self.verdict if self.asked in self.steps else "go on"

    def at_report(self, epoch: int) -> None:
        assert epoch == self.begun[-1]

    def save_after(self, epoch: int) -> bool:
        return epoch in self.epochs


def controlled(config: TrialConfig, home: Path, folder: CheckpointFolder, control: Any) -> Any:
    """A training as in a worker, whose checkpoints a thread writes."""
    checkpoints = AsyncCheckpoints(folder)
    return pretrain(config, IMAGES, device=CPU, home=home, checkpoints=checkpoints, control=control)


@pytest.mark.parametrize("name", CONFIGS)
def test_stopped_after_any_step_it_goes_on_there(tmp_path: Path, name: str) -> None:
    config = tiny_config(**CONFIGS[name])
    expected, whole = finish(start(config, IMAGES, tmp_path))
    folder = CheckpointFolder(tmp_path / "checkpoints")
    # Between steps there are STEPS - 1 questions an epoch: stopped after each, one after the other.
    for stops in range(EPOCHS * (STEPS - 1)):
        with pytest.raises(TrainingStopped, match=f"in epoch {stops // 2 + 1} after {stops % 2 + 1} steps"):
            finish(controlled(config, tmp_path, folder, Scripted("stop", 1)))
        state = folder.load()
        assert state is not None
        assert (state["epoch"], state["position"]["step"]) == (stops // 2, stops % 2 + 1)
        torch.manual_seed(stops)
        torch.rand(3)
    resumed, trained = finish(controlled(config, tmp_path, folder, Scripted("go on")))
    assert without_timings(resumed) == without_timings(expected)
    assert_same_weights(trained, whole)


def test_saving_inside_an_epoch_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config(**CONFIGS["dropout"])
    expected, whole = finish(start(config, IMAGES, tmp_path))
    folder = CheckpointFolder(tmp_path / "checkpoints")
    control = Scripted("save", 1, 2, 3, 4, 5, 6, epochs=(1,))
    reports, trained = finish(controlled(config, tmp_path, folder, control))
    assert control.begun == [1, 2, 3]
    assert without_timings(reports) == without_timings(expected)
    assert_same_weights(trained, whole)


def test_reports_that_no_checkpoint_holds_are_made_again(tmp_path: Path) -> None:
    """Checkpoints every third epoch: what came after the last one is repeated, the same."""
    config = tiny_config()
    expected, _ = finish(start(config, IMAGES, tmp_path))
    folder = CheckpointFolder(tmp_path / "checkpoints")
    training = controlled(config, tmp_path, folder, Scripted("go on", epochs=(1,)))
    before = [next(training), next(training)]
    training.close()
    state = folder.load()
    assert state is not None
    assert state["epoch"] == 1
    resumed, _ = finish(controlled(config, tmp_path, folder, Scripted("go on")))
    assert without_timings(resumed) == without_timings(expected)
    assert without_timings(before) == without_timings(expected[:2])
    last = folder.load()
    assert last is not None
    assert last["epoch"] == EPOCHS, "the last epoch is always saved"


def test_seconds_before_the_stop_count(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(TrainingStopped):
        finish(controlled(tiny_config(), tmp_path, folder, Scripted("stop", 2)))
    state = folder.load()
    assert state is not None
    spent = state["position"]["seconds"]
    assert spent > 0
    folder.save({**state, "position": {**state["position"], "seconds": spent + 1000}})
    reports, _ = finish(controlled(tiny_config(), tmp_path, folder, Scripted("go on")))
    assert reports[0].train_seconds > spent + 1000
    assert reports[0].views_per_second > 1, "the speed is of the steps of this process"


def test_what_a_control_raises_ends_the_training_without_a_checkpoint(tmp_path: Path) -> None:
    class Strict(Scripted):
        def at_step(self) -> Verdict:
            raise TrialFailure("epoch_time", "too long")

    folder = CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(TrialFailure, match="too long"):
        finish(controlled(tiny_config(), tmp_path, folder, Strict("go on")))
    assert folder.load() is None


def test_a_checkpoint_of_another_kind_of_device_goes_on_with_fresh_draws(tmp_path: Path) -> None:
    """Generators' states do not carry over from a GPU; the step, the loss so far and the weights do."""
    config, folder = tiny_config(), CheckpointFolder(tmp_path / "checkpoints")
    expected, _ = finish(start(config, IMAGES, tmp_path))
    with pytest.raises(TrainingStopped):
        finish(controlled(config, tmp_path, folder, Scripted("stop", 2)))
    state = folder.load()
    assert state is not None
    philox = torch.zeros(16, dtype=torch.uint8)
    folder.save({**state, "position": {**state["position"], "device": "cuda", "views": philox}})
    once, _ = finish(
        controlled(config, tmp_path, CheckpointFolder(tmp_path / "checkpoints"), Scripted("go on"))
    )
    assert [report.epoch for report in once] == [1, 2, 3]
    assert once[0].loss != expected[0].loss
    assert abs(once[0].loss - expected[0].loss) < 1.0
