"""What a worker that asks for work is given: a claim on a trial, or the reason why there is none."""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass

from headsearch.space import Params


@dataclass(frozen=True)
class Claim:
    """The right to train one trial."""

    number: int
    trial_id: int
    params: Params
    seed: int
    attempt: int
    """Fencing token: rises with every claim of this trial."""
    epoch: int
    """Epochs reported so far."""
    stop_at: int | None
    """Epoch of the rung at which the trial pauses next; None where it trains to its end."""
    origin: str
    """`new`, `adopted` or `promoted`."""
    worker_id: str
    """Whose it is."""


class Idle(enum.Enum):
    """Why there is no claim."""

    WAIT = "others still train"
    COMPLETED = "this claim found nothing left and completed the study"
    DONE = "the study was complete or cancelled"
    HELD = "the study is paused"


def point_key(params: Params) -> str:
    """Identity of a point: a hash of its active parameters."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:16]
