"""Each test here has two variants: on a CUDA device, marked `gpu`, and on the CPU, where CI runs it.

So what fails on a GPU does not fail for a slip of the test.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

for _folder in ("core", "runtime", "benchmarks"):
    sys.path.append(str(Path(__file__).parents[1] / _folder))

from headsearch.core.device import pick_device
from headsearch.core.memory import free_memory

gc.freeze()  # what is imported stays: a collection before each test need not look at it


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.hostile),  # a minute in all
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test, set up as trainings set it up."""
    chosen = pick_device(request.param)
    gc.collect()  # what the tests before left
    free_memory(chosen)
    return chosen
