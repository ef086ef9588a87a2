"""Rankings over studies: what they show, and which they refuse."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from fabricated import snapshot, trial

from headsearch.errors import InputError
from headsearch.report.comparison import (
    compare,
    comparison_captions,
    comparison_csv,
    comparison_json,
    comparison_table,
)
from headsearch.report.summary import ending
from headsearch.search.snapshot import Snapshot


def measured(number: int, seed: int, system: str, acc: float, knn: float = 0.4) -> Any:
    return trial(
        number, acc=acc, seed=seed, params={"system": system},
        facts={"measures": {"knn_accuracy": knn}, "train_images": 10, "validation_images": 5, "test_images": 4},
    )  # fmt: skip


def of(name: str, *trials: Any, **changes: Any) -> Snapshot:
    grid = {
        "mode": "grid",
        "budget": {"epochs": 12},
        "seeds": [0, 1],
        "space": {"system": ["simclr", "linear"]},
    }
    made = snapshot(*trials, **(grid | changes))
    return replace(
        made, study=replace(made.study, name=name, spec=made.study.spec.model_copy(update={"name": name}))
    )


FIRST = of(
    "first", measured(0, 0, "simclr", 0.5), measured(1, 0, "linear", 0.6, 0.3), measured(2, 1, "simclr", 0.6)
)
SECOND = of("second", measured(0, 0, "none", 0.58), space={"system": ["none", "narrow"]})


def test_points_of_all_studies_are_ranked_by_their_means() -> None:
    found = compare([FIRST, SECOND])
    assert [(one.study, one.point.params["system"], one.point.n) for one in found] == [
        ("first", "linear", 1), ("second", "none", 1), ("first", "simclr", 2),
    ]  # fmt: skip
    assert found[2].point.probe_accuracy.mean == pytest.approx(0.55)
    assert found[2].point.probe_accuracy.std == pytest.approx(0.0707, abs=1e-4)
    assert found[0].measures == {
        "knn_accuracy": 0.3, "feature_rank": 20.0, "projection_rank": 5.0, "train_seconds": 30.0,
    }  # fmt: skip


def test_table_names_the_study_only_where_there_are_several() -> None:
    one = comparison_table([FIRST], compare([FIRST]))
    assert one.columns[:2] == ("system", "dim")
    assert one.rows[1][0] == "simclr"
    assert one.rows[1][3] == "0.5500 ± 0.0707"
    assert comparison_table([FIRST, SECOND], compare([FIRST, SECOND])).columns[:2] == ("study", "system")


def test_an_offline_probe_has_columns_of_its_own() -> None:
    facts = {"offline_validation_accuracy": 0.41, "offline_test_accuracy": 0.42}
    seen = of("probed", trial(0, params={"system": "simclr"}, facts=facts), protocol="ouyang2025")
    table = comparison_table([seen], compare([seen]))
    assert table.columns[-2:] == ("offline validation", "offline test")
    assert table.rows[0][-2:] == ("0.4100", "0.4200")
    assert "offline test" not in comparison_table([FIRST], compare([FIRST])).columns


def test_captions_say_protocol_seeds_and_sizes() -> None:
    text = "\n".join(comparison_captions([FIRST]))
    assert "protocol holdout" in text
    assert "12 epochs, seeds 0, 1" in text
    assert "10 training, 5 validation, 4 test images" in text


def test_json_and_csv_say_the_same() -> None:
    found = compare([FIRST, SECOND])
    data = json.loads(json.dumps(comparison_json([FIRST, SECOND], found)))
    rows = list(csv.DictReader(io.StringIO(comparison_csv([FIRST, SECOND], found))))
    assert data["protocol"] == "holdout"
    assert [row["study"] for row in rows] == [point["study"] for point in data["points"]]
    assert {row["protocol"] for row in rows} == {"holdout"}
    assert rows[2]["seeds"] == "0 1"
    assert float(rows[2]["validation_accuracy_mean"]) == data["points"][2]["validation_accuracy"]["mean"]
    assert float(rows[0]["knn_accuracy"]) == 0.3


@pytest.mark.parametrize("protocol", ["schliebitz2024", "ouyang2025"])
def test_different_protocols_are_refused(protocol: str) -> None:
    other = of("other", measured(0, 0, "simclr", 0.9), protocol=protocol)
    with pytest.raises(InputError) as caught:
        compare([FIRST, other])
    said = str(caught.value)
    assert "\n" not in said
    assert "first (protocol holdout)" in said
    assert f"other (protocol {protocol})" in said
    assert "not ranked together" in said


@pytest.mark.parametrize(
    "base", [{"data.name": "cifar10"}, {"data.limit": 100}, {"data.validation_fraction": 0.2}]
)
def test_different_images_are_refused(base: dict[str, Any]) -> None:
    path = next(iter(base))
    with pytest.raises(InputError, match=rf"{path} is .* not ranked together"):
        compare([FIRST, of("other", measured(0, 0, "simclr", 0.9), base=base)])


def test_normalisation_may_differ() -> None:
    assert compare([FIRST, of("other", base={"data.normalization": "zscore"})])


def test_a_grid_ends_by_naming_the_ranking() -> None:
    assert "all points ranked: headsearch study compare first" in ending(FIRST, "file.toml")
    assert not any("study compare" in line for line in ending(snapshot(trial(0)), "file.toml"))


def refused(*snapshots: Snapshot, across: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as caught:
        compare(snapshots, across)
    said = str(caught.value)
    assert "\n" not in said
    return said


def recorded(**facts: Any) -> Any:
    return trial(0, params={"system": "simclr"}, facts=facts)


def test_other_epochs_have_to_be_asked_for_and_are_said_above_the_table() -> None:
    longer = of("longer", measured(0, 0, "simclr", 0.9), budget={"epochs": 200})
    said = refused(FIRST, longer)
    assert "budget.epochs is 12 in first, 200 in longer" in said
    assert said.endswith("headsearch study compare --across epochs")
    assert refused(FIRST, longer, across=("probe", "software")) == said
    found = compare([FIRST, longer], across=["epochs"])
    assert {one.study for one in found} == {"first", "longer"}
    assert comparison_captions([FIRST, longer])[0] == (
        "across epochs, as asked: budget.epochs is 12 in first, 200 in longer"
    )
    assert comparison_json([FIRST, longer], found)["across"].keys() == {"epochs"}
    assert comparison_json([FIRST, SECOND], compare([FIRST, SECOND]))["across"] == {}


@pytest.mark.parametrize(
    ("protocol", "probe", "matters"),
    [
        ("holdout", {"iterations": 20}, True),
        ("holdout", {"report_images": 100}, True),
        ("holdout", {"offline_epochs": 3}, False),
        ("ouyang2025", {"offline_epochs": 3}, True),
        ("ouyang2025", {"penalties": [0.1]}, False),
        ("ouyang2025", {"knn_neighbours": 200}, True),
    ],
)
def test_other_probes_have_to_be_asked_for_where_the_protocol_reads_them(
    protocol: str, probe: dict[str, Any], matters: bool
) -> None:
    one, other = (
        of(name, recorded(), protocol=protocol, base={"probe": given})
        for name, given in (("one", {}), ("other", probe))
    )
    if matters:
        assert f"probe.{next(iter(probe))} is " in refused(one, other)
        assert comparison_captions([one, other])[0].startswith("across probe, as asked: ")
    assert compare([one, other], across=["probe"] if matters else [])


def test_a_recipes_probe_counts() -> None:
    one, other = (
        of(name, recorded(), protocol="ouyang2025", budget={"epochs": 20}, base={"recipe": recipe})
        for name, recipe in (("one", "ouyang2025-simclr-cifar"), ("other", "ouyang2025-barlow-cifar"))
    )
    assert "probe.online_learning_rate is 0.1 in one, 0.15 in other" in refused(one, other)


@pytest.mark.parametrize(("name", "old", "new"), [("torch", "2.11.0", "2.14.1"), ("cudnn", 91002, 91100)])
def test_other_software_has_to_be_asked_for(name: str, old: object, new: object) -> None:
    one, other = of("one", recorded(**{name: old})), of("other", recorded(**{name: new}))
    assert f"{name} is {old} in one, {new} in other" in refused(one, other)
    assert compare([one, other], across=["software"])
    assert compare([one, of("third", recorded())]), "a study that recorded none is not refused"
    later = replace(one, study=replace(one.study, name="later", version="99"))
    assert "headsearch is " in refused(one, later)


def test_threads_and_gpus_may_differ() -> None:
    assert compare([of("one", recorded(threads=1)), of("other", recorded(threads=8, gpu="H100"))])


def test_images_that_changed_are_refused_whatever_is_asked() -> None:
    one, other = (
        of(name, recorded(data_fingerprint=print_))
        for name, print_ in (("one", "a" * 32), ("other", "b" * 32))
    )
    said = refused(one, other, across=("epochs", "probe", "software"))
    assert "their images differ (fingerprint aaaaaaaaaaaa in one, bbbbbbbbbbbb in the other)" in said
    larger = of("larger", recorded(data_fingerprint="c" * 32), base={"data.image_size": 64})
    assert compare([one, larger]), "decoded at another size they are other pixels"
