"""Action error over control rate, a panel for each run of ``policy.py``; writes ``results/policies.png``.

    python benchmarks/policy_figure.py policy-push-v3-ddpm-100 policy-push-v3-ddim-16

A hollow mark: some episodes fail with that method, more than the full policy's interval allows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from diffcache.documents import files
from diffcache.eval.record import read

RESULTS = Path(__file__).parent / "results"
N_ACTION_STEPS = 8  # of the example's policies
STYLES = {  # the first that a method's name holds is its own
    "diffcache, sublayers": ("tab:gray", "s"),
    "diffcache": ("black", "o"),
    "BAC without bubbling": ("tab:red", "v"),
    "BAC unified": ("tab:red", "s"),
    "BAC": ("tab:red", "o"),
    "uniform reuse": ("tab:orange", "o"),
    "DDIM": ("tab:blue", "o"),
    "DPM-Solver++": ("tab:cyan", "o"),
    "DDPM": ("tab:green", "o"),
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("runs", type=Path, nargs="+", help="folders that policy.py wrote")
    args.add_argument("--out", type=Path, default=RESULTS / "policies.png")
    o = args.parse_args()
    records = [read(run / "record.json") for run in o.runs]
    columns = min(2, len(records))
    rows = -(-len(records) // columns)
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(6.2 * columns, 4.4 * rows), layout="constrained")
    for n, record in enumerate(records, start=1):
        panel(figure.add_subplot(rows, columns, n), record)
    kinds = {label: mark for axes in figure.axes for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=len(kinds), frameon=False)
    files.write(o.out, lambda file: figure.savefig(file, format=o.out.suffix[1:], dpi=140))
    print(o.out)


def panel(axes: Any, record: dict[str, Any]) -> None:
    full, *others = record["methods"]
    full_rate = N_ACTION_STEPS / full["seconds"]["pipeline"]["median"]
    for method in others:
        rate = N_ACTION_STEPS / method["seconds"]["pipeline"]["median"]
        error = method["scores"]["action"]
        label, (colour, mark) = next((name, style) for name, style in STYLES.items() if name in method["name"])
        succeeds = method["scores"]["success"]["mean"] >= full["scores"]["success"]["low"]
        around = [[error["mean"] - error["low"]], [error["high"] - error["mean"]]]
        axes.errorbar(rate, error["mean"], around, color=colour, linewidth=0.8)
        face = colour if succeeds else "none"
        axes.plot(rate, error["mean"], mark, color=colour, markerfacecolor=face, label=label)
    axes.axvline(full_rate, color="black", linestyle=":", linewidth=0.8)
    axes.text(full_rate, 1, " full policy", transform=axes.get_xaxis_transform(), va="top")
    axes.set(
        xscale="log", yscale="log", xlabel="actions a second, one robot", ylabel="action error", title=record["title"]
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    main()
