"""What compose.yaml starts, under a name, secrets and a port of the test's own."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
COMPOSE_GPU = ROOT / "docker" / "compose.gpu.yaml"
COMMAND = ("docker-compose",) if shutil.which("docker-compose") else ("docker", "compose")
ROLES = ("owner", "worker", "reader")
PATIENCE_SECONDS = 600.0
"""For whatever takes seconds on an idle machine."""


def run(*command: str, check: bool = True, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command; what it said if it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=1500, errors="replace"
    )
    assert not check or done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    )
    return done.stdout


def docker(*arguments: str, check: bool = True) -> str:
    return run("docker", *arguments, check=check)


def inspect(thing: str) -> dict[str, Any]:
    """The engine's knowledge of a container or an image."""
    return json.loads(docker("inspect", thing))[0]


def logs(container: str) -> str:
    """Both streams of a container."""
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def eventually(what: Callable[[], Any], name: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """What `what` says once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"still not after {seconds:.0f} s: {name}"
        time.sleep(0.5)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """One installation; `settings` are what its .env would hold."""

    def __init__(self, folder: Path, settings: dict[str, str], *, files: Sequence[Path] = ()) -> None:
        self.name = f"hs-test-{secrets.token_hex(4)}"
        self.port = free_port()
        self.passwords = {role: secrets.token_hex(24) for role in ROLES}
        kept = self._secrets = folder / "secrets"
        kept.mkdir()
        for role, password in self.passwords.items():
            file = kept / f"{role}_password"
            file.write_text(f"{password}\n")
            file.chmod(0o644)
        self._files = [argument for file in (COMPOSE, *files) for argument in ("-f", str(file))]
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HEADSEARCH_", "COMPOSE_"))
        } | {
            "COMPOSE_PROJECT_NAME": self.name,
            "HEADSEARCH_SECRETS": str(kept),
            "HEADSEARCH_DASHBOARD_PORT": str(self.port),
            "HEADSEARCH_THREADS": "1",
            **settings,
        }

    def compose(self, *arguments: str, check: bool = True) -> str:
        return run(*COMMAND, *self._files, *arguments, check=check, environment=self._environment)

    def cli(self, *arguments: str) -> str:
        """Output of a headsearch command in a container of its own."""
        return self.compose("run", "--rm", "-T", "cli", *arguments)

    def study(self, name: str) -> dict[str, Any]:
        return json.loads(self.cli("study", "show", name, "--json"))

    def change_password(self, role: str) -> None:
        """Write a new one into the file of a role."""
        self.passwords[role] = secrets.token_hex(24)
        (self._secrets / f"{role}_password").write_text(f"{self.passwords[role]}\n")

    def sql(self, statement: str) -> str:
        """What the server's own psql says, as the owner, over the socket in its container."""
        [database] = self.containers("db")
        return docker(
            "exec", database, "psql", "-h", "/run/postgresql", "-U", "headsearch", "-Atc", statement
        ).strip()

    def up(self, *arguments: str) -> None:
        self.compose("up", "-d", "--no-build", *arguments)

    def containers(self, service: str, *, running: bool = False) -> list[str]:
        """Ids of the containers of a service, running ones or all."""
        labels = [
            f"label=com.docker.compose.{key}"
            for key in (f"project={self.name}", f"service={service}", "oneoff=False")
        ]
        filters = [argument for label in labels for argument in ("--filter", label)]
        return docker("ps", "-q", "--no-trunc", *([] if running else ["-a"]), *filters).split()

    def all_containers(self) -> list[str]:
        return docker(
            "ps", "-aq", "--no-trunc", "--filter", f"label=com.docker.compose.project={self.name}"
        ).split()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page of the dashboard; status 0 while nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def remove(self) -> None:
        """Containers, networks and volumes."""
        self.compose("kill", check=False)
        for container in self.all_containers():  # also those of `run`
            docker("rm", "-f", container, check=False)
        self.compose("down", "--volumes", "--remove-orphans", check=False)
