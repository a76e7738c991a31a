"""Another scheduler's mask, on noise levels that shorten predicted steps (ERTACache).

This is ERTACache's second stage, with two corrections to the printed rule. The remaining distance is spread over the
remaining steps (the print lacks the 1/T), in proportion to the steps of the grid, so that shifted grids keep their
shape. The length of a predicted step is decided from the profile, so the result is one fixed list of levels. Outputs
were measured on the original grid. If levels move far, tables and fitted weights no longer describe them.
"""

from __future__ import annotations

import numpy as np

from diffcache import schedulers
from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption, Unusable
from diffcache.schedulers import Aliases, Planned
from diffcache.schedulers._sites import at

SOURCE = "ERTACache, arXiv 2508.21091: trajectory-aware timestep adjustment, rescaled to the remaining grid"
NEEDS = "noise levels"
ALIASES: Aliases = {"timesteps": {}}


def plan(profile: Profile, computed_steps: float, *, mask: str = "ertacache", strength: float = 0.1) -> Planned:
    """Plan with another scheduler, on moved noise levels.

    At ``strength=1`` a step does not move at all if its error is as large as the change of the output over it, which
    plain reuse reaches after one step. On the Flux-type demo model (4 samples, latents; 10 and 25 of 50 steps; masks of
    ertacache, uniform, taylor, closed_loop) 1 lost 6 to 17 dB, and 0.1 gained 0.6 dB on average.

    Args:
        profile: The measured tables, with noise levels.
        computed_steps: The budget of the other scheduler.
        mask: The spec of the other scheduler, with ";" between its options. It must decide about whole steps.
        strength: The share of the shortening that is applied, 0 to 1. The paper uses 1.

    Raises:
        BadOption: If the levels cannot be moved (the profile has none, the loop starts late, levels rise or are visited
            twice), or the mask plans other sites, decides in the run or moves levels itself.
    """
    levels = movable(profile)
    if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise BadOption("strength", strength, "0 (the grid as it is) to 1 (as published)")
    found = _planned(profile, computed_steps, mask)
    reach = 1 - strength * (1 - factors(at(profile, "model")["model"], found.sites["model"]))
    return Planned(sites=found.sites, sigmas=moved(levels, reach), notes={**found.notes, "mask": mask})


def movable(profile: Profile) -> np.ndarray:
    """Return the profile's noise levels, float64 [T + 1].

    Raises:
        BadOption: If the loop cannot run over other levels.
    """
    name = profile.noise_scheduler.class_name if profile.noise_scheduler else "an unknown noise scheduler"
    if profile.steps != profile.grid_steps:
        raise Unusable(
            "profile",
            f"its loop takes {profile.steps} of {profile.grid_steps} steps, from step {profile.start} on",
            "Pass a profile of a loop that starts at step 0 and takes every step",
        )
    if profile.sigmas is None:
        raise Unusable(
            "profile",
            f"its noise scheduler ({name}) has no noise levels. DDIM, DDPM and PNDM use fixed timesteps instead",
            "Pass a profile of a noise scheduler with sigmas",
        )
    gaps = np.diff(profile.sigmas)
    if (gaps > 0).any():
        raise Unusable("profile", f"the noise levels of {name} rise", "Pass a profile with noise levels that fall")
    if (gaps[:-1] == 0).any():
        twice = profile.sigmas[:-2][gaps[:-1] == 0][0]
        raise Unusable(
            "profile",
            f"{name} visits the noise level {twice:g} twice, as second-order noise schedulers do",
            "Pass a profile with noise levels that are visited once",
        )
    return profile.sigmas


