"""Ten classes of drawn images as a folder of JPEG files, for runs without CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, TEST, SIDE = 12, 4, 32
"""Images of each class, and their side in pixels."""


def draw_images(folder: Path) -> Path:
    """Write train/<class>/* and test/<class>/* below `folder`: noise, each class with a grey level of its own."""
    noise = np.random.default_rng(0)
    for label in range(10):
        for split, count in (("train", TRAIN), ("test", TEST)):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 100, (SIDE, SIDE, 3), dtype=np.uint8) + np.uint8(15 * label)
                Image.fromarray(pixels).save(place / f"{index}.jpg")
    return folder
