"""Each output from all earlier ones, with weights trained on recorded outputs (L2P).

L2P is the learnable linear predictor. Row i of a lower-triangular matrix predicts the output of step i + 1 from the
outputs of the steps 0 … i of full runs. All rows begin as plain reuse, and Adam lowers the mean squared error for
``epochs`` updates. The gradient needs only the Gram matrix of the outputs, so this training equals the authors' on the
outputs themselves. In a run, predicted outputs take the places of skipped ones. The prediction is linear in the
computed outputs, so it is unfolded into weights of the anchors.

Two parts are a reading. The authors list the computed steps for 50 steps and 6 to 11 computed ones. For other numbers,
``mask="published"`` continues their pattern: the steps 0, 1, 2 and 4, then equal distances; below 6 computed steps, the
even mask. The authors train on a model without guidance. Here all branches share the weights that are trained on the
mean of their Gram matrices.
"""

from __future__ import annotations

import numpy as np

from diffcache.documents.profile import Profile
from diffcache.documents.schedule import SitePlan
from diffcache.schedulers import Aliases, Planned
from diffcache.schedulers._path import gram_of, newest
from diffcache.schedulers._sites import count, one_of, whole_steps
from diffcache.schedulers.meancache import unfolded
from diffcache.schedulers.uniform import evenly

SOURCE = "L2P, arXiv 2604.26365, Aredstone/L2P-Cache @3df73ce"
NEEDS = ""
ALIASES: Aliases = {}
MASKS = ("published", "even")
RATE, MEMORY, EPSILON = 0.01, (0.9, 0.999), 1e-8  # Adam, as the authors set it
DENSE = (0, 1, 2, 4)  # the computed steps with which every published list begins
PUBLISHED_STEPS = 50
PUBLISHED = {
    11: (*DENSE, 6, 9, 14, 23, 30, 37, 44),
    10: (*DENSE, 7, 14, 23, 31, 38, 45),
    9: (*DENSE, 9, 17, 26, 35, 43),
    8: (*DENSE, 10, 20, 31, 41),
    7: (*DENSE, 12, 24, 38),
    6: (*DENSE, 16, 32),
}


def plan(
    profile: Profile,
    computed_steps: float,
    *,
    mask: str = "published",
    epochs: int = 201,
    anchors: int | None = None,
) -> Planned:
    """Plan exactly ``computed_steps`` computed steps.

    Args:
        profile: The measured tables.
        computed_steps: A whole number.
        mask: "published" (more computed steps at the beginning) or "even".
        epochs: The number of updates of the training. 0 reuses the newest output.
        anchors: The computed steps that a prediction may use. None: all of them, as published. The oldest one that is
            kept gets the weights of older ones.

    Raises:
        BadOption: For an option out of range, or a budget that is not a whole number from 1 to the steps.
    """
    one_of("mask", mask, MASKS)
    computed = whole_steps(computed_steps, profile.steps)
    kept = computed if anchors is None else count("anchors", anchors, least=1)
    compute = published(profile.steps, computed) if mask == "published" else evenly(profile.steps, computed)
    trained_rows = trained(gram_of(profile), count("epochs", epochs))
    weights = newest(unfolded(trained_rows, compute), kept)
    return Planned(sites={"model": SitePlan(compute=compute, weights=weights)})


def published(steps: int, computed: int) -> np.ndarray:
    """Return the authors' computed steps, or steps in their pattern, bool [T].

    Args:
        steps: The number of steps T.
        computed: The number of computed steps, 1 to T.
    """
    if computed < min(PUBLISHED):
        return evenly(steps, computed)
    compute = np.zeros(steps, bool)
    if steps == PUBLISHED_STEPS and computed in PUBLISHED:
        compute[list(PUBLISHED[computed])] = True
        return compute
    compute[list(DENSE)] = True
    rest, free = computed - len(DENSE), steps - DENSE[-1]
    if rest >= free:  # only step 3 is left
        compute[:] = True
    else:
        compute[DENSE[-1] + np.arange(1, rest + 1) * free // (rest + 1)] = True
    return compute


def trained(gram: np.ndarray, epochs: int) -> np.ndarray:
    """Return the weights of earlier outputs in each prediction, float64 [T, T].

    At [i, j] is the weight of the output at step j in the prediction of step i > j. Row 0 is 0.

    Args:
        gram: float64 [T, T], the Gram matrix of the model's outputs, per element.
        epochs: The number of updates.
    """
    steps = len(gram)
    earlier = np.tri(steps - 1, steps)  # row i predicts step i + 1
    weights = np.eye(steps - 1, steps)
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for update in range(1, epochs + 1):
        gradient = 2 / (steps - 1) * (weights @ gram - gram[1:]) * earlier
        mean = MEMORY[0] * mean + (1 - MEMORY[0]) * gradient
        square = MEMORY[1] * square + (1 - MEMORY[1]) * gradient**2
        size = np.sqrt(square / (1 - MEMORY[1] ** update)) + EPSILON
        weights -= RATE * mean / (1 - MEMORY[0] ** update) / size
    return np.vstack([np.zeros((1, steps)), weights])
