"""Bad input through the real command line: one line, the right exit code, and nothing left behind."""

from __future__ import annotations

import ctypes
import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from headsearch.cli.app import run
from headsearch.runtime.session import open_session
from headsearch.search import studies
from headsearch.study_file import load_study

pytestmark = pytest.mark.postgres

GOOD = """
name = "good"
[budget]
trials = 6
epochs = 4
rungs = [1]
[base]
data.name = "digits"
[space]
"head.kind" = ["mlp", "linear"]
"head.projection_dim" = [2, 4, 8]
"head.width" = { choices = [16, 32], when = { "head.kind" = "mlp" } }
"""


@dataclass(frozen=True)
class World:
    """A home folder and a database in which the study `there` stands."""

    home: Path
    url: str
    folder: Path

    def study(self, *changes: tuple[str, str], name: str = "study.toml") -> str:
        """A file like GOOD with some of its text replaced."""
        content = GOOD
        for old, new in changes:
            assert old in content
            content = content.replace(old, new)
        return self.write(name, content)

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def images(self, name: str, classes: dict[str, int], *, broken: int = 0) -> str:
        """A folder of small JPEGs, the first `broken` of each training class cut short."""
        drawn = np.random.default_rng(0)
        for split in ("train", "test"):
            for label, count in classes.items():
                place = self.folder / name / split / label
                place.mkdir(parents=True)
                for index in range(count):
                    path = place / f"{index}.jpg"
                    Image.fromarray(drawn.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
                    if split == "train" and index < broken:
                        path.write_bytes(path.read_bytes()[:100])
        data = f'data = {{ name = "folder", root = "{self.folder / name}" }}'
        return self.study((BASE, f"{data}\ntraining.batch_size = 4"), name=f"{name}.toml")

    def remains(self) -> dict[str, Any]:
        """What a refused command must leave as it was."""
        engine = create_engine(self.url)
        try:
            with engine.connect() as connection:
                found = {
                    table: connection.scalar(text(f"SELECT count(*) FROM {table}"))
                    for table in ("headsearch.studies", "headsearch.trials", "headsearch.workers",
                                  "public.studies", "public.trials")
                }  # fmt: skip
                found["locks"] = connection.scalar(
                    text(
                        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database "
                        "WHERE locktype = 'advisory' AND datname = current_database()"
                    )
                )
        finally:
            engine.dispose()
        found["checkpoints"] = sorted(path.name for path in (self.home / "checkpoints").glob("*"))
        return found


@pytest.fixture(scope="module")
def database(postgres_server: Any) -> Iterator[str]:
    name = postgres_server.create_database()
    yield postgres_server.address(name).url
    postgres_server.drop_database(name)


@pytest.fixture(scope="module")
def home(open_folder_factory: Any) -> Iterator[Path]:
    with open_folder_factory("headsearch-home-") as folder:
        yield folder


@pytest.fixture
def world(database: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database)
    monkeypatch.setenv("HEADSEARCH_HOME", str(home))
    monkeypatch.delenv("HEADSEARCH_DATA", raising=False)
    monkeypatch.delenv("HEADSEARCH_DEBUG", raising=False)
    made = World(home, database, tmp_path)
    with open_session() as session:
        studies.create(
            session.database, load_study(Path(made.study(('"good"', '"there"'), name="there.toml")))
        )
    return made


KIND = '"head.kind" = ["mlp", "linear"]'
WIDTH = '"head.width" = { choices = [16, 32], when = { "head.kind" = "mlp" } }'
ACTIVATION = '"head.activation" = { choices = ["relu", "swish"], when = { "head.kind" = "mlp" } }'
RATE = '"optimizer.learning_rate" = { low = 0.1, high = 0.01 }'
BASE = 'data.name = "digits"'

# Each: what to replace in GOOD, and what the line must say (field, then remedy or what is valid).
STUDIES: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "unknown key": ([("[budget]", "[budgets]\n[budget]")], ["budgets", "unknown key", "did you mean budget"]),
    "unknown key of a table": ([("epochs = 4", "epochs = 4\nepoch = 4")], ["budget.epoch", "did you mean epochs"]),
    "unknown field under base": ([(BASE, BASE + "\nencoder.widht = 8")], ["encoder.widht", "did you mean width"]),
    "unknown field of the space": ([(KIND, KIND + '\n"head.colour" = [1, 2]')], ["space.head.colour", "projection_dim"]),
    "unknown activation": ([(WIDTH, WIDTH + "\n" + ACTIVATION)], ["head.activation", "swish", "silu"]),
    "range upside down": ([(WIDTH, RATE)], ["space.optimizer.learning_rate", "0.1 is not below high = 0.01"]),
    "log range from zero": ([(WIDTH, RATE.replace("0.1,", "0,").replace("0.01", "1, log = true"))], ["above 0", "log"]),
    "parameter without values": ([(WIDTH, '"head.width" = { step = 2 }')], ["space.head.width", "choices, low and high"]),
    "condition on a missing parameter": (
        [('when = { "head.kind" = "mlp" }', 'when = { "head.frozen" = true }')],
        ["space.head.width.when", "head.frozen is not a parameter", "head.kind"],
    ),
    "conditions in a circle": (
        [(KIND, '"head.kind" = { choices = ["mlp", "linear"], when = { "head.width" = 16 } }')], ["when", "circle"]),
    "field that a head has not": ([(', when = { "head.kind" = "mlp" }', "")], ["head.width", "linear", "when"]),
    "projection dim 0": ([("[2, 4, 8]", "[0, 4, 8]")], ["head.projection_dim", "greater than or equal to 1"]),
    "negative learning rate": ([(BASE, BASE + "\noptimizer.learning_rate = -0.1")],
                               ["optimizer.learning_rate", "-0.1", "greater than 0"]),
    "warm-up longer than the training": ([(BASE, BASE + "\noptimizer.warmup_epochs = 9")],
                                         ["optimizer.warmup_epochs", "not below the 4 epochs"]),
    "rung beyond the budget": ([("[1]", "[1, 4]")], ["budget.rungs", "4 is not below budget.epochs = 4"]),
    "rungs that do not rise": ([("[1]", "[2, 1]")], ["budget.rungs", "must rise"]),
    "trials 0": ([("trials = 6", "trials = 0")], ["budget.trials", "greater than or equal to 1"]),
    "trials missing": ([("trials = 6", "")], ["budget.trials", "needed"]),
    "budget missing": ([("[budget]\ntrials = 6\nepochs = 4\nrungs = [1]", "")], ["budget", "missing"]),
    "budget no multiple of the seeds": ([('name = "good"', 'name = "good"\nseeds = [0, 1, 2, 3]')],
                                        ["budget.trials", "6 is not a multiple of the 4 seeds"]),
    "budget larger than the space": ([("trials = 6", "trials = 60")], ["budget.trials", "9 points", "at most 9"]),
    "seeds twice": ([('name = "good"', 'name = "good"\nseeds = [1, 1]')], ["seeds", "must all differ"]),
    "space sets the seed": ([(WIDTH, "seed = [0, 1]")], ["seed", "seeds sets it"]),
    "base sets the epochs": ([(BASE, BASE + "\ntraining.epochs = 3")], ["training.epochs", "budget.epochs sets it"]),
    "space and base both": ([(BASE, BASE + '\nhead.kind = "mlp"')], ["space.head.kind", "also set under base"]),
    "space varies the measure": ([(WIDTH, '"probe.iterations" = [10, 20]')], ["space.probe.iterations", "under base"]),
    "grid over a range": ([('name = "good"', 'name = "good"\nmode = "grid"'), ("trials = 6\n", ""),
                           (WIDTH, RATE.replace("0.1", "0.001"))], ["learning_rate.step", "needed"]),
    "objectives without accuracy": ([('name = "good"', 'name = "good"\nobjectives = ["projection_dim"]')],
                                    ["objectives", "probe_accuracy among them"]),
    "unknown objective": ([('name = "good"', 'name = "good"\nobjectives = ["accuracy"]')],
                          ["objectives", "accuracy", "probe_accuracy"]),
    "name that no folder can have": ([('"good"', '"Good Study"')], ["name", "pattern"]),
    "unknown data set": ([('"digits"', '"digts"')], ["data.name", "digts", "digits"]),
    "folder without a root": ([('"digits"', '"folder"')], ["data.root", "train/<class>"]),
    "missing folder": ([(BASE, 'data = { name = "folder", root = "/nowhere/at/all" }')],
                       ["data.root", "/nowhere/at/all", "train/<class>"]),
    "data set that is not here": ([('"digits"', '"cifar10"')], ["data.root", "data.download = true"]),
    "batch larger than the data": ([(BASE, BASE + "\ntraining.batch_size = 5000")],
                                   ["training.batch_size", "5000", "at most"]),
    "batch larger than the data somewhere in the space": (
        [(WIDTH, '"training.batch_size" = { low = 8, high = 4096, log = true }')], ["training.batch_size", "4096"]),
    "fewer images than classes": ([(BASE, BASE + "\ndata.limit = 5\ntraining.batch_size = 2")],
                                  ["data.limit", "10 classes"]),
    "no image left to hold out": ([(BASE, BASE + "\ndata.validation_fraction = 0.0001")],
                                  ["data.validation_fraction", "above"]),
}  # fmt: skip


