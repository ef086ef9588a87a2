"""The README's section on GPUs, made of what first_light measured, so that text and figures cannot drift apart.

    python tests/benchmarks/gpu_section.py results/results.jsonl [--commit COMMIT]   # a new gpu.json, and the README
    python tests/benchmarks/gpu_section.py                                           # the README of the gpu.json there is

gpu.json, beside this file, has date, card, commit and figures of one run, and is empty while there was none.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, latest, read_rows

HERE = Path(__file__).parent
RESULTS, README = HERE / "gpu.json", HERE.parents[1] / "README.md"
BEGIN = "<!-- made by tests/benchmarks/gpu_section.py from gpu.json: do not edit -->"
END = "<!-- end of what gpu_section.py made -->"
WIDTH = 120
NEAR = 0.9
"""Share of the bare encoder's speed below which a training is named."""
SCRIPT = "`tests/benchmarks/first_light.py`"
NOTHING = (
    f"**Nothing here has been run on a GPU yet.** {SCRIPT} is written for the first one that is there: in eight minutes "
    "it runs the tests that need a GPU, measures what is measured above, and trains a published recipe for 100 epochs; "
    "its figures will stand here. CI runs it on a CPU, at toy sizes."
)
Figures = dict[str, Any]


def summary(rows: list[Row], *, commit: str | None = None) -> Figures:
    """What is kept of a run: plain JSON with what the section says, and no more."""
    named = {row.name: row for row in latest(rows)}

    def values(name: str) -> Figures:
        row = named.get(name)
        return dict(row.values) if row and row.status == "ok" else {}

    def those(prefix: str) -> list[Row]:
        return [row for name, row in named.items() if name.startswith(prefix)]

    versions, device = values("machine: versions"), values("machine: device")
    tests = [row for row in those("tests: ") if row.name != "tests: all"]
    wrong = [row for row in named.values() if row.status != "ok" and not row.name.startswith("tests: ")]
    # A step that failed for its parts is said by them.
    parts = {row.step for row in named.values() if row.status == "failed" and ": " in row.name}
    wrong = [row for row in wrong if ": " in row.name or row.status != "failed" or row.step not in parts]
    return {
        "date": versions.get("date"),
        "commit": commit or versions.get("commit"),
        "card": device.get("card"),
        "on_gpu": "capability" in device,
        **{name: versions.get(name) for name in ("torch", "cuda", "cudnn")},
        "driver": device.get("driver_version"),
        "views": values("machine: views").get("made_by"),
        "lease": values("machine: GPU lease"),
        "tests": {
            "passed": sum(row.status == "ok" for row in tests),
            "failed": [
                {"name": row.name.removeprefix("tests: "), "reason": row.reason}
                for row in tests
                if row.status == "failed"
            ],
        },
        "bench": [
            {"name": row.name.removeprefix("bench: "), **row.values}
            for row in those("bench: ")
            if row.status == "ok"
        ],
        "together": [dict(row.values) for row in those("together: ")],
        "study": values("study: trials"),
        "lightly": [{"name": row.name.removeprefix("lightly: "), **row.values} for row in those("lightly: ")],
        "published": values("published: training") | values("published: accuracy"),
        "missing": [{"name": row.name, "status": row.status, "reason": row.reason} for row in wrong],
    }


def section(found: Figures) -> str:
    """The section's text, without the comments around it."""
    if not found:
        return wrapped(NOTHING)
    about = (
        f"On one {found['card']} (driver {found['driver']}, CUDA {found['cuda']}, cuDNN {found['cudnn']}, torch "
        f"{found['torch']}), {found['date']}, commit {found['commit']}, by {SCRIPT}. Views are made by {found['views']}."
    )
    parts = [
        about,
        tests(found),
        *bench(found),
        *together(found),
        *study(found),
        *lightly(found),
        *published(found),
        *missing(found),
    ]
    return "\n\n".join(wrapped(part) for part in parts if part)


def wrapped(text: str) -> str:
    """A paragraph in lines as long as the README's; a table as it is."""
    if text.startswith("|"):
        return text
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def tests(found: Figures) -> str:
    """The tests and the lease."""
    passed, failed = found["tests"]["passed"], found["tests"]["failed"]
    text = f"`pytest -m gpu`: {passed} passed, {len(failed)} failed"
    text += (": " + "; ".join(f"{one['name']} ({one['reason']})" for one in failed) if failed else "") + "."
    if lease := found["lease"]:
        text += f" A GPU whose worker was killed was another's {lease['handed_on_seconds']:.2f} s later."
    return text


