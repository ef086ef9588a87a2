"""`headsearch bench`: what it prints and refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headsearch.cli.app import run
from headsearch.core.stages import Measure
from headsearch.core.together import Together
from headsearch.report.benchmark import (
    bench_table,
    compile_lines,
    graph_lines,
    precision_lines,
    reading,
    together_lines,
)
from headsearch.runtime.bench import bench

QUICK = ["bench", "--images", "96", "--image-size", "8", "--repeats", "1", "--seconds", "0"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSEARCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def quick(home):
    """One small training, measured once."""
    [one] = bench(
        None,
        ["training.batch_size=16"],
        encoders=["small-resnet"],
        images=32,
        image_size=8,
        repeats=1,
        seconds=0.0,
        probe=False,
        home=home,
    )
    return one


def test_json_has_every_encoder_and_batch(capsys):
    assert run([*QUICK, "--encoder", "small-resnet", "--batch", "16", "--batch", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "torch" in found["hardware"]
    assert [(one["encoder"], one["batch_size"]) for one in found["results"]] == [
        ("small-resnet", 16),
        ("small-resnet", 32),
    ]
    for one in found["results"]:
        assert set(one["stages"]) == {"encoder", "views", "head and loss", "optimizer"}
        for name in ("training", "limit", "share"):
            assert 0 < one[name]["low"] <= one[name]["median"] <= one[name]["high"]
        assert one["train_images"] == 96
        assert one["probe_seconds"] > 0


def test_precisions_are_measured_where_asked_and_compared(capsys):
    given = [
        *QUICK,
        "--encoder",
        "small-resnet",
        "--batch",
        "16",
        "--no-probe",
        "--set",
        "training.precision=bf16",
    ]
    assert run([*given, "--precision", "fp32", "--precision", "bf16"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:4] == [["small-resnet", "16", "bf16"], ["small-resnet", "16", "fp32"]]
    assert rows[4] == ["small-resnet,", "batch", "16:"]


def test_a_table_and_a_line_to_read(capsys):
    assert run([*QUICK, "--encoder", "small-resnet", "--batch", "16", "--no-probe"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[:3] == ["encoder", "batch", "precision"]
    assert said.out.splitlines()[2].startswith("small-resnet")
    assert "small-resnet, batch 16: " in said.err
    assert "% of the limit, which is the encoder's own speed; of a step, views " in said.err


def test_trainings_at_once_are_measured_where_asked(capsys):
    given = [*QUICK, "--encoder", "small-resnet", "--batch", "16", "--no-probe", "--json"]
    assert run([*given, "--together", "2"]) == 0
    [one] = json.loads(capsys.readouterr().out)["results"]
    assert [several["trainings"] for several in one["together"]] == [1, 2]
    assert all(several["total"]["median"] > 0 for several in one["together"])


def test_what_several_at_once_make_is_said_with_its_advice(home):
    one = quick(home)
    assert together_lines([one]) == []

    def found(device, gain):
        alone = Together(1, 2, Measure(100.0, 90.0, 110.0), Measure(1.0, 1.0, 1.0))
        two = Together(2, 1, Measure(100 * gain, 0.0, 300.0), Measure(gain, gain, gain))
        return together_lines([replace(one, device=device, together=(alone, two))])

    assert found("cpu", 1.2) == [
        (
            "small-resnet, batch 16: 2 trainings at once, 1 thread each, make 120 (0-300) views/s together, "
            "1.20 x one alone"
        ),
        "small-resnet, batch 16: headsearch run --workers 2 is fastest here",
    ]
    assert "HEADSEARCH_GPU_SLOTS=2 is fastest here" in found("cuda", 1.2)[1]
    assert found("cuda", 1.0)[1].endswith("one training at a time is as fast here")


def test_a_study_is_measured_on_its_own_images(capsys):
    given = ["bench", "quickstart", "--repeats", "1", "--seconds", "0", "--no-probe", "--json"]
    assert run([*given, "--set", "training.batch_size=64"]) == 0
    [one] = json.loads(capsys.readouterr().out)["results"]
    assert (one["encoder"], one["image_size"], one["batch_size"]) == ("small-resnet", 8, 64)


def test_both_encoders_without_a_study(home):
    results = bench(
        None,
        ["training.batch_size=4"],
        images=8,
        image_size=8,
        repeats=1,
        seconds=0.0,
        probe=False,
        home=home,
    )
    assert [one.encoder for one in results] == ["small-resnet", "resnet18"]


def test_the_reading_names_what_helps(home):
    one = quick(home)
    # Two steps an epoch: the report on 32 images is far above its share.
    assert "fewer probe.report_images make it cheaper" in reading(one)
    assert len(bench_table([one]).rows) == 1
    one = replace(one, precision="fp32")
    for factor, advice in (
        (1.2, "1.20 x as fast: worth setting here"),
        (1.0, "1.00 x as fast: does not pay here"),
    ):
        other = replace(one, training=Measure(factor * one.training.median, 0.0, 0.0))
        [line] = compile_lines([one, replace(other, compiled="default")])
        assert line.endswith(f"training.compile_encoder=default makes training {advice}")
        [line] = precision_lines([replace(other, precision="bf16"), one])
        assert line.endswith(f"training.precision=bf16 makes training {advice}")
        [line] = graph_lines([one, replace(other, compiled="cuda-graph")])
        assert line.endswith(f"training.cuda_graph=true makes training {advice}")
    assert compile_lines([one, replace(one, compiled="cuda-graph")]) == []
    assert graph_lines([one, replace(one, compiled="default")]) == []
    unlike = replace(one, precision="bf16", compiled="default")
    assert compile_lines([one]) == precision_lines([one]) == []
    assert compile_lines([one, unlike]) == precision_lines([one, unlike]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "vit"], "encoder.name"),
        (["--precision", "fp8"], "training.precision"),
        (["--batch", "512"], "batch_size: 512 is more than the 96 training images"),
        (["--set", "nonsense=1"], "nonsense"),
        (["--compile", "fastest"], "training.compile_encoder"),
        (["--device", "cpu", "--cuda-graph"], "--cuda-graph: needs a GPU"),
        (["--device", "tpu"], "device: 'tpu' is none of auto, cpu, cuda"),
        (["missing.toml"], "missing.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, words, message):
    assert run([*QUICK, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
