"""Hold calibrations that authors published for models, and find the one that fits a network.

``presets.json`` holds one row per model and method: the constants of the method as the authors printed them, the
settings that they recommend, the conditions under which they measured, and the source. None of it was measured for
this package. A rule finds its row by the class and the configuration of the network (``Grid.networks``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcache.errors import BadOption, UnknownName, UnsupportedModel
from diffcache.presets.checks import check_all

__all__ = ["FILE", "Match", "NetworkFacts", "Preset", "available", "check_name", "find", "left_out"]

FILE = Path(__file__).with_name("presets.json")
MEASURE = (
    "Measure your own: `diffcache profile MODEL --prompts FILE --out PROFILE`, then `diffcache plan PROFILE "
    "--scheduler {method} --computed N`. `diffcache presets` lists the published calibrations"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """The facts about one network by which its calibration is found.

    Attributes:
        class_name: The name of its class.
        config: Its configuration, empty if it has none.
        pipeline: The name of the class of its pipeline.
        origin: The path or Hub id from which the pipeline was loaded, or "".
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A published calibration of one method for one model.

    Attributes:
        name: The name by which a rule can ask for it. It is unique among the presets of one method.
        method: The name of the rule that it is for.
        model: The name of the model.
        class_name: The class of the network.
        config: The entries of the network's configuration that must be equal.
        pipelines: The classes of the pipelines that it is for. Empty allows any.
        hub: The Hub ids of the model.
        constants: The constants of the method, by the names that its rule reads.
        recommended: The settings that the authors recommend, slowest first. ``speedup`` is their claim.
        conditions: The conditions under which they measured.
        differs: What diffcache does otherwise than the source, or "".
        stacks: The paths of the stacks that are predicted, in the order of the network.
        repository: The source repository.
        file: The file in it.
        commit: The commit.
    """

    name: str
    method: str
    model: str
    class_name: str
    config: Mapping[str, Any]
    pipelines: tuple[str, ...]
    hub: tuple[str, ...]
    constants: Mapping[str, Any]
    recommended: tuple[Mapping[str, float], ...]
    conditions: Mapping[str, Any]
    differs: str
    stacks: tuple[str, ...]
    repository: str
    file: str
    commit: str

    @property
    def steps(self) -> int:
        """Return the number of steps that the authors ran."""
        return int(self.conditions["steps"])

    @property
    def source(self) -> str:
        """Return the repository, the commit and the file in one line."""
        return f"{self.repository} @{self.commit[:7]}, {self.file}"

    def described_conditions(self) -> str:
        """Return the conditions under which the authors measured, in one line."""
        size = " x ".join(str(self.conditions[key]) for key in ("width", "height") if key in self.conditions)
        said = [f"{self.steps} steps", size]
        said += [
            f"{name} {value}" for name, value in self.conditions.items() if name not in ("steps", "width", "height")
        ]
        return ", ".join(filter(None, said))

    def unlike(self, network: NetworkFacts) -> list[str]:
        """Return how the configuration of ``network`` differs from the one that the preset is for."""
        absent = object()
        found = {key: network.config.get(key, absent) for key in self.config}
        return [
            f"{key} is {'missing' if found[key] is absent else repr(found[key])}, not {wanted!r}"
            for key, wanted in self.config.items()
            if found[key] != wanted
        ]


@dataclass(frozen=True, slots=True)
class Match:
    """A preset and how it was found.

    Attributes:
        preset: The preset.
        how: Why it was taken, for the provenance.
    """

    preset: Preset
    how: str

    def notes(self) -> dict[str, str]:
        """Return the entries for a schedule's provenance."""
        preset = self.preset
        notes = {
            "preset": f"{preset.name}, {self.how}; not measured here",
            "preset source": preset.source,
            "preset conditions": preset.described_conditions(),
        }
        return notes | ({"preset differs": preset.differs} if preset.differs else {})


@functools.cache
def _document() -> dict[str, Any]:
    """Return the checked contents of the data file."""
    document: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    check_all(document["presets"], FILE.name)
    return document


@functools.cache
def available() -> tuple[Preset, ...]:
    """Return all presets in the order of the file."""
    return tuple(_preset(row) for row in _document()["presets"])


