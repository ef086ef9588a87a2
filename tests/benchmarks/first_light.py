"""First light on a GPU: proves the CUDA paths, measures them, and reproduces one published number.

    python tests/benchmarks/first_light.py --data cifar10 --out results
    python tests/benchmarks/first_light.py --smoke --out results     # the same code on a CPU, at toy sizes
    python tests/benchmarks/first_light.py --only 7 --data cifar10 --out results --epochs 100

Each result is a line of results.jsonl in the output folder as soon as it is there, and the table results.md is
written anew, so a run that is cut leaves what it had. Each step has a time limit: one that overruns is stopped, with
all that it started, and its row says so. The exit code is 1 where something failed. `tests/benchmarks/gpu_section.py`
makes the README's section of it.

What each step takes on one H100 (16 cores), by what was measured in November 2026:

    1  machine    doctor, a lease, 60,000 JPEG images decoded                    20 s
    2  tests      pytest -m gpu: some 180 tests, views compiled for the CPU      85 s
    3  bench      16 trainings of 4 s, two whole trials; compiled ones as fit    90 s
    4  together   eight processes start, three rounds of 1, 2, 4, 8             25 s
    5  study      two workers start, 24 trials of one to three epochs           40 s
    6  lightly    two encoders, four systems, two rounds of half a second       55 s
    7  published  100 epochs x 99,328 views at 55,000 views/s, readout         210 s
                                                                       in all  525 s
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import drawn
import stopping
from rows import Row, Rows, latest
from setting import ROOT, Clock, LeftOut, Setting

DATA = "HEADSEARCH_TEST_CIFAR10"
SMOKE_EPOCHS, EPOCHS = 2, 100
SMOKE_LIMIT = 200.0
"""Seconds for any step of a smoke run, which takes a few, but for what else the machine does."""
ROOM = 4 << 30
"""Bytes that must be free in memory for the run's home folder to be there."""
PRELOADED = (
    "torch", "pytest", "headsearch.core.benchmark", "headsearch.core.viewkernel", "headsearch.runtime.worker",
    "headsearch.runtime.doctor",
)  # fmt: skip
"""Imported once, before the steps are forked: seconds for each of them."""
DIED = "the step's process ended with code"


@dataclass(frozen=True)
class Step:
    """A step: the function `run` of a module, and how many seconds it may take."""

    name: str
    module: str
    limit: float
    run: str = "run"


