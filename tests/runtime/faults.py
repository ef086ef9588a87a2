"""What goes wrong for real in a worker process of a test; each is put into a process before it begins."""

from __future__ import annotations

import resource
import threading

import psutil

from headsearch.core import epoch


def hang() -> None:
    """The second training step of heads with projection dim 2 never returns."""
    steps = epoch.STEPS["joint"]

    def joint(batch):
        if batch.learner.config.head.projection_dim == 2 and batch.number == 1:
            threading.Event().wait()
        return steps(batch)

    epoch.STEPS["joint"] = joint


def limit_memory() -> None:
    """The process may take 1 GiB more than it has after its imports."""
    most = psutil.Process().memory_info().vms + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
