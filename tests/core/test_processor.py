"""What the CPU tells of itself."""

from __future__ import annotations

import pytest

from headsearch.core import processor
from headsearch.core.hardware import hardware

PLAIN = "processor\t: 0\nmodel name\t: A CPU of 2015\nflags\t\t: fpu sse2 avx2\nbugs\t\t: avx512_bf16\n"


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Where this machine's CPU is told of, and not yet."""
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("sse2", False),
        ("avx512f avx512_vnni", False),
        ("avx512f avx512_bf16 sha_ni", True),
        ("amx_bf16 amx_tile", True),
        ("not_avx512_bf16_yet", False),
    ],
)
def test_bf16_is_native_where_a_flag_says_so(told, flags, native):
    told.write_text(PLAIN.replace("avx2", flags))
    assert processor.cpu_multiplies_bf16() == native
    [cpu] = [device for device in hardware().devices if device.name == "cpu"]
    assert cpu.native_bf16 == native
    # Faster, and a little less accurate: nobody gets it unasked.
    assert cpu.precision == "fp32"


def test_a_system_that_does_not_tell_has_a_name_and_no_bf16(told):
    assert not processor.cpu_multiplies_bf16()
    assert processor.cpu_model()
    told.write_text(PLAIN)
    assert processor.cpu_model() == "A CPU of 2015"
