"""Three hosts that share no disk, checkpoints on an S3-compatible server, and one of the hosts vanishes.

Four network namespaces: database, store, and two hosts for workers, each with a home folder of its own. Everything
that a person would type is typed there.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from namespaces import NetworkServer, Process, Processes, missing, network_with_server

from headsearch.runtime.session import open_session
from headsearch.search import snapshot

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]

PORT = 5000
EPOCHS = 40
STUDY = f"""
name = "rehearsal"
mode = "points"

[budget]
epochs = {EPOCHS}

[lease]
seconds = 3.0

[worker]
checkpoint_store = "s3://heads/lab"

[base]
data.name = "digits"
data.limit = 200
encoder.width = 4
training.batch_size = 64
training.precision = "fp32"
probe.report_images = 200
probe.report_iterations = 5
probe.iterations = 20
probe.penalties = [1e-2]

[[points]]
"head.kind" = "mlp"
"head.projection_dim" = 16

[[points]]
"head.kind" = "mlp"
"head.projection_dim" = 8

[[points]]
"head.kind" = "linear"
"head.projection_dim" = 4
"""
SERVE = "import sys; from moto.server import main; main(['-H', '0.0.0.0', '-p', sys.argv[1]])"
MAKE_BUCKET = "import boto3; boto3.resource('s3').create_bucket(Bucket='heads')"
LIST_BUCKET = "import boto3; print([o.key for o in boto3.resource('s3').Bucket('heads').objects.all()])"


@dataclass(frozen=True)
class Lab:
    """Hosts that know each other's addresses."""

    server: NetworkServer
    started: Processes
    folder: Path

    def home(self, host: str) -> Path:
        return self.folder / f"home-{host}"

    def python(self, host: str, *arguments: str) -> Process:
        env = os.environ | {
            "HEADSEARCH_HOME": str(self.home(host)),
            "HEADSEARCH_DATABASE_URL": self.server.network_url,
            "AWS_ENDPOINT_URL": f"http://{self.server.network.address('store')}:{PORT}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "between-namespaces",
            "AWS_DEFAULT_REGION": "us-east-1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        return self.started.start(host, [sys.executable, "-W", "ignore", *arguments], env)

    def type(self, host: str, *words: str) -> str:
        """Type ``headsearch WORDS`` on a host; returns what it says."""
        process = self.python(host, "-m", "headsearch", *words)
        assert process.wait() == 0, process.output
        return process.output

    def worker(self, host: str) -> Process:
        return self.python(host, "-m", "headsearch", "worker", "--study", "rehearsal", "--threads", "1")

    def store(self) -> Process:
        """Start the store and make its bucket."""
        serving = self.python("store", "-c", SERVE, str(PORT))

        def made() -> bool:
            assert serving.popen.poll() is None, serving.output
            return self.python("b", "-c", MAKE_BUCKET).wait() == 0

        wait_for(made, serving)
        return serving


def wait_for(condition: Callable[[], object], *running: Process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        said = "".join(f"\n--- {process.log.name}\n{process.output}" for process in running)
        assert time.monotonic() < deadline, f"it did not happen in time{said}"
        time.sleep(0.05)


def test_a_host_vanishes_and_its_trials_are_finished_elsewhere(headsearch_home, tmp_path, monkeypatch):
    reason = missing()
    if reason:
        pytest.skip(reason)
    study_file = tmp_path / "rehearsal.toml"
    study_file.write_text(STUDY)
    with (
        network_with_server("a", "b", "store") as server,
        Processes(server.network, tmp_path) as started,
    ):
        lab = Lab(server, started, headsearch_home)
        serving = lab.store()
        lab.type("a", "study", "create", str(study_file))
        checked = lab.type("b", "doctor", "--worker", "rehearsal")
        assert re.search(r"^ok +checkpoints +s3://heads/lab", checked, re.MULTILINE), checked

        monkeypatch.setenv("HEADSEARCH_DATABASE_URL", server.url)
        with open_session() as session:

            def trials() -> tuple[snapshot.TrialRow, ...]:
                return snapshot.read(session.database, "rehearsal").trials

            vanishing = [lab.worker("a"), lab.worker("a")]
            wait_for(lambda: len(trials()) == 2 and min(trial.epoch for trial in trials()) >= 3, *vanishing)
            server.network.cut("a")
            for process in vanishing:
                process.popen.kill()
                process.popen.wait()
            left = {trial.number: trial.epoch for trial in trials() if trial.state == "running"}
            assert left, "the host was too fast: nothing was left to finish elsewhere"
            rest = lab.worker("b")
            assert rest.wait() == 0, rest.output
            done = trials()
        adopted = {
            int(n): int(at) for n, at in re.findall(r"trial (\d+) adopted at epoch (\d+)", rest.output)
        }
        print(f"\nleft at epoch {left}, adopted at {adopted}")
        assert adopted.keys() == left.keys()
        assert all(adopted[number] == epoch for number, epoch in left.items() if epoch >= 3)
        # Host b had each state from the store, where host a had put it.
        loaded = (
            rf'{server.network.address("b")} .*"GET /heads/lab/rehearsal-\w+/(\d+)/1-[01].checkpoint .* 200'
        )
        assert {int(number) for number in re.findall(loaded, serving.output)} >= left.keys()
        assert [trial.state for trial in done] == ["complete"] * 3
        assert [trial.epoch for trial in done] == [EPOCHS] * 3
        assert {trial.number: trial.losses for trial in done if trial.losses} == dict.fromkeys(left, 1)
        assert "is clean: 3 trials" in lab.type("b", "study", "verify", "rehearsal")
        # The store served, and nothing else was shared or is left.
        assert not list(lab.home("a").glob("checkpoints/*/*")) + list(lab.home("b").glob("checkpoints/*/*"))
        listing = lab.python("b", "-c", LIST_BUCKET)
        assert listing.wait() == 0, listing.output
        assert listing.output.strip() == "[]"
