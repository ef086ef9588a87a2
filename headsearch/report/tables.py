"""A table of text, whoever draws it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ± [\d.]+)?( ?[%s])?(/\d+)?")
LONGEST_CELL = 32


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells; `more` rows were left out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more: int = 0

    @property
    def right_aligned(self) -> tuple[bool, ...]:
        """For each column, whether all its cells are numbers."""
        return tuple(
            any(row[index] for row in self.rows)
            and all(not row[index] or _NUMBER.fullmatch(row[index]) for row in self.rows)
            for index in range(len(self.columns))
        )

    def lines(self) -> list[str]:
        """As aligned plain text, the column names first."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        right = self.right_aligned

        def line(cells: Sequence[str]) -> str:
            padded = (
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(cells, widths, right, strict=True)
            )
            return "  ".join(padded).rstrip()

        tail = [f"... and {self.more} more"] if self.more else []
        return [line(self.columns), *(line(row) for row in self.rows), *tail]

    def markdown(self) -> str:
        """As a Markdown table."""
        marks = ["---:" if right else "---" for right in self.right_aligned]
        rows = (self.columns, marks, *self.rows)
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def value(number: object) -> str:
    """A parameter or fact as a cell: short, and empty where there is none."""
    if number is None:
        return ""
    if isinstance(number, bool):
        return "true" if number else "false"
    if isinstance(number, float):
        return f"{number:.4g}"
    text = str(number)
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def accuracy(share: float | None) -> str:
    """An accuracy in [0, 1] as a cell."""
    return "" if share is None else f"{share:.4f}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
