"""The files in docker/, which need no engine: schema, linters, and what they promise each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from stack import COMPOSE, COMPOSE_GPU, ROOT

from headsearch import __version__
from headsearch.resilience import WorkerSpec

DOCKER = ROOT / "docker"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of the test extra."""
    program = Path(sys.executable).parent / name
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


def check_schema(*files: Path) -> subprocess.CompletedProcess[str]:
    return tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


def check_security(*files: Path) -> subprocess.CompletedProcess[str]:
    exceptions = DOCKER / ".compose-lint.yml"
    return tool(
        "compose-lint", "check", "--strict-config", "--fail-on", "low", "--config", exceptions, *files
    )


@pytest.fixture
def merged(tmp_path):
    """Both compose files, the second where compose and the linter merge it by themselves."""
    shutil.copy(COMPOSE, tmp_path / "compose.yaml")
    shutil.copy(COMPOSE_GPU, tmp_path / "compose.override.yaml")
    return tmp_path / "compose.yaml"


def test_compose_files_follow_the_compose_specification():
    done = check_schema(COMPOSE, COMPOSE_GPU)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_refuses_what_is_not_in_the_specification(tmp_path):
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace_time"))
    assert check_schema(wrong).returncode != 0


def test_compose_files_are_as_confined_as_the_linter_asks():
    done = check_security(COMPOSE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_so_are_both_together(merged):
    done = check_security(merged)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("${HEADSEARCH_DASHBOARD_BIND:-127.0.0.1}:", "", "CL-0005"),
        ("cap_drop: [ALL]", "privileged: true", "CL-0002"),
        ("POSTGRES_PASSWORD_FILE: /run/secrets/owner_password", "POSTGRES_PASSWORD: hunter2", "CL-0020"),
        ("read_only: true", "read_only: false", "CL-0007"),
    ],
)
def test_the_linter_finds_what_it_should(tmp_path, good, bad, rule):
    assert good in COMPOSE.read_text()
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace(good, bad))
    done = check_security(wrong)
    assert done.returncode == 1
    assert rule in done.stdout


def test_dockerfile_passes_hadolint():
    done = tool("hadolint", "--failure-threshold", "style", DOCKER / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_what_it_should(tmp_path):
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN cd / && pip install torch\n")
    done = tool("hadolint", wrong)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("checkov"), reason="no checkov")
