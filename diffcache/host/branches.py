"""Assign each forward to a branch of guidance, by its name or else by its place within the step.

A name comes from ``cache_context`` (most diffusers pipelines open one around each call of the denoiser), from a guider
(modular pipelines), or from :func:`branch` in a loop of your own. A forward without a name is identified by its place
within the step. Its conditioning checks the place, because prompt embeddings and similar arguments are the same objects
at all steps.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffcache.errors import BadOption

FEW = 64  # tensors on the CPU with at most this number of elements are compared by value

Conditions = Mapping[str, Any]  # name of an argument -> its ``recognised`` form
_entered = threading.local()


@contextlib.contextmanager
def branch(name: str) -> Iterator[None]:
    """Name the branch of guidance of the forwards within the ``with`` block.

    Each branch is predicted from outputs of the same branch. Branches may come in any order, and may be left out at
    some steps. A name that comes again begins the next step of a trajectory, so tiles or chunks of one step need
    different names.

    Args:
        name: Any text that is the same at all steps, for example "cond" or "uncond".

    Raises:
        BadOption: ``name`` is not a text, or is empty.

    Example:
        >>> with diffcache.trajectory(network, timesteps):
        ...     for t in timesteps:
        ...         with diffcache.branch("cond"):
        ...             cond = network(x, t, prompt)
        ...         if t > guidance_end:
        ...             with diffcache.branch("uncond"):
        ...                 uncond = network(x, t, empty)
    """
    if not isinstance(name, str) or not name:
        raise BadOption("name", name, 'a text that is not empty, for example branch("cond")')
    names = _names()
    names.append(name)
    try:
        yield
    finally:
        names.pop()


def named() -> str:
    """Return the name of the :func:`branch` that this thread is in, or "" outside of one."""
    names = _names()
    return names[-1] if names else ""


def _names() -> list[str]:
    """Return the names of the branches that this thread is in, from the outermost to the innermost."""
    if not hasattr(_entered, "names"):
        _entered.names = []
    found: list[str] = _entered.names
    return found


@dataclass(frozen=True, slots=True)
class Forward:
    """The place of one forward in its run.

    Attributes:
        step: The step, counted from 0.
        branch: The number of the branch, in the order in which the run met the branches.
        unsure: Whether it is not certain that the forward belongs to the same branch as the one at this place a step
            before. It is certain if a name that comes once in a step shows it, or the conditioning.
        moved: Whether the branch has no name and its place belongs to another branch than before. The outputs that were
            kept for its number before this step then belong to another branch.
        changed: A finished step whose number of forwards differs from that of the step before it. None: there was none.
        apart: The numbers of the branches that only their place identifies, if ``changed`` is a step.
        like: Whether all steps so far had as many forwards without a name as the first one.
    """

    step: int
    branch: int
    unsure: bool = False
    moved: bool = False
    changed: int | None = None
    apart: tuple[int, ...] = ()
    like: bool = True


@dataclass(slots=True)
class _Seen:
    """The conditioning of the forwards at one place.

    Attributes:
        now: The conditioning at the last step that had a forward here.
        before: The conditioning at the step before.
        held: The arguments that were the same at both.
        unsure: Whether the last forward may belong to another branch than the one before.
        settled: Whether all arguments were the same at both, and one of them is that of no other branch. As long as
            they stay the same, nothing more is compared.
    """

    now: Conditions
    before: Conditions = field(default_factory=dict)
    held: frozenset[str] = frozenset()
    unsure: bool = False
    settled: bool = False


@dataclass(slots=True)
class _Group:
    """The forwards of one denoiser with one name, or without a name.

    Attributes:
        step: The step of the last forward.
        count: The number of forwards in this step so far.
        before: The number of forwards in the step before; 0 if it is not known.
        first: The number of forwards in the first step; 0 if it is not known.
        seen: The conditioning at each place within the step.
    """

    step: int = -1
    count: int = 0
    before: int = 0
    first: int = 0
    seen: list[_Seen] = field(default_factory=list)


class Branches:
    """Assigns the forwards of a run to branches.

    Args:
        said: The number of forwards without a name in each step, if the loop states it; else 0.
    """

    def __init__(self, said: int = 0) -> None:
        self._said = said
        self._numbers: dict[tuple[str, int], int] = {}
        self._groups: dict[tuple[str, str], _Group] = {}

    def expect(self, names: Sequence[str]) -> None:
        """Give these branches the first numbers, in this order, regardless of their order in the run."""
        for name in names:
            self._number(name, 0)

    def count(self, denoiser: str, step: int, name: str = "") -> int:
        """Return how many forwards with this name ``step`` has had so far."""
        group = self._groups.get((denoiser, name))
        return group.count if group is not None and group.step == step else 0

    def forward(self, denoiser: str, step: int, name: str, given: Callable[[], Conditions]) -> Forward:
        """Return the place of the forward that is beginning.

        Args:
            denoiser: The name of the network.
            step: The step that the forward belongs to.
            name: The name of its branch, or "".
            given: Returns its conditioning. It is called only if there is no name.
        """
        group = self._groups.get((denoiser, name))
        if group is None:
            group = self._groups[denoiser, name] = _Group(before=0 if name else self._said)
            group.first = group.before
        changed = None
        apart: tuple[int, ...] = ()
        if group.step != step:
            if group.step >= 0:
                if group.before and group.count != group.before:
                    changed, apart = group.step, self._apart(name, group)
                group.before = group.count
                group.first = group.first or group.count
            group.step, group.count = step, 0
        place = group.count
        group.count += 1
        number = self._number(name, place)
        if name:  # if a name comes several times in a step, the places distinguish its forwards
            return Forward(step, number, unsure=place > 0 or group.before > 1, changed=changed, apart=apart)
        unsure, moved = self._compare(group, place, given())
        like = group.before == group.first
        return Forward(step, number, unsure, moved, changed, apart, like)

    def uneven(self) -> Iterator[tuple[str, int]]:
        """Yield the denoisers with an uneven last step, with the index of that step.

        A step is uneven if its number of forwards differs from that of the step before, and only the position
        identifies one of the forwards.
        """
        for (denoiser, name), group in self._groups.items():
            if group.before not in (0, group.count) and self._apart(name, group):
                yield denoiser, group.step

    def _number(self, name: str, place: int) -> int:
        """Return the number of a branch. A new branch gets the next number."""
        return self._numbers.setdefault((name, place), len(self._numbers))

    def _apart(self, name: str, group: _Group) -> tuple[int, ...]:
        """Return the numbers of the branches with this name, or without one, that only their place identifies."""
        places: Sequence[int] = range(max(group.count, group.before))
        if not name:
            unsure = [place for place, seen in enumerate(group.seen) if seen.unsure]
            places = [*unsure, *range(group.count, len(group.seen))] if unsure else []
        return tuple(self._number(name, place) for place in places)

    def _compare(self, group: _Group, place: int, now: Conditions) -> tuple[bool, bool]:
        """Compare the conditioning of a forward with those before.

        Args:
            group: The forwards of the same denoiser without a name.
            place: The place of the forward within the step.
            now: The conditioning.

        Returns:
            Whether the forward may belong to another branch than the one at this place a step before, and whether it
            certainly does.
        """
        if place >= len(group.seen):
            group.seen.append(_Seen(now))
            return False, False
        own = group.seen[place]
        same = _same(now, own.now)
        whole = len(same) == len(now) == len(own.now)
        if whole and own.settled:
            own.before = own.now
            return False, False
        # Take the conditioning of the step before: entries at earlier places already hold that of this step.
        others = [seen.before if n < place else seen.now for n, seen in enumerate(group.seen) if n != place]
        others = [other for other in others if other]
        moved = bool((own.held & now.keys()) - same) or any(_same(now, other) - same for other in others)
        sure = all(same - _same(now, other) for other in others) if others else whole
        group.seen[place] = _Seen(now, own.now, frozenset() if moved else same, not sure and not moved, sure and whole)
        return not sure and not moved, moved


def _same(one: Conditions, other: Conditions) -> frozenset[str]:
    """Return the names of the arguments that are the same object at two forwards, or equal numbers or texts."""
    found = []
    for name, a in one.items():
        b = other.get(name, _MISSING)
        if a is b or (type(a) is type(b) and type(a) in _BY_VALUE and a == b):
            found.append(name)
    return frozenset(found)


_MISSING = object()
_BY_VALUE = (bool, int, float, str, list)


def recognised(value: Any) -> Any:
    """Return the form in which an argument is compared with the next step, without keeping the argument alive.

    Numbers, texts and small tensors on the CPU are compared by value, other objects by identity.
    """
    if value is None or type(value) in _BY_VALUE[:-1]:
        return value
    if isinstance(value, Tensor):
        if value.numel() > FEW or value.device.type != "cpu" or value.is_sparse:
            return weakref.ref(value)
        return [*value.shape, value.tolist()]
    try:
        return weakref.ref(value)
    except TypeError:
        return type(value)
