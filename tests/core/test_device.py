"""Which device is picked, and how CUDA is set up on it: once, for repeatable sums in the precision asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from headsearch.core.device import configure_cuda, find_device, pick_device
from headsearch.core.hardware import software
from headsearch.errors import InputError

CPU = torch.device("cpu")


REPEATABLE, OTHER = (True, False, False, False), (False, True, True, True)
"""Deterministic, benchmark, TF32 of convolutions and of matrix products."""


def settings() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def put(deterministic: bool, benchmark: bool, convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Two GPUs, and other settings; the list gets each device that becomes the current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    before = settings()
    put(*OTHER)
    yield chosen
    put(*before)


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_picked_is_current_and_repeatable(
    name: str, index: int, current: list[torch.device]
) -> None:
    assert settings() == OTHER
    device = pick_device(name)
    assert device == torch.device("cuda", index)
    assert current == [device]
    assert settings() == REPEATABLE
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_settings_raise_no_warning(current: list[torch.device]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        configure_cuda(torch.device("cuda", 1))
        assert settings() == REPEATABLE
    assert not said


def test_a_gpu_that_is_looked_for_is_left_alone(current: list[torch.device]) -> None:
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"^device: cuda:2 is not there; available: cpu, cuda:0, cuda:1$"):
        find_device("cuda:2")
    assert not current
    assert settings() == OTHER


def test_a_cpu_changes_nothing(current: list[torch.device]) -> None:
    assert pick_device("cpu") == CPU
    configure_cuda(CPU)
    assert not current
    assert settings() == OTHER


def test_a_fresh_process_may_have_any_device(current: list[torch.device]) -> None:
    configure_cuda(torch.device("cuda", 1))
    assert current == [torch.device("cuda", 1)]
    assert settings() == REPEATABLE


def test_facts_of_a_gpu_are_its_model_and_libraries(
    current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert list(software()) == list(software(CPU)) == ["torch", "python", "threads"]
    assert software(torch.device("cuda", 1)) == {
        **software(CPU),
        "gpu": "GPU 1",
        "cuda": "13.0",
        "cudnn": 91002,
    }


@pytest.mark.gpu
def test_the_last_gpu_gets_events_and_tensors_without_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    last = torch.cuda.device_count() - 1
    device = pick_device(f"cuda:{last}")
    assert torch.zeros(1, device="cuda").device == device
    assert torch.cuda.current_stream().device == device
    assert settings() == REPEATABLE
    facts = software(device)
    assert facts["gpu"] == torch.cuda.get_device_name(device)
    assert facts["cudnn"] == torch.backends.cudnn.version()
