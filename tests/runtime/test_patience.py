"""What a worker says while the database is away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headsearch.errors import DatabaseError
from headsearch.runtime import patience
from headsearch.runtime.patience import Reasons, patiently


@pytest.fixture
def session(monkeypatch) -> Any:
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.001)
    return SimpleNamespace(revive=lambda: None)


def fails_with(*errors: str):
    left = list(errors)

    def call() -> str:
        if left:
            raise DatabaseError(left.pop(0))
        return "done"

    return call


def test_each_reason_is_said_once_and_so_is_its_end(session):
    said: list[str] = []
    call = fails_with("connection cut", "password refused", "connection cut", "password refused")
    assert patiently(session, call, said.append, patience_seconds=30) == "done"
    assert said == [
        "connection cut; trying again for 30 s",
        "password refused; trying again for 30 s",
        "the database answers again",
    ]


def test_a_call_that_works_says_nothing(session):
    said: list[str] = []
    assert patiently(session, fails_with(), said.append) == "done"
    assert said == []


def test_patience_ends_with_the_last_error(session):
    with pytest.raises(DatabaseError, match="password refused"):
        patiently(
            session, fails_with("cut", *["password refused"] * 10_000), lambda _: None, patience_seconds=0.02
        )


def test_the_next_outage_tells_its_reason_again():
    said: list[str] = []
    reasons = Reasons(said.append)
    assert not reasons.forget()
    for _ in range(2):
        reasons.tell(DatabaseError("cut"), "reports wait")
    assert reasons.forget()
    reasons.tell(DatabaseError("cut"), "reports wait")
    assert said == ["cut; reports wait"] * 2
