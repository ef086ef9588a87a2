"""What a checkpoint belongs to: one configuration, trained on one set of images."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from headsearch.config import Config, TrialConfig, flatten, set_path
from headsearch.core.images import ImageSet
from headsearch.recipes import edition_of_stored

VERSION: Final = 1
"""Of what the fields mean that are left out of an identity. Raise it when a field's default changes, when a
field is removed, or when a new field's default is not what the code did before there was the field."""
NAMES: Final = frozenset({"recipe", "system", "edition"})
"""Fields that only decide what other fields are."""
ADDED: Final = frozenset({"data.classes", "data.resize_first", "data.train_on", "probe.online_warmup_start"})
"""Fields that the former form of an identity does not know."""
FORMER_VALUES: Final = {"training.cuda_graph": False}
"""Fields that have another default since, and have no part in the result."""
FORMER_EDITION: Final = 2
"""The newest of the former form."""


def identities(config: TrialConfig, images: ImageSet) -> tuple[str, ...]:
    """Hash what a checkpoint belongs to: 32 hexadecimal digits each, today's form first, then the former one.

    Today's form leaves out fields that have their default, so a field that is added with the default that
    keeps the former behaviour changes no identity. The former form had all fields. It is not computed where a
    field has a value that the code of that form could not have.
    """
    former = _all_fields(config)
    forms = [
        [VERSION, chosen(config), images.fingerprint],
        *([[former, images.fingerprint]] if former else []),
    ]
    return tuple(
        hashlib.blake2b(json.dumps(form, sort_keys=True).encode(), digest_size=16).hexdigest()
        for form in forms
    )


def chosen(config: Config) -> dict[str, Any]:
    """The fields that differ from their defaults, as JSON values; tables of fields likewise.

    A table of another kind than the default says its kind, also where all else is at its default: two kinds
    may have the same fields.
    """
    values = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in NAMES or name == "kind":
            continue
        if isinstance(value, Config):
            table = chosen(value)
            if type(value) is not type(field.default):
                table["kind"] = getattr(value, "kind", None)  # none: it is there, and could have been absent
            if table:
                found[name] = table
        elif value != field.default:
            found[name] = values[name]
    return found


def _all_fields(config: TrialConfig) -> dict[str, Any] | None:
    """All fields, as the former form has them; None where one that it does not know is not at its default."""
    values, defaults = config.model_dump(mode="json"), flatten(TrialConfig().model_dump(mode="json"))
    if config.edition > FORMER_EDITION:
        if edition_of_stored(values) is not None:
            return None
        values["edition"] = FORMER_EDITION  # it was the code's, and decides nothing
    given = {**flatten(values), **FORMER_VALUES}
    if any(given.get(path) != defaults.get(path) for path in ADDED):
        return None
    kept: dict[str, Any] = {}
    for path, value in given.items():
        if path not in ADDED:
            set_path(kept, path, value)
    return kept
