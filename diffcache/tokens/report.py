"""The report of a token cache: forwards, computed positions, kept bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from diffcache.text import card
from diffcache.tokens.counts import Counts

if TYPE_CHECKING:
    from diffcache.tokens.engine import TokenCache  # imports transformers


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class TokenReport(Counts):
    """A summary of the last canvas, or of the canvas in progress: the ``Counts`` of its work, and the attributes below.

    Attributes:
        rule: The spec of the rule.
        runs: The number of canvases that have begun.
        kv_bytes: The bytes of the keys and values that are kept now.
        bytes_held: The bytes of all tensors that are kept now, with the logits.
        peak_bytes: The most bytes of kept tensors at one time.
        passed: The number of forwards that the cache took no part in, by reason, over all canvases.
        canvases: The number of canvases that this thread decodes in turns. ``bytes_held`` counts the last one.
        kept_as: The format in which keys and values are kept. ``"exact"`` is the precision of the model.
    """

    rule: str
    runs: int
    kv_bytes: int = 0
    bytes_held: int = 0
    peak_bytes: int = 0
    passed: Mapping[str, int] = field(default_factory=dict)
    canvases: int = 0
    kept_as: str = "exact"

    @property
    def skipped(self) -> float:
        """Return the share of the positions that were not computed, 0 to 1."""
        return 1 - self.computed / self.full if self.full else 0.0

    def __repr__(self) -> str:
        if not self.runs:
            return "<TokenReport: no run yet>"
        return (
            f"<TokenReport of run {self.runs}: {self.forwards} forwards, {self.refreshes} of all positions, "
            f"{self.skipped:.0%} of positions skipped>"
        )

    def _repr_html_(self) -> str:
        """Return the report as HTML, for notebooks."""
        return card("Report", str(self))

    def __str__(self) -> str:
        if not self.runs:
            lines = [f"{self.rule}: no run yet"]
        else:
            lines = [
                f"rule             {self.rule}",
                f"forwards         {self.forwards}, {self.refreshes} of all positions",
                f"positions        {self.computed:,} of {self.full:,} computed, {self.skipped:.0%} skipped",
                f"each forward     {_drawn(self.shares)}",
            ]
        if 0 < self.projected < self.computed:
            lines.append(f"logits           {self.projected:,} of {self.computed:,} computed positions projected")
        if self.repeated:
            lines.append(f"not run          {self.repeated} forwards, because no input had changed")
        lines += [f"without cache    {n} forwards: {reason}" for reason, n in self.passed.items()]
        if self.kept_as != "exact":
            lines.append(f"keys and values  {self.kv_bytes:,} bytes, kept as {self.kept_as}")
        lines.append(f"runs {self.runs}, cache held now {self.bytes_held:,} bytes, at most {self.peak_bytes:,} bytes")
        return "\n".join(lines)


def _drawn(shares: tuple[float, ...]) -> str:
    """Return a character for each forward: ``█`` for all positions, ``▁`` for few, ``·`` for none."""
    return "".join("·" if not share else "▁▂▃▄▅▆▇█"[min(int(share * 8), 7)] for share in shares)


def report_of(cache: TokenCache) -> TokenReport:
    """Return the report of the last canvas of ``cache``, or of the canvas in progress."""
    canvas = cache.canvas
    if canvas is None:
        return TokenReport(rule=str(cache.source), runs=0, passed=dict(cache.passed), kept_as=cache.store)
    return TokenReport(
        rule=str(cache.source),
        runs=cache.runs,
        **asdict(canvas.counts),
        kv_bytes=canvas.cache.nbytes,
        bytes_held=canvas.nbytes,
        peak_bytes=canvas.peak_bytes,
        passed=dict(cache.passed),
        canvases=cache.canvases,
        kept_as=cache.store,
    )
