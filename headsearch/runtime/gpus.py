"""The GPUs of this machine, as ``nvidia-smi`` lists them: that neither starts CUDA nor loads torch.

What is listed goes by NVIDIA's MIG user guide and the manual of nvidia-smi. A GPU with MIG devices is not
used whole, so only its MIG devices count. Drivers before R470 name one as
``MIG-GPU-<uuid>/<instance>/<instance>``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final

from headsearch.errors import WorldError

PROGRAM: Final = "nvidia-smi"
ANSWER_SECONDS = 60.0
"""A driver that is not kept loaded starts first, which takes seconds for each GPU."""
VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
ORDER: Final = "CUDA_DEVICE_ORDER"
_GPU = re.compile(r"GPU (\d+): (.*\S) *\(UUID: (GPU-[0-9A-Za-z-]+)\)")
_MIG = re.compile(r"MIG (\S+)\s+Device\s+\d+: *\(UUID: (MIG-[0-9A-Za-z/-]+)\)")
_QUERIED = re.compile(r"(GPU-[0-9A-Za-z-]+), (.*\S), (\d+)")
_NONE = "No devices were found"


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one MIG device of a GPU."""

    index: int
    """Of the whole GPU, in the order of the PCI bus."""
    name: str
    uuid: str
    """What CUDA_VISIBLE_DEVICES takes."""
    parent: str | None = None
    """UUID of the GPU that a MIG device is part of."""

    def __str__(self) -> str:
        return f"{self.name} {self.uuid}"


@dataclass(frozen=True)
class Listing:
    """What there is."""

    gpus: tuple[Gpu, ...] = ()
    installed: bool = True
    """There is an ``nvidia-smi``."""
    problem: str | None = None
    """Why it lists none although it is there; a machine without a GPU has no problem."""


def listing() -> Listing:
    """Ask ``nvidia-smi``.

    Raises WorldError when it does not answer: then a GPU or its driver is stuck.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        return Listing(installed=False)
    code, said = _ask(program, "-L")
    # Exit codes tell of one bad GPU as well, beside which the others are listed.
    if found := parse_list(said):
        return Listing(found)
    if _NONE in said or (code == 0 and not said.strip()):
        return Listing()
    if code == 0:
        # A list in words that we do not know; this format is made for programs, but has no MIG devices.
        _, queried = _ask(program, "--query-gpu=uuid,name,index", "--format=csv,noheader")
        if found := parse_query(queried):
            return Listing(found)
    line = (said.strip().splitlines() or [f"exit code {code}"])[0]
    return Listing(problem=f"{PROGRAM}: {line.strip()}")


def parse_list(said: str) -> tuple[Gpu, ...]:
    """Devices in the output of ``nvidia-smi -L``; lines that are none are passed over."""
    found: list[Gpu] = []
    whole: Gpu | None = None
    for line in said.splitlines():
        if match := _GPU.fullmatch(line.strip()):
            whole = Gpu(int(match[1]), match[2], match[3])
            found.append(whole)
        elif whole and (match := _MIG.fullmatch(line.strip())):
            with contextlib.suppress(ValueError):
                found.remove(whole)
            found.append(Gpu(whole.index, f"{whole.name} MIG {match[1]}", match[2], whole.uuid))
    return tuple(found)


def parse_query(said: str) -> tuple[Gpu, ...]:
    """Devices in the output of ``nvidia-smi --query-gpu=uuid,name,index --format=csv,noheader``."""
    matches = (_QUERIED.fullmatch(line.strip()) for line in said.splitlines())
    return tuple(Gpu(int(match[3]), match[2], match[1]) for match in matches if match)


def visible(found: tuple[Gpu, ...], variable: str | None) -> tuple[Gpu, ...]:
    """Those of `found` that CUDA_VISIBLE_DEVICES lets a process see, in the variable's order.

    It lists indices, UUIDs or beginnings of UUIDs. CUDA takes those before the first that it does not know,
    and none at all if one is repeated. A GPU stands for all its MIG devices here. Indices are those of
    ``nvidia-smi``; CUDA counts like it if CUDA_DEVICE_ORDER is PCI_BUS_ID, or all GPUs are of one model.
    """
    if variable is None:
        return found
    chosen: list[Gpu] = []
    for word in variable.split(","):
        named = _named(found, word.strip())
        if not named:
            break
        if any(gpu in chosen for gpu in named):
            return ()
        chosen += named
    return tuple(chosen)


def visible_here(found: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Those that this process may see."""
    return visible(found, os.environ.get(VISIBLE))


def _named(found: tuple[Gpu, ...], word: str) -> list[Gpu]:
    """The devices that one entry of the variable stands for; none if it is not clear."""
    if word.isascii() and word.isdecimal():
        return [gpu for gpu in found if gpu.index == int(word)]
    if word.startswith("GPU-"):
        named = [gpu for gpu in found if (gpu.parent or gpu.uuid).startswith(word)]
        return named if len({gpu.index for gpu in named}) == 1 else []
    if word.startswith("MIG-"):
        named = [gpu for gpu in found if gpu.parent and gpu.uuid.startswith(word)]
        exact = [gpu for gpu in named if gpu.uuid == word]
        return exact or (named if len(named) == 1 else [])
    return []


def _ask(program: str, *options: str) -> tuple[int, str]:
    """Exit code and output of one call."""
    try:
        process = subprocess.Popen(
            [program, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return 127, f"cannot be started: {error.strerror}"
    try:
        said, _ = process.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        # One that hangs in the driver does not even die; it must not hold us too.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=2)
        raise WorldError(
            f"{PROGRAM} did not answer within {ANSWER_SECONDS:.0f} s: a GPU or its driver is stuck "
            "(see dmesg); --device cpu does without"
        ) from None
    return process.returncode, said
