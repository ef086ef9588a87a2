"""Reads the kustomize overlays that come with headsearch, with no kustomize at hand.

Of kustomize's format this is what they use: ``resources`` that are files or folders, and ``patches`` that are
JSON patches (RFC 6902) with a ``target.kind``. Anything else is refused, so that what kubectl would make of
an overlay and what we make of it cannot differ in silence; a test compares the two.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headsearch.errors import InputError, WorldError

Document = dict[str, Any]
Operations = list[dict[str, Any]]

_PACKAGE = Path(__file__).parents[2]
# In a wheel the manifests are inside the package, in a checkout beside it.
FOLDERS = (_PACKAGE / "kubernetes", _PACKAGE.parent / "docker" / "kubernetes")
_KEYS = {"apiVersion", "kind", "resources", "patches"}


def folder() -> Path:
    """Where base and overlays are.

    Raises:
        WorldError: They are not installed.
    """
    for found in FOLDERS:
        if (found / "base").is_dir():
            return found
    raise WorldError(f"the Kubernetes manifests are missing from {FOLDERS[0]}: install headsearch again")


def overlays() -> list[str]:
    """Names of the overlays."""
    return sorted(path.name for path in (folder() / "overlays").iterdir() if path.is_dir())


def read_overlay(name: str) -> list[Document]:
    """Read all documents of an overlay, patched.

    Raises:
        InputError: There is no such overlay.
    """
    if name not in overlays():
        raise InputError(f"--overlay: {name!r} is not known; {', '.join(overlays())}")
    return read(folder() / "overlays" / name)


def read(place: Path) -> list[Document]:
    """Read a folder with a ``kustomization.yaml``, or a file of documents."""
    import yaml

    if place.is_file():
        return [document for document in yaml.safe_load_all(place.read_text("utf-8")) if document]
    settings = yaml.safe_load((place / "kustomization.yaml").read_text("utf-8"))
    if unknown := set(settings) - _KEYS:
        raise InputError(f"{place}/kustomization.yaml: {', '.join(sorted(unknown))} cannot be read here")
    documents = [one for resource in settings["resources"] for one in read((place / resource).resolve())]
    for entry in settings.get("patches", ()):
        if set(entry) != {"path", "target"} or set(entry["target"]) != {"kind"}:
            raise InputError(f"{place}/kustomization.yaml: a patch has a path and a target.kind, no more")
        operations = yaml.safe_load((place / entry["path"]).read_text("utf-8"))
        documents = patched(documents, {entry["target"]["kind"]: operations})
    return documents


def patched(documents: Sequence[Document], patches: Mapping[str, Operations]) -> list[Document]:
    """Copies of `documents` with the JSON patch for their kind applied."""
    import jsonpatch

    copies = copy.deepcopy(list(documents))
    return [
        jsonpatch.apply_patch(one, patches[one["kind"]]) if one["kind"] in patches else one for one in copies
    ]


def text(documents: Sequence[Document]) -> str:
    """All documents as YAML."""
    import yaml

    return str(yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True))
