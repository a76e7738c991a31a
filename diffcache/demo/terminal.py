"""Write the result of the demo as a table that is narrow enough for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTHING = "-"
KINDS = ("full", "ours", "peer", "fewer steps", "reuse")  # within one number of computed steps


def table(record: Mapping[str, Any]) -> str:
    """Return one line per method: computed steps, speed-up, PSNR, the PSNR of the worst sample, and SSIM.

    The methods of one number of computed steps stand together, the full run first. A line has at most 80 characters if
    names have at most 30.

    Args:
        record: The record of an evaluation with PSNR and SSIM.
    """
    methods = sorted(record["methods"], key=lambda m: (-m["computed_steps"], KINDS.index(m["kind"])))
    rows: list[tuple[str, ...]] = [("method", "steps", "speed-up", "PSNR", "worst", "SSIM")]
    before = None
    for method in methods:
        if before is not None and before != method["computed_steps"]:
            rows.append(("",) * len(rows[0]))
        before = method["computed_steps"]
        rows.append(_row(method))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for row in rows:
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([name.strip().ljust(widths[0]), *cells]))
    lines.insert(1, "-" * len(lines[0]))
    samples = len(record["samples"])
    lines += ["", f"PSNR in dB against the full run: mean and worst of {samples} held-out samples."]
    return "\n".join(line.rstrip() for line in lines)


def _row(method: Mapping[str, Any]) -> tuple[str, ...]:
    speed = (method.get("speedup") or {}).get("loop")
    steps = f"{method['computed_steps']:g} of {method['steps']}"
    if method["kind"] == "full":
        return method["name"], steps, "1.0x", NOTHING, NOTHING, NOTHING
    psnr, ssim = method["scores"]["psnr"], method["scores"]["ssim"]
    worst = min(psnr["values"]) if psnr.get("values") else None
    return (
        method["name"],
        steps,
        NOTHING if speed is None else f"{speed:.1f}x",
        f"{psnr['mean']:.1f}",
        NOTHING if worst is None else f"{worst:.1f}",
        f"{ssim['mean']:.4f}",
    )
