"""Machines on a cable: Linux network namespaces with PostgreSQL in one of them, for tests that cut the cable.

Each machine is a namespace; a cable leads from it to a bridge in a namespace of its own. Nothing is added to the
network of this machine. The database is read here through a Unix socket, which is a file and knows of no
namespaces, so the test sees what a cut-off machine cannot.

Names hold the process id of their test run. What a killed run left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2

from headsearch.runtime.pgbinaries import Binaries, server_user, usable_binaries

PREFIX = "headsearch-test"
SHARED_MEMORY = Path("/dev/shm")
PASSWORD = "between-namespaces"
SETTINGS = {
    "listen_addresses": "*",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "60",
}
_OURS = re.compile(rf"{PREFIX}-(\d+)-\w+")
_AS_USER = (
    "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1])); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


def missing() -> str | None:
    """Why there can be no namespaces here, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if not shutil.which("ip"):
        return "no ip: install iproute2"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        clear_leftovers()
        _ip("netns", "add", probe)
        try:
            _ip("-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "other")
            _ip("-n", probe, "link", "add", "name", "bridge", "type", "bridge")
        finally:
            _remove(probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip() or error}"
    return None


def namespaces() -> list[str]:
    """Those of this machine that are ours, or another test run's."""
    return [name for name in _ip("netns", "list").split() if _OURS.fullmatch(name)]


def clear_leftovers() -> None:
    """Remove namespaces, their processes, and folders of test runs that are no more."""
    for name in namespaces():
        if _is_left(name):
            with contextlib.suppress(subprocess.CalledProcessError):  # another run removes it
                _remove(name)
    for folder in SHARED_MEMORY.glob(f"{PREFIX}-*"):
        if _is_left(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _is_left(name: str) -> bool:
    match = _OURS.fullmatch(name)
    return match is not None and not Path("/proc", match[1]).exists()


class Network:
    """A switch with machines on it, inside a block; the first is ``db``."""

    def __init__(self, *machines: str) -> None:
        self.machines = ("db", *machines)
        self.switch = self._namespace("switch")

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*map(self._namespace, self.machines), self.switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                _remove(name)

    def _build(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "name", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "dev", "bridge", "up")
        for machine in self.machines:
            space = self._namespace(machine)
            _ip("netns", "add", space)
            self._port(machine, "add", "type", "veth", "peer", "name", "eth0", "netns", space)
            self._port(machine, "set", "master", "bridge", "up")
            _ip("-n", space, "address", "add", f"{self.address(machine)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "dev", "eth0", "up")
            _ip("-n", space, "link", "set", "dev", "lo", "up")

    def _namespace(self, machine: str) -> str:
        return f"{PREFIX}-{os.getpid()}-{machine}"

    def address(self, machine: str) -> str:
        """Of the internet protocol, inside the network."""
        return f"10.0.0.{1 + self.machines.index(machine)}"

    def command(self, machine: str, command: Sequence[str | Path]) -> list[str]:
        """`command` as it is run on `machine`; the process id is the command's own."""
        return ["ip", "netns", "exec", self._namespace(machine), *map(str, command)]

    def cut(self, machine: str) -> None:
        """Lose every frame from and to `machine`, whose own link looks as before."""
        self._port(machine, "set", "nomaster")

    def unplug(self, machine: str) -> None:
        """Take the link of `machine` down: it sees that it has no carrier."""
        self._port(machine, "set", "down")

    def restore(self, machine: str) -> None:
        """Undo `cut` and `unplug`."""
        self._port(machine, "set", "master", "bridge", "up")

    def _port(self, machine: str, verb: str, *change: str) -> None:
        """Make or change the switch's end of the cable to `machine`."""
        name = "dev" if verb == "set" else "name"
        _ip("-n", self.switch, "link", verb, name, f"to-{machine}", *change)


@dataclass(frozen=True)
class NetworkServer:
    """PostgreSQL on the machine ``db``."""

    network: Network
    socket_folder: Path

    @property
    def url(self) -> str:
        """Of the database, for us."""
        return f"postgresql+psycopg2://headsearch:{PASSWORD}@/headsearch?host={self.socket_folder}"

    @property
    def network_url(self) -> str:
        """Of the database, for a machine of the network."""
        return f"postgresql+psycopg2://headsearch:{PASSWORD}@{self.network.address('db')}:5432/headsearch"


@contextmanager
def network_with_server(*machines: str) -> Iterator[NetworkServer]:
    """A network of `machines` and PostgreSQL, whose commits need not last."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-", dir=SHARED_MEMORY))
    try:
        folder.chmod(0o755)
        with Network(*machines) as network:
            user = server_user(folder / "data")
            binaries = usable_binaries(user, folder)
            _make_cluster(binaries, folder)
            settings = SETTINGS | {"unix_socket_directories": str(folder / "socket")}
            command = [sys.executable, "-c", _AS_USER, str(user.uid), str(user.gid)]
            command += [str(binaries.folder / "postgres"), "-D", str(folder / "data")]
            command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
            with (folder / "log").open("w") as log:
                process = subprocess.Popen(
                    network.command("db", command), stdout=log, stderr=log, cwd="/", start_new_session=True
                )
            try:
                server = NetworkServer(network, folder / "socket")
                _make_database(server, process, folder / "log")
                yield server
            finally:
                process.send_signal(signal.SIGINT)  # a fast shutdown
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_cluster(binaries: Binaries, folder: Path) -> None:
    """Data and socket folders that belong to the server's user."""
    password = folder / "password"
    password.write_text(PASSWORD)
    for place in (folder / "cluster", folder / "socket"):
        place.mkdir()
    for place in (password, folder / "cluster", folder / "socket"):
        os.chown(place, binaries.user.uid, binaries.user.gid)
    arguments = ["-D", folder / "cluster", "-U", "headsearch", f"--pwfile={password}"]
    arguments += ["-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
    done = binaries.run("initdb", arguments, timeout=120)
    assert done.returncode == 0, done.stdout
    (folder / "cluster").rename(folder / "data")
    with (folder / "data" / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.0.0.0/24 scram-sha-256\n")


def _make_database(server: NetworkServer, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the server, then make the database."""
    deadline = time.monotonic() + 60
    while True:
        try:
            connection = psycopg2.connect(
                host=str(server.socket_folder), user="headsearch", password=PASSWORD, dbname="postgres"
            )
            break
        except psycopg2.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    with contextlib.closing(connection):
        connection.autocommit = True
        connection.cursor().execute("CREATE DATABASE headsearch")


@dataclass
class Process:
    """A process on a machine, and what it says."""

    machine: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """All it has said."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 280) -> int:
        """Its exit code; fails after `seconds`."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s; it said:\n{self.output}") from None


@dataclass
class Processes:
    """Starts processes on machines; those that run at the block's end are killed."""

    network: Network
    folder: Path
    all: list[Process] = field(default_factory=list)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.all:
            process.popen.kill()
            process.popen.wait()

    def start(self, machine: str, command: Sequence[str | Path], env: dict[str, str]) -> Process:
        """Run `command` on `machine`."""
        log = self.folder / f"{len(self.all)}-{machine}.log"
        with log.open("w") as out:
            popen = subprocess.Popen(
                self.network.command(machine, command),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env,
            )  # fmt: skip
        self.all.append(Process(machine, popen, log))
        return self.all[-1]


def _remove(namespace: str) -> None:
    """End what runs in a namespace of ours, then remove it with its cable."""
    for attempt in range(200):
        pids = _ip("netns", "pids", namespace).split()
        if not pids:
            break
        # PostgreSQL leaves shared memory behind when it has no time to end.
        how = signal.SIGINT if attempt == 0 else signal.SIGKILL if attempt > 60 else None
        for pid in pids if how else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), how)
        time.sleep(0.05)
    _ip("netns", "delete", namespace)


def _ip(*arguments: str) -> str:
    """Run ip. Raises CalledProcessError with what it said."""
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
