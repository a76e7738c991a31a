"""Describe a metric for the readers of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from diffcache.errors import BadOption

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class About:
    """The description of a metric.

    Attributes:
        title: Title of the column.
        unit: Unit of the values; "" if there is none.
        better: Whether "higher" or "lower" values are better.
        about: One or two plain sentences that state the measured quantity and its scale.
        on_states: Whether the metric compares final states and not the outputs of the pipeline.
        of_pictures: Whether the metric needs decoded pictures or videos, so that calls that return latents, loops and
            policies are refused.

    Raises:
        BadOption: If ``better`` is not "higher" or "lower", or the title is empty.
    """

    title: str
    unit: str
    better: Better
    about: str
    on_states: bool = False
    of_pictures: bool = False

    @property
    def in_record(self) -> dict[str, str]:
        """The fields of the description that a record contains."""
        return {"title": self.title, "unit": self.unit, "better": self.better, "about": self.about}

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise BadOption("better", self.better, " or ".join(get_args(Better)))
        if not self.title:
            raise BadOption("title", self.title, "text, not empty")
