"""Workers as tasks of a Slurm job array, through submitit.

submitit writes the batch script, submits it and counts requeues. Three things are ours. The task runs
without ``srun``, which kills its step when it hears SIGTERM. The batch shell execs Python, so that the
process which Slurm signals ahead of the limit is ours. The signal goes to that process alone (``B:``), early
enough to drain.
"""

from __future__ import annotations

import io
import math
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from headsearch.errors import InputError, WorldError
from headsearch.home import home_folder, logs_folder, make_folder
from headsearch.runtime.database import FILE_VARIABLE, URL_VARIABLE, embedded_server, given_url
from headsearch.runtime.launcher import STOP_SECONDS
from headsearch.runtime.launching import nodes
from headsearch.runtime.launching.engines import Plan, Wanted
from headsearch.runtime.session import Session
from headsearch.spec import StudySpec

MINUTES = 240
"""Default time limit. A task that reaches it is requeued and goes on, so that it need not be long."""
REQUEUES = 1000
"""Times that a task which reached its limit is put back."""
TAKEN = {
    "array": "--workers says how many", "job-name": "it is the study's",
    "output": "logs are in the home folder", "error": "logs are in the home folder",
    "open-mode": "a requeued task goes on with its log",
    "signal": "the study's worker.drain_seconds says how early", "time": "use --minutes",
    "partition": "use --partition", "account": "use --account", "cpus-per-task": "use --cpus",
    "mem": "use --memory-gb", "gres": "use --gpus", "gpus": "use --gpus", "gpus-per-task": "use --gpus",
    "ntasks": "use --workers", "nodes": "a worker runs on one", "wrap": "headsearch worker is what runs",
}  # fmt: skip
"""Options of sbatch that launch sets, and why they are not to be given."""
_KEY = re.compile(r"[a-z][a-z0-9-]*")


def check(wanted: Wanted, *, dry_run: bool) -> None:
    """Refuse options that sbatch is not to get, a database that nodes do not reach, a password on its way."""
    if wanted.workers is None:
        raise InputError("--workers: needed with --on slurm: the number of tasks of the job array")
    _extra(wanted.slurm)
    nodes.no_password_exported()
    if not dry_run:
        _installed()
    _reachable(wanted.partition)


def plan(spec: StudySpec, wanted: Wanted, *, dry_run: bool) -> Plan:  # noqa: ARG001  the same
    """Plan a job array of one worker a task."""
    count = wanted.workers or 1
    extra = _extra(wanted.slurm)
    device = wanted.device or ("auto" if wanted.gpus else "cpu")
    words = ("worker", "--study", spec.name, "--device", device)
    home = home_folder()
    logs = home / "logs" / spec.name / "slurm"
    drain = math.ceil(spec.worker.drain_seconds + STOP_SECONDS)
    options: dict[str, Any] = {
        "cpus-per-task": wanted.cpus or 1,
        "time": wanted.minutes or MINUTES,
        "partition": wanted.partition,
        "account": wanted.account,
        "gres": "gpu:1" if wanted.gpus else None,
        "mem": f"{math.ceil(1024 * wanted.memory_gb)}M" if wanted.memory_gb else None,
        "requeue": True,
        "signal": f"B:USR2@{drain}",
        **extra,
    }
    options = {key: value for key, value in options.items() if value is not None}
    if 60 * options["time"] < 2 * drain:
        raise InputError(
            f"--minutes: {options['time']} leaves no time to train: a task is told to drain {drain} s ahead, "
            f"so at least {math.ceil(2 * drain / 60)}"
        )
    notes = _notes(spec, home, shared=bool(_alone(wanted.partition)))

    def start(_: Session) -> list[str]:
        job = _submit(make_folder(logs_folder(home) / spec.name / "slurm"), words, wanted, options, home)
        tasks = "_<task>" if count > 1 else ""
        return [
            f"submitted as job {job}, logs {logs}/{job}{tasks}_0_log.out",
            f"see them: squeue -j {job}; headsearch study status {spec.name}",
            f"stop them: scancel {job}",
        ]

    flags = " ".join(f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items())
    command = f"headsearch {shlex.join(words)} --threads {wanted.threads or options['cpus-per-task']}"
    return Plan(
        (
            ("workers", f"{count}, each a task of one Slurm job array: {command}"),
            ("sbatch", f"--array=0-{count - 1} {flags}" if count > 1 else flags),
            ("database", nodes.database_line()),
            ("files", f"home {home}, logs in {logs}; nodes must see them there, and {sys.executable}"),
            ("limit", f"{drain} s before it a worker drains, then its task is requeued and goes on"),
        ),
        start,
        notes=notes,
    )


