"""A checkpoint's identity: what it must tell apart, what it must not, and those of former code."""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import finish, start, tiny_config, tiny_images, without_timings
from pydantic import ValidationError

import headsearch
from headsearch.config import Config, TrialConfig, ViewsConfig, flatten, set_path
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.identity import NAMES, VERSION, chosen, identities
from headsearch.core.images import ImageSet, Split

IMAGES = tiny_images()
RECORD = Path(__file__).parent / "identity_defaults.json"


def images(fingerprint: str = "0123456789abcdef0123456789abcdef") -> ImageSet:
    empty = Split(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    return ImageSet("cifar10", ("a", "b"), empty, empty, empty, fingerprint)


def config(**tree: Any) -> TrialConfig:
    return TrialConfig.model_validate(tree)


def identity(**tree: Any) -> str:
    return identities(config(**tree), images())[0]


FORMER: list[tuple[dict[str, Any], str]] = [
    ({}, "5a5bf06540bb99a3bc5e399f0083bdd0"),
    ({"head": {"kind": "sparse", "latents": 512}, "seed": 3}, "15f3ad78121a9b7e832cf89b4e883917"),
    (
        {"scheme": {"kind": "alternating", "head_optimizer": {}}, "training": {"epochs": 5}},
        "a81ec1f04995f61c0b0741bf99e5f20a",
    ),
    (
        {"recipe": "schliebitz2024", "edition": 2, "head": {"projection_dim": 16}, "training": {"epochs": 20}},
        "065cf8fcf8bcedd94a9a0d41c592ce4c",
    ),
    (
        {"protocol": "ouyang2025", "edition": 2, "training": {"epochs": 9},
         "optimizer": {"name": "lars", "warmup_epochs": 2, "warmup_start": 0.0001}},
        "cc279f5a7063006f75f69814bda78fee",
    ),
    (
        {"recipe": "solo-learn-cifar", "edition": 2, "protocol": "ouyang2025", "training": {"epochs": 20}},
        "2584a4d1fe8f0ab900b66e5f5631da92",
    ),
    (
        {"recipe": "lightly-cifar10", "edition": 1, "training": {"epochs": 20}},
        "cd1479be2e70e552915fd4028e6a658f",
    ),
]  # fmt: skip
"""Computed by the last code that hashed all fields (commit 1d8e10d)."""


@pytest.mark.parametrize(("tree", "recorded"), FORMER)
def test_the_former_form_is_the_recorded_one(tree: dict[str, Any], recorded: str) -> None:
    """Where this fails for a new field, name the field in `identity.ADDED`."""
    assert identities(config(**tree), images())[1] == recorded


def test_what_former_code_could_not_have_has_no_former_form() -> None:
    third = {"recipe": "solo-learn-cifar", "protocol": "ouyang2025", "training": {"epochs": 20}}
    assert len(identities(config(**third), images())) == 1
    assert len(identities(config(probe={"online_warmup_start": "same"}), images())) == 1
    assert len(identities(config(data={"train_on": "training+validation"}), images())) == 1
    another_side = {"data": {"name": "cifar10", "image_size": 48}}
    assert len(identities(config(**another_side), images())) == 1
    assert len(identities(config(**another_side, edition=2), images())) == 1


def test_names_of_presets_are_no_part_of_it() -> None:
    named = config(recipe="dkobak-cifar10", system="barlow-twins", training={"epochs": 20})
    written = named.model_dump(mode="json") | {"recipe": None, "system": None}
    assert identity(**written) == identities(named, images())[0]
    assert identity(edition=2) == identity(edition=3)


def test_the_core_does_not_read_the_names_that_are_no_part_of_it() -> None:
    core = Path(headsearch.__file__).parent / "core"
    reads = re.compile(rf"config\.({'|'.join(NAMES)})\b")
    found = {file.name for file in core.glob("*.py") if reads.search(file.read_text())}
    assert found == {"identity.py"}
    assert reads.search("x = self.config.edition")


BASES: list[dict[str, Any]] = [
    {"training": {"epochs": 9}},
    {"training": {"epochs": 9}, "head": {"kind": "linear"}, "objective": {"kind": "barlow-twins"},
     "optimizer": {"name": "lars", "warmup_epochs": 2}},
    {"training": {"epochs": 9}, "head": {"kind": "autoencoder"}, "protocol": "ouyang2025"},
    {"training": {"epochs": 9}, "scheme": {"kind": "alternating", "head_optimizer": {}}, "head": {"kind": "sparse"}},
    {"training": {"epochs": 9}, "head": {"kind": "reweight"}, "encoder": {"name": "resnet18", "stem": "imagenet"},
     "data": {"name": "folder", "root": "photos"}},
]  # fmt: skip


def words(schema: Any) -> set[str]:
    """All strings that a field of a JSON schema may be."""
    if isinstance(schema, dict):
        own = {*schema.get("enum", ()), schema.get("const")}
        return {word for word in own if isinstance(word, str)}.union(*map(words, schema.values()))
    return set().union(*map(words, schema)) if isinstance(schema, list) else set()


WORDS = sorted(words(TrialConfig.model_json_schema()))


def others(value: Any) -> list[Any]:
    """Values that a field with `value` might have as well."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2, value + 1, value / 2, value - 1, value + 7, value + 0.25]
    if isinstance(value, list):
        return [value[:1]]
    return [1, 0.5, 5, *WORDS, "elsewhere"]


def test_every_field_counts() -> None:
    """Each leaf of several configurations, changed alone, gives an identity that no other has."""
    seen: dict[str, str] = {}
    tried: set[str] = set()
    untried: set[str] = set()
    for number, base in enumerate(BASES):
        tree = config(**base).model_dump(mode="json")
        seen[identities(config(**tree), images())[0]] = f"{number}"
        for path, value in flatten(tree).items():
            table = path.rpartition(".")[0]
            if path in NAMES or path.endswith("kind") or (table == "scheme.head_optimizer" and number != 3):
                continue
            for other in others(value):
                changed = json.loads(json.dumps(tree))
                set_path(changed, path, other)
                try:
                    made = config(**changed)
                except ValidationError:
                    continue
                if made == config(**tree):
                    continue
                for form in identities(made, images()):
                    assert form not in seen, (number, path, other, seen[form])
                    seen[form] = f"{number} {path}"
                tried.add(path)
                break
            else:
                untried.add(path)
    assert untried - tried == set()
    assert len(tried) > 90


def test_other_images_and_seeds_have_another() -> None:
    assert set(identities(config(), images("a"))).isdisjoint(identities(config(), images("b")))
    assert identity(seed=1) != identity()


def test_kinds_with_equal_fields_are_told_apart() -> None:
    trees: list[dict[str, Any]] = [
        {},
        *({"head": {"kind": kind}} for kind in ("linear", "autoencoder", "sparse", "reweight", "none")),
        *({"head": {"kind": kind, "projection_dim": 32}} for kind in ("mlp", "linear", "autoencoder")),
        {"objective": {"kind": "barlow-twins"}},
        *({"objective": {"kind": kind, "scale": 7.0}} for kind in ("nt-xent", "barlow-twins")),
        {"scheme": {"kind": "alternating"}},
        {"scheme": {"kind": "alternating", "head_optimizer": {}}},
        {"optimizer": {"learning_rate": 0.1}},
        {"scheme": {"kind": "alternating", "head_optimizer": {"learning_rate": 0.1}}},
    ]
    found = [identities(config(**tree), images()) for tree in trees]
    assert len(set(itertools.chain(*found))) == 2 * len(trees)


def test_a_field_that_is_added_at_its_default_changes_nothing() -> None:
    class Later(ViewsConfig):
        sharpness: float = 0.0

    assert chosen(Later(jitter_strength=1.0)) == chosen(ViewsConfig(jitter_strength=1.0))
    assert chosen(Later(sharpness=0.5)) == {"sharpness": 0.5}


def defaults() -> dict[str, dict[str, Any]]:
    """Of all parts of a configuration, by class and field."""
    found: dict[str, dict[str, Any]] = {}
    waiting: list[type[Config]] = [Config]
    while waiting:
        part = waiting.pop()
        waiting += [sub for sub in part.__subclasses__() if sub.__module__.startswith("headsearch.config.")]
        for name, field in part.model_fields.items():
            if name in NAMES:
                continue
            value = type(field.default).__name__ if isinstance(field.default, Config) else field.default
            found.setdefault(part.__name__, {})[name] = value
    return json.loads(json.dumps(found, sort_keys=True))  # type: ignore[no-any-return]


def test_a_default_that_changes_raises_the_version() -> None:
    """An identity leaves defaults out. Once they and VERSION are right: `python tests/core/test_identity.py`."""
    record = json.loads(RECORD.read_text())
    now = defaults()
    if record["version"] == VERSION:
        kept = {
            name: {field: now.get(name, {}).get(field, "no such field") for field in fields}
            for name, fields in record["defaults"].items()
        }
        assert kept == record["defaults"], "a default changed, or a field is gone: raise identity.VERSION"
    assert record == {"version": VERSION, "defaults": now}, "a new field: record its default"


def test_a_checkpoint_with_the_former_identity_is_taken_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    today, former = identities(tiny_config(), IMAGES)
    training = start(tiny_config(), IMAGES, tmp_path, checkpoints)
    first = next(training)
    training.close()
    state = checkpoints.load()
    assert state is not None
    assert state["identity"] == today
    checkpoints.save({**state, "identity": former})
    with caplog.at_level(logging.WARNING):
        training = start(tiny_config(), IMAGES, tmp_path, checkpoints)
        assert [next(training).epoch, next(training).epoch] == [1, 2]
        training.close()
    assert caplog.text == ""
    assert checkpoints.load()["identity"] == today  # type: ignore[index]
    # One that was set aside under its former identity comes back, too.
    checkpoints.save({**state, "identity": former})
    training = start(tiny_config(), tiny_images(train=120), tmp_path, checkpoints)
    next(training)
    training.close()
    whole, _ = finish(start(tiny_config(), IMAGES, tmp_path, checkpoints))
    assert whole[0] == first
    straight, _ = finish(start(tiny_config(), IMAGES, tmp_path))
    assert without_timings(whole) == without_timings(straight)


if __name__ == "__main__":
    RECORD.write_text(
        json.dumps({"version": VERSION, "defaults": defaults()}, indent=1, sort_keys=True) + "\n"
    )
