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


def _flip(path: Path, *places: int) -> None:
    """Change bytes, counted from the end: the file keeps its size and its header."""
    content = bytearray(path.read_bytes())
    for place in places:
        content[-place] ^= 1
    path.write_bytes(content)


def _roll(path: Path) -> None:
    array = np.load(path)
    path.write_bytes(path.read_bytes()[: -array.nbytes] + np.roll(array, 1, axis=0).tobytes())


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("train_labels.npy", _roll),
        ("test_labels.npy", _roll),
        ("train.npy", lambda path: _flip(path, 1)),
        ("test.npy", lambda path: _flip(path, 5000, 77)),
        ("train.npy", _roll),
    ],
)
def test_content_that_changed_unseen_is_made_again_with_a_line(
    folder: DataConfig, tmp_path: Path, file: str, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole by its size and its header: only the hash tells."""
    first = load_images(folder, home=tmp_path / "home")
    expected = [(split.images.clone(), split.labels.clone()) for split in (first.train, first.test)]
    harm(entries(tmp_path / "home")[0] / file)
    again = load_images(folder, home=tmp_path / "home")
    for split, (images, labels) in zip((again.train, again.test), expected, strict=True):
        assert torch.equal(split.images, images)
        assert torch.equal(split.labels, labels)
    assert [m for m in caplog.messages if "does not hold what was written there" in m] == caplog.messages
    assert len(caplog.messages) == 1
    assert again.fingerprint == first.fingerprint


def test_content_is_hashed_once_for_each_size_and_time(
    folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_images(folder, home=tmp_path / "home")
    hashed: list[int] = []
    rows = imagecache._Content.rows
    monkeypatch.setattr(
        imagecache._Content, "rows", lambda self, images: hashed.append(len(images)) or rows(self, images)
    )
    load_images(folder, home=tmp_path / "home")
    assert hashed == []
    os.utime(entries(tmp_path / "home")[0] / "train.npy")
    load_images(folder, home=tmp_path / "home")
    assert sum(hashed) == 40
    load_images(folder, home=tmp_path / "home")
    assert sum(hashed) == 40


def test_a_cache_that_may_only_be_read_is_checked_every_time(
    folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_images(folder, home=tmp_path / "home")
    (entries(tmp_path / "home")[0] / "checked.json").unlink()
    monkeypatch.setattr(Path, "write_text", _fail_with(errno.EROFS))
    assert load_images(folder, home=tmp_path / "home").fingerprint == first.fingerprint
    assert not (entries(tmp_path / "home")[0] / "checked.json").exists()


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
