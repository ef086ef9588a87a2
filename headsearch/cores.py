"""How many processor cores this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MOUNT: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Count the cores of its affinity, or of its cgroup's share of time where that is less; at least 1.

    ``docker --cpus`` and a limit of Kubernetes leave all cores visible, and stop the processes of a group
    for the rest of each period once they have used its share.
    """
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(visible, *(int(share) for share in _shares()), visible))


def _shares() -> Iterator[float]:
    """Cores' worth of time that its control group and those above it may use: cgroups v2 and v1."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # another system
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, read = MOUNT, _share_v2
        elif "cpu" in controllers.split(","):
            root, read = MOUNT / "cpu", _share_v1
        else:
            continue
        # In a container the path may be the host's, of which only the root is seen here.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root or root in folder.parents:
                share = read(folder)
                if share is not None:
                    yield share


def _share_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _share_v1(folder: Path) -> float | None:
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period")
        )
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
