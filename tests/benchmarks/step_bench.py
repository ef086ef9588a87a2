"""Steps 3 and 4: how near a training comes to its encoder's own speed, and what trainings make together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from setting import Clock, Say, Setting

LARGE, SMALL = "resnet18", "small-resnet"
GRAPH = "cuda-graph"
AUTOTUNED = "max-autotune-no-cudagraphs"
ANY_ORDER = "not deterministic"
"""With cuDNN's other algorithms, whose sums come in any order: what the same bits each time cost."""


@dataclass(frozen=True)
class Cell:
    """One training to measure."""

    encoder: str
    batch: int
    precision: str
    how: str = "plain"
    """`plain`, `cuda-graph`, `ANY_ORDER`, or a mode of torch.compile."""
    trial: bool = False
    """Measure a whole epoch of a trial, with its report and its checkpoint, too."""
    seconds: float = 5.0
    """That it may need; it is left out where less is left."""

    @property
    def overrides(self) -> list[str]:
        """Of a trial's configuration."""
        chosen = [
            f"encoder.name={self.encoder}",
            f"training.batch_size={self.batch}",
            f"training.precision={self.precision}",
        ]
        chosen.append(f"training.cuda_graph={str(self.how == GRAPH).lower()}")
        if self.how not in ("plain", GRAPH, ANY_ORDER):
            chosen.append(f"training.compile_encoder={self.how}")
        return chosen

    def __str__(self) -> str:
        return f"{self.encoder}, batch {self.batch}, {self.precision}, {self.how}"


GRID = (
    Cell(LARGE, 512, "bf16", GRAPH, trial=True),
    Cell(SMALL, 256, "bf16", GRAPH, trial=True),
    Cell(SMALL, 512, "bf16", GRAPH),
    Cell(LARGE, 256, "bf16", GRAPH),
    Cell(SMALL, 256, "bf16"),
    Cell(SMALL, 512, "bf16"),
    Cell(LARGE, 256, "bf16"),
    Cell(LARGE, 512, "bf16"),
    Cell(LARGE, 512, "bf16", ANY_ORDER),
    Cell(LARGE, 512, "fp32"),
    Cell(SMALL, 256, "fp32"),
    # Compiling takes from ten seconds to minutes: what there is no time for is left out.
    Cell(SMALL, 256, "bf16", "default", seconds=12),
    Cell(LARGE, 512, "bf16", "default", seconds=25),
    Cell(LARGE, 256, "fp32"),
    Cell(SMALL, 512, "fp32"),
    Cell(SMALL, 256, "bf16", AUTOTUNED, seconds=20),
    Cell(LARGE, 512, "bf16", AUTOTUNED, seconds=60),
)
"""The most telling first: what is cut off is at the end."""
SMOKE_GRID = (Cell(SMALL, 16, "fp32", trial=True), Cell(SMALL, 16, "bf16", GRAPH))
GPU_SIZES = {"images": 45_000, "repeats": 3, "seconds": 0.12}
SMOKE_SIZES = {"images": 100, "repeats": 1, "seconds": 0.0}
SMOKE_WIDTH = "encoder.width=4"
SLOTS = (2, 4, 8)
SPARE_SECONDS = 15.0
"""Of the step's time, for a training that takes longer than it is thought to."""


def run(setting: Setting, say: Say, clock: Clock) -> None:
    """Measure each cell. A cell that fails, for its compiler or its memory, has a row that says so."""
    import torch

    from headsearch.core.benchmark import measure, noise
    from headsearch.core.device import pick_device
    from headsearch.core.feed import placed
    from headsearch.core.memory import free_memory, keep_memory
    from headsearch.study_file import configured

    device, sizes = pick_device(setting.device), SMOKE_SIZES if setting.smoke else GPU_SIZES
    keep_memory()
    images = placed(noise(int(sizes["images"]), 8 if setting.smoke else 32), device)
    warnings = Warnings()
    for cell in SMOKE_GRID if setting.smoke else GRID:
        if clock.left - SPARE_SECONDS < cell.seconds:
            why = f"{clock.left:.0f} s of the step were left, it may take more than {cell.seconds:.0f}"
            say(f"bench: {cell}", {}, left_out=why)
            continue
        warnings.said.clear()
        torch.backends.cudnn.deterministic = setting.on_gpu and cell.how != ANY_ORDER
        try:
            found = measure(
                configured([*cell.overrides, *([SMOKE_WIDTH] if setting.smoke else [])]),
                images,
                device=device,
                home=setting.home,
                repeats=int(sizes["repeats"]),
                seconds=sizes["seconds"],
                probe=False,
                trial=cell.trial,
            )
        except Exception as error:  # noqa: BLE001
            line = (str(error).strip().splitlines() or [""])[0]
            say(f"bench: {cell}", {}, failed=f"{type(error).__name__}: {line}")
        else:
            # Where compiling or recording fails, the training goes on without: then it is no such figure.
            fallen = "; ".join(warnings.said)
            if setting.on_gpu and cell.how == GRAPH and found.compiled != GRAPH and not fallen:
                fallen = "the step was not recorded"
            say(f"bench: {cell}", figures(found), failed=fallen)
        free_memory(device)


def figures(found: Any) -> dict[str, Any]:
    """A benchmark's figures: views per second, shares of the bare encoder and of a step, and memory."""
    values: dict[str, Any] = {
        "views_per_second": found.training.median,
        "bare_encoder": found.limit.median,
        "share": found.share.median,
        "share_low": found.share.low,
        "share_high": found.share.high,
        "step_ms": 1000 * found.step_seconds,
        "of_step": {name: seconds / found.step_seconds for name, seconds in found.stages.items()},
        "of_epoch": {
            "report": found.report_seconds / found.epoch_seconds,
            "checkpoint": found.checkpoint_seconds / found.epoch_seconds,
        },
        "peak_gib": found.peak_bytes / 2**30 if found.peak_bytes else None,
    }
    if found.trial is not None:
        values["trial_share"] = found.trial.share
        values["trial_rest_share"] = found.trial.rest_share
    return values


class Warnings(logging.Handler):
    """Collects what headsearch warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        logging.getLogger("headsearch").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep its text."""
        self.said.append(record.getMessage())


def run_together(setting: Setting, say: Say, clock: Clock) -> None:
    """Measure 1, 2, 4 and 8 trainings at once, each a process of its own, as workers in that many slots are.

    As `headsearch bench --together`: the processes are started once and train for each count in turn; there is
    no study and no database, whose cost step 5 shows.
    """
    from headsearch.core.benchmark import noise
    from headsearch.core.device import pick_device
    from headsearch.core.together import Job, train_together
    from headsearch.study_file import configured

    small = ["training.batch_size=16", SMOKE_WIDTH] if setting.smoke else ["training.batch_size=256"]
    count, size = (100, 8) if setting.smoke else (5000, 32)
    job = Job(
        configured([f"encoder.name={SMALL}", *small]),
        partial(noise, count, size),
        pick_device(setting.device),
        Path(setting.home),
    )
    slots: Sequence[int] = SLOTS[:1] if setting.smoke else SLOTS
    repeats, seconds = (1, 0.05) if setting.smoke else (3, 0.5)
    for several in train_together(job, slots, repeats=repeats, seconds=seconds):
        say(
            f"together: {several.trainings} slot{'s' if several.trainings > 1 else ''}",
            {
                "slots": several.trainings,
                "views_per_second": several.total.median,
                "gain": several.gain.median,
                "gain_low": several.gain.low,
                "gain_high": several.gain.high,
            },
        )
