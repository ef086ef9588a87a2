"""``headsearch launch``: find or make the study, say what will be done, do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from headsearch.errors import InputError, UnknownStudyError
from headsearch.fields import guess
from headsearch.runtime.bundled import bundled, study_file
from headsearch.runtime.database import embedded_server, given_url
from headsearch.runtime.launching import kubernetes, local, slurm
from headsearch.runtime.launching.engines import Engine, Plan, Wanted
from headsearch.runtime.running import make_study
from headsearch.runtime.session import open_session
from headsearch.search import studies
from headsearch.spec import StudySpec
from headsearch.study_file import load_study

ENGINES: dict[str, Engine] = {"local": local, "slurm": slurm, "kubernetes": kubernetes}
_OF: dict[str, tuple[str, ...]] = {
    "cpus": ("slurm", "kubernetes"),
    "memory_gb": ("slurm", "kubernetes"),
    "gpus": ("slurm",),
    "minutes": ("slurm",),
    "partition": ("slurm",),
    "account": ("slurm",),
    "slurm": ("slurm",),
    "device": ("local", "slurm"),
    "image": ("kubernetes",),
    "namespace": ("kubernetes",),
    "overlay": ("kubernetes",),
    "claim": ("kubernetes",),
}
"""Engines that an option is for, where it is not for all."""


@dataclass(frozen=True)
class Source:
    """The study that workers are wanted for."""

    spec: StudySpec
    file: Path | None
    """The study file that it is made from, or None where it was found in the database."""


def launch(
    word: str,
    overrides: list[str],
    engine: str,
    wanted: Wanted,
    *,
    data_check: bool,
    dry_run: bool,
    say: Callable[[str], None],
) -> None:
    """Start workers of a study on an engine, or only say how.

    Args:
        word: A study in the database, a study file, or a bundled one by name.
        overrides: Of the study file.
        engine: A key of ENGINES.
        wanted: The workers.
        data_check: Look at the data before a study is made.
        dry_run: Make and start nothing.
        say: Gets what will be done and what was, a line each; in a dry run also the text that the engine
            would get, with the rest as its comments.

    Raises:
        InputError: Something asked for cannot be done; nothing was made or started.
        WorldError: The engine is not here or refuses, or the database does not answer.
    """
    if engine not in ENGINES:
        raise InputError(f"--on: {engine!r} is not known; local, slurm or kubernetes")
    _fits(engine, wanted)
    ENGINES[engine].check(wanted, dry_run=dry_run)
    source = _find(word, overrides, dry_run=dry_run)
    plan: Plan = ENGINES[engine].plan(source.spec, wanted, dry_run=dry_run)
    made = f"is made from {source.file}, or resumed if it is there" if source.file else "is in the database"
    lines = [f"{label:<11}{text}" for label, text in (("study", f"{source.spec.name}, {made}"), *plan.lines)]
    lines += [f"note: {note}" for note in plan.notes]
    if dry_run:
        mark = "# " if plan.document else ""
        for line in (*lines, "dry run: nothing was made or started"):
            say(f"{mark}{line}")
        if plan.document:
            say(plan.document)
        return
    for line in lines:
        say(line)
    with open_session() as session:
        if source.file is None:
            study = studies.get(session.database, source.spec.name)
        else:
            device = (wanted.device or "auto") if engine == "local" else None
            study, _, notes = make_study(session, source.spec, data_check=data_check, device=device)
            for note in notes:
                say(f"note: {note}")
        if study.ended:
            say(f"study {study.name} is {study.state}: nothing to train, no worker is started")
            return
        for line in plan.start(session):
            say(line)


def _fits(engine: str, wanted: Wanted) -> None:
    for one in fields(wanted):
        value: Any = getattr(wanted, one.name)
        engines = _OF.get(one.name, tuple(ENGINES))
        if value not in (None, ()) and engine not in engines:
            option = f"--{one.name.replace('_', '-')}"
            raise InputError(f"{option}: only with --on {' or '.join(engines)}, not {engine}")


def _find(word: str, overrides: list[str], *, dry_run: bool) -> Source:
    """A file given as one, then the database's study of this name, then the bundled file of this name."""
    is_file = word.endswith(".toml") or "/" in word or Path(word).is_file()
    if not is_file and not overrides and (spec := _stored(word, dry_run=dry_run)):
        return Source(spec, None)
    if not is_file and word not in bundled():
        raise UnknownStudyError(
            f"{word}: neither a study in the database nor a study file; bundled are "
            f"{guess(word, sorted(bundled()))}"
        )
    file = study_file(word)
    return Source(load_study(file, overrides), file)


def _stored(name: str, *, dry_run: bool) -> StudySpec | None:
    if dry_run and given_url() is None and not embedded_server().status().running:
        return None  # a dry run starts no server
    with open_session() as session:
        try:
            return studies.get(session.database, name).spec
        except UnknownStudyError:
            return None
