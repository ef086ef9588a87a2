"""Workers as pods of a Kubernetes Job, from the manifests in ``docker/kubernetes``, by ``kubectl apply``."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import shutil
import subprocess
from typing import Any

from headsearch.errors import InputError, WorldError
from headsearch.runtime.database import URL_VARIABLE, given_url
from headsearch.runtime.launcher import STOP_SECONDS
from headsearch.runtime.launching import kustomize
from headsearch.runtime.launching.engines import Plan, Wanted
from headsearch.runtime.launching.kustomize import Operations
from headsearch.runtime.session import Session
from headsearch.spec import StudySpec

OVERLAY = "cpu"
DEATHS = 3
"""For each worker, beyond which the Job gives up."""
SPOT_SECONDS = 25
"""What Google leaves a pod of a machine that it takes away; Azure 30, Amazon 120."""
_IMAGE = re.compile(r"[a-z0-9][\w./:@-]*")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_POD = "/spec/template/spec"
_WORKER = f"{_POD}/containers/0"


def check(wanted: Wanted, *, dry_run: bool) -> None:
    """Refuse names that Kubernetes does not take, and a database that only this host has."""
    if wanted.workers is None:
        raise InputError("--workers: needed with --on kubernetes: the number of pods")
    _check_names(wanted)
    if importlib.util.find_spec("jsonpatch") is None:
        raise WorldError("--on kubernetes needs jsonpatch: pip install 'headsearch[kubernetes]'")
    kustomize.read_overlay(wanted.overlay or OVERLAY)
    if not dry_run:
        if shutil.which("kubectl") is None:
            raise WorldError("--on kubernetes: there is no kubectl here; --dry-run prints the manifests")
        if given_url() is None:
            raise InputError(
                f"{URL_VARIABLE}: must name the PostgreSQL that the pods use, as it is reached from here, "
                "such as through kubectl port-forward; the embedded server answers on this host only"
            )


def plan(spec: StudySpec, wanted: Wanted, *, dry_run: bool) -> Plan:
    """Plan a Job of as many pods as workers, a budget for their disruption, and a network policy."""
    overlay = wanted.overlay or OVERLAY
    documents = kustomize.patched(kustomize.read_overlay(overlay), patches(spec, wanted))
    job = next(document for document in documents if document["kind"] == "Job")
    worker = job["spec"]["template"]["spec"]["containers"][0]
    content = kustomize.text(documents)
    chosen = ["--namespace", wanted.namespace] if wanted.namespace else []
    name = job_name(spec.name)

    def start(_: Session) -> list[str]:
        said = _kubectl("apply", *chosen, "--filename", "-", stdin=content)
        where = f" {' '.join(chosen)}" if chosen else ""
        return [
            *said.splitlines(),
            f"see them: kubectl{where} get pods --selector batch.kubernetes.io/job-name={name}",
            f"stop them: kubectl{where} delete job,pdb,networkpolicy {name}",
        ]

    checkpoints = "in a folder of each pod" if wanted.claim is None else f"in the claim {wanted.claim}"
    return Plan(
        (
            ("workers", f"{wanted.workers} pods of Job {name}, overlay {overlay}, image {worker['image']}"),
            ("command", " ".join([*worker["command"], *worker["args"]])),
            ("cluster", f"{_context(dry_run=dry_run)}, namespace {wanted.namespace or 'of the context'}"),
            ("database", "the URL in secret headsearch-database, key url, mounted as a file"),
            ("files", f"checkpoints {spec.worker.checkpoint_store or checkpoints}; S3 keys in headsearch-s3"),
        ),
        start,
        document=content,
        notes=_notes(spec, wanted, overlay),
    )


def job_name(study: str) -> str:
    """Of the study's Job, as Kubernetes takes names; with a hash where the study's own had to be changed."""
    plain = re.sub(r"[^a-z0-9-]", "-", study).strip("-")
    name = f"headsearch-{plain}"
    if plain == study and len(name) <= 52:  # what a Job may have, for its pods' names to fit
        return name
    return f"{name[:43].rstrip('-')}-{hashlib.sha256(study.encode()).hexdigest()[:8]}"


def patches(spec: StudySpec, wanted: Wanted) -> dict[str, Operations]:
    """The JSON patch of each kind that makes an overlay's manifests those of this study."""
    name, workers = job_name(spec.name), wanted.workers or 1
    own: Operations = [
        _set("/metadata/name", name),
        _set("/metadata/labels/app.kubernetes.io~1instance", name),
        _add("/metadata/annotations", {"headsearch/study": spec.name}),
    ]
    if wanted.namespace:
        own.append(_add("/metadata/namespace", wanted.namespace))
    label = "matchLabels/app.kubernetes.io~1instance"
    return {
        "Job": [*own, *_job(spec, wanted, name, workers)],
        "PodDisruptionBudget": [
            *own,
            _set("/spec/minAvailable", workers - 1),
            _set(f"/spec/selector/{label}", name),
        ],
        "NetworkPolicy": [*own, _set(f"/spec/podSelector/{label}", name)],
    }


