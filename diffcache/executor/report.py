"""What a run did, counted where it was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffcache.executor import Executor
from diffcache.executor.notices import Notice, counted
from diffcache.executor.state import RunState


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
    """What the last run did, or the run in progress.

    runs        how many began so far
    bytes_held  now; 0 after a run
    peak_bytes  during it
    online      denoiser -> the rule that decided in the run, where one did
    backend     what worked on tensors in fewer bytes: "torch", "compiled" or "triton"; "" if there were none
    notices     what went otherwise than the schedule says, with its reason. Known in full when the run is over
    totals      kind of notice -> times, over all runs since the pipeline was accelerated
    computed    denoiser forwards in which everything was computed, over all branches and denoisers
    predicted   denoiser forwards that were predicted, as a whole or at sites inside
    skipped     share of the work, 0 to 1, as far as it lies in the sites of the schedule: the mean over all forwards of
                the share of these sites' calls that were predicted. What lies outside of them always runs, so the share
                of the denoiser's operations is smaller; ``diffcache.estimate`` counts those
    """

    rows: tuple[Row, ...]
    runs: int
    bytes_held: int
    peak_bytes: int
    online: Mapping[str, str] = field(default_factory=dict)
    backend: str = ""
    notices: tuple[Notice, ...] = ()
    totals: Mapping[str, int] = field(default_factory=dict)
    computed: int = 0
    predicted: int = 0
    skipped: float = 0.0

    @property
    def reasons(self) -> Mapping[str, int]:
        """Kind of notice -> times, in this run. docs/serving.md lists the kinds."""
        return dict(counted(self.notices))

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
        if self.computed or self.predicted:
            forwards = f"forwards: {self.computed} computed in full, {self.predicted} predicted"
            inside = any(r.site != "model" for r in self.rows)
            lines.append(
                f"{forwards} in part ({self.skipped:.0%} of the work of these sites was skipped)"
                if inside
                else f"{forwards} ({self.skipped:.0%} of the denoiser's work was skipped)"
            )
        lines += [str(notice) for notice in self.notices]
        if self.backend:
            lines.append(f"kept tensors are worked on by {_SPOKEN[self.backend]}")
        if self.totals:
            lines.append("over all runs: " + ", ".join(f"{kind} {n}" for kind, n in sorted(self.totals.items())))
        lines.append(f"runs {self.runs}, cache held now {self.bytes_held:,} bytes, at most {self.peak_bytes:,} bytes")
        return "\n".join(lines)


_SPOKEN = {"torch": "plain torch", "compiled": "compiled torch", "triton": "Triton kernels"}


def report_of(executor: Executor) -> Report:
    state, notices = executor.last, tuple(executor.notices())
    if state is None:
        return Report((), 0, 0, 0, notices=notices, totals=dict(executor.totals))
    most = state.most_bytes()
    rows = tuple(
        Row(
            denoiser,
            site,
            branch,
            computed=c.computed,
            predicted=c.predicted,
            failed_open={reason.text: times for reason, times in c.failed_open.items()},
            guarded=c.guarded,
            strip="".join("■" if computed else "·" for computed in c.timeline),
            kept_as=_format(state, denoiser, site),
            peak_bytes=most[denoiser, site, branch],
        )
        for (denoiser, site, branch), c in sorted(state.counts.items())
    )
    plans = state.schedule.denoisers.items()
    online = {name: plan.online.rule for name, plan in plans if plan.online is not None}
    skipped = [forward.skipped for forward in state.forwards]
    return Report(
        rows,
        executor.runs,
        state.store.bytes,
        state.store.peak_bytes,
        online,
        state.backend_used,
        notices,
        dict(executor.totals),
        computed=sum(not share for share in skipped),
        predicted=sum(bool(share) for share in skipped),
        skipped=sum(skipped) / max(len(skipped), 1),
    )


def _format(state: RunState, denoiser: str, site: str) -> str:
    program = state.programs.get((denoiser, site))
    return "exact" if program is None or program.store is None else program.store
