"""Checkpoints where workers share no disk: on a real S3-compatible server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cable import Cable

from headsearch.config import TrialConfig
from headsearch.core.checkpoint import AsyncCheckpoints, Checkpoints, encode
from headsearch.core.images import load_images
from headsearch.core.pretrain import pretrain
from headsearch.errors import InputError, StorageError
from headsearch.runtime import checkpoints as module
from headsearch.runtime.checkpoints import check_store, open_checkpoints

CPU = torch.device("cpu")
SECRET = "a-secret-that-nobody-may-see"
AT = "lab/one/fire-01234567/7"
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


@pytest.fixture
def forked() -> Any:
    """Processes with torch imported; their environment is that of whichever test was first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["headsearch.core.pretrain", "boto3"])
    return context


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
    assert names(bucket) == [f"{AT}/1-0.checkpoint", f"{AT}/1-1.checkpoint"]
    found = opened().load()
    assert found is not None
    assert found.keys() == state(5).keys()
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
    newest = bucket.Object(f"{AT}/1-1.checkpoint")
    newest.put(Body=damage(newest.get()["Body"].read()))
    assert epoch_of(opened().load()) == 2
    assert f"{AT}/1-1.checkpoint is damaged; falling back to fire-01234567/7/1-0.checkpoint" in caplog.text
    again = opened()
    again.load()
    again.save(state(4))
    assert epoch_of(opened().load()) == 4


def test_where_nothing_is_whole_training_starts_anew(bucket: Any, caplog: pytest.LogCaptureFixture) -> None:
    foreign = [b"", b"".join(encode(state(9))), b"".join(encode({"turn": "x", "state": {}}))]
    for content in foreign:
        bucket.put_object(Key=f"{AT}/1-0.checkpoint", Body=content)
        bucket.put_object(Key=f"{AT}/0-1.checkpoint", Body=content)
        caplog.clear()
        assert opened().load() is None
        assert [record.message for record in caplog.records] == [
            f"checkpoint s3://heads/lab/one/fire-01234567/7/{name}.checkpoint is damaged; "
            "none is left, starting anew"
            for name in ("1-0", "0-1")
        ]
        opened().save(state(1))
        assert epoch_of(opened().load()) == 1
        opened().remove()


@pytest.mark.parametrize("filler", [0, 3_000_000])
def test_servers_that_know_no_checksums_can_be_used(
    bucket: Any, filler: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []
    store = module._store("s3://heads/lab/one")
    store._store.client.meta.events.register(
        "before-send.s3", lambda request, **_: sent.append(request.headers)
    )
    opened().save(state(1) | {"filler": torch.zeros(filler)})
    assert epoch_of(opened().load()) == 1
    assert (len(sent) > 5) == bool(filler)  # the large one goes in parts
    used = {name.lower() for headers in sent for name in headers}
    assert not {name for name in used if "checksum" in name or name == "x-amz-trailer"}


def save_for_ever(environment: dict[str, str], generation: int, filler: int) -> None:
    os.environ.update(environment)
    kept = AsyncCheckpoints(opened(generation))
    kept.load()
    for epoch in range(1, 1_000_000):
        kept.save(state(epoch) | {"filler": torch.zeros(filler)})


@pytest.mark.parametrize("filler", [200_000, 3_000_000])
def test_a_writer_killed_at_any_moment_leaves_a_state(bucket: Any, forked: Any, filler: int) -> None:
    for generation in range(1, 4):
        writer = forked.Process(target=save_for_ever, args=(dict(os.environ), generation, filler))
        writer.start()
        until = time.monotonic() + 60
        while (seen := epoch_of(opened(generation).peek()) or 0) < 3:
            assert time.monotonic() < until
            assert writer.is_alive()
        time.sleep(0.013 * generation)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = opened(generation).load()
        assert found is not None
        assert found["epoch"] >= seen
        assert torch.equal(found["weights"], state(found["epoch"])["weights"])
        opened(generation).remove()


class ShortCable(Cable):
    """Of the next PUT after `shorten` is set it carries only the beginning."""

    ALLOWED = 300_000

    def __init__(self, host: str, port: int) -> None:
        self.shorten, self.stuck = threading.Event(), threading.Event()
        super().__init__(host, port)

    def carry(self, source: socket.socket, *, upwards: bool) -> Iterator[bytes]:
        left: int | None = None
        for content in super().carry(source, upwards=upwards):
            if upwards and self.shorten.is_set() and content.startswith(b"PUT "):
                left = self.ALLOWED
            if left is None:
                yield content
                continue
            yield content[:left]
            left -= min(left, len(content))
            if left == 0:
                self.stuck.set()


def test_a_writer_killed_in_the_middle_of_a_put_leaves_the_state_before(
    bucket: Any, forked: Any, endpoint: str
) -> None:
    cable = ShortCable("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
    environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{cable.port}"}
    writer = forked.Process(target=save_for_ever, args=(environment, 1, 500_000))
    writer.start()
    until = time.monotonic() + 60
    while (epoch_of(opened().peek()) or 0) < 3:
        assert time.monotonic() < until
    cable.shorten.set()
    assert cable.stuck.wait(60)
    before = epoch_of(opened().peek())
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    time.sleep(0.5)  # the server hears of it
    found = opened().load()
    assert found is not None
    assert found["epoch"] == before
    assert torch.equal(found["weights"], state(found["epoch"])["weights"])
    again = opened()
    again.load()
    again.save(state(1000))
    assert epoch_of(opened().load()) == 1000


def restart(monkeypatch: pytest.MonkeyPatch, **environment: str | None) -> None:
    """Go on as a process with this environment would."""
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("headsearch.search.artifacts.ATTEMPTS", 1)
    monkeypatch.setattr(module, "_stores", {})


def complaints(store: str = "s3://heads/lab/one") -> list[str]:
    """What load, save, remove and the check say; one line each and no secret."""
    said = []
    for call in (
        lambda: opened(store=store).load(),
        lambda: opened(store=store).save(state(1)),
        lambda: opened(store=store).remove(),
    ):
        with pytest.raises(StorageError) as lost:
            call()
        said.append(str(lost.value))
    with pytest.raises(InputError, match=r"^worker\.checkpoint_store: ") as refused:
        check_store(store)
    said.append(str(refused.value))
    assert all("\n" not in line and SECRET not in line for line in said)
    return said


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        ("s3://nobody/lab", "NoSuchBucket: there is no such bucket"),
        ("s3://No_Bucket!/lab", "Invalid bucket name"),
        (f"s3://someone:{SECRET}@heads/lab", "s3://heads/lab: its address must not hold credentials"),
    ],
)
def test_a_wrong_address_is_one_line(bucket: Any, store: str, reason: str) -> None:
    assert all(reason in line for line in complaints(store))


