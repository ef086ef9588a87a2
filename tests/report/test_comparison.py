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
