"""What headsearch's own bookkeeping costs a trial, beside plain Optuna on the same server.

    python tests/search/overhead.py --trials 2000 --workers 32 [--json] [--in-memory] [--without-plain]

Starts an embedded PostgreSQL in a temporary folder, below $TMPDIR or in memory, and lets worker processes
work off a search whose trials cost nothing to train: claim, describe, a report an epoch, arrive at rungs,
finish. So all that it takes is overhead. Then as many processes share one study of plain `study.optimize` with
the same sampler, space and values, until MaxTrialsCallback stops them. Optuna takes no reports in a study of
two objectives, so a report is a user attribute there, and nothing is pruned.

Times are what a worker waits for a call: for the others and for a free core too. Compare numbers of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.study import MaxTrialsCallback
from stopwatch import BEGUN, SLEEP, Measured, Stopwatch, measured, table
from toy import accuracy, make_spec, outcome_of, report_of

from headsearch import space as spaces
from headsearch.search import leases, outcomes, snapshot, studies, workers
from headsearch.search.audit import audit
from headsearch.search.claims import Claim, Idle, claim, point_key
from headsearch.search.database import Database, quietly
from headsearch.search.schema import migrate
from headsearch.spec import StudySpec

POLL_SECONDS = 0.5
"""As a real worker waits when only others have work."""
START_SECONDS = 600


def overhead_spec(trials: int, name: str = "overhead") -> StudySpec:
    """The toy's search with a learning rate, which makes points enough."""
    space = {
        "head.kind": ["mlp", "linear"],
        "head.width": {"low": 8, "high": 256, "log": True, "when": {"head.kind": "mlp"}},
        "head.projection_dim": [2, 4, 8, 16, 32, 64],
        "optimizer.learning_rate": {"low": 0.001, "high": 1.0, "log": True},
    }
    return make_spec(name=name, space=space, budget={"trials": trials, "epochs": 9, "rungs": [1, 3]})


_start: Barrier


def _ready(barrier: Barrier) -> None:
    global _start
    _start = barrier


def headsearch_worker(index: int, url: str, name: str) -> Stopwatch:
    """Work until nothing is left."""
    database = Database(url)
    study = studies.get(database, name)
    worker_id = workers.register(database, study, device="none", threads=1)
    epochs = study.spec.budget.epochs
    assert database.storage  # loads Optuna's models
    _start.wait(START_SECONDS)
    watch = Stopwatch()
    while True:
        work = claim(database, study, worker_id, "none")
        watch.lap(f"ask {work.origin if isinstance(work, Claim) else work.name.lower()}")
        if work in (Idle.COMPLETED, Idle.DONE):
            break
        if isinstance(work, Idle):
            time.sleep(POLL_SECONDS)
            watch.lap(SLEEP)
            continue
        dim = work.params["head.projection_dim"]
        leases.describe(database, study, work, projection_dim=dim, head_parameters=100 * dim)
        watch.lap("describe")
        for epoch in range(work.epoch + 1, (work.stop_at or epochs) + 1):
            leases.report(database, study, work, report_of(work, epoch))
            watch.lap("report")
        if work.stop_at:
            leases.arrive(database, study, work)
            watch.lap("arrive")
        else:
            outcomes.finish(database, study, work.number, work.attempt, outcome_of(work, epochs))
            watch.lap("tell")
    watch.stop()
    workers.leave(database, worker_id)
    database.close()
    return watch


