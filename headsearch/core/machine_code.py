"""Compilation of functions to machine code by numba, once per machine.

The machine code is kept beside this package's files, or in the home folder where nobody may write there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from headsearch.home import home_folder

CACHE: Final = "NUMBA_CACHE_DIR"
if CACHE not in os.environ and not os.access(Path(__file__).parent, os.W_OK):
    os.environ[CACHE] = str(home_folder() / "cache" / "numba")

import numba  # noqa: E402 - reads where its cache is


def compiled(*freedoms: str) -> Callable[[Any], Any]:
    """Compile a function at its first call."""
    return numba.njit(nogil=True, cache=True, fastmath={"contract", "arcp", "nsz", "nnan", "ninf", *freedoms})
