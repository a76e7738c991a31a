"""Every peer on the same pictures: fidelity to the full run, work, wall-clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from diffcache.assets import DemoModel
from diffcache.demo.run import STEPS
from diffcache.eval.metrics.psnr import score as psnr_db
from diffcache.eval.metrics.ssim import score as ssim
from diffcache.profiling.recording import loop_clock
from peers.adapters import PEERS
from peers.peer import Peer
from peers.work import Work, counted


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRow:
    """One peer on one model. Numbers are None where it did not run, times also where nothing was timed.

    computed  as many full steps as would have been the same work in the denoiser's blocks
    complete  steps at which every layer of the blocks ran, be it for one branch only
    seconds   of the sampling loop, median of the timed runs
    speedup   that of the full run / ``seconds``, in one process
    psnr_db, ssim  of decoded pictures against the full run, means over pictures
    failed    why it did not run, in one line
    """

    model: str
    package: str
    version: str
    name: str
    setting: str
    steps: int
    computed: float | None = None
    complete: float | None = None
    seconds: float | None = None
    speedup: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    failed: str = ""
    note: str = ""


def measure_peers(
    model: DemoModel,
    subjects: Sequence[str],
    seeds: Sequence[int],
    repeats: int,
    *,
    steps: int = STEPS,
    peers: Sequence[Peer] = PEERS,
    batch: int | None = None,
) -> list[PeerRow]:
    """One row per peer that is meant for ``model``, whether it runs or not.

    subjects, seeds  of the pictures; not the first eight of ``split``, on which MagCache is calibrated
    repeats          timed runs, after one that is counted and compared; 0 times nothing
    batch            pictures per call of the pipeline; None: all at once. Caches that decide during the run decide for
                     the whole batch.
    """
    calls = [
        (subjects[i : i + (batch or len(seeds))], seeds[i : i + (batch or len(seeds))])
        for i in range(0, len(seeds), batch or len(seeds))
    ]
    full = _Trial(model, calls, steps, repeats)
    rows = []
    for peer in tqdm(
        [p for p in peers if model.about.family in p.models], desc=f"peers on {model.name}", unit="setting"
    ):
        known = {
            "model": model.name, "package": peer.package, "version": peer.version, "name": peer.name,
            "setting": peer.setting, "steps": steps, "note": peer.note,
        }  # fmt: skip
        try:
            with peer.on(model.pipe, steps, separate_cfg=model.about.separate_cfg):
                trial = _Trial(model, calls, steps, repeats)
        except Exception as error:  # whatever a foreign package raises is the row's result
            reason = (str(error).splitlines() or [""])[0]
            rows.append(PeerRow(**known, failed=f"{type(error).__name__}: {reason}"))
            continue
        rows.append(
            PeerRow(
                **known,
                computed=round(trial.work.computed(full.work, steps), 2),
                complete=round(trial.work.complete(full.work, steps), 2),
                seconds=trial.seconds,
                speedup=round(full.seconds / trial.seconds, 3) if full.seconds and trial.seconds else None,
                psnr_db=round(float(psnr_db(trial.images, full.images).mean()), 3),
                ssim=round(float(ssim(trial.images, full.images).mean()), 5),
            )
        )
    return rows


def frontier(rows: Sequence[PeerRow]) -> list[PeerRow]:
    """Each package's rows that no other row of it reaches in PSNR with no more work, most work first."""
    best: list[PeerRow] = []
    ran = [row for row in rows if row.computed is not None and row.psnr_db is not None]
    for row in sorted(ran, key=lambda r: (r.package, r.computed, -(r.psnr_db or 0))):
        if not best or best[-1].package != row.package or (row.psnr_db or 0) > (best[-1].psnr_db or 0):
            best.append(row)
    return sorted(best, key=lambda r: (r.package, -(r.computed or 0)))


def behind(rows: Sequence[PeerRow], peers: Sequence[Peer] = PEERS) -> list[Peer]:
    """The peers that ``rows`` are of: to choose on some pictures and measure on others."""
    keys = {(row.package, row.name, row.setting) for row in rows}
    return [peer for peer in peers if (peer.package, peer.name, peer.setting) in keys]


def table(rows: Sequence[PeerRow]) -> str:
    """Markdown; a peer that did not run says why."""
    lines = [
        "| package | cache | setting | computed steps | complete steps | sampling speed-up | PSNR (dB) | SSIM |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        remark = f"; did not run: {row.failed}" if row.failed else f"; {row.note}" if row.note else ""
        cells = [f"{row.package} {row.version}", row.name, row.setting + remark.replace("|", "/")]
        cells += [
            _cell(row.computed, f"{{:.1f}} of {row.steps}"),
            _cell(row.complete, f"{{:.0f}} of {row.steps}"),
            _cell(row.speedup, "{:.2f}x"),
            _cell(row.psnr_db, "{:.1f}"),
            _cell(row.ssim, "{:.4f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


class _Trial:
    """Pictures, work and median seconds of the sampling loops, with whatever cache is on."""

    def __init__(self, model: DemoModel, calls: Sequence[Any], steps: int, repeats: int) -> None:
        self.work: Work
        with counted(model.pipe.transformer) as self.work:
            images = [model.pipe(**model.call(*call, steps=steps)).images for call in calls]
        self.images = np.concatenate(images)
        self.seconds = statistics.median(_seconds(model, calls, steps) for _ in range(repeats)) if repeats else None


def _seconds(model: DemoModel, calls: Sequence[Any], steps: int) -> float:
    with loop_clock(model.pipe) as seconds:
        for call in calls:
            model.pipe(**model.call(*call, steps=steps))
    return sum(seconds)
