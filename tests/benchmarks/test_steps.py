"""What the steps do on a GPU, as far as it can be seen without one: their configurations, and what they ask for."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import step_bench
import step_machine
import step_published
import step_study
import torch
from lease import with_path
from setting import TESTS, Setting

from headsearch.runtime.single import point_of
from headsearch.spec import StudySpec
from headsearch.study_file import configured

UUID = "11111111-2222-3333-4444-555555555555"


def on_gpu(folder: Path, **changes: Any) -> Setting:
    fields = {"out": folder, "home": folder, "device": "cuda", "smoke": False, "data": folder, "epochs": 100}
    return Setting(**fields | changes)


def test_each_training_of_the_grid_can_be_asked_for():
    made = {str(cell): configured(cell.overrides) for cell in step_bench.GRID}
    assert len(made) == len(step_bench.GRID)
    found = {
        (one.encoder.name, one.training.batch_size, one.training.precision)
        for one in made.values()
        if one.training.compile_encoder == "off" and not one.training.cuda_graph
    }
    wanted = {
        (name, batch, precision)
        for name in ("resnet18", "small-resnet")
        for batch in (256, 512)
        for precision in ("bf16", "fp32")
    }
    assert found == wanted
    modes = {one.training.compile_encoder for one in made.values()}
    assert modes == {"off", "default", "max-autotune-no-cudagraphs"}
    assert sum(one.training.cuda_graph for one in made.values()) == 4


def test_the_study_has_24_trials(tmp_path):
    spec = StudySpec.model_validate(step_study.study(on_gpu(tmp_path)))
    assert spec.trials == 24
    config = spec.trial_config({"head.kind": "linear", "head.projection_dim": 2}, 0)
    assert (config.encoder.name, config.training.batch_size, config.training.epochs) == (
        "small-resnet",
        256,
        3,
    )


def test_the_published_training_is_the_recipe(tmp_path):
    config = point_of(step_published.STUDY, step_published.overrides(on_gpu(tmp_path)))
    assert config.recipe == "dkobak-cifar10"
    assert (config.training.epochs, config.training.batch_size, config.training.precision) == (
        100,
        512,
        "bf16",
    )
    assert (config.encoder.name, config.head.projection_dim, config.data.validation_fraction) == (
        "resnet18",
        128,
        0.001,
    )


QUERIED = """#!/bin/sh
case "$1" in
    -L) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-{uuid})" ;;
    --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit)
        echo "NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB, 1980 MHz, 700.00 W" ;;
    *) exit 2 ;;
esac
"""


@pytest.fixture
def one_h100(tmp_path, monkeypatch):
    """torch and nvidia-smi tell of one, which is not there."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(QUERIED.replace("{uuid}", UUID))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", with_path(smi.parent)["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        uuid=UUID,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 << 30, 80 << 30))
    return torch.device("cuda", 0)


def test_the_card_and_its_driver_are_told(one_h100):
    found = step_machine.facts(one_h100)
    assert (found["card"], found["capability"], found["gib"], found["free_gib"]) == (
        "NVIDIA H100 80GB HBM3",
        "9.0",
        80,
        79,
    )
    assert (found["driver_version"], found["power.limit"]) == ("580.65.06", "700.00 W")


def test_the_lease_is_of_the_gpu_that_torch_sees(one_h100, tmp_path):
    (found,) = step_machine.leased(on_gpu(tmp_path), one_h100, torch)
    assert found["gpu"] == f"NVIDIA H100 80GB HBM3 GPU-{UUID}"
    assert found["nvidia_smi"].startswith(str(tmp_path))
    assert found["torch_has_the_same_uuid"] is True
    assert found["handed_on_seconds"] < 30


def test_a_commit_is_told_of_a_checkout_alone(tmp_path, monkeypatch):
    assert step_machine.versions("given")["commit"] == "given"
    if (TESTS.parent / ".git").exists():
        assert len(str(step_machine.checked_out()).removesuffix("+")) == 10
    monkeypatch.setattr(step_machine, "ROOT", tmp_path)
    assert step_machine.checked_out() is None
    assert step_machine.versions(None)["commit"] == "unknown"


def test_warnings_say_that_a_training_went_on_without_what_was_asked_for():
    import logging

    warnings = step_bench.Warnings()
    logging.getLogger("headsearch.core.compiling").warning("not compiled, %s", "no compiler")
    logging.getLogger("headsearch.core.compiling").info("all is well")
    logging.getLogger("headsearch").removeHandler(warnings)
    assert warnings.said == ["not compiled, no compiler"]


def test_the_environment_of_a_lease_has_the_path_first(tmp_path):
    assert with_path(tmp_path)["PATH"].split(os.pathsep)[0] == str(tmp_path)
