"""A worker: claims trials of one study, trains them, says what comes of them.

The one place where search and core meet. A trial's way from here: `core/pretrain.py` yields a report
an epoch, `keeper` stores each while the next epoch trains; at a rung the trial is paused with its checkpoint
and the worker asks for work again, which may be the same trial; at the end `core/probe.py` scores it.

The trained networks of the trial paused last stay in memory: if the next claim is that trial again,
training goes on without loading anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from headsearch.config import TrialConfig
from headsearch.core.checkpoint import AsyncCheckpoints
from headsearch.core.device import pick_device
from headsearch.core.feed import placed
from headsearch.core.hardware import device_label, set_threads
from headsearch.core.images import ImageSet
from headsearch.core.memory import free_memory, keep_memory, memory_checked
from headsearch.core.pretrain import EpochReport, Pretrained, describe_head, pretrain
from headsearch.core.probe import evaluate
from headsearch.core.views import prepare as prepare_views
from headsearch.errors import (
    DatabaseError,
    DataError,
    HeadsearchError,
    InputError,
    LeaseLost,
    TrainingStopped,
    TrialFailure,
    UnknownStudyError,
    WorldError,
)
from headsearch.runtime.completion import completed
from headsearch.runtime.endings import Endings
from headsearch.runtime.gpulocks import GpuLease, gpu_slots
from headsearch.runtime.keeper import LeaseKeeper
from headsearch.runtime.lines import first_line, unbreakable
from headsearch.runtime.patience import patiently
from headsearch.runtime.removal import forget_all, forget_checkpoints
from headsearch.runtime.result import WorkerResult
from headsearch.runtime.session import Session, open_session
from headsearch.runtime.signals import Drain, drain_on_signal
from headsearch.runtime.study_images import StudyImages
from headsearch.runtime.watch import Watch
from headsearch.search import leases, steering, studies, workers
from headsearch.search.claims import claim
from headsearch.search.leases import Report
from headsearch.search.outcomes import Outcome
from headsearch.search.studies import Study
from headsearch.search.work import Claim, Idle

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Between two looks for work while others train."""


@dataclass
class Training:
    """One trial under way in this process."""

    claim: Claim
    config: TrialConfig
    images: ImageSet
    checkpoints: AsyncCheckpoints
    reports: Generator[EpochReport, None, Pretrained]


