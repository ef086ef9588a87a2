"""Studies that train on validation images: which number is which, wherever one is shown."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from fabricated import snapshot, trial

from headsearch.config import Protocol
from headsearch.errors import InputError
from headsearch.report import publish
from headsearch.report.comparison import (
    compare,
    comparison_captions,
    comparison_csv,
    comparison_json,
    comparison_table,
)
from headsearch.report.confirmation import beside, confirmation
from headsearch.report.figures import front_figure
from headsearch.report.fronts import front_csv, front_json
from headsearch.report.progress import events
from headsearch.report.summary import confirmed_lines, ending, front_lines, header, listing
from headsearch.report.trials import trial_table
from headsearch.search.imagesets import KnownImages
from headsearch.search.snapshot import Progress, Snapshot
from headsearch.search.studies import axis_name

BOTH = {"data": {"train_on": "training+validation"}}
GRID: dict[str, Any] = {
    "mode": "grid",
    "budget": {"epochs": 12},
    "space": {"head.kind": ["linear"], "head.projection_dim": [2, 8, 16]},
}
TRIALS = (trial(0, dim=2, acc=0.4), trial(1, dim=8, acc=0.6), trial(2, dim=16, acc=0.5))
SEEN = snapshot(*TRIALS, state="complete", base=BOTH, **GRID)
HELD_OUT = snapshot(*TRIALS, state="complete", **GRID)


def named(name: str, made: Snapshot) -> Snapshot:
    spec = made.study.spec.model_copy(update={"name": name})
    return replace(made, study=replace(made.study, name=name, spec=spec))


def test_fronts_tables_and_figures_call_the_column_so_and_say_what_it_is() -> None:
    lines = front_lines(SEEN)
    assert "seen validation: images that the encoder was trained on, without their labels" in lines
    assert "test: images that nothing was trained on, scored once; choose by neither" in lines
    assert not any("validation accuracy selects" in line for line in lines)
    (titles,) = [line for line in lines if line.startswith("projection_dim")]
    assert titles.split("  ")[1].strip() == "seen validation"
    assert "accuracy (seen)" in trial_table(SEEN).columns
    assert front_figure(SEEN).layout.yaxis.title.text == "linear-probe accuracy (seen validation split)"
    assert all("seen validation" in trace.hovertemplate for trace in front_figure(SEEN).data)
    assert "seen validation" in publish.note(SEEN)
    assert any("(seen validation)" in line for line in ending(SEEN, "file.toml"))
    assert ("trained on", "training and validation images together") in header(SEEN.study, "somewhere")
    assert axis_name("probe_accuracy", SEEN.study.spec) == "probe_accuracy (seen validation)"


def test_of_other_studies_nobody_says_so() -> None:
    shown = [*front_lines(HELD_OUT), *ending(HELD_OUT, "x.toml"), publish.note(HELD_OUT)]
    shown += [*confirmed_lines(HELD_OUT), str(front_figure(HELD_OUT)), str(trial_table(HELD_OUT))]
    shown += [str(header(HELD_OUT.study, "x")), axis_name("probe_accuracy", HELD_OUT.study.spec)]
    assert not any("seen" in text for text in shown)
    assert front_json(HELD_OUT)["trained_on"] == "training"
    assert front_json(HELD_OUT)["splits"] == {"selection": "validation", "final": "test"}


@pytest.mark.parametrize(
    ("protocol", "said"),
    [("holdout", "without their labels"), ("ouyang2025", "encoder and probe were trained on, with their")],
)
def test_each_protocol_says_what_its_probe_has_seen(protocol: Protocol, said: str) -> None:
    seen = snapshot(*TRIALS, base=BOTH, protocol=protocol, **GRID)
    assert any(said in line for line in front_lines(seen) if line.startswith("seen validation: "))


def test_json_and_csv_say_what_was_trained_on() -> None:
    data = json.loads(json.dumps(front_json(SEEN)))
    assert data["trained_on"] == "training+validation"
    assert data["splits"] == {"seen": "validation images that were trained on", "final": "test"}
    rows = list(csv.DictReader(io.StringIO(front_csv(SEEN))))
    assert {row["trained_on"] for row in rows} == {"training+validation"}
    assert len(rows) == 2


def test_events_and_the_list_of_studies() -> None:
    before = replace(SEEN, trials=(trial(0, "running", epoch=1), trial(1, "running", epoch=0)))
    after = replace(SEEN, trials=(trial(0), trial(1, "running", epoch=1)))
    complete, report = events(before, after)
    assert "0.5000 (seen validation), test 0.49" in complete
    assert "accuracy 0.5000 (seen)" in report
    found = [(one.study, Progress(one.counts, 36, 0.6)) for one in (SEEN, HELD_OUT)]
    assert [row[4] for row in listing(found).rows] == ["0.6000 (seen)", "0.6000"]


def test_a_ranking_beside_studies_of_fewer_images_has_to_be_asked_for() -> None:
    one, other = named("all", SEEN), named("fewer", HELD_OUT)
    for asked in ((), ("epochs", "probe", "software")):
        with pytest.raises(InputError) as caught:
            compare([one, other], asked)
        assert str(caught.value) == (
            "data.train_on is training+validation in all, training in fewer; such a ranking has to be asked "
            "for: headsearch study compare --across train_on"
        )
    found = compare([one, other], ["train_on"])
    table = comparison_table([one, other], found)
    where = table.columns.index("trained on")
    assert [(row[0], row[where]) for row in table.rows] == [
        (one.study, {"all": "training+validation", "fewer": "training"}[one.study]) for one in found
    ]
    captions = comparison_captions([one, other])
    assert captions[0].startswith("across train_on, as asked: ")
    assert any(line.startswith("study all: seen validation: ") for line in captions)
    assert any(line.startswith("study fewer: validation accuracy selects") for line in captions)
    assert "too high where validation images were trained on" in captions[-1]
    data = comparison_json([one, other], found)
    assert [study["trained_on"] for study in data["studies"]] == ["training+validation", "training"]
    assert {(point["study"], point["trained_on"]) for point in data["points"]} == {
        ("all", "training+validation"),
        ("fewer", "training"),
    }
    rows = list(csv.DictReader(io.StringIO(comparison_csv([one, other], found))))
    assert {(row["study"], row["trained_on"]) for row in rows} == {
        ("all", "training+validation"),
        ("fewer", "training"),
    }


def test_studies_of_all_images_are_ranked_among_themselves() -> None:
    studies = [named("one", SEEN), named("two", SEEN)]
    table = comparison_table(studies, compare(studies))
    assert "seen validation" in table.columns
    assert "trained on" not in table.columns
    mixed = [named("one", SEEN), named("two", snapshot(*TRIALS, base={"data.limit": 9}, **GRID))]
    with pytest.raises(InputError, match=r"data.limit is .* not ranked together"):
        compare(mixed, ["train_on"])


def test_confirming_on_all_images_takes_the_same_points_and_seeds() -> None:
    search = snapshot(*TRIALS, state="complete", seeds=[1, 3], base={"encoder.width": 8, "data.limit": 99})
    plain, made = confirmation(search, 3), confirmation(search, 3, all_images=True)
    assert made.name == "made-up-confirm-3-all-images"
    assert (made.points, made.seeds, made.budget) == (plain.points, plain.seeds, plain.budget)
    assert made.base == {**plain.base, "data": {"limit": 99, "train_on": "training+validation"}}
    assert search.study.spec.base["data"] == {"limit": 99}
    assert made.trial_config(dict(made.points[0]), 0).data.trains_on_validation
    assert len(confirmation(named("x" * 63, search), 3, all_images=True).name) == 63


def test_a_study_that_must_not_choose_is_not_confirmed_nor_one_that_needs_held_out_images() -> None:
    for all_images in (False, True):
        with pytest.raises(InputError, match="no front to choose points by") as caught:
            confirmation(SEEN, 3, all_images=all_images)
        assert "\n" not in str(caught.value)
    keeps = snapshot(*TRIALS, state="complete", base={"training.keep": "best_validation_loss"}, **GRID)
    assert confirmation(keeps, 3)
    with pytest.raises(InputError, match=r"study 'made-up': data.train_on: .* set training.keep = 'last'"):
        confirmation(keeps, 3, all_images=True)


def again(search: Snapshot, accuracy: float, *, all_images: bool) -> Snapshot:
    """The confirming study of two seeds, its points all of one accuracy."""
    spec = confirmation(search, 2, all_images=all_images)
    trials = tuple(
        trial(
            number, params=dict(params), seed=seed, dim=params["head.projection_dim"],
            acc=accuracy + 0.02 * (seed == spec.seeds[0]),
        )
        for number, (params, seed) in enumerate(spec.cells())
    )  # fmt: skip
    study = replace(search.study, name=spec.name, spec=spec)
    return replace(search, study=study, trials=trials)


def test_what_was_trained_on_stands_beside_each_figure() -> None:
    plain, both = again(HELD_OUT, 0.3, all_images=False), again(HELD_OUT, 0.7, all_images=True)
    lines = beside(HELD_OUT, [plain, both])
    assert all(len(line) <= 80 for line in lines)
    rows = [line for line in lines if line.startswith("  ") and line.split()[1].startswith("training")]
    assert [line.split()[:3] for line in rows] == [
        [dim, *cells]
        for dim in ("2", "8")
        for cells in (("training", "search"), ("training", "fresh"), ("training+validation", "fresh"))
    ]
    assert [" seen " in line for line in rows] == [False, False, True] * 2
    assert "0.7100 ± 0.0141 seen  0.7000 ± 0.0141  2" in rows[2]
    assert "test, training+validation: to compare with papers that hold no images out" in lines
    alone = beside(HELD_OUT, [plain])
    assert len(alone) == len(lines) - 4
    assert not any("seen" in line for line in alone)
    assert beside(HELD_OUT, []) == []


def test_a_confirming_study_of_all_images_has_no_front() -> None:
    both = again(HELD_OUT, 0.7, all_images=True)
    shown = confirmed_lines(both)
    assert any("seen validation" in line for line in shown)
    assert not any("still on the front" in line for line in shown)
    images = (KnownImages("key", "f" * 32, {"training": 1295, "validation": 143, "test": 359}),)
    assert max(map(len, confirmed_lines(replace(both, images=images)))) <= 90
