from __future__ import annotations

import errno
import hashlib
import io
import logging
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from headsearch.core import checkpoint
from headsearch.core.checkpoint import DIGEST_BYTES, MAGIC, CheckpointFolder, decode, encode
from headsearch.errors import StorageError, TrialFailure


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "study" / "7")


def files(folder: CheckpointFolder) -> list[Path]:
    return sorted(folder.path.iterdir())


def state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "weights": torch.full((50,), float(epoch)), "reports": [{"loss": 0.1}]}


def test_nothing_saved_is_nothing_loaded(folder: CheckpointFolder) -> None:
    assert folder.load() is None


def test_newest_state_comes_back_and_two_are_kept(folder: CheckpointFolder) -> None:
    for epoch in range(1, 5):
        folder.save(state(epoch))
    loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 4
    assert torch.equal(loaded["weights"], torch.full((50,), 4.0))
    assert loaded["reports"] == [{"loss": 0.1}]
    assert len(files(folder)) == 2


def damage_first_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def flip_middle_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 128
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [damage_first_byte, flip_last_byte, flip_middle_byte, truncate, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_falls_back_to_the_one_before(
    folder: CheckpointFolder, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder.save(state(1))
    folder.save(state(2))
    damage(files(folder)[-1])
    with caplog.at_level(logging.WARNING):
        loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 1
    assert files(folder)[-1].name in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_both_damaged_is_nothing(folder: CheckpointFolder, damage: Any) -> None:
    folder.save(state(1))
    folder.save(state(2))
    for path in files(folder):
        damage(path)
    assert folder.load() is None


def test_saving_goes_on_after_damage(folder: CheckpointFolder) -> None:
    folder.save(state(1))
    folder.save(state(2))
    truncate(files(folder)[-1])
    folder.save(state(3))
    loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 3


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("trap",)


def test_code_in_a_file_is_not_run(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.save(state(1))
    content = pickle.dumps(Trap(), protocol=2)
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
    (folder.path / "000002.checkpoint").write_bytes(MAGIC + digest + content)
    loaded = folder.load()
    assert not (tmp_path / "trap").exists()
    assert loaded is not None
    assert loaded["epoch"] == 1


def test_half_written_file_is_ignored_and_swept(folder: CheckpointFolder) -> None:
    folder.save(state(1))
    (folder.path / ".0-abc.partial").write_bytes(MAGIC)
    loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 1
    assert len(files(folder)) == 1


def save_for_ever(path: Path) -> None:
    folder = CheckpointFolder(path)
    for epoch in range(1, 1_000_000):
        folder.save({"epoch": epoch, "weights": torch.full((20_000,), float(epoch))})


def test_a_kill_at_any_moment_leaves_a_whole_state(folder: CheckpointFolder) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=save_for_ever, args=(folder.path,))
    writer.start()
    while len(list(folder.path.glob("*.checkpoint"))) < 2:
        time.sleep(0.01)
    time.sleep(random.random() / 20)
    assert writer.pid
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    loaded = folder.load()
    assert loaded is not None
    assert torch.equal(loaded["weights"], torch.full((20_000,), float(loaded["epoch"])))


def test_what_is_set_aside_is_kept_and_can_be_taken_back(folder: CheckpointFolder) -> None:
    folder.save(state(3))
    where = folder.set_aside("abcdef0123456789")
    assert Path(where).name == "7-other-abcdef012345"
    assert folder.load() is None
    folder.save(state(1))
    folder.set_aside("another")
    assert folder.take_back("nobody's") is None
    back = folder.take_back("abcdef0123456789")
    assert back is not None
    assert back["epoch"] == 3
    assert folder.load()["epoch"] == 3
    folder.save(state(4))
    assert folder.load()["epoch"] == 4
    # Twice the same identity: neither is lost.
    folder.set_aside("another")
    assert len([path for path in folder.path.parent.iterdir() if "other-another" in path.name]) == 2


def test_a_checkpoint_that_cannot_be_set_aside_is_an_error(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    folder.save(state(1))
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError, match=r"cannot be set aside \(Permission denied\)"):
        folder.set_aside("x")
    with pytest.raises(StorageError, match=r"cannot be taken back \(Permission denied\)"):
        folder.take_back("x")
    assert folder.load()["epoch"] == 1


def test_removed_folder_is_gone_and_removing_twice_is_fine(folder: CheckpointFolder) -> None:
    folder.save(state(1))
    folder.remove()
    folder.remove()
    assert not folder.path.exists()
    assert folder.load() is None


def test_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        CheckpointFolder(tmp_path / "file" / "inside").save(state(1))


def test_failed_write_leaves_the_last_state_and_no_rubbish(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(state(1))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        folder.save(state(2))
    monkeypatch.undo()
    assert len(files(folder)) == 1
    loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 1


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_twenty_random_damages_never_give_another_state(
    folder: CheckpointFolder, how: str, both: bool, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(f"{how} {both}")
    for _ in range(20):
        folder.remove()
        folder.save(state(1))
        folder.save(state(2))
        for path in files(folder)[0 if both else 1 :]:
            content = bytearray(path.read_bytes())
            if how == "truncated":
                content = content[: draw.randrange(len(content))]
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
        caplog.clear()
        loaded = folder.load()
        if both:
            assert loaded is None
            assert "none is left, starting anew" in caplog.text
        else:
            assert loaded is not None
            assert loaded["epoch"] == 1
            assert torch.equal(loaded["weights"], state(1)["weights"])
            assert "falling back to 000001.checkpoint" in caplog.text


def with_right_digest(body: bytes) -> bytes:
    return MAGIC + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest() + body


def test_what_somebody_else_wrote_is_nothing_however_its_parser_fails() -> None:
    draw = random.Random(7)
    ours = b"".join(encode(state(1)))[len(MAGIC) + DIGEST_BYTES :]
    assert decode(with_right_digest(ours)) is not None
    bodies = [b"", b"\x80", b"x", ours[: len(ours) // 2]]
    for _ in range(300):
        body = bytearray(ours)
        at = draw.randrange(len(body))
        body[at : at + 8] = b"\xff" * 8
        bodies.append(bytes(body))
    found = [decode(with_right_digest(body)) for body in bodies]
    assert found[:4] == [None] * 4
    assert found.count(None) > 20


class Huge:
    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return bytearray, (10**15,)


def test_memory_that_runs_out_is_not_taken_for_damage(folder: CheckpointFolder) -> None:
    folder.save(state(1))
    buffer = io.BytesIO()
    torch.save({"epoch": Huge()}, buffer)
    (folder.path / "000002.checkpoint").write_bytes(with_right_digest(buffer.getvalue()))
    with pytest.raises(TrialFailure, match="out of memory"):
        folder.load()


def test_a_file_larger_than_memory_is_damage(folder: CheckpointFolder) -> None:
    folder.save(state(1))
    folder.save(state(2))
    os.truncate(files(folder)[-1], 1 << 42)  # sparse
    loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 1


def test_a_file_that_the_disk_does_not_give_gives_way_unless_it_is_the_last(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.save(state(1))
    folder.save(state(2))
    bad = {"000002.checkpoint"}
    whole = checkpoint.read

    def read(path: Path) -> bytes:
        if path.name in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path)

    monkeypatch.setattr(checkpoint, "read", read)
    loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 1
    assert "000002.checkpoint cannot be read (Input/output error); falling back to 000001" in caplog.text
    bad.add("000001.checkpoint")
    with pytest.raises(StorageError, match=r"cannot be read \(Input/output error\)"):
        folder.load()
    assert "starting anew" not in caplog.text


def test_a_folder_or_a_dead_link_in_a_checkpoints_place_is_damage(folder: CheckpointFolder) -> None:
    folder.save(state(1))
    (folder.path / "000002.checkpoint").mkdir()
    (folder.path / "000003.checkpoint").symlink_to(folder.path / "nowhere")
    loaded = folder.load()
    assert loaded is not None
    assert loaded["epoch"] == 1


def test_an_owner_that_was_replaced_cannot_put_its_states_before_the_later_ones(
    folder: CheckpointFolder,
) -> None:
    late = CheckpointFolder(folder.path, generation=1)
    late.save(state(1))
    late.save(state(2))
    owner = CheckpointFolder(folder.path, generation=2)
    assert (loaded := owner.load()) is not None
    assert loaded["epoch"] == 2
    late.save(state(3))
    owner.save(state(30))
    late.save(state(4))
    assert (loaded := owner.load()) is not None
    assert loaded["epoch"] == 30
    owner.save(state(40))
    late.save(state(5))
    owner.generation = 3
    owner.save(state(50))
    assert [path.name for path in files(folder)] == ["2000001.checkpoint", "3000000.checkpoint"]
    assert (loaded := owner.load()) is not None
    assert loaded["epoch"] == 50
