"""Equation (1) against a naive loop in float64, and on outputs of other forms than one tensor."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from probes import bound
from small_loop import MASK, STEPS, Loop, loop, noise, random_plan
from torch import Tensor

from diffcache import accelerated, report
from diffcache.documents import Guidance, SitePlan
from diffcache.executor import Anchor, Output
from diffcache.executor.prediction import predict_output, why_not
from diffcache.executor.program import Terms
from diffcache.executor.store import signature

pytestmark = pytest.mark.fast

SEPARATE = Guidance(mode="separate", branches=2)
BATCHED = Guidance(mode="batched", branches=2)


def per_channel(value: np.ndarray, like: Tensor) -> Tensor:
    t = torch.tensor(value)
    return t.view(1, -1, 1, 1) if like.ndim == 4 and t.ndim else t


def naive(plan: SitePlan, row: int, calls: list[tuple[Tensor, Tensor]], i: int) -> Tensor:
    """Equation (1) in float64 for step ``i``, from what one branch was given and gave at each step."""
    anchors = [a for a in range(i - 1, -1, -1) if plan.compute[a]]
    total = sum(w * calls[a][1].double() for w, a in zip(plan.weights[row, i], anchors, strict=False))
    given = sum(v * calls[a][0].double() for v, a in zip(plan.inputs[row, i], anchors, strict=False))
    kappa = 0.0 if plan.kappa is None else plan.kappa[row, i]
    x, x_0 = calls[i][0].double(), calls[anchors[0]][0].double()
    like = calls[anchors[0]][1]
    channels = like.shape[1] if like.ndim == 4 else like.shape[-1]
    of_inputs = kappa * (x - x_0) + given
    of_inputs = of_inputs[:, :channels] if like.ndim == 4 else of_inputs[..., :channels]
    return per_channel(plan.scale[row, i], like) * (total + of_inputs) + per_channel(plan.bias[row, i], like)


def assert_equation_1(pipe: Loop, plan: SitePlan, guidance: Guidance | None, x: Tensor) -> None:
    with accelerated(pipe, bound(pipe, plan, guidance=guidance)):
        pipe(x)
        rows = report(pipe).rows
    assert all(not row.failed_open for row in rows)
    computed = int(plan.compute.sum())
    assert {(row.computed, row.predicted) for row in rows} == {(computed, STEPS - computed)}
    if pipe.guide == "batched":
        halves = [tuple(t.chunk(2) for t in call) for call in pipe.given]
        branches = [[(call[0][b], call[1][b]) for call in halves] for b in range(2)]
    else:
        calls = 2 if pipe.guide == "separate" else 1
        branches = [pipe.given[b::calls] for b in range(calls)]
    for b, calls_of_branch in enumerate(branches):
        for i in np.flatnonzero(~plan.compute):
            expected = naive(plan, min(b, len(plan.weights) - 1), calls_of_branch, int(i))
            found = calls_of_branch[i][1]
            assert found.dtype == calls_of_branch[0][1].dtype
            largest = max(float(t.double().abs().max()) for call in calls_of_branch for t in call)  # terms may cancel
            error = torch.finfo(found.dtype).eps / 2 * expected.abs() + 2**-21 * largest
            assert bool(((found.double() - expected).abs() <= error).all()), f"branch {b}, step {i}"


# --- equation (1) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("guide", "guidance", "branches"),
    [
        ("none", None, 1),
        ("separate", None, 1),
        ("separate", SEPARATE, 1),
        ("separate", SEPARATE, 2),
        ("batched", None, 1),
        ("batched", BATCHED, 2),
    ],
)
@pytest.mark.parametrize("channels", [0, 3], ids=["scalar", "per channel"])
def test_what_is_predicted_is_equation_1(
    guide: str, guidance: Guidance | None, branches: int, channels: int, dtype: torch.dtype
) -> None:
    pipe = loop(guide)
    pipe.transformer.to(dtype)
    pipe.before = lambda i, x: x.to(dtype)
    assert_equation_1(pipe, random_plan(MASK, branches, 3, channels=channels), guidance, noise(dtype=dtype))


@pytest.mark.parametrize("channels", [0, 3], ids=["scalar", "per channel"])
def test_pictures_carry_their_channels_in_front(channels: int) -> None:
    assert_equation_1(loop(), random_plan(MASK, 1, 2, channels=channels), None, noise(2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 6, 5)], ids=["tokens", "pictures"])
def test_condition_channels_behind_the_input_take_no_part(shape: tuple[int, ...]) -> None:
    """The input is wider than the output: what moves in the surplus channels is not the sample."""
    pipe = loop()
    pipe.behind = lambda x: [torch.rand_like(x)]
    assert_equation_1(pipe, random_plan(MASK, 1, 2), None, noise(*shape))


def test_channels_that_only_the_output_has_get_nothing_of_the_input() -> None:
    """A learned variance comes back behind the sample's own channels."""
    pipe = loop(odd=lambda call, output: torch.cat([output, output.sin()], dim=1))
    plan = random_plan("#.", 1, 1)
    with accelerated(pipe, bound(pipe, plan)):
        pipe(noise(2, 3, 4, 5), steps=2)
    (x_0, first), (x, second) = pipe.given
    s, b, w, k = plan.scale[0, 1], plan.bias[0, 1], plan.weights[0, 1, 0], plan.kappa[0, 1]
    v = plan.inputs[0, 1, 0]
    torch.testing.assert_close(second[:, :3], s * (w * first[:, :3] + v * x_0 + k * (x - x_0)) + b)
    torch.testing.assert_close(second[:, 3:], s * w * first[:, 3:] + b)


