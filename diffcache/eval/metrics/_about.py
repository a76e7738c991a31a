"""What a reader of a table must know about a column of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from diffcache.errors import BadOption

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class About:
    """``title`` heads a column; ``unit`` is "" where there is none; ``better`` says which way is good; ``about`` is a
    sentence or two in plain words: what is measured, on which scale.

    Raises BadOption for another ``better``, or no title.
    """

    title: str
    unit: str
    better: Better
    about: str

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise BadOption("better", self.better, " or ".join(get_args(Better)))
        if not self.title:
            raise BadOption("title", self.title, "text, not empty")
