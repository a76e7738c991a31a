"""Describe the branches of guidance: their number, their names, and the branches that a forward holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

GuidanceMode = Literal["none", "separate", "batched"]
BRANCH_NAMES = (
    "branch names"  # key in a schedule's provenance; its value is a JSON list in the order of the coefficients
)


@dataclass(frozen=True, slots=True)
class BranchLayout:
    """The order, the names and the rows of the branches whose outputs guidance combines at a step.

    Branches are numbered in the order of a schedule's coefficients. Forward k of a step holds the branches
    k · ``per_forward`` to (k + 1) · ``per_forward`` - 1, as equal parts of its batch.

    Attributes:
        count: The number of branches. It is 1 without guidance.
        per_forward: The number of branches in the batch of one forward.
        names: The names of the branches, by number. It is empty if they have none.
    """

    count: int = 1
    per_forward: int = 1
    names: tuple[str, ...] = ()

    @property
    def mode(self) -> GuidanceMode:
        """The form of guidance in documents: "none", "batched" or "separate"."""
        return "none" if self.count == 1 else "batched" if self.per_forward > 1 else "separate"

    @property
    def batched(self) -> bool:
        """Whether a forward holds more than one branch."""
        return self.per_forward > 1

    @property
    def forwards(self) -> int:
        """The number of forwards of a step."""
        return self.count // self.per_forward

    @property
    def uniform(self) -> bool:
        """Whether each forward holds one branch, or one forward holds all. A schedule can describe no other form."""
        return self.per_forward in (1, self.count)

    def row(self, forward: int) -> int | None:
        """Return the branch of a forward; None if its batch holds all branches.

        Args:
            forward: Index of the forward's branch in the run.
        """
        return None if self.batched else forward

    def held_by(self, forward: int) -> range:
        """Return the numbers of the branches in a forward. Forwards after the last branch count as the last.

        Args:
            forward: Index of the forward's branch in the run.
        """
        last = self.count - 1
        return range(self.count) if self.batched else range(min(forward, last), min(forward, last) + 1)

    def split(self, tensor: Any) -> Sequence[Any]:
        """Return the equal parts of a forward's batch, one for each branch in it.

        Args:
            tensor: A torch tensor [N, …].
        """
        return tensor.chunk(self.per_forward) if self.batched else (tensor,)


def names_in(provenance: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the branches in a schedule's provenance; () if it has none."""
    try:
        names = json.loads(provenance.get(BRANCH_NAMES, "[]"))
    except ValueError:  # provenance is free text
        return ()
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def provenance_of(names: Sequence[str]) -> dict[str, str]:
    """Return the provenance entry with the names of the branches; {} if there is one branch or a name is empty."""
    return {BRANCH_NAMES: json.dumps(list(names))} if len(names) > 1 and all(names) else {}
