"""Memory: what running out of it means to a trial, and how much a computation took."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import torch

from headsearch.errors import TrialFailure

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Linux's: writing 5 to the first makes it forget the peak that the second tells (man 5 proc)."""

OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|CUDA.* out of memory|_ERROR_OUT_OF_MEMORY"
    r"|_(?:ALLOC|ALLOCATION)_FAILED"
)
"""In errors without a class of their own: of the CPU's allocator and mmap, of the CUDA runtime and driver,
and of cuBLAS, cuDNN, cuSOLVER, cuFFT and NVRTC, which take memory beside torch's allocator."""

M_TRIM, M_MMAP_THRESHOLD, _INT_MAX = -1, -3, (1 << 31) - 1
"""Of glibc's malloc.h (man 3 mallopt): free memory at the heap's end, and sizes outside it, in bytes."""


@contextmanager
def memory_checked() -> Iterator[None]:
    """Turn running out of memory, on either device, into TrialFailure."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).strip() or "host memory"
        # OutOfMemoryError is of torch's own allocator on accelerators; what else fails has only its words
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not OUT_OF_MEMORY.search(text):
            raise
        raise TrialFailure("out_of_memory", f"out of memory: {text.splitlines()[0]}") from error


def keep_memory() -> bool:
    """Let this process keep freed memory for its next use; return whether it does.

    glibc gives large tensors back to the system as they are freed, and each step of a training then waits
    for the same pages to be zeroed again: a tenth of the time of a small encoder's. What is kept is given
    back by `free_memory`. False with another C library, which has its own ways.
    """
    library = _glibc()
    return bool(library and library.mallopt(M_MMAP_THRESHOLD, 1 << 30) and library.mallopt(M_TRIM, _INT_MAX))


def free_memory(device: torch.device) -> None:
    """Give back what the allocators, torch's of the device and the C library's, keep for later use."""
    if device.type == "cuda":
        gc.collect()  # a learner and its recorded step refer to each other
        torch.cuda.empty_cache()
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


class PeakMemory:
    """Within: notices the most memory that is taken at a time, in bytes, and has it in `found` at the end.

    On a GPU, of what torch took of it; else of this process's resident memory, where the system tells
    (Linux).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: int | None = None

    def __enter__(self) -> Self:
        """Forget earlier peaks, and what allocators keep since."""
        free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # another system, or one that forbids it: then it is the process's peak
                CLEAR.write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak."""
        if self.device.type == "cuda":
            self.found = torch.cuda.max_memory_allocated(self.device)
        elif STATUS.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
            self.found = int(peak[1]) * 1024
