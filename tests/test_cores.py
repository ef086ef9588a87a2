"""The cores that a process may use: those of its affinity, or its control group's share of time."""

from __future__ import annotations

import os

import pytest

from headsearch import cores


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Eight visible cores, and control groups as a test writes them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")

    def write(membership: str, **files: str) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, content in files.items():
            path = tmp_path / "mount" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def test_without_control_groups_all_visible_cores_count(groups):
    assert cores.usable_cores() == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("nonsense", 8)],
)
def test_version_two(groups, quota, expected):
    groups("0::/\n", cpu_DOT_max=quota)
    assert cores.usable_cores() == expected


def test_version_two_takes_the_least_of_its_group_and_those_above(groups):
    groups("0::/pods/one\n", pods__cpu_DOT_max="300000 100000", pods__one__cpu_DOT_max="400000 100000")
    assert cores.usable_cores() == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("150000", 1), ("400000", 4)])
def test_version_one(groups, quota, expected):
    groups(
        "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n",
        cpu__docker__abc__cpu_DOT_cfs_quota_us=quota,
        cpu__docker__abc__cpu_DOT_cfs_period_us="100000",
    )
    assert cores.usable_cores() == expected


def test_in_a_container_the_path_of_the_host_is_not_seen(groups):
    groups("4:cpu:/docker/abc\n", cpu__cpu_DOT_cfs_quota_us="200000", cpu__cpu_DOT_cfs_period_us="100000")
    assert cores.usable_cores() == 2
