"""Dotted paths into configuration classes, and one-line explanations of what does not validate."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes that an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def fields_at(root: type[BaseModel], path: str, *, under: str) -> None:
    """Check that `path` names a leaf field of `root` or of any kind that it admits on the way.

    Raises:
        ValueError: It does not; the message lists what there is.
    """
    models = [root]
    done: list[str] = []
    keys = path.split(".")
    for position, key in enumerate(keys):
        found = [model.model_fields[key] for model in models if key in model.model_fields]
        if not found:
            names = sorted({name for model in models for name in model.model_fields})
            where = ".".join(done) or "a trial"
            raise ValueError(f"{under}.{path}: no such field; {where} has {guess(key, names)}")
        models = [model for field in found for model in _models(field.annotation)]
        done.append(key)
        if bool(models) == (position == len(keys) - 1):
            problem = "names a table, not a field; add one of" if models else "goes below a plain field"
            inside = ", ".join(sorted({name for model in models for name in model.model_fields}))
            raise ValueError(f"{under}.{path}: {problem} {inside}".rstrip())


def guess(word: str, known: Iterable[str]) -> str:
    """``did you mean x?`` where one is close, else all that are known."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return f"{', '.join(names)}; did you mean {close[0]}?" if close else ", ".join(names)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for the first problem, with its dotted path and what would be valid."""
    # A misspelt key is also a missing one; its own name says more.
    details = sorted(error.errors(include_url=False), key=lambda d: d["type"] != "extra_forbidden")
    first = details[0]
    path = _path(first["loc"])
    message = _message(first, path, root)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{message}{more}"


def _path(loc: tuple[int | str, ...]) -> str:
    parts: list[str] = []
    for item in loc:
        tag = isinstance(item, str) and (item.startswith("<") or item in _SCALARS)
        # A discriminated union puts its tag after the field's name.
        if tag or (parts and item in _KINDS.get(parts[-1], ())):
            continue
        parts.append(str(item))
    return ".".join(parts)


def _message(detail: Any, path: str, root: type[BaseModel]) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "value_error":
        text = str(context["error"])
        # Our own checks name their field, the ones inside a parameter only its last part.
        return f"{path}.{text}" if path.startswith("space.") and not text.startswith("space.") else text
    if kind == "extra_forbidden":
        *tables, key = path.split(".")
        table = tables[0] if len(tables) == 1 else ""
        kind = next((item for item in detail["loc"] if item in _KINDS.get(table, ())), None)
        if kind and key in _names_at(root, tables):
            return (
                f"{path}: {table} kind {kind!r} has no such field; give it only where it applies, with `when`"
            )
        return (
            f"{path}: unknown key; {'.'.join(tables) or 'here'} takes {guess(key, _names_at(root, tables))}"
        )
    if kind == "missing":
        return f"{path}: missing"
    if kind in ("literal_error", "enum"):
        return f"{path}: {given!r} is not one of {context['expected']}"
    if kind == "union_tag_invalid":
        return f"{path}.kind: {context['tag']!r} is not one of {context['expected_tags']}"
    if kind == "union_tag_not_found" and path.startswith("space."):
        return f"{path}: give choices, low and high, or value"
    if kind == "union_tag_not_found":
        return f"{path}.kind: missing"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{path}: {given!r} must be a table"
    return f"{path}: {given!r}: {detail['msg'].lower()}"


def _names_at(root: type[BaseModel], tables: list[str]) -> list[str]:
    models = [root]
    for table in tables:
        models = [
            inner
            for model in models
            if table in model.model_fields
            for inner in _models(model.model_fields[table].annotation)
        ]
    return sorted({name for model in models for name in model.model_fields}) or ["no other"]


_SCALARS = frozenset(
    {"bool", "int", "float", "str", "constrained-str", "tuple[union[bool,int,float,str],...]"}
)
_KINDS = {
    "head": frozenset({"mlp", "autoencoder", "sparse", "reweight", "linear", "none"}),
    "objective": frozenset({"nt-xent", "barlow-twins"}),
    "scheme": frozenset({"joint", "alternating"}),
}
"""Tags that discriminated unions put after their field's name."""
