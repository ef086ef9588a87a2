"""Slots of GPUs as locks on files: who gets one, who may touch the files, and what is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
from embedded import wait_until

from headsearch.errors import InputError, StorageError
from headsearch.runtime import gpulocks
from headsearch.runtime.gpulocks import (
    gpu_slots,
    hidden_from_others,
    holders,
    locks_folder,
    make_locks_folder,
    take,
)
from headsearch.runtime.gpus import Gpu

GPUS = (Gpu(0, "A100", "GPU-0a"), Gpu(1, "A100", "GPU-1b"))
NOBODY = 65534


@pytest.fixture
def leases():
    """Takes leases and gives them back after the test."""
    taken = []

    def taking(gpus, slots, folder):
        lease = take(gpus, slots, folder)
        if lease:
            taken.append(lease)
        return lease

    yield taking
    for lease in taken:
        lease.release()


def test_each_slot_has_one_holder(tmp_path, leases):
    first, second = leases(GPUS, 1, tmp_path), leases(GPUS, 1, tmp_path)
    assert {first.gpu.uuid, second.gpu.uuid} == {"GPU-0a", "GPU-1b"}
    assert leases(GPUS, 1, tmp_path) is None
    first.release()
    assert leases(GPUS, 1, tmp_path).gpu == first.gpu
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-GPU-0a.0.lock", "gpu-GPU-1b.0.lock"]


def test_slots_fill_gpus_evenly(tmp_path, leases):
    taken = [leases(GPUS, 3, tmp_path) for _ in range(7)]
    assert [(lease.gpu.index, lease.slot) for lease in taken[:6]] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2),
    ]  # fmt: skip
    assert taken[6] is None
    for lease in taken[1], taken[3], taken[0]:
        lease.release()
    # GPU 1 has one worker, GPU 0 has two.
    assert [(one.gpu.index, one.slot) for one in (leases(GPUS, 3, tmp_path) for _ in range(3))] == [
        (1, 0), (0, 0), (1, 1),
    ]  # fmt: skip
    assert str(taken[2]) == "GPU-0a slot 1"
    assert str(taken[0]) == "GPU-0a"


def test_the_file_says_who(tmp_path, leases):
    assert holders(GPUS[0], 2, tmp_path) == [None, None]
    assert list(tmp_path.iterdir()) == []
    lease = leases(GPUS, 2, tmp_path)
    (path,) = tmp_path.glob("gpu-GPU-0a.0.lock")
    assert set(json.loads(path.read_text())) == {"host", "pid", "worker", "since"}
    assert [str(who) for who in holders(GPUS[0], 2, tmp_path)] == [
        f"{os.uname().nodename}:{os.getpid()}",
        "None",
    ]
    lease.sign("lab-3:12:abc123")
    who, nobody = holders(GPUS[0], 2, tmp_path)
    assert (str(who), who.pid, nobody) == ("lab-3:12:abc123", os.getpid(), None)
    lease.release()
    assert holders(GPUS[0], 2, tmp_path) == [None, None]
    assert path.read_text() == ""
    lease.release()  # a second time is nothing


def test_what_a_file_says_without_a_holder_does_not_count(tmp_path, leases):
    path = tmp_path / "gpu-GPU-0a.0.lock"
    path.write_text('{"host": "gone", "pid": 1, "worker": "gone:1:x", "since": "then"}')
    assert holders(GPUS[0], 1, tmp_path) == [None]
    assert leases(GPUS, 1, tmp_path).gpu == GPUS[0]


@pytest.mark.parametrize(
    "said", [b"", b"{", b"[1]", b"\xff\xfe", b'{"host": 3, "pid": "x"}', b'{"worker": "\\u001b[2Jevil\\n"}']
)
def test_what_a_holder_did_not_write_well(tmp_path, leases, said):
    assert leases(GPUS[:1], 1, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(said)
    (who,) = holders(GPUS[0], 1, tmp_path)
    assert str(who).isprintable()
    assert "evil" in str(who) or str(who) == "somebody:0"


def test_files_are_for_all_users_whatever_the_umask_is(tmp_path, leases, monkeypatch):
    folder = tmp_path / "locks"
    monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", str(folder))
    before = os.umask(0o077)
    try:
        assert make_locks_folder() == folder
        leases(GPUS, 1, folder)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o666]
    folder.chmod(0o755)
    assert make_locks_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755, "a folder that is there stays as it is"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_waits_for_ours_and_we_for_theirs(tmp_path, leases, open_folder_factory, monkeypatch):
    """In a folder like /tmp, where Linux may refuse O_CREAT on the files of others."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from headsearch.runtime.gpulocks import take; from headsearch.runtime.gpus import Gpu\n"
        "gpus = (Gpu(0, 'A100', 'GPU-0a'), Gpu(1, 'A100', 'GPU-1b')); os.setgroups([]); os.setuid(65534)\n"
        "print(take(gpus, 1, Path(sys.argv[1])), take(gpus, 1, Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    with open_folder_factory("headsearch-locks-") as folder:
        folder.chmod(0o1777)
        lease = leases(GPUS, 1, folder)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", code, str(folder)], text=True, **pipes) as other:
            assert other.stdout.readline() == "GPU-1b None\n"
            assert leases(GPUS, 1, folder) is None
            assert (folder / "gpu-GPU-1b.0.lock").stat().st_uid == NOBODY
            assert holders(GPUS[1], 1, folder)[0].pid == other.pid
            lease.release()
            other.kill()
        assert {leases(GPUS, 1, folder).gpu, leases(GPUS, 1, folder).gpu} == set(GPUS)


