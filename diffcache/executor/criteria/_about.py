"""Declare the facts about a criterion that the executor and the estimate read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from diffcache.errors import BadOption

TIME_EMBEDDING = "temb"  # the name of a block's parameter that is the time embedding
PARAMETERS = ("polynomial", "most")  # the fields of ``Online`` that are optional for a criterion; ``limit`` is not


class Where(Enum):
    """The place in a forward at which a criterion decides, and the tensors that are there.

    ``MODEL`` decides before the denoiser runs, from its main input. The others decide at the first block of the first
    stack of the plan, and predict stacks alone. ``TIME_EMBEDDING`` decides before that block, from the time embedding
    that it is given as ``temb``. ``FIRST_BLOCK`` decides after the block, from its residual: the block runs at every
    step. ``FIRST_NORM`` decides inside it, from the output of its first normalisation: at a predicted step the block
    runs up to there.
    """

    MODEL = "model"
    FIRST_BLOCK = "first block"
    FIRST_NORM = "first normalisation"
    TIME_EMBEDDING = "time embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Describe a criterion.

    Args:
        source: The paper or the repository that the criterion comes from.
        where: The place at which it decides.
        accumulates: Whether each change is measured from the call before, and changes add up since the newest computed
            step. Otherwise the change is measured from the newest computed step.
        keeps_anchors: Whether predictions use the anchors of the plan alone. If so, the change is measured from the
            newest step that the plan computes. The output of a step that the criterion computes is used once. A step
            at which nothing can be compared follows the plan. If not, the newest output is the only anchor, and a step
            at which nothing can be compared is computed.
        levels: Whether ``change`` reads ``Signal.levels``, the share of noise in the state at every step.
        parameters: The fields of ``Online`` that the criterion uses, ``limit`` left out; the others must be None.

    Raises:
        BadOption: A field has a value that it cannot have, or ``keeps_anchors`` is combined with ``accumulates`` or
            with a place inside the network.
    """

    source: str
    where: Where
    accumulates: bool = False
    keeps_anchors: bool = False
    levels: bool = False
    parameters: tuple[str, ...] = PARAMETERS

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise BadOption("source", self.source, "text, not empty")
        if not isinstance(self.where, Where):
            raise BadOption("where", self.where, ", ".join(map(str, Where)))
        if unknown := [name for name in self.parameters if name not in PARAMETERS]:
            raise BadOption("parameters", unknown[0], ", ".join(map(repr, PARAMETERS)))
        if self.keeps_anchors and (self.accumulates or self.where is not Where.MODEL):
            raise BadOption("keeps_anchors", True, f"False, unless accumulates is False and where is {Where.MODEL}")
