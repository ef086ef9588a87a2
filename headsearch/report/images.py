"""The images of a study, as they are said beside its tables."""

from __future__ import annotations

from collections.abc import Sequence

from headsearch.search.imagesets import KnownImages, counts_text
from headsearch.search.snapshot import Snapshot

MOST_NUMBERS = 12


def image_lines(images: Sequence[KnownImages]) -> list[str]:
    """Counts of each set of images; sets of equal counts, such as several sizes of the same, share a line."""
    return list(dict.fromkeys(counts_text(one.counts) for one in images if one.counts))


def image_captions(snapshot: Snapshot) -> list[str]:
    """How many images there are for what, and which trials were trained on others."""
    lines = image_lines(snapshot.images)
    sizes = next((t.facts for t in snapshot.complete if "validation_images" in t.facts), None)
    if sizes and (not lines or snapshot.study.spec.protocol == "schliebitz2024"):
        # This protocol's probe has splits of its own.
        lines.append(
            f"{sizes['train_images']:,} training, {sizes['validation_images']:,} validation, "
            f"{sizes['test_images']:,} test images"
        )
    if strange := [one.number for one in snapshot.strangers]:
        shown = ", ".join(map(str, strange[:MOST_NUMBERS]))
        more = f" and {len(strange) - MOST_NUMBERS} more" if len(strange) > MOST_NUMBERS else ""
        lines.append(
            f"not the same images: trial{'s' if len(strange) > 1 else ''} {shown}{more} had other images "
            "than the study's; their accuracies do not compare"
        )
    return lines
