"""What a run of first_light leaves: one JSON line for each result, and a Markdown table of them.

A line has `step` (its number), `name`, `values` (plain JSON), `seconds`, `status` and `reason`. The last line of a
step bears the step's own name; those before it are its parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Status = Literal["ok", "failed", "overran", "left out"]
COLUMNS = ("step", "what", "result", "seconds", "status")


@dataclass(frozen=True)
class Row:
    """One result; `reason` says why there is none, or what is wrong with it."""

    step: int
    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    status: Status = "ok"
    reason: str = ""


class Rows:
    """The rows of one output folder. Each is on the disk when `add` returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines, self.table = folder / "results.jsonl", folder / "results.md"

    def add(self, row: Row) -> None:
        """Append `row`, and write the table anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.write_table()

    def read(self) -> list[Row]:
        """All rows, in the order in which they came. A line that a kill cut off is left out."""
        return read_rows(self.lines)

    def write_table(self) -> None:
        """The table of the latest row of each name."""
        new = self.table.with_name(".results.md")
        new.write_text("\n".join(markdown(latest(self.read()))) + "\n", encoding="utf-8")
        new.replace(self.table)


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.jsonl; none where there is no such file."""
    found: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def latest(rows: list[Row]) -> list[Row]:
    """Of rows with the same step and name only the last one, which another run of the step may have added."""
    by_name = {(row.step, row.name): row for row in rows}
    return sorted(by_name.values(), key=lambda row: row.step)


def markdown(rows: list[Row]) -> list[str]:
    """A table with one line for each row."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| ---: | --- | --- | ---: | --- |"]
    for row in rows:
        assert row.status in get_args(Status)
        said = ", ".join(f"{name} {shown(value)}" for name, value in row.values.items())
        status = row.status + (f": {row.reason}" if row.reason else "")
        cells = (str(row.step), row.name, said, f"{row.seconds:.1f}", status)
        lines.append("| " + " | ".join(plain(cell) for cell in cells) + " |")
    return lines


def plain(text: str) -> str:
    """`text` as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def shown(value: Any) -> str:
    """A value for people: thousands with commas, four digits of what is smaller."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {shown(one)}" for name, one in value.items()) + ")"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(shown(one) for one in value) + ")"
    return str(value)
