"""The circumstances that schedules and profiles record: the noise scheduler, the guidance, the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import get_args

from diffcache.documents import checks
from diffcache.documents.branches import BranchLayout, GuidanceMode
from diffcache.documents.checks import put, refuse
from diffcache.documents.document import Tree

NO_NOISE_SCHEDULER = "Clock"  # the class that stands for the noise scheduler of a loop without one (host/own_loops.py)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedulerId:
    """The noise scheduler for which a schedule or a profile was made.

    Attributes:
        class_name: Its class.
        config_digest: sha256 of its configuration.
        prediction_type: The quantity that the network predicts. None if the configuration does not state it.
    """

    class_name: str
    config_digest: str
    prediction_type: str | None = None

    def __post_init__(self) -> None:
        me = type(self).__name__
        checks.text(me, "class_name", self.class_name)
        checks.sha256(me, "config_digest", self.config_digest)
        if self.prediction_type is not None:
            checks.text(me, "prediction_type", self.prediction_type)


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """The form and the scales of guidance.

    Attributes:
        mode: "separate": one forward for each branch; "batched": all branches in one forward; "none": one branch.
        branches: Number of branches. It is 1 if the mode is "none".
        scales: Name of the pipeline's argument (``guidance_scale``, ``true_cfg_scale``, …) -> its value. If it is
            empty, because no scale could be read, scales are not compared.
    """

    mode: GuidanceMode
    branches: int
    scales: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        me = type(self).__name__
        if self.mode not in get_args(GuidanceMode):
            refuse(me, "mode", f"found {self.mode!r:.80}", ", ".join(map(repr, get_args(GuidanceMode))))
        put(self, branches=checks.count(me, "branches", self.branches, least=1))
        if (self.mode == "none") != (self.branches == 1):
            refuse(me, "branches", f"found {self.branches}, mode {self.mode!r}", "1 with mode 'none', else 2 or more")
        scales = checks.mapping(me, "scales", self.scales, (int, float))
        put(self, scales=MappingProxyType({n: checks.real(me, f"scales/{n}", v) for n, v in scales.items()}))

    @property
    def layout(self) -> BranchLayout:
        """The branches, without names."""
        return BranchLayout(self.branches, self.branches if self.mode == "batched" else 1)

    def __str__(self) -> str:
        """Return the form and the scales in one line."""
        form = "none" if self.mode == "none" else f"{self.mode}, {self.branches} branches"
        scales = [f"{name} {value:g}" for name, value in self.scales.items()]
        return ", ".join([form, *scales] if scales or self.mode == "none" else [form, "scale not checked"])


def upgrade_guidance(tree: Tree) -> None:
    """Replace the one ``scale`` of version 1 of either document by ``scales``."""
    guidance = tree.get("guidance")
    if isinstance(guidance, dict) and "scale" in guidance and "scales" not in guidance:
        scale = guidance.pop("scale")
        guidance["scales"] = {} if scale is None else {"guidance_scale": scale}


def noise_scheduler_title(class_name: str) -> str:
    """Return the name of a noise scheduler in text, also for the class that stands for a loop without one."""
    return "none (the loop steps by itself)" if class_name == NO_NOISE_SCHEDULER else class_name


def check_network(where: str, class_name: str | None, config_digest: str | None) -> None:
    """Check the class and the configuration digest of a network, if they are not None."""
    if class_name is not None:
        checks.text(where, "class_name", class_name)
    if config_digest is not None:
        checks.sha256(where, "config_digest", config_digest)


def check_circumstances(where: str, noise_scheduler: NoiseSchedulerId | None, guidance: Guidance | None) -> None:
    """Check the types of the noise scheduler and the guidance, if they are not None."""
    if noise_scheduler is not None:
        checks.instance(where, "noise_scheduler", noise_scheduler, NoiseSchedulerId)
    if guidance is not None:
        checks.instance(where, "guidance", guidance, Guidance)


def check_branches(where: str, name: str, branches: int, guidance: Guidance | None) -> None:
    """Raise DocumentError unless the number of branches is 1, or that of the guidance."""
    if guidance is None and branches != 1:
        refuse(where, name, f"{branches} branches", "1 without guidance", "Pass guidance=Guidance(...) as well.")
    if guidance is not None and branches not in (1, guidance.branches):
        allowed = "1" if guidance.branches == 1 else f"1, or the {guidance.branches} of guidance"
        refuse(where, name, f"{branches} branches", allowed)
