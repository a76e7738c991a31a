"""The operations as torch sees them: schemas and traces hold, backends agree, and what is not there is refused."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcache.kernels
from diffcache.errors import BadOption
from diffcache.kernels import FORMATS, library
from diffcache.kernels.dequantize import dequantize
from diffcache.kernels.examples import Tensors
from diffcache.kernels.library import check_backend, in_use, operations
from diffcache.kernels.quantize import quantize

OPERATIONS = operations()

every_one = pytest.mark.parametrize("name", OPERATIONS)
of_every_format = pytest.mark.parametrize("format", FORMATS)
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def arguments(name: str, format: str, *, full: bool, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For the operation of this name: as few as it takes, or all there are."""
    args, options = example(name).arguments(Tensors.drawn(format, device))
    return args, options if full else {}


def example(name: str) -> Any:
    return importlib.import_module(f"diffcache.kernels.{name}.example")


def results(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """As numbers that can be compared: torch has no comparison of eight-bit floats."""
    return [t.float() for t in ([found] if isinstance(found, Tensor) else found)]


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(results(found), results(expected), rtol=0, atol=0)


def test_a_new_folder_is_a_new_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"dequantize", "predict", "quantize", "residual_modulate", "residual_quantize"} <= OPERATIONS.keys()
    assert OPERATIONS["dequantize"] is dequantize
    assert "tiles" not in OPERATIONS  # a file is not an operation
    (tmp_path / "negate_of_tests").mkdir()
    (tmp_path / "negate_of_tests" / "__init__.py").write_text("negate_of_tests = 'the operation'\n")
    monkeypatch.setattr(diffcache.kernels, "__path__", [*diffcache.kernels.__path__, str(tmp_path)])
    assert operations() == OPERATIONS | {"negate_of_tests": "the operation"}


@every_one
@of_every_format
@pytest.mark.parametrize("full", [False, True])
def test_schema_and_traces_hold(name: str, format: str, full: bool) -> None:
    args, kwargs = arguments(name, format, full=full)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if format != "fp8":  # torch has no comparison of eight-bit floats
        checks.append("test_schema")
    torch.library.opcheck(OPERATIONS[name]._op, args, kwargs, test_utils=checks)


@every_one
@of_every_format
def test_a_compiled_caller_stays_one_graph_and_gets_the_same(name: str, format: str) -> None:
    operation = OPERATIONS[name]
    args, kwargs = arguments(name, format, full=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: operation(*args, **kwargs), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(), operation(*args, **kwargs))


@every_one
def test_a_caller_compiled_by_inductor_gets_the_same(name: str) -> None:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    operation = OPERATIONS[name]
    args, kwargs = arguments(name, "int8", full=True)
    torch._dynamo.reset()

    def caller(*args: Any, **kwargs: Any) -> list[Tensor]:
        found = operation(*args, **kwargs)
        return [t.float() * 2 for t in ([found] if isinstance(found, Tensor) else found)]

    assert_equal(torch.compile(caller, fullgraph=True)(*args, **kwargs), caller(*args, **kwargs))


@every_one
def test_compiled_gives_what_torch_gives(name: str) -> None:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    args, kwargs = arguments(name, "int8", full=True)
    torch._dynamo.reset()
    found, expected = (results(OPERATIONS[name](*args, **kwargs, backend=b)) for b in ("compiled", "torch"))
    relative, absolute = example(name).CLOSE
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=relative, atol=absolute)


@pytest.mark.parametrize("length", [257, 258, 300])
def test_the_compiled_form_distinguishes_groups_of_every_length(length: int) -> None:
    """Groups of unequal lengths, and of lengths that no vector of a CPU has."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    torch._dynamo.reset()
    x = torch.randn(4, length)
    packed, expected = (results(quantize(x, "int8", backend=b)) for b in ("compiled", "torch"))
    assert_equal(packed, expected)
    args = expected[0].to(torch.int8), expected[1], "int8", length, torch.float32, None, x
    assert_equal(dequantize(*args, backend="compiled"), dequantize(*args, backend="torch"))


@every_one
@of_every_format
def test_auto_is_torch_on_a_cpu(name: str, format: str) -> None:
    args, kwargs = arguments(name, format, full=True)
    assert_equal(OPERATIONS[name](*args, **kwargs), OPERATIONS[name](*args, **kwargs, backend="torch"))
    assert in_use("auto", torch.device("cpu")) == "torch"


@without_a_gpu
@every_one
def test_triton_without_a_gpu_is_refused(name: str) -> None:
    if not importlib.util.find_spec("triton"):
        pytest.skip("needs triton")
    args, kwargs = arguments(name, "int8", full=True)
    with pytest.raises(BadOption, match=r"'triton'.*torch finds no GPU on this machine"):
        OPERATIONS[name](*args, **kwargs, backend="triton")
    with pytest.raises(BadOption, match="torch finds no GPU on this machine"):
        check_backend("triton")


def test_without_the_package_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "has_triton", lambda: False)
    with pytest.raises(BadOption, match="the package triton is not installed"):
        check_backend("triton")
    assert in_use("auto", torch.device("cuda")) == "torch"


def test_without_the_package_triton_tensors_on_a_gpu_take_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "has_triton", lambda: False)
    monkeypatch.setitem(sys.modules, "diffcache.kernels.quantize.kernel", None)
    args, kwargs = arguments("quantize", "int8", full=True)
    assert_equal(quantize._on_gpu(*args, **kwargs), quantize.plain(*args, **kwargs))


@pytest.mark.parametrize("backend", ["cuda", "", "Triton"])
def test_an_unknown_backend_is_named(backend: str) -> None:
    with pytest.raises(BadOption, match="'auto', 'torch', 'compiled', 'triton'"):
        check_backend(backend)


@every_one
def test_a_gpu_without_eight_bit_floats_takes_the_plain_form(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tiles = pytest.importorskip("diffcache.kernels.tiles")
    args, kwargs = arguments(name, "fp8", full=True)
    expected = OPERATIONS[name].plain(*args, **kwargs)
    monkeypatch.setattr(tiles, "compiles", lambda _how, _device: False)
    monkeypatch.setattr(tiles, "tiling", never)
    assert_equal(OPERATIONS[name]._on_gpu(*args, **kwargs), expected)


def never(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("a kernel was about to be launched")


@pytest.mark.parametrize(
    ("capability", "hip", "format", "expected"),
    [
        ((8, 0), None, "fp8", False),
        ((8, 6), None, "fp8", False),
        ((8, 9), None, "fp8", True),
        ((9, 0), None, "fp8", True),
        ((8, 0), None, "int8", True),
        ((8, 0), "7.0", "fp8", True),
    ],
)
def test_eight_bit_floats_need_a_gpu_that_has_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, format: str, expected: bool
) -> None:
    tiles = pytest.importorskip("diffcache.kernels.tiles")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert tiles.compiles(FORMATS[format], torch.device("cuda")) == expected


@pytest.mark.gpu
@every_one
@of_every_format
@pytest.mark.parametrize("full", [False, True])
def test_on_a_gpu_the_kernel_gives_what_torch_gives(name: str, format: str, full: bool) -> None:
    args, kwargs = arguments(name, format, full=full, device="cuda")
    found, expected = (results(OPERATIONS[name](*args, **kwargs, backend=b)) for b in ("triton", "torch"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=max(1e-4, example(name).CLOSE[0]), atol=1e-5)
