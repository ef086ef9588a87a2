"""Training one point, without a database: for debugging a head, and for reproducing a trial."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headsearch.config import TrialConfig
from headsearch.core.device import pick_device
from headsearch.core.feed import placed
from headsearch.core.hardware import set_threads
from headsearch.core.images import load_images
from headsearch.core.memory import keep_memory
from headsearch.core.pretrain import EpochReport, Pretrained, pretrain
from headsearch.core.probe import Evaluation, evaluate
from headsearch.runtime.preflight import check_data
from headsearch.spec import StudySpec
from headsearch.study_file import load_study, one_point


@dataclass(frozen=True)
class SinglePoint:
    """What training one point came to."""

    config: TrialConfig
    device: str
    reports: tuple[EpochReport, ...]
    pretrained: Pretrained
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the networks."""
        trained = {k: v for k, v in vars(self.pretrained).items() if k not in ("encoder", "head", "online")}
        return {
            "config": self.config.model_dump(mode="json"),
            "trained_on": self.config.data.train_on,
            "device": self.device,
            "reports": [asdict(report) for report in self.reports],
            **trained,
            "validation_accuracy": self.evaluation.probe_accuracy,
            **{k: v for k, v in vars(self.evaluation).items() if k not in ("probe_accuracy", "details")},
            **self.evaluation.details,
        }


def point_of(path: Path, overrides: Sequence[str], *, seed: int | None = None) -> TrialConfig:
    """The configuration of one point of a study file.

    `overrides` may name fields of the study (``budget.epochs=4``) and of the trial (``head.width=64``,
    ``training.epochs=0``).

    Raises:
        SpecError: The file or an override is not valid.
    """
    # What is set of the data may change the edition that the study would have. Not so the images trained on,
    # which a study that searches refuses: one training chooses nothing.
    of_study = [
        given
        for given in overrides
        if _top(given) in (*StudySpec.model_fields, "data") and _path(given) != "data.train_on"
    ]
    of_trial = [given for given in overrides if _top(given) not in StudySpec.model_fields]
    # With overrides of the trial, the file's own points are not trained and need not be valid.
    return one_point(load_study(path, of_study, check_points=not of_trial), of_trial, seed=seed)


def _path(override: str) -> str:
    return override.partition("=")[0].strip()


def _top(override: str) -> str:
    return _path(override).split(".")[0]


def train(
    config: TrialConfig,
    *,
    home: Path,
    device: str = "auto",
    threads: int | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Generator[EpochReport, None, SinglePoint]:
    """Yield a report per epoch, then return what the final probe measures.

    `say` gets what is worth a note about the images before the training begins.

    Raises:
        InputError: The device is not there, the data set cannot be used or a batch does not fit it.
        TrialFailure: The training cannot go on.
    """
    set_threads(threads)
    chosen = pick_device(device)
    keep_memory()
    for line in check_data(config.data, config.training.batch_size if config.training.epochs else 0, home):
        say(line)
    images = placed(load_images(config.data, home=home), chosen)
    reports = []
    training = pretrain(config, images, device=chosen, home=home)
    while True:
        try:
            report = next(training)
        except StopIteration as stop:
            pretrained: Pretrained = stop.value
            break
        reports.append(report)
        yield report
    evaluation = evaluate(pretrained, images, config, device=chosen)
    return SinglePoint(config, str(chosen), tuple(reports), pretrained, evaluation)