def plain_worker(index: int, url: str, name: str, tree: dict[str, Any]) -> Stopwatch:
    """The same trials with Optuna alone."""
    spec = StudySpec.model_validate(tree)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        def suggest(path: str, parameter: spaces.Choices | spaces.Range) -> Any:
            if isinstance(parameter, spaces.Choices):
                return trial.suggest_categorical(path, parameter.choices)
            suggested = trial.suggest_int if parameter.is_integer else trial.suggest_float
            return suggested(path, parameter.low, parameter.high, log=parameter.log)

        work = Claim(
            trial.number, 0, spaces.draw(spec.space, suggest), spec.seeds[0], 1, 0, None, "new", "plain"
        )
        watch.lap(BEGUN)
        for epoch in range(1, spec.budget.epochs + 1):
            trial.set_user_attr(f"epoch {epoch}", asdict(report_of(work, epoch)))
            watch.lap("report")
        return accuracy(work, spec.budget.epochs), float(work.params["head.projection_dim"])

    with quietly():
        startup = spec.sampler.startup_trials
        sampler = TPESampler(
            multivariate=True, group=True, constant_liar=True, n_startup_trials=startup, seed=index
        )
        study = optuna.load_study(study_name=name, storage=url, sampler=sampler)
        stop = MaxTrialsCallback(spec.trials)
        _start.wait(START_SECONDS)
        watch = Stopwatch()
        laps = (lambda *_: watch.lap("tell"), stop, lambda *_: watch.lap("MaxTrialsCallback"))
        study.optimize(objective, callbacks=laps)
    return watch.stop()


def _run(processes: int, worker: Callable[..., Stopwatch], *arguments: Any) -> list[Stopwatch]:
    """Workers that begin together."""
    context = multiprocessing.get_context("forkserver")
    # Only what is installed: the fork server of Python 3.11 has no other path.
    context.set_forkserver_preload(["psycopg2", "headsearch.search.steering", "optuna.storages"])
    barrier = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_ready, initargs=(barrier,)) as pool:
        return list(pool.map(worker, range(processes), *([argument] * processes for argument in arguments)))


def measure_headsearch(url: str, trials: int, processes: int) -> Measured:
    """Our search, in the database at `url`."""
    database = Database(url)
    migrate(database)
    study, _ = studies.create(database, overhead_spec(trials))
    watches = _run(processes, headsearch_worker, url, study.name)
    seen = snapshot.read(database, study.name)
    found = [f"{one.rule}: {one.message}" for one in audit(database, seen.study).findings if one.violated]
    database.close()
    points = [(point_key(trial.params), trial.seed) for trial in seen.trials]
    return measured("headsearch", trials, watches, points, seen.counts, found)


def measure_plain(url: str, trials: int, processes: int) -> Measured:
    """Plain Optuna's, in the same database."""
    spec = overhead_spec(trials, "plain")
    with quietly():
        study = optuna.create_study(study_name=spec.name, storage=url, directions=list(spec.directions))
        watches = _run(processes, plain_worker, url, spec.name, spec.to_json())
        there = study.get_trials(deepcopy=False)
    points = [(point_key(trial.params), spec.seeds[0]) for trial in there]
    states = Counter(trial.state.name.lower() for trial in there)
    return measured("study.optimize", trials, watches, points, states)


@contextlib.contextmanager
def server(*, in_memory: bool) -> Iterator[str]:
    """URL of an empty database on a server of its own."""
    from headsearch.runtime.postgres import EmbeddedServer

    folder = Path(tempfile.mkdtemp(prefix="headsearch-overhead-", dir="/dev/shm" if in_memory else None))
    folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
    try:
        with EmbeddedServer(folder / "postgres").attach() as handle:
            yield handle.url("owner")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--in-memory", action="store_true", help="keep the database's files in /dev/shm")
    parser.add_argument("--without-plain", action="store_true", help="leave plain Optuna out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # of the workers: many processes share few cores
    load = [round(os.getloadavg()[0], 2)]
    with server(in_memory=options.in_memory) as url:
        results = [measure_headsearch(url, options.trials, options.workers)]
        load.append(round(os.getloadavg()[0], 2))
        if not options.without_plain:
            results.append(measure_plain(url, options.trials, options.workers))
            load.append(round(os.getloadavg()[0], 2))
    run = vars(options) | {"cores": os.cpu_count(), "load_before_between_after": load}
    if options.json:
        text = json.dumps({"run": run, "results": [asdict(one) for one in results]}, indent=1)
    else:
        text = "\n\n".join([str(run), *(table(one) for one in results)])
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