@pytest.mark.parametrize(
    ("endpoint_url", "reason"),
    [
        ("http://127.0.0.1:{port}", "Could not connect to the endpoint URL"),
        (f"http://someone:{SECRET}@127.0.0.1:{{port}}", "Could not connect to the endpoint URL"),
        (f"someone:{SECRET}@127.0.0.1:{{port}}", "Invalid endpoint: 127.0.0.1"),
    ],
)
def test_a_server_that_is_away_is_one_line(
    bucket: Any, endpoint_url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart(monkeypatch, AWS_ENDPOINT_URL=endpoint_url.format(port=free_port()))
    assert all(reason in line and "s3://heads/lab/one: cannot be " in line for line in complaints())


def test_credentials_that_are_missing_are_one_line(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    restart(
        monkeypatch,
        AWS_ACCESS_KEY_ID=None,
        AWS_SECRET_ACCESS_KEY=None,
        AWS_EC2_METADATA_DISABLED="true",
        AWS_SHARED_CREDENTIALS_FILE="/nowhere",
        AWS_CONFIG_FILE="/nowhere",
    )
    assert all("Unable to locate credentials" in line for line in complaints())
    restart(monkeypatch, AWS_PROFILE="nobody")
    assert all(
        "cannot be opened (The config profile (nobody) could not be found)" in line for line in complaints()
    )


def checked_from_now_on(endpoint: str, after: str) -> None:
    """Let the server check who asks, after that many requests more."""
    request = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth", data=after.encode(), headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()


def test_credentials_that_are_wrong_are_one_line(
    bucket: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart(monkeypatch, AWS_ACCESS_KEY_ID="a-stranger")
    checked_from_now_on(endpoint, "0")
    try:
        said = complaints()
    finally:
        checked_from_now_on(endpoint, "inf")
    assert all("(InvalidAccessKeyId)" in line and "a-stranger" not in line for line in said)


def test_what_may_not_be_done_is_one_line_with_what_it_takes(
    bucket: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    people = boto3.client("iam")
    people.create_user(UserName="guest")
    key = people.create_access_key(UserName="guest")["AccessKey"]
    restart(monkeypatch, AWS_ACCESS_KEY_ID=key["AccessKeyId"], AWS_SECRET_ACCESS_KEY=key["SecretAccessKey"])
    checked_from_now_on(endpoint, "0")
    try:
        said = complaints()
    finally:
        checked_from_now_on(endpoint, "inf")
    assert all("AccessDenied: it takes GetObject, PutObject and DeleteObject" in line for line in said)
    assert not any(key["SecretAccessKey"] in line or key["AccessKeyId"] in line for line in said)


def test_without_boto3_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    restart(monkeypatch)
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert all(
        "needs boto3, which is not here: pip install 'headsearch[s3]'" in line for line in complaints()
    )


def test_a_store_is_tried_before_a_study_is_made(bucket: Any, tmp_path: Path) -> None:
    check_store("s3://heads/lab")
    check_store(f"file://{tmp_path}/shared")
    assert names(bucket) == []
    assert list(tmp_path.rglob("*")) == [tmp_path / "shared"]
    with pytest.raises(InputError, match=r"worker\.checkpoint_store: .*cannot be written"):
        check_store("file:///proc/nowhere")


def test_a_server_that_goes_away_is_heard_of_at_the_next_save(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = AsyncCheckpoints(opened())
    kept.save(state(1))
    kept.flush()
    restart(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    gone = AsyncCheckpoints(opened(2))
    gone.save(state(2))
    with pytest.raises(StorageError, match="Could not connect to the endpoint URL"):
        gone.save(state(3))
    gone.save(state(4))
    with pytest.raises(StorageError, match="Could not connect to the endpoint URL"):
        gone.flush()
    assert epoch_of(kept.load()) == 1


def test_a_shared_folder_keeps_two_states(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/shared%20by%20all"
    for epoch in range(1, 5):
        opened(store=store).save(state(epoch))
    folder = tmp_path / "shared by all" / "fire-01234567" / "7"
    newest = max(folder.iterdir())
    assert len(list(folder.iterdir())) == 2
    assert epoch_of(opened(2, store).load()) == 4
    newest.write_bytes(newest.read_bytes()[:-1])
    assert epoch_of(opened(2, store).load()) == 3
    opened(2, store).remove()
    assert not folder.exists()


def config_of(epochs: int = 3) -> TrialConfig:
    return TrialConfig.model_validate(
        {
            "data": {"name": "digits", "limit": 100},
            "encoder": {"width": 4},
            "head": {"kind": "mlp", "width": 8, "projection_dim": 4},
            "probe": {"report_images": 32, "report_iterations": 5, "iterations": 20},
            "training": {"epochs": epochs, "batch_size": 32, "precision": "fp32"},
        }
    )


def reports_of(
    environment: dict[str, str], home: str, generation: int, stop: int, store: str | None
) -> list[tuple[float, ...]]:
    os.environ.update(environment)
    torch.set_num_threads(1)
    images = load_images(config_of().data, home=Path(home))
    kept = AsyncCheckpoints(open_checkpoints(Path(home), "fire-01234567", 7, store, generation=generation))
    found = []
    for said in pretrain(config_of(), images, device=CPU, home=Path(home), checkpoints=kept):
        found.append((said.epoch, said.loss, said.probe_accuracy, said.feature_rank, said.projection_rank))
        if said.epoch == stop:
            break
    return found


def test_what_is_set_aside_in_a_store_is_kept_and_can_be_taken_back(bucket: Any) -> None:
    kept = opened(2)
    kept.save(state(3))
    where = kept.set_aside("abcdef0123456789")
    assert where == "s3://heads/lab/one/fire-01234567/7-other-abcdef012345.checkpoint"
    assert opened(3).load() is None
    fresh = opened(3)
    fresh.save(state(1))
    fresh.set_aside("another")
    assert fresh.take_back("nobody's") is None
    assert epoch_of(fresh.take_back("abcdef0123456789")) == 3
    assert epoch_of(opened(4).load()) == 3
    fresh.save(state(4))
    assert epoch_of(opened(4).load()) == 4
    assert len([name for name in names(bucket) if "other" in name]) == 2


def test_a_training_goes_on_in_another_process_without_its_disk(
    bucket: Any, forked: Any, tmp_path: Path
) -> None:
    store, environment = "s3://heads", dict(os.environ)
    with forked.Pool(1, maxtasksperchild=1) as pool:
        whole = pool.apply(reports_of, (environment, str(tmp_path / "a"), 1, 9, None))
        first = pool.apply(reports_of, (environment, str(tmp_path / "b"), 1, 2, store))
        left = names(bucket)
        rest = pool.apply(reports_of, (environment, str(tmp_path / "c"), 2, 9, store))
    assert left == [f"fire-01234567/7/1-{slot}.checkpoint" for slot in (0, 1)]
    assert len(names(bucket)) == 3
    assert len(whole) == 3
    assert first == whole[:2]
    assert rest == whole
