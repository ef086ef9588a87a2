"""The cache of decoded images: hits, processes that ask at once, killed writers, damage, full disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headsearch.config import DataConfig
from headsearch.core import decoding, imagecache
from headsearch.core.images import load_images
from headsearch.errors import DataError, StorageError


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            where = tmp_path / "data" / split / name
            where.mkdir(parents=True)
            for index in range(10):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{index}.png")
    return DataConfig(name="folder", root=str(tmp_path / "data"))


def entries(home: Path) -> list[Path]:
    return sorted(path for path in (home / "cache" / "images").iterdir() if path.suffix != ".lock")


def test_a_hit_reads_no_image(folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_images(folder, home=tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(decoding, "decode_file", fail)
    monkeypatch.setattr(Image, "open", fail)
    again = load_images(folder, home=tmp_path)
    limited = load_images(folder.model_copy(update={"limit": 4, "validation_fraction": 0.3}), home=tmp_path)
    assert torch.equal(first.train.images, again.train.images)
    assert first.fingerprint == again.fingerprint
    assert len(limited.train) == 4
    assert len(entries(tmp_path)) == 1


def test_images_are_mapped_and_writing_to_them_leaves_the_cache_alone(
    folder: DataConfig, tmp_path: Path
) -> None:
    images = load_images(folder, home=tmp_path)
    maps = Path("/proc/self/maps").read_text()
    assert str(entries(tmp_path)[0] / "train.npy") in maps
    before = images.train.images.clone()
    images.train.images.zero_()
    assert torch.equal(load_images(folder, home=tmp_path).train.images, before)


FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
"""Children only read arrays and files, so that other threads' locks cannot hold them up."""


def _load_and_count(config: DataConfig, home: Path, start: Any, out: Any) -> None:
    read = imagecache._write

    def counted(part: Path, reader: Any) -> None:
        out.put("decoded")
        time.sleep(0.3)  # long enough for the others to arrive
        read(part, reader)

    imagecache._write = counted
    start.wait()
    out.put(load_images(config, home=home).fingerprint)


@FORKS
def test_four_processes_at_once_decode_once(folder: DataConfig, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, out = context.Event(), context.Queue()
    workers = [
        context.Process(target=_load_and_count, args=(folder, tmp_path / "home", start, out))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    start.set()
    messages = [out.get(timeout=60) for _ in range(5)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert messages.count("decoded") == 1
    assert len(set(messages)) == 2
    assert len(entries(tmp_path / "home")) == 1


def _die_while_writing(config: DataConfig, home: Path) -> None:
    imagecache._sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    load_images(config, home=home)


@FORKS
def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(folder: DataConfig, tmp_path: Path) -> None:
    home = tmp_path / "home"
    worker = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(folder, home))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert [path.suffix for path in entries(home)] == [".part"]
    whole = load_images(folder, home=tmp_path / "other")
    assert load_images(folder, home=home).fingerprint == whole.fingerprint
    assert [path.suffix for path in entries(home)] == [""]


@pytest.mark.parametrize("file", ["train.npy", "test_labels.npy", "facts.json"])
def test_a_damaged_entry_is_made_again(folder: DataConfig, tmp_path: Path, file: str) -> None:
    first = load_images(folder, home=tmp_path / "home")
    damaged = entries(tmp_path / "home")[0] / file
    expected = first.train.images.clone()
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[: len(content) // 2])
    again = load_images(folder, home=tmp_path / "home")
    assert torch.equal(again.train.images, expected)


def test_a_failed_read_leaves_no_entry(folder: DataConfig, tmp_path: Path) -> None:
    for file in (tmp_path / "data" / "train" / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"data.max_unreadable_fraction: 10 of 40"):
        load_images(folder, home=tmp_path / "home")
    assert entries(tmp_path / "home") == []


def test_a_cache_that_cannot_be_written_is_named(folder: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageError, match=r"cache.*cannot be written"):
        load_images(folder, home=tmp_path)


def test_a_changed_file_is_decoded_again(folder: DataConfig, tmp_path: Path) -> None:
    first = load_images(folder, home=tmp_path)
    file = tmp_path / "data" / "train" / "cat" / "0.png"
    shutil.copyfile(tmp_path / "data" / "train" / "cat" / "1.png", file)
    assert load_images(folder, home=tmp_path).fingerprint != first.fingerprint


def _fail_with(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_is_an_error_and_leaves_no_entry(
    folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _fail_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left on device"):
        load_images(folder, home=tmp_path)
    assert entries(tmp_path) == []


def test_a_failing_disk_is_not_taken_for_damaged_images(
    folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_file", _fail_with(errno.EIO))
        with pytest.raises(StorageError, match=r"/train/cat/0.png: cannot be read \(Input/output error\)"):
            load_images(folder.model_copy(update={"image_size": 16}), home=tmp_path)
    assert load_images(folder, home=tmp_path).skipped == ()
