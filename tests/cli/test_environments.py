"""Environments that are not as a terminal's: closed streams, other encodings, odd paths, libpq's variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sqlalchemy import text

from headsearch.cli.app import run
from headsearch.errors import DatabaseError, StorageError
from headsearch.home import home_folder
from headsearch.search.database import Database
from headsearch.search.schema import migrate
from headsearch.study_file import load_study

STUDY = """
name = "plain"
[budget]
trials = 2
epochs = 1
[space]
head.projection_dim = [2, 4]
"""


def shell(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = f"exec {sys.executable} -m headsearch {words}"
    return subprocess.run(
        ["sh", "-c", command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed):
    done = shell(f"heads {closed}")
    assert (done.returncode, done.stderr) == (0, "")


def test_what_an_encoding_lacks_is_a_question_mark(tmp_path):
    """The table of objectives has an arrow."""
    (tmp_path / "plain.toml").write_text(
        STUDY.replace("plain", "pläin").replace("pläin", "plain") + 'x = "\u2191"'
    )
    done = shell(
        f"study create {tmp_path / 'plain.toml'}", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Unicode" not in done.stderr


def test_a_study_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_bytes(b"\xef\xbb\xbf" + STUDY.encode())
    assert load_study(path).name == "plain"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('question = "a\\u0000b"', "question: has a NUL character"),
        ('base.data.root = "/tmp/a\\u0000b"', "base.data.root: has a NUL character"),
    ],
)
def test_nul_is_refused_by_its_field(tmp_path, capsys, line, said):
    path = tmp_path / "plain.toml"
    path.write_text(line + "\n" + STUDY)
    assert run(["study", "create", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_path_that_is_too_long_is_wrong_input(tmp_path, capsys):
    assert run(["study", "create", "x" * 300 + ".toml"]) == 2
    root = tmp_path / ("y" * 300)
    path = tmp_path / "plain.toml"
    path.write_text(f'base.data.name = "folder"\nbase.data.root = "{root}"\n' + STUDY)
    assert run(["study", "create", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("File name too long" in line and "unexpected" not in line for line in errors)
    assert all(len(line) < 300 for line in errors)


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    def nobody(*_: object, **__: object) -> str:
        raise RuntimeError("Could not determine home directory")

    monkeypatch.delenv("HEADSEARCH_HOME", raising=False)
    monkeypatch.setattr("headsearch.home._is_root", lambda: False)
    monkeypatch.setattr("headsearch.home.platformdirs.user_data_dir", nobody)
    with pytest.raises(StorageError, match="set HEADSEARCH_HOME to a folder"):
        home_folder()
    monkeypatch.setenv("HEADSEARCH_HOME", "~nobody-of-this-name/x")
    with pytest.raises(StorageError, match="set HEADSEARCH_HOME to a folder"):
        home_folder()


@pytest.mark.postgres
def test_libpqs_variables_do_not_reach_the_embedded_server(headsearch_home, monkeypatch, capsys):
    variables = {"PGHOSTADDR": "10.255.255.1", "PGSSLMODE": "require", "PGSERVICE": "lab", "PGTZ": "Foo/Bar"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(["study", "list"]) == 0, capsys.readouterr().err
    assert not variables.keys() & os.environ.keys()


@pytest.mark.postgres
def test_optuna_tables_of_an_unknown_version_are_refused(database_url):
    database = Database(database_url)
    migrate(database)
    with database.begin() as connection:
        connection.execute(text("UPDATE public.alembic_version SET version_num = 'v9.9.9.a'"))
    with pytest.raises(DatabaseError, match=r"of version v9\.9\.9\.a, Optuna .* knows v"):
        _ = database.storage
    database.close()
