"""The image, built once a run from the Dockerfile, and stacks of it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch_index
from stack import ROOT, Stack, docker

BASES = {"PYTHON_IMAGE": "localhost/python:3.11", "POSTGRES_IMAGE": "localhost/postgres:18"}
"""Stand-ins for the default base images, for machines without an image registry."""


def _bases() -> dict[str, str]:
    """Base images: those that the environment names, else stand-ins that are there, else the defaults."""
    found = {}
    for name, stand_in in BASES.items():
        given = os.environ.get(f"HEADSEARCH_TEST_{name}")
        there = subprocess.run(["docker", "image", "inspect", stand_in], capture_output=True, check=False)
        if given or there.returncode == 0:
            found[name] = given or stand_in
    return found


@pytest.fixture(scope="session")
def settings() -> Iterator[dict[str, str]]:
    """What a stack's .env would hold; the image that it names is built."""
    with contextlib.ExitStack() as stack:
        # Another process of this test run may be building; the second build finds all layers.
        lock = stack.enter_context((Path(tempfile.gettempdir()) / "headsearch-test-image.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = {
            "HEADSEARCH_IMAGE": f"headsearch-test:{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}",
            "HEADSEARCH_BUILD_NETWORK": "host",
            "HEADSEARCH_VERSION": "1.2.3",
            "HEADSEARCH_REVISION": "of-the-tests",
            **_bases(),
        }
        if index := os.environ.get("HEADSEARCH_TEST_TORCH_INDEX_URL"):
            made["TORCH_INDEX_URL"] = index
        elif wheel := torch_index.wheel_for_cpu():
            made["TORCH_INDEX_URL"] = stack.enter_context(torch_index.serving(wheel))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        Stack(folder, made).compose("build", "worker")
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield made


@pytest.fixture(scope="session")
def image(settings: dict[str, str]) -> str:
    return settings["HEADSEARCH_IMAGE"]


@pytest.fixture
def make_stack(
    settings: dict[str, str], open_folder_factory: Callable[..., contextlib.AbstractContextManager[Path]]
) -> Iterator[Callable[..., Stack]]:
    """Makes stacks, and takes them away again."""
    with contextlib.ExitStack() as stack:

        def make(files: Sequence[Path] = (), **more: str) -> Stack:
            folder = stack.enter_context(open_folder_factory("headsearch-stack-"))
            made = Stack(folder, settings | more, files=files)
            stack.callback(made.remove)
            return made

        yield make


@pytest.fixture
def volume() -> Iterator[str]:
    """A volume of the test's own."""
    name = docker("volume", "create").strip()
    yield name
    docker("volume", "rm", "-f", name, check=False)
