"""What a run did, counted where it was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffcache.executor import Executor
from diffcache.executor.state import State


@dataclass(frozen=True, slots=True)
class Row:
    """One site of one denoiser, for one branch.

    failed_open  predictions computed in full instead, by reason
    guarded      predictions computed in full instead, because the input had moved too far
    kept_as      format in which the outputs were kept; "exact": as they were
    peak_bytes   most bytes of them at one time
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
    kept_as: str = "exact"
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The last run.

    runs        how many there were so far
    bytes_held  now; 0 after a run
    peak_bytes  during it
    online      denoiser -> the rule that decided in the run, where one did
    backend     what worked on tensors in fewer bytes: "torch", "compiled" or "triton"; "" if there were none
    """

    rows: tuple[Row, ...]
    runs: int
    bytes_held: int
    peak_bytes: int
    online: Mapping[str, str] = field(default_factory=dict)
    backend: str = ""

    @property
    def computed(self) -> int:
        """Denoiser forwards that ran, failed-open and guarded ones included, over all branches and denoisers."""
        return sum(r.computed + r.guarded + sum(r.failed_open.values()) for r in self.rows if r.site == "model")

    @property
    def predicted(self) -> int:
        """Denoiser forwards that were predicted, over all branches and denoisers."""
        return sum(r.predicted for r in self.rows if r.site == "model")

    def __str__(self) -> str:
        head = f"{'denoiser':<16}{'site':<34}{'branch':>6}{'computed':>10}{'predicted':>11}{'failed open':>13}"
        lines = [f"{head}{'kept as':>9}{'bytes at most':>16}"]
        for r in self.rows:
            failed = sum(r.failed_open.values())
            counts = f"{r.denoiser:<16}{r.site:<34}{r.branch:>6}{r.computed:>10}{r.predicted:>11}{failed:>13}"
            lines.append(counts + (f"{r.kept_as:>9}{r.peak_bytes:>16,}" if r.peak_bytes else ""))
        if guarded := sum(r.guarded for r in self.rows):
            lines.append(f"guarded: the input had moved too far ({guarded})")
        for name, rule in self.online.items():
            lines.append(f"{name}: decided in the run by {rule}")
            lines += [f"  {r.site:<48}{r.branch:>6}  {r.strip}" for r in self.rows if r.denoiser == name]
        lines += sorted({f"failed open: {reason} ({n})" for r in self.rows for reason, n in r.failed_open.items()})
        if self.backend:
            lines.append(f"kept tensors are worked on by {_SPOKEN[self.backend]}")
        lines.append(f"runs {self.runs}, cache held now {self.bytes_held:,} bytes, at most {self.peak_bytes:,} bytes")
        return "\n".join(lines)


_SPOKEN = {"torch": "plain torch", "compiled": "compiled torch", "triton": "Triton kernels"}


def report_of(executor: Executor) -> Report:
    state = executor.last
    if state is None:
        return Report((), 0, 0, 0)
    most = state.most_bytes()
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
            kept_as=_format(state, denoiser, site),
            peak_bytes=most[denoiser, site, branch],
        )
        for (denoiser, site, branch), c in sorted(state.counts.items())
    )
    plans = state.schedule.denoisers.items()
    online = {name: plan.online.rule for name, plan in plans if plan.online is not None}
    return Report(rows, executor.runs, state.store.bytes, state.store.peak_bytes, online, state.used)


def _format(state: State, denoiser: str, site: str) -> str:
    program = state.programs.get((denoiser, site))
    return "exact" if program is None or program.store is None else program.store
