"""What two workers on two cores make together, beside one worker with both and two trainings without a database.

    python tests/runtime/two_workers.py --root cifar10 [--limit 10000] [--epochs 4] [--repeats 5] [--json]

Starts an embedded PostgreSQL in a temporary folder. In each repeat take turns: two `headsearch worker` of one study
with one thread each, one worker with two threads, and two `headsearch train` with one thread each, which know nothing
of each other or of a database. Each tells the views per second of its epochs; the first, in which the others may still
be starting, is not counted, and the medians of the rest are added up.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from adoption_time import session

from headsearch.runtime.session import Session
from headsearch.search import studies
from headsearch.study_file import load_study

STUDY = """
name = "{name}"
mode = "grid"
budget.epochs = {epochs}
base.data = {{ name = "folder", root = "{root}", limit = {limit} }}
base.training.batch_size = 256
space."head.kind" = ["mlp"]
space."head.projection_dim" = [64, 128]
"""
SPEED = re.compile(r"epoch (\d+)\b.*?([\d,]+) views/s")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with session() as opened, TemporaryDirectory() as folder:
        runs = [once(opened, Path(folder), number, options) for number in range(options.repeats)]
    ratios = [run["two workers"] / max(run["one worker"], run["two trainings"]) for run in runs]
    if options.json:
        print(json.dumps({"runs": runs, "ratios": ratios}, indent=2))
        return
    for name in runs[0]:
        told = sorted(run[name] for run in runs)
        print(f"{name:<16}{statistics.median(told):8,.0f} views/s  ({told[0]:,.0f}-{told[-1]:,.0f})")
    print(f"two workers / the better of the others, by round: {statistics.median(ratios):.1%}", end="  ")
    print(f"({min(ratios):.1%}-{max(ratios):.1%})")


def once(opened: Session, folder: Path, number: int, options: argparse.Namespace) -> dict[str, float]:
    """Views per second of each way, all its processes together."""
    names = [f"{kind}-{number}" for kind in ("two", "one", "plain")]
    root = options.root.resolve()
    for name in names:
        file = folder / f"{name}.toml"
        file.write_text(STUDY.format(name=name, root=root, limit=options.limit, epochs=options.epochs))
        studies.create(opened.database, load_study(file))
    return {
        "two workers": together([["worker", "--study", names[0], "--threads", "1", "--count", "1"]] * 2),
        "one worker": together([["worker", "--study", names[1], "--threads", "2", "--count", "1"]]),
        "two trainings": together([["train", str(file), "--threads", "1"]] * 2),
    }


def together(commands: list[list[str]]) -> float:
    """Run them at once; the sum of their speeds."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "headsearch", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in commands
    ]
    said = [process.communicate()[0] for process in running]
    total = 0.0
    for process, text in zip(running, said, strict=True):
        if process.returncode:
            sys.exit(f"{process.args} ended with {process.returncode}:\n{text}")
        told = [float(speed.replace(",", "")) for epoch, speed in SPEED.findall(text) if int(epoch) > 1]
        total += statistics.median(told)
    return total


if __name__ == "__main__":
    main()
