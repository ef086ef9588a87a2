"""A fake ``nvidia-smi``: a shell script for the PATH that says what the files beside it say.

`FakeNvidia(folder)` writes it; ``python fake_nvidia.py FOLDER 4`` does so from a shell and prints the folder
for the PATH, with four GPUs. The script needs ``sh``, ``cat`` and ``sleep`` alone, so it works in any container
that has the folder mounted. What it says can be changed while programs run.

It knows ``-L`` and ``--query-gpu=uuid,name,index --format=csv,noheader``, as documented in nvidia-smi's manual
and in NVIDIA's MIG user guide; exit codes are the manual's.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = """#!/bin/sh
# What is said is in the folder $FAKE_NVIDIA, by default the one named like this script with .d
said=${FAKE_NVIDIA:-$0.d}
if [ -f "$said/hang" ]; then exec sleep "$(cat "$said/hang")"; fi
case "$1" in
    -L | --list-gpus) cat "$said/list" ;;
    --query-gpu=uuid,name,index)
        if [ "$2" != --format=csv,noheader ]; then echo "not faked: $*"; exit 2; fi
        cat "$said/query" ;;
    *) echo "not faked: $*"; exit 2 ;;
esac
exit "$(cat "$said/code")"
"""

NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
    "NVIDIA driver is installed and running.\n\n"
)
"""With exit code 9."""
NO_DEVICES = "No devices were found\n"
"""With exit code 6."""
NVML_MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.183\n"
"""With exit code 18: the driver was updated and not yet loaded."""
NVML_LOST = "Failed to initialize NVML: Unknown Error\n"
"""With exit code 255: a container that lost its devices."""


@dataclass(frozen=True)
class FakeGpu:
    """A GPU and the profiles of its MIG devices."""

    number: int
    name: str = "NVIDIA A100-SXM4-40GB"
    mig: tuple[str, ...] = ()

    @property
    def uuid(self) -> str:
        return f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, str(self.number))}"

    def mig_uuid(self, device: int) -> str:
        return f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, f'{self.number}/{device}')}"

    def lines(self) -> list[str]:
        """As ``-L`` lists it since driver R470."""
        return [
            f"GPU {self.number}: {self.name} (UUID: {self.uuid})",
            *(
                f"  MIG {profile:<11} Device {device:2d}: (UUID: {self.mig_uuid(device)})"
                for device, profile in enumerate(self.mig)
            ),
        ]


def gpus(count: int) -> list[FakeGpu]:
    return [FakeGpu(number) for number in range(count)]


class FakeNvidia:
    """The script in `folder`/bin, and what it says; with no GPU at first."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self._said = self.bin / "nvidia-smi.d"
        self._said.mkdir(parents=True, exist_ok=True)
        script = self.bin / "nvidia-smi"
        script.write_text(SCRIPT)
        for path in (self.bin, self._said, script):
            path.chmod(0o755)  # workers may be other users
        self.say(NO_DEVICES, code=6)

    def show(self, listed: Sequence[FakeGpu]) -> None:
        """List these GPUs."""
        query = [f"{gpu.uuid}, {gpu.name}, {gpu.number}\n" for gpu in listed]
        self.say("".join(f"{line}\n" for gpu in listed for line in gpu.lines()), query="".join(query))

    def say(self, output: str, *, query: str | None = None, code: int = 0) -> None:
        """Print `output` (to a query, `query`) and exit with `code`."""
        self._write("list", output)
        self._write("query", output if query is None else query)
        self._write("code", str(code))
        (self._said / "hang").unlink(missing_ok=True)

    def hang(self, seconds: int = 600) -> None:
        """Say nothing for so long."""
        self._write("hang", str(seconds))

    def _write(self, name: str, text: str) -> None:
        path, new = self._said / name, self._said / f".{name}"
        new.write_text(text)
        new.chmod(0o644)
        new.replace(path)


if __name__ == "__main__":
    fake = FakeNvidia(Path(sys.argv[1]).resolve())
    fake.show(gpus(int(sys.argv[2])))
    print(fake.bin)