def refused(
    capsys: pytest.CaptureFixture[str], world: World, words: list[str], parts: list[str], code: int = 2
) -> None:
    before = world.remains()
    capsys.readouterr()
    assert run(words) == code
    said = capsys.readouterr()
    one_line(said.out, said.err, parts)
    assert world.remains() == before
    assert before["headsearch.studies"] == before["public.studies"] == 1
    assert before["headsearch.trials"] == before["headsearch.workers"] == before["locks"] == 0


def one_line(out: str, errors: str, parts: list[str]) -> None:
    assert out == ""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    assert "unexpected" not in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize("case", STUDIES, ids=lambda case: case.replace(" ", "-"))
def test_a_study_that_makes_no_sense(case: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    changes, parts = STUDIES[case]
    refused(capsys, world, ["study", "create", world.study(*changes)], parts)


@pytest.mark.parametrize("command", ["run", "train"])
def test_run_and_train_check_the_same(command: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for case in ("unknown activation", "batch larger than the data", "missing folder"):
        changes, parts = STUDIES[case]
        refused(capsys, world, [command, world.study(*changes)], parts[:2])


@pytest.mark.parametrize("command", [["study", "create"], ["run"], ["train"]], ids=" ".join)
def test_a_file_that_is_no_study(
    command: list[str], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, parts in (
        (world.write("a.toml", "name = [unclosed"), ["a.toml", "not a TOML file"]),
        (world.write("b.toml", b"\xff\xfe\x00"), ["b.toml", "not UTF-8"]),
        (world.write("c.toml", ""), ["c.toml", "empty", "name, budget and space"]),
        (str(world.folder), ["a folder, not a study file"]),
        (str(world.folder / "missing.toml"), ["missing.toml", "no such study file"]),
        ("quickstrat", ["quickstrat", "no such study file", "did you mean quickstart"]),
    ):
        refused(capsys, world, [*command, path], parts)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("budget.trails=4", ["budget.trails", "did you mean trials"]),
        ("bugdet.trials=4", ["--set bugdet.trials", "no such field"]),
        ("data.limt=4", ["data.limt", "did you mean limit"]),
        ("budget.trials", ["--set budget.trials", "dotted.path=value"]),
        ("=4", ["--set =4", "dotted.path=value"]),
        ("budget.trials=many", ["budget.trials", "many", "integer"]),
        ("optimizer.name=adam", ["optimizer.name", "adam", "adamw"]),
    ],
)
def test_an_override_that_makes_no_sense(
    override: str, parts: list[str], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, world, ["study", "create", world.study(), "--set", override], parts)


def test_a_folder_with_one_class(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    study = world.images("lonely", {"cat": 20})
    refused(capsys, world, ["run", study], ["data.root", "1 class", "at least 2"])


def test_too_many_truncated_images(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    study = world.images("torn", {"cat": 20, "dog": 20}, broken=2)
    refused(
        capsys, world, ["study", "create", study],
        ["data.max_unreadable_fraction", "4 of 80", "train/cat/0.jpg"],
    )  # fmt: skip


def test_a_few_truncated_images_are_left_out_by_name(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    study = world.images("chipped", {"cat": 20, "dog": 20}, broken=1)
    words = ["study", "create", study, "--set", "data.max_unreadable_fraction=0.1", "--set", "name=chipped"]
    assert run(words) == 0
    said = capsys.readouterr()
    images = "80 entries found; 78 images used (38 in train, 40 in test), 2 unreadable, 0 ignored"
    assert said.err.splitlines() == [
        f"{world.folder / 'chipped'}: {images}",
        f"left out 2 unreadable images of {world.folder / 'chipped'}: train/cat/0.jpg, train/dog/0.jpg",
    ]
    assert "study chipped made" in said.out
    assert run(["study", "delete", "chipped", "--yes"]) == 0


def test_without_the_check_a_study_may_be_made_where_the_data_are_not(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    study = world.study(*STUDIES["missing folder"][0], ('"good"', '"elsewhere"'))
    assert run(["study", "create", study, "--no-check"]) == 0
    assert run(["study", "delete", "elsewhere", "--yes"]) == 0
    assert capsys.readouterr().err == ""


def test_a_study_that_exists_with_another_spec(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    study = world.study(('"good"', '"there"'), ("epochs = 4", "epochs = 8"))
    for command in (["run"], ["study", "create"]):
        refused(
            capsys, world, [*command, study],
            ["'there' exists with another spec", "budget.epochs: 4 -> 8", "another name", "study delete there"],
        )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["study", "show", "theer"], ["study", "front", "theer"], ["study", "delete", "theer", "--yes"],
        ["worker", "--study", "theer"], ["dashboard", "theer", "--port", "0"],
    ],
    ids=lambda words: words[0] if len(words) == 1 else " ".join(words[:2]),
)  # fmt: skip
def test_an_unknown_study(words: list[str], world: World, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, world, words, ["'theer'", "not in the database", "did you mean there"])


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there(device: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    study = world.study()
    for words in (["run", study], ["train", study], ["worker", "--study", "there"]):
        refused(capsys, world, [*words, "--device", device], ["device", device, "cpu"])


def test_a_figure_of_an_unknown_kind(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(world.folder / "front.gif")
    refused(capsys, world, ["study", "front", "there", "--figure", target], ["--figure", ".html, .png, .svg"])


def test_deleting_asks_first(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(capsys, world, ["study", "delete", "there"], ["--yes", "nobody can be asked"])
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert run(["study", "delete", "there"]) == 1
    assert "Delete study there with 0 trials?" in capsys.readouterr().out
    assert world.remains()["headsearch.studies"] == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lose_root() -> None:
    """Let root be bound by permissions like everybody: without CAP_DAC_OVERRIDE and its relatives."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
            if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")


def headsearch(
    world: World, words: list[str], *, may_all: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    root = str(Path(__file__).parents[2])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HEADSEARCH_")}
    given = {"HEADSEARCH_HOME": str(world.home), "HEADSEARCH_DATABASE_URL": world.url} | environment
    given = {name: value for name, value in given.items() if value}
    return subprocess.run(
        [sys.executable, "-m", "headsearch", *words],
        env={**inherited, "PYTHONPATH": root, **given},
        capture_output=True, text=True, timeout=120, check=False, cwd="/",
        preexec_fn=None if may_all else lose_root,
    )  # fmt: skip


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def with_password(url: str, password: str) -> str:
    return make_url(url).set(password=password).render_as_string(hide_password=False)


@pytest.mark.parametrize(
    ("url", "code", "parts"),
    [
        ("sqlite:///studies.db", 2, ["HEADSEARCH_DATABASE_URL", "SQLite", "postgresql://"]),
        ("mysql://me:secret@db/heads", 2, ["HEADSEARCH_DATABASE_URL", "PostgreSQL", "postgresql://"]),
        ("postgresql://db", 2, ["HEADSEARCH_DATABASE_URL", "names no database"]),
        (
            "postgresql://me:secret@127.0.0.1:{closed}/heads",
            1,
            ["no PostgreSQL answers at 127.0.0.1", "running"],
        ),
        ("{wrong password}", 1, ["refuses user headsearch", "password", "HEADSEARCH_DATABASE_URL"]),
        ("{no database}", 1, ["nothing_here", "create it first"]),
    ],
    ids=["sqlite", "mysql", "no-name", "down", "wrong-password", "no-such-database"],
)
def test_a_database_that_cannot_be_used(world: World, url: str, code: int, parts: list[str]) -> None:
    before = world.remains()
    url = {
        "{wrong password}": with_password(world.url, "secret"),
        "{no database}": make_url(world.url)
        .set(database="nothing_here")
        .render_as_string(hide_password=False),
    }.get(url, url.replace("{closed}", str(closed_port())))
    for words in (["study", "list"], ["study", "create", world.study()]):
        done = headsearch(world, words, HEADSEARCH_DATABASE_URL=url)
        assert done.returncode == code
        one_line(done.stdout, done.stderr, parts)
        assert "secret" not in done.stderr
    assert world.remains() == before


def test_two_urls(world: World) -> None:
    done = headsearch(world, ["study", "list"], HEADSEARCH_DATABASE_URL_FILE="/some/file")
    assert done.returncode == 2
    one_line(done.stdout, done.stderr, ["HEADSEARCH_DATABASE_URL_FILE", "keep one"])


def test_a_port_in_use(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = headsearch(world, ["dashboard", "--port", port])
    assert done.returncode == 1
    one_line(done.stdout, done.stderr, [port, "in use", "--port"])


def test_a_port_that_is_none(world: World) -> None:
    done = headsearch(world, ["dashboard", "--port", "70000"])
    assert done.returncode in (1, 2)
    one_line(done.stdout, done.stderr, ["70000", "65535"])


def test_a_login_that_cannot_be_read(world: World) -> None:
    done = headsearch(world, ["dashboard", "--port", "0", "--auth-file", str(world.folder / "none")])
    assert done.returncode == 2
    one_line(done.stdout, done.stderr, ["--auth-file", "none"])


def test_a_home_that_is_a_file(world: World) -> None:
    file = world.write("file", "")
    for home in (file, f"{file}/below"):
        for words in (["study", "create", world.study()], ["train", world.study()], ["db", "status"]):
            done = headsearch(world, words, HEADSEARCH_HOME=home)
            assert done.returncode == 1
            one_line(done.stdout, done.stderr, [file, "HEADSEARCH_HOME"])


def test_a_home_that_may_not_be_written(world: World, open_folder_factory: Any) -> None:
    before = world.remains()
    with open_folder_factory("headsearch-closed-") as closed:
        study = closed / "study.toml"
        study.write_text(GOOD)
        closed.chmod(0o555)
        if os.geteuid() == 0:
            os.chown(closed, 65534, 65534)
        for home in (closed, closed / "below"):
            done = headsearch(
                world, ["study", "create", str(study)], may_all=False, HEADSEARCH_HOME=str(home)
            )
            assert done.returncode == 1
            one_line(done.stdout, done.stderr, [str(home), "HEADSEARCH_HOME"])
        closed.chmod(0o755)
    assert world.remains() == before