STEPS = (
    Step("machine", "step_machine", 45),
    Step("tests", "step_tests", 120),
    Step("bench", "step_bench", 105),
    Step("together", "step_bench", 45, run="run_together"),
    Step("study", "step_study", 75),
    Step("lightly", "step_lightly", 70),
    Step("published", "step_published", 330),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 1 where something failed."""
    options = parsed(arguments)
    rows = Rows(options.out)
    prepare_environment(smoke=options.smoke)
    stopping.adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the ends of all blocks
    with tempfile.TemporaryDirectory(
        prefix="headsearch-first-light-", dir=memory(), ignore_cleanup_errors=True
    ) as home:
        Path(home).chmod(0o755)  # PostgreSQL runs as another user where this one is root
        setting = made_setting(options, Path(home))
        os.environ["HEADSEARCH_HOME"] = home
        os.environ["HEADSEARCH_GPU_LOCKS"] = str(setting.home / "gpus")
        preload()
        end = time.monotonic() + options.total
        missing = ""
        for number, step in enumerate(STEPS, 1):
            if options.only and number not in options.only:
                continue
            limit = min(
                options.limit.get(number, SMOKE_LIMIT if setting.smoke else step.limit),
                end - time.monotonic(),
            )
            if missing or limit <= 0:
                rows.add(Row(number, step.name, status="left out", reason=missing or "no time is left"))
                continue
            run_step(number, step, setting, rows, limit)
            print(markdown_line(rows, number, step), flush=True)
            if step.name == "machine" and rows.read()[-1].status != "ok" and setting.on_gpu:
                missing = missing_device(rows)
    print(f"{rows.table}:", rows.table.read_text(), sep="\n\n")
    return int(any(row.status in ("failed", "overran") for row in latest(rows.read())))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="toy sizes, on the CPU unless --device says otherwise"
    )
    parser.add_argument(
        "--data", type=Path, help=f"CIFAR-10 as train/<class>/*, test/<class>/* (default: ${DATA})"
    )
    parser.add_argument("--device", help="cuda by default, cpu in a smoke run")
    parser.add_argument("--epochs", type=int, help="of the published training (100)")
    parser.add_argument("--only", type=numbers, default=(), metavar="1,2,...", help="these steps")
    parser.add_argument("--limit", type=limit, action="append", default=[], metavar="STEP=SECONDS")
    parser.add_argument("--total", type=float, default=float("inf"), metavar="SECONDS", help="for all steps")
    parser.add_argument("--commit", help="what is measured, where the checkout does not say")
    options = parser.parse_args(arguments)
    options.out, options.limit = options.out.resolve(), dict(options.limit)
    return options


def numbers(text: str) -> tuple[int, ...]:
    """Numbers of steps."""
    found = tuple(int(word) for word in text.split(","))
    if not all(1 <= number <= len(STEPS) for number in found):
        raise argparse.ArgumentTypeError(f"steps are 1 to {len(STEPS)}")
    return found


def limit(text: str) -> tuple[int, float]:
    """A step's number and its limit."""
    number, _, seconds = text.partition("=")
    return numbers(number)[0], float(seconds)


def made_setting(options: argparse.Namespace, home: Path) -> Setting:
    """What the steps are given. A smoke run draws its images; CIFAR-10's 60,000 take longer than all of it."""
    named = os.environ.get(DATA, "")
    data = options.data or (Path(named) if named and not options.smoke else None)
    if data is None and options.smoke:
        data = drawn.draw_images(home / "drawn")
    return Setting(
        out=options.out,
        home=home,
        device=options.device or ("cpu" if options.smoke else "cuda"),
        smoke=options.smoke,
        data=data.resolve() if data else None,
        epochs=options.epochs or (SMOKE_EPOCHS if options.smoke else EPOCHS),
        commit=options.commit,
    )


def prepare_environment(*, smoke: bool) -> None:
    """What processes of the steps inherit: this checkout on their path, and nobody's database."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    os.environ |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    sys.path.insert(0, str(ROOT))
    for name in ("URL", "URL_FILE", "PASSWORD_FILE"):
        os.environ.pop(f"HEADSEARCH_DATABASE_{name}", None)
    if smoke:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"  # CI's cores have other work


def memory() -> str | None:
    """A folder in memory, if it has room."""
    folder = Path("/dev/shm")
    usable = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > ROOM
    return str(folder) if usable else None


def preload() -> None:
    """Import what the steps need. What cannot be imported is for them to say."""
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001
            traceback.print_exc()


def run_step(number: int, step: Step, setting: Setting, rows: Rows, seconds: float) -> None:
    """Run one step in a process of its own, and see that it has a last row."""
    log = setting.out / f"{number}-{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = len(rows.read())
    ending = stopping.run_limited(lambda: in_child(number, step, setting, rows, seconds), seconds, log)
    if any(row.name == step.name for row in rows.read()[before:]):
        return
    row = Row(number, step.name, seconds=ending.seconds)
    if ending.exit_code is None:
        rows.add(replace(row, status="overran", reason=f"stopped after {ending.seconds:.0f} s"))
    else:
        said = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        rows.add(replace(row, status="failed", reason=f"{DIED} {ending.exit_code}: {said[:300]}"))


def in_child(number: int, step: Step, setting: Setting, rows: Rows, seconds: float) -> int:
    """The step, in its own process; its exit code."""
    began = last = time.monotonic()
    wrong: list[str] = []

    def say(name: str, values: Mapping[str, Any], *, failed: str = "", left_out: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        status = "failed" if failed else "left out" if left_out else "ok"
        rows.add(Row(number, name, dict(values), now - last, status, failed or left_out))
        wrong.extend([name] if failed else [])
        last = now

    row = Row(number, step.name)
    try:
        getattr(importlib.import_module(step.module), step.run)(setting, say, Clock(seconds))
    except LeftOut as missing:
        row = replace(row, status="left out", reason=str(missing))
    except Exception as error:  # noqa: BLE001 - its row says so, and the next step begins
        traceback.print_exc()
        line = (str(error).strip().splitlines() or [""])[0]
        row = replace(row, status="failed", reason=f"{type(error).__name__}: {line[:400]}")
    else:
        if wrong:
            row = replace(row, status="failed", reason=f"{len(wrong)} of its parts: {', '.join(wrong)[:300]}")
    rows.add(replace(row, seconds=time.monotonic() - began))
    return int(row.status == "failed")


def missing_device(rows: Rows) -> str:
    """Why no later step can run, where the first one found no device."""
    reason = rows.read()[-1].reason
    return reason if reason.startswith("no CUDA device") else ""


def markdown_line(rows: Rows, number: int, step: Step) -> str:
    """How a step ended, in a line."""
    row = rows.read()[-1]
    return (
        f"{number} {step.name}: {row.status}, {row.seconds:.1f} s{f' ({row.reason})' if row.reason else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
