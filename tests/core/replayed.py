"""Stands in for a CUDA graph on a CPU: what it replays is what was recorded, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from headsearch.core import graphs, learner
from headsearch.core.views import Views


class Replayed:
    """Remembers the function and the learning rates of its recording, and calls it at each replay."""

    made: list[Replayed] = []
    fails = False

    def __init__(self, device: torch.device) -> None:
        self.replays = self.warmed = 0
        self.optimizer: Optimizer | None = None
        Replayed.made.append(self)

    def warm(self, run: Callable[[], Tensor]) -> Tensor:
        self.warmed += 1
        return run()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        if Replayed.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.run, self.out = run, torch.full((), torch.nan)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        assert all(isinstance(rate, Tensor) for rate in self.rates)
        return self.out

    def replay(self) -> None:
        self.replays += 1
        with graphs.rates_from(self.optimizer, self.rates):
            self.out.copy_(self.run())


def install(monkeypatch, *, fails: bool = False) -> list[Replayed]:
    """Let trainings on the CPU be recorded by `Replayed`; returns those that were made, one a training."""
    made: list[Replayed] = []
    monkeypatch.setattr(Replayed, "made", made)
    monkeypatch.setattr(Replayed, "fails", fails)
    monkeypatch.setattr(Views, "stream_kind", property(lambda _: "cuda-philox"))
    monkeypatch.setattr(graphs, "CudaGraph", Replayed)
    real = graphs.GraphedStep.__init__

    def init(self, of: learner.Learner, *rest: object) -> None:
        real(self, of, *rest)
        made[-1].optimizer = of.optimizer

    monkeypatch.setattr(graphs.GraphedStep, "__init__", init)
    return made
