"""Checkpoints where workers share no disk: on a real S3-compatible server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headsearch.config import TrialConfig
from headsearch.core.checkpoint import Checkpoints
from headsearch.core.images import load_images
from headsearch.core.pretrain import pretrain
from headsearch.errors import HeadsearchError, InputError, StorageError
from headsearch.runtime import checkpoints as module
from headsearch.runtime.checkpoints import check_store, open_checkpoints

CPU = torch.device("cpu")
SECRET = "a-secret-that-nobody-may-see"
SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def serve(port: int) -> subprocess.Popen[bytes]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    port = free_port()
    server = serve(port)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_stores", {})
    found = boto3.resource("s3").create_bucket(Bucket="heads")
    yield found
    found.objects.all().delete()
    found.delete()


def opened(generation: int = 1, store: str = "s3://heads/lab/one") -> Checkpoints:
    return open_checkpoints(Path("/nowhere"), "fire-01234567", 7, store, generation=generation)


def state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "weights": torch.full((2000,), float(epoch))}


def epoch_of(found: dict[str, Any] | None) -> int | None:
    return None if found is None else int(found["epoch"])


def names(bucket: Any) -> list[str]:
    return sorted(entry.key for entry in bucket.objects.all())


def test_states_come_back_and_two_are_kept(bucket: Any) -> None:
    assert opened().load() is None
    kept = opened()
    for epoch in range(1, 6):
        kept.save(state(epoch))
        assert epoch_of(opened().peek()) == epoch
    folder = "lab/one/fire-01234567/7"
    assert names(bucket) == [f"{folder}/1-0.checkpoint", f"{folder}/1-1.checkpoint"]
    found = opened().load()
    assert found is not None
    assert torch.equal(found["weights"], state(5)["weights"])
    opened().save(state(6))  # by a process that did not load first
    assert epoch_of(opened().load()) == 6
    opened().remove()
    opened().remove()
    assert names(bucket) == []


def test_a_later_owner_goes_on_and_the_earlier_one_cannot_come_between(bucket: Any) -> None:
    late = opened(1)
    late.save(state(1))
    late.save(state(2))
    owner = opened(3)
    assert epoch_of(owner.load()) == 2
    late.save(state(3))
    owner.save(state(30))
    late.save(state(4))
    assert epoch_of(opened(3).load()) == 30
    assert epoch_of(opened(4).load()) == 30
    owner.save(state(40))
    assert [name.rsplit("/", 1)[-1] for name in names(bucket)] == ["3-0.checkpoint", "3-1.checkpoint"]
    owner.generation = 5
    owner.save(state(50))
    assert epoch_of(opened(5).load()) == 50
    owner.save(state(60))
    assert [name.rsplit("/", 1)[-1] for name in names(bucket)] == ["5-0.checkpoint", "5-1.checkpoint"]
    owner.remove()
    assert names(bucket) == []


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-7], lambda content: content[:90] + b"?" + content[91:]]
)
def test_a_damaged_object_gives_way_to_the_one_before(
    bucket: Any, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kept = opened()
    for epoch in (1, 2, 3):
        kept.save(state(epoch))
    newest = bucket.Object("lab/one/fire-01234567/7/1-1.checkpoint")
    newest.put(Body=damage(newest.get()["Body"].read()))
    assert epoch_of(opened().load()) == 2
    assert "1-1.checkpoint is damaged; falling back to the one before" in caplog.text
    again = opened()
    again.load()
    again.save(state(4))
    assert epoch_of(opened().load()) == 4


def save_for_ever(generation: int) -> None:
    kept = opened(generation)
    kept.load()
    for epoch in range(1, 1_000_000):
        kept.save(state(epoch) | {"filler": torch.zeros(200_000)})


def test_a_writer_killed_at_any_moment_leaves_a_state(bucket: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    for generation in range(1, 6):
        writer = context.Process(target=save_for_ever, args=(generation,))
        writer.start()
        until = time.monotonic() + 60
        while (epoch_of(opened(generation).peek()) or 0) < 3 or generation == 0:
            assert time.monotonic() < until
        time.sleep(0.013 * generation)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        before = epoch_of(opened(generation).load())
        assert before is not None
        assert before >= 3
        opened(generation).remove()


def test_what_goes_wrong_is_one_line_without_secrets(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    with pytest.raises(InputError, match=r"worker\.checkpoint_store: s3://nobody.*NoSuchBucket") as error:
        check_store("s3://nobody/lab")
    said.append(str(error.value))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("headsearch.search.artifacts.ATTEMPTS", 1)
    monkeypatch.setattr(module, "_stores", {})
    away = opened()
    for call in (away.load, away.remove, lambda: away.save(state(1))):
        with pytest.raises(
            StorageError, match=r"s3://heads/lab/one: cannot be (read|written|removed)"
        ) as lost:
            call()
        said.append(str(lost.value))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(module, "_stores", {})
    with pytest.raises(StorageError, match="Unable to locate credentials") as without:
        opened().load()
    said.append(str(without.value))
    assert all("\n" not in line and SECRET not in line for line in said)


def test_a_store_is_tried_before_a_study_is_made(bucket: Any, tmp_path: Path) -> None:
    check_store("s3://heads/lab")
    check_store(f"file://{tmp_path}/shared")
    assert names(bucket) == []
    with pytest.raises(HeadsearchError, match=r"worker\.checkpoint_store: .*cannot be written"):
        check_store("file:///proc/nowhere")


def config_of(epochs: int = 3) -> TrialConfig:
    return TrialConfig.model_validate(
        {
            "data": {"name": "digits", "limit": 200},
            "encoder": {"width": 4},
            "head": {"kind": "mlp", "width": 8, "projection_dim": 4},
            "probe": {"report_images": 64, "report_iterations": 5, "iterations": 20},
            "training": {"epochs": epochs, "batch_size": 64, "precision": "fp32"},
        }
    )


def reports_of(home: str, generation: int, stop: int, store: str | None) -> list[tuple[float, ...]]:
    torch.set_num_threads(1)
    images = load_images(config_of().data, home=Path(home))
    kept = open_checkpoints(Path(home), "fire-01234567", 7, store, generation=generation)
    found = []
    for said in pretrain(config_of(), images, device=CPU, home=Path(home), checkpoints=kept):
        found.append((said.epoch, said.loss, said.probe_accuracy, said.feature_rank, said.projection_rank))
        if said.epoch == stop:
            break
    return found


def test_a_training_goes_on_in_another_process_without_its_disk(bucket: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    store = "s3://heads"
    with context.Pool(1, maxtasksperchild=1) as pool:
        whole = pool.apply(reports_of, (str(tmp_path / "a"), 1, 9, None))
        first = pool.apply(reports_of, (str(tmp_path / "b"), 1, 2, store))
        rest = pool.apply(reports_of, (str(tmp_path / "c"), 2, 9, store))
    assert len(names(bucket)) == 3
    assert first == whole[:2]
    assert rest == whole
