"""The report of a run: computed and predicted forwards, kept bytes, notices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffcache.documents.schedule import CacheSchedule
from diffcache.executor import Executor
from diffcache.executor.notices import Notice, counted
from diffcache.executor.state import RunState
from diffcache.text import card, html_table


@dataclass(frozen=True, slots=True)
class Row:
    """The counts of one site of one denoiser, for one branch of guidance.

    Attributes:
        denoiser: The component name of the network.
        site: The name of the site.
        branch: The number of the branch.
        computed: Forwards that the schedule or its rule computed.
        predicted: Forwards that were predicted.
        failed_open: Predictions that were computed in full instead, by reason.
        guarded: Predictions that were computed in full instead, because the input had moved too far.
        strip: A character for each forward, in order: ■ for computed, for any reason, and · for predicted.
        kept_as: The format in which outputs were kept. ``"exact"`` is the precision of the model.
        peak_bytes: The most bytes of kept outputs at one time.
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


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """A summary of the last run, or of the run in progress.

    Attributes:
        rows: The counts of each site and branch.
        runs: The number of runs that have begun.
        bytes_held: The bytes of all tensors that are kept now. It is 0 after a run.
        peak_bytes: The most bytes of kept tensors at one time in the run.
        online: The rule that decided in the run, by denoiser.
        backend: What ran operations on tensors kept in fewer bytes: ``"torch"``, ``"compiled"`` or ``"triton"``. It is
            empty if there were no such tensors.
        notices: How the run differs from the schedule, with the reason. The list is complete when the run
            is over.
        totals: The number of times by kind of notice, over all runs since the pipeline was accelerated.
        computed: Denoiser forwards in which everything was computed, over all branches and denoisers.
        predicted: Denoiser forwards that were predicted, as a whole or at sites inside.
        skipped: The share of the work of the scheduled sites that was skipped, 0 to 1: the mean over all forwards of
            the share of calls of these sites that were predicted. All else always runs, so the share of operations
            of the denoiser is smaller. ``diffcache.estimate`` counts operations.
        schedule: The schedule of the run. A rule has made it for the run. It is None before the first run.
        chosen: Which of several schedules the run used. It is empty if there was only one, or if the run fitted none.
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
    schedule: CacheSchedule | None = field(default=None, repr=False, compare=False)
    chosen: str = ""

    @property
    def reasons(self) -> Mapping[str, int]:
        """Return the number of times by kind of notice, in this run. docs/serving.md lists the kinds."""
        return dict(counted(self.notices))

    @property
    def planned(self) -> tuple[Row, ...]:
        """Return the rows that the table shows: those of sites that the schedule plans.

        A network of which sites inside are predicted is always called, so the row of its ``model`` site would state
        forwards as computed of which parts were predicted. It is in ``rows`` only.
        """
        if self.schedule is None:
            return self.rows
        sites = {(name, site) for name, plan in self.schedule.denoisers.items() for site in plan.sites}
        return tuple(row for row in self.rows if (row.denoiser, row.site) in sites)

    def __repr__(self) -> str:
        if not self.runs:
            return "<Report: no run yet>"
        work = f"{self.computed} forwards computed, {self.predicted} predicted, {self.skipped:.0%} skipped"
        reasons = "".join(f", {kind} {times}" for kind, times in self.reasons.items())
        return f"<Report of run {self.runs}: {work}{reasons}>"

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        heads = ["denoiser, site", "computed", "predicted", "failed open", "kept"]
        several = any(r.branch for r in self.rows)
        rows = []
        for r in self.planned:
            name = f"{r.denoiser} {r.site}{f', branch {r.branch}' if several else ''}"
            kept = f"{r.kept_as}, {r.peak_bytes:,} bytes" if r.peak_bytes else ""
            rows.append([name, str(r.computed), str(r.predicted), str(sum(r.failed_open.values())), kept])
        table = html_table(heads, rows, right=heads[1:4]) if rows else ""
        return card("Report", "\n".join(self._notes(wide=False)), table=table)

    def __str__(self) -> str:
        wide = max([32, *(len(r.site) for r in self.planned)]) + 2
        head = f"{'denoiser':<16}{'site':<{wide}}{'branch':>6}{'computed':>10}{'predicted':>11}{'failed open':>13}"
        lines = [f"{head}{'kept as':>9}{'bytes at most':>16}"]
        for r in self.planned:
            failed = sum(r.failed_open.values())
            counts = f"{r.denoiser:<16}{r.site:<{wide}}{r.branch:>6}{r.computed:>10}{r.predicted:>11}{failed:>13}"
            lines.append(counts + (f"{r.kept_as:>9}{r.peak_bytes:>16,}" if r.peak_bytes else ""))
        return "\n".join(lines + self._notes())

    def _notes(self, *, wide: bool = True) -> list[str]:
        """Return the lines below the table.

        Args:
            wide: Whether a site and its forwards share a line.
        """
        lines = []
        if self.chosen:
            lines.append(f"used {self.chosen}")
        if guarded := sum(r.guarded for r in self.rows):
            lines.append(f"guarded: the input had moved too far ({guarded})")
        for name, rule in self.online.items():
            lines.append(f"{name}: decided in the run by {rule}")
            line = "  {0.site:<48}{0.branch:>6}  {0.strip}" if wide else "  {0.site}, branch {0.branch}\n  {0.strip}"
            lines += [line.format(r) for r in self.planned if r.denoiser == name]
        if self.computed or self.predicted:
            forwards = f"forwards: {self.computed} computed in full, {self.predicted} predicted"
            inside = any(r.site != "model" for r in self.planned)
            lines.append(
                f"{forwards} in part ({self.skipped:.0%} of the work of these sites was skipped)"
                if inside
                else f"{forwards} ({self.skipped:.0%} of the denoiser's work was skipped)"
            )
        if self.schedule is not None:  # a published calibration
            notes = self.schedule.provenance.items()
            lines += [f"{key}: {text}" for key, text in notes if key.partition(" ")[0] == "preset"]
        lines += [str(notice) for notice in self.notices]
        if self.backend:
            lines.append(f"kept tensors are worked on by {_BACKENDS[self.backend]}")
        if self.totals:
            lines.append("over all runs: " + ", ".join(f"{kind} {n}" for kind, n in sorted(self.totals.items())))
        lines.append(f"runs {self.runs}, cache held now {self.bytes_held:,} bytes, at most {self.peak_bytes:,} bytes")
        return lines


_BACKENDS = {"torch": "plain torch", "compiled": "compiled torch", "triton": "Triton kernels"}


def report_of(executor: Executor) -> Report:
    """Return the report of the last run of ``executor``, or of the run in progress."""
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
        schedule=state.schedule,
        chosen=state.chosen,
    )


def _format(state: RunState, denoiser: str, site: str) -> str:
    """Return the name of the format in which a site's outputs are kept."""
    program = state.programs.get((denoiser, site))
    return "exact" if program is None or program.store is None else program.store
