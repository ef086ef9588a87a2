"""Stands in for a CUDA graph on a CPU: what it replays is what was recorded, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headsearch.core import graphs
from headsearch.core.views import Views


class Replayed:
    """Remembers the function of its recording, and calls it at each replay."""

    made: list[Replayed] = []
    fails = False

    def __init__(self, device: torch.device) -> None:
        self.replays = self.warmed = 0
        Replayed.made.append(self)

    def warm(self, run: Callable[[], Tensor]) -> Tensor:
        self.warmed += 1
        return run()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        if Replayed.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.run, self.out = run, torch.full((), torch.nan)
        return self.out

    def replay(self) -> None:
        self.replays += 1
        result = self.run()
        if result.ndim == 0:  # a loss; parts that are only timed give nothing back
            self.out.copy_(result)


def install(monkeypatch, *, fails: bool = False) -> list[Replayed]:
    """Let trainings on the CPU be recorded by `Replayed`; returns those that were made, one a training."""
    made: list[Replayed] = []
    monkeypatch.setattr(Replayed, "made", made)
    monkeypatch.setattr(Replayed, "fails", fails)
    monkeypatch.setattr(Views, "stream_kind", property(lambda _: "cuda-philox"))
    monkeypatch.setattr(graphs, "CudaGraph", Replayed)
    return made
