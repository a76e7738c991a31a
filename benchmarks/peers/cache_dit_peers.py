"""cache-dit: DBCache, with and without TaylorSeer, with masks of steps; and DBPrune.

The demo models have 7 blocks (flux) and 5 (dit) where FLUX.1 has 57. One front block here is a seventh or a fifth of a
step, as eight are of FLUX.1, so F1B0 stands where the package's default F8B0 stands there; and a step served from the
cache costs that share, so DBCache cannot go below 50/7 or 50/5 computed steps of 50.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from diffcache.schedulers.uniform import evenly
from peers.peer import Peer

PACKAGE = "cache-dit"
BOTH = ("flux", "dit")


def dbcache(
    threshold: float,
    *,
    front: int = 1,
    back: int = 0,
    warmup: int = 3,
    in_a_row: int = -1,
    taylor: int = 0,
    models: tuple[str, ...] = BOTH,
) -> Peer:
    """Decides at each step by the change of the front blocks' residual.

    threshold  relative L1 change below which the middle blocks are served from the cache; 0 computes everything
    warmup     first steps, always computed
    in_a_row   at most so many steps from the cache one after another; -1 does not limit them
    taylor     order of the TaylorSeer calibrator; 0 reuses the residual as it is
    """

    def settings(steps: int) -> dict[str, Any]:
        return {
            "Fn_compute_blocks": front,
            "Bn_compute_blocks": back,
            "residual_diff_threshold": threshold,
            "max_warmup_steps": warmup,
            "max_continuous_cached_steps": in_a_row,
        }

    limit = "" if in_a_row < 0 else f"MC{in_a_row} "
    setting = f"F{front}B{back} W{warmup} {limit}R{threshold:g}{_order(taylor)}"
    return _peer("DBCache", setting, models, settings, taylor)


def masked(computed: int | str, *, front: int = 1, taylor: int = 0, models: tuple[str, ...] = BOTH) -> Peer:
    """The package's SCM, static: says beforehand which steps are computed.

    computed  so many of 50, evenly spread (of another number of steps: the same share); or one of the package's own
              masks: "slow", "medium", "fast", "ultra"
    """

    def settings(steps: int) -> dict[str, Any]:
        return {
            "Fn_compute_blocks": front,
            "Bn_compute_blocks": 0,
            "steps_computation_mask": mask(computed, steps),
            "steps_computation_policy": "static",
        }

    which = computed if isinstance(computed, str) else f"{computed} of 50"
    return _peer("DBCache, mask", f"F{front}B0 {which}{_order(taylor)}", models, settings, taylor)


def dbprune(threshold: float, *, front: int = 1, warmup: int = 3, models: tuple[str, ...] = BOTH) -> Peer:
    """Skips single blocks whose input hardly changed; the first ``front`` blocks always run."""

    def settings(steps: int) -> dict[str, Any]:
        return {
            "Fn_compute_blocks": front,
            "Bn_compute_blocks": 0,
            "residual_diff_threshold": threshold,
            "max_warmup_steps": warmup,
        }

    return _peer("DBPrune", f"F{front}B0 W{warmup} R{threshold:g}", models, settings, kind="DBPruneConfig")


def mask(computed: int | str, steps: int) -> list[int]:
    """1 for each step to compute, 0 for each from the cache; the first is always computed."""
    if isinstance(computed, str):
        import cache_dit

        return list(cache_dit.steps_mask(total_steps=steps, mask_policy=computed))
    return [int(step) for step in evenly(steps, max(1, round(computed * steps / 50)))]


def _order(taylor: int) -> str:
    return f" TaylorSeer O{taylor}" if taylor else ""


def _peer(
    name: str,
    setting: str,
    models: Iterable[str],
    settings: Callable[[int], dict[str, Any]],
    taylor: int = 0,
    kind: str = "DBCacheConfig",
) -> Peer:
    def switch(pipe: Any, steps: int, separate_cfg: bool) -> Callable[[], None]:
        import cache_dit

        _quiet()
        # Without guidance, and with guidance in one batch, a step is one forward. If the package expected two, it would
        # take every second step for the other branch.
        config = getattr(cache_dit, kind)(enable_separate_cfg=separate_cfg, **settings(steps))
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor) if taylor else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        return lambda: cache_dit.disable_cache(pipe)

    return Peer(name=name, package=PACKAGE, setting=setting, models=tuple(models), switch=switch)


def _quiet() -> None:
    """The package logs each call to stdout, through one handler for all of its loggers."""
    import logging

    from cache_dit import logger

    if logger._default_handler is not None:
        logger._default_handler.setLevel(logging.ERROR)


PEERS = (
    *(dbcache(r) for r in (0.05, 0.08, 0.12, 0.2, 0.3, 0.5)),
    *(dbcache(r, taylor=1) for r in (0.05, 0.08, 0.12, 0.2, 0.3, 0.5)),
    *(dbcache(r, taylor=2) for r in (0.08, 0.12, 0.2, 0.3)),
    *(dbcache(0.5, taylor=1, in_a_row=n) for n in (2, 3, 4, 6, 8)),
    dbcache(0.2, taylor=1, front=2),
    dbcache(0.2, taylor=1, back=1),
    *(masked(n) for n in (12, 6, 2)),
    *(masked(n, taylor=1) for n in (20, 12, 8, 6, 4, 2)),
    *(masked(n, taylor=1) for n in ("fast", "ultra")),
    *(dbprune(r) for r in (0.05, 0.1, 0.2, 0.4)),
)
