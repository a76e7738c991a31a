"""L2P: weights against a training with autograd on explicit outputs, predictions against a run of explicit vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from documents import of_outputs

from diffcache.documents import Profile
from diffcache.errors import BadOption
from diffcache.schedulers import l2p
from diffcache.schedulers.uniform import evenly, reuse

pytestmark = pytest.mark.fast

STEPS, SAMPLES, WIDTH = 9, 3, 5


def outputs(steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """[N, T, C]: outputs that turn smoothly."""
    draw = np.random.default_rng(seed)
    time = np.linspace(-1, 1, steps)
    waves = np.stack([np.ones(steps), time, np.sin(2 * time), np.cos(5 * time)])
    return np.einsum("ncw,wt->ntc", draw.normal(size=(SAMPLES, WIDTH, len(waves))), waves)


def measured(found: np.ndarray) -> Profile:
    """The profile of outputs [N, T, C]: all samples side by side."""
    return of_outputs({"model": np.concatenate(list(found), axis=1)[None]})


def with_autograd(found: np.ndarray, epochs: int) -> np.ndarray:
    """Train the matrix on the outputs themselves: row i predicts step i + 1 from the steps up to i."""
    x = torch.tensor(found)
    rows = torch.eye(found.shape[1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([rows], lr=0.01)
    for _ in range(epochs):
        adam.zero_grad()
        predicted = torch.tril(rows) @ x
        torch.nn.functional.mse_loss(predicted[:, :-1], x[:, 1:]).backward()
        adam.step()
    return torch.tril(rows).detach().numpy()


@pytest.mark.parametrize("epochs", [1, 60, 201])
def test_weights_are_those_of_a_training_on_the_outputs(epochs: int) -> None:
    found = outputs()
    gram = np.einsum("ntc,nsc->ts", found, found) / (SAMPLES * WIDTH)
    rows = l2p.trained(gram, epochs)
    assert rows[1:] == pytest.approx(with_autograd(found, epochs)[:-1], abs=1e-5)
    assert not np.triu(rows).any()
    assert not np.allclose(rows[1:], np.eye(STEPS)[:-1], atol=1e-3)


@pytest.mark.parametrize("mask", ["published", "even"])
def test_a_plan_predicts_as_a_run_that_keeps_its_predictions(mask: str) -> None:
    found = outputs(12)
    plan = l2p.plan(measured(found), 6, mask=mask).sites["model"]
    rows = with_autograd(found, 201)
    fresh = outputs(12, seed=1)[0]  # outputs of a sample that the weights were not trained on
    kept: list[np.ndarray] = []
    for i in range(12):
        if not plan.compute[i]:
            anchors = np.flatnonzero(plan.compute[:i])[::-1]
            predicted = plan.weights[0, i, : len(anchors)] @ fresh[anchors]
            assert predicted == pytest.approx(rows[i - 1, :i] @ np.array(kept), abs=1e-3)
        kept.append(fresh[i] if plan.compute[i] else rows[i - 1, :i] @ np.array(kept))


def test_training_lowers_the_error_of_the_next_output_and_no_training_reuses() -> None:
    found = outputs()
    gram = np.einsum("ntc,nsc->ts", found, found)

    def error(rows: np.ndarray) -> float:
        missed = rows - np.eye(STEPS)
        return float(np.einsum("ts,su,tu->", missed[1:], gram, missed[1:]))

    errors = [error(l2p.trained(gram / (SAMPLES * WIDTH), epochs)) for epochs in (0, 20, 201)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 4
    plan = l2p.plan(measured(found), 4, mask="even", epochs=0, anchors=1).sites["model"]
    assert np.array_equal(plan.weights, reuse(evenly(STEPS, 4)).weights)


def test_published_masks_are_the_authors_and_continue_for_other_numbers() -> None:
    assert np.flatnonzero(l2p.published(50, 9)).tolist() == [0, 1, 2, 4, 9, 17, 26, 35, 43]
    assert np.flatnonzero(l2p.published(50, 12)).tolist()[:4] == [0, 1, 2, 4]
    for steps in range(1, 30):
        for computed in range(1, steps + 1):
            compute = l2p.published(steps, computed)
            assert compute[0]
            assert compute.sum() == computed
    gaps = np.diff([*np.flatnonzero(l2p.published(28, 10))[3:], 28])
    assert gaps.max() - gaps.min() <= 1
    assert np.array_equal(l2p.published(50, 5), evenly(50, 5))


def test_fewer_anchors_get_the_weights_of_older_ones() -> None:
    found = measured(outputs(12))
    whole, two = (l2p.plan(found, 6, anchors=n).sites["model"].weights for n in (None, 2))
    assert two.shape[2] == 2
    assert two.sum(2) == pytest.approx(whole.sum(2))
    assert whole[:, :, 2:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "odd"}, "mask='odd' was given. Allowed: one of published, even"),
        ({"epochs": -1}, "epochs=-1 was given. Allowed: a whole number, 0 or more"),
        ({"anchors": 0}, "anchors=0 was given. Allowed: a whole number, 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        l2p.plan(measured(outputs()), 4, **options)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match=r"computed_steps=2\.5"):
        l2p.plan(measured(outputs()), 2.5)
