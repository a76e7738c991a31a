"""Hold the loop and the networks that a schedule is made for, and make schedules from decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from diffcache.documents.schedule import (
    CacheSchedule,
    DenoiserPlan,
    Expected,
    Guidance,
    NoiseSchedulerId,
    Online,
    SitePlan,
)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """The network for which a denoiser's plan is made.

    Attributes:
        class_name: Class of the network. None: the plan fits any.
        config_digest: sha256 of its configuration. None: the plan fits any.
        called: bool [T], steps at which the loop calls it. None: not known.
    """

    class_name: str | None = None
    config_digest: str | None = None
    called: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScheduleContext:
    """The circumstances of a schedule: all of its fields that are not decisions.

    Every function of this package that makes a new schedule uses this class.

    Attributes:
        steps: Number of iterations of the sampling loop.
        networks: Denoiser -> its network. Plans of denoisers that are not listed fit any network.
        noise_scheduler: The noise scheduler. None: the schedule fits any.
        guidance: The guidance. None: the schedule fits any, and no site has coefficients per branch.
        timesteps: float64 [T], the timesteps of the loop, or None.
        notes: Entries of the provenance that describe the circumstances.
    """

    steps: int
    networks: Mapping[str, Network] = field(default_factory=dict)
    noise_scheduler: NoiseSchedulerId | None = None
    guidance: Guidance | None = None
    timesteps: np.ndarray | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def schedule(
        self,
        plans: Mapping[str, Mapping[str, SitePlan]],
        *,
        online: Online | None = None,
        sigmas: np.ndarray | None = None,
        expected: Expected | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> CacheSchedule:
        """Make the schedule of these decisions.

        Args:
            plans: Denoiser -> site -> plan.
            online: The criterion that decides in the run, for every denoiser. None: no criterion.
            sigmas: float64 [T + 1], noise levels that replace the noise scheduler's own.
            expected: The fidelity that planning expects.
            notes: Entries of the provenance that describe the decisions. Entries of the context replace equal keys.

        Raises:
            DocumentError: If the decisions do not form a valid schedule.
        """
        return CacheSchedule(
            steps=self.steps,
            denoisers={name: self._plan(name, sites, online) for name, sites in plans.items()},
            noise_scheduler=self.noise_scheduler,
            guidance=self.guidance,
            timesteps=self.timesteps,
            sigmas=sigmas,
            expected=expected,
            provenance={**(notes or {}), **self.notes},
        )

    def _plan(self, name: str, sites: Mapping[str, SitePlan], online: Online | None) -> DenoiserPlan:
        network = self.networks.get(name, Network())
        return DenoiserPlan(
            sites=sites,
            online=online,
            called=network.called,
            class_name=network.class_name,
            config_digest=network.config_digest,
        )
