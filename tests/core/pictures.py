"""Folders of images for tests, and files that PIL cannot write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from headsearch.config import DataConfig
from headsearch.core.images import ImageSet, load_images


def pixels(seed: int, side: int = 8) -> np.ndarray:
    """Noise (side, side, 3), uint8."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def fill(root: Path, counts: Mapping[str, int], *, side: int = 8, seed: int = 0) -> Path:
    """Put so many noise PNGs into each folder below `root`."""
    for place, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(pixels(1000 * (place + seed) + index, side)).save(root / folder / f"{index}.png")
    return root


def two_classes(root: Path, *, train: int = 10, test: int = 5) -> Path:
    """Cats and dogs."""
    return fill(root, {"train/cat": train, "train/dog": train, "test/cat": test, "test/dog": test})


def load(root: Path, **settings: object) -> ImageSet:
    """Load a folder into a home beside it."""
    config = DataConfig(name="folder", root=str(root), **{"validation_fraction": 0.2, **settings})
    return load_images(config, home=root.parent / "home")


def png16(path: Path, values: np.ndarray) -> None:
    """Write 16-bit values (H, W, C) as a PNG, which PIL cannot: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
