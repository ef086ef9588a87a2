"""What all parts of the configuration tree share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dim = Annotated[int, Field(ge=1, le=1_000_000)]


class Config(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set ``tree["a"]["b"]`` for the dotted `path` ``a.b``, making the tables on the way."""
    *tables, leaf = path.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
    tree[leaf] = value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted paths of all leaves of nested dictionaries. Lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            flat |= flatten(value, path)
        else:
            flat[path] = value
    return flat
