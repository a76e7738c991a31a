"""Make the layers of a schedule, and keep them on top of third-party wrappers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffcache import host
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import BadOption, UnsupportedModel
from diffcache.executor import criteria
from diffcache.executor.checks import Sites, check_compiled
from diffcache.executor.criteria import TIME_EMBEDDING, Where
from diffcache.executor.wrappers import Wrappers
from diffcache.host.structure import DEEP_STACK, deep_branch, first_norm
from diffcache.patch import Undo, Wrapper, layer, on_top, spot, weak

Deciding = Mapping[str, tuple[str, Where | None]]  # denoiser -> the stack whose first block decides, where in the block


@dataclass(slots=True)
class Patch:
    """One layer on one module.

    Attributes:
        part: A weak reference to the module. A layer must not keep a denoiser alive.
        wrapper: The layer.
        undo: Removes the layer.
    """

    part: Callable[[], Any]
    wrapper: Wrapper
    undo: Undo = lambda: None

    def apply(self) -> None:
        """Put the layer on top of the method that a call of the module runs, unless it is there.

        Third-party code may restore the forward that it found, and thereby remove the layer. Model offloading does so
        after every run.
        """
        part = self.part()
        if part is not None and not on_top(*spot(part), self.wrapper):
            self.undo()
            self.undo = layer(*spot(part), self.wrapper)


def make_patches(wrappers: Wrappers, schedules: Sequence[CacheSchedule], sites: Sites) -> list[Patch]:
    """Make the layers that any of several schedules needs. They are not applied.

    Args:
        wrappers: Makes the wrappers.
        schedules: The schedules. ``demand_visible`` has accepted them.
        sites: The modules of every site of the denoisers.

    Raises:
        UnsupportedModel: A criterion cannot decide in this network.
        BadOption: A criterion decides in a block, and a site of the plan is not a stack.
    """
    found = []
    for name, modules in sites.items():
        wrapped = dict.fromkeys(site for schedule in schedules for site in _wrapped_sites(schedule, name))
        norms = _deciding_norms(schedules, name, sites)
        for schedule in schedules:
            first, where = deciding_stack(schedule, name, sites)
            if where is Where.TIME_EMBEDDING:
                _demand_time_embedding(schedule, name, first, sites)
        for site in wrapped:
            pairs = list(wrappers.for_site(name, site, modules[site]))
            if site in norms:
                pairs.append((norms[site], wrappers.for_first_norm(name)))
            found += [Patch(weak(part), wrapper) for part, wrapper in pairs]
    return found


def _deciding_norms(schedules: Sequence[CacheSchedule], name: str, sites: Sites) -> dict[str, Any]:
    """Return stack -> the normalisation in its first block by which a criterion of a schedule decides.

    Raises:
        UnsupportedModel: The block has none, or it is in a compiled graph.
    """
    found: dict[str, Any] = {}
    root = sites[name]["model"][0]
    for schedule in schedules:
        site, where = deciding_stack(schedule, name, sites)
        if where is not Where.FIRST_NORM or site in found:
            continue
        norm = first_norm(sites[name][site][0])
        if norm is None:
            raise _no_norm(schedule, name, site, sites)
        path = next(path for path, module in root.named_modules() if module is norm)
        check_compiled(name, root, [f"sublayer:{path}"])
        found[site] = norm
    return found


def deciding_stacks(schedule: CacheSchedule, sites: Sites) -> Deciding:
    """Return ``deciding_stack`` of every denoiser for which there is one."""
    found = {name: deciding_stack(schedule, name, sites) for name in sites}
    return {name: (site, where) for name, (site, where) in found.items() if where is not None}


def demand_visible(schedule: CacheSchedule, denoisers: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel if a site of ``schedule`` is inside a compiled graph, where no layer is called."""
    for name, denoiser in denoisers.items():
        check_compiled(name, denoiser, _wrapped_sites(schedule, name))


def _wrapped_sites(schedule: CacheSchedule, denoiser: str) -> tuple[str, ...]:
    """Return the sites of ``denoiser`` that get a layer. The model always does, because a forward begins there."""
    plan = schedule.denoisers.get(denoiser)
    return ("model", *(site for site in plan.sites if site != "model")) if plan else ("model",)


def _no_norm(schedule: CacheSchedule, denoiser: str, site: str, sites: Sites) -> UnsupportedModel:
    """Return the error for a first block without a normalisation, by which the criterion decides."""
    criterion = criteria.of(schedule.denoisers[denoiser])
    root, block = sites[denoiser]["model"][0], sites[denoiser][site][0]
    others = ", ".join(map(repr, criteria.deciding_at(Where.MODEL)))
    return UnsupportedModel(
        f"the online rule {criterion.name if criterion else ''!r} compares the output of the first normalisation in "
        f"{site!r} of {host.class_name(root)}; there is none in {type(block).__name__}. Use another rule: {others}."
    )


def _demand_time_embedding(schedule: CacheSchedule, denoiser: str, site: str, sites: Sites) -> None:
    """Raise UnsupportedModel unless the first block of a stack is given the time embedding that decides."""
    block = sites[denoiser][site][0]
    if TIME_EMBEDDING in host.parameters(block):
        return
    criterion = criteria.of(schedule.denoisers[denoiser])
    others = ", ".join(map(repr, criteria.deciding_at(Where.MODEL)))
    raise UnsupportedModel(
        f"the online rule {criterion.name if criterion else ''!r} looks at the argument {TIME_EMBEDDING!r} of the "
        f"first block in {site!r} of {host.class_name(sites[denoiser]['model'][0])}; {type(block).__name__} has none. "
        f"Use another rule: {others}."
    )


def deciding_stack(schedule: CacheSchedule, denoiser: str, sites: Sites) -> tuple[str, Where | None]:
    """Return the stack whose first block decides, and where in the block.

    Of several stacks it is the first in the order of the network.

    Args:
        schedule: The schedule.
        denoiser: The component name of the network.
        sites: The modules of every site of the denoisers.

    Returns:
        ``("", None)`` if no criterion decides in a block.

    Raises:
        UnsupportedModel: A criterion decides in a block of a U-Net.
        BadOption: A criterion decides in a block, and a site of the plan is not a stack.
    """
    plan = schedule.denoisers.get(denoiser)
    criterion = criteria.of(plan)
    if plan is None or criterion is None or criterion.about.where is Where.MODEL:
        return "", None
    for site in plan.sites:
        if site == DEEP_STACK and deep_branch(sites[denoiser]["model"][0]):
            raise UnsupportedModel(
                f"the online rule {criterion.name!r} reuses the difference between a stack's output and input. "
                f"{denoiser!r} is a U-Net: the output of its deep branch has another shape than the input, so no step "
                "could be predicted. Allowed: 'easycache', or 'uniform:every=2,sites=stack'."
            )
        if not site.startswith("stack:"):
            raise BadOption("sites", site, f"stacks, because the online rule {criterion.name!r} decides in a block")
    return next(site for site in sites[denoiser] if site in plan.sites), criterion.about.where
