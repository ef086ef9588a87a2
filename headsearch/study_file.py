"""Study files: TOML in, a checked StudySpec out, every problem in one line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headsearch import space as spaces
from headsearch.config import TrialConfig, flatten, set_path
from headsearch.errors import SpecError
from headsearch.fields import explain, guess
from headsearch.recipes import EDITION, KIND_DEFAULTS, has_another_side
from headsearch.spec import StudySpec


def load_study(path: Path, overrides: Iterable[str] = (), *, check_points: bool = True) -> StudySpec:
    """Read, override and check a study file.

    Args:
        path: The TOML file.
        overrides: ``dotted.path=value`` each: a field of the study (``budget.trials=40``) or of the
            trial configuration (``data.limit=5000``), which is then the same for every trial, also
            where the space would have varied it. A list makes new choices of a parameter of the space.
        check_points: Whether each point must make a valid configuration.

    Raises:
        SpecError: The file cannot be read, is not TOML, or is not a study.
    """
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    return parse_study(tree, source=str(path), check_points=check_points)


def parse_study(tree: dict[str, Any], *, source: str, check_points: bool = True) -> StudySpec:
    """Check plain data of a new study; `source` begins the message.

    What depends on the edition is of today's, unless the data say another. The spec says the first edition
    that means the same, so that it equals that of a study which was made before the last one.
    """
    if path := _nul_in(tree):
        raise SpecError(f"{source}: {path}: has a NUL character")
    try:
        return StudySpec.model_validate(_with_edition(tree), context={"check_points": check_points})
    except ValidationError as error:
        raise SpecError(f"{source}: {explain(error, StudySpec)}") from None


def _nul_in(value: object, path: str = "") -> str | None:
    """Path of the first text with a NUL, which neither PostgreSQL nor a file system takes."""
    if isinstance(value, str):
        return path if "\0" in value else None
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    found = (_nul_in(inner, f"{path}.{key}" if path else str(key)) for key, inner in items)
    return next((one for one in found if one), None)


def _with_edition(tree: dict[str, Any]) -> dict[str, Any]:
    base = tree.get("base", {})
    if not isinstance(base, dict) or "edition" in base:
        return tree
    space, points = tree.get("space", {}), tree.get("points", ())
    named = [part for part in (base, space, *points) if isinstance(part, dict)] if _is_list(points) else []
    has_recipe = any("recipe" in part for part in named) or tree.get("protocol") == "ouyang2025"
    if has_recipe or _resizes_array(base, named[1:]):
        return {**tree, "base": {"edition": EDITION, **base}}
    return tree


def _resizes_array(base: dict[str, Any], varied: Iterable[dict[str, Any]]) -> bool:
    """Whether a study's images may have another side than they are stored at; where sizes vary, they do."""
    fixed = flatten(base)
    name = fixed.get("data.name", "digits")
    vary = any(path.startswith("data.image_size") for part in varied for path in flatten(part))
    return has_another_side(name, "varied" if vary else fixed.get("data.image_size"))


def _is_list(points: object) -> bool:
    return isinstance(points, list | tuple)


def one_point(spec: StudySpec, overrides: Iterable[str] = (), *, seed: int | None = None) -> TrialConfig:
    """One trial configuration of a study, for training without a database.

    Each parameter of the space takes its first value (a range its low end) unless overridden;
    `overrides` may also set what the study itself sets, such as ``training.epochs=0``.

    Raises:
        SpecError: An override that is not valid.
    """
    chosen = dict(_split(override) for override in overrides)
    if spec.points:
        params = dict(spec.points[0])
    else:
        # Values decide which later parameters are active, so overrides go in while drawing.
        params = spaces.draw(spec.space, lambda path, p: chosen.get(path, _first(p)))
    tree = spec.trial_tree(params, spec.seeds[0])
    for table in KIND_DEFAULTS:
        given = tree.get(table, {}).get("kind")
        if given and chosen.get(f"{table}.kind", given) != given:
            tree[table] = {}  # the other kind's fields
    if seed is not None:
        tree["seed"] = seed
    return _validated(tree, {path: value for path, value in chosen.items() if seed is None or path != "seed"})


def configured(overrides: Iterable[str]) -> TrialConfig:
    """The trial configuration that differs from the default by `overrides`, of no study.

    Raises:
        SpecError: An override that is not valid.
    """
    return _validated({}, dict(_split(override) for override in overrides))


def _validated(tree: dict[str, Any], chosen: dict[str, Any]) -> TrialConfig:
    for path, value in chosen.items():
        set_path(tree, path, value)
    try:
        return TrialConfig.model_validate(tree)
    except ValidationError as error:
        raise SpecError(f"--set {explain(error, TrialConfig)}") from None


def _first(parameter: spaces.Choices | spaces.Range) -> Any:
    return parameter.low if isinstance(parameter, spaces.Range) else parameter.values[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin it with a byte order mark
    except FileNotFoundError:
        raise SpecError(f"{path}: no such study file") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: a folder, not a study file") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not a TOML file (not UTF-8 text)") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise SpecError("the study file's path has a NUL character") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not a TOML file: {error}") from None
    if not tree:
        raise SpecError(f"{path}: empty; a study needs at least name, budget and space")
    return tree


def _split(override: str) -> tuple[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise SpecError(f"--set {override}: write it as dotted.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    return path.strip(), value


def _apply(tree: dict[str, Any], override: str) -> None:
    path, value = _split(override)
    top = path.split(".")[0]
    if top in StudySpec.model_fields:
        set_path(tree, path, value)
        return
    if top not in TrialConfig.model_fields:
        known = (*StudySpec.model_fields, *TrialConfig.model_fields)
        raise SpecError(f"--set {path}: no such field; there is {guess(top, known)}")
    if not _fix_in_space(tree.get("space"), path, value):
        base = tree.setdefault("base", {})
        base.pop(path, None)
        set_path(base, path, value)


def _fix_in_space(space: Any, path: str, value: Any) -> bool:
    """Replace a parameter by a value, keeping its conditions; false where the space has none."""
    if not isinstance(space, dict):
        return False
    if path in space:
        old = space[path]
        kept = {"when": old["when"]} if isinstance(old, dict) and "when" in old else {}
        space[path] = {"choices" if isinstance(value, list) else "value": value, **kept}
        return True
    table, dot, rest = path.partition(".")
    return bool(dot) and _fix_in_space(space.get(table), rest, value)
