"""Which pixel values are black and white in files wider than 8 bits, and whether decoded pixels look right.

A 16-bit or float file does not say what its values mean: 8, 12 and 16 bits come in the same type, floats
in 0..1 and in 0..255. The range is therefore taken from all such files of a data set together. 8-bit files
need none of this.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Kind = Literal["integers", "floats"]
Range = tuple[float, float]
"""Values that become 0 and 255."""
RangesByKind = Mapping[Kind, Range]
Values = NDArray[np.float64]

BITS: Final = (1, 8, 10, 12, 14, 16)
"""Widths that cameras and formats have."""
LOOKED_AT: Final = 2048
"""Training images whose pixels are counted: the first in stratified order."""
FEW_LEVELS: Final = 16
NARROW: Final = 64
SATURATED: Final = 0.5
BLACK: Final = 0.9
_SWAPPED: Final = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""PIL's other byte order of a raw mode, which unpacks the lower byte of each value."""
_GREY_ALPHA: Final = "LA;16B"
"""PIL's raw mode of grey and alpha with 16 bits each, of which it makes RGBA."""


@dataclass
class Extent:
    """The smallest and the largest value of so many files."""

    lowest: float
    highest: float
    files: int = 1


@dataclass
class Extents:
    """What the wide files of a data set hold, by kind; threads may add at the same time."""

    found: dict[Kind, Extent] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: Kind, values: Values) -> None:
        """Take in the finite values of one file."""
        finite = values[np.isfinite(values)]
        if not finite.size:
            return
        low, high = float(finite.min()), float(finite.max())
        with self._lock:
            known = self.found.setdefault(kind, Extent(low, high, 0))
            known.lowest, known.highest = min(known.lowest, low), max(known.highest, high)
            known.files += 1

    def ranges(self) -> dict[Kind, Range]:
        """The range of each kind."""
        return {kind: full_range(kind, of.lowest, of.highest) for kind, of in self.found.items()}

    def lines(self) -> list[str]:
        """What was found and how it is read, a line for each kind."""
        said = {"integers": "integers wider than 8 bits", "floats": "floats"}
        lines = []
        for kind, of in self.found.items():
            low, high = full_range(kind, of.lowest, of.highest)
            lines.append(
                f"value range: {of.files} files of {said[kind]} hold {of.lowest:g} to {of.highest:g}; "
                f"{low:g} is read as black, {high:g} as white"
            )
        return lines


def full_range(kind: Kind, lowest: float, highest: float) -> Range:
    """The range that values from `lowest` to `highest` were most likely written in.

    Floats up to 1 lie in 0..1. All others that are not negative have the narrowest of `BITS` that holds them;
    floats have at least 8. What fits nothing (negative values, more than 16 bits) is stretched from its own
    lowest to its own highest value.
    """
    if kind == "floats" and lowest >= -1 and highest <= 1:
        return (0.0, 1.0) if lowest >= 0 else (-1.0, 1.0)
    if lowest >= 0:
        for bits in BITS:
            if highest < 2**bits and not (kind == "floats" and bits == 1):
                return 0.0, float(2**bits - 1)
    low = min(lowest, 0.0)
    return low, highest if highest > low else low + 1


def wide_kind(image: Image.Image) -> Kind | None:
    """Whether an opened file has more than 8 bits a channel; None for those with 8."""
    if image.mode == "F":
        return "floats"
    if image.mode.startswith("I") or _deep_rawmode(image):
        return "integers"
    return None


def wide_values(image: Image.Image, path: Path | None) -> tuple[Values, NDArray[np.uint8] | None]:
    """Values (H, W) or (H, W, 3) of a wide image, and its 8-bit alpha (H, W) where it has one.

    PIL keeps only the upper byte of 16-bit colour, and of 16-bit grey with alpha: `path` is opened again for
    the lower one.
    """
    rawmode = _deep_rawmode(image)
    if rawmode is None or path is None:
        return np.asarray(image).astype(np.float64), None
    if rawmode == _GREY_ALPHA:
        # The four bytes of a pixel: upper and lower of grey, then of alpha.
        four = _read_as("RGBA", path)
        return four[..., 0].astype(np.float64) * 256 + four[..., 1], four[..., 2]
    lower = _read_as(rawmode[:-1] + _SWAPPED[rawmode[-1]], path)
    upper = np.asarray(image)
    values = upper[..., :3].astype(np.float64) * 256 + lower[..., :3]
    return values, upper[..., 3] if upper.shape[2] == 4 else None


def _read_as(rawmode: str, path: Path) -> NDArray[np.uint8]:
    """Decode a file of one tile with another raw mode of PIL than its own."""
    with Image.open(path) as image:
        tile = image.tile[0]
        arguments = (rawmode, *tile[3][1:]) if isinstance(tile[3], tuple) else rawmode
        image.tile = [(tile[0], tile[1], tile[2], arguments)]  # type: ignore[list-item]
        return np.asarray(image)


def to_eight_bits(values: Values, of: Range) -> NDArray[np.uint8]:
    """Scale to 0..255, clipped and rounded; what is no number becomes black."""
    low, high = of
    with np.errstate(invalid="ignore", over="ignore"):
        unit = np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0.0, 1.0)
    return np.rint(unit * 255).astype(np.uint8)


def doubts(images: NDArray[np.uint8]) -> list[str]:
    """What makes decoded images (N, 3, S, S) look wrongly scaled, a line for each."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, min(len(images), LOOKED_AT), 64):
        chunk = np.asarray(images[start : min(start + 64, LOOKED_AT)])
        counts += np.bincount(chunk.ravel(), minlength=256)
    total = int(counts.sum())
    if not total:
        return []
    below = np.cumsum(counts) / total
    low, high = (int(np.searchsorted(below, share)) for share in (0.001, 0.999))
    levels, lines = int(np.count_nonzero(counts)), []
    if levels < FEW_LEVELS:
        lines.append(f"pixels use {levels} of 256 levels")
    elif high - low < NARROW:
        lines.append(f"nearly all pixels lie between {low} and {high} of 0 to 255")
    white, black = counts[255] / total, counts[0] / total
    if white > SATURATED:
        lines.append(f"{white:.0%} of the pixels are saturated (255)")
    if black > BLACK:
        lines.append(f"{black:.0%} of the pixels are black (0)")
    return [f"value range: {line}; is that how these images should look?" for line in lines]


def _deep_rawmode(image: Image.Image) -> str | None:
    """PIL's raw mode of a file with 16 bits a channel whose lower byte it drops, but can be read."""
    tiles = getattr(image, "tile", None)
    if image.mode not in ("RGB", "RGBA") or not tiles or len(tiles) != 1:
        return None
    arguments = tiles[0][3]
    rawmode = arguments if isinstance(arguments, str) else (arguments or ("",))[0]
    known = [f"{mode};16{order}" for mode in ("RGB", "RGBA") for order in _SWAPPED] + [_GREY_ALPHA]
    return rawmode if rawmode in known else None