def _installed() -> None:
    for program in ("sbatch", "srun", "sinfo"):
        if shutil.which(program) is None:
            raise WorldError(
                f"--on slurm: there is no {program} here: run this on a login node of the cluster"
            )
    _submitit()


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise WorldError("--on slurm needs submitit: pip install 'headsearch[slurm]'") from error
    return submitit


def _extra(given: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        key = key.strip().removeprefix("--").replace("_", "-")
        if not _KEY.fullmatch(key) or "\n" in value or (equals and not value.strip()):
            raise InputError(f"--slurm: {item!r} is not like qos=high, or exclusive without a value")
        if key in TAKEN:
            raise InputError(f"--slurm: {key} is not to be given: {TAKEN[key]}")
        found[key] = value.strip() if equals else True
    return found


def _alone(partition: str | None) -> bool | None:
    """Whether this host is the only node; None where there is no Slurm to ask."""
    hosts, own = _hosts(partition), socket.gethostname()
    return None if hosts is None else hosts <= {own, own.split(".")[0]}


def _reachable(partition: str | None) -> None:
    """Refuse a database that nodes cannot reach."""
    url, alone = given_url(), _alone(partition)
    if not nodes.local_only(url) or alone is None:
        return
    if not alone:
        raise InputError(
            f"{URL_VARIABLE} or {FILE_VARIABLE}: must name a PostgreSQL that the nodes reach; "
            + ("the embedded server" if url is None else "this address")
            + " answers on this host only"
        )
    if url is None:
        status = embedded_server().status()
        if not (status.running and status.kept):
            raise InputError(
                "the embedded server must outlive the tasks that use it: run headsearch db start first, or "
                f"set {URL_VARIABLE}"
            )


def _hosts(partition: str | None) -> set[str] | None:
    """Names of the nodes, or None where there is no Slurm to ask."""
    if shutil.which("sinfo") is None:
        return None
    chosen = ["-p", partition] if partition else []
    listed = _ask("sinfo", "-h", "-N", "-o", "%n", *chosen).split()
    if not listed:
        raise InputError(f"--partition: {partition!r} has no nodes; partitions are {_partitions()}")
    return set(listed)


def _partitions() -> str:
    return ", ".join(sorted(set(_ask("sinfo", "-h", "-o", "%R").split()))) or "none"


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise WorldError(f"{command[0]} fails: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


def _notes(spec: StudySpec, home: Path, *, shared: bool) -> tuple[str, ...]:
    notes = []
    if not shared and spec.worker.checkpoint_store is None:
        notes.append(f"checkpoints are in {home}: if nodes do not share it, set worker.checkpoint_store")
    if (
        shutil.which("scontrol")
        and (wait := kill_wait()) is not None
        and wait < spec.worker.drain_seconds + 10
    ):
        notes.append(
            f"a task that Slurm ends or requeues has KillWait = {wait} s, less than worker.drain_seconds = "
            f"{spec.worker.drain_seconds:g} and 10 s to save: where an epoch takes that long, another worker "
            f"adopts the trial {spec.lease.seconds:g} s later; a study made with --set worker.drain_seconds="
            f"{max(0, wait - 10)} gives it back in time"
        )
    return tuple(notes)


def kill_wait() -> int | None:
    """Seconds between SIGTERM and SIGKILL on this cluster, or None where Slurm does not say."""
    found = re.search(r"^KillWait\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return int(found.group(1)) if found else None


def _submit(folder: Path, words: tuple[str, ...], wanted: Wanted, options: dict[str, Any], home: Path) -> str:
    submitit = _submitit()
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from headsearch.runtime.launching.slurm_task import SlurmTask

    task = SlurmTask(words, tuple(nodes.environment(home).items()), wanted.threads)
    executor = submitit.SlurmExecutor(
        folder, max_num_timeout=REQUEUES, python=f"exec {shlex.quote(sys.executable)}"
    )
    executor.update_parameters(
        time=options["time"],
        job_name=f"headsearch-{words[2]}",
        array_parallelism=wanted.workers,
        stderr_to_stdout=True,
        use_srun=False,
        # Which signal submitit takes for the limit is set by a variable, which may be set here to another.
        setup=["export SUBMITIT_PREEMPT_SIGNAL=USR2"],
        additional_parameters=options,
    )
    try:
        # submitit prints what sbatch says besides raising it.
        with redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(task) for _ in range(wanted.workers or 1)]
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"sbatch refuses the job: {said[-1].strip() if said else 'no reason given'}"
        ) from error
    return str(jobs[0].job_id).split("_")[0]
