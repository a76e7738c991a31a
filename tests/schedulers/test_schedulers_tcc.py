"""TCC: scales against a loop of explicit vectors with corrections that are found one step after the other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from documents import dynamics, measured, profile, site

from diffcache.documents import Dynamics, Profile, SitePlan
from diffcache.errors import BadOption, UnknownName
from diffcache.schedulers import tcc
from diffcache.schedulers.uniform import evenly, reuse

pytestmark = pytest.mark.fast

STEPS, WIDTH = 10, 24


class Loop:
    """An Euler sampler with explicit states, and a network that answers to the error of the state.

    ``spread`` adds a part in a direction that belongs to the step alone.
    """

    def __init__(self, seed: int, spread: float = 0.3) -> None:
        draw = np.random.default_rng(seed)
        self.outputs = np.cumsum(draw.normal(size=(STEPS, WIDTH)), axis=0) + 2 * draw.normal(size=WIDTH)
        self.length = draw.uniform(-0.4, -0.1, STEPS)
        self.response = draw.uniform(-0.8, 0.8, STEPS)
        self.spread = draw.uniform(0, spread, STEPS)
        self.own = WIDTH**0.5 * np.linalg.qr(self.outputs.T, mode="complete")[0].T[STEPS : 2 * STEPS]

    def guesses(self, plan: SitePlan, scale: np.ndarray) -> np.ndarray:
        """Predictions before their scale, and computed outputs, [T, WIDTH], in the run with these scales."""
        error, rows, anchors = np.zeros(WIDTH), [], []
        for i, computed in enumerate(plan.compute):
            if computed:
                own = np.sqrt(self.spread[i] * np.mean(error**2)) * self.own[i]
                rows.append(self.outputs[i] + self.response[i] * error + own)
                anchors.insert(0, rows[i])
                found = rows[i]
            else:
                used = np.array(anchors[: plan.weights.shape[2]])
                rows.append(plan.weights[0, i, : len(used)] @ used)
                found = scale[i] * rows[i]
            error = error + self.length[i] * (found - self.outputs[i])
        return np.array(rows)

    def scales(self, plan: SitePlan, *, consistent: bool) -> np.ndarray:
        """The scale of each predicted step, from the norms of its vectors in repeated runs."""
        scale = np.ones(STEPS)
        for i in np.flatnonzero(~plan.compute):
            guess = self.guesses(plan, scale if consistent else np.ones(STEPS))[i]
            scale[i] = np.linalg.norm(self.outputs[i]) / np.linalg.norm(guess)
        return scale

    def dynamics(self) -> Dynamics:
        return dynamics(
            STEPS,
            grams=(self.outputs @ self.outputs.T)[None] / WIDTH,
            peaks=np.ones(1),
            reach=np.tril(np.broadcast_to(self.length, (STEPS, STEPS))),
            response=self.response,
            spread=self.spread,
        )


def of(loop: Loop, **changes: object) -> Profile:
    fields: dict[str, object] = {
        "steps": STEPS,
        "start": 0,
        "timesteps": np.linspace(999, 1, STEPS),
        "sigmas": None,
        "denoisers": {"transformer": measured(site(loop.outputs[None]))},
        "dynamics": loop.dynamics(),
    }
    return profile(**fields | changes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("consistent", [True, False])
def test_scales_are_those_of_a_loop_that_is_corrected_step_by_step(seed: int, consistent: bool) -> None:
    loop = Loop(seed)
    plan = tcc.plan(of(loop), 4, consistent=consistent).sites["model"]
    host = reuse(evenly(STEPS, 4))
    assert np.array_equal(plan.compute, host.compute)
    assert np.array_equal(plan.weights, host.weights)
    assert plan.scale is not None
    assert plan.scale[0] == pytest.approx(loop.scales(host, consistent=consistent), rel=1e-6)
    assert plan.scale[0] != pytest.approx(loop.scales(host, consistent=not consistent), rel=1e-3)


def test_predictions_of_several_outputs_are_scaled_too() -> None:
    loop = Loop(1)
    found = of(loop)
    plan = tcc.plan(found, 5, mask="taylorseer:order=2").sites["model"]
    host = reuse(evenly(STEPS, 5))
    assert np.array_equal(plan.compute, host.compute)
    assert plan.anchors > 1
    bare = dataclasses.replace(plan, scale=None)
    assert plan.scale is not None
    assert plan.scale[0] == pytest.approx(loop.scales(bare, consistent=True), rel=1e-6)


def test_predicted_outputs_have_the_size_of_those_of_the_full_run() -> None:
    for consistent in (True, False):
        loop = Loop(2)
        made = tcc.calibrated(loop.dynamics(), reuse(evenly(STEPS, 4)), consistent=consistent)
        assert made is not None
        assert made.scale is not None
        skipped = ~made.compute
        found = made.scale[0, skipped, None] * loop.guesses(made, made.scale[0])[skipped]
        sizes = np.linalg.norm(found, axis=1)
        wanted = np.linalg.norm(loop.outputs[skipped], axis=1)
        assert np.allclose(sizes, wanted, rtol=1e-6) == consistent


def test_outputs_of_zero_keep_a_scale_of_one() -> None:
    still = dynamics(6, grams=np.zeros((2, 6, 6)))
    made = tcc.calibrated(still, reuse(evenly(6, 2)))
    assert made is not None
    assert made.scale is not None
    assert made.scale.tolist() == [[1.0] * 6]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("tcc", "predictions can be scaled only once"),
        ("fora", "sublayer"),
        ("easycache", "during the run"),
        ("magcache", "cannot be simulated"),
        ("nothing", "no scheduler called 'nothing'"),
    ],
)
def test_masks_that_cannot_be_corrected_are_refused(mask: str, reason: str) -> None:
    with pytest.raises((BadOption, UnknownName), match=reason):
        tcc.plan(of(Loop(0)), 4, mask=mask)


def test_options_and_profiles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadOption, match=r"consistent=2 was given\. Allowed: True or False"):
        tcc.plan(of(Loop(0)), 4, consistent=2)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match=r"it has no dynamics \(none were measured\)"):
        tcc.plan(of(Loop(0), dynamics=None), 4)
    with pytest.raises(BadOption, match="computed_steps=0"):
        tcc.plan(of(Loop(0)), 0)


def test_the_provenance_names_the_host() -> None:
    assert tcc.plan(of(Loop(0)), 4, mask="taylorseer:order=1").notes["mask"] == "taylorseer:order=1"
