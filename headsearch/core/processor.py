"""The CPU of this machine, as Linux tells of it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

NATIVE_BF16 = re.compile(r"^flags\s*:.*\b(?:avx512_bf16|amx_bf16)\b", re.MULTILINE)


def cpu_model() -> str:
    """Its name, for people."""
    found = re.search(r"^model name\s*:\s*(.+)$", _told(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_multiplies_bf16() -> bool:
    """Whether it multiplies bf16 in hardware (AVX-512 BF16 or AMX); False where the system does not tell.

    Where it does not, oneDNN converts to fp32 and back, and gains nothing.
    """
    return NATIVE_BF16.search(_told()) is not None


def _told() -> str:
    return CPUINFO.read_text() if CPUINFO.exists() else ""
