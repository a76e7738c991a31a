"""Damaged copies of files: the same seed gives the same damage."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 50, 999, 2**63, -0.5, 1e308, 1e-320, "", "x", "\ud800", "\x1b[2J", "../x", "a\0b"),
    *([], [1], [[]], {}, {"a": 1}, [None] * 9, "1" * 300),
)


def bytes_of(data: bytes, seed: int) -> bytes:
    """Return ``data`` with a few bytes changed, cut out, doubled, put in or cut off at the end."""
    chance, found = random.Random(seed), bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(found) + 1)
        length = chance.choice((1, 1, 4, 64, 4096))
        match chance.randrange(6):
            case 0:
                found[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length]
            case 3:
                found[at:at] = chance.choice((b"[", b"{", b"\0", b"\xff", b'"', b"NaN", b"1e999")) * length
            case 4:
                del found[at:]
            case 5 if found:
                found[at - 1 if at else 0] ^= 1 << chance.randrange(8)
    return bytes(found)


def tree_of(tree: Any, seed: int) -> Any:
    """Return plain data with one or two of its values replaced by odd ones, left out, added or exchanged."""
    chance, found = random.Random(seed), copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(found))
        if not places:
            break
        holder, key = chance.choice(places)
        match chance.randrange(5):
            case 0 | 1:
                holder[key] = copy.deepcopy(chance.choice(ODD))
            case 2:
                del holder[key]
            case 3:
                other, there = chance.choice(places)
                holder[key] = copy.deepcopy(other[there]) if other is not holder else None
            case 4 if isinstance(holder, dict):
                holder[chance.choice(("x", "", "\x1b[2J", key + "x"))] = copy.deepcopy(chance.choice(ODD))
    return found


def _places(tree: Any) -> Any:
    """Yield every (container, key) in plain data."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)
