"""Batches from the host are the batches from the device; a thread that gathers them ends with whoever asked."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from networks import CPU, assert_same_weights, finish, start, tiny_config, tiny_images, without_timings

from headsearch.core import autoencoder, epoch, feed, probe_ouyang2025
from headsearch.core.benchmark import noise
from headsearch.core.feed import AHEAD, batches, placed, streamed
from headsearch.core.images import Split
from headsearch.core.probe import evaluate


def split(count: int = 50) -> Split:
    images = torch.randint(
        256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Split(images, torch.arange(count))


def feeding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize("way", [batches, streamed])
@pytest.mark.parametrize(("rows", "size"), [(50, 8), (50, 50), (50, 64), (7, 1), (0, 4)])
def test_batches_are_the_rows_in_order(way, rows, size):
    data, order = split(), torch.randperm(50)[:rows]
    taken = list(way(data, order, size, CPU))
    assert [len(labels) for _, labels in taken] == [len(part) for part in order.split(size)]
    if rows:
        assert torch.equal(torch.cat([labels for _, labels in taken]), order)
        assert torch.equal(torch.cat([images for images, _ in taken]), data.images[order])
    assert not feeding()


def test_a_batch_that_is_kept_is_not_written_over():
    data, order = split(), torch.arange(50)
    kept = [images for images, _ in streamed(data, order, 5, CPU)]
    assert torch.equal(torch.cat(kept), data.images)


def test_a_stream_that_is_left_ends_its_thread():
    stream = streamed(split(), torch.arange(50), 5, CPU)
    next(stream)
    assert len(feeding()) == 1
    stream.close()
    assert not feeding()


def test_only_so_many_batches_are_gathered_ahead(monkeypatch):
    gathered, select = [], torch.index_select
    counted = SimpleNamespace(
        **{**vars(torch), "index_select": lambda *a, **k: (gathered.append(1), select(*a, **k))}
    )
    monkeypatch.setattr(feed, "torch", counted)
    stream = streamed(split(), torch.arange(50), 1, CPU)
    for taken in range(1, 11):
        next(stream)
        assert taken <= len(gathered) <= taken + AHEAD + 1
    stream.close()


def test_an_error_of_the_thread_is_heard_of():
    with pytest.raises(IndexError, match="out of range"):
        list(streamed(split(), torch.tensor([1, 2, 99]), 2, CPU))
    assert not feeding()


def test_images_that_do_not_fit_stay_on_the_host():
    images = noise(90, 8)
    taken = sum(part.images.nbytes for part in (images.train, images.validation, images.test))
    gpu = torch.device("meta")  # which is not the host, and is everywhere
    assert placed(images, gpu, free=2 * taken - 1).train.images.device == CPU
    there = placed(images, gpu, free=2 * taken)
    assert {part.images.device for part in (there.train, there.validation, there.test)} == {gpu}
    # There already, they take nothing.
    assert placed(there, gpu, free=0).train.images.device == gpu
    assert placed(images, gpu, free=0) is images
    assert placed(images, CPU).train.images is images.train.images


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_that_share_a_gpu_share_its_memory(workers):
    """They may start at the same moment: then each of them sees all of it free."""
    images = noise(90, 8)
    taken = sum(part.images.nbytes for part in (images.train, images.validation, images.test))
    gpu, enough = torch.device("meta"), 2 * workers * taken
    assert placed(images, gpu, free=enough, sharing=workers).train.images.device == gpu
    assert placed(images, gpu, free=enough - 1, sharing=workers).train.images.device == CPU


def test_streaming_takes_a_few_batches_of_memory_whatever_the_epoch(monkeypatch):
    made, empty = [], torch.empty
    counted = SimpleNamespace(
        **{**vars(torch), "empty": lambda *a, **k: (made.append(empty(*a, **k)), made[-1])[1]}
    )
    monkeypatch.setattr(feed, "torch", counted)
    data, size = split(), 5
    for epochs in (1, 20):
        made.clear()
        for _ in streamed(data, torch.arange(50).repeat(epochs), size, CPU):
            pass
        assert sum(buffer.nbytes for buffer in made) == (AHEAD + 1) * size * data.images[0].nbytes


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"head": {"kind": "autoencoder", "embedding_dim": 8, "projection_dim": 4}},
        {"protocol": "ouyang2025"},
    ],
    ids=["plain", "autoencoder", "offline probe"],
)
def test_a_training_from_the_host_is_the_same_to_the_bit(tmp_path, monkeypatch, parts):
    config, images = tiny_config(**parts), tiny_images()

    def run(home):
        reports, pretrained = finish(start(config, images, home))
        return without_timings(reports), pretrained, evaluate(pretrained, images, config, device=CPU)

    here = run(tmp_path / "here")
    for module in (epoch, autoencoder, probe_ouyang2025):
        monkeypatch.setattr(module, "batches", streamed)
    there = run(tmp_path / "there")
    assert there[0] == here[0]
    assert_same_weights(there[1], here[1])
    assert there[2] == here[2]
