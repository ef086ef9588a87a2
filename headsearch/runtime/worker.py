"""A worker: claims trials of one study, trains them, says what comes of them.

The one place where search and core meet. A trial's way from here: `core/pretrain.py` yields a report
an epoch, each is stored before the next begins; at a rung the trial is paused with its checkpoint and
the worker asks for work again, which may be the same trial; at the end `core/probe.py` scores it.

The trained networks of the trial paused last stay in memory: if the next claim is that trial again,
training goes on without loading anything.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from headsearch.config import TrialConfig
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.device import pick_device
from headsearch.core.images import ImageSet, load_images
from headsearch.core.pretrain import EpochReport, Pretrained, describe_head, pretrain
from headsearch.core.probe import Evaluation, evaluate
from headsearch.errors import DataError, HeadsearchError, InputError, LeaseLost, TrialFailure, WorldError
from headsearch.home import checkpoint_folder
from headsearch.runtime.keeper import LeaseKeeper
from headsearch.runtime.lines import first_line, unbreakable
from headsearch.runtime.patience import patiently
from headsearch.runtime.removal import forget_checkpoints
from headsearch.runtime.session import Session, open_session
from headsearch.runtime.signals import drain_on_signal
from headsearch.search import leases, outcomes, studies, workers
from headsearch.search.claims import Claim, Idle, claim
from headsearch.search.leases import Report
from headsearch.search.outcomes import Outcome
from headsearch.search.studies import Study

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Between two looks for work while others train."""


@dataclass(frozen=True)
class WorkerResult:
    """What a worker did."""

    ended: int
    """Trials that it brought to an end."""
    failed: int
    """Of those, failures."""
    drained: bool
    """It was asked to stop before the study was complete."""


@dataclass
class Training:
    """One trial under way in this process."""

    claim: Claim
    config: TrialConfig
    images: ImageSet
    reports: Generator[EpochReport, None, Pretrained]


