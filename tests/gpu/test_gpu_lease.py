"""The lease of a real GPU, as a real nvidia-smi lists it; of a fake one on the CPU."""

from __future__ import annotations

import os
import shutil

import lease
import pytest
from fake_nvidia import FakeNvidia, gpus

from headsearch.runtime.gpus import listing, visible_here


def test_a_lease_is_taken_seen_and_handed_on_after_kill_9(device, tmp_path, monkeypatch):
    if device.type == "cpu":
        fake = FakeNvidia(tmp_path)
        fake.show(gpus(2))
        monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    elif not shutil.which("nvidia-smi"):
        pytest.skip("no nvidia-smi on the PATH")
    found = visible_here(listing().gpus)
    assert found, listing()
    told = lease.hand_on(found[0], tmp_path, dict(os.environ))
    assert told["gpu"] == str(found[0])
    assert told["handed_on_seconds"] < 10
