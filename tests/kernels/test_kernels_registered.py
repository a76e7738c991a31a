"""The operations as torch sees them: schemas and traces hold, backends agree, and what is not there is refused."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcache.errors import BadOption
from diffcache.kernels import library
from diffcache.kernels.dequantize import dequantize
from diffcache.kernels.formats import FORMATS
from diffcache.kernels.library import Operation, check_backend, in_use
from diffcache.kernels.predict import predict
from diffcache.kernels.quantize import quantize
from diffcache.kernels.residual_modulate import residual_modulate
from diffcache.kernels.residual_quantize import residual_quantize

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for operation in (quantize, residual_quantize, dequantize, predict, residual_modulate)
}
ROWS, LENGTH = 4, 261  # two groups of unequal length

every_one = pytest.mark.parametrize("name", OPERATIONS)
of_every_format = pytest.mark.parametrize("format", FORMATS)
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def arguments(name: str, format: str, *, full: bool, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For the operation of this name: as few as it takes, or all there are."""
    x = torch.randn(ROWS, LENGTH, dtype=torch.bfloat16, device=device)
    f, gate = torch.randn(ROWS, LENGTH, device=device), torch.randn(2, LENGTH, device=device)
    pair = torch.stack([torch.randn(LENGTH), torch.rand(LENGTH) + 0.5]).to(device)
    codes, scales, _ = quantize(f, format, backend="torch")
    args, options = {
        "quantize": (
            (x, format),
            {"minus": f, "prescale": pair, "previous_codes": codes, "previous_scales": scales, "samples": 2},
        ),
        "residual_quantize": ((x, f, format), {"gate": gate, "prescale": pair}),
        "dequantize": ((codes, scales, format, LENGTH, torch.bfloat16), {"affine": pair, "add": x}),
        "predict": (
            ([codes, codes.clone()], [scales, scales.clone()], [1.5, -0.5], format, LENGTH, torch.float32),
            {"prescale": torch.stack([pair, pair]), "x": x, "kappa": 0.3, "scale": gate[:1], "bias": f[:2, :1]},
        ),
        "residual_modulate": (
            (x, codes, scales, format),
            {"gate": gate, "shift": gate, "scale": gate, "affine": pair, "eps": 1e-5},
        ),
    }[name]
    return args, options if full else {}


def results(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """As numbers that can be compared: torch has no comparison of eight-bit floats."""
    return [t.float() for t in ([found] if isinstance(found, Tensor) else found)]


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(results(found), results(expected), rtol=0, atol=0)


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
    rounded = name == "residual_modulate"  # sums in another order, then rounded to bfloat16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7 if rounded else 1e-6, atol=1e-3 if rounded else 1e-6)


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
        torch.testing.assert_close(one, other, rtol=2**-7 if name == "residual_modulate" else 1e-4, atol=1e-5)
