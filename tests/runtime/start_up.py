"""How long a worker takes from its process's start to its first step, and how much of that is ours.

    python tests/runtime/start_up.py [--root FOLDER] [--repeats 5] [--json]

Starts an embedded PostgreSQL in a temporary folder and a study on digits, or on the images of FOLDER, and runs
`headsearch worker` in a process of its own until the first step of its first trial is made; then the process
ends. The first run fills the caches and is not counted. What others take is measured beside each run: a process
that imports the same modules, ours excepted, in the same order. The rest is ours: configuration, database,
claim, images, networks and the step itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from adoption_time import session

from headsearch.runtime.session import Session
from headsearch.search import studies
from headsearch.spec import StudySpec

# Marks are printed as they come: a name and the seconds since the process began.
WORKER = """
import os, sys, time
import psutil
began = psutil.Process().create_time()
def mark(name):
    print(f"{name}\\t{time.time() - began:.3f}", file=sys.stderr, flush=True)
def after(owner, attribute, name, then=lambda: None):
    inner = getattr(owner, attribute)
    def outer(*args, **kwargs):
        result = inner(*args, **kwargs)
        mark(name)
        then()
        return result
    setattr(owner, attribute, outer)
mark("python")
import torch
mark("torch")
from headsearch.runtime import study_images, worker
mark("packages")
from headsearch.core import epoch, pretrain
from headsearch.search import workers
def end():
    print(*[name for name in sys.modules if name.partition(".")[0] != "headsearch"], flush=True)
    os._exit(0)
after(worker, "pick_device", "device")
after(workers, "register", "database")
after(worker, "claim", "claim")
after(study_images, "load_images", "images")
after(pretrain, "build_learner", "networks")
after(epoch.Batch, "descend", "first step", end)
from headsearch.cli.app import run
run(["worker", "--study", sys.argv[1], "--threads", sys.argv[2], "--device", "cpu"])
"""
OTHERS = """
import importlib, sys, time
import psutil
for name in sys.stdin.read().split():
    try:
        importlib.import_module(name)
    except Exception:
        pass
print(time.time() - psutil.Process().create_time())
"""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with session() as opened:
        study = make(opened, options.root)
        runs = [once(study, options.threads) for _ in range(options.repeats + 1)][1:]
    names = list(runs[0])
    medians = {name: statistics.median(run[name] for run in runs) for name in names}
    if options.json:
        print(json.dumps({"median": medians, "runs": runs}, indent=2))
        return
    for name, seconds in medians.items():
        print(f"{name:<22}{seconds:6.2f} s  ({', '.join(f'{run[name]:.2f}' for run in runs)})")


def make(opened: Session, root: Path | None) -> str:
    """The study that workers join, with trials for all of them."""
    data = {"name": "folder", "root": str(root.resolve())} if root else {"name": "digits"}
    spec = {
        "name": "start-up",
        "budget": {"trials": 60, "epochs": 1},
        "base": {"data": data, "training": {"batch_size": 256}},
        "space": {"head.kind": ["mlp"], "head.projection_dim": list(range(2, 128))},
    }
    return studies.create(opened.database, StudySpec.model_validate(spec))[0].name


def once(study: str, threads: int) -> dict[str, float]:
    """Seconds at each mark of one worker, then the imports of others and the rest."""
    command = [sys.executable, "-c", WORKER, study, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    marks = {}
    for line in done.stderr.splitlines():
        name, tab, seconds = line.partition("\t")
        if tab:
            marks[name] = float(seconds)
    modules = done.stdout.splitlines()[-1]
    time.sleep(1.0)
    others = subprocess.run(
        [sys.executable, "-c", OTHERS], input=modules, capture_output=True, text=True, check=True
    )
    marks["imports of others"] = float(others.stdout.splitlines()[-1])
    marks["ours"] = marks["first step"] - marks["imports of others"]
    return marks


if __name__ == "__main__":
    main()
