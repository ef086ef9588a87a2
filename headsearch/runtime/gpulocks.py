"""The right to use a GPU: a lock on a file that is named for the GPU's UUID and one of its slots.

The kernel drops a lock when its holder dies, however it dies, so nothing goes stale: what a file says of its
holder is for people, and counts only while the lock is held. Locks of this kind work between processes,
users and containers of one machine that see the same folder; the database has no part in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from headsearch.errors import InputError, StorageError
from headsearch.home import gpu_locks_folder, home_folder
from headsearch.runtime.gpus import Gpu

FOLDER_VARIABLE: Final = "HEADSEARCH_GPU_LOCKS"
SLOTS_VARIABLE: Final = "HEADSEARCH_GPU_SLOTS"
SYSTEM_FOLDER = Path("/run/headsearch")
MOST_SLOTS: Final = 32
_OPEN_TO_ALL: Final = 0o1777
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_MOST_BYTES: Final = 4096


def gpu_slots() -> int:
    """Workers that share one GPU: $HEADSEARCH_GPU_SLOTS. InputError if that is no number of workers."""
    given = os.environ.get(SLOTS_VARIABLE, "").strip() or "1"
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= MOST_SLOTS):
        raise InputError(f"{SLOTS_VARIABLE}: {given!r} is not a whole number from 1 to {MOST_SLOTS}")
    return int(given)


def locks_folder() -> Path:
    """The folder of the locks; it need not be there yet.

    It is $HEADSEARCH_GPU_LOCKS, else /run/headsearch where that can be written or made, else one of this
    host's below the home folder, which the workers of other users and containers do not see.

    Raises InputError if the variable names no folder.
    """
    given = os.environ.get(FOLDER_VARIABLE, "")
    if given:
        folder = Path(given).expanduser()
        if not folder.is_absolute():
            raise InputError(
                f"{FOLDER_VARIABLE}: {given!r} is not absolute: all workers of a host need the same"
            )
        if folder.exists() and not _writable(folder):
            raise InputError(f"{FOLDER_VARIABLE}: {given} is not a folder that can be written")
        return folder
    if _writable(SYSTEM_FOLDER) or (not SYSTEM_FOLDER.exists() and _writable(SYSTEM_FOLDER.parent)):
        return SYSTEM_FOLDER
    return gpu_locks_folder(home_folder())


def make_locks_folder() -> Path:
    """The same, made if it is not there: open to all like /tmp, since workers may be several users.

    Raises InputError if it cannot be made where the variable says.
    """
    folder = locks_folder()
    umask = os.umask(0)  # no moment in which it is there and others cannot write it
    try:
        folder.mkdir(_OPEN_TO_ALL)
    except FileExistsError:
        pass
    except OSError as error:
        raise InputError(
            f"{FOLDER_VARIABLE}: {folder} cannot be made ({error.strerror}): make it, or name another folder"
        ) from error
    finally:
        os.umask(umask)
    return folder


def hidden_from_others(folder: Path) -> bool:
    """The machine has a folder for all, which this user may not write, so leases are kept in `folder`."""
    return SYSTEM_FOLDER.exists() and folder != SYSTEM_FOLDER and not os.environ.get(FOLDER_VARIABLE)


@dataclass(frozen=True)
class Holder:
    """Who has a slot, as its file says."""

    host: str
    pid: int
    worker: str | None
    since: str

    def __str__(self) -> str:
        return self.worker or f"{self.host}:{self.pid}"


class GpuLease:
    """A slot of a GPU, held until `release` or the end of this process.

    A process that is forked from this one does not keep it, nor does a program that it starts.
    """

    def __init__(self, gpu: Gpu, slot: int, fd: int) -> None:
        self.gpu, self.slot = gpu, slot
        self._fd = fd
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        _held.add(fd)

    def __str__(self) -> str:
        return f"{self.gpu.uuid} slot {self.slot}" if self.slot else self.gpu.uuid

    def sign(self, worker: str | None = None) -> None:
        """Say in the file who holds it. A full disk is no reason not to train."""
        said = {"host": socket.gethostname(), "pid": os.getpid(), "worker": worker, "since": self._since}
        content = json.dumps(said).encode() + b"\n"
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, content, 0)

    def release(self) -> None:
        """Let others have it."""
        if self._fd in _held:
            _held.discard(self._fd)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
        self._fd = -1


def take(gpus: Sequence[Gpu], slots: int, folder: Path) -> GpuLease | None:
    """A slot of the GPU that has the fewest workers, or None when all are taken.

    Raises StorageError when a lock file is not what we would have made.
    """
    tried: list[tuple[int, Gpu, int, int]] = []
    chosen = None
    try:
        for gpu in gpus:
            fds = [_lock(_path(folder, gpu, slot)) for slot in range(slots)]
            held = fds.count(None)
            tried += [(held, gpu, slot, fd) for slot, fd in enumerate(fds) if fd is not None]
            if held == 0:
                break
        chosen = min(tried, key=lambda found: found[0], default=None)
    finally:
        for one in tried:
            if one is not chosen:
                os.close(one[3])
    if chosen is None:
        return None
    lease = GpuLease(*chosen[1:])
    lease.sign()
    return lease


def holders(gpu: Gpu, slots: int, folder: Path) -> list[Holder | None]:
    """Who has each slot, None where nobody does; takes nothing.

    Raises StorageError as `take`.
    """
    found: list[Holder | None] = []
    for slot in range(slots):
        fd = _open(_path(folder, gpu, slot), make=False)
        if fd is None:
            found.append(None)
            continue
        try:
            # A shared lock, so that two who look do not see each other.
            found.append(None if _try(fd, fcntl.LOCK_SH) else _read(fd))
        finally:
            os.close(fd)
    return found


def _path(folder: Path, gpu: Gpu, slot: int) -> Path:
    return folder / f"gpu-{gpu.uuid.replace('/', '_')}.{slot}.lock"


def _lock(path: Path) -> int | None:
    """The file, open and locked; None if others hold it."""
    while True:
        fd = _open(path)
        assert fd is not None  # noqa: S101
        kept = False
        try:
            if not _try(fd, fcntl.LOCK_EX):
                return None
            # If somebody removed it meanwhile, the next worker would not see our lock.
            with contextlib.suppress(FileNotFoundError):
                kept = os.path.samestat(path.stat(follow_symlinks=False), os.fstat(fd))
            if kept:
                return fd
        finally:
            if not kept:
                os.close(fd)


def _open(path: Path, *, make: bool = True) -> int | None:
    """Open a lock file, or make it for all users to lock and write; None if it is not there and not made.

    In a folder that all may write to, somebody may have put a link, a pipe or a second name of another file
    there, which we would write into. Opening it must not say O_CREAT either: in such a folder Linux then
    refuses the files of others (fs.protected_regular).
    """
    while True:
        try:
            fd = os.open(path, _FLAGS)
            break
        except FileNotFoundError:
            if not make:
                return None
        except OSError as error:
            raise StorageError(_refusal(path, error)) from error
        # No moment in which it is there and others cannot open it.
        umask = os.umask(0)
        try:
            fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise StorageError(_refusal(path, error)) from error
        finally:
            os.umask(umask)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
        os.close(fd)
        raise StorageError(f"{path} is not a lock file of ours: remove it, and see who put it there")
    return fd


def _refusal(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{path} is a symbolic link: remove it, and see who put it there"
    what = (
        "its mode must be 0666" if error.errno == errno.EACCES else f"set {FOLDER_VARIABLE} to another folder"
    )
    return f"cannot open {path} ({error.strerror}): {what}"


def _try(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"the folder of GPU locks cannot lock ({error.strerror}): "
            f"set {FOLDER_VARIABLE} to one on a local disk"
        ) from error
    return True


def _read(fd: int) -> Holder:
    """What a file says, which anybody may have written: one line of printable characters for each."""
    said: Any = None
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(os.pread(fd, _MOST_BYTES, 0))
    if not isinstance(said, dict):
        said = {}
    pid = said.get("pid")
    return Holder(
        _plain(said.get("host")) or "somebody",
        pid if isinstance(pid, int) else 0,
        _plain(said.get("worker")) or None,
        _plain(said.get("since")),
    )


def _plain(said: Any) -> str:
    return "".join(c for c in str(said)[:200] if c.isprintable()) if isinstance(said, str) else ""


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


_held: set[int] = set()


def _forget() -> None:
    # The lock belongs to the open file, which a forked process would hold too, perhaps after we have died.
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
