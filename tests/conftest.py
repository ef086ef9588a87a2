"""Fixtures and skips that all tests share.

Each process of pytest-xdist has a server of its own, so that tests never meet in a database.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before torch and numpy are loaded: the tests of two xdist processes share two cores, and threads that
# wait for each other on busy ones take many times as long.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from headsearch.errors import HeadsearchError
from headsearch.runtime import pgroles
from headsearch.runtime.database import DatabaseAddress
from headsearch.runtime.pgbinaries import find_folder
from headsearch.runtime.postgres import EmbeddedServer

if TYPE_CHECKING:
    from optuna import Study

_DATABASE_VARIABLES = (
    "HEADSEARCH_DATABASE_URL",
    "HEADSEARCH_DATABASE_URL_FILE",
    "HEADSEARCH_DATABASE_PASSWORD_FILE",
)


def chromium_executable() -> str | None:
    """``$HEADSEARCH_CHROMIUM``, else the system's Chromium or Chrome."""
    named = os.environ.get("HEADSEARCH_CHROMIUM", "")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if (found := shutil.which(name))), None)


def missing_for(marker: str) -> str | None:
    """Why tests with this marker cannot run here, or None when they can."""
    if marker == "postgres":
        try:
            find_folder()
        except HeadsearchError as error:
            return str(error)
    if marker == "browser":
        if not importlib.util.find_spec("playwright"):
            return "playwright is not installed"
        if not chromium_executable():
            return "no Chromium: install one or set HEADSEARCH_CHROMIUM"
    if marker == "containers":
        return _no_engine()
    if marker == "slurm":
        return _no_slurm()
    if marker == "gpu":
        import torch

        if not torch.cuda.is_available():
            return "no CUDA device"
    return None


def _no_slurm() -> str | None:
    if not shutil.which("sbatch") or not shutil.which("sinfo"):
        return "no Slurm"
    asked = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False)
    return None if asked.stdout.strip() else f"Slurm has no nodes: {asked.stderr.strip() or 'none listed'}"


def _no_engine() -> str | None:
    if not shutil.which("docker"):
        return "no docker"
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, timeout=60)
    if plugin.returncode and not shutil.which("docker-compose"):
        return "neither docker-compose nor docker's compose"
    asked = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False, timeout=60)
    return None if asked.returncode == 0 else f"no Docker engine: {asked.stderr.strip().splitlines()[-1]}"


@contextmanager
def open_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder that other users may enter, in memory unless `parent` says where."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent or memory_folder())).resolve()
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def memory_folder() -> Path | None:
    """Where commits cost no disk writes, if there is room; no test cuts the power."""
    folder, gibibyte = Path("/dev/shm"), 2**30
    usable = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > gibibyte
    return folder if usable else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker in ("postgres", "browser", "containers", "slurm", "gpu"):
            if item.get_closest_marker(marker):
                reason = reasons.setdefault(marker, missing_for(marker))
                if reason:
                    item.add_marker(pytest.mark.skip(reason=reason))
        # Minutes of kills and cuts are many processes each, on a machine that may have other work.
        if item.get_closest_marker("hostile") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(autouse=True)
def _no_outer_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test never writes to a database or home that the developer works with."""
    for name in _DATABASE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def _gpu_locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-locks")


@pytest.fixture(autouse=True)
def _no_outer_gpu_locks(_gpu_locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of tests wait for nobody's GPU: many share one, where there is one."""
    monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", str(_gpu_locks))
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "32")


@pytest.fixture(scope="session")
def open_folder_factory() -> Callable[..., AbstractContextManager[Path]]:
    """Makes temporary folders that other users may enter, in memory unless told where."""
    return open_folder


@pytest.fixture
def headsearch_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder of the test's own, set as HEADSEARCH_HOME.

    Not below `tmp_path`, which is closed to the user that PostgreSQL runs as when tests run as root.
    """
    with open_folder("headsearch-home-") as home:
        monkeypatch.setenv("HEADSEARCH_HOME", str(home))
        yield home


@dataclass(frozen=True)
class PostgresServer:
    """The running server that a process's tests share."""

    server: EmbeddedServer

    def address(self, database: str) -> DatabaseAddress:
        url, reader_url = self.server.url("owner", database), self.server.url("reader", database)
        return DatabaseAddress(url, reader_url, embedded=True)

    def create_database(self) -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        pgroles.create_database(*self._access(), name)
        return name

    def drop_database(self, name: str) -> None:
        pgroles.drop_database(*self._access(), name)

    def _access(self) -> tuple[int, str]:
        port, password = self.server.folder.port, self.server.folder.password("owner")
        assert port
        return port, password


def _remove_leftovers() -> None:
    """Stop and delete the shared servers of test runs that were killed."""
    parent = memory_folder() or Path(tempfile.gettempdir())
    for users_lock in parent.glob("headsearch-tests-*/postgres/users.lock"):
        with contextlib.suppress(HeadsearchError):  # in use, or another user's
            EmbeddedServer(users_lock.parent).stop()
            shutil.rmtree(users_lock.parents[1], ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    reason = missing_for("postgres")
    if reason:
        pytest.skip(reason)
    _remove_leftovers()
    with open_folder("headsearch-tests-") as home:
        server = EmbeddedServer(home / "postgres")
        with server.attach():
            yield PostgresServer(server)


@pytest.fixture
def database_address(postgres_server: PostgresServer) -> Iterator[DatabaseAddress]:
    """A fresh, empty database, which the reader role may read."""
    name = postgres_server.create_database()
    yield postgres_server.address(name)
    postgres_server.drop_database(name)


@pytest.fixture
def database_url(database_address: DatabaseAddress) -> str:
    """URL of a fresh, empty database for SQLAlchemy."""
    return database_address.url


@pytest.fixture
def subprocess_env(headsearch_home: Path) -> dict[str, str]:
    """Environment for child processes: this checkout on their path, and a home folder of the test's own."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return {
        **os.environ,
        "HEADSEARCH_HOME": str(headsearch_home),
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """CIFAR-10 as images, train/<class>/* and test/<class>/*."""
    named = os.environ.get("HEADSEARCH_TEST_CIFAR10", "")
    if not named:
        pytest.skip("HEADSEARCH_TEST_CIFAR10 names no folder of CIFAR-10 images")
    return Path(named)


@pytest.fixture
def pareto_study(database_url: str) -> Study:
    """A study in plain Optuna: accuracy up, dim down; 20 complete trials and 4 pruned ones."""
    import optuna
    from optuna.storages import RDBStorage
    from optuna.trial import TrialState

    study = optuna.create_study(
        study_name="heads",
        storage=RDBStorage(database_url, engine_kwargs={"pool_size": 1}),
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["probe accuracy", "projection dim"])
    for number in range(24):
        trial = study.ask()
        dim = trial.suggest_int("head.projection_dim", 2, 128, log=True)
        temperature = trial.suggest_float("objective.temperature", 0.05, 1.0)
        if number % 6 == 5:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [0.9 - 0.4 / dim - 0.1 * temperature, dim])
    return study


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of Chromium, for playwright's `executable_path`."""
    executable = chromium_executable()
    if not executable:
        pytest.skip("no Chromium: install one or set HEADSEARCH_CHROMIUM")
    return executable
