"""The house's rules, read from the source: who imports whom, which library lives where, file sizes.

Every import counts wherever it stands: in a function, under TYPE_CHECKING, relative, or by name
through importlib. Running the code would miss those that a test does not reach.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "headsearch"
MAX_LINES = 500

# A layer may import itself and those named for it. Modules that stand beside the packages are the base.
BASE = frozenset({p.stem for p in PACKAGE.glob("[!_]*.py")} | {"home", "config", "spec", "errors"})
LAYERS: dict[str, frozenset[str]] = {
    "core": BASE,
    "search": BASE,
    "report": BASE | {"search", "core"},
    "runtime": BASE | {"search", "core", "report"},
    "cli": BASE | {"search", "core", "report", "runtime"},
    "__main__": BASE | {"search", "core", "report", "runtime", "cli"},
    "__init__": frozenset(),
} | dict.fromkeys(BASE, BASE)

# Where a library may be imported: layers, or single modules with their layer.
HOMES: dict[str, frozenset[str]] = (
    dict.fromkeys(("torch", "torchvision"), frozenset({"core", "runtime/worker.py"}))
    | dict.fromkeys(
        ("optuna", "optuna_dashboard", "sqlalchemy"),
        frozenset({"search", "report", "runtime/worker.py", "runtime/dashboard.py"}),
    )
    | dict.fromkeys(("typer", "click", "rich"), frozenset({"cli", "__main__.py"}))
)


def imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `package` is the package that the file is in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, node.module or "")).strip(".")
            if module in ("headsearch", ""):  # from headsearch import core
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0]
            if (
                name in ("import_module", "__import__")
                and isinstance(target, ast.Constant)
                and isinstance(target.value, str)
            ):
                yield node.lineno, target.value


def complaints(package: Path) -> list[str]:
    """One line per broken rule in the tree of the package `headsearch` at `package`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        layer = file.split("/")[0].removesuffix(".py")
        source = path.read_text(encoding="utf-8")
        if path.name in ("utils.py", "util.py", "helpers.py", "misc.py"):
            found.append(f"{file}: name it after what it holds")
        if (lines := len(source.splitlines())) > MAX_LINES:
            found.append(f"{file}: {lines} lines, {MAX_LINES} at most")
        if layer not in LAYERS:
            found.append(f"{file}: {layer} is in no layer")
            continue
        inside = ("headsearch", *path.relative_to(package).parts[:-1])
        for line, module in imported(ast.parse(source), inside):
            top, _, rest = module.partition(".")
            if top == "headsearch":
                other = rest.split(".")[0]
                if other in LAYERS and other != layer and other not in LAYERS[layer]:
                    found.append(f"{file}:{line}: {layer} imports {other}")
                elif other and other not in LAYERS and not other.startswith("__"):
                    found.append(f"{file}:{line}: {other} is in no layer")
            elif top in HOMES and not {layer, file} & HOMES[top]:
                found.append(f"{file}:{line}: {top} outside {', '.join(sorted(HOMES[top]))}")
    return found


def test_the_house_keeps_its_rules() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 3, f"nothing to read under {PACKAGE}"
    assert complaints(PACKAGE) == []


def test_the_tests_have_no_utils() -> None:
    tests = Path(__file__).parent
    assert [p.name for p in tests.rglob("*.py") if p.name in ("utils.py", "util.py", "helpers.py")] == []


def plant(root: Path, file: str, source: str) -> Path:
    path = root / "headsearch" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return root / "headsearch"


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("core/a.py", "import headsearch.search.store", "core/a.py:1: core imports search"),
        ("search/a.py", "from headsearch.core import pretrain", "search/a.py:1: search imports core"),
        ("search/a.py", "from headsearch import core", "search/a.py:1: search imports core"),
        ("core/a.py", "from ..report import front", "core/a.py:1: core imports report"),
        ("core/deep/a.py", "from ... import runtime", "core/deep/a.py:1: core imports runtime"),
        ("core/__init__.py", "from ..search import x", "core/__init__.py:1: core imports search"),
        ("report/a.py", "if 1:\n    import headsearch.runtime", "report/a.py:2: report imports runtime"),
        ("runtime/a.py", "import json, headsearch.cli", "runtime/a.py:1: runtime imports cli"),
        ("config.py", "from headsearch.core.heads import x", "config.py:1: config imports core"),
        ("errors.py", "from headsearch import search", "errors.py:1: errors imports search"),
        ("__init__.py", "from headsearch.config import x", "__init__.py:1: __init__ imports config"),
        (
            "search/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from headsearch.core import x",
            "search/a.py:3: search imports core",
        ),
        (
            "search/a.py",
            "import importlib\nimportlib.import_module('headsearch.core.heads')",
            "search/a.py:2: search imports core",
        ),
        ("spec.py", "import torch.nn as nn", "spec.py:1: torch outside core, runtime/worker.py"),
        ("search/a.py", "from torch import nn", "search/a.py:1: torch outside core, runtime/worker.py"),
        ("cli/a.py", "__import__('torchvision')", "cli/a.py:1: torchvision outside core, runtime/worker.py"),
        ("runtime/launch.py", "import torch", "runtime/launch.py:1: torch outside core, runtime/worker.py"),
        (
            "runtime/x.py",
            "import sqlalchemy",
            "runtime/x.py:1: sqlalchemy outside report, runtime/dashboard.py, runtime/worker.py, search",
        ),
        (
            "cli/a.py",
            "import optuna",
            "cli/a.py:1: optuna outside report, runtime/dashboard.py, runtime/worker.py, search",
        ),
        ("report/a.py", "from rich.table import Table", "report/a.py:1: rich outside __main__.py, cli"),
        ("core/a.py", "import typer", "core/a.py:1: typer outside __main__.py, cli"),
        ("extra/a.py", "", "extra/a.py: extra is in no layer"),
        ("core/a.py", "import headsearch.extra", "core/a.py:1: extra is in no layer"),
        ("core/utils.py", "", "core/utils.py: name it after what it holds"),
        ("core/a.py", "x = 1\n" * (MAX_LINES + 1), f"core/a.py: {MAX_LINES + 1} lines, {MAX_LINES} at most"),
    ],
)  # fmt: skip
def test_a_wrong_tree_is_caught(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    assert complaints(plant(tmp_path, file, source)) == [complaint]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/a.py", "import torch, torchvision\nfrom headsearch.config import x\nfrom . import heads"),
        (
            "search/a.py",
            "import optuna, sqlalchemy\nfrom headsearch import errors, spec\nfrom .tables import x",
        ),
        ("report/a.py", "import optuna\nfrom headsearch.search import store\nfrom ..core import heads"),
        (
            "runtime/worker.py",
            "import torch, optuna, sqlalchemy\nfrom headsearch import core, search, report",
        ),
        (
            "runtime/dashboard.py",
            "import optuna_dashboard, sqlalchemy\nfrom headsearch.home import home_folder",
        ),
        ("cli/a.py", "import typer, rich\ndef f():\n    from headsearch.runtime.worker import work"),
        ("spec.py", "from headsearch.config import x\nfrom headsearch import __version__, errors"),
        ("core/a.py", "import torch_like, optunas  # other libraries with a similar name"),
        ("core/a.py", "x = 1\n" * MAX_LINES),
    ],
)
def test_a_right_tree_passes(tmp_path: Path, file: str, source: str) -> None:
    assert complaints(plant(tmp_path, file, source)) == []
