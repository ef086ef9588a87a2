"""The JSON schema of study files, for editors that complete and check them."""

from __future__ import annotations

from typing import Any

from headsearch.config import TrialConfig
from headsearch.recipes import KIND_DEFAULTS
from headsearch.spec import StudySpec


def study_schema() -> dict[str, Any]:
    """Describe a study file; `base` is a part of the trial configuration, which stands under ``$defs``."""
    schema = StudySpec.model_json_schema()
    trial = TrialConfig.model_json_schema()
    definitions = schema.setdefault("$defs", {}) | trial.pop("$defs", {})
    # A table under base may leave its kind to the space, so it may fit several kinds.
    for table in KIND_DEFAULTS:
        schemas = trial["properties"][table]
        schemas["anyOf"] = schemas.pop("oneOf")
        schemas.pop("discriminator", None)
    definitions["TrialConfig"] = trial
    base = schema["properties"]["base"]
    schema["properties"]["base"] = {
        "$ref": "#/$defs/TrialConfig",
        "description": base.get("description", ""),
        "default": {},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "headsearch study",
        **schema,
        "$defs": definitions,
    }
