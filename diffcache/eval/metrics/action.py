"""Mean absolute difference of actions over a sample's steps and joints, in the robot's units, as in BAC's tables."""

from __future__ import annotations

import math

import numpy as np

from diffcache.eval.metrics import About
from diffcache.eval.metrics._checks import demand_pair

RANGE = (0.0, math.inf)
ABOUT = About(
    "action error",
    "",
    "lower",
    "How far the actions lie from the full policy's, for the same observation and the same noise: the mean absolute "
    "difference over steps and joints.",
)


def score(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the action error, float64 [N], of two arrays [N, steps, joints].

    Raises:
        SamplesError: If the arrays are not valid.
    """
    demand_pair("action", found, reference, "[N, steps, joints]")
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(reference, np.float64))
    return np.asarray(difference.reshape(len(found), -1).mean(axis=1))
