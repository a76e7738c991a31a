"""Check the rows of the data file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffcache.errors import DocumentError

FIELDS = {
    "name": str,
    "method": str,
    "model": str,
    "network": dict,
    "pipelines": list,
    "hub": list,
    "constants": dict,
    "recommended": list,
    "conditions": dict,
    "differs": str,
    "stacks": list,
    "source": dict,
    "measured": str,
}
SOURCE = {"repository": r"[\w.-]+/[\w.-]+", "file": r"[\w./-]+\.(py|md)", "commit": r"[0-9a-f]{40}"}
SETTINGS = {  # method -> the settings that a recommendation must name
    "teacache": {"threshold"},
    "magcache": {"threshold", "max_skip", "retention"},
    "firstblockcache": {"threshold"},
}
NOT_MEASURED = "not measured here"
DEGREE = 4  # of TeaCache's polynomials
SIGNALS = ("modulated_input", "time_embedding")  # names of criteria
FIRST = ("nearest", "down", "down, in calls")  # how MagCache's retained steps are rounded
LIMIT = ("at most", "below")  # how an error compares with MagCache's threshold where a step is skipped


def check_all(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise DocumentError if a row is not valid, or two rows of one method have the same name."""
    names: set[tuple[str, str]] = set()
    for number, row in enumerate(rows):
        check(row, f"{where}, row {number}")
        named = (row["method"], row["name"])
        _demand(named not in names, f"{where}, row {number}", "name", row["name"], "a name that no row before it has")
        names.add(named)


def check(row: Mapping[str, Any], where: str) -> None:
    """Check a row of the data file.

    Args:
        row: The row.
        where: Its place, for errors.

    Raises:
        DocumentError: A field is missing, unknown, of the wrong type or out of range.
    """
    if set(row) != set(FIELDS):
        odd = sorted(set(row) ^ set(FIELDS))
        raise DocumentError(where, "row", f"{', '.join(odd)} missing or unknown. Allowed: {', '.join(FIELDS)}.")
    for name, kind in FIELDS.items():
        _demand(isinstance(row[name], kind), where, name, row[name], f"a {kind.__name__}")
    method = row["method"]
    _demand(method in SETTINGS, where, "method", method, f"one of {', '.join(SETTINGS)}")
    _demand(row["measured"] == NOT_MEASURED, where, "measured", row["measured"], repr(NOT_MEASURED))
    for name, form in SOURCE.items():
        value = row["source"].get(name, "")
        _demand(re.fullmatch(form, str(value)), where, f"source/{name}", value, f"text of the form {form}")
    _demand(bool(row["hub"]) and all("/" in hub for hub in row["hub"]), where, "hub", row["hub"], "Hub ids")
    _demand(bool(row["stacks"]), where, "stacks", row["stacks"], "paths of stacks")
    network = row["network"]
    _demand(
        set(network) == {"class", "config"} and bool(network["class"]) and bool(network["config"]),
        where,
        "network",
        network,
        "a class and entries of its configuration",
    )
    steps = row["conditions"].get("steps")
    _demand(isinstance(steps, int) and steps > 1, where, "conditions/steps", steps, "a number of steps")
    _demand(bool(row["recommended"]), where, "recommended", row["recommended"], "one recommendation or more")
    for setting in row["recommended"]:
        given = set(setting) - {"speedup"}
        _demand(given == SETTINGS[method], where, "recommended", setting, f"values for {', '.join(SETTINGS[method])}")
        _demand(
            all(_number(v) and v >= 0 for v in setting.values()), where, "recommended", setting, "numbers from 0 on"
        )
    thresholds = [setting["threshold"] for setting in row["recommended"]]
    _demand(thresholds == sorted(thresholds), where, "recommended", thresholds, "thresholds that rise")
    _CONSTANTS[method](row["constants"], steps, where)


def _teacache(constants: Mapping[str, Any], steps: int, where: str) -> None:
    """Check the constants of TeaCache: the signal, the polynomial, and how many steps are always computed."""
    names = {"signal", "polynomial", "first", "last"}
    _demand(set(constants) == names, where, "constants", sorted(constants), ", ".join(sorted(names)))
    _demand(constants["signal"] in SIGNALS, where, "constants/signal", constants["signal"], f"one of {SIGNALS}")
    polynomial = constants["polynomial"]
    fits = isinstance(polynomial, list) and len(polynomial) == DEGREE + 1 and all(map(_number, polynomial))
    _demand(fits, where, "constants/polynomial", polynomial, f"{DEGREE + 1} numbers, highest power first")
    for name, least in (("first", 1), ("last", 0)):
        value = constants[name]
        fits = isinstance(value, int) and least <= value < steps
        _demand(fits, where, f"constants/{name}", value, f"a whole number from {least} to {steps - 1}")


def _magcache(constants: Mapping[str, Any], steps: int, where: str) -> None:
    """Check the constants of MagCache: the ratios by branch and step, and how the source compares and rounds."""
    names = {"ratios", "first", "limit", "keep"}
    _demand(set(constants) == names, where, "constants", sorted(constants), ", ".join(sorted(names)))
    ratios = constants["ratios"]
    fits = isinstance(ratios, list) and len(ratios) in (1, 2) and all(isinstance(row, list) for row in ratios)
    _demand(fits, where, "constants/ratios", ratios, "a list for each of one or two branches")
    for row in ratios:
        fits = len(row) == steps and all(_number(ratio) and 0 < ratio < 10 for ratio in row) and row[0] == 1
        _demand(fits, where, "constants/ratios", row, f"{steps} ratios above 0, the first of which is 1")
    _demand(constants["first"] in FIRST, where, "constants/first", constants["first"], f"one of {FIRST}")
    _demand(constants["limit"] in LIMIT, where, "constants/limit", constants["limit"], f"one of {LIMIT}")
    keep = constants["keep"]
    fits = isinstance(keep, list) and all(isinstance(step, int) and 0 <= step < steps for step in keep)
    _demand(fits, where, "constants/keep", keep, f"steps from 0 to {steps - 1}")


def _firstblockcache(constants: Mapping[str, Any], steps: int, where: str) -> None:
    """Check that FirstBlockCache has no constants."""
    _demand(not constants, where, "constants", constants, "none")


_CONSTANTS = {"teacache": _teacache, "magcache": _magcache, "firstblockcache": _firstblockcache}


def _number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _demand(holds: object, where: str, name: str, found: object, allowed: str) -> None:
    """Raise DocumentError unless ``holds``."""
    if not holds:
        raise DocumentError(where, name, f"{found!r:.80} was found. Allowed: {allowed}.")
