"""Handle forwards whose branch or step is not known, so that none is predicted from the output of another branch."""

from __future__ import annotations

from collections.abc import Iterator

from diffcache import host
from diffcache.errors import UnsupportedModel
from diffcache.executor import notices
from diffcache.executor.notices import Notice, Reason
from diffcache.executor.state import RunState

ADVICE = (
    "Name the branches: transformer.cache_context(name) in a pipeline, diffcache.branch(name) in a loop of your own, "
    "around each call of the network."
)


def check_forward(run: host.LoopRun, denoiser: str, forward: host.Forward) -> Reason | None:
    """Drop the kept outputs of branches that may have new numbers, and check whether the forward may be predicted.

    Args:
        run: The run.
        denoiser: The component name of the network.
        forward: The forward that begins.

    Returns:
        Why the forward must be computed in full, or None.

    Raises:
        UnsupportedModel: A forward of a step that is over was predicted, and its branch or step may have been another.
    """
    state: RunState = run.state
    if forward.apart and forward.changed is not None:
        if (denoiser, forward.changed) in state.doubts:
            raise UnsupportedModel(
                f"the loop called {denoiser!r} another number of times in step {forward.changed} than in the step "
                "before, and nothing shows which branch of guidance each call serves: a branch may have been "
                f"predicted from another's outputs. {ADVICE}"
            )
        for branch in forward.apart:
            state.drop_branch(denoiser, branch)
    if forward.moved:
        state.drop_branch(denoiser, forward.branch)
    if run.lost:
        if any(name == denoiser for name, _ in state.doubts):
            raise UnsupportedModel(
                f"the loop gave {denoiser!r} different times within step {run.index}, so steps were counted wrongly "
                f"and the wrong ones were predicted. {ADVICE}"
            )
        return notices.NO_STEP
    if forward.moved:
        return notices.UNNAMED
    guidance = state.schedule.guidance
    return notices.UNNAMED if not forward.like and guidance is not None and guidance.mode == "separate" else None


def end_notices(run: host.LoopRun) -> Iterator[Notice]:
    """Yield notices about a finished run with forwards that may have been given to the wrong branch or step."""
    state: RunState = run.state
    if any(found in state.doubts for found in run.assigned.uneven()):
        yield Notice(
            "branches-suspect",
            1,
            "the last step had another number of forwards than the step before, and the guidance branch of each "
            f"forward is unknown; the result is suspect. {ADVICE}",
        )
    if run.times_disagree():
        yield Notice(
            "steps-suspect",
            1,
            "the network received the times of other steps than those that were counted; the result is suspect. "
            f"{ADVICE}",
        )
