"""Elastic-Cache: compute a window of masks, and refresh from the layer on at which attention has drifted.

Every layer tracks the decoded token that receives most attention from the window. The next step compares the attention
row of that token with the row of its kept query and keys. Below a cosine of ``gamma``, the layers after it compute
every position from the kept inputs.
"""

from __future__ import annotations

import numpy as np

from diffcache.errors import BadOption
from diffcache.tokens.rules._checks import at_least
from diffcache.tokens.view import Fresh, View

SOURCE = "Nguyen-Tri et al. 2025, Elastic-Cache (arXiv 2510.14973), section 3.2"
NEEDS = "attention"


def fresh(view: View, *, window: int = 16, gamma: float = 0.9) -> Fresh:
    """Return the leftmost masks, the tokens committed in the last step, and those that the layers track.

    Args:
        view: The state of the canvas.
        window: The number of masks to compute.
        gamma: The cosine below which a refresh begins. 0 never refreshes, 1 always does.
    """
    at_least("window", window, 1)
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise BadOption("gamma", gamma, "a number from 0 to 1")
    leftmost = view.masked & (view.masked.cumsum(1) <= window)
    tracked = np.zeros_like(view.masked) if view.tracked is None else view.tracked
    return Fresh(leftmost | view.changed | tracked, window=leftmost, gamma=float(gamma))
