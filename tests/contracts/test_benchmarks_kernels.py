"""Scripts of ``benchmarks/kernels``: every row is there, bytes are those of the tensors, a wrong result stops them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

pytest.importorskip("diffusers", minversion="0.42")  # the first with all the caches that are measured

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "kernels"))

import flux_size
import operations
from measuring import Budget

import diffcache.kernels
from diffcache.kernels import FORMATS
from diffcache.kernels.examples import TimedTensors

SMALL = (16, 256)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations.SIZES, "1M", SMALL)
    monkeypatch.setattr(operations, "this_device", lambda: CPU)
    monkeypatch.setattr(flux_size, "this_device", lambda: CPU)


def table(path: Path) -> list[list[str]]:
    """Cells of every row of the file, heads and lines under them left out."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not row[-1].startswith(("-", "over uncompressed", "error"))]


def quick(out: Path, *more: str) -> operations.Bench:
    return operations.main(["--quick", "--repeats", "1", "--out", str(out), *more])


def test_every_operation_in_every_format_has_a_row(tmp_path: Path) -> None:
    out = tmp_path / "there" / "k.md"
    quick(out, "--no-compile")
    wanted = {(f"`{op}`", form) for op in operations.OPERATIONS for form in FORMATS}
    rows = table(out)
    assert {(row[0], row[2]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    assert all(float(row[5]) > 0 and row[4] == "–" for row in rows)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["circumstances"].keys() >= {"device", "torch", "triton"}
    assert len(record["rows"]) == len(rows)


PLANTED = {
    "__init__.py": """
from diffcache.kernels.library import Operation
from diffcache.kernels.halve_of_tests import twin

halve_of_tests = Operation("halve_of_tests", "(Tensor x) -> Tensor", twin.halve_of_tests)
""",
    "twin.py": """
def halve_of_tests(x):
    return x / 2
""",
    "example.py": """
from diffcache.kernels.examples import Variant

CLOSE = 0.0, 0.0
RETURNED = ("out",)


def arguments(t):
    return (t.x,), {}


TIMED = (Variant("x", 2, 0, lambda t, format: ((t.normal("x"),), {}), lambda t: t.normal("x").clone(), quick=True),)
""",
}


def test_a_new_kernel_is_timed_without_an_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels" / "halve_of_tests"
    folder.mkdir(parents=True)
    for name, text in PLANTED.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(diffcache.kernels, "__path__", [*diffcache.kernels.__path__, str(folder.parent)])
    again = importlib.util.spec_from_file_location("operations_again", operations.__file__)
    assert again is not None
    assert again.loader is not None
    module = importlib.util.module_from_spec(again)
    monkeypatch.setitem(sys.modules, "operations_again", module)
    try:
        again.loader.exec_module(module)
        monkeypatch.setitem(module.SIZES, "1M", SMALL)
        monkeypatch.setattr(module, "this_device", lambda: CPU)
        out = tmp_path / "k.md"
        arguments = ["--quick", "--repeats", "1", "--no-compile", "--formats", "int8", "--out", str(out)]
        module.main([*arguments, "--ops", "halve_of_tests"])
        assert [row[:3] for row in table(out)] == [["`halve_of_tests`", "x", "int8"]]
        monkeypatch.setitem(
            module.OPERATIONS, "halve_of_tests", Wrong(module.OPERATIONS["halve_of_tests"], many_values)
        )
        with pytest.raises(module.WrongResult, match="out is not the plain form's"):
            module.main([*arguments, "--ops", "halve_of_tests"])
    finally:
        for name in [name for name in sys.modules if name.startswith("diffcache.kernels.halve_of_tests")]:
            del sys.modules[name]
        vars(diffcache.kernels).pop("halve_of_tests", None)


def test_on_a_cpu_ours_is_compiled_and_right(tmp_path: Path) -> None:
    bench = quick(tmp_path / "k.md", "--formats", "int8", "--ops", "dequantize")
    (row,) = bench.rows
    assert bench.backend == "compiled"
    assert row.compile_ms == row.ours_ms > 0


def test_torch_compile_is_compared_with_code_that_is_not_compiled(tmp_path: Path) -> None:
    bench = operations.Bench(CPU, "torch", 1, 2**20, tmp_path / "k.md")
    variants = [v for v in operations.VARIANTS if v.op == "residual_modulate"]
    operations.run(bench, ["1M"], ["int4"], variants, Budget(1))
    assert [row.compile_ms for row in bench.rows] == [None]
    operations.beside_compiled(bench, variants, Budget(1))
    assert (bench.rows[0].compile_ms or 0) > 0
    assert [row[4] for row in table(tmp_path / "k.md")] == [f"{bench.rows[0].compile_ms:.3f}"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("timed", operations.VARIANTS, ids=lambda v: f"{v.op}-{v.name}")
def test_bytes_at_least_are_those_of_the_tensors(timed: operations.Timed, form: str) -> None:
    data = TimedTensors((32, 1152), CPU)
    args, kwargs = timed.how.arguments(data, form)
    result = operations.OPERATIONS[timed.op].plain(*args, **kwargs)
    tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
    moved = sum(t.nbytes for t in tensors if len(t) == 32)  # those of every row: vectors are left out
    assert timed.how.moved(data.shape, form) == moved
    assert math.prod(pytree.tree_leaves(timed.how.uncompressed(data))[0].shape) == math.prod(data.shape)


class Wrong:
    """An operation whose fast form spoils its results."""

    def __init__(self, operation: Any, spoil: Any) -> None:
        self._operation, self._spoil = operation, spoil
        self.plain = operation.plain

    def __call__(self, *args: Any, backend: str, **kwargs: Any) -> Any:
        result = self.plain(*args, **kwargs)
        results = [result.clone()] if isinstance(result, Tensor) else [t.clone() for t in result]
        self._spoil(results)
        return results[0] if isinstance(result, Tensor) else tuple(results)


def one_value(index: int, value: float) -> Any:
    return lambda results: results[index].view(-1)[5:6].fill_(value)


def many_values(results: list[Tensor]) -> None:
    results[0].view(-1)[::100].mul_(1 + 2**-6)  # a rounding or two, of too many


FAULTS = {
    "an output": ("dequantize", one_value(0, 1e3), "out"),
    "an output that is no number": ("predict", one_value(0, math.nan), "out"),
    "roundings": ("residual_quantize", many_values, "out"),
    "codes": ("quantize", lambda results: results[0].view(torch.uint8)[3, 8:16].bitwise_xor_(0x22), "codes"),
    "scales": ("residual_quantize", lambda results: results[2].mul_(1.001), "scales"),
    "the normalised": ("residual_modulate", lambda results: results[1].neg_(), "y"),
    "a length": ("residual_modulate", lambda results: results.__setitem__(0, results[0][:-1]), "out"),
}


@pytest.mark.parametrize(
    ("fault", "form"),
    [(fault, form) for fault in FAULTS for form, how in FORMATS.items() if fault != "scales" or how.group],
)
def test_a_wrong_result_stops_before_anything_is_timed(
    fault: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, spoil, which = FAULTS[fault]
    monkeypatch.setitem(operations.OPERATIONS, name, Wrong(operations.OPERATIONS[name], spoil))
    with pytest.raises(operations.WrongResult, match=f"{name}.*{form}.*{which} is not the plain form's"):
        quick(tmp_path / "k.md", "--no-compile", "--ops", name, "--formats", form)
    assert not (tmp_path / "k.md").exists()


def test_wrong_sums_stop_too() -> None:
    (timed,) = (v for v in operations.VARIANTS if v.name == "difference, drift sums")
    args, kwargs = timed.how.arguments(TimedTensors(SMALL, CPU), "int8")
    right = operations.OPERATIONS["quantize"].plain(*args, **kwargs)
    operations.check(timed, "int8", right, right)
    for column in range(6):
        wrong = right[2].clone()
        wrong[1, column] *= 1.1
        with pytest.raises(operations.WrongResult, match="sums"):
            operations.check(timed, "int8", right, (*right[:2], wrong))


def test_what_is_done_when_time_is_over_is_kept(tmp_path: Path) -> None:
    bench = quick(tmp_path / "k.md", "--no-compile", "--minutes", "0")
    assert bench.rows == []
    assert "Time was over" in (tmp_path / "k.md").read_text()


@pytest.fixture
def int4_sums() -> Any:
    pytest.importorskip("triton")
    return import_module("int4_sums")


def test_every_choice_of_arguments_has_a_row_that_is_right(int4_sums: Any, tmp_path: Path) -> None:
    out = tmp_path / "s.md"
    rows = int4_sums.main(["--quick", "--out", str(out)])
    assert all(row.right for row in rows)
    assert {(row.length, row.previous, row.prescale, row.minus) for row in rows} == {
        (length, *choices) for length in int4_sums.QUICK for choices in itertools.product((False, True), repeat=3)
    }
    assert {row.found["sums"] for row in rows if row.previous} == {"same"}
    assert {row.found["sums"] for row in rows if not row.previous} == {"–"}
    assert "0 of 16 calls differ" in out.read_text()
    assert len(json.loads(out.with_suffix(".json").read_text())["rows"]) == 16


def test_sums_that_see_masked_lanes_have_a_row_that_says_so(
    int4_sums: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = int4_sums.kernel.launch

    def with_masked_codes(*args: Any, **kwargs: Any) -> Any:
        codes, scales, sums = right(*args, **kwargs)
        sums[:, :4] += 2.0
        return codes, scales, sums

    monkeypatch.setattr(int4_sums.kernel, "launch", with_masked_codes)
    rows = int4_sums.main(["--quick", "--out", str(tmp_path / "s.md")])
    assert {row.right for row in rows if row.previous} == {False}
    assert {row.right for row in rows if not row.previous} == {True}
    assert "8 of 16 calls differ" in (tmp_path / "s.md").read_text()
    assert "of 12 values are off, by up to 2" in rows[-1].found["sums"]


def settings_of(rows: list[list[str]], method: str) -> list[str]:
    return [row[1] for row in rows if method in row[0]]


def test_every_method_has_a_row_that_ran(tmp_path: Path) -> None:
    pytest.importorskip("cache_dit")
    out = tmp_path / "f.md"
    bench = flux_size.main(["--steps", "6", "--repeats", "1", "--out", str(out)])
    assert [row.failed for row in bench.rows] == [""] * len(bench.rows)
    rows = table(out)
    assert len(rows) == len(bench.rows)
    for sites in ("", ",sites=block", ",sites=stack"):
        assert {f"`uniform:every={n}{sites}`" for n in (2, 3, 4)} <= set(settings_of(rows, "diffcache"))
    stores = {row[2] for row in rows if row[1] == "`taylorseer:every=3,order=1,sites=block`"}
    assert stores == {"as it is", "bf16", "int8"}
    assert len(settings_of(rows, "DBCache")) == 4
    assert len(settings_of(rows, "FirstBlockCache")) == 3
    assert len(settings_of(rows, "full run")) == 2
    full, again = bench.rows[0], bench.rows[-1]
    assert full.error == again.error == 0
    assert all(0 < row.error < 1 for row in bench.rows[1:-1])
    kept = {row.store: row.cache_bytes for row in bench.rows if row.setting == "`uniform:every=2,sites=block`"}
    assert 0 < kept["int8"] < kept["bf16"]
    assert json.loads(out.with_suffix(".json").read_text())["network"]["parameters"] == bench.parameters


@pytest.mark.parametrize("computed", [14, 10, 7])
def test_computed_steps_are_those_that_were_asked_for(computed: int, tmp_path: Path) -> None:
    size = flux_size.replace(flux_size.TINY_SIZE, layers=2, single_layers=2)
    bench = flux_size.Bench(size, CPU, 28, 1, Budget(1), tmp_path / "f.md")
    bench.measure(flux_size.FULL)
    bench.measure(flux_size.ours(f"uniform:every={math.ceil(28 / computed)}"))
    assert bench.rows[1].computed == computed
    assert bench.rows[1].ideal == 28 / computed


def test_a_method_that_does_not_run_says_why_and_the_others_run(tmp_path: Path) -> None:
    out = tmp_path / "f.md"
    bench = flux_size.Bench(flux_size.TINY_SIZE, CPU, 3, 1, Budget(1), out)
    for case in (flux_size.FULL, flux_size.ours("uniform:every=2", "int3"), flux_size.ours("uniform:every=2")):
        bench.measure(case)
    _, broken, last = bench.rows
    assert broken.failed.startswith("BadOption")
    assert "int3" in broken.failed
    assert not last.failed
    assert f"did not run: {broken.failed}" in out.read_text()


def test_flux_size_begins_nothing_that_time_does_not_allow(tmp_path: Path) -> None:
    bench = flux_size.Bench(flux_size.TINY_SIZE, CPU, 3, 1, Budget(0), tmp_path / "f.md")
    bench.measure(flux_size.FULL)
    assert bench.rows == []
    assert "Time was over" in bench.remark


def test_flux_1_has_twelve_billion_parameters() -> None:
    size = flux_size.REAL_SIZE
    with torch.device("meta"):
        network = flux_size.diffusers.FluxTransformer2DModel(
            num_layers=size.layers, num_single_layers=size.single_layers, guidance_embeds=True, **size.over
        )
    assert 11.8e9 < sum(p.numel() for p in network.parameters()) < 12.1e9
    assert (size.tokens, size.text) == (4096, 512)
