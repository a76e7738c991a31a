"""Triton kernels against the plain forms that specify them, in Triton's interpreter: the same bits.

New memory is full of NaN here, so a value that a kernel leaves unwritten shows. Masked lanes are full of garbage, so a
result that depends on them shows. On a GPU the same comparisons run on the hardware.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from interpreter import masked_lanes_full_of_garbage, recorded_writes, rounding
from torch import Tensor

from diffcache.kernels import FORMATS
from diffcache.kernels.examples import Tensors
from diffcache.kernels.library import operations
from diffcache.kernels.quantize import twin as quantize_twin

pytest.importorskip("triton")

import triton
import triton.language as tl

from diffcache.kernels.tiles import PER_THREAD, tiling_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(5, 1152), (33, 256), (1, 130), (5, 257), (5, 96), (33, 36), (5, 7), (5, 1), (0, 256), (5, 0), (0, 0)]

of_every_format = pytest.mark.parametrize("format", FORMATS)
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
with_scales = pytest.mark.parametrize("format", [name for name, how in FORMATS.items() if how.group])
of_every_shape = pytest.mark.parametrize(("count", "length"), SHAPES)
of_every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.fixture(autouse=True)
def as_on_hardware() -> Iterator[None]:
    if DEVICE == "cuda":
        yield
        return
    with rounding(), masked_lanes_full_of_garbage():
        yield


@pytest.fixture(autouse=True)
def memory_full_of_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_new_memory_is_full_of_nan() -> None:
    assert bool(torch.empty(0).new_empty(9, dtype=torch.bfloat16).isnan().all())
    assert bool((torch.empty(0).new_empty(9, dtype=torch.int8) == 127).all())


def both(operation: str, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernel gives, and what the plain form gives."""
    plain = getattr(import_module(f"diffcache.kernels.{operation}.twin"), operation)
    kernel = import_module(f"diffcache.kernels.{operation}.kernel").launch
    found, expected = kernel(*args, **kwargs), plain(*args, **kwargs)
    single = isinstance(found, Tensor)
    return ([found], [expected]) if single else (list(found), list(expected))


def assert_same(found: Tensor, expected: Tensor, what: str = "") -> None:
    """The same bits, but for those of NaN and the sign of zero."""
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device), what
    assert found.is_contiguous(), what
    values, right = found.double() if found.dtype.is_floating_point else found, expected.to(torch.float64)
    off = (values.to(torch.float64) != right) & ~(values.isnan() & right.isnan())
    assert not bool(off.any()), (
        f"{what}: {int(off.sum())} of {off.numel()} differ, first at {off.nonzero()[0].tolist()}"
    )


def assert_all_same(pair: tuple[list[Tensor], list[Tensor]]) -> None:
    for number, (found, expected) in enumerate(zip(*pair, strict=True)):
        assert_same(found, expected, f"result {number}")


