"""What several files of tests of the core share."""

from __future__ import annotations

import kernel_on_host
import pytest

from headsearch.core import views


@pytest.fixture(params=["fused", "batched"])
def way(request, monkeypatch):
    """Both ways to make views: as on CPUs, and, on the CPU too, as on GPUs."""
    monkeypatch.setattr(views, "FUSED_ON", ("cpu",) if request.param == "fused" else ())


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request, monkeypatch):
    """Where the kernel of views runs: compiled for the host, or on a GPU. Tests of GPUs so run in CI, too."""
    return (
        kernel_on_host.install(monkeypatch) if request.param == "host" else kernel_on_host.on_gpu(monkeypatch)
    )
