"""What the kernels compile to, without a GPU.

Nothing spills, big tensors are read and written 128 bits at once, and masked lanes are filled with zeros.

A separate process compiles them: the interpreter, which the other tests run kernels in, is chosen at Triton's import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffcache.kernels.library import operations

triton = pytest.importorskip("triton")
if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
    pytest.skip("needs the cuobjdump that comes with Triton", allow_module_level=True)

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "ahead_of_time.py"
Figures = dict[str, Any]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, SCRIPT, "--json"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def kernels(printed: dict[str, Any]) -> list[Figures]:
    return printed["kernels"]  # type: ignore[no-any-return]


def spilling(figures: Figures) -> bool:
    return bool(figures["spills"])


def greedy(figures: Figures) -> bool:
    return bool(figures["registers"] > figures["most_registers"])


def narrow(figures: Figures) -> bool:
    """A big tensor read or written in pieces. Scales are one word a group; four bits have half the bytes to write."""
    store = 64 if figures["format"] == "int4" else 128
    pieces = (figures["narrowest_load"], figures["narrowest_store"])
    return figures["widest_load"] < 128 or figures["widest_store"] < store or min(pieces) < 32


def on_the_fast_path(figures: Figures) -> bool:
    return bool(figures["length"]) and figures["length"] % 128 == 0


def test_every_kernel_and_format_is_there_for_every_gpu(kernels: list[Figures]) -> None:
    found = {(k["operation"], k["format"], k["target"]) for k in kernels if k["format"]}
    formats = {"sm_80": {"bf16", "int8", "int4"}}
    expected = {
        (operation, format, target)
        for operation in operations()
        for target in ("sm_80", "sm_90", "gfx942")
        for format in formats.get(target, {"bf16", "int8", "fp8", "int4"})
    }
    assert found == expected


def test_nothing_spills(kernels: list[Figures]) -> None:
    assert [k for k in kernels if spilling(k)] == []


def test_no_kernel_needs_more_registers_than_it_may(kernels: list[Figures]) -> None:
    assert [k for k in kernels if greedy(k)] == []


def test_big_tensors_are_read_and_written_128_bits_at_once(kernels: list[Figures]) -> None:
    fast = [k for k in kernels if on_the_fast_path(k)]
    assert len(fast) > 60
    assert [k for k in fast if narrow(k)] == []


def test_the_many_sums_of_programs_are_read_128_bits_at_once(kernels: list[Figures]) -> None:
    second = [k for k in kernels if "second launch" in k["options"]]
    assert [k["widest_load"] for k in second] == [128] * 3


def test_tensors_that_do_not_begin_at_a_multiple_of_16_bytes_are_noticed(printed: dict[str, Any]) -> None:
    assert narrow(printed["faults"]["unaligned"])
    assert printed["faults"]["unaligned"]["widest_load"] < 128


def test_masked_lanes_are_filled_with_zeros(kernels: list[Figures]) -> None:
    read = [k for k in kernels if not k["target"].startswith("gfx")]
    assert len(read) > 40
    assert {k["filled"] for k in read} == {0}


def test_masked_lanes_filled_with_another_constant_are_noticed(printed: dict[str, Any]) -> None:
    assert printed["faults"]["filled"]["filled"]


def test_rows_too_wide_for_one_warp_are_noticed(printed: dict[str, Any]) -> None:
    assert spilling(printed["faults"]["few warps"])
    assert greedy(printed["faults"]["few warps"])


def test_rows_that_groups_do_not_fill_are_noticed(kernels: list[Figures]) -> None:
    uneven = [k for k in kernels if k["length"] == 130]
    assert len(uneven) == 3
    assert all(map(narrow, uneven))