def left_out() -> tuple[Mapping[str, str], ...]:
    """Return the published settings that are not presets: models, method, repository and the reason."""
    return tuple(_document()["left_out"])


def _preset(row: Mapping[str, Any]) -> Preset:
    """Return the preset of one row of the file."""
    same = ("name", "method", "model", "constants", "conditions", "differs")
    return Preset(
        **{key: row[key] for key in same},
        class_name=row["network"]["class"],
        config=row["network"]["config"],
        pipelines=tuple(row["pipelines"]),
        hub=tuple(row["hub"]),
        recommended=tuple(row["recommended"]),
        stacks=tuple(row["stacks"]),
        **row["source"],
    )


def find(method: str, networks: Mapping[str, NetworkFacts], name: str | None = None) -> Match:
    """Return the preset of a method for the network of a pipeline.

    Args:
        method: The name of the rule.
        networks: Component name -> the facts about the network. Empty if they are not known.
        name: The name of a preset. It is then taken for any network of its class, and differences of the
            configuration are noted. None finds the preset by the configuration.

    Raises:
        UnknownName: The method has no preset of this name.
        UnsupportedModel: No preset is for this network.
        BadOption: Several presets are for it.
    """
    check_name(method, name)
    mine = [preset for preset in available() if preset.method == method and name in (None, preset.name)]
    if len(networks) != 1:
        found = f"this pipeline has {len(networks)} ({', '.join(networks)})" if networks else "no network is known"
        raise UnsupportedModel(
            f"a calibration of {method!r} is for one network; {found}. {MEASURE.format(method=method)}."
        )
    ((_, network),) = networks.items()
    of_class = [preset for preset in mine if preset.class_name == network.class_name]
    if name is not None and of_class:
        different = of_class[0].unlike(network)
        return Match(of_class[0], "chosen by name" + (f" ({'; '.join(different)})" if different else ""))
    fits = [preset for preset in of_class if not preset.unlike(network)]
    fits = [p for p in fits if not p.pipelines or network.pipeline in p.pipelines]
    from_hub = [preset for preset in fits if any(_is_origin(one, network.origin) for one in preset.hub)]
    if len(fits) > 1 and len(from_hub) == 1:
        fits = from_hub
    if len(fits) == 1:
        known = fits[0] in from_hub
        where = f"loaded from {network.origin}" if known else f"the configuration is that of {fits[0].model}"
        return Match(fits[0], where)
    if fits:
        names = " or ".join(f"preset={preset.name}" for preset in fits)
        raise BadOption("preset", None, f"{names}: the configuration of this {network.class_name} fits them all")
    raise UnsupportedModel(_unknown(method, network, of_class or (mine if name is not None else [])))


def check_name(method: str, name: str | None) -> None:
    """Raise UnknownName if the method has no preset called ``name``. None chooses by the network."""
    names = [preset.name for preset in available() if preset.method == method]
    if name is not None and name not in names:
        raise UnknownName(f"preset of {method!r}", str(name), names)


def _is_origin(hub: str, origin: str) -> bool:
    """Return whether a pipeline was loaded from a Hub id: the id itself, or its folder in the cache of the Hub."""
    return origin == hub or f"models--{hub.replace('/', '--')}/" in f"{origin}/".replace("\\", "/")


def _unknown(method: str, network: NetworkFacts, near: Sequence[Preset]) -> str:
    """Return the message for a network that no preset is for, with the reason for each of the presets ``near``."""
    pipeline = f" in a {network.pipeline}" if network.pipeline else ""
    text = f"no published calibration of {method!r} is for this {network.class_name}{pipeline}"
    for preset in near:
        if preset.class_name != network.class_name:
            reasons = [f"it is for a {preset.class_name}"]
        else:
            reasons = preset.unlike(network) or [f"it is for {', '.join(preset.pipelines)}"]
        text += f"; {preset.name}: {', '.join(reasons)}"
    of_class = any(preset.class_name == network.class_name for preset in near)
    named = " preset=NAME takes one of these all the same." if of_class else ""
    return f"{text}.{named} {MEASURE.format(method=method)}."