def test_what_others_planted_is_refused_and_left_alone(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "locks"
    folder.mkdir()
    path = folder / "gpu-GPU-0a.0.lock"

    def refused(match):
        for call in (lambda: take(GPUS, 1, folder), lambda: holders(GPUS[0], 1, folder)):
            with pytest.raises(StorageError, match=match) as caught:
                call()
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
        path.unlink()
        assert victim.read_text() == "mine"

    path.symlink_to(victim)
    refused("is a symbolic link: remove it")
    path.symlink_to(tmp_path / "not there")
    refused("is a symbolic link: remove it")
    assert not (tmp_path / "not there").exists()
    path.hardlink_to(victim)
    refused("is not a lock file of ours")
    os.mkfifo(path)
    refused("is not a lock file of ours")
    assert take(GPUS, 1, folder).release() is None


def test_a_file_that_was_removed_while_it_was_locked_is_made_anew(tmp_path, leases, monkeypatch):
    path, tries = tmp_path / "gpu-GPU-0a.0.lock", []
    flock = gpulocks.fcntl.flock

    def removed_meanwhile(fd, how):
        flock(fd, how)
        tries.append(path.stat().st_ino)
        if len(tries) == 1:
            path.unlink()
            path.touch()

    monkeypatch.setattr(gpulocks.fcntl, "flock", removed_meanwhile)
    assert leases(GPUS[:1], 1, tmp_path)
    assert len(tries) == 2
    assert leases(GPUS[:1], 1, tmp_path) is None, "the lock is that of the file which is there"


def test_neither_forked_processes_nor_programs_keep_a_lease(tmp_path, leases):
    """They may outlive the worker: a loader that hangs must not hold its GPU."""
    code = (
        "import os, signal, subprocess, sys; from pathlib import Path\n"
        "from headsearch.runtime.gpulocks import take; from headsearch.runtime.gpus import Gpu\n"
        "lease = take([Gpu(0, 'A100', 'GPU-0a')], 1, Path(sys.argv[1]))\n"
        "program = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "forked = os.fork()\n"
        "if forked == 0: signal.pause()\n"
        "print(lease, program.pid, forked, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], text=True, start_new_session=True, **pipes
    ) as worker:
        held, *children = worker.stdout.readline().split()
        try:
            assert held == "GPU-0a"
            assert leases(GPUS[:1], 1, tmp_path) is None
            os.kill(worker.pid, 9)
            worker.wait()
            for child in children:
                os.kill(int(child), 0)
            # At once, but the forked one may not even have run yet.
            wait_until(lambda: leases(GPUS[:1], 1, tmp_path) is not None)
        finally:
            os.killpg(worker.pid, 9)


@pytest.mark.parametrize(("given", "slots"), [("", 1), ("1", 1), (" 4 ", 4), ("32", 32)])
def test_slots(monkeypatch, given, slots):
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", given)
    assert gpu_slots() == slots


@pytest.mark.parametrize("given", ["0", "-1", "33", "two", "1.5", "²", "1e1"])
def test_slots_that_are_none(monkeypatch, given):
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", given)
    with pytest.raises(InputError, match=r"^HEADSEARCH_GPU_SLOTS: '.*' is not a whole number from 1 to 32$"):
        gpu_slots()


def test_folders_that_are_none(tmp_path, monkeypatch):
    def refused(given, match):
        monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", str(given))
        with pytest.raises(InputError, match=f"^HEADSEARCH_GPU_LOCKS: .*{match}"):
            make_locks_folder()

    refused("locks", "is not absolute")
    refused(tmp_path / "a" / "b", "cannot be made")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is not a folder that can be written")
    refused(tmp_path / "file" / "below", "cannot be made")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        refused(tmp_path / "closed", "is not a folder that can be written")


def test_the_folder_by_default(tmp_path, monkeypatch, headsearch_home):
    monkeypatch.delenv("HEADSEARCH_GPU_LOCKS", raising=False)
    system = tmp_path / "run" / "headsearch"
    monkeypatch.setattr(gpulocks, "SYSTEM_FOLDER", system)
    own = headsearch_home / "gpus" / os.uname().nodename
    assert locks_folder() == own
    assert not hidden_from_others(own)
    system.parent.mkdir()
    assert locks_folder() == make_locks_folder() == system
    assert locks_folder() == system
    system.rmdir()
    system.touch()  # or is there and not ours
    assert locks_folder() == own
    assert hidden_from_others(own)