def test_dockerfile_passes_checkov_but_for_what_it_names_with_reasons():
    done = subprocess.run(
        ["checkov", "--framework", "dockerfile", "--skip-download", "--output", "json", "--file", DOCKER / "Dockerfile"],
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["summary"]["passed"] > 60, done.stderr[-2000:]
    assert not found["results"]["failed_checks"]
    skipped = {
        check["check_id"]: check["check_result"]["suppress_comment"]
        for check in found["results"]["skipped_checks"]
    }
    assert set(skipped) == {"CKV_DOCKER_2", "CKV_DOCKER_7"}
    assert all(len(reason) > 20 for reason in skipped.values())


def test_exceptions_have_reasons():
    rules = yaml.safe_load((DOCKER / ".compose-lint.yml").read_text())["rules"]
    assert rules
    assert all(len(rule.get("reason", "")) > 20 for rule in rules.values())
    assert "hadolint ignore" not in (DOCKER / "Dockerfile").read_text()


def test_env_example_has_all_variables_with_their_defaults():
    text = (DOCKER / ".env.example").read_text()
    written = dict(re.findall(r"^#?([A-Z][A-Z_]+)=(.*)$", text, re.MULTILINE))
    used = dict(VARIABLE.findall(COMPOSE.read_text() + COMPOSE_GPU.read_text()))
    assert set(written) - {"COMPOSE_PROJECT_NAME"} == set(used)
    assert {name for name, default in used.items() if written[name] != default} == {"HEADSEARCH_IMAGES"}
    assert "PASSWORD" not in "".join(written)


def test_images_are_named_after_the_version():
    default = dict(VARIABLE.findall(COMPOSE.read_text() + COMPOSE_GPU.read_text()))
    assert default["HEADSEARCH_VERSION"] == __version__
    assert default["HEADSEARCH_IMAGE"] == f"headsearch:{__version__}"
    assert default["HEADSEARCH_GPU_IMAGE"] == f"headsearch:{__version__}-cuda"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined_and_its_logs_are_rotated(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["restart"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert "container_name" not in service, "it cannot be scaled"


def test_only_the_dashboard_is_published_and_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "dashboard": ["${HEADSEARCH_DASHBOARD_BIND:-127.0.0.1}:${HEADSEARCH_DASHBOARD_PORT:-8080}:8080"]
    }


def test_workers_are_given_longer_than_they_drain():
    default = dict(VARIABLE.findall(COMPOSE.read_text()))["HEADSEARCH_STOP_GRACE"]
    assert float(default.removesuffix("s")) >= WorkerSpec().drain_seconds + 60


def test_gpus_are_all_that_the_second_file_adds():
    added = yaml.safe_load(COMPOSE_GPU.read_text())
    assert list(added) == ["services"]
    assert list(added["services"]) == ["worker"]
    worker = added["services"]["worker"]
    assert set(worker) == {"image", "build", "command", "deploy"}
    both = yaml.safe_load(COMPOSE.read_text())["services"]["worker"]["command"]
    assert worker["command"] == both.replace("${HEADSEARCH_DEVICE:-auto}", "cuda")
    [reserved] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_image_with_cuda_has_a_c_compiler_and_the_other_stays_slim():
    """python:X has gcc, the C library's and Python's headers, python:X-slim has not; Triton needs all three."""
    arguments = yaml.safe_load(COMPOSE_GPU.read_text())["services"]["worker"]["build"]["args"]
    assert set(arguments) == {"PYTHON_IMAGE", "TORCH_INDEX_URL"}
    default = dict(VARIABLE.findall(COMPOSE.read_text() + COMPOSE_GPU.read_text()))
    assert arguments["PYTHON_IMAGE"] == f"${{PYTHON_GPU_IMAGE:-{default['PYTHON_GPU_IMAGE']}}}"
    assert default["PYTHON_IMAGE"] == f"{default['PYTHON_GPU_IMAGE']}-slim"
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert f"ARG PYTHON_IMAGE={default['PYTHON_IMAGE']}\n" in dockerfile
    assert "apt-get" not in dockerfile


def test_compiled_code_is_kept_where_it_can_be_loaded():
    """/tmp is a tmpfs, which engines mount noexec; the home is a volume."""
    dockerfile = (DOCKER / "Dockerfile").read_text()
    [cache] = re.findall(r"TORCHINDUCTOR_CACHE_DIR=(\S+)", dockerfile)
    [home] = re.findall(r"HEADSEARCH_HOME=(\S+)", dockerfile)
    assert Path(cache).is_relative_to(home)
    assert f"home:{home}" in SERVICES["worker"]["volumes"]


def test_the_image_gets_all_that_pyproject_asks_for(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = DOCKER / "requirements.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, env={"EXTRAS": "s3"}, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = (tmp_path / "torch.txt").read_text().splitlines()
    rest = (tmp_path / "rest.txt").read_text().splitlines()
    assert [re.match(r"[a-z]+", line)[0] for line in torch] == ["torch", "torchvision"]
    assert sorted(torch + rest) == sorted(project["dependencies"] + project["optional-dependencies"]["s3"])


def test_the_readme_makes_secrets_that_only_containers_read(tmp_path):
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if "openssl rand" in line]
    (tmp_path / "docker").mkdir()
    subprocess.run(["sh", "-euc", line], cwd=tmp_path, check=True)
    folder = tmp_path / "docker" / "secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    files = {file.name: file for file in folder.iterdir()}
    asked = {Path(secret["file"]).name for secret in yaml.safe_load(COMPOSE.read_text())["secrets"].values()}
    assert set(files) == asked
    assert {file.stat().st_mode & 0o777 for file in files.values()} == {0o644}
    assert len({file.read_text() for file in files.values()}) == 3
    assert "docker/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
