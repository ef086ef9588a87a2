"""Studies through the command line, on a real database."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import optuna_dashboard
import pytest

from headsearch.cli.app import run
from headsearch.config import TrialConfig
from headsearch.home import checkpoint_folder
from headsearch.report.publish import FIGURE_ID, publish
from headsearch.runtime.session import Session, open_session
from headsearch.search import leases, outcomes, snapshot, studies, workers
from headsearch.search.claims import Claim, claim
from headsearch.search.leases import Report
from headsearch.search.outcomes import Outcome

STUDY = """
name = "small"
question = "How small?"
[budget]
trials = 6
epochs = 3
[space]
"head.kind" = ["mlp", "linear"]
"head.projection_dim" = [2, 4, 8]
"head.width" = { choices = [16, 32], when = { "head.kind" = "mlp" } }
"""


@pytest.fixture
def study(headsearch_home: Path, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    return str(path)


def fill(session: Session, name: str = "small") -> None:
    """Bring all trials to an end without training: accuracy follows from the dim, trial 1 fails."""
    made = studies.get(session.database, name)
    while isinstance(work := claim(session.database, made, "w", "cpu of 2 cores, 1 threads"), Claim):
        dim = work.params["head.projection_dim"]
        leases.describe(session.database, made, work, projection_dim=dim, head_parameters=10 * dim)
        value = 0.5 + 0.1 * math.log2(dim) - 0.001 * work.number
        for epoch in range(1, made.spec.budget.epochs + 1):
            said = Report(epoch, 1.0, value, 9.0, 3.0, 1000.0, float(epoch))
            leases.report(session.database, made, work, said)
        outcome = Outcome(
            "complete", (value, float(dim)),
            facts={"probe_accuracy": value, "test_accuracy": value - 0.02, "threads": 1},
        )  # fmt: skip
        if work.number == 1:
            outcome = Outcome("failed", reason="collapsed", message="epoch 2: flat")
        outcomes.finish(session.database, made, work.number, work.attempt, outcome)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert run(list(words)) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.out


def parsed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(said(capsys, *words))


@pytest.mark.postgres
def test_a_study_is_made_once(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "study", "list").startswith("no study yet")
    assert "study small made" in said(capsys, "study", "create", study)
    again = said(capsys, "study", "create", study)
    assert "study small exists already, with the same spec" in again
    assert "***" in again
    (listed,) = parsed(capsys, "study", "list", "--json")
    assert (listed["study"], listed["state"], listed["trials"]) == ("small", "open", 6)
    assert "small" in said(capsys, "study", "list")


@pytest.mark.postgres
def test_overrides_are_part_of_the_spec(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    said(
        capsys,
        "study",
        "create",
        study,
        "--set",
        "budget.epochs=2",
        "--set",
        "data.limit=500",
        "--set",
        "name=other",
    )
    shown = parsed(capsys, "study", "show", "other", "--json")
    assert shown["spec"]["budget"]["epochs"] == 2
    assert shown["spec"]["base"]["data"]["limit"] == 500


@pytest.mark.postgres
def test_show_and_front_of_a_study_with_trials(
    study: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said(capsys, "study", "create", study)
    assert "no trial is complete yet" in said(capsys, "study", "front", "small")
    assert parsed(capsys, "study", "front", "small", "--json")["front"] == []
    with open_session() as session:
        workers.register(session.database, studies.get(session.database, "small"), device="cpu", threads=1)
        fill(session)
        read = snapshot.read(session.database, "small")
    shown = said(capsys, "study", "show", "small")
    assert "6 of 6 trials begun: 5 complete, 1 failed" in shown
    assert "failed: collapsed" in shown
    assert "last heard" in shown
    data = parsed(capsys, "study", "show", study, "--json")
    assert [trial["number"] for trial in data["trials"]] == list(range(6))
    assert data["counts"] == {
        "running": 0,
        "orphaned": 0,
        "paused": 0,
        "complete": 5,
        "pruned": 0,
        "failed": 1,
    }
    assert len(data["workers"]) == 1

    front = parsed(capsys, "study", "front", "small", "--json")["front"]
    best = {
        dim: max(t.probe_accuracy for t in read.complete if t.projection_dim == dim)
        for dim in {t.projection_dim for t in read.complete}
    }
    assert {point["projection_dim"]: point["validation_accuracy"]["mean"] for point in front} == best
    table = said(capsys, "study", "front", "small")
    assert "test accuracy was scored once" in table
    rows = list(csv.DictReader(io.StringIO(said(capsys, "study", "front", "small", "--csv"))))
    assert [int(row["trials"]) for row in rows] == [point["trials"][0] for point in front]
    assert said(capsys, "study", "front", "small", "--figure", str(tmp_path / "f.html")) == ""
    assert (tmp_path / "f.html").stat().st_size > 1_000_000


@pytest.mark.postgres
def test_run_of_a_complete_study_shows_its_front_and_starts_nothing(
    study: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said(capsys, "study", "create", study)
    with open_session() as session:
        fill(session)
    from headsearch.runtime import running

    monkeypatch.setattr(running, "LocalWorkers", None)
    # One trial failed: the run says so as long as the study is there.
    text = said(capsys, "run", study, code=1)
    assert text.startswith("study small is complete: nothing to train\n")
    assert "projection_dim" in text
    assert "collapsed: trial 1: epoch 2: flat" in text
    assert "train it again: headsearch train" in text
    data = json.loads(said(capsys, "run", study, "--json", code=1))
    assert (data["state"], len(data["failures"])) == ("complete", 1)


@pytest.mark.postgres
def test_delete_takes_everything(
    study: str, capsys: pytest.CaptureFixture[str], headsearch_home: Path
) -> None:
    said(capsys, "study", "create", study)
    with open_session() as session:
        fill(session)
        kept = checkpoint_folder(headsearch_home, studies.get(session.database, "small").folder, 0)
    kept.mkdir(parents=True)
    assert said(capsys, "study", "delete", study, "--yes") == "study small deleted\n"
    assert parsed(capsys, "study", "list", "--json") == []
    assert not kept.exists()
    assert "study small made" in said(capsys, "study", "create", study)


@pytest.mark.postgres
def test_a_study_in_use_is_deleted_by_force_only(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "study", "create", study)
    with open_session() as session:
        assert isinstance(claim(session.database, studies.get(session.database, "small"), "w", "cpu"), Claim)
    capsys.readouterr()
    assert run(["study", "delete", "small", "--yes"]) == 2
    assert "stop them first, or add --force" in capsys.readouterr().err
    assert said(capsys, "study", "delete", "small", "--yes", "--force") == "study small deleted\n"


@pytest.mark.postgres
def test_the_dashboard_gets_a_figure_and_a_note_that_are_replaced(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "study", "create", study)
    with open_session() as session:
        publish(session.database, "small")
        fill(session)
        publish(session.database, "small")
        publish(session.database, "small")
        stored = session.database.optuna_study("small")
        attributes = stored._storage.get_study_system_attrs(stored._study_id)
        figures = optuna_dashboard._custom_plot_data.get_plotly_graph_objects(attributes)
        note = optuna_dashboard._note.get_note(stored)
    assert list(figures) == [FIGURE_ID]
    names = [trace["name"] for trace in json.loads(figures[FIGURE_ID])["data"]]
    assert "front" in names
    assert "## Front" in note
    assert "5 complete, 1 failed" in note


def test_the_schema_describes_base_and_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    schema = parsed(capsys, "study", "schema")
    assert schema["properties"]["base"]["$ref"] == "#/$defs/TrialConfig"
    assert set(schema["$defs"]["TrialConfig"]["properties"]) == set(TrialConfig.model_fields)

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    assert {ref.removeprefix("#/$defs/") for ref in references(schema)} <= set(schema["$defs"])
    assert "docstring" not in json.dumps(schema)
    for name in ("MlpHead", "AutoencoderHead", "DataConfig", "Budget"):
        assert all(field.get("description") for field in schema["$defs"][name]["properties"].values()), name


@pytest.mark.postgres
def test_compare_ranks_points_and_refuses_other_protocols(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "study", "create", study)
    with open_session() as session:
        fill(session)
    ranked = parsed(capsys, "study", "compare", "small", "--json")
    means = [point["validation_accuracy"]["mean"] for point in ranked["points"]]
    assert len(means) == 5
    assert means == sorted(means, reverse=True)
    assert "validation" in said(capsys, "study", "compare", study)
    assert said(capsys, "study", "compare", "small", "--markdown").startswith("| ")
    rows = list(csv.DictReader(io.StringIO(said(capsys, "study", "compare", "small", "--csv"))))
    assert [float(row["validation_accuracy_mean"]) for row in rows] == means

    other = tmp_path / "other.toml"
    other.write_text(STUDY.replace('"small"', '"other"\nprotocol = "ouyang2025"'))
    said(capsys, "study", "create", str(other))
    capsys.readouterr()
    assert run(["study", "compare", "small", "other"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "small (protocol holdout) and other (protocol ouyang2025)" in shown.err
