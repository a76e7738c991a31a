"""Define the token profile, the document of measurements from which a plan for a language model is made.

Shapes in this file: L layers, N positions, S decoded sequences. Pure data, numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from diffcache.documents import checks
from diffcache.documents.checks import first, put, refuse
from diffcache.documents.document import Document, Record, spoken
from diffcache.text import card, printable

CLASSES = ("prompt", "decoded", "masked")  # the positions of a canvas, by what they hold


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DriftTables(Record):
    """The mean drift of a position for one committed token, by offset, and where the next commits are.

    Attributes:
        masked: float64 [2 P - 1], the change of the probabilities at a masked position (total variation, 0 to 1) for a
            token committed at a smaller position, at index ``P - 1 + offset``. The offset is the position less that of
            the committed token.
        decoded: float64 [2 P - 1], the same for the relative change of the keys and values of a token.
        next: float64 [P], the probability that a masked position is committed next, by its distance from the first
            masked position.

    Raises:
        DocumentError: If a table has another shape, or a value below 0.
    """

    masked: np.ndarray
    decoded: np.ndarray
    next: np.ndarray

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(self, next=checks.array(me, "next", self.next, np.float64, distance=None))
        for name in ("masked", "decoded"):
            found = checks.array(me, name, getattr(self, name), np.float64, offset=2 * len(self.next) - 1)
            put(self, **{name: found})
        for name in ("masked", "decoded", "next"):
            demand(me, name, getattr(self, name), getattr(self, name) >= 0, "0 or more")

    @property
    def positions(self) -> int:
        """P, the number of positions that the tables cover. Offsets beyond it count as the last one."""
        return len(self.next)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class TokenProfile(Document):
    """Measurements of full decodes: drift by offset, errors by age, times of forwards, and the order of the commits.

    Attributes:
        class_name: The class of the network.
        config_digest: The SHA-256 of its configuration. None if the profile fits any of the class.
        layers: L, the number of decoder layers.
        forwards: The mean number of forwards of a decode.
        drift: The drift of a position for one committed token.
        ages: float64 [A], ages of keys and values, as shares of the masks of a canvas that were committed meanwhile.
        errors: float64 [L, A], the error of the probabilities at the most confident masks (total variation) if the
            keys and values of layer l at all other positions have this age.
        changes: float64 [L, 3, A], the relative change of the keys and values of layer l at this age, for positions of
            the prompt, decoded and masked positions. 0 where there was none.
        counts: float64 [K], numbers of positions, rising; the last is N.
        seconds: float64 [K], the time of a forward that computes so many positions in each row.
        outside: The seconds between two forwards, in the decoding loop.
        committed: float64 [S, N], the number of the forward after which a position was committed, from 1 on. 0 in the
            prompt.
        margins: float64 [S, N], the probability of the committed token less that of the second best, 0 to 1.
        flip_rate: The number of masks at which another token was best, for each unit of error over margin, in the
            trials that measured ``errors``.
        rows: The number of sequences in a call, at which ``seconds`` were measured. ``committed`` holds the sequences
            call by call.
        provenance: Notes on how the profile was made.

    Raises:
        DocumentError: If a field has an impossible value.

    Example:
        >>> profile = diffcache.measure(diffcache.Loop(model, sample), calls)
        >>> profile.save("token_profile.safetensors")
        >>> profile = diffcache.TokenProfile.load("token_profile.safetensors")
    """

    FORMAT: ClassVar[str] = "diffcache.token_profile"
    VERSION: ClassVar[int] = 1
    FILENAME: ClassVar[str] = "token_profile.safetensors"

    class_name: str
    layers: int
    forwards: float
    drift: DriftTables
    ages: np.ndarray
    errors: np.ndarray
    changes: np.ndarray
    counts: np.ndarray
    seconds: np.ndarray
    outside: float
    committed: np.ndarray
    margins: np.ndarray
    flip_rate: float
    rows: int = 1
    config_digest: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        me = type(self).__name__
        put(
            self,
            class_name=checks.text(me, "class_name", self.class_name),
            layers=checks.count(me, "layers", self.layers, least=1),
            forwards=checks.real(me, "forwards", self.forwards, least=1),
            drift=checks.instance(me, "drift", self.drift, DriftTables),
            ages=checks.array(me, "ages", self.ages, np.float64, age=None),
            counts=checks.array(me, "counts", self.counts, np.float64, count=None),
            outside=checks.real(me, "outside", self.outside, least=0),
            flip_rate=checks.real(me, "flip_rate", self.flip_rate, least=0),
            rows=checks.count(me, "rows", self.rows, least=1),
            committed=checks.array(me, "committed", self.committed, np.float64, sequence=None, position=None),
            provenance=checks.notes(me, "provenance", self.provenance),
        )
        if self.config_digest is not None:
            put(self, config_digest=checks.sha256(me, "config_digest", self.config_digest))
        shapes: dict[str, dict[str, int | None]] = {
            "errors": {"layer": self.layers, "age": len(self.ages)},
            "changes": {"layer": self.layers, "class": len(CLASSES), "age": len(self.ages)},
            "seconds": {"count": len(self.counts)},
            "margins": {"sequence": len(self.committed), "position": self.committed.shape[1]},
        }
        for name, axes in shapes.items():
            put(self, **{name: checks.array(me, name, getattr(self, name), np.float64, **axes)})
        for name in ("ages", "errors", "changes", "seconds", "committed", "margins"):
            demand(me, name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        rising = np.diff(self.counts, prepend=0) > 0
        demand(me, "counts", self.counts, rising, "rising numbers of positions, from 1 on")
        demand(me, "ages", self.ages, np.diff(self.ages, prepend=-1) > 0, "rising shares")
        demand(me, "committed", self.committed, self.committed == np.floor(self.committed), "whole numbers")
        if not (self.committed > 0).any():
            refuse(me, "committed", "found no committed position", "at least one")

    @property
    def positions(self) -> int:
        """N, the number of positions of the canvases that were recorded."""
        return int(self.committed.shape[1])

    @property
    def masks(self) -> float:
        """The mean number of masks that a sequence begins with."""
        return float((self.committed > 0).sum(1).mean())

    @property
    def full_seconds(self) -> float:
        """The time of a full decode in seconds: its forwards, and what the loop does between them."""
        return self.forwards * float(self.seconds[-1] + self.outside)

    def seconds_for(self, positions: float) -> float:
        """Return the time of a forward of so many positions in each row, interpolated between those measured."""
        return float(np.interp(positions, self.counts, self.seconds))

    def describe(self) -> str:
        """Return a summary for readers."""
        far = f"{self.ages[-1]:.0%} of the masks"
        lines = [
            f"network     {printable(self.class_name)}, {self.layers} layers",
            f"recorded    {len(self.committed)} sequences of {self.positions} positions, {self.masks:.0f} masks, "
            f"{self.forwards:.0f} forwards",
            f"a forward   {self.seconds[-1] * 1000:.1f} ms; of {self.counts[0]:.0f} positions "
            f"{self.seconds[0] * 1000:.1f} ms",
            f"error       {self.errors[:, -1].sum():.3f} if keys and values of all layers are {far} old",
        ]
        lines += [f"{key:<11} {printable(text)}" for key, text in spoken(self.provenance).items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        return f"<TokenProfile of {printable(self.class_name)}: {len(self.committed)} sequences>"

    def _repr_html_(self) -> str:
        """Return the summary as HTML, for notebooks."""
        return card("TokenProfile", self.describe())


def demand(where: str, name: str, values: np.ndarray, holds: np.ndarray, allowed: str) -> None:
    """Raise DocumentError for the first value for which a condition does not hold."""
    if not holds.all():
        index = first(~holds)
        refuse(where, name, f"{list(index)} is {values[index]:g}", allowed)
