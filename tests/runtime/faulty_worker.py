"""A worker in which one thing goes wrong for real: ``python faulty_worker.py STUDY FAULT``.

hang      a training step of heads with projection dim 2 never returns
memory    the process may take 1 GiB more than it has after its imports
"""

from __future__ import annotations

import resource
import sys
import threading

import psutil

from headsearch.core import epoch
from headsearch.errors import HeadsearchError
from headsearch.runtime.worker import run_worker


def hang() -> None:
    steps = epoch.STEPS["joint"]

    def joint(batch):
        if batch.learner.config.head.projection_dim == 2 and batch.number == 1:
            threading.Event().wait()
        return steps(batch)

    epoch.STEPS["joint"] = joint


def limit_memory() -> None:
    most = psutil.Process().memory_info().vms + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    study, fault = sys.argv[1:]
    {"hang": hang, "memory": limit_memory}[fault]()
    try:
        run_worker(study, device="cpu", threads=1, say=lambda line: print(line, flush=True))
    except HeadsearchError as error:
        sys.exit(f"error: {error}")


main()
