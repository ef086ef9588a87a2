"""Trainings at once on one machine, each in a process of its own as workers are, and what they make together.

A small encoder fills neither a GPU nor many cores: two that share them may make more views than one alone.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from headsearch.config import TrialConfig
from headsearch.core.device import configure_cuda
from headsearch.core.features import build_views, resolve_precision
from headsearch.core.feed import placed
from headsearch.core.hardware import set_threads
from headsearch.core.images import ImageSet
from headsearch.core.learner import build_learner
from headsearch.core.memory import free_memory, keep_memory, memory_checked
from headsearch.core.stages import WARM_STEPS, Measure, Stages, seconds_of
from headsearch.errors import HeadsearchError, TrialFailure

LOOK_SECONDS: Final = 0.2
"""Of steps between two looks at the clock."""
LEAVE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Together:
    """`trainings` at once, each with `threads` of the CPU's.

    `total` is views per second of all of them; `gain` is that over one training's alone with all threads,
    each round's own ratio.
    """

    trainings: int
    threads: int
    total: Measure
    gain: Measure


@dataclass(frozen=True)
class Job:
    """What each process trains."""

    config: TrialConfig
    load: Callable[[], ImageSet]
    device: torch.device
    home: Path
    sharing: int = 1
    """Processes whose images share the device's memory."""


def train_together(job: Job, counts: Sequence[int], *, repeats: int, seconds: float) -> tuple[Together, ...]:
    """Train so many times at once, for about `seconds`.

    All `counts`, and one alone, take turns in each of `repeats` rounds. Threads are shared out evenly, at
    least one each. A process is started once; those that a count leaves over wait, and keep weights and
    images alone. Raises TrialFailure if one of them fails or ends.
    """
    ordered = sorted({1, *counts})
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        each = replace(job, sharing=ordered[-1])
        crowd = [stack.enter_context(Training(each)) for _ in range(ordered[-1])]
        rounds = [
            {count: _total(crowd[:count], max(1, threads // count), seconds) for count in ordered}
            for _ in range(repeats)
        ]
    return tuple(
        Together(
            count,
            max(1, threads // count),
            Measure.of([one[count] for one in rounds]),
            Measure.of([one[count] / one[1] for one in rounds]),
        )
        for count in ordered
    )


def _total(crowd: Sequence[Training], threads: int, seconds: float) -> float:
    for training in crowd:
        training.tell(threads)
    for training in crowd:
        training.hear()
    for training in crowd:
        training.tell(seconds)
    return sum(training.hear() for training in crowd)


class Training:
    """One process that trains when it is told to; inside a block."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        self._process.kill()  # it has nothing to lose
        self._process.join()

    def tell(self, number: float) -> None:
        """Threads to warm up with, then seconds to train for."""
        try:
            self._line.send(number)
        except OSError:
            self._ended()

    def hear(self) -> float:
        """Wait for its answer: views per second. Raises TrialFailure if it has none."""
        try:
            answer: Any = self._line.recv()
        except (EOFError, OSError):
            self._ended()
        if isinstance(answer, tuple):
            reason, message = answer
            raise TrialFailure(reason, f"{message} (one of several trainings at once)")
        return float(answer)

    def _ended(self) -> NoReturn:
        self._process.join(LEAVE_SECONDS)
        code = self._process.exitcode
        raise TrialFailure("error", f"one of several trainings at once ended with exit code {code}")


def _serve(line: Connection, job: Job) -> None:
    # Ctrl-C in a terminal reaches every process; the first one hears of it and closes the line.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory()
    try:
        with memory_checked():
            _train(line, job)
    except HeadsearchError as error:
        with suppress(OSError):
            line.send((error.reason if isinstance(error, TrialFailure) else "error", str(error)))
    except (EOFError, OSError):
        return  # whoever asked has gone


def _train(line: Connection, job: Job) -> None:
    config, device = job.config, job.device
    configure_cuda(device)
    images = placed(job.load(), device, sharing=job.sharing)
    learner = build_learner(config, images, device, job.home)
    views = build_views(config, images, device)
    stages = Stages(learner, images.pretraining, views, resolve_precision(config.training, device))
    while True:
        set_threads(int(line.recv()))
        stages.epoch(WARM_STEPS)
        steps = max(1, round(LOOK_SECONDS / seconds_of(lambda: stages.epoch(1), device)))
        line.send(0.0)
        seconds, made, began = line.recv(), 0, time.perf_counter()
        while not made or time.perf_counter() - began < seconds:
            stages.epoch(steps)  # waits for the device at its end
            made += steps
        line.send(made * 2 * config.training.batch_size / (time.perf_counter() - began))
        learner.encoder.zero_grad()
        free_memory(device)
