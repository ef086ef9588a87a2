"""What workers did, call by call, and the figures of it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np

WINDOW = 100
"""Trials that the first and the last figures are of; a third of a small study's."""
BEGUN = "ask new"
SLEEP = "sleep"


class Call(NamedTuple):
    """One thing that a worker did, on the clock that all processes of a machine share."""

    what: str
    began: float
    ended: float


class Stopwatch:
    """A worker's calls, and its CPU seconds."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.cpu_seconds = -time.process_time()
        self.at = time.monotonic()

    def lap(self, what: str) -> None:
        """Name what was done since the last lap."""
        began, self.at = self.at, time.monotonic()
        self.calls.append(Call(what, began, self.at))

    def stop(self) -> Stopwatch:
        self.cpu_seconds += time.process_time()
        return self


@dataclass(frozen=True)
class Figure:
    """Times of one kind of call."""

    n: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Measured:
    """What came of one study."""

    system: str
    wanted: int
    trials: int
    repeated: int
    """Trials whose point and seed an earlier one has."""
    states: dict[str, int]
    violations: tuple[str, ...]
    """What an audit finds; of plain Optuna there is nothing to audit."""
    reports: int
    seconds: float
    seconds_to_last_begun: float
    """Until the last trial was begun."""
    overhead_seconds: float
    """A trial: seconds of all workers, from the first call to the last."""
    overhead_seconds_first: float
    overhead_seconds_last: float
    """A trial, while the first and the last `WINDOW` trials were begun."""
    call_seconds: float
    """A trial: seconds in calls, so without the sleep of workers that had nothing to do."""
    worker_cpu_seconds: float
    """A trial."""
    first: dict[str, Figure]
    """Calls that began while there were fewer trials than `WINDOW`."""
    last: dict[str, Figure]
    """Calls that began while the last `WINDOW` trials were begun, when no worker is short of work."""
    whole: dict[str, Figure]


def measured(
    system: str,
    wanted: int,
    watches: Sequence[Stopwatch],
    points: Sequence[tuple[str, int]],
    states: Counter[str],
    violations: Sequence[str] = (),
) -> Measured:
    """The figures of a study whose trials have these points and seeds."""
    calls = sorted((call for watch in watches for call in watch.calls), key=lambda call: call.began)
    begun = sorted(call.ended for call in calls if call.what == BEGUN)
    there = [bisect_left(begun, call.began) for call in calls]
    window = min(WINDOW, wanted // 3)
    seconds = max(call.ended for call in calls) - calls[0].began
    trials = len(points)
    return Measured(
        system=system,
        wanted=wanted,
        trials=trials,
        repeated=trials - len(set(points)),
        states=dict(states),
        violations=tuple(violations),
        reports=sum(call.what == "report" for call in calls),
        seconds=round(seconds, 1),
        seconds_to_last_begun=round(begun[-1] - calls[0].began, 1),
        overhead_seconds=round(seconds * len(watches) / trials, 3),
        overhead_seconds_first=round((begun[window - 1] - calls[0].began) * len(watches) / window, 3),
        overhead_seconds_last=round(
            (begun[wanted - 1] - begun[wanted - window - 1]) * len(watches) / window, 3
        ),
        call_seconds=round(sum(call.ended - call.began for call in calls if call.what != SLEEP) / trials, 3),
        worker_cpu_seconds=round(sum(watch.cpu_seconds for watch in watches) / trials, 3),
        first=_figures(call for call, n in zip(calls, there, strict=True) if n < window),
        last=_figures(call for call, n in zip(calls, there, strict=True) if wanted - window <= n < wanted),
        whole=_figures(calls),
    )


def _figures(calls: Any) -> dict[str, Figure]:
    times: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        if call.what != SLEEP:
            times[call.what].append(1000 * (call.ended - call.began))
    return {
        what: Figure(len(ms), *(round(float(q), 2) for q in np.percentile(ms, [50, 95])))
        for what, ms in sorted(times.items())
    }


def table(one: Measured) -> str:
    """Markdown."""
    head = (
        f"**{one.system}**: {one.trials} trials of {one.wanted} {one.states}, {one.repeated} repeated points, "
        f"{len(one.violations)} violations, {one.reports} reports; {one.seconds} s, the last trial begun after "
        f"{one.seconds_to_last_begun} s. A trial: {one.overhead_seconds} s of workers (the first trials "
        f"{one.overhead_seconds_first} s, the last {one.overhead_seconds_last} s), {one.call_seconds} s in calls, "
        f"{one.worker_cpu_seconds} s of workers' CPU.\n"
    )
    lines = [
        head,
        "| call | first: n | p50 ms | p95 ms | last: n | p50 ms | p95 ms | whole: n | p50 ms | p95 ms |",
        "| --- " * 10 + "|",
    ]
    for what in one.whole:
        cells: list[Any] = [what]
        for figures in (one.first, one.last, one.whole):
            cells += astuple(figures[what]) if what in figures else ("", "", "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