def assert_no_more_than_a_unit_off(found: Tensor, expected: Tensor) -> None:
    """In the last place of the result's dtype."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    unit = max(torch.finfo(found.dtype).eps, 2e-6)  # sums in another order
    torch.testing.assert_close(found, expected, rtol=unit, atol=4e-6, equal_nan=True)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def centre_and_spread(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([torch.randn(length), torch.rand(length) + 0.5]).to(DEVICE, dtype)


def kept(format: str, count: int, length: int, prescale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes, scales, _ = quantize_twin.quantize(normal(count, length), format, None, prescale)
    return codes, scales


@of_every_format
@of_every_shape
@of_every_dtype
def test_quantize(format: str, count: int, length: int, dtype: torch.dtype) -> None:
    assert_all_same(both("quantize", normal(count, length, dtype=dtype), format))


@of_every_format
@of_every_shape
def test_quantize_of_a_difference_prescaled(format: str, count: int, length: int) -> None:
    x, minus = normal(count, length, dtype=torch.bfloat16), normal(count, length, dtype=torch.float16)
    assert_all_same(both("quantize", x, format, minus))
    for dtype in (torch.float32, torch.bfloat16):
        assert_all_same(both("quantize", x, format, minus, centre_and_spread(length, dtype)))


@of_every_format
@pytest.mark.parametrize(
    ("count", "length", "samples"),
    [(6, 1152, 2), (33, 256, 3), (8, 256, 8), (5, 257, 1), (6, 96, 3), (6, 36, 2), (4, 7, 2), (4, 1, 2), (0, 9, 1)],
)
@pytest.mark.parametrize("prescaled", [False, True])
def test_quantize_says_how_far_each_sample_moved(
    format: str, count: int, length: int, samples: int, prescaled: bool
) -> None:
    prescale = centre_and_spread(length, torch.bfloat16) if prescaled else None
    before = kept(format, count, length, prescale)
    x = normal(count, length) * torch.arange(1, count + 1, device=DEVICE).unsqueeze(1)  # no sample is like another
    found, expected = both("quantize", x, format, normal(count, length), prescale, *before, samples=samples)
    for what in range(2):
        assert_same(found[what], expected[what])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)


@of_every_format
@pytest.mark.parametrize("length", [130, 131, 256, 260, 261, 1000])
def test_sums_see_no_value_outside_of_rows(format: str, length: int) -> None:
    """Groups of these lengths leave lanes masked in every part, read as vectors of one to eight bytes."""
    found, expected = both("quantize", normal(4, length), format, None, None, *kept(format, 4, length), samples=2)
    assert_all_same((found[:2], expected[:2]))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)


@triton.jit
def as_it_is(values, _inside):  # type: ignore[no-untyped-def]
    return values


@without_a_gpu
@pytest.mark.parametrize(
    ("operation", "format"),
    [
        (operation, format)
        for operation in ("quantize", "residual_quantize", "residual_modulate")
        for format in FORMATS
        if (operation, format) != ("residual_quantize", "bf16")  # reduces nothing
    ],
)
def test_garbage_in_masked_lanes_is_noticed(monkeypatch: pytest.MonkeyPatch, operation: str, format: str) -> None:
    monkeypatch.setattr(import_module(f"diffcache.kernels.{operation}.kernel"), "zero_outside", as_it_is)
    x, packed = normal(4, 261), kept(format, 4, 261)
    args = {
        "quantize": (x, format, None, None, *packed),
        "residual_quantize": (x, x, format),
        "residual_modulate": (x, *packed, format),
    }[operation]
    with pytest.raises(AssertionError):
        assert_all_same(both(operation, *args))


@triton.jit
def everyone_writes_one_place(x):  # type: ignore[no-untyped-def]
    tl.store(x, 1.0)


@without_a_gpu
def test_a_byte_that_two_programs_write_is_noticed() -> None:
    with recorded_writes() as found:
        everyone_writes_one_place[2,](torch.zeros(1))
    assert len(found) == 8
    assert len(set(found)) == 4


@without_a_gpu
@of_every_format
@pytest.mark.parametrize("length", [7, 256, 261])
def test_no_byte_is_written_twice(format: str, length: int) -> None:
    """Neither by two programs nor by the two halves of a group of four bits."""
    x, packed, count = normal(6, length), kept(format, 6, length), 6 * length
    sizes = FORMATS[format].nbytes(x.shape)
    calls: list[tuple[int, tuple[Any, ...]]] = [
        (sizes, ("quantize", x, format)),
        (sizes + 4 * count, ("residual_quantize", x, x, format)),
        (4 * count, ("dequantize", *packed, format, length, torch.float32)),
        (4 * count, ("predict", [packed[0]], [packed[1]], [1.5], format, length, torch.float32)),
        (8 * count, ("residual_modulate", x, *packed, format)),
    ]
    for size, (operation, *args) in calls:
        with recorded_writes() as found:
            import_module(f"diffcache.kernels.{operation}.kernel").launch(*args)
        assert len(found) == len(set(found)) == size, operation


def test_sums_of_many_programs_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.kernels.quantize import kernel

    monkeypatch.setattr(kernel, "AT_ONCE", 2)
    x = normal(40, 256)
    found, expected = both("quantize", x, "int8", None, None, *kept("int8", 40, 256))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)


@without_a_gpu
@pytest.mark.parametrize("operation", operations())
@of_every_format
def test_every_kernel_of_the_folder_gives_what_its_plain_form_gives(operation: str, format: str) -> None:
    example = import_module(f"diffcache.kernels.{operation}.example")
    torch.manual_seed(0)
    args, options = example.arguments(Tensors.drawn(format))
    relative, absolute = (max(1e-4, bound) for bound in example.CLOSE)
    for given in ({}, options):
        for found, expected in zip(*both(operation, *args, **given), strict=True):
            torch.testing.assert_close(found.float(), expected.float(), rtol=relative, atol=absolute)


@of_every_format
@of_every_shape
@pytest.mark.parametrize(("dtype", "of_f"), list(zip(FLOATS, FLOATS[1:] + FLOATS[:1], strict=True)), ids=str)
def test_residual_quantize(format: str, count: int, length: int, dtype: torch.dtype, of_f: torch.dtype) -> None:
    x, f = normal(count, length, dtype=dtype), normal(count, length, dtype=of_f)
    assert_all_same(both("residual_quantize", x, f, format))


@of_every_format
@pytest.mark.parametrize(
    ("count", "length", "samples"), [(6, 1152, 2), (33, 36, 3), (5, 130, 5), (4, 7, 1), (6, 256, 3), (0, 8, 1)]
)
def test_residual_quantize_of_gated_samples(format: str, count: int, length: int, samples: int) -> None:
    x, f = normal(count, length, dtype=torch.bfloat16), normal(count, length)
    gate = normal(samples, length, dtype=torch.float16)
    assert_all_same(both("residual_quantize", x, f, format, gate, centre_and_spread(length, torch.bfloat16)))


@of_every_format
@of_every_shape
@of_every_dtype
def test_dequantize(format: str, count: int, length: int, dtype: torch.dtype) -> None:
    packed = kept(format, count, length)
    assert_all_same(both("dequantize", *packed, format, length, dtype))
    add = normal(count, length, dtype=torch.bfloat16)
    assert_all_same(both("dequantize", *packed, format, length, dtype, centre_and_spread(length), add))


@of_every_format
@pytest.mark.parametrize("anchors", range(1, 10))  # nine: more than the kernel has pointers for
@pytest.mark.parametrize(("count", "length"), [(4, 256), (3, 257), (3, 7)])
def test_predict_from_anchors(format: str, anchors: int, count: int, length: int) -> None:
    codes, scales = zip(*(kept(format, count, length) for _ in range(anchors)), strict=True)
    weights = torch.linspace(-1.7, 2.3, anchors).tolist()
    assert_all_same(both("predict", codes, scales, weights, format, length, torch.float32))
    prescale = torch.stack([centre_and_spread(length, torch.bfloat16) for _ in range(anchors)])
    assert_all_same(both("predict", codes, scales, weights, format, length, torch.bfloat16, prescale))


@of_every_format
@of_every_shape
@pytest.mark.parametrize(("per", "dtype"), list(zip(("column", "row", "both"), FLOATS, strict=True)))
def test_predict_in_full(format: str, count: int, length: int, dtype: torch.dtype, per: str) -> None:
    if not length:
        per = "column"
    prescale = torch.stack([centre_and_spread(length), centre_and_spread(length)])
    codes, scales = zip(*(kept(format, count, length, own) for own in prescale), strict=True)
    x = normal(count, length, dtype=torch.bfloat16)
    of_rows, of_columns = normal(max(1, count), 1), normal(1, length)
    scale, bias = {
        "column": (of_columns, of_columns * 2),
        "row": (of_rows, of_rows + 1),
        "both": (of_rows, of_columns),
    }[per]
    args = codes, scales, [2.0, -1.0], format, length, dtype, prescale, x, 0.3, scale, bias
    assert_all_same(both("predict", *args))


@of_every_format
@pytest.mark.parametrize(("of_scale", "of_bias"), [(2, 2), (3, 2), (1, 3), (6, 1), (12, 4), (1, 1)])
@pytest.mark.parametrize("length", [256, 7, 1])
def test_predict_begins_again_after_the_rows_that_have_coefficients(
    format: str, of_scale: int, of_bias: int, length: int
) -> None:
    packed = kept(format, 12, length)
    args = [packed[0]], [packed[1]], [1.5], format, length, torch.float32
    assert_all_same(both("predict", *args, scale=normal(of_scale, 1), bias=normal(of_bias, 1)))
    assert_all_same(both("predict", *args, bias=normal(of_bias, 1)))


def test_predict_takes_a_coefficient_for_every_value() -> None:
    codes, scales = kept("int8", 6, 40)
    assert_all_same(both("predict", [codes], [scales], [1.5], "int8", 40, torch.float32, scale=normal(3, 40)))


@of_every_format
@pytest.mark.parametrize(("count", "length"), [(min(count, 5), length) for count, length in SHAPES])  # a row a program
@of_every_dtype
def test_residual_modulate(format: str, count: int, length: int, dtype: torch.dtype) -> None:
    x = normal(count, length, dtype=dtype)
    found, expected = both("residual_modulate", x, *kept(format, count, length), format)
    assert_same(found[0], expected[0])
    assert_no_more_than_a_unit_off(found[1], expected[1])


@of_every_format
@pytest.mark.parametrize(
    ("count", "length", "samples"),
    [(6, 1152, (2, 3, 1)), (5, 130, (1, 5, 1)), (8, 36, (4, 2, 2)), (6, 7, (2, 2, 2)), (2, 3072, (1, 1, 2))],
)
def test_residual_modulate_of_samples(format: str, count: int, length: int, samples: tuple[int, int, int]) -> None:
    x = normal(count, length, dtype=torch.bfloat16)
    gate, shift, scale = (normal(s, length, dtype=d) for s, d in zip(samples, FLOATS, strict=True))
    affine, packed = centre_and_spread(length), kept(format, count, length)
    found, expected = both("residual_modulate", x, *packed, format, gate, shift, scale, affine, eps=1e-3)
    assert_same(found[0], expected[0])
    assert_no_more_than_a_unit_off(found[1], expected[1])


def test_a_row_too_long_for_registers_is_left_to_the_plain_form() -> None:
    x = normal(1, 20_000)
    assert_all_same(both("residual_modulate", x, *kept("int8", 1, 20_000), "int8"))


def views(x: Tensor) -> dict[str, Tensor]:
    """With the same values as ``x``, laid out otherwise."""
    count, length = x.shape
    wide, tall = x.new_empty(count, length + 3), x.new_empty(2 * count, length)
    wide[:, 2:-1], tall[::2] = x, x
    return {"columns": x.t().contiguous().t(), "part of wider rows": wide[:, 2:-1], "every other row": tall[::2]}


@of_every_format
@pytest.mark.parametrize("length", [256, 257])
@pytest.mark.parametrize("name", views(torch.zeros(2, 2)))
def test_strides_do_not_matter(format: str, length: int, name: str) -> None:
    count = 4
    x, other, packed = normal(count, length), normal(count, length), kept(format, count, length)
    gate = normal(2, length)
    x_, other_, gate_ = (views(t)[name] for t in (x, other, gate))
    assert x_.stride() != x.stride()
    turned = centre_and_spread(length).t().contiguous().t()
    found, expected = both("quantize", x_, format, other_, turned, *packed)
    assert_all_same((found[:2], expected[:2]))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    assert_all_same(both("residual_quantize", x_, other_, format, gate_, turned))
    assert_all_same(both("dequantize", *packed, format, length, torch.bfloat16, turned, other_))
    row = turned[:1]
    args = [packed[0]], [packed[1]], [2.0], format, length, torch.float32, turned[None], x_, 0.3, row, row
    assert_all_same(both("predict", *args))
    found, expected = both("residual_modulate", x_, *packed, format, gate_, gate_, gate_, turned)
    assert_same(found[0], expected[0])
    assert_no_more_than_a_unit_off(found[1], expected[1])


@of_every_format
def test_rows_that_are_all_one_row(format: str) -> None:
    x, gate = normal(1, 257).expand(6, -1), normal(2, 1).expand(-1, 257)
    assert_all_same(both("residual_quantize", x, x, format, gate))


def test_rows_more_than_two_to_the_31_values_apart() -> None:
    if DEVICE == "cuda":
        memory = torch.zeros(2**31 + 2048, dtype=torch.bfloat16, device=DEVICE)
    else:  # only the pages that are touched exist
        memory = torch.frombuffer(mmap.mmap(-1, 2**32 + 4096), dtype=torch.bfloat16)
    x = memory.as_strided((5, 128), (2**29, 1))
    x.copy_(torch.randn(5, 128))
    assert_all_same(both("quantize", x, "int8"))
    assert_all_same(both("dequantize", *kept("int8", 5, 128), "int8", 128, torch.float32, add=x))


@of_every_format
def test_zeros_stay_zeros_and_small_rows_stay_finite(format: str) -> None:
    x = torch.zeros(4, 256, device=DEVICE)
    x[1], x[2, 3], x[3, 200] = 1e-44, 3e38, -1e-30
    assert_all_same(both("quantize", x, format))


@with_scales
@pytest.mark.parametrize(
    ("bad", "length"), [(float("nan"), 256), (float("nan"), 257), (float("inf"), 257), (-float("inf"), 7)]
)
def test_what_is_not_finite_is_seen_in_its_group_and_its_sample(format: str, bad: float, length: int) -> None:
    x, packed = normal(4, length), kept(format, 4, length)
    for column in {0, length // 2, length - 1}:
        spoiled = x.clone()
        spoiled[1, column] = bad
        found, expected = both("quantize", spoiled, format, None, None, *packed, samples=2)
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])
        assert found[1].isnan().nonzero().tolist() == [[1, column // FORMATS[format].group_of(length)]]
        assert not bool(found[2][0, [0, 2, 4, 5]].isfinite().any())
        assert bool(found[2][1].isfinite().all())
        back, right = both("dequantize", *found[:2], format, length, torch.float32)
        assert_same(back[0], right[0])
        _, *stored = both("residual_quantize", x, spoiled, format)[0]
        assert_same(stored[0], expected[0])
        assert_same(stored[1], expected[1])
        moved, rightly = both("residual_modulate", x, *found[:2], format)
        assert_same(moved[0], rightly[0])
        assert bool(moved[1][1].isnan().all())
        assert bool(moved[1][[0, 2, 3]].isfinite().all())


def test_bfloat16_keeps_what_is_not_finite_as_it_is() -> None:
    x = normal(3, 130)
    x[0, 1], x[1, 2], x[2, 3] = float("nan"), float("inf"), -float("inf")
    assert_all_same(both("quantize", x, "bf16"))


@of_every_format
def test_results_are_new(format: str) -> None:
    packed = kept(format, 4, 128)
    x = normal(4, 128, dtype=torch.bfloat16)
    results = [
        *both("dequantize", *packed, format, 128, torch.bfloat16)[0],
        *both("predict", [packed[0]], [packed[1]], [1.0], format, 128, torch.bfloat16)[0],
        *both("quantize", x, format)[0][:2],
        *both("residual_quantize", x, x, format)[0],
        *both("residual_modulate", x, *packed, format)[0],
    ]
    places = [t.data_ptr() for t in (*packed, x, *results) if t.numel()]
    assert len(set(places)) == len(places)


@of_every_format
@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("length", [*range(1, 12), 36, 96, 127, 128, 129, 130, 255, 256, 257, 1152, 3072, 5120, 16384])
def test_tiles_cover_rows_and_fill_threads(format: str, lanes: int, whole_rows: bool, length: int) -> None:
    how = FORMATS[format]
    for count in (1, 2, 5, 33, 10_000):
        t = tiling_for(lanes, how, 1 if whole_rows else count, length, whole_rows=whole_rows)
        parts = 2 if how.bits == 4 else 1
        assert length <= t.GROUP * t.GROUPS
        assert not how.group or (t.GROUP, t.GROUPS) == (how.group_of(length), how.groups(length))
        assert t.GROUP == t.WIDTH * parts
        assert t.WIDTH <= t.BLOCK
        assert t.TILE & (t.TILE - 1) == t.BLOCK & (t.BLOCK - 1) == t.num_warps & (t.num_warps - 1) == 0
        assert t.EVEN == (length % t.GROUP == 0 and t.WIDTH == t.BLOCK)
        assert t.programs(count) * t.TILE >= count * t.GROUPS > (t.programs(count) - 1) * t.TILE
        values = t.TILE * t.BLOCK * parts
        if whole_rows:
            assert t.TILE >= t.GROUPS
            assert t.num_warps * lanes <= 512
            assert values / (t.num_warps * lanes) <= 2 * PER_THREAD
        else:
            assert values <= 2048
            assert values / (t.num_warps * lanes) <= PER_THREAD or t.num_warps == 1


@pytest.mark.parametrize(("length", "warps"), [(1152, 4), (3072, 8), (5120, 16)])
def test_wider_rows_get_more_warps(length: int, warps: int) -> None:
    assert tiling_for(32, FORMATS["int8"], 1, length, whole_rows=True).num_warps == warps


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2**31 // 128 + 5])
def test_more_than_two_to_the_31_values(count: int) -> None:
    x = torch.zeros(count, 128, device="cuda", dtype=torch.bfloat16)
    x[-1] = normal(128)
    codes, scales, _ = import_module("diffcache.kernels.quantize.kernel").launch(x, "int8")
    expected = quantize_twin.quantize(x[-5:], "int8")
    assert_same(codes[-5:].clone(), expected[0])
    assert_same(scales[-5:].clone(), expected[1])


def test_kernels_run_in_the_interpreter_where_there_is_no_gpu() -> None:
    from triton.runtime import JITFunction

    from diffcache.kernels.quantize import kernel

    assert isinstance(kernel._quantize, JITFunction) == (DEVICE == "cuda")
