"""Formats of kept tensors: errors within what a format promises, bytes as it says, nothing hidden."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache.errors import UnknownName
from diffcache.kernels import FORMATS, Format, format_of, pack, packed_bytes, unpack
from diffcache.kernels.formats import rows

pytestmark = pytest.mark.fast

every = pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
with_scales = pytest.mark.parametrize("how", [f for f in FORMATS.values() if f.group], ids=lambda how: how.name)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=5) | st.tuples(st.integers(1, 3), st.integers(120, 300))


def of_each_value(scales: torch.Tensor, how: Format, shape: torch.Size) -> torch.Tensor:
    """The scale that every value has."""
    length = rows(shape)[1]
    return scales.repeat_interleave(how.group_of(length), dim=1)[:, :length].reshape(shape)


@with_scales
@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_no_value_is_further_off_than_promised(how: Format, shape: list[int], seed: int, dtype: torch.dtype) -> None:
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5 - 2)).to(dtype)
    packed = pack(x, how)
    found = unpack(packed)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    centre, spread = (torch.zeros(()), torch.ones(())) if packed.prescale is None else packed.prescale.float()
    scale = of_each_value(packed.scales, how, x.shape) * spread
    step = scale / 2 if how.name != "fp8" else torch.maximum((x.float() - centre).abs() / 16, scale / 512)
    rounding = torch.finfo(dtype).eps * (x.float().abs() + centre.abs() + scale) + torch.finfo(dtype).tiny
    assert bool(((found.float() - x.float()).abs() <= step * (1 + 1e-5) + rounding).all())


@every
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 96),
        (2, 5, 1152),
        (4, 128, 40),
        (600, 130),
        (3, 130),
        (2, 4, 16, 12),
        (1, 3, 2, 8, 8),
        (7,),
        (2, 0),
        (0, 3),
    ],
)
def test_bytes_are_those_that_are_kept(how: Format, shape: tuple[int, ...]) -> None:
    packed = pack(torch.randn(shape), how)
    own = 0 if packed.prescale is None else packed.prescale.nbytes
    assert packed_bytes(shape, how) == packed.nbytes == packed.codes.nbytes + packed.scales.nbytes + own
    assert how.nbytes(shape) == packed.nbytes - own
    assert torch.equal(unpack(packed), unpack(packed))


@pytest.mark.parametrize(("name", "most"), [("bf16", 1.0), ("int8", 0.52), ("fp8", 0.52), ("int4", 0.28)])
def test_wide_tensors_take_that_part_of_their_bytes_in_bfloat16(name: str, most: float) -> None:
    x = torch.randn(2, 256, 3072, dtype=torch.bfloat16)
    assert pack(x, FORMATS[name]).nbytes <= most * x.nbytes


@pytest.mark.parametrize(("name", "error"), [("int8", 0.0065), ("fp8", 0.026), ("int4", 0.118)])
def test_the_error_of_a_gaussian_is_the_known_one(name: str, error: float) -> None:
    x = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    off = unpack(pack(x, FORMATS[name])) - x
    assert float(off.norm() / x.norm()) == pytest.approx(error, rel=0.05)


def test_bfloat16_is_the_cast() -> None:
    x = torch.randn(3, 5, 70) * 1e3
    x[0, 0, 0] = float("inf")
    assert torch.equal(unpack(pack(x, FORMATS["bf16"])), x.bfloat16().float())


@with_scales
def test_a_prescale_takes_outlying_channels_off_the_others(how: Format) -> None:
    x = torch.randn(2, 64, 256)
    x[..., :6] = x[..., :6] * 30 + 100
    none = torch.tensor([[0.0], [1.0]]).expand(2, 256)
    given = torch.stack([x.mean((0, 1)), x.std((0, 1))])
    plain, scaled, own = ((unpack(pack(x, how, prescale=p)) - x).square().mean((0, 1)) for p in (none, given, None))
    assert bool((scaled[:6] < plain[:6]).all())
    assert float(own.sum()) == pytest.approx(float(scaled.sum()), rel=0.05)
    if how.name in ("int8", "int4"):  # the others' neighbours have no need of it
        assert float(scaled[6:128].mean()) < float(plain[6:128].mean()) / 10


@with_scales
def test_channels_that_do_not_vary_or_are_not_finite_are_left_alone(how: Format) -> None:
    x = torch.randn(2, 256, 64)
    x[..., 3] = 5.0
    x[0, 7, 9] = float("nan")
    packed = pack(x, how)
    assert packed.prescale is not None
    assert bool(packed.prescale.isfinite().all())
    assert packed.prescale[:, 3].tolist() == [5.0, 1.0]
    found = unpack(packed)
    found[0, 7], x[0, 7] = 0, 0
    assert torch.equal(found[..., 3], x[..., 3])
    assert bool(found.isfinite().all())


@with_scales
def test_few_tokens_and_pictures_have_no_separate_prescale(how: Format) -> None:
    for shape in [(2, 8, 64), (3, 64), (2, 4, 32, 32), (2, 4, 3, 32, 32)]:
        assert pack(torch.randn(shape), how).prescale is None


@every
def test_parts_of_a_batch_are_the_batch_of_parts(how: Format) -> None:
    x = torch.randn(4, 3, 5, 6, 2)
    for whole, part in zip(x.chunk(2), pack(x, how).chunk(2), strict=True):
        assert torch.equal(unpack(part), unpack(pack(whole, how)))
    tokens = torch.randn(4, 128, 36)
    assert torch.equal(torch.cat([unpack(part) for part in pack(tokens, how).chunk(4)]), unpack(pack(tokens, how)))


@every
def test_zeros_stay_zeros_and_the_largest_stays_the_largest(how: Format) -> None:
    x = torch.zeros(3, 200)
    x[1, 7] = -3.0
    found = unpack(pack(x, how))
    assert torch.equal(found != 0, x != 0)
    assert float(found[1, 7]) == pytest.approx(-3.0, rel=1e-6)


@every
def test_strides_do_not_matter(how: Format) -> None:
    x = torch.randn(6, 4, 130)
    for view in (x.transpose(0, 1), x[::2], x[..., 1:], x.expand(2, 6, 4, 130)):
        assert torch.equal(unpack(pack(view, how)), unpack(pack(view.contiguous(), how)))


@every
def test_packing_again_changes_nothing(how: Format) -> None:
    once = unpack(pack(torch.randn(4, 256), how))
    assert torch.allclose(unpack(pack(once, how)), once, rtol=1e-6, atol=0)


@with_scales
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_and_does_not_spread(how: Format, bad: float) -> None:
    x = torch.randn(2, 3, 256)
    x[1, 1, 3] = bad
    found = unpack(pack(x, how))
    assert not bool(found[1, 1, : how.group].isfinite().any())
    found[1, 1, : how.group] = 0
    assert bool(found.isfinite().all())


def test_an_unknown_format_is_named_with_those_there_are() -> None:
    with pytest.raises(UnknownName, match=r"int3.*bf16, int8, fp8, int4"):
        format_of("int3")
