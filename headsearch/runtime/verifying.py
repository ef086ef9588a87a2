"""The audit of a study, with what is on this machine's disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headsearch.runtime.checkpoints import open_checkpoints
from headsearch.runtime.session import Session
from headsearch.search import studies
from headsearch.search.audit import Finding, PausedTrial, audit


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    study: str
    trials: int
    reports: int
    checkpoints: int
    """Of paused trials, loaded here."""
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """No rule is violated."""
        return not any(finding.violated for finding in self.findings)

    def lines(self) -> list[str]:
        """A line for each finding, and the verdict."""
        said = "clean" if self.clean else "not clean"
        return [
            *(f"{'broken' if one.violated else 'note':<8}{one.rule}: {one.message}" for one in self.findings),
            f"study {self.study} is {said}: {self.trials} trials, {self.reports} reports, "  # noqa: ISC004
            f"{self.checkpoints} checkpoints of paused trials",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**vars(self), "clean": self.clean, "findings": [vars(one) for one in self.findings]}


def verify(session: Session, name: str) -> Verdict:
    """Check every invariant of a study, and that its paused trials have checkpoints that load.

    Checkpoints are looked for in this home, or in the study's store: those of workers with another disk
    cannot be seen from here. A restored database may be older than its checkpoints, never newer.
    Raises UnknownStudyError if there is no such study, DatabaseError when the database is not reachable.
    """
    study = studies.get(session.database, name)
    found = audit(session.database, study)
    missing: dict[PausedTrial, str] = {}
    store = study.spec.worker.checkpoint_store
    for trial in found.paused:
        state = open_checkpoints(
            session.home, study.folder, trial.number, store, generation=trial.attempt
        ).peek()
        if state is None:
            missing[trial] = f"no checkpoint in {store or session.home} loads"
        elif state["epoch"] < trial.epoch:
            missing[trial] = f"its checkpoint is of epoch {state['epoch']}"
    loaded = len(found.paused) - len(missing)
    if missing:
        # Workers may have gone on with them while we looked.
        still = audit(session.database, study).paused
        missing = {trial: what for trial, what in missing.items() if trial in still}
    findings = [
        Finding("checkpoints", f"trial {trial.number} paused at epoch {trial.epoch}: {what}")
        for trial, what in missing.items()
    ]
    return Verdict(name, found.trials, found.reports, loaded, (*found.findings, *findings))
