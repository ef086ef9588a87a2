"""The image: small in what it may do, labelled, and cheap to build again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stack import ROOT, docker, inspect, run

pytestmark = [pytest.mark.containers, pytest.mark.hostile, pytest.mark.slow, pytest.mark.timeout(1500)]

CONFINED = ("--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--network", "none")


def python(image: str, code: str, *options: str) -> str:
    return docker("run", *CONFINED, *options, "--entrypoint", "python3", image, "-c", code).strip()


def test_image_is_headsearch_for_a_user_without_rights(image: str, settings: dict[str, str]) -> None:
    config = inspect(image)["Config"]
    assert config["Entrypoint"] == ["headsearch"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.version"] == settings["HEADSEARCH_VERSION"]
    assert config["Labels"]["org.opencontainers.image.revision"] == settings["HEADSEARCH_REVISION"]
    assert "study" in docker("run", *CONFINED, image)
    assert python(image, "import os; print(os.getuid(), os.getgid())") == "10001 10001"
    # Nothing of the image is its user's but the two folders that volumes take the place of.
    code = "import os; print(sorted(p for p, _, _ in os.walk('/') if not p.startswith(('/proc', '/dev', '/sys')) and os.stat(p).st_uid == os.getuid()))"
    assert python(image, code) == "['/run/headsearch', '/var/lib/headsearch']"


def test_image_holds_what_runs_and_no_tools(image: str) -> None:
    code = "import importlib.util as u; print([bool(u.find_spec(m)) for m in ('headsearch', 'torch', 'boto3', 'pip', 'pytest')])"
    assert python(image, code) == "[True, True, True, False, False]"
    assert (
        python(image, "import os; print(os.path.exists('/source'), os.path.exists('/opt/code'))")
        == "False False"
    )


def test_new_volumes_are_the_users(image: str, volume: str) -> None:
    mounted = ("--volume", f"{volume}:/var/lib/headsearch")
    python(image, "open('/var/lib/headsearch/x', 'w').write('kept')", *mounted)
    assert python(image, "print(open('/var/lib/headsearch/x').read())", *mounted) == "kept"


def test_study_trains_on_a_read_only_root(image: str, volume: str) -> None:
    point = docker(
        "run", *CONFINED, "--volume", f"{volume}:/var/lib/headsearch", image,
        "train", "quickstart", "--set", "training.epochs=1", "--threads", "1", "--json",
    )  # fmt: skip
    assert json.loads(point)


def test_changed_code_leaves_the_dependencies_layers_alone(
    image: str, settings: dict[str, str], tmp_path: Path
) -> None:
    for name in ("headsearch", "studies", "docker"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "secrets"))
    for name in ("pyproject.toml", "README.md", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "headsearch" / "__init__.py").open("a") as code:
        code.write("CHANGED = True\n")
    arguments = {
        "PYTHON_IMAGE": settings.get("PYTHON_IMAGE"),
        "TORCH_INDEX_URL": settings.get("TORCH_INDEX_URL"),
        "VERSION": settings["HEADSEARCH_VERSION"],
        "REVISION": "another",
    }
    given = [
        word for name, value in arguments.items() if value for word in ("--build-arg", f"{name}={value}")
    ]
    changed = f"{image}-changed"
    try:
        run(
            "docker",
            "build",
            "-q",
            "--network",
            "host",
            "-f",
            str(tmp_path / "docker" / "Dockerfile"),
            "-t",
            changed,
            *given,
            str(tmp_path),
        )
        before, after = (inspect(one)["RootFS"]["Layers"] for one in (image, changed))
        assert len(before) == len(after)
        assert before[:-1] == after[:-1]
        assert before[-1] != after[-1]
        assert python(changed, "import headsearch; print(headsearch.CHANGED)") == "True"
    finally:
        docker("rmi", "-f", changed, check=False)
