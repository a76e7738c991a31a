"""What tests of an accelerated run check: forwards that ran, traces left behind, and a naive loop for comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from pipelines import TINY, Tiny, run
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffcache import CacheSchedule, accelerated, host, report
from diffcache.documents import GRANULARITIES, DenoiserPlan, Guidance, NoiseSchedulerId, SitePlan
from diffcache.host import find_sites

BRANCHES = {"none": 1, "separate": 2, "batched": 1}  # denoiser calls at each step


def granularities(tiny: Tiny) -> tuple[str, ...]:
    """U-Nets have one stack, their deep branch, and nothing finer."""
    return GRANULARITIES[:2] if tiny.denoisers == ("unet",) else GRANULARITIES


def offered(pipe: Any) -> tuple[str, ...]:
    """The granularities that every denoiser of a pipeline has."""
    found = [{site.partition(":")[0] for site in find_sites(module)} for module in host.denoisers(pipe).values()]
    return tuple(granularity for granularity in GRANULARITIES if all(granularity in kinds for kinds in found))


def outcome(pipe: Any, tiny: Tiny) -> str:
    """Whether a pipeline can be cached at every granularity that it has, in a word or two: "yes", or what is wrong."""
    call = tiny.call(pipe)
    untouched, whole = counted(pipe, tiny)
    found = names(pipe)  # after a run: pipelines keep attributes of their last one
    places = offered(pipe)
    for granularity in places:
        with accelerated(pipe, f"full:sites={granularity}"):
            if not torch.equal(run(pipe, call), untouched):
                return f"wrong at {granularity} sites"
        with accelerated(pipe, f"uniform:every=2,sites={granularity}"):
            fast, done = counted(pipe, tiny)
            seen = report(pipe)
            if idle := [denoiser for denoiser in tiny.denoisers if done[denoiser] >= whole[denoiser]]:
                return f"no effect at {granularity} sites of {', '.join(idle)}"
            if torch.equal(fast, untouched) or not bool(fast.isfinite().all()):
                return f"no prediction shows at {granularity} sites"
            if granularity == places[-1] and not torch.equal(run(pipe, call), fast):
                return f"another result every time at {granularity} sites"
            if seen.bytes_held:
                return f"holds {seen.bytes_held} bytes after a run at {granularity} sites"
            reasons = {reason for row in seen.rows for reason in row.failed_open}
            if reasons and len(tiny.denoisers) == 1:  # a second one that takes over in mid-run has no anchors at first
                return f"failed open at {granularity} sites: {', '.join(sorted(reasons))}"
    return "yes" if names(pipe) == found and torch.equal(run(pipe, call), untouched) else "leaves traces"


def counted(pipe: Any, tiny: Tiny) -> tuple[Tensor, Counter[str]]:
    """Run a call, and return its output and how often modules without children ran, by denoiser."""
    with leaf_calls(pipe, tiny.denoisers) as calls:
        output = run(pipe, tiny.call(pipe))
    sums: Counter[str] = Counter()
    for (denoiser, _), times in calls.items():
        sums[denoiser] += times
    return output, sums


PLACES = [(name, granularity) for name, tiny in TINY.items() for granularity in granularities(tiny)]


@contextmanager
def leaf_calls(pipe: Any, denoisers: Sequence[str]) -> Iterator[Counter[tuple[str, str]]]:
    """How often each leaf module runs. A leaf is not a site, so what is counted here was not predicted."""
    calls: Counter[tuple[str, str]] = Counter()

    def count(key: tuple[str, str]) -> Callable[..., None]:
        return lambda *_: calls.update([key])

    with ExitStack() as undo:
        for denoiser in denoisers:
            for path, module in getattr(pipe, denoiser).named_modules():
                if not list(module.children()):
                    undo.callback(module.register_forward_hook(count((denoiser, path))).remove)
        yield calls


def hold(compute: Sequence[bool] | str, branches: int = 1, **coefficients: np.ndarray) -> SitePlan:
    """Reuse the newest output wherever ``compute`` is false. As text: "#..#" computes the first and last of four."""
    mask = np.array([c == "#" for c in compute] if isinstance(compute, str) else compute, bool)
    weights = np.repeat(np.where(mask, 0.0, 1.0)[None, :, None], branches, axis=0)
    return SitePlan(compute=mask, weights=weights, **coefficients)


def bound(pipe: Any, plan: SitePlan, site: str = "model", guidance: Guidance | None = None) -> CacheSchedule:
    """A schedule that fits this pipeline as it is, and no other."""
    denoisers = {
        name: DenoiserPlan(
            sites={s: plan for s in find_sites(module) if s.partition(":")[0] == site},
            class_name=host.class_name(module),
            config_digest=host.config_digest(module),
        )
        for name, module in host.denoisers(pipe).items()
    }
    scheduler = NoiseSchedulerId(
        class_name=type(pipe.scheduler).__name__,
        config_digest=host.config_digest(pipe.scheduler),
        prediction_type=host.prediction_type(pipe.scheduler),
    )
    return CacheSchedule(steps=len(plan.compute), denoisers=denoisers, noise_scheduler=scheduler, guidance=guidance)


def far(a: Tensor, b: Tensor) -> float:
    """Return the relative L2 distance of a tensor from a reference."""
    return float((a - b).norm() / b.norm())


def copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


@contextmanager
def naive_reuse(pipe: Any, denoisers: Sequence[str], calls_per_step: int, every: int) -> Iterator[None]:
    """Reuse written as anyone would write it for one known pipeline: count the calls, keep the last computed output.

    Knows nothing of progress bars or noise schedulers. A denoiser that has nothing kept yet computes.
    """
    made, kept = 0, {}

    def forward(denoiser: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            step, branch = divmod(made, calls_per_step)
            made += 1
            if step % every and (denoiser, branch) in kept:
                return copied(kept[denoiser, branch])
            value = inner(*args, **kwargs)
            if step % every == 0:
                kept[denoiser, branch] = copied(value)
            return value

        return around

    modules = [getattr(pipe, denoiser) for denoiser in denoisers]
    for denoiser, module in zip(denoisers, modules, strict=True):
        module.__dict__["forward"] = forward(denoiser, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def owners(pipe: Any) -> dict[str, Any]:
    """Every object that acceleration may touch, by name: pipeline, noise scheduler, components and their parts."""
    found = {"pipe": pipe, "scheduler": pipe.scheduler}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            found |= {f"{name}.{path}": module for path, module in component.named_modules()}
    return found


def dicts(pipe: Any) -> dict[str, list[tuple[str, int]]]:
    """The ``__dict__`` of each owner: names in order, values by identity."""
    return {name: [(key, id(value)) for key, value in vars(owner).items()] for name, owner in owners(pipe).items()}


def names(pipe: Any) -> dict[str, list[str]]:
    """The names in the ``__dict__`` of each owner: what stays comparable when a run has replaced values."""
    return {name: sorted(vars(owner)) for name, owner in owners(pipe).items()}


def ours(pipe: Any) -> list[str]:
    """Where something of this library hangs on the pipeline or its parts."""
    return [
        f"{name}.{key}"
        for name, owner in owners(pipe).items()
        for key, value in vars(owner).items()
        if type(value).__module__.partition(".")[0] == "diffcache"
    ]


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name in pipe.components
        if isinstance(getattr(pipe, name, None), nn.Module)
        for key, tensor in getattr(pipe, name).state_dict().items()
    }


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
