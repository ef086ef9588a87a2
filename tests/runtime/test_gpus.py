"""What nvidia-smi says, and what CUDA_VISIBLE_DEVICES leaves of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_nvidia import NO_DEVICES, NO_DRIVER, NVML_LOST, NVML_MISMATCH, FakeGpu, FakeNvidia, gpus

from headsearch.errors import WorldError
from headsearch.runtime import gpus as gpus_module
from headsearch.runtime.gpus import Gpu, listing, parse_list, parse_query, visible

# As the documents and users of real machines show it.
MIG_USER_GUIDE = """\
GPU 0: A100-SXM4-40GB (UUID: GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0)
  MIG 3g.20gb Device 0: (UUID: MIG-GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0/1/0)
  MIG 3g.20gb Device 1: (UUID: MIG-GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0/2/0)
"""
SINCE_R470 = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40)
  MIG 1g.10gb     Device  0: (UUID: MIG-a686709d-6dc2-542a-8851-0d2508448c10)
  MIG 1g.10gb+me  Device 10: (UUID: MIG-53864714-0a66-5df2-9007-9268e30d9a72)
GPU 1: NVIDIA RTX 6000 (Ada) Generation (UUID: GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvidia:
    fake = FakeNvidia(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_lists_as_documented() -> None:
    parent = "GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0"
    assert parse_list(MIG_USER_GUIDE) == (
        Gpu(0, "A100-SXM4-40GB MIG 3g.20gb", f"MIG-{parent}/1/0", parent),
        Gpu(0, "A100-SXM4-40GB MIG 3g.20gb", f"MIG-{parent}/2/0", parent),
    )
    first, second, other = parse_list(SINCE_R470)
    assert (first.uuid, first.name) == (
        "MIG-a686709d-6dc2-542a-8851-0d2508448c10", "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    )  # fmt: skip
    assert (second.uuid, second.parent) == (
        "MIG-53864714-0a66-5df2-9007-9268e30d9a72", "GPU-9c73eb7b-8d6d-6c0e-dc13-97873e2ede40",
    )  # fmt: skip
    assert other == Gpu(
        1, "NVIDIA RTX 6000 (Ada) Generation", "GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a", None
    )


@pytest.mark.parametrize("said", ["", NO_DRIVER, NO_DEVICES, NVML_MISMATCH, "GPU 0: A100\n", "\0\n\n"])
def test_what_lists_no_gpu(said: str) -> None:
    assert parse_list(said) == parse_query(said) == ()


def test_a_bad_gpu_beside_good_ones() -> None:
    lost = "Unable to determine the device handle for gpu 0000:02:00.0: Unknown Error\n"
    assert [gpu.index for gpu in parse_list(lost + SINCE_R470)] == [0, 0, 1]
    # A MIG line without its GPU has no place to be in.
    assert parse_list(MIG_USER_GUIDE.split("\n", 1)[1]) == ()


def test_the_query_as_documented() -> None:
    said = "GPU-c92e2d5d, NVIDIA RTX A6000, 1\nGPU-9c73eb7b, NVIDIA A100, SXM4, 0\n[N/A]\n"
    assert parse_query(said) == (
        Gpu(1, "NVIDIA RTX A6000", "GPU-c92e2d5d"),
        Gpu(0, "NVIDIA A100, SXM4", "GPU-9c73eb7b"),
    )


def test_the_fake_is_what_the_parsers_read(fake: FakeNvidia) -> None:
    shown = [FakeGpu(0), FakeGpu(1, mig=("3g.20gb", "1g.5gb")), FakeGpu(2, name="NVIDIA H100 80GB HBM3")]
    fake.show(shown)
    found = listing()
    assert found.installed
    assert found.problem is None
    assert [gpu.uuid for gpu in found.gpus] == [
        shown[0].uuid, shown[1].mig_uuid(0), shown[1].mig_uuid(1), shown[2].uuid,
    ]  # fmt: skip
    assert str(found.gpus[3]) == f"NVIDIA H100 80GB HBM3 {shown[2].uuid}"


@pytest.mark.parametrize(
    ("said", "code", "problem"),
    [
        (NO_DRIVER, 9, "nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver"),
        (NVML_MISMATCH, 18, "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"),
        (NVML_LOST, 255, "nvidia-smi: Failed to initialize NVML: Unknown Error"),
        ("", 15, "nvidia-smi: exit code 15"),
        ("a list in other words\n", 0, "nvidia-smi: a list in other words"),
        (NO_DEVICES, 6, None),
        ("", 0, None),
    ],
)  # fmt: skip
def test_failures(fake: FakeNvidia, said: str, code: int, problem: str | None) -> None:
    fake.say(said, code=code)
    found = listing()
    assert found.gpus == ()
    assert found.installed
    assert (found.problem or "").startswith(problem or "")
    assert (found.problem is None) == (problem is None)


def test_a_list_in_other_words_has_the_query_behind_it(fake: FakeNvidia) -> None:
    fake.say("Gpu #0 (GPU-1)\n", query="GPU-1, NVIDIA A100, 0\n")
    assert listing().gpus == (Gpu(0, "NVIDIA A100", "GPU-1"),)


def test_exit_codes_that_tell_of_one_gpu_do_not_hide_the_others(fake: FakeNvidia) -> None:
    fake.say(SINCE_R470, code=14)  # a corrupted infoROM
    assert len(listing().gpus) == 3


def test_one_that_hangs(fake: FakeNvidia, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus_module, "ANSWER_SECONDS", 0.2)
    fake.hang()
    with pytest.raises(WorldError, match=r"nvidia-smi did not answer within 0 s: .*stuck"):
        listing()


def test_none_installed_or_not_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not listing().installed
    broken = tmp_path / "nvidia-smi"
    broken.write_text("no program")
    broken.chmod(0o755)
    assert (listing().problem or "").startswith("nvidia-smi: cannot be started")


FOUND = tuple(Gpu(number, "A100", gpu.uuid) for number, gpu in enumerate(map(FakeGpu, range(4))))
UUIDS = [gpu.uuid for gpu in FOUND]


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 3 , 1 ", [3, 1]),
        ("0,2,-1,1", [0, 2]),
        ("0,9,1", [0]),
        ("1,1", []),
        (UUIDS[2], [2]),
        (f"{UUIDS[2]},{UUIDS[0]}", [2, 0]),
        (UUIDS[1][:12], [1]),
        (f"{UUIDS[1]},{UUIDS[1][:12]}", []),
        ("GPU-", []),
        ("GPU-ffffffff", []),
        ("MIG-ffffffff", []),
        ("0x1", []),
        ("²", []),
    ],
)
def test_what_the_variable_leaves(variable: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible(FOUND, variable)] == indices


def test_mig_devices_by_their_gpu_and_by_themselves() -> None:
    found = parse_list(SINCE_R470)
    assert visible(found, "0") == found[:2]
    assert visible(found, "1,0") == (found[2], *found[:2])
    assert visible(found, found[0].parent) == found[:2]
    assert visible(found, found[1].uuid) == (found[1],)
    assert visible(found, "MIG-5386") == (found[1],)
    assert visible(found, f"{found[1].uuid},{found[2].uuid}") == (found[1], found[2])
    assert visible(found, "0,0") == ()
    old = parse_list(MIG_USER_GUIDE)
    assert visible(old, old[1].uuid) == (old[1],)
    assert visible(old, old[1].uuid.split("/")[0]) == ()  # not clear which


def test_the_fake_from_a_shell(tmp_path: Path) -> None:
    script = Path(__file__).with_name("fake_nvidia.py")
    made = subprocess.run(
        [sys.executable, script, tmp_path / "fake", "3"], capture_output=True, text=True, check=True
    )
    said = subprocess.run(
        [f"{made.stdout.strip()}/nvidia-smi", "-L"], capture_output=True, text=True, check=True
    )
    assert [gpu.uuid for gpu in parse_list(said.stdout)] == [gpu.uuid for gpu in gpus(3)]