def run_worker(
    name: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    count: int | None = None,
    parent: int | None = None,
    say: Callable[[str], None] = logger.info,
) -> WorkerResult:
    """Work on a study until it is complete, `count` trials have ended, or a signal asks to stop.

    Args:
        name: The study's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Of torch on the CPU; all cores by default.
        count: Trials to end before leaving.
        parent: Leave once this process is no longer our parent.
        say: Gets one line per event.

    Raises:
        UnknownStudyError: There is no such study.
        InputError: The device is not there.
        WorldError: Database or disk stayed away for longer than our patience; the trial was given back
            if that could still be said.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = pick_device(device)
    say = unbreakable(say)
    with drain_on_signal(say, parent=parent) as drain, open_session() as session:
        study = studies.get(session.database, name)
        label = f"{_device_name(chosen)}, {torch.get_num_threads()} threads"
        worker_id = workers.register(session.database, study, device=label, threads=torch.get_num_threads())
        say(f"worker {worker_id} on {label}, study {name}")
        keeper = LeaseKeeper(session, study, worker_id)
        with keeper.running():
            result = _Worker(
                session, study, worker_id, chosen, label, keeper, drain, say, parent is not None
            ).work(count)
        patiently(session, lambda: workers.leave(session.database, worker_id), say, patience_seconds=5)
        return result


class _Worker:
    """The loop and what it needs."""

    def __init__(
        self,
        session: Session,
        study: Study,
        worker_id: str,
        device: torch.device,
        label: str,
        keeper: LeaseKeeper,
        drain: threading.Event,
        say: Callable[[str], None],
        launched: bool,  # noqa: FBT001
    ) -> None:
        self.launched = launched
        self.session, self.study, self.worker_id = session, study, worker_id
        self.device, self.label = device, label
        self.keeper, self.drain, self.say = keeper, drain, unbreakable(say)
        self.images: dict[str, ImageSet] = {}
        self.paused: Training | None = None
        self.ended = self.failed = 0

    def work(self, count: int | None) -> WorkerResult:
        """Claim and train until there is nothing left or we are asked to stop."""
        while not self.drain.is_set() and (count is None or self.ended < count):
            work = self._patiently(
                lambda: claim(self.session.database, self.study, self.worker_id, self.label)
            )
            if work in (Idle.COMPLETED, Idle.DONE):
                if work is Idle.COMPLETED and not self.launched:
                    self._publish()
                # Trials pruned at the end were told by whoever came last, wherever they had trained.
                forget_checkpoints(self.session.home, self.study.name)
                self.say(f"study {self.study.name} is complete")
                break
            if isinstance(work, Idle):
                self.drain.wait(POLL_SECONDS)
                continue
            with self.keeper.holding(work):
                self._train(work)
        return WorkerResult(self.ended, self.failed, self.drain.is_set())

    def _publish(self) -> None:
        """Put figure and note on the dashboard; whoever launched us does it for us."""
        from headsearch.report.publish import publish  # loads plotly

        try:
            self._patiently(lambda: publish(self.session.database, self.study.name))
        except HeadsearchError as error:
            self.say(f"figure and note were not put on the dashboard: {error}")

    def _patiently(self, call: Callable[[], Any]) -> Any:
        return patiently(self.session, call, self.say)

    def _train(self, work: Claim) -> None:
        """Bring a claim to its next rung or its end, whatever happens on the way."""
        self.say(f"trial {work.number} {work.origin} at epoch {work.epoch}")
        try:
            training = self._training(work)
            self._run(training)
        except LeaseLost as error:
            self.say(f"{error}; going on with the next trial")
        except TrialFailure as error:
            self._end(work, Outcome("failed", reason=error.reason, message=str(error)))
        except (DataError, WorldError, KeyboardInterrupt):
            # Of this machine, not of this point: another worker may fare better.
            if self._give_back(work):
                raise
        except (InputError, ValidationError) as error:
            self._end(work, Outcome("failed", reason="unbuildable", message=first_line(error)))
        except Exception as error:
            logger.exception("trial %d", work.number)
            message = f"{type(error).__name__}: {first_line(error)}"
            self._end(work, Outcome("failed", reason="error", message=message))
            if self.device.type == "cuda":
                # The context may be poisoned, and every later trial would fail for it.
                raise WorldError(
                    f"trial {work.number}: {message}; this worker ends, start it again"
                ) from error

    def _training(self, work: Claim) -> Training:
        """The trial's generator: the one that waits in memory, or one that starts from the checkpoint."""
        waiting, self.paused = self.paused, None
        if waiting and (waiting.claim.number, waiting.claim.attempt + 1) == (work.number, work.attempt):
            waiting.claim = work
            return waiting
        config = self.study.spec.trial_config(work.params, work.seed)
        head = describe_head(config)
        self._patiently(
            lambda: leases.describe(
                self.session.database,
                self.study,
                work,
                projection_dim=head.projection_dim,
                head_parameters=head.head_parameters,
            )
        )
        images = self._load(config)
        reports = pretrain(
            config,
            images,
            device=self.device,
            home=self.session.home,
            checkpoints=CheckpointFolder(self._folder(work)),
        )
        return Training(work, config, images, reports)

    def _load(self, config: TrialConfig) -> ImageSet:
        key = config.data.model_copy(update={"normalization": "none"}).model_dump_json()
        if key not in self.images:
            self.images[key] = load_images(config.data, home=self.session.home).to(self.device)
        return self.images[key]

    def _run(self, training: Training) -> None:
        work, began = training.claim, time.monotonic()
        while True:
            try:
                said = next(training.reports)
            except StopIteration as stop:
                pretrained: Pretrained = stop.value
                break
            if said.epoch > work.epoch:
                self._report(work, said)
            if said.epoch == work.stop_at:
                verdict = self._patiently(
                    lambda: leases.arrive(self.session.database, self.study, training.claim)
                )
                if verdict == "paused":
                    self.say(f"trial {work.number} paused at epoch {said.epoch}")
                    self.paused = training
                    return
                if verdict == "ended":
                    self.say(f"trial {work.number} pruned at epoch {said.epoch}")
                    self._ended(work)
                    return
                training.claim = work = leases.past_rung(self.study, work)
            if self.keeper.lost.is_set():
                raise LeaseLost(f"trial {work.number}: another worker holds it now")
            if self.drain.is_set():
                self._give_back(work)
                return
        measured = evaluate(pretrained, training.images, training.config, device=self.device)
        seconds = time.monotonic() - began
        self._end(work, self._complete(training, pretrained, measured, seconds))

    def _report(self, work: Claim, said: EpochReport) -> None:
        report = Report(**vars(said))
        self._patiently(lambda: leases.report(self.session.database, self.study, work, report))
        self.say(
            f"trial {work.number} epoch {said.epoch}/{self.study.spec.budget.epochs} "
            f"loss {said.loss:.3f} accuracy {said.probe_accuracy:.3f} {said.views_per_second:,.0f} views/s"
        )

    def _complete(
        self, training: Training, pretrained: Pretrained, measured: Evaluation, seconds: float
    ) -> Outcome:
        objectives = {
            "probe_accuracy": measured.probe_accuracy,
            "projection_dim": float(pretrained.projection_dim),
            "head_parameters": float(pretrained.head_parameters),
            "train_seconds": pretrained.train_seconds,
        }
        return Outcome(
            "complete",
            values=tuple(objectives[name] for name in self.study.spec.objectives),
            facts={
                **{name: value for name, value in vars(measured).items() if name != "details"},
                **measured.details,
                "measures": pretrained.measures,
                "kept_epoch": pretrained.kept_epoch,
                "head_flops": pretrained.head_flops,
                "protocol": self.study.spec.protocol,
                "host": socket.gethostname(),
                "threads": torch.get_num_threads(),
                "precision": pretrained.precision,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "feature_dim": pretrained.feature_dim,
                "trainable_head_parameters": pretrained.trainable_head_parameters,
                "autoencoder": pretrained.autoencoder,
                "data_fingerprint": training.images.fingerprint,
                "last_worker_seconds": seconds,
            },
        )

    def _end(self, work: Claim, outcome: Outcome) -> None:
        try:
            self._patiently(
                lambda: outcomes.finish(self.session.database, self.study, work.number, work.attempt, outcome)
            )
        except LeaseLost as error:
            self.say(f"{error}; its outcome is theirs to tell")
            return
        accuracy = outcome.facts.get("probe_accuracy")
        shown = f"accuracy {accuracy:.4f} (validation)" if accuracy is not None else outcome.message
        self.say(f"trial {work.number} {outcome.state}: {shown}")
        self.failed += outcome.state == "failed"
        self._ended(work)

    def _ended(self, work: Claim) -> None:
        self.ended += 1
        CheckpointFolder(self._folder(work)).remove()

    def _give_back(self, work: Claim) -> bool:
        """Let others have the trial; false where another worker has it already."""
        try:
            patiently(
                self.session,
                lambda: leases.give_back(self.session.database, self.study, work),
                self.say,
                patience_seconds=5,
            )
            self.say(f"trial {work.number} given back")
        except LeaseLost as error:
            self.say(f"{error}; going on with the next trial")
            return False
        except HeadsearchError as error:
            self.say(f"trial {work.number} could not be given back ({error}); its lease will run out")
        return True

    def _folder(self, work: Claim) -> Any:
        return checkpoint_folder(self.session.home, self.study.name, work.number)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu of {os.cpu_count()} cores"
