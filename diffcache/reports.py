"""What a run did, counted where it was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffcache.executor import Executor


@dataclass(frozen=True, slots=True)
class Row:
    """One site of one denoiser, for one branch. ``failed_open``: predictions computed in full instead, by reason."""

    denoiser: str
    site: str
    branch: int
    computed: int
    predicted: int
    failed_open: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """The last run. ``bytes_held`` now (0 after a run), ``peak_bytes`` during it; ``runs`` counts all so far."""

    rows: tuple[Row, ...]
    runs: int
    bytes_held: int
    peak_bytes: int

    @property
    def computed(self) -> int:
        """Denoiser forwards that ran, failed-open ones included, over all branches and denoisers."""
        return sum(r.computed + sum(r.failed_open.values()) for r in self.rows if r.site == "model")

    @property
    def predicted(self) -> int:
        """Denoiser forwards that were predicted, over all branches and denoisers."""
        return sum(r.predicted for r in self.rows if r.site == "model")

    def __str__(self) -> str:
        lines = [f"{'denoiser':<16}{'site':<34}{'branch':>6}{'computed':>10}{'predicted':>11}{'failed open':>13}"]
        for r in self.rows:
            failed = sum(r.failed_open.values())
            lines.append(f"{r.denoiser:<16}{r.site:<34}{r.branch:>6}{r.computed:>10}{r.predicted:>11}{failed:>13}")
        lines += sorted({f"failed open: {reason} ({n})" for r in self.rows for reason, n in r.failed_open.items()})
        lines.append(f"runs {self.runs}, cache held now {self.bytes_held:,} bytes, at most {self.peak_bytes:,} bytes")
        return "\n".join(lines)


def report_of(executor: Executor) -> Report:
    state = executor.last
    if state is None:
        return Report((), 0, 0, 0)
    rows = tuple(
        Row(denoiser, site, branch, c.computed, c.predicted, dict(c.failed_open))
        for (denoiser, site, branch), c in sorted(state.counts.items())
    )
    return Report(rows, executor.runs, state.store.bytes, state.store.peak_bytes)
