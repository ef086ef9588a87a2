"""The README's section is what the generator makes of the results that are committed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_section
import pytest
from gpu_section import BEGIN, END, README, RESULTS, marked, rewritten, section, summary
from rows import Row, Rows

BENCH = {
    "views_per_second": 45_123.0, "bare_encoder": 48_000.0, "share": 0.94, "share_low": 0.9, "share_high": 0.95,
    "step_ms": 22.0, "of_step": {"encoder": 0.94, "views": 0.02, "head and loss": 0.03, "optimizer": 0.01},
    "of_epoch": {"report": 0.05, "checkpoint": 0.2}, "peak_gib": 9.5,
}  # fmt: skip
ROWS = [
    Row(1, "machine: versions", {"date": "2026-12-01", "commit": "abc", "torch": "2.11", "cuda": "13", "cudnn": "9"}),
    Row(1, "machine: device", {"card": "H100", "capability": "9.0", "driver_version": "580.1"}),
    Row(1, "machine: views", {"made_by": "one kernel"}),
    Row(1, "machine: GPU lease", {"handed_on_seconds": 0.5}),
    Row(1, "machine"),
    Row(2, "tests: a", {"seconds": 1.0}),
    Row(2, "tests: b", {"seconds": 1.0}, status="failed", reason="assert 1 == 2"),
    Row(2, "tests: all", {"passed": 1, "failed": 1}),
    Row(2, "tests", status="failed", reason="pytest ends with 1"),
    Row(3, "bench: resnet18, batch 512, bf16, plain", BENCH | {"trial_share": 0.9, "trial_rest_share": 0.04}),
    Row(3, "bench: small-resnet, batch 256, bf16, plain", BENCH | {"share": 0.71}),
    Row(3, "bench: resnet18, batch 512, bf16, default", status="failed", reason="no compiler"),
    Row(3, "bench", status="failed", reason="1 of its parts"),
    Row(4, "together: 2 slots", {"slots": 2, "views_per_second": 300_000.0, "gain": 1.5}),
    Row(4, "together"),
    Row(5, "study: trials", {"trials": 24, "complete": 9, "pruned": 15, "failed": 0, "verify_clean": True,
        "trials_per_hour": 3000.0, "trials_per_hour_with_start": 2400.0}),
    Row(5, "study"),
    Row(6, "lightly", status="left out", reason="no module lightly"),
    Row(7, "published: training", {"encoder": "resnet18", "epochs": 100, "batch": 512, "precision": "bf16",
        "train_images": 49_950, "training_minutes": 3.9, "views_per_second": 42_000.0}),
    Row(7, "published: accuracy", {"linear": 0.8541, "knn": 0.8312, "published_linear": 0.856,
        "published_knn": 0.832, "published_minutes": 20.0, "published_views_per_second": 8400}),
    Row(7, "published"),
]  # fmt: skip


def test_the_readme_has_the_section_of_the_committed_results() -> None:
    """After a change: python tests/benchmarks/gpu_section.py."""
    found = json.loads(RESULTS.read_text())
    readme = README.read_text()
    assert rewritten(readme, found) == readme
    assert readme.count(BEGIN) == readme.count(END) == 1


def test_the_readme_says_in_one_place_whether_a_gpu_ran_it() -> None:
    outside = README.read_text().replace(marked(json.loads(RESULTS.read_text())), "")
    assert "on a GPU yet" not in " ".join(outside.split())


def test_without_results_it_says_so_in_a_line() -> None:
    assert section({}).startswith("**Nothing here has been run on a GPU yet.**")
    assert "\n\n" not in section({})


def test_it_says_what_was_found_what_falls_short_and_what_failed() -> None:
    text = " ".join(section(summary(ROWS)).split())
    for said in (
        "On one H100 (driver 580.1, CUDA 13, cuDNN 9, torch 2.11), 2026-12-01, commit abc",
        "`pytest -m gpu`: 1 passed, 1 failed: b (assert 1 == 2).",
        "another's 0.50 s later",
        "| resnet18, batch 512, bf16, plain | 45,123 | 48,000 | 94.0% | 2.0% | 3.0% | 1.0% | 5.0% | 20.0% | 9.50 GiB |",
        "Below 90% of the bare encoder's speed: small-resnet, batch 256, bf16, plain (71%).",
        "resnet18, batch 512, bf16, plain 90%, of which report and checkpoint cost 4.0%",
        "views/s of all: 2: 300,000 (1.50 x).",
        "24 short trials, two workers on the GPU, PostgreSQL: 9 complete, 15 pruned, 0 failed, `study verify` clean; 3,000",
        "| this run | 85.4% | 83.1% | 3.9 min | 42,000 |",
        "| published | 85.6% | 83.2% | 20.0 min | 8,400 |",
        "Without a figure: bench: resnet18, batch 512, bf16, default (failed: no compiler); lightly (left out: no module lightly).",
    ):
        assert said in text, said


def test_a_summary_is_small_plain_json() -> None:
    found = summary(ROWS, commit="given")
    assert found["commit"] == "given"
    assert json.loads(json.dumps(found)) == found
    assert len(json.dumps(found)) < 8_000


def test_a_cut_run_still_makes_a_section() -> None:
    """Whatever rows are missing."""
    for count in range(2, len(ROWS)):
        assert "H100" in section(summary(ROWS[:count]))


def test_results_of_a_cpu_are_refused(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.add(Row(1, "machine: device", {"card": "a CPU"}))
    command = [sys.executable, gpu_section.__file__, str(rows.lines)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "is not of a GPU" in ended.stderr


def test_a_readme_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the two comments"):
        rewritten("# headsearch\n", {})