def moved(sigmas: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return the noise levels if step i goes the share ``reach[i]`` of its way on the rest of the grid.

    The distance to the last level shrinks by ``reach`` times the share by which it shrinks on the original grid.

    Args:
        sigmas: float64 [T + 1], falling. The first and the last level are kept.
        reach: float64 [T], 0 to 1. The last step always goes all the way. With all 1 the levels are the same, bit for
            bit.

    Returns:
        float64 [T + 1].
    """
    last = sigmas[-1]
    left = sigmas - last
    share = np.divide(-np.diff(sigmas), left[:-1], out=np.ones(len(reach)), where=left[:-1] > 0)
    behind = np.zeros(len(sigmas))  # the sum of distances left out, exactly 0 if there are none
    for i in range(len(reach) - 1):
        behind[i + 1] = behind[i] * (1 - share[i]) + share[i] * (1 - reach[i]) * (left[i] + behind[i])
    return np.minimum.accumulate(sigmas + behind)  # rounding can rise


def factors(site: SiteProfile, plan: SitePlan) -> np.ndarray:
    """Return the share of its length that each step may go, float64 [T].

    It is φ of the paper: 1 at computed steps and at the last one, else

        φ_i = clip(1 − ‖F̂_i − F_i‖₁ / ‖F_i − F_{i+1}‖₁, 0, 1)

    Norms are means over samples and branches. For predictions from several anchors the tables hold the 2-norm only, and
    both norms are then 2-norms. The plan's scale and bias are left out, because the paper applies corrections after it
    has moved the levels.

    Args:
        site: The profile of the model.
        plan: The plan whose predictions are measured.
    """
    steps = len(plan.compute)
    reach = np.ones(steps)
    for i in np.flatnonzero(~plan.compute[:-1]):
        missed, step = _missed(site, plan, int(i))
        if step > 0:  # outputs that do not change give no ratio
            reach[i] = np.clip(1 - missed / step, 0, 1)
    return reach


def _missed(site: SiteProfile, plan: SitePlan, i: int) -> tuple[float, float]:
    """Return the size of the prediction's error at step i, and of the output's change from step i to the next step.

    Raises:
        BadOption: If the tables do not hold the error of such a prediction.
    """
    if plan.inputs is not None and plan.inputs[:, i].any():
        raise Unusable("mask", "it has weights for inputs", "Use weights of outputs, or one reused residual")
    anchors = np.flatnonzero(plan.compute[:i])[::-1][: plan.weights.shape[2]]
    weights = plan.weights[:, i, : len(anchors)]
    kappa = np.zeros(len(weights)) if plan.kappa is None else np.abs(plan.kappa[:, i])
    if (weights[:, 0] == 1).all() and not weights[:, 1:].any():
        missed = np.abs(1 - kappa) * site.output.l1[:, anchors[0], i]
        if kappa.any():
            # F_a + κ (x_i − x_a) − F_i is (1 − κ) (F_a − F_i) + κ (r_a − r_i), r the residuals.
            if site.residual is None:
                raise Unusable("mask", "it reuses residuals, and the profile has none", "Reuse outputs instead")
            missed = missed + kappa * site.residual.l1[:, anchors[0], i]
        return float(missed.mean()), float(site.output.l1[:, i, i + 1].mean())
    if kappa.any():
        raise Unusable(
            "mask", "it combines several weights with input drift", "Use weights of outputs, or one reused residual"
        )
    used = np.append(anchors, i)
    missed_by = np.append(weights, -np.ones((len(weights), 1)), axis=1)
    gram = site.output.gram[:, used[:, None], used]
    square = ((missed_by[:, None] @ gram)[:, 0] * missed_by).sum(-1)  # branches may share tables, or weights
    return float(np.sqrt(max(square.mean(), 0.0))), float(np.sqrt(site.output.squared[:, i, i + 1].mean()))


def _planned(profile: Profile, computed_steps: float, mask: str) -> Planned:
    """Return the plan of the other scheduler.

    Raises:
        BadOption: If it plans other sites, decides in the run or moves levels itself.
    """
    name, options = schedulers.parse_spec(mask.replace(";", ","), "plan")
    make = schedulers.function(name, "plan", options)
    if make is plan:
        raise Unusable(f"mask={mask!r}", "noise levels can be moved only once", "Name another scheduler")
    found: Planned = make(profile, computed_steps, **options)
    if set(found.sites) != {"model"}:
        raise Unusable(f"mask={mask!r}", "it plans other sites than 'model'", "Name a scheduler that skips whole steps")
    if found.online is not None or found.sigmas is not None:
        raise Unusable(
            f"mask={mask!r}",
            "it moves noise levels or chooses computed steps during the run",
            "Name a scheduler that chooses all computed steps before the run, on unmoved levels",
        )
    return found
