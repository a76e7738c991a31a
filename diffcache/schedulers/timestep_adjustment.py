"""Another scheduler's mask, on noise levels that shorten predicted steps (ERTACache).

ERTACache's second stage, with the two slips of the printed rule mended: the distance left is spread over the steps left
(the print lacks the 1/T), and in proportion to the grid's own steps, so shifted grids keep their shape. How far a
predicted step goes is decided from the profile, so all of it comes down to one fixed list of levels. The outputs were
measured on the grid as it was: where levels move far, tables and fitted weights no longer describe them.
"""

from __future__ import annotations

import numpy as np

from diffcache import schedulers
from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import BadOption
from diffcache.schedulers import Aliases, Planned
from diffcache.schedulers._sites import at

SOURCE = "ERTACache, arXiv 2508.21091: trajectory-aware timestep adjustment, rescaled to the remaining grid"
NEEDS = "noise levels"
ALIASES: Aliases = {"timesteps": {}}


def plan(profile: Profile, computed_steps: float, *, mask: str = "ertacache", strength: float = 0.1) -> Planned:
    """The plan of another scheduler, on moved levels.

    mask      spec of that scheduler, ";" between its options; it must decide about whole steps
    strength  how much of the shortening is applied; 1 is the paper's. At 1 a step does not move at all if its error is
              as large as the change of the output over it, which plain reuse reaches at once: on the Flux-type demo
              model (4 samples, latents; 10 and 25 of 50 steps; masks of ertacache, uniform, taylor, closed_loop) 1 lost
              6 to 17 dB, 0.1 gained 0.6 in the mean

    Raises BadOption where the levels cannot be moved (none in the profile, a loop that starts late, levels that rise or
    are visited twice), and for masks that plan other sites, decide in the run or move levels themselves.
    """
    levels = movable(profile)
    if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise BadOption("strength", strength, "0 (the grid as it is) to 1 (as published)")
    found = _planned(profile, computed_steps, mask)
    reach = 1 - strength * (1 - factors(at(profile, "model")["model"], found.sites["model"]))
    return Planned(sites=found.sites, sigmas=moved(levels, reach), notes={**found.notes, "mask": mask})


def movable(profile: Profile) -> np.ndarray:
    """The profile's noise levels [T + 1], if the loop can run over others instead."""
    name = profile.noise_scheduler.class_name if profile.noise_scheduler else "an unknown noise scheduler"
    if profile.start:
        raise BadOption("profile", f"of a loop that starts at step {profile.start}", "a loop that starts at step 0")
    if profile.sigmas is None:
        raise BadOption(
            "profile",
            f"without noise levels (of {name})",
            "that of a noise scheduler with sigmas; DDIM, DDPM, PNDM and the like step over fixed timesteps",
        )
    gaps = np.diff(profile.sigmas)
    if (gaps > 0).any():
        raise BadOption("profile", f"with noise levels that rise (of {name})", "levels that fall")
    if (gaps[:-1] == 0).any():
        allowed = "levels that are visited once; second-order noise schedulers visit each twice"
        raise BadOption("profile", f"with the level {profile.sigmas[:-2][gaps[:-1] == 0][0]:g} twice ({name})", allowed)
    return profile.sigmas


def moved(sigmas: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """float64 [T + 1]: the levels when step i goes ``reach[i]`` of its way on what is left of the grid: the distance to
    the last level shrinks by ``reach`` times the share that it shrinks by on the grid as it was.

    sigmas  float64 [T + 1], falling; the first and the last level are kept
    reach   float64 [T], 0 to 1; the last step always goes all the way. All 1: the same levels, bit for bit.
    """
    last = sigmas[-1]
    left = sigmas - last
    share = np.divide(-np.diff(sigmas), left[:-1], out=np.ones(len(reach)), where=left[:-1] > 0)
    behind = np.zeros(len(sigmas))  # a sum of what was left out: exactly 0 where nothing was
    for i in range(len(reach) - 1):
        behind[i + 1] = behind[i] * (1 - share[i]) + share[i] * (1 - reach[i]) * (left[i] + behind[i])
    return np.minimum.accumulate(sigmas + behind)  # rounding can rise


def factors(site: SiteProfile, plan: SitePlan) -> np.ndarray:
    """float64 [T]: how much of its step each step may go, φ of the paper: 1 at computed steps and at the last one, else

        φ_i = clip(1 − ‖F̂_i − F_i‖₁ / ‖F_i − F_{i+1}‖₁, 0, 1)

    Norms are means over samples and branches. Where several anchors are combined, the tables know the 2-norm only, and
    both norms are that. The plan's scale and bias are left out: the paper corrects after it has moved the levels.
    """
    steps = len(plan.compute)
    reach = np.ones(steps)
    for i in np.flatnonzero(~plan.compute[:-1]):
        missed, step = _missed(site, plan, int(i))
        if step > 0:  # outputs that stand still say nothing about the step
            reach[i] = np.clip(1 - missed / step, 0, 1)
    return reach


def _missed(site: SiteProfile, plan: SitePlan, i: int) -> tuple[float, float]:
    """Size of the prediction's error at step i, and of the output's change from there to the next step."""
    if plan.inputs is not None and plan.inputs[:, i].any():
        raise BadOption("mask", "one with weights of inputs", "weights of outputs, or one reused residual")
    anchors = np.flatnonzero(plan.compute[:i])[::-1][: plan.weights.shape[2]]
    weights = plan.weights[:, i, : len(anchors)]
    kappa = np.zeros(len(weights)) if plan.kappa is None else np.abs(plan.kappa[:, i])
    if (weights[:, 0] == 1).all() and not weights[:, 1:].any():
        missed = np.abs(1 - kappa) * site.output.l1[:, anchors[0], i]
        if kappa.any():
            # F_a + κ (x_i − x_a) − F_i is (1 − κ) (F_a − F_i) + κ (r_a − r_i), r the residuals.
            if site.residual is None:
                raise BadOption("mask", "one that reuses residuals", "one that reuses outputs: there are no residuals")
            missed = missed + kappa * site.residual.l1[:, anchors[0], i]
        return float(missed.mean()), float(site.output.l1[:, i, i + 1].mean())
    if kappa.any():
        raise BadOption("mask", "one with weights and drift of the input", "weights of outputs, or one reused residual")
    used = np.append(anchors, i)
    missed_by = np.append(weights, -np.ones((len(weights), 1)), axis=1)
    gram = site.output.gram[:, used[:, None], used]
    square = ((missed_by[:, None] @ gram)[:, 0] * missed_by).sum(-1)  # branches may share tables, or weights
    return float(np.sqrt(max(square.mean(), 0.0))), float(np.sqrt(site.output.squared[:, i, i + 1].mean()))


def _planned(profile: Profile, computed_steps: float, mask: str) -> Planned:
    name, options = schedulers.parse_spec(mask.replace(";", ","), "plan")
    make = schedulers.function(name, "plan", options)
    if make is plan:
        raise BadOption("mask", mask, "another scheduler: one list of levels is moved once")
    found: Planned = make(profile, computed_steps, **options)
    if set(found.sites) != {"model"}:
        raise BadOption("mask", mask, "a scheduler that decides about whole steps; this one plans other sites")
    if found.online is not None or found.sigmas is not None:
        raise BadOption("mask", mask, "a scheduler whose computed steps are known ahead, on the levels as they are")
    return found
