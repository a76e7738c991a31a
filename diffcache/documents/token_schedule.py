"""Define the token schedule, the document that states which positions of a language model each forward computes.

Pure data, numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from diffcache.documents import checks
from diffcache.documents.checks import put, refuse
from diffcache.documents.document import Document, Record, spoken
from diffcache.documents.token_profile import DriftTables, TokenProfile, demand
from diffcache.text import card, printable


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenExpected(Record):
    """What to expect of a token schedule, from decodes that did not choose it.

    Attributes:
        answers: The number of answers.
        same_tokens: The share of generated tokens that equal those of the full loop, 0 to 1.
        same_answers: The share of answers that equal those of the full loop in every token, 0 to 1.
        speedup: The speed-up that the plan aims at, a forecast. For a budget of speed-up, it follows from the times of
            the profile; for a budget of computed steps, it is the ratio of the work.
        flips: The share of tokens that the profile predicts to differ at their commit, 0 to 1. Later tokens that differ
            because of them do not count.
    """

    answers: int
    same_tokens: float
    same_answers: float
    speedup: float
    flips: float

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, answers=checks.count(me, "answers", self.answers, least=1))
        for name in ("same_tokens", "same_answers", "flips"):
            value = checks.real(me, name, getattr(self, name), least=0)
            if value > 1:
                refuse(me, name, f"found {value:g}", "a share, 0 to 1")
            put(self, **{name: value})
        put(self, speedup=checks.real(me, "speedup", self.speedup, least=0))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class TokenSchedule(Document):
    """A plan for the forwards of a decoding loop.

    Each forward computes the positions that have changed, and the ``fresh`` positions of each row that have drifted
    most since they were computed, by ``drift``. ``starts`` holds the refreshes: forwards that compute every position
    from a layer on.

    Attributes:
        class_name: The class of the network.
        config_digest: The SHA-256 of its configuration. None if the schedule fits any of the class.
        layers: L, the number of decoder layers.
        positions: N, the number of positions of the canvases that the plan was made on. It fits other numbers as well.
        fresh: The number of positions in each row that a forward computes, next to those that have changed.
        weight: The weight of tokens against masks in the choice of these positions. 0 never computes a token again
            before the next refresh.
        drift: The drift of a position for one committed token.
        starts: float64 [M], the refreshes. The decode of a row is divided into M parts of equally many commits. The
            first forward of part k computes every position from layer ``starts[k]`` on; with L, there is no refresh.
            ``starts[0]`` is 0: the first forward computes everything.
        expected: What to expect. None if it was not measured.
        provenance: Notes on how the schedule was made.

    Raises:
        DocumentError: If a field has an impossible value.

    Example:
        >>> schedule = diffcache.optimize(loop, prompts, diffcache.Budget(speedup=3))
        >>> schedule.save("schedule.safetensors")
        >>> model = diffcache.accelerate(model, "schedule.safetensors")
    """

    FORMAT: ClassVar[str] = "diffcache.token_schedule"
    VERSION: ClassVar[int] = 1
    FILENAME: ClassVar[str] = "schedule.safetensors"
    ADVICE: ClassVar[Mapping[str, str]] = {
        TokenProfile.FORMAT: "The file holds a token profile: read it with TokenProfile.load."
    }

    class_name: str
    layers: int
    positions: int
    fresh: int
    weight: float
    drift: DriftTables
    starts: np.ndarray
    config_digest: str | None = None
    expected: TokenExpected | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(
            self,
            class_name=checks.text(me, "class_name", self.class_name),
            layers=checks.count(me, "layers", self.layers, least=1),
            positions=checks.count(me, "positions", self.positions, least=1),
            fresh=checks.count(me, "fresh", self.fresh, least=0),
            weight=checks.real(me, "weight", self.weight, least=0),
            drift=checks.instance(me, "drift", self.drift, DriftTables),
            starts=checks.array(me, "starts", self.starts, np.float64, part=None),
            provenance=checks.notes(me, "provenance", self.provenance),
        )
        if self.config_digest is not None:
            put(self, config_digest=checks.sha256(me, "config_digest", self.config_digest))
        if self.expected is not None:
            checks.instance(me, "expected", self.expected, TokenExpected)
        allowed = f"whole numbers from 0 to {self.layers}, the number of layers"
        whole = (self.starts == np.floor(self.starts)) & (self.starts >= 0) & (self.starts <= self.layers)
        demand(me, "starts", self.starts, whole, allowed)
        if self.starts[0] != 0:
            refuse(me, "starts", f"the first is {self.starts[0]:g}", "0: the first forward computes everything")

    @property
    def refreshes(self) -> int:
        """The number of refreshes after the first forward, of any depth."""
        return int((self.starts[1:] < self.layers).sum())

    @property
    def needs(self) -> str:
        """``"depth"`` if a refresh begins above the first layer, else empty. See ``diffcache.tokens.TokenRule``."""
        return "depth" if ((self.starts > 0) & (self.starts < self.layers)).any() else ""

    def describe(self) -> str:
        """Return a summary for readers."""
        kept = "tokens are computed again at refreshes only" if not self.weight else f"weight of tokens {self.weight:g}"
        lines = [
            f"network    {printable(self.class_name)}, {self.layers} layers, canvases of {self.positions} positions",
            f"computes   {self.fresh} positions of each row, and those that have changed; {kept}",
            f"refreshes  {self.refreshes} after the first forward, in {len(self.starts)} parts of equally many commits",
            f"from layer {''.join(self._sign(start) for start in self.starts)}",
        ]
        if self.expected is not None:
            found = self.expected
            lines.append(
                f"expected   {found.speedup:.1f}x; {found.same_tokens:.1%} of tokens and {found.same_answers:.0%} of "
                f"{found.answers} answers as in the full loop"
            )
        lines += [f"{key:<10} {printable(text)}" for key, text in spoken(self.provenance).items()]
        return "\n".join(lines)

    def _sign(self, start: float) -> str:
        """Return a character for a refresh: ``█`` of all layers, a lower bar for fewer, ``·`` for none."""
        share = 1 - start / self.layers
        return "▁▂▃▄▅▆▇█"[min(int(share * 8), 7)] if share else "·"

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        name = printable(self.class_name)
        return f"<TokenSchedule of {name}: {self.fresh} positions of {self.positions}, {self.refreshes} refreshes>"

    def _repr_html_(self) -> str:
        """Return the summary as HTML, for notebooks."""
        return card("TokenSchedule", self.describe())
