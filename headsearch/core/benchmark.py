"""How near a training comes to its encoder's own speed on this machine, and where the rest goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from headsearch.config import TrialConfig
from headsearch.core.checkpoint import AsyncCheckpoints, CheckpointFolder
from headsearch.core.control import EveryEpoch
from headsearch.core.encoders import feature_dim
from headsearch.core.features import Precision, build_views, resolve_precision
from headsearch.core.hardware import processor
from headsearch.core.heads import head_facts
from headsearch.core.images import ImageSet, Split
from headsearch.core.learner import Learner, build_learner
from headsearch.core.memory import PeakMemory, memory_checked
from headsearch.core.pretrain import Pretrained, check_steps, pretrain
from headsearch.core.probe import evaluate
from headsearch.core.reporting import Reporter
from headsearch.core.stages import Measure, Stages, random_images, seconds_of
from headsearch.core.together import Together

NOISE_CLASSES: Final = 10
STILL: Final = 1e-6
"""Learning rate of what is measured: its steps cost the same, and nothing moves."""
BARE_STEPS: Final = 50
"""Of the encoder alone, before and after a whole trial."""


@dataclass(frozen=True)
class WholeTrial:
    """An epoch of a trial as workers train it, with its report and its checkpoint on the disk.

    `seconds` is all of it; `rest_seconds` what is not its steps. `bare_seconds` is what the encoder alone
    takes for as many steps, from its speed just before and after.
    """

    seconds: float
    rest_seconds: float
    bare_seconds: float

    @property
    def share(self) -> float:
        """How much of the encoder's own speed the trial has."""
        return self.bare_seconds / self.seconds

    @property
    def rest_share(self) -> float:
        """What report and checkpoint take, over the time of the encoder alone."""
        return self.rest_seconds / self.bare_seconds


@dataclass(frozen=True)
class Benchmark:
    """What one encoder and batch size came to.

    Speeds are views per second. `limit` is that of the encoder's forward and backward alone; `share` is
    `training` over `limit`, each repeat's own ratio. Stages are seconds a step; their sum may miss the step
    by what the parts hide from each other. Report, checkpoint and probe are seconds each, once an epoch, a
    save (which a thread writes while training goes on) and a trial. `epoch_seconds` is that of an epoch over
    `train_images`, without report and checkpoint.
    """

    encoder: str
    head: str
    batch_size: int
    image_size: int
    precision: Precision
    channels_last: bool
    compiled: str
    """Mode of torch.compile, "off", or "cuda-graph" where whole steps, and the encoder alone, were graphs."""
    device: str
    model: str
    torch: str
    threads: int
    repeats: int
    steps: int
    training: Measure
    limit: Measure
    share: Measure
    step_seconds: float
    stages: dict[str, float]
    train_images: int
    epoch_seconds: float
    report_seconds: float
    report_images: int
    checkpoint_seconds: float
    probe_seconds: float | None
    peak_bytes: int | None
    """Of the process's memory, or on a GPU of what torch took there; what the images take is in it."""
    trial: WholeTrial | None = None
    """Where that was asked for."""
    together: tuple[Together, ...] = ()
    """Several trainings at once, where that was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure(
    config: TrialConfig,
    images: ImageSet,
    *,
    device: torch.device,
    home: Path,
    repeats: int,
    seconds: float,
    probe: bool,
    trial: bool = False,
) -> Benchmark:
    """Benchmark the training of `config`: `repeats` rounds in which each part is run for about `seconds`.

    Whole epochs, the bare encoder and the other parts take turns in each round, so that what else the
    machine does meets all of them. `trial` measures a whole epoch of a trial, too.

    Raises SpecError if a batch does not fit the training images, and TrialFailure like `pretrain`.
    """
    check_steps(config, images)
    # Hundreds of steps on images of noise, past the end of the schedule, can make any head collapse.
    still = config.optimizer.model_copy(update={"learning_rate": STILL})
    config = config.model_copy(update={"optimizer": still})
    precision = resolve_precision(config.training, device)
    with memory_checked(), PeakMemory(device) as peak, TemporaryDirectory(dir=_folder(home)) as folder:
        learner = build_learner(config, images, device, home)
        views = build_views(config, images, device)
        train = images.pretraining
        stages = Stages(learner, train, views, precision)
        parts: dict[str, Callable[[int], None]] = {
            "training": stages.epoch,
            "encoder": stages.encoder,
            "views": stages.make_views,
            "head and loss": stages.head,
            "optimizer": stages.optimizer,
        }
        steps = {name: _steps(part, device, seconds) for name, part in parts.items()}
        per_step: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(repeats):
            for name, part in parts.items():
                per_step[name].append(seconds_of(partial(part, steps[name]), device) / steps[name])
        reporter = Reporter(learner, images.train, images.validation, views, precision)
        reporting = [
            seconds_of(lambda: reporter.measure(1, len(images.classes)), device)
            for _ in range(min(repeats, 3))
        ]
        store = CheckpointFolder(Path(folder) / "benchmark")
        saving = [seconds_of(lambda: stages.save(store), device) for _ in range(min(repeats, 3))]
        whole = None
        if trial:
            count = len(train) // config.training.batch_size
            bare = partial(stages.encoder, min(count, BARE_STEPS))
            before = seconds_of(bare, device)
            seconds_and_rest = _whole_trial(config, images, device, home, Path(folder) / "trial")
            each = (before + seconds_of(bare, device)) / 2 / min(count, BARE_STEPS)
            whole = WholeTrial(*seconds_and_rest, bare_seconds=count * each)
        probing = None
        if probe:
            pretrained = _pretrained(learner, config, precision)
            probing = seconds_of(lambda: evaluate(pretrained, images, config, device=device), device)
    graphed = learner.graphed is not None and learner.graphed.recorded
    views_a_step = 2 * config.training.batch_size
    step = statistics.median(per_step["training"])
    named = {name: statistics.median(values) for name, values in per_step.items() if name != "training"}
    return Benchmark(
        encoder=config.encoder.name,
        head=config.head.kind,
        batch_size=config.training.batch_size,
        image_size=images.image_size,
        precision=precision,
        channels_last=config.training.channels_last,
        compiled="cuda-graph" if graphed else config.training.compile_encoder,
        device=device.type,
        model=processor(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        repeats=repeats,
        steps=steps["training"],
        training=Measure.of([views_a_step / value for value in per_step["training"]]),
        limit=Measure.of([views_a_step / value for value in per_step["encoder"]]),
        share=Measure.of(
            [bare / whole for bare, whole in zip(per_step["encoder"], per_step["training"], strict=True)]
        ),
        step_seconds=step,
        stages=named,
        train_images=len(train),
        epoch_seconds=step * (len(train) // config.training.batch_size),
        report_seconds=statistics.median(reporting),
        report_images=len(reporter.train) + len(reporter.validation),
        checkpoint_seconds=statistics.median(saving),
        probe_seconds=probing,
        peak_bytes=peak.found,
        trial=whole,
    )


class _Stopwatch(EveryEpoch):
    """Notes when the steps of each epoch begin and end."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.made: list[float] = []

    def at_epoch(self, epoch: int) -> None:  # noqa: ARG002
        self.began.append(time.perf_counter())

    def at_report(self, epoch: int) -> None:  # noqa: ARG002
        self.made.append(time.perf_counter())


