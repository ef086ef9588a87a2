"""What running out of memory means to a trial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headsearch.errors import TrialFailure


@contextmanager
def memory_checked() -> Iterator[None]:
    """Turn running out of memory, on either device, into TrialFailure."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).strip() or "host memory"
        # torch has a class for accelerators; the CPU's allocator raises a bare RuntimeError
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
        if not known:
            raise
        raise TrialFailure("out_of_memory", f"out of memory: {text.splitlines()[0]}") from error


def free_memory(device: torch.device) -> None:
    """Give back what torch's allocator keeps of the device for later use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
