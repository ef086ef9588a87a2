"""What several files of tests of the core share."""

from __future__ import annotations

import pytest

from headsearch.core import views


@pytest.fixture(params=["fused", "batched"])
def way(request, monkeypatch):
    """Both ways to make views: as on CPUs, and, on the CPU too, as on GPUs."""
    monkeypatch.setattr(views, "FUSED_ON", ("cpu",) if request.param == "fused" else ())