def run_worker(
    name: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    count: int | None = None,
    parent: int | None = None,
    drained_exit_code: int = 0,
    say: Callable[[str], None] = logger.info,
    lease: GpuLease | None = None,
    drain: Drain | None = None,
) -> WorkerResult:
    """Work on a study until it is complete, `count` trials have ended, or a signal asks to stop.

    Args:
        name: The study's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Of torch on the CPU; all cores by default.
        count: Trials to end before leaving.
        parent: Leave once this process is no longer our parent.
        drained_exit_code: With which the process ends if it is asked to stop and a step does not end in time.
        say: Gets one line per event.
        lease: Of the GPU that is `device`, where it has one.
        drain: Hears the signals, where somebody listens for them already.

    Raises:
        UnknownStudyError: There is no such study.
        InputError: The device is not there, or the study is another version's.
        WorldError: Database or disk stayed away for longer than our patience; the trial was given back
            if that could still be said.
    """
    set_threads(threads)
    chosen = pick_device(device)
    prepare_views(chosen)  # no limit of time counts it
    keep_memory()
    say = unbreakable(say)
    hearing = nullcontext(drain) if drain else drain_on_signal(say, parent=parent)
    with hearing as drain, open_session() as session:
        drain.exit_code = drained_exit_code
        study = studies.get(session.database, name)
        steering.check_version(study)
        on = f"{device_label(chosen)} {lease}" if lease else device_label(chosen)
        label = f"{on}, {torch.get_num_threads()} threads"
        worker_id = workers.register(session.database, study, device=label, threads=torch.get_num_threads())
        if lease:
            lease.sign(worker_id)
        say(f"worker {worker_id} on {label}, study {name}")
        keeper = LeaseKeeper(session, study, worker_id, say)
        with keeper.running():
            result = _Worker(
                session, study, worker_id, chosen, label, keeper, drain, say, parent is not None
            ).work(count)
        try:
            patiently(session, lambda: workers.leave(session.database, worker_id), say, patience_seconds=5)
        except DatabaseError as error:
            say(f"{error}; this worker leaves without saying so")
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
        drain: Drain,
        say: Callable[[str], None],
        launched: bool,  # noqa: FBT001
    ) -> None:
        self.launched = launched
        self.session, self.study, self.worker_id = session, study, worker_id
        self.device, self.label = device, label
        self.keeper, self.drain, self.say = keeper, drain, unbreakable(say)
        self.watch = Watch(study.spec.worker, study.spec.rungs, keeper, drain)
        self.ends = Endings(session, study, worker_id, keeper, drain, self.say)
        sharing = gpu_slots() if device.type == "cuda" else 1
        place = partial(placed, device=device, sharing=sharing)
        self.images = StudyImages(session, study, place, self._patiently, self.say)
        self.paused: Training | None = None
        self.reported = 0
        """Epochs of the trial at hand."""

    def work(self, count: int | None) -> WorkerResult:
        """Claim and train until there is nothing left or we are asked to stop."""
        held = False
        while not self.drain.is_set() and (count is None or self.ends.ended < count):
            with self.watch.looking(self.ends.leave):
                work = self._claim()
            if work in (Idle.COMPLETED, Idle.DONE):
                self._close(publishing=work is Idle.COMPLETED and not self.launched)
                self.say(f"study {self.study.name} has ended: nothing left to train")
                break
            if work is Idle.HELD and not held:
                self.say(f"study {self.study.name} is paused; headsearch study resume {self.study.name}")
                self.paused = None  # its memory may be wanted by others
            held = work is Idle.HELD
            if isinstance(work, Idle):
                self.drain.wait(POLL_SECONDS)
                continue
            if self.drain.is_set():
                self.ends.give_back(work)
                break
            with self.keeper.holding(work), self.watch.looking(partial(self.ends.escape, work)):
                self._train(work)
        return WorkerResult(self.ends.ended, self.ends.failed, self.drain.is_set())

    def _claim(self) -> Claim | Idle:
        try:
            found: Claim | Idle = self._patiently(
                lambda: claim(self.session.database, self.study, self.worker_id, self.label)
            )
        except UnknownStudyError:
            forget_all(self.session, self.study)
            raise
        return found

    def _close(self, *, publishing: bool) -> None:
        """Clean up after the study, and put figure and note on the dashboard unless our launcher does it."""
        try:
            # Trials pruned at the end were told by whoever came last, wherever they had trained.
            self._patiently(lambda: forget_checkpoints(self.session, self.study))
            if publishing:
                from headsearch.report.publish import publish  # loads plotly

                self._patiently(lambda: publish(self.session.database, self.study.name))
        except (HeadsearchError, ImportError) as error:  # a worker needs no plotly
            self.say(f"checkpoints left, or figure and note not on the dashboard: {error}")

    def _patiently(self, call: Callable[[], Any]) -> Any:
        return self.ends.patiently(call)

    def _train(self, work: Claim) -> None:
        """Bring a claim to its next rung or its end, whatever happens on the way."""
        self.say(f"trial {work.number} {work.origin} at epoch {work.epoch}")
        self.reported = work.epoch
        try:
            training = self._training(work)
            try:
                self._run(training)
            finally:
                if training is not self.paused:
                    # Waits for the checkpoint under way: whoever is given the trial next reads it, and where
                    # the trial ends, the files are removed.
                    training.reports.close()
        except LeaseLost as error:
            self.say(f"{error}; going on with the next trial")
        except TrainingStopped as stopped:
            self.say(f"trial {work.number} stopped {stopped}")
            self.ends.give_back(work)
        except TrialFailure as error:
            self._fail(work, error)
        except (DataError, WorldError, KeyboardInterrupt) as error:
            # Of this machine, not of this point: another worker may fare better.
            given_back = self.ends.give_back(work)
            if isinstance(error, DatabaseError) and self.drain.is_set():
                return  # asked to stop while it was away; the checkpoint has what could not be said
            if given_back:
                raise
        except (InputError, ValidationError) as error:
            self.ends.end(work, Outcome("failed", reason="unbuildable", message=first_line(error)))
        except Exception as error:
            logger.exception("trial %d", work.number)
            message = f"{type(error).__name__}: {first_line(error)}"
            if self.device.type == "cuda":
                # The context may be poisoned, and every later trial would fail for it.
                self.ends.set_back(work, "error", message)
                raise WorldError(
                    f"trial {work.number}: {message}; this worker ends, start it again"
                ) from error
            self.ends.end(work, Outcome("failed", reason="error", message=message))
        finally:
            self.watch.resting()
            free_memory(self.device)

    def _training(self, work: Claim) -> Training:
        """The trial's generator: the one that waits in memory, or one that starts from the checkpoint."""
        waiting, self.paused = self.paused, None
        if waiting and (waiting.claim.number, waiting.claim.attempt + 1) == (work.number, work.attempt):
            waiting.claim, waiting.checkpoints.generation = work, work.attempt
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
        self.watch.working()
        with memory_checked():
            images = self.images.load(config.data)
        checkpoints = AsyncCheckpoints(self.ends.checkpoints(work))
        reports = pretrain(
            config,
            images,
            device=self.device,
            home=self.session.home,
            checkpoints=checkpoints,
            control=self.watch,
        )
        return Training(work, config, images, checkpoints, reports)

    def _run(self, training: Training) -> None:
        work = training.claim
        while True:
            self.watch.working()
            try:
                said = next(training.reports)
                if said.epoch == work.stop_at or self.watch.leaving:
                    training.checkpoints.flush()  # others may take the trial up from here on
            except StopIteration as stop:
                pretrained: Pretrained = stop.value
                break
            finally:
                self.watch.resting()
            if said.epoch > work.epoch:
                self._report(work, said)
            if said.epoch == work.stop_at:
                self.ends.settle()
                verdict = self._patiently(
                    lambda: leases.arrive(self.session.database, self.study, training.claim)
                )
                if verdict == "paused":
                    self.say(f"trial {work.number} paused at epoch {said.epoch}")
                    self.paused = training
                    return
                if verdict == "ended":
                    self.say(f"trial {work.number} pruned at epoch {said.epoch}")
                    self.ends.ended_here(work)
                    return
                training.claim = work = leases.past_rung(self.study, work)
            self.keeper.check(self.ends.patience_seconds)
            if self.watch.leaving:
                self.ends.give_back(work)
                return
        self.watch.working()
        with memory_checked():
            measured = evaluate(pretrained, training.images, training.config, device=self.device)
        self.watch.resting()
        self.ends.settle()
        fingerprint = training.images.fingerprint
        self.ends.end(work, completed(self.study.spec, pretrained, measured, fingerprint))

    def _report(self, work: Claim, said: EpochReport) -> None:
        self.keeper.put(Report(**vars(said)))
        self.reported = said.epoch
        self.say(
            f"trial {work.number} epoch {said.epoch}/{self.study.spec.budget.epochs} "
            f"loss {said.loss:.3f} accuracy {said.probe_accuracy:.3f}"
            f"{' (seen)' * self.study.spec.trains_on_validation} {said.views_per_second:,.0f} views/s"
        )

    def _fail(self, work: Claim, error: TrialFailure) -> None:
        """End the trial, or let it be tried again where that can help."""
        if error.reason == "out_of_memory":
            self.images.forget()
            free_memory(self.device)
            if self.reported:
                # It had the memory that it needs before, so others have it now.
                self.ends.set_back(work, error.reason, str(error))
                return
        self.ends.end(work, Outcome("failed", reason=error.reason, message=str(error)))
