"""Report how a run differs from its schedule: kinds of notices, counts, log records and warnings.

A kind is a name that a program can compare, and does not change. docs/serving.md lists all kinds. The text of a notice
is for people and may change.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOG = logging.getLogger("diffcache")


class FailedOpen(RuntimeWarning):
    """Warns that an accelerated run did something otherwise than its schedule says, or that its result is suspect.

    Most often, predictions were computed in full instead. By default Python shows a warning of the same text from the
    same line once. The logger ``diffcache`` gets a record for every run.

    Example:
        >>> warnings.simplefilter("error", diffcache.FailedOpen)  # treat such a run as an error
        >>> image = pipe("a lighthouse in a storm").images[0]
    """


class Reason(NamedTuple):
    """The reason why a prediction was computed in full.

    Attributes:
        kind: The kind of the notice.
        text: The text of the notice.
    """

    kind: str
    text: str


LATE_START = Reason("late-start", "an anchor is missing: late start, the loop began after that step")
OTHER_DENOISER = Reason("other-denoiser", "an anchor is missing: another denoiser had its turn at that step")
OTHER_BRANCHES = Reason(
    "branches-changed", "an anchor is missing: the loop did not call this branch of guidance at that step"
)
SITE_NOT_RUN = Reason("site-not-run", "an anchor is missing: the network did not run this site to its end at that step")
WENT_BACK = Reason("loop-went-back", "an anchor is missing: the loop went back, and did not run that step again")
NON_FINITE_ANCHOR = Reason("non-finite-anchor", "an anchor is missing: non-finite output (NaN or Inf) at that step")
UNREADABLE = Reason("output-unreadable", "an anchor is missing: no tensor can be found in the output")
NON_FINITE_PREDICTION = Reason("non-finite-prediction", "the prediction had NaN or Inf in it")
OTHER_INPUT = Reason("input-changed", "shape, dtype or device of the input changed")
OTHER_OUTPUT = Reason("output-changed", "shape, dtype or device of the output changed")
UNCLEAR_INPUT = Reason(
    "input-unclear",
    "the site's inputs fit its outputs in more than one way, so coefficients of inputs have no meaning",
)
UNLIKE_INPUT = Reason(
    "input-unlike-output",
    "the site's input does not have the shape of its output, so coefficients of inputs have no meaning",
)
UNEVEN_BATCH = Reason(
    "batch-uneven", "the output's batch does not split into the branches that have their own coefficients"
)
UNCLEAR_BATCH = Reason(
    "batch-unclear",
    "which dimension of the output carries the batch is not clear, and branches have their own coefficients",
)
NO_SAMPLE = Reason(
    "sample-not-found",
    "which part of the input is the sample that the noise scheduler steps is not known, so coefficients of inputs have "
    "no meaning",
)
UNNAMED = Reason(
    "branches-unnamed", "the forwards of a step changed in number or order, and their branches have no names"
)
NO_STEP = Reason("step-unknown", "forwards that were counted in one step were given different times")
NO_ROW = Reason("branch-unplanned", "the schedule has no coefficients for this branch of guidance")
OTHER_BATCH = Reason("batch-changed", "the batch holds another number of branches than at the first step")
BEYOND = Reason("beyond-schedule", "step beyond the schedule")
NO_DECISION = Reason("no-decision", "the block that decides did not run before it")
NO_SIGNAL = Reason("no-signal", "none of the first block's outputs is known to carry on its input")


def other_channels(wanted: int) -> Reason:
    """Return the reason for an output that does not have ``wanted`` channels."""
    return Reason("channels-differ", f"the output does not have the {wanted} channels that the coefficients are for")


@dataclass(frozen=True, slots=True)
class Notice:
    """A notice about one run.

    Attributes:
        kind: The kind of the notice.
        times: The number of predictions or outputs that it is about, or 1 if it is about the run as a whole.
        text: The text for people.
    """

    kind: str
    times: int
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def counted(notices: Sequence[Notice]) -> Counter[str]:
    """Return the number of times by kind."""
    found: Counter[str] = Counter()
    for notice in notices:
        found[notice.kind] += notice.times
    return found


def publish(notices: Sequence[Notice], *, pipeline: str, run: int) -> None:
    """Write a log record for each notice, then issue a ``FailedOpen`` warning for each.

    All records are written before the first warning, because a filter may turn a warning into an exception.

    Args:
        notices: The notices.
        pipeline: The class of the pipeline.
        run: The number of the run.
    """
    for notice in notices:
        extra = {"kind": notice.kind, "times": notice.times, "run": run, "pipeline": pipeline}
        LOG.warning("%s: %s", notice.kind, notice.text, extra=extra)
    for notice in notices:
        warnings.warn(notice.text, FailedOpen, stacklevel=2)