def test_another_equation_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.executor import prediction

    right = prediction.predict
    for wrong in (
        lambda anchors, weights, **o: right(anchors, weights, **{**o, "kappa": o["kappa"] * 1.001}),
        lambda anchors, weights, **o: right(anchors, weights, **{**o, "scale": 1.0}),
        lambda anchors, weights, **o: right(anchors[::-1], weights, **o),
        lambda anchors, weights, **o: right(anchors, weights[::-1], **o),
    ):
        monkeypatch.setattr(prediction, "predict", wrong)
        with pytest.raises(AssertionError, match="step"):
            assert_equation_1(loop("separate"), random_plan(MASK, 2, 2), SEPARATE, noise())
    monkeypatch.setattr(prediction, "predict", right)
    assert_equation_1(loop("separate"), random_plan(MASK, 2, 2), SEPARATE, noise())


def test_a_schedule_copied_or_used_by_two_pipelines_is_only_read() -> None:
    one, other = loop(), loop()
    schedule = bound(one, random_plan(MASK, 1, 2))
    digest = schedule.digest()
    with accelerated(one, schedule), accelerated(other, copy.deepcopy(schedule)):
        assert torch.equal(one(noise()), other(noise()))
    assert schedule.digest() == digest


# --- outputs of other forms ------------------------------------------------------------------------------------------


def anchor(value: Any, x: tuple[Tensor, ...]) -> Anchor:
    return Anchor.of(Output.of(value), x, signature(x))


def terms(weights: list[list[float]], kappa: list[float] | None = None, **more: Any) -> Terms:
    rows = len(weights)
    return Terms(
        anchors=tuple(range(len(weights[0]))),
        weights=tuple(map(tuple, weights)),
        inputs=((0.0,) * len(weights[0]),) * rows,
        kappa=tuple(kappa or [0.0] * rows),
        scale=more.get("scale", (1.0,) * rows),
        bias=more.get("bias", (0.0,) * rows),
    )


def test_of_two_outputs_each_takes_the_drift_of_the_input_of_its_shape() -> None:
    """Text before pictures, as Flux blocks return them; the input is the pictures."""
    x, x_0 = noise(1, 6, 4), noise(1, 6, 4) * 0.5
    text, pictures = noise(1, 3, 4), noise(1, 6, 4) + 1
    kept = anchor((text, pictures), (x_0,))
    wanted = terms([[1.0]], [0.5])
    assert why_not([kept], wanted, (x,), 0) is None
    found = predict_output([kept], wanted, (x,), 0)
    torch.testing.assert_close(found[0], text)
    torch.testing.assert_close(found[1], pictures + 0.5 * (x - x_0))


def test_a_batch_given_as_a_list_has_its_branches_in_equal_parts_of_the_list() -> None:
    """Z-Image: the list holds the samples of the first branch, then those of the second."""
    outputs = [noise(4, 1, 3, 2) + i for i in range(4)]
    x = tuple(noise(4, 1, 3, 2) * i for i in range(4))
    x_0 = tuple(t * 0 for t in x)
    kept = anchor((outputs,), x_0)
    wanted = terms([[1.0], [2.0]], [0.0, 0.5])
    assert why_not([kept], wanted, x, None) is None
    (found,) = predict_output([kept], wanted, x, None)
    for i in (0, 1):
        torch.testing.assert_close(found[i], outputs[i])
    for i in (2, 3):
        torch.testing.assert_close(found[i], 2 * outputs[i] + 0.5 * x[i])
    assert "does not split" in str(why_not([anchor((outputs[:3],), x_0[:3])], wanted, x[:3], None))


def test_indices_and_masks_are_held_not_interpolated() -> None:
    x = (noise(2, 3),)
    kept = [anchor((noise(2, 3), torch.tensor([5, 7]), torch.tensor([True, False])), x) for _ in range(2)]
    _, indices, mask = predict_output(kept, terms([[1.3, -0.3]]), x, 0)
    assert indices.tolist() == [5, 7]
    assert mask.tolist() == [True, False]
    assert indices.data_ptr() != kept[0].kept[1].data_ptr()


@pytest.mark.parametrize(
    ("shape", "channels", "along"),
    [
        ((2, 5, 3), 3, 2),
        ((2, 3, 4, 5), 3, 1),
        ((2, 3, 4, 5, 6), 3, 1),
        ((2, 7, 4, 5, 6), 4, 2),  # CogVideoX: frames before channels
        ((2, 4, 9), 4, 1),  # Stable Audio: channels before length
        ((4, 1, 3, 2), 4, 0),  # Z-Image: one sample
    ],
)
def test_coefficients_per_channel_find_the_channels(shape: tuple[int, ...], channels: int, along: int) -> None:
    x = (noise(*shape),)
    scale = np.arange(1.0, channels + 1)
    found = predict_output([anchor(noise(*shape), x)], terms([[1.0]], scale=(scale,)), x, 0)
    view = [1] * len(shape)
    view[along] = -1
    torch.testing.assert_close(found, noise(*shape) * torch.as_tensor(scale, dtype=torch.float32).view(view))


def test_a_batch_that_does_not_split_into_branches_is_computed() -> None:
    wanted = terms([[1.0], [2.0]])
    x = (noise(3, 5, 3),)
    assert "does not split" in str(why_not([anchor(noise(3, 5, 3), x)], wanted, x, None))
    assert why_not([anchor(noise(3, 5, 3), x)], wanted, x, 1) is None
    assert why_not([anchor(noise(4, 5, 3), x)], wanted, x, None) is None
