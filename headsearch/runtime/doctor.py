"""What this machine has for headsearch, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headsearch import __version__
from headsearch.cores import usable_cores
from headsearch.errors import HeadsearchError
from headsearch.home import home_folder
from headsearch.runtime.database import check, given_address
from headsearch.runtime.gpulocks import (
    SLOTS_VARIABLE,
    SYSTEM_FOLDER,
    gpu_slots,
    hidden_from_others,
    holders,
    locks_folder,
)
from headsearch.runtime.gpus import VISIBLE, listing, visible_here
from headsearch.runtime.launcher import default_workers
from headsearch.runtime.placement import INSTALL

GIB = 1 << 30
LITTLE_DISK = 5 * GIB


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only `broken` keeps headsearch from working."""

    name: str
    state: Literal["ok", "note", "broken"]
    text: str
    remedy: str | None = None


def examine() -> list[Finding]:
    """Look at everything; a look that fails is itself a finding."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _devices,
        _gpus,
        _home,
        _database,
        _data,
        _pictures,
    )
    findings: list[Finding] = []
    for look in looks:
        name = look.__name__.strip("_")
        try:
            findings += look()
        except HeadsearchError as error:
            findings.append(Finding(name, "broken", str(error)))
        except Exception as error:  # noqa: BLE001  a broken installation raises anything
            line = (str(error).strip().splitlines() or [""])[0]
            findings.append(
                Finding(name, "broken", f"{type(error).__name__}: {line}", "install headsearch again")
            )
    return findings


def _versions() -> Iterator[Finding]:
    yield Finding("headsearch", "ok", f"{__version__}, Python {platform.python_version()} ({sys.executable})")
    names = ("optuna", "optuna-dashboard", "sqlalchemy", "psycopg2-binary", "pydantic", "plotly")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    yield Finding("packages", "ok", ", ".join(found))


def _devices() -> Iterator[Finding]:
    from headsearch.core.hardware import hardware  # loads torch

    found = hardware()
    built = f"CUDA {found.cuda}" if found.cuda else "CPU only"
    yield Finding("torch", "ok", f"{found.torch} ({built}), torchvision {found.torchvision}")
    for device in found.devices:
        memory = f", {device.memory_bytes / GIB:.0f} GiB" if device.memory_bytes else ""
        auto: str = device.precision
        if auto == "fp32":
            faster = "bf16 may be faster: headsearch bench --precision bf16"
            auto += f" ({faster if device.native_bf16 else 'no native bf16'})"
        yield Finding(device.name, "ok", f"{device.model}{memory}; precision auto = {auto}")
    cores = usable_cores()
    yield Finding(
        "threads",
        "ok",
        f"{min(found.threads, cores)} torch threads, {cores} cores; "
        f"headsearch run starts {default_workers()} workers",
    )
    if len(found.devices) > 1:
        return
    if visible := visible_here(listing().gpus):
        text = f"nvidia-smi lists {len(visible)} GPUs that torch {found.torch} cannot use"
        yield Finding("cuda", "note", text, INSTALL)
    else:
        yield Finding("cuda", "note", "no GPU: training runs on the CPU", "use small-resnet and small images")


def _gpus() -> Iterator[Finding]:
    found, slots, folder = listing(), gpu_slots(), locks_folder()
    if found.problem:
        yield Finding("gpus", "note", found.problem, "repair the driver, or use --device cpu")
    if not found.gpus:
        return
    for index, gpu in enumerate(visible := visible_here(found.gpus)):
        text = "; ".join(
            f"{f'slot {slot} ' if slots > 1 else ''}{f'held by {who} since {who.since}' if who else 'free'}"
            for slot, who in enumerate(holders(gpu, slots, folder))
        )
        yield Finding(f"cuda:{index}", "ok", f"{gpu}: {text}")
    if not visible:
        text = f"{VISIBLE}={os.environ.get(VISIBLE)!r} leaves none of {len(found.gpus)} GPUs"
        yield Finding("gpus", "note", text, f"unset {VISIBLE}, or name GPUs that nvidia-smi -L lists")
    text = f"leases in {folder}, {slots} for each GPU ({SLOTS_VARIABLE})"
    if hidden_from_others(folder):
        yield Finding(
            "gpu locks", "note", f"{text}; other users do not see them", f"chmod 1777 {SYSTEM_FOLDER}"
        )
    else:
        yield Finding("gpu locks", "ok", text)


def _home() -> Iterator[Finding]:
    home = home_folder()
    free = shutil.disk_usage(home).free
    text = f"{home}, {free / GIB:.1f} GiB free"
    if free < LITTLE_DISK:
        yield Finding("home", "note", text, "set HEADSEARCH_HOME to a folder on a larger disk")
    else:
        yield Finding("home", "ok", text)


def _database() -> Iterator[Finding]:
    given = given_address()
    if given:
        check(given.full_url)
        yield Finding("database", "ok", f"{given.redacted} answers")
        return
    from headsearch.runtime.pgbinaries import find_folder  # needs a POSIX system
    from headsearch.runtime.postgres import EmbeddedServer

    folder = find_folder()
    status = EmbeddedServer(home_folder() / "postgres").status()
    state = f"running on port {status.port}" if status.ready else "starts by itself when needed"
    yield Finding("database", "ok", f"embedded PostgreSQL ({folder}), {state}; data in {status.data_dir}")


def _data() -> Iterator[Finding]:
    home = home_folder()
    facts = sorted((home / "cache" / "images").glob("*/facts.json"))
    images = sum(int(json.loads(path.read_text())["total"]) for path in facts)
    kept = sorted(path.name for path in (home / "data").glob("*") if path.is_dir()) if home.exists() else []
    fetched = f"; downloaded: {', '.join(kept)}" if kept else ""
    yield Finding("data", "ok", f"{len(facts)} decoded data sets in the cache, {images:,} images{fetched}")
    root = os.environ.get("HEADSEARCH_DATA")
    if root and not Path(root).is_dir():
        yield Finding(
            "data", "note", f"HEADSEARCH_DATA={root} is not a folder", "point it to your data, or unset it"
        )


def _pictures() -> Iterator[Finding]:
    yield Finding("figures", "ok", ".html always")
    browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, browsers)), None)
    missing = [
        what
        for what, there in (("kaleido", importlib.util.find_spec("kaleido")), ("Chrome or Chromium", browser))
        if not there
    ]
    if missing:
        text = f".png and .svg need {' and '.join(missing)}"
        yield Finding("figures", "note", text, "pip install kaleido, and a browser; or use .html")
