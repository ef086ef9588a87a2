"""What is said and refused before anything reaches Slurm, with stand-ins for its programs."""

from __future__ import annotations

import socket

import pytest

from headsearch.cli.app import run

SINFO = """#!/bin/sh
case "$*" in
*-p\\ nowhere*) ;;
*%R*) echo main; echo gpu ;;
*) echo "$NODES" | tr , '\\n' ;;
esac
"""
SCONTROL = "#!/bin/sh\necho 'KillWait                = 30 sec'\n"
NEVER = '#!/bin/sh\necho called >> "$SUBMITTED"\nexit 1\n'


@pytest.fixture
def cluster(tmp_path, monkeypatch, headsearch_home):
    """Programs of Slurm that know of nodes and take no job; returns what says which nodes there are."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, content in {"sinfo": SINFO, "scontrol": SCONTROL, "sbatch": NEVER, "srun": NEVER}.items():
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted"))
    monkeypatch.setenv("NODES", "node1,node2")
    monkeypatch.delenv("PGPASSWORD", raising=False)
    yield lambda nodes: monkeypatch.setenv("NODES", nodes)
    assert not (tmp_path / "submitted").exists()


def launch(capsys, *words, dry_run=True):
    code = run(["launch", "quickstart", "--on", "slurm", *words, *(["--dry-run"] if dry_run else [])])
    said = capsys.readouterr()
    return code, said.out, said.err.strip().splitlines()


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A database that nodes reach; its password is in a file."""
    file = tmp_path / "url"
    file.write_text("postgresql://headsearch_worker:secret@db.lab:5432/headsearch\n")
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL_FILE", str(file))
    return file


@pytest.fixture
def no_database(monkeypatch):
    """A dry run of a bundled study looks for one of its name in the database; there is none to ask here."""
    monkeypatch.setattr("headsearch.runtime.launching.launch._stored", lambda *_, **__: None)


def test_it_says_what_it_will_do(cluster, remote, no_database, capsys):
    options = ["--cpus", "8", "--gpus", "1", "--memory-gb", "31.5", "--minutes", "600", "--partition", "gpu"]
    more = [
        "--account",
        "vision",
        "--slurm",
        "qos=high",
        "--slurm",
        "exclusive",
        "--slurm",
        "constraint=a100&ib",
    ]
    code, out, err = launch(capsys, "--workers", "4", *options, *more)
    assert (code, err) == (0, [])
    for flag in (
        "--array=0-3", "--cpus-per-task=8", "--gres=gpu:1", "--mem=32256M", "--time=600", "--partition=gpu",
        "--account=vision", "--qos=high", "--exclusive ", "--constraint=a100&ib", "--requeue", "--signal=B:USR2@120",
    ):  # fmt: skip
        assert flag in f"{out} ", flag
    assert "headsearch worker --study quickstart --device auto --threads 8" in out
    assert "headsearch_worker:***@db.lab" in out
    assert f"HEADSEARCH_DATABASE_URL_FILE={remote}" in out
    assert "secret" not in out
    assert "nothing was made or started" in out


def test_what_may_surprise_is_said(cluster, remote, no_database, capsys):
    _, out, _ = launch(capsys, "--workers", "2")
    assert "KillWait = 30 s" in out
    assert "--set worker.drain_seconds=20" in out
    assert "set worker.checkpoint_store" in out
    _, out, _ = launch(capsys, "--workers", "2", "--set", "worker.drain_seconds=15")
    assert "KillWait" not in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--workers", "job array"]),
        (["--workers", "2", "--slurm", "array=0-9"], ["--slurm", "array", "--workers"]),
        (["--workers", "2", "--slurm", "--output=x"], ["--slurm", "output"]),
        (["--workers", "2", "--slurm", "cpus_per_task=2"], ["--slurm", "cpus-per-task", "--cpus"]),
        (["--workers", "2", "--slurm", "two words"], ["--slurm", "'two words'", "qos=high"]),
        (["--workers", "2", "--slurm", "qos="], ["--slurm", "qos="]),
        (["--workers", "2", "--slurm", "qos=a\n#SBATCH --uid=0"], ["--slurm"]),
        (["--workers", "2", "--minutes", "3"], ["--minutes", "120 s", "at least 4"]),
        (["--workers", "2", "--gpus", "2"], ["--gpus"]),
        (["--workers", "2", "--partition", "nowhere"], ["--partition", "'nowhere'", "gpu, main"]),
        (["--workers", "2", "--overlay", "gpu"], ["--overlay", "kubernetes"]),
    ],
)
def test_bad_input_is_one_line(words, parts, cluster, remote, no_database, capsys):
    code, out, err = launch(capsys, *words)
    assert (code, out, len(err)) == (2, "", 1)
    assert [part for part in parts if part not in err[0]] == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_embedded_server_is_refused_where_there_are_other_nodes(dry_run, cluster, capsys):
    code, out, err = launch(capsys, "--workers", "2", dry_run=dry_run)
    assert (code, out, len(err)) == (2, "", 1)
    assert "HEADSEARCH_DATABASE_URL" in err[0]
    assert "embedded server answers on this host only" in err[0]


def test_the_embedded_server_must_outlive_tasks_on_a_single_node(cluster, capsys):
    cluster(socket.gethostname())
    code, _, err = launch(capsys, "--workers", "2")
    assert (code, len(err)) == (2, 1)
    assert "headsearch db start" in err[0]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", ""])
def test_an_address_of_this_host_is_refused_where_there_are_other_nodes(host, cluster, capsys, monkeypatch):
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", f"postgresql://me@{host}/headsearch")
    code, _, err = launch(capsys, "--workers", "2")
    assert (code, len(err)) == (2, 1)
    assert "this address answers on this host only" in err[0]


@pytest.mark.parametrize(
    "variables",
    [
        {"HEADSEARCH_DATABASE_URL": "postgresql://me:geheim@db.lab/headsearch"},
        {"HEADSEARCH_DATABASE_URL": "postgresql://me@db.lab/headsearch?password=geheim"},
        {"HEADSEARCH_DATABASE_URL": "postgresql://me@db.lab/headsearch", "PGPASSWORD": "geheim"},
    ],
    ids=["in the URL", "in its query", "in PGPASSWORD"],
)
def test_a_password_that_the_batch_system_would_keep_is_refused(variables, cluster, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = launch(capsys, "--workers", "2")
    assert (code, len(err)) == (2, 1)
    assert list(variables)[-1] in err[0]
    assert "_FILE" in err[0]
    assert "geheim" not in out + err[0]


def test_no_slurm_is_one_line(remote, no_database, headsearch_home, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = launch(capsys, "--workers", "2", dry_run=False)
    assert (code, len(err)) == (1, 1)
    assert "sbatch" in err[0]
    code, out, err = launch(capsys, "--workers", "2")
    assert (code, err) == (0, [])
    assert "--array=0-1" in out


def test_a_refusal_of_sbatch_is_one_line(
    database_url, cluster, headsearch_home, tmp_path, capsys, monkeypatch
):
    cluster(socket.gethostname())
    file = tmp_path / "here"
    file.write_text(database_url)
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL_FILE", str(file))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: Invalid qos specification' >&2\nexit 1\n")
    code, _, err = launch(capsys, "--workers", "2", "--no-check", "--slurm", "qos=none", dry_run=False)
    assert (code, len(err)) == (2, 1)
    assert "Invalid qos" in err[0]
