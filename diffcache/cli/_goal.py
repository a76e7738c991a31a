"""Make the budget of a schedule from the options of a command."""

from __future__ import annotations

from diffcache.cli._options import either, size_in_bytes
from diffcache.documents.budget import Budget
from diffcache.errors import Unusable


def goal(
    *,
    computed: float | None,
    speedup: float | None,
    min_psnr_db: float | None,
    max_error_db: float | None,
    memory: str | None,
    memory_bytes: str | None = None,
) -> Budget:
    """Return the budget.

    Args:
        computed: Number of computed steps.
        speedup: Speed-up of the sampling loop.
        min_psnr_db: Least expected PSNR of the final state in dB.
        max_error_db: The old name of ``min_psnr_db``.
        memory: Most memory of kept outputs, as ``size_in_bytes`` reads it.
        memory_bytes: The old name of ``memory``.

    Raises:
        BadOption: If there is not exactly one goal, or a value is out of range.
    """
    least = either("--min-psnr-db", min_psnr_db, "--max-error-db", max_error_db)
    goals = {"--computed": computed, "--speedup": speedup, "--min-psnr-db": least}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} were given" if given else "no goal was given"
        raise Unusable("budget", found, f"Pass exactly one of {', '.join(goals)}")
    size = either("--memory", memory, "--memory-bytes", memory_bytes)
    return Budget(
        computed_steps=int(computed) if computed is not None and computed.is_integer() else computed,
        speedup=speedup,
        max_error_db=least,
        memory_bytes=None if size is None else size_in_bytes(size),
    )