def _whole_trial(
    config: TrialConfig, images: ImageSet, device: torch.device, home: Path, folder: Path
) -> tuple[float, float]:
    """Seconds of a trial's second epoch, to the last checkpoint, and those beside its steps.

    The first epoch compiles and fills caches, as it does once a worker.
    """
    two = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 2})})
    watch = _Stopwatch()
    checkpoints = AsyncCheckpoints(CheckpointFolder(folder))
    for _ in pretrain(two, images, device=device, home=home, checkpoints=checkpoints, control=watch):
        pass
    ended = time.perf_counter()
    return ended - watch.began[1], ended - watch.made[1]


def noise(count: int, image_size: int) -> ImageSet:
    """Images of noise: `count` for training, a ninth as many for validation, a fifth for the test."""
    train, validation, test = (
        Split(*random_images(max(NOISE_CLASSES, size), image_size, NOISE_CLASSES, seed))
        for seed, size in enumerate((count, count // 9, count // 5))
    )
    names = tuple(str(number) for number in range(NOISE_CLASSES))
    return ImageSet("noise", names, train, validation, test, fingerprint=f"noise-{count}-{image_size}")


def _steps(part: Callable[[int], None], device: torch.device, seconds: float) -> int:
    """How many steps take about `seconds`; makes one to see."""
    each = seconds_of(lambda: part(1), device)
    return max(1, round(seconds / each))


def _folder(home: Path) -> Path:
    """Where checkpoints are on this machine, so that the same disk is measured."""
    folder = home / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pretrained(learner: Learner, config: TrialConfig, precision: Precision) -> Pretrained:
    return Pretrained(
        encoder=learner.encoder,
        head=learner.head,
        online=learner.online,
        **asdict(head_facts(config.head, feature_dim(config.encoder), learner.head)),
        train_seconds=0.0,
        views_per_second=0.0,
        autoencoder=learner.autoencoder,
        precision=precision,
    )
