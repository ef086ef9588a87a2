"""Step 5: a study of short trials through a real PostgreSQL, with two workers on one device."""

from __future__ import annotations

import os
import re
import time
from typing import Any

from setting import Clock, LeftOut, Say, Setting

NAME = "first-light"
WORKERS = 2
TRIALS, SMOKE_TRIALS = 24, 4
TAKEN = re.compile(r"^trial \d+ new at epoch", re.MULTILINE)
LOOK_SECONDS = 0.2
SPARE_SECONDS = 8.0
"""Of the step's time, for the audit and for stopping what runs on."""


def study(setting: Setting) -> dict[str, Any]:
    """The study: small encoders on few images, with a rung, and a probe that takes no time."""
    assert setting.data is not None
    tree: dict[str, Any] = {
        "name": NAME,
        "question": "Do two workers on one GPU and a database get through 24 short trials?",
        "budget": {"trials": TRIALS, "epochs": 3, "rungs": [1]},
        "base": {
            "data": {"name": "folder", "root": str(setting.data), "image_size": 32, "limit": 10_000},
            "training": {"batch_size": 256},
            "probe": {"penalties": [1e-3], "iterations": 50},
        },
        "space": {
            "head.kind": ["mlp", "linear"],
            "head.width": {"low": 32, "high": 512, "log": True, "when": {"head.kind": "mlp"}},
            "head.projection_dim": [2, 8, 32, 128],
        },
    }
    if setting.smoke:
        tree["budget"] = {"trials": SMOKE_TRIALS, "epochs": 2, "rungs": [1]}
        tree["base"] |= {"encoder": {"width": 4}, "training": {"batch_size": 32}}
        tree["base"]["probe"] |= {"iterations": 5, "report_images": 32, "report_iterations": 2}
    return tree


def run(setting: Setting, say: Say, clock: Clock) -> None:
    """Start PostgreSQL and the workers, wait for the study's end, and audit it."""
    from headsearch.errors import HeadsearchError
    from headsearch.runtime.launcher import LocalWorkers
    from headsearch.runtime.pgbinaries import find_folder
    from headsearch.runtime.session import open_session
    from headsearch.runtime.verifying import verify
    from headsearch.search import snapshot, studies
    from headsearch.spec import StudySpec

    if setting.data is None:
        raise LeftOut("no images: --data")
    try:
        find_folder()
    except HeadsearchError as error:
        raise LeftOut(str(error)) from error
    os.environ["HEADSEARCH_GPU_SLOTS"] = str(WORKERS)
    threads = 1 if setting.smoke else None
    with open_session() as session:
        say("study: PostgreSQL", {"server": session.address.redacted.rpartition("@")[2]})
        made, _ = studies.create(session.database, StudySpec.model_validate(study(setting)))
        began = time.monotonic()
        # They leave what is for the dashboard, which needs plotly, to whoever started them.
        with LocalWorkers(
            made.name, WORKERS, device=setting.device, threads=threads, home=session.home
        ) as pool:
            while not (now := snapshot.read(session.database, made.name)).study.ended:
                died = [one for one in pool.poll() if one.returncode]
                for one in died:
                    last = (one.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
                    say("study: worker", {"worker": one.index}, failed=f"exit {one.returncode}: {last[:300]}")
                if (waits := clock.left < SPARE_SECONDS) or not pool.alive:
                    why = f"not ended in {time.monotonic() - began:.0f} s" if waits else "all workers ended"
                    raise AssertionError(f"{why}: {dict(now.counts)}")
                time.sleep(LOOK_SECONDS)
            seconds = time.monotonic() - began
            logs = [pool.log(index) for index in range(WORKERS)]
            taken = [len(TAKEN.findall(log.read_text(errors="replace"))) for log in logs]
        said = verify(session, made.name)
        trials = now.trials
        # From the first trial's begin on the database's clock: without the start of the workers' Python and torch.
        trained = (
            max(t.finished_at or now.now for t in trials) - min(t.started_at for t in trials)
        ).total_seconds()
        values = {
            "trials": len(trials),
            **{state: now.counts[state] for state in ("complete", "pruned", "failed")},
            "trials_per_hour": 3600 * len(trials) / trained,
            "trials_per_hour_with_start": 3600 * len(trials) / seconds,
            "epochs": now.epochs_trained,
            "begun_by_each_worker": taken,
            "devices": sorted({trial.device or "?" for trial in trials}),
            "verify_clean": said.clean,
            "reports": said.reports,
        }
        say("study: trials", values)
        broken = [f"{one.rule}: {one.message}" for one in said.findings if one.violated]
        assert said.clean, "; ".join(broken)
        assert now.counts["failed"] == 0, [t.message for t in trials if t.state == "failed"]
        assert all(taken), f"trials begun by each worker: {taken}"
        if setting.on_gpu:
            elsewhere = sorted({str(t.device) for t in trials if not str(t.device).startswith("cuda")})
            assert not elsewhere, f"trials ran on {elsewhere}"
