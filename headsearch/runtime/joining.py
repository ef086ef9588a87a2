"""What a machine needs to work on a study, looked at before it trains anything.

Machines share two things: the database, and the checkpoints, so that a trial goes on elsewhere when its
machine is gone. Nothing else need be shared: each has its own images, caches and logs, and whether the images
are the same is seen by their fingerprint.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from headsearch.core.images import load_images
from headsearch.errors import DataError, HeadsearchError, InputError, SpecError
from headsearch.home import checkpoint_folder
from headsearch.runtime import preflight
from headsearch.runtime.checkpoints import check_store, open_checkpoints
from headsearch.runtime.doctor import Finding
from headsearch.runtime.session import Session, open_session
from headsearch.search import connections, snapshot, steering
from headsearch.search.audit import audit
from headsearch.search.snapshot import Snapshot

SLOW_MILLISECONDS = 20.0
"""A claim is some sixty statements, while other claims of the study wait."""
FEW_CONNECTIONS = 10


def examine_joining(name: str) -> Iterator[Finding]:
    """Look at everything that a worker on study `name` needs; a look that fails is itself a finding."""
    try:
        with open_session() as session:
            seen = snapshot.read(session.database, name)
            looks: tuple[Callable[[Session, Snapshot], Iterator[Finding]], ...] = (
                _database,
                _connections,
                _study,
                _checkpoints,
                _images,
            )
            for look in looks:
                try:
                    yield from look(session, seen)
                except HeadsearchError as error:
                    yield Finding(look.__name__.strip("_"), "broken", str(error))
    except InputError as error:
        yield Finding("study", "broken", str(error))
    except HeadsearchError as error:
        yield Finding("database", "broken", str(error), "start it, or mend HEADSEARCH_DATABASE_URL")


def _database(session: Session, _: Snapshot) -> Iterator[Finding]:
    milliseconds = 1000 * connections.answer_seconds(session.database)
    answer = f"{session.address.redacted} answers in {milliseconds:.1f} ms"
    if session.address.embedded:
        yield Finding(
            "shared",
            "note",
            f"{answer}; it is this machine's own, and no other reaches it",
            "for workers elsewhere: a PostgreSQL that all reach, named by HEADSEARCH_DATABASE_URL",
        )
    elif milliseconds > SLOW_MILLISECONDS:
        yield Finding("shared", "note", answer, "each claim takes dozens: move closer to it")
    else:
        yield Finding("shared", "ok", answer)


def _connections(session: Session, _: Snapshot) -> Iterator[Finding]:
    free, most = connections.free_connections(session.database)
    line = f"{free} of {most} connections are free; a worker holds one, and a second while it claims"
    if free < FEW_CONNECTIONS:
        yield Finding("connections", "note", line, "raise max_connections, or put a pooler in between")
    else:
        yield Finding("connections", "ok", line)


def _study(_: Session, seen: Snapshot) -> Iterator[Finding]:
    steering.check_version(seen.study)
    study = seen.study
    counts = ", ".join(f"{count} {state}" for state, count in sorted(seen.counts.items())) or "none begun"
    line = f"{study.name} is {study.state}: {study.spec.trials} trials, {counts}"
    if study.ended:
        yield Finding("study", "note", line, "there is nothing to train")
    elif study.state == "paused":
        yield Finding("study", "note", line, f"workers wait until headsearch study resume {study.name}")
    else:
        yield Finding("study", "ok", line)


def _checkpoints(session: Session, seen: Snapshot) -> Iterator[Finding]:
    """That a store works, and that the checkpoints of paused trials are seen from here."""
    study, store = seen.study, seen.study.spec.worker.checkpoint_store
    where = store or str(checkpoint_folder(session.home, study.folder, 0).parent)
    if store:
        try:
            check_store(store)
        except InputError as error:
            yield Finding("checkpoints", "broken", str(error), _remedy(store))
            return
    hidden = []
    paused = audit(session.database, study).paused
    for trial in paused:
        state = open_checkpoints(
            session.home, study.folder, trial.number, store, generation=trial.attempt
        ).peek()
        if state is None or state["epoch"] < trial.epoch:
            hidden.append(trial)
    if hidden:  # workers may have gone on with them meanwhile
        still = set(audit(session.database, study).paused)
        hidden = [trial for trial in hidden if trial in still]
    if hidden:
        numbers = ", ".join(str(trial.number) for trial in hidden[:10])
        yield Finding(
            "checkpoints",
            "broken",
            f"{where} here is not where others save: trial{'s' if len(hidden) > 1 else ''} {numbers} "
            f"{'are' if len(hidden) > 1 else 'is'} paused, and no checkpoint is seen from here",
            _remedy(store),
        )
        return
    others = sorted({worker.host for worker in seen.workers} - {socket.gethostname()})
    known = f"those of {len(paused)} paused trials are seen from here" if paused else "no trial is paused yet"
    if store is None and others:
        yield Finding(
            "checkpoints",
            "note",
            f"{where}, in this machine's home folder, and workers are also on {', '.join(others)}; {known}",
            "if that folder is not shared, what a lost machine trained is trained again: give a new study "
            'worker.checkpoint_store = "s3://..." or "file:///shared/folder"',
        )
    else:
        yield Finding("checkpoints", "ok", f"{where}; {known}")


def _remedy(store: str | None) -> str:
    if store is None:
        return "share the home folder, or give a new study worker.checkpoint_store"
    if store.startswith("file:"):
        return "mount the folder that the other machines save to, under the same path"
    return "set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY as on the other machines"


def _images(session: Session, seen: Snapshot) -> Iterator[Finding]:
    """That they are here, and the same as where trials were completed."""
    here: dict[str, str] = {}
    for data, batch in preflight.data_sets(seen.study.spec).items():
        name = data.root or data.name
        try:
            preflight.check_data(data, batch, session.home)
            here[load_images(data, home=session.home).fingerprint] = name
        except (DataError, SpecError) as error:
            relative = data.root is not None and not Path(data.root).is_absolute()
            remedy = "copy them to this machine" + (
                ", and let HEADSEARCH_DATA name the folder that they are in" if relative else ""
            )
            yield Finding("images", "broken", str(error), remedy)
            return
    facts = (trial.facts.get("data_fingerprint") for trial in seen.trials)
    elsewhere = {str(fingerprint) for fingerprint in facts if fingerprint is not None}
    if strange := elsewhere - set(here):
        yield Finding(
            "images",
            "broken",
            f"those of {', '.join(here.values())} here are not those that trials were completed on "
            f"(fingerprint {min(strange)[:12]}, here {', '.join(one[:12] for one in here)})",
            "copy them from a machine that has trained; re-encoded or resized images are others",
        )
        return
    same = "the same that trials were completed on" if elsewhere else "no trial is complete to compare with"
    shown = ", ".join(f"{name} (fingerprint {fingerprint[:12]})" for fingerprint, name in here.items())
    yield Finding("images", "ok", f"{shown}: {same}")
