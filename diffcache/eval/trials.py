"""Measure how often a policy succeeds in episodes of a task, which are the same for every method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffcache import host
from diffcache.documents import files
from diffcache.errors import BadOption, DiffCacheError, DocumentError, Unusable
from diffcache.eval.methods import Method
from diffcache.eval.saved_parts import TRIALS, EvaluationFolder, slug
from diffcache.eval.statistics import Interval
from diffcache.host import is_count
from diffcache.host.digest import TO_DIGEST, NoDigestError

NAME = "success"
ABOUT = {
    "title": "success",
    "unit": "",
    "better": "higher",
    "about": "Share of the episodes that end in success. Every method plays the same ones; the noise is the same where "
    "the task draws it from the episode. The interval is Wilson's.",
    "floor": None,
    "of_pairs": False,
}


@dataclass(frozen=True, slots=True)
class Trials:
    """A task for a policy.

    Attributes:
        play: Maps (policy, episodes) to the success of every episode. Episode i must be the same for every policy.
        episodes: Number of episodes.
        name: Name of the task. If ``play`` captures an object without a digest, outcomes are stored under this name.

    Raises:
        BadOption: If ``play`` is not callable, or ``episodes`` is below 1.
    """

    play: Callable[[Any, int], Sequence[bool]]
    episodes: int
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.play):
            raise BadOption("play", type(self.play).__name__, "a function (policy, episodes) -> outcomes")
        if not is_count(self.episodes, 1):
            raise BadOption("episodes", self.episodes, "a whole number, 1 or more")

    @property
    def digest(self) -> str:
        """A digest of the name, the number of episodes, and the code of ``play`` with the values that it captures.

        Raises:
            BadOption: If ``play`` has no digest, and the task has no name.
        """
        told = [self.name, self.episodes]
        try:
            return host.digest_of([*told, self.play])
        except NoDigestError as error:
            if self.name:
                return host.digest_of(told)
            raise Unusable(
                f"name={self.name!r}",
                f"`play` has {error.what} at {error.where or 'the top'}, which a later run cannot recognise",
                f"Pass a name for the task that changes with its settings, or give the object {TO_DIGEST}",
            ) from None

    def outcomes(self, pipe: Any, method: Method, key: str, folder: EvaluationFolder) -> list[float]:
        """Return 1 for success or 0 for each episode, from the folder or from new episodes.

        Raises:
            DiffCacheError: If the task returns another number of outcomes.
        """
        path = folder.path / TRIALS / f"{slug(method.name)}.json"
        key = f"{key} {self.digest}"
        if (known := self._kept(path, key, folder)) is not None:
            return known
        with method.on(pipe):
            found = [float(bool(one)) for one in self.play(pipe.policy, self.episodes)]
        if len(found) != self.episodes:
            raise DiffCacheError(
                f"the task was asked to play {self.episodes} episodes with {method.name!r} and returned {len(found)} "
                "outcomes. Allowed: one for every episode."
            )
        files.write(path, json.dumps({"key": key, "outcomes": found}), inside=folder.path)
        return found

    def _kept(self, path: Path, key: str, folder: EvaluationFolder) -> list[float] | None:
        """Return the outcomes in a file; None if the file is missing, not valid, or belongs to other trials."""
        try:
            kept = files.read_json(path, inside=folder.path)
        except DocumentError:
            return None
        found = kept.get("outcomes")
        if kept.get("key") != key or not isinstance(found, list) or len(found) != self.episodes:
            return None
        return [float(one) for one in found] if all(type(one) is float and one in (0, 1) for one in found) else None


def wilson(outcomes: Sequence[float], z: float = 1.96) -> Interval:
    """Return the score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Unlike a bootstrap interval, it has a width above 0 if all episodes succeed.

    Args:
        outcomes: 1 or 0 for each episode.
        z: Quantile of the normal distribution; 1.96 for a level of 95 %.
    """
    n, share = len(outcomes), float(np.mean(outcomes))
    spread = z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))