def bench(found: Figures) -> list[str]:
    """Trainings beside the bare encoder, and those that fall short."""
    if not found["bench"]:
        return []
    columns = (
        "training",
        "views/s",
        "encoder alone",
        "share",
        "views",
        "head and loss",
        "optimizer",
        "report",
        "checkpoint",
        "peak memory",
    )
    rows = [
        (
            one["name"], f"{one['views_per_second']:,.0f}", f"{one['bare_encoder']:,.0f}", f"{one['share']:.1%}",
            *(f"{one['of_step'][stage]:.1%}" for stage in ("views", "head and loss", "optimizer")),
            *(f"{one['of_epoch'][stage]:.1%}" for stage in ("report", "checkpoint")), f"{one['peak_gib']:.2f} GiB" if one["peak_gib"] else "-",
        )
        for one in found["bench"]
    ]  # fmt: skip
    short = [f"{one['name']} ({one['share']:.0%})" for one in found["bench"] if one["share"] < NEAR]
    said = (
        f"Below {NEAR:.0%} of the bare encoder's speed: {'; '.join(short)}."
        if short
        else f"All are at {NEAR:.0%} of the bare encoder's speed or above."
    )
    trials = [
        f"{one['name']} {one['trial_share']:.0%}, of which report and checkpoint cost {one['trial_rest_share']:.1%}"
        for one in found["bench"]
        if "trial_share" in one
    ]
    if trials:
        said += f" A whole epoch of a trial, report and checkpoint in it, is at: {'; '.join(trials)}."
    said += " Report and checkpoint are shares of an epoch of 45,000 images when they are waited for."
    return [table(columns, rows), said]


def together(found: Figures) -> list[str]:
    """Several trainings on one GPU."""
    if not found["together"]:
        return []
    told = ", ".join(
        f"{one['slots']}: {one['views_per_second']:,.0f} ({one['gain']:.2f} x)" for one in found["together"]
    )
    return [f"Small encoders together on the GPU, as many as `HEADSEARCH_GPU_SLOTS`, views/s of all: {told}."]


def study(found: Figures) -> list[str]:
    """The study."""
    if not (one := found["study"]):
        return []
    verdict = "clean" if one["verify_clean"] else "not clean"
    text = (
        f"A study of {one['trials']} short trials, two workers on the GPU, PostgreSQL: {one['complete']} complete, "
        f"{one['pruned']} pruned, {one['failed']} failed, `study verify` {verdict}; {one['trials_per_hour']:,.0f} "
        f"trials an hour, {one['trials_per_hour_with_start']:,.0f} with the workers' start."
    )
    return [text]


def lightly(found: Figures) -> list[str]:
    """Beside lightly."""
    lines = []
    for one in found["lightly"]:
        speeds, over = one["views_per_second"], one["ours_over"]
        told = ", ".join(
            f"{name} {speed:,.0f} views/s ({over[name]:.2f} x)"
            if "lightly" in name
            else f"{name} {speed:,.0f} views/s"
            for name, speed in speeds.items()
        )
        lines.append(f"Beside lightly ({one['loader_processes']} loader processes), {one['name']}: {told}.")
    return lines


def published(found: Figures) -> list[str]:
    """The published number."""
    one = found["published"]
    if "linear" not in one:
        return []
    row = ("this run", one["linear"], one["knn"], one["training_minutes"], one["views_per_second"])
    theirs = (
        "published",
        *(one[f"published_{name}"] for name in ("linear", "knn", "minutes", "views_per_second")),
    )
    rows = [
        (name, f"{linear:.1%}", f"{knn:.1%}", f"{minutes:.1f} min", f"{speed:,.0f}")
        for name, linear, knn, minutes, speed in (row, theirs)
    ]
    text = (
        f"SimCLR as in dkobak/simclr-cifar10 ({one['encoder']}, {one['epochs']} epochs, batch {one['batch']}, "
        f"{one['precision']}; recipe `dkobak-cifar10`), on a JPEG re-encoding of CIFAR-10, {one['train_images']:,} of the "
        "50,000 training images, one seed; published on an A100, over three seeds (± 0.2). What else differs is in "
        "`tests/benchmarks/README.md`."
    )
    return [text, table(("", "linear readout", "cosine kNN, k = 10", "training", "views/s"), rows)]


def missing(found: Figures) -> list[str]:
    """What there is no figure for."""
    told = [
        f"{one['name']} ({one['status']}{': ' + one['reason'] if one['reason'] else ''})"
        for one in found["missing"]
    ]
    return ["Without a figure: " + "; ".join(told) + "."] if told else []


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def marked(found: Figures) -> str:
    """The section between its comments, as the README has it."""
    return f"{BEGIN}\n\n{section(found)}\n\n{END}"


def rewritten(readme: str, found: Figures) -> str:
    """`readme` with this section. ValueError if it has no place for it."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("README.md lacks the two comments between which the section stands")
    return before + marked(found) + after


def main(arguments: list[str] | None = None) -> int:
    """Write gpu.json where results are given, and the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", help="results.jsonl of first_light")
    parser.add_argument("--commit", help="what was measured, where the results do not say")
    options = parser.parse_args(arguments)
    if options.results:
        rows = read_rows(options.results)
        if not rows:
            parser.error(f"{options.results} has no results")
        found = summary(rows, commit=options.commit)
        if not found["on_gpu"]:
            parser.error(f"{options.results} is not of a GPU")
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(rewritten(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
