"""Another scheduler's plan, with predictions scaled to the size of the full run's outputs, step by step (TCC).

TCC is trajectory-consistent calibration. It leaves the computed steps and the predictions of a host method as they are,
and corrects each predicted output towards the output of the full run. The corrections are found in the order of the
steps. Each one is estimated in the run that all earlier ones have already changed. With ``consistent=0`` all are
estimated in the uncorrected run, which is the way of earlier methods that the paper compares with.

The form of a correction is a reading. The published text that could be read only calls it statistical and local. Here
it is one scale for each step, which gives the prediction the root mean square of the full run's output over all
samples. Offsets for each channel need the mean of every channel at every step, which a profile does not hold. The runs
are simulated on the profile's dynamics, where the paper runs the network.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffcache import schedulers
from diffcache.documents.profile import Dynamics, Profile
from diffcache.documents.schedule import SitePlan
from diffcache.errors import Unusable
from diffcache.schedulers import Aliases, Planned
from diffcache.schedulers._sites import flag
from diffcache.simulation import Simulator
from diffcache.simulation.simulator import Simulation

SOURCE = "TCC, arXiv 2605.24870"
NEEDS = "dynamics"
ALIASES: Aliases = {}


def plan(profile: Profile, computed_steps: float, *, mask: str = "uniform", consistent: bool = True) -> Planned:
    """Plan with another scheduler, and scale its predictions.

    Args:
        profile: The measured tables, with dynamics.
        computed_steps: The budget of the other scheduler.
        mask: The spec of the other scheduler, with ";" between its options. It must predict whole steps from kept
            outputs. The default is the rule of FORA.
        consistent: Whether each scale is estimated in the run that earlier scales have changed. False estimates all of
            them in the run without scales.

    Raises:
        BadOption: For a profile without dynamics, an option out of range, or a scheduler that does not plan whole steps
            in advance.
    """
    in_order = flag("consistent", consistent)
    if profile.dynamics is None:
        reason = profile.provenance.get("no_dynamics", "none were measured")
        raise Unusable("profile", f"it has no dynamics ({reason})", "Pass a profile with dynamics")
    host = _planned(profile, computed_steps, mask)
    scaled = calibrated(profile.dynamics, host.sites["model"], consistent=in_order)
    if scaled is None:
        reason = "it predicts with inputs, offsets or numbers for each channel or branch, which cannot be simulated"
        raise Unusable(f"mask={mask!r}", reason, "Name a scheduler that predicts from kept outputs alone")
    return Planned(sites={"model": scaled}, notes={**host.notes, "mask": mask})


def calibrated(dynamics: Dynamics, host: SitePlan, *, consistent: bool = True) -> SitePlan | None:
    """Return the plan with the scale of each predicted step.

    Args:
        dynamics: The measured dynamics.
        host: The plan of the host method. Its scales are replaced.
        consistent: Whether each scale is estimated in the run that earlier scales have changed.

    Returns:
        The plan, or None if the host's predictions cannot be simulated.
    """
    simulator = Simulator(dynamics)
    scale = np.ones((1, len(host.compute)))
    run: Simulation | None = None
    for i in np.flatnonzero(~host.compute):
        if run is None or consistent:
            run = simulator.played(dataclasses.replace(host, scale=scale))  # a scale of 1 at this step and later ones
        if run is None:
            return None
        scale[0, i] = _scale(dynamics, run, int(i))
    return dataclasses.replace(host, scale=scale)


def _scale(dynamics: Dynamics, run: Simulation, i: int) -> float:
    """Return the factor that gives the prediction of step i the size of the full run's output.

    Args:
        dynamics: The measured dynamics.
        run: A simulated run without a scale at step i.
        i: The step.
    """
    shared, separate = np.split(run.missed[i].copy(), 2)
    shared[i] += 1  # the prediction is the full run's output plus the error
    energy = float(shared @ dynamics.gram @ shared + separate @ separate)  # separate directions are orthogonal
    wanted = float(dynamics.gram[i, i])
    return float(np.sqrt(wanted / energy)) if energy > 0 and wanted > 0 else 1.0


def _planned(profile: Profile, computed_steps: float, mask: str) -> Planned:
    """Return the plan of the other scheduler.

    Raises:
        BadOption: If it plans other sites, decides in the run, moves noise levels, or is this scheduler.
    """
    name, options = schedulers.parse_spec(mask.replace(";", ","), "plan")
    make = schedulers.function(name, "plan", options)
    if make is plan:
        raise Unusable(f"mask={mask!r}", "predictions can be scaled only once", "Name another scheduler")
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
