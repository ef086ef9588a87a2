"""`headsearch heads`, and that the README has the same tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headsearch.cli.app import run
from headsearch.recipes import RECIPES
from headsearch.runtime.catalogue import recipe_table, system_table, systems
from headsearch.systems import SYSTEMS

README = Path(__file__).parents[2] / "README.md"


def test_every_system_and_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["heads"]) == 0
    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert SYSTEMS.keys() | RECIPES.keys() <= first_words


def test_sizes_follow_the_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["heads", "--encoder", "resnet50", "--json"]) == 0
    listed = {row["system"]: row for row in json.loads(capsys.readouterr().out)["systems"]}
    assert listed["simclr"]["head_parameters"] == 2048 * 2048 + 2048 + 2048 * 128 + 128
    assert listed["none"]["projection_dim"] == 2048
    frozen = listed["schliebitz2024-frozen"]
    assert frozen["head_parameters"] - frozen["trainable_head_parameters"] == 2048 * 128 + 128
    assert listed["ouyang2025-simclr-sparse"]["tree"]["head"]["latents"] == 100_000


def test_unknown_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["heads", "--encoder", "vit"]) == 2
    assert "--encoder: 'vit' is not one of small-resnet, resnet18" in capsys.readouterr().err


@pytest.mark.parametrize("table", [system_table(systems()), recipe_table()], ids=["systems", "recipes"])
def test_readme_has_the_table(table: object) -> None:
    """After a change: headsearch heads --markdown."""
    assert table.markdown() in README.read_text()  # type: ignore[attr-defined]
