"""What tests on a real Slurm share: jobs that are started by headsearch launch and do not outlive the test."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from processes import Command


def slurm(*command: str) -> str:
    """Ask Slurm."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@dataclass(frozen=True)
class Job:
    """A job array that was launched."""

    number: str
    logs: Path
    said: list[str]
    """By headsearch launch."""

    def log(self, task: int) -> str:
        """What a task has said, over all its starts."""
        path = self.logs / f"{self.number}_{task}_0_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def field(self, task: int, name: str) -> str:
        """A field of ``scontrol show job``."""
        shown = slurm("scontrol", "show", "job", f"{self.number}_{task}")
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found.group(1)

    @property
    def active(self) -> list[str]:
        """Tasks that wait, run or end."""
        return slurm("squeue", "-h", "-r", "-j", self.number, "-o", "%i %T").splitlines()


def launch(home: Path, study: Path, *options: str) -> Job:
    """``headsearch launch STUDY --on slurm``, as a process of its own."""
    command = Command("launch", str(study), "--on", "slurm", "--no-check", *options)
    said, _ = command.communicate(timeout=250)
    assert command.returncode == 0, said
    found = re.search(r"submitted as job (\d+)", said)
    assert found, said
    name = re.search(r'name = "([^"]+)"', study.read_text())
    assert name
    return Job(found.group(1), home / "logs" / name.group(1) / "slurm", said.splitlines())
