"""Equation (1) on plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffcache.executor.equation import predict

pytestmark = pytest.mark.fast

SHAPES = [(1, 1), (3, 5, 7), (2, 4, 3, 5)]
KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def anchors_of(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(count)]


def naive(
    anchors: list[Tensor],
    weights: list[float],
    x: Tensor,
    x_0: Tensor,
    kappa: float,
    scale: float | Tensor,
    bias: float | Tensor,
) -> Tensor:
    """Equation (1), written down in float64."""
    total = torch.zeros(anchors[0].shape, dtype=torch.float64)
    for anchor, weight in zip(anchors, weights, strict=True):
        total = total + anchor.double() * weight
    return (total + (x.double() - x_0.double()) * kappa) * scale + bias


def bound(dtype: torch.dtype, terms: Tensor) -> Tensor:
    """One rounding of the result to its type, and a few of the sums to float32 (or float64)."""
    sums = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype).eps / 2 * terms * (1 + 1e-2) + 8 * torch.finfo(sums).eps * terms.max() + 1e-7


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_is_equation_1_with_one_rounding(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
    anchors = anchors_of(shape, dtype, count)
    x, x_0 = anchors_of(shape, dtype, 2)
    weights = [1.7, -0.9, 0.35, 0.11][:count]
    scale, bias = torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1])
    for kappa, s, b in ((0.0, 1.0, 0.0), (0.8, 1.0, 0.0), (-0.4, 1.3, 0.2), (0.8, scale, bias)):
        found = predict(anchors, weights, drift=(x, x_0), kappa=kappa, scale=s, bias=b)
        expected = naive(anchors, weights, x, x_0, kappa, s, b)
        assert found.dtype == dtype
        assert found.shape == shape
        assert bool(((found.double() - expected).abs() <= bound(dtype, expected.abs())).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_run_in_float32(dtype: torch.dtype) -> None:
    """Large weights that cancel: in half precision nothing but noise would be left."""
    anchors = [torch.full((4,), value, dtype=dtype) for value in (1.0, 1.0, 0.5)]
    found = predict(anchors, [300.1, -300.0, 1.0])
    assert float((found.double() - 0.6).abs().max()) <= torch.finfo(dtype).eps
    summed = anchors[0] * 300.1 + anchors[1] * -300.0 + anchors[2]
    assert float((summed.double() - 0.6).abs().max()) > torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_plain_reuse_gives_the_same_bits(dtype: torch.dtype) -> None:
    (anchor,) = anchors_of((3, 5, 7), dtype, 1)
    assert torch.equal(predict([anchor], [1.0]), anchor)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_an_input_that_has_not_moved_adds_nothing(dtype: torch.dtype) -> None:
    anchor, x = anchors_of((3, 5, 7), dtype, 2)
    assert torch.equal(predict([anchor], [1.0], drift=(x * 1e3, x * 1e3), kappa=0.7), anchor)


def test_the_result_is_a_new_tensor_and_nothing_given_is_written_to() -> None:
    anchors = anchors_of((2, 3), torch.float32, 3)
    x, x_0 = anchors_of((2, 3), torch.float32, 2)
    given = [t.clone() for t in (*anchors, x, x_0)]
    for options in ({}, {"drift": (x, x_0), "kappa": 1.0, "scale": 2.0, "bias": 1.0}):
        found = predict(anchors, [1.0, 0.0, 0.0], **options)
        assert found.data_ptr() not in {t.data_ptr() for t in (*anchors, x, x_0)}
        found.zero_()
    assert all(map(torch.equal, given, (*anchors, x, x_0)))


def test_without_drift_kappa_says_nothing() -> None:
    (anchor,) = anchors_of((2, 3), torch.float32, 1)
    assert torch.equal(predict([anchor], [1.0], kappa=5.0), anchor)


def test_as_many_weights_as_anchors() -> None:
    with pytest.raises(ValueError, match="zip"):
        predict(anchors_of((2,), torch.float32, 2), [1.0])


def test_a_wrong_formula_would_be_noticed() -> None:
    anchors = anchors_of((3, 5), torch.float32, 2)
    x, x_0 = anchors_of((3, 5), torch.float32, 2)
    expected = naive(anchors, [1.5, -0.5], x, x_0, 0.3, 1.1, 0.2)
    close = bound(torch.float32, expected.abs())
    right = {"drift": (x, x_0), "kappa": 0.3, "scale": 1.1, "bias": 0.2}
    assert bool(((predict(anchors, [1.5, -0.5], **right) - expected).abs() <= close).all())
    for wrong in ({"kappa": 0.301}, {"scale": 1.101}, {"bias": 0.201}, {"drift": (x_0, x)}):
        assert not bool(((predict(anchors, [1.5, -0.5], **{**right, **wrong}) - expected).abs() <= close).all())
    assert not bool(((predict(anchors[::-1], [1.5, -0.5], **right) - expected).abs() <= close).all())
