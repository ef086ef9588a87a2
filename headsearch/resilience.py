"""How workers of a study behave when something dies, hangs or is away: parts of the study's spec."""

from __future__ import annotations

from urllib.parse import unquote

from pydantic import Field, field_validator

from headsearch.config import Config


class Lease(Config):
    """When a trial is taken from a worker that no longer answers."""

    seconds: float = Field(default=60.0, ge=1.0, le=86_400.0)
    """A worker renews its lease three times in this span; after it, another adopts the trial."""
    max_attempts: int = Field(default=5, ge=1, le=1000)
    """Workers that may be lost over one trial before it fails with reason `lost`; hangs count too, and
    failures that another try may not meet."""


class WorkerSpec(Config):
    """What workers do about checkpoints, signals, a database that is away, and trainings that stall."""

    checkpoint_epochs: int = Field(default=1, ge=1)
    """A checkpoint after every so many epochs; one more whenever a trial pauses, ends or is given back."""
    checkpoint_minutes: float = Field(default=10.0, gt=0.0, le=100_000.0)
    """A checkpoint inside an epoch once the last one is this old. A kill repeats no more than the shorter
    of the two intervals, and what was trained while the last checkpoint was being written."""
    checkpoint_store: str | None = Field(default=None, pattern=r"^(s3://[^/]|file:///.).*")
    """Where checkpoints are kept when workers share no disk: ``s3://bucket/prefix`` of any S3-compatible
    server, or ``file:///folder``. None: in each machine's home folder."""

    @field_validator("checkpoint_store")
    @classmethod
    def _names_a_place(cls, value: str | None) -> str | None:
        """A query or a fragment would be left out without a word."""
        if value and (set("?#") & set(value) or "\0" in unquote(value)):
            raise ValueError(
                f"worker.checkpoint_store: {value!r} has ?, # or a NUL; write s3://bucket/prefix or file:///folder"
            )
        return value

    drain_seconds: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """After the first SIGTERM or Ctrl-C, how long an epoch may take to end; then the worker stops at its
    next step. Either way it saves a checkpoint and gives the trial back."""
    database_patience_minutes: float = Field(default=10.0, gt=0.0, le=100_000.0)
    """How long the database may be away. Training goes on meanwhile; then the worker ends."""
    step_limit_seconds: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """A training step that takes longer hangs: the worker process ends and the trial is tried again."""
    epoch_limit_minutes: float | None = Field(default=None, gt=0.0, le=100_000.0)
    """An epoch that takes longer, with its report, fails the trial. None: no limit."""
