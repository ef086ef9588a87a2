"""The tables of studies/README.md: a row for every field of every recipe, with the code's own values."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headsearch.config import TrialConfig, flatten
from headsearch.core import probe_ouyang2025, probe_schliebitz2024
from headsearch.recipes import RECIPES
from headsearch.spec import SCORES_TEST

TEXT = (Path(__file__).parents[1] / "studies" / "README.md").read_text()
PARTS = ("views", "encoder", "head", "objective", "scheme", "optimizer")
OF_LARS = {"trust_coefficient", "clip", "lars_form", "warmup_start", "warmup_peak"}
OTHERS = {
    "data.normalization", "training.epochs", "training.batch_size", "training.encode_views",
    "training.precision", "training.keep",
}  # fmt: skip
"""Of the parts that a recipe sets in part: what decides its numbers, whether it sets it or not."""
IDLE = {"encoder.width"}
"""Only `small-resnet` reads it, which no recipe has."""
CONSTANTS: dict[str, ModuleType] = {
    "schliebitz2024": probe_schliebitz2024,
    "ouyang2025": probe_ouyang2025,
}
NO_SETTING = {"F", "TYPE_CHECKING", "CROPS"}


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | tuple):
        return ", ".join(shown(one) for one in (value.values() if isinstance(value, dict) else value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, f"studies/README.md has no section {title}"
    return found[1]


def rows(title: str) -> dict[str, str]:
    """Field and our value, of all rows of a section's table; each says the source's value and where it is."""
    found: dict[str, str] = {}
    for line in section(title).splitlines():
        if not line.startswith("| `"):
            continue
        fields, ours, theirs, where = (cell.strip() for cell in line.strip("|").split(" | "))
        assert theirs, line
        assert where, line
        names, values = (re.findall(r"`([^`]*)`", cell) for cell in (fields, ours))
        assert len(names) == len(values), line
        assert not found.keys() & names, line
        found |= dict(zip(names, values, strict=True))
    return found


def settings(name: str) -> dict[str, Any]:
    recipe = RECIPES[name]
    config = TrialConfig.model_validate({"recipe": name, "training": {"epochs": recipe.epochs}})
    return flatten(config.model_dump(mode="json"))


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_all_its_fields_and_values(name: str) -> None:
    values, table = settings(name), rows(f"Recipe `{name}`")
    wanted = (
        {path for path in values if path.partition(".")[0] in PARTS}
        | OTHERS
        | set(flatten(RECIPES[name].tree))
    )
    if values["optimizer.name"] != "lars":
        wanted -= {f"optimizer.{field}" for field in OF_LARS}
    assert table.keys() == wanted - IDLE
    assert table == {path: shown(values[path]) for path in table}
    assert "Stays different:" in section(f"Recipe `{name}`")


@pytest.mark.parametrize("protocol", CONSTANTS)
def test_each_protocol_has_its_constants(protocol: str) -> None:
    module = CONSTANTS[protocol]
    wanted = {name for name in vars(module) if name.isupper() and name not in NO_SETTING}
    table = rows(f"Protocol `{protocol}`")
    assert table.keys() == wanted
    assert table == {name: shown(getattr(module, name)) for name in table}


def test_no_recipe_or_protocol_is_left_over() -> None:
    assert set(re.findall(r"^## Recipe `(.*)`", TEXT, re.MULTILINE)) == set(RECIPES)
    assert set(re.findall(r"^## Protocol `(.*)`", TEXT, re.MULTILINE)) == {"holdout", *CONSTANTS}
    assert CONSTANTS.keys() >= SCORES_TEST
