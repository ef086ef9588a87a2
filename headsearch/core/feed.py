"""Batches of images on the device: from there, or streamed to it where they are more than it can hold."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from headsearch.core.images import ImageSet, Split
from headsearch.core.photos import Images, Photos

SHARE: Final = 0.5
"""Of a GPU's free memory that the images of all its workers may take; the rest is for their trainings."""
AHEAD: Final = 2
"""Batches gathered before they are asked for."""


def placed(images: ImageSet, device: torch.device, free: int | None = None, *, sharing: int = 1) -> ImageSet:
    """Put an image set where trainings on `device` read it: there, if it fits its part of the free memory.

    That is `SHARE`, divided by the workers that share the GPU, `sharing`: they may start at the same moment,
    and see the same memory free. `free` is in bytes, by default what a GPU says of itself. A CPU maps the
    cache's files into its memory, whatever their size.
    """
    if device.type == "cuda" and free is None:
        free = torch.cuda.mem_get_info(device)[0]
    splits = (*images.before_test, images.test)
    taken = sum(split.images.nbytes for split in splits if split.images.device.type != device.type)
    return images if free is not None and taken > SHARE / sharing * free else images.to(device)


def batches(split: Split, order: Tensor, size: int, device: torch.device) -> Iterator[tuple[Images, Tensor]]:
    """Images, uint8 (B, 3, S, S), and labels (B,) of the rows in `order`, on `device`, `size` rows at a time.

    Or photos. The last batch has what is left. Images that are elsewhere are streamed; batches are the same.
    """
    if split.images.device.type != device.type:
        if isinstance(split.images, Photos):
            yield from streamed_photos(split.images, split.labels, order, size, device)
        else:
            yield from streamed(split, order, size, device)
        return
    for rows in order.to(device).split(size):
        yield split.images.index_select(0, rows), split.labels.index_select(0, rows)


@dataclass
class Gathered:
    """One batch on the host, in a buffer that is used again once `copied` has happened on the device."""

    images: Tensor
    copied: torch.cuda.Event | None = None


def streamed_photos(
    photos: Photos, labels: Tensor, order: Tensor, size: int, device: torch.device
) -> Iterator[tuple[Photos, Tensor]]:
    """Do what `batches` does, for photos on the host: a thread gathers the next batch meanwhile."""
    parts = order.to(photos.device).split(size)
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        waiting = [pool.submit(photos[rows].to, device) for rows in parts[:AHEAD]]
        for number, rows in enumerate(parts):
            here = waiting.pop(0).result()
            if number + AHEAD < len(parts):
                waiting.append(pool.submit(photos[parts[number + AHEAD]].to, device))
            yield here, labels[rows].to(device)


def streamed(split: Split, order: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Do what `batches` does, for images on the host.

    A thread gathers rows, from the cache's memory-mapped file as it is, into pinned buffers that are used in
    turn; a stream of its own copies them to the GPU while the step before is computed. An error of the
    thread is raised here. Abandoned, it ends its thread.
    """
    cuda = device.type == "cuda"
    host, labels, rows_here = split.images, split.labels.to(device), order.to(device)
    assert isinstance(host, Tensor)  # noqa: S101
    order = order.to(host.device)
    shape = (min(size, len(order)), *host.shape[1:])
    free: queue.Queue[Gathered | None] = queue.Queue()
    ready: queue.Queue[Gathered | BaseException] = queue.Queue()
    buffers = [torch.empty(shape, dtype=host.dtype, pin_memory=cuda) for _ in range(AHEAD + 1)]
    for buffer in buffers:
        free.put(Gathered(buffer))

    def gather() -> None:
        try:
            for rows in order.split(size):
                spare = free.get()
                if spare is None:
                    return
                if spare.copied is not None:
                    spare.copied.synchronize()
                images = spare.images[: len(rows)]
                torch.index_select(host, 0, rows, out=images)
                ready.put(Gathered(images))
        except BaseException as error:  # noqa: BLE001 - raised where the batch is waited for
            ready.put(error)

    side = torch.cuda.Stream(device) if cuda else None
    thread = threading.Thread(target=gather, name="feed", daemon=True)
    thread.start()
    try:
        for number, rows in enumerate(rows_here.split(size)):
            here = ready.get()
            if isinstance(here, BaseException):
                raise here
            whole = buffers[number % len(buffers)]  # buffers come and go in one order
            if side is None:
                images = here.images.to(device, copy=True)
                free.put(Gathered(whole))
            else:
                with torch.cuda.stream(side):
                    images = here.images.to(device, non_blocking=True)
                    copied = torch.cuda.Event()
                    copied.record(side)
                torch.cuda.current_stream(device).wait_stream(side)
                images.record_stream(torch.cuda.current_stream(device))
                free.put(Gathered(whole, copied))
            yield images, labels.index_select(0, rows)
    finally:
        free.put(None)
        thread.join()
