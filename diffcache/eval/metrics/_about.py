"""What a reader of a table must know about a column of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from diffcache.errors import BadOption

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class About:
    """Describe a metric.

    title      heads a column
    unit       "" where there is none
    better     which way is good
    about      a sentence or two in plain words: what is measured, on which scale
    on_states  whether the metric compares final states rather than what the pipeline returns

    Raises BadOption for another ``better``, or no title.
    """

    title: str
    unit: str
    better: Better
    about: str
    on_states: bool = False

    @property
    def in_record(self) -> dict[str, str]:
        """Return what a record says of the metric."""
        return {"title": self.title, "unit": self.unit, "better": self.better, "about": self.about}

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise BadOption("better", self.better, " or ".join(get_args(Better)))
        if not self.title:
            raise BadOption("title", self.title, "text, not empty")
