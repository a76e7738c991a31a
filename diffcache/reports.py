"""What a run did, counted where it was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffcache.executor import Executor


@dataclass(frozen=True, slots=True)
class Row:
    """One site of one denoiser, for one branch.

    failed_open  predictions computed in full instead, by reason
    guarded      predictions computed in full instead, because the input had moved too far
    strip        ■ computed, for whatever reason, and · predicted, in the order in which they came
    """

    denoiser: str
    site: str
    branch: int
    computed: int
    predicted: int
    failed_open: Mapping[str, int]
    guarded: int = 0
    strip: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The last run.

    runs        how many there were so far
    bytes_held  now; 0 after a run
    peak_bytes  during it
    online      denoiser -> the rule that decided in the run, where one did
    """

    rows: tuple[Row, ...]
    runs: int
    bytes_held: int
    peak_bytes: int
    online: Mapping[str, str] = field(default_factory=dict)

    @property
    def computed(self) -> int:
        """Denoiser forwards that ran, failed-open and guarded ones included, over all branches and denoisers."""
        return sum(r.computed + r.guarded + sum(r.failed_open.values()) for r in self.rows if r.site == "model")

    @property
    def predicted(self) -> int:
        """Denoiser forwards that were predicted, over all branches and denoisers."""
        return sum(r.predicted for r in self.rows if r.site == "model")

    def __str__(self) -> str:
        lines = [f"{'denoiser':<16}{'site':<34}{'branch':>6}{'computed':>10}{'predicted':>11}{'failed open':>13}"]
        for r in self.rows:
            failed = sum(r.failed_open.values())
            lines.append(f"{r.denoiser:<16}{r.site:<34}{r.branch:>6}{r.computed:>10}{r.predicted:>11}{failed:>13}")
        if guarded := sum(r.guarded for r in self.rows):
            lines.append(f"guarded: the input had moved too far ({guarded})")
        for name, rule in self.online.items():
            lines.append(f"{name}: decided in the run by {rule}")
            lines += [f"  {r.site:<48}{r.branch:>6}  {r.strip}" for r in self.rows if r.denoiser == name]
        lines += sorted({f"failed open: {reason} ({n})" for r in self.rows for reason, n in r.failed_open.items()})
        lines.append(f"runs {self.runs}, cache held now {self.bytes_held:,} bytes, at most {self.peak_bytes:,} bytes")
        return "\n".join(lines)


def report_of(executor: Executor) -> Report:
    state = executor.last
    if state is None:
        return Report((), 0, 0, 0)
    rows = tuple(
        Row(
            denoiser,
            site,
            branch,
            computed=c.computed,
            predicted=c.predicted,
            failed_open=dict(c.failed_open),
            guarded=c.guarded,
            strip="".join("■" if computed else "·" for computed in c.strip),
        )
        for (denoiser, site, branch), c in sorted(state.counts.items())
    )
    plans = state.schedule.denoisers.items()
    online = {name: plan.online.rule for name, plan in plans if plan.online is not None}
    return Report(rows, executor.runs, state.store.bytes, state.store.peak_bytes, online)