def _job(spec: StudySpec, wanted: Wanted, name: str, workers: int) -> Operations:
    threads = str(wanted.threads or wanted.cpus or 2)
    found = [
        _set("/spec/parallelism", workers),
        _set("/spec/backoffLimit", DEATHS * workers),
        _set("/spec/template/metadata/labels/app.kubernetes.io~1instance", name),
        _set(f"{_POD}/terminationGracePeriodSeconds", grace_seconds(spec)),
        _set(f"{_WORKER}/args/2", spec.name),
        _set(f"{_WORKER}/args/6", threads),
        _set(f"{_WORKER}/env/5/value", threads),
    ]
    if wanted.image:
        found.append(_set(f"{_WORKER}/image", wanted.image))
    if wanted.cpus:
        found.append(_set(f"{_WORKER}/resources/requests/cpu", str(wanted.cpus)))
    if wanted.memory_gb:
        memory = f"{math.ceil(1024 * wanted.memory_gb)}Mi"
        found += [_set(f"{_WORKER}/resources/{part}/memory", memory) for part in ("requests", "limits")]
    if wanted.claim:
        claim = {"name": "home", "persistentVolumeClaim": {"claimName": wanted.claim}}
        found.append(_set(f"{_POD}/volumes/0", claim))
    return found


def grace_seconds(spec: StudySpec) -> int:
    """How long Kubernetes waits for a worker that it has asked to stop."""
    return math.ceil(spec.worker.drain_seconds + STOP_SECONDS)


def _check_names(wanted: Wanted) -> None:
    for option, value, form, like in (
        ("--image", wanted.image, _IMAGE, "registry.lab/headsearch:0.1.0"),
        ("--namespace", wanted.namespace, _LABEL, "vision-lab"),
        ("--claim", wanted.claim, _LABEL, "headsearch-home"),
    ):
        if value is not None and not form.fullmatch(value):
            raise InputError(f"{option}: {value!r} is not a name like {like}")


def _set(path: str, value: Any) -> dict[str, Any]:
    return {"op": "replace", "path": path, "value": value}


def _add(path: str, value: Any) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def _notes(spec: StudySpec, wanted: Wanted, overlay: str) -> tuple[str, ...]:
    notes = []
    if wanted.claim is None and spec.worker.checkpoint_store is None:
        notes.append(
            "checkpoints end with their pod, and a trial whose pod is lost is trained again from epoch 1: "
            "set worker.checkpoint_store = 's3://bucket/prefix' in the study, or --claim a volume that all "
            "pods share"
        )
    if overlay == "spot" and spec.worker.drain_seconds + 10 > SPOT_SECONDS:
        notes.append(
            f"a spot machine may leave {SPOT_SECONDS} s, less than worker.drain_seconds = "
            f"{spec.worker.drain_seconds:g} and 10 s to save: a study made with --set worker.drain_seconds="
            f"{SPOT_SECONDS - 10} gives its trials back in time"
        )
    return tuple(notes)


def _context(*, dry_run: bool) -> str:
    if dry_run:
        return "of kubectl's context"
    return _kubectl("config", "current-context").strip()


def _kubectl(*words: str, stdin: str | None = None) -> str:
    done = subprocess.run(["kubectl", *words], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit {done.returncode}"
        hint = "; delete the Job of the earlier launch first" if "immutable" in said else ""
        raise WorldError(f"kubectl {words[0]} fails: {said}{hint}")
    return done.stdout
