"""What runs in each task of a Slurm job: a worker under a supervisor, in submitit's process.

submitit pickles the task; the process that unpickles it is the first one of the job's task (`slurm.py` sees
to that), so that it hears what Slurm sends ahead of the time limit.

* SIGTERM (``scontrol requeue``, preemption, ``scancel``, the limit itself): the worker gives its trial back
  and leaves within KillWait; Slurm puts the task back into the queue, or not.
* SIGUSR2 (ahead of the time limit): the same, and then we put the task back ourselves, by submitit's own
  handler, which counts how often.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass

from submitit.helpers import DelayedSubmission

from headsearch.runtime.launching.supervisor import DRAINED, Supervisor


@dataclass(frozen=True)
class SlurmTask:
    """One worker of a study."""

    words: tuple[str, ...]
    """Of the command, after ``headsearch``."""
    environment: tuple[tuple[str, str], ...]
    """Where home and database are; no password."""
    threads: int | None = None
    """None: as many as Slurm gives CPUs."""

    def __call__(self) -> str:
        """Work until the study ends; the process ends with the worker's exit code where it does not."""
        requeue = signal.getsignal(signal.SIGUSR2)
        threads = str(self.threads or os.environ.get("SLURM_CPUS_PER_TASK") or 1)
        supervisor = Supervisor(
            [*self.words, "--threads", threads],
            # Torch reads these once, at import.
            {**dict(self.environment), "OMP_NUM_THREADS": threads},
        )
        code = supervisor.run()
        if code == DRAINED and supervisor.heard == {signal.SIGUSR2} and callable(requeue):
            requeue(signal.SIGUSR2, None)
        if code:
            sys.exit(code)
        return "the study has ended"

    def checkpoint(self) -> DelayedSubmission:
        """Tell submitit what a requeued task runs: the same."""
        return DelayedSubmission(self)
