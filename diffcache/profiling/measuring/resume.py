"""A folder that keeps every measured call, so that a measurement that was stopped can continue."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.documents import files
from diffcache.documents.checks import refuse
from diffcache.errors import BadOption, DocumentError, Unusable
from diffcache.host.digest import TO_DIGEST, NoDigestError, digest_of
from diffcache.profiling.measuring.partial_profile import Arrays, PartialProfile
from diffcache.profiling.measuring.plausible import demand_sound

ABOUT = "measurement.json"
BEHIND = "weights, hooks and settings"  # what the digest of a part covers
WITHOUT = "; or a measurement without resume"


class MeasurementFolder:
    """The folder of one measurement. It is created if it does not exist.

    Args:
        path: The folder.
        pipe: The pipeline that is measured.
        settings: Settings that the measurements depend on, in addition to pipeline and call.

    Raises:
        BadOption: The folder holds other files, or another measurement.
    """

    def __init__(self, path: Path, pipe: Any, settings: Mapping[str, str]) -> None:
        self.path = path
        about = _about(pipe) | dict(settings)
        if path.exists() and not path.is_dir():
            raise BadOption("resume", str(path), "a folder, or a path where one can be made")
        files.make_folder(path)
        file = path / ABOUT
        # Listed before looked for: another process may be making it. Hidden files are what a killed one left behind.
        strange = any(not found.name.startswith(".") for found in path.iterdir())
        if file.exists():
            self._demand_same(file, about)
        elif strange:
            raise BadOption(
                "resume",
                str(path),
                f"a new or an empty folder, or a folder with a measurement; this one has no {ABOUT}",
            )
        else:
            files.write(file, json.dumps(about, indent=2), inside=path)

    def find(self, index: int, call: Mapping[str, Any]) -> PartialProfile | None:
        """Return the measurements of a call if they are in the folder, and set the generators to their state after it.

        Raises:
            DocumentError: The file is damaged.
        """
        file = self._file(index, call)
        if not file.exists():
            return None
        try:
            found, states = PartialProfile.from_bytes(files.read_bytes(file, inside=self.path), str(file))
            demand_sound(str(file), found, index)
            _demand_states(str(file), states, _random_states(call))
        except DocumentError as error:
            next_step = "Remove the file to measure this call again."
            raise DocumentError(error.where, error.field, f"{error.problem} {next_step}") from None
        _set_random_states(call, states)
        return found

    def keeper(self, index: int, call: Mapping[str, Any]) -> Callable[[PartialProfile], Any]:
        """Return a function that writes the measurements of a call.

        Call this method before the call runs, because the name of the file depends on the state of its generators.
        """
        file = self._file(index, call)
        return lambda found: files.write(file, found.to_bytes(**_random_states(call)), inside=self.path)

    def _file(self, index: int, call: Mapping[str, Any]) -> Path:
        """Return the path of a call's file."""
        return self.path / f"call-{digest_of((index, host.digest_of_call(call, otherwise=WITHOUT)))[:32]}.safetensors"

    def _demand_same(self, file: Path, about: Mapping[str, str]) -> None:
        """Raise BadOption unless the folder holds this measurement."""
        try:
            found = files.read_json(file, inside=self.path)
        except DocumentError as error:
            problem = f"cannot be read: {error.problem} Remove the folder to begin anew."
            raise DocumentError(error.where, error.field, problem) from None
        for key in [*about, *found]:
            if about.get(key) != found.get(key):
                raise Unusable(
                    "resume",
                    f"{self.path} holds a measurement with {key} {found.get(key, 'unknown')}, and this one has {key} "
                    f"{about.get(key, 'unknown')}",
                    "Choose another folder",
                )


def _about(pipe: Any) -> dict[str, str]:
    """Return names and digests of the pipeline's parts, on which the measurements depend in addition to the call."""
    about = {"format": "diffcache.measurement", "pipeline": type(pipe).__name__}
    scheduler = host.noise_scheduler(pipe)
    about["noise scheduler"] = f"{type(scheduler).__name__} {host.config_digest(scheduler)}"
    for name, module in host.denoisers(pipe).items():
        about[name] = f"{host.class_name(module)} {host.config_digest(module)}"
    known = host.identity(pipe, _refused)
    return about | {name if name == "versions" else f"{name} {BEHIND}": told for name, told in known.items()}


def _refused(name: str, reason: NoDigestError) -> str:
    raise Unusable(
        "resume",
        f"{name} of the pipeline has {reason.what} at {reason.where or 'the top'}, which a later run cannot recognise",
        f"Measure without resume, or give the object {TO_DIGEST}",
    )


def _random_states(call: Mapping[str, Any]) -> Arrays:
    """Return the states of torch's global generators and of the call's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {str(n): generator.get_state() for n, generator in enumerate(host.generators(call))}
    return {name: state.numpy().astype(np.float64) for name, state in states.items()}


def _demand_states(where: str, found: Arrays, now: Arrays) -> None:
    """Raise DocumentError unless ``found`` can be states of the generators whose states are ``now``."""
    for name in (found.keys() ^ now.keys()) - {"cuda"}:  # a run may go on where there is no GPU
        refuse(where, f"more/{name}", "missing, or not of a generator of this call", "the state of every generator")
    for name in found.keys() & now.keys():
        state = found[name]
        if state.shape != now[name].shape or not np.isin(state, np.arange(256)).all():
            refuse(where, f"more/{name}", f"found an array of shape {list(state.shape)}", "the bytes of a state")


def _set_random_states(call: Mapping[str, Any], states: Arrays) -> None:
    """Set torch's global generators and the call's generators to these states."""

    def state(name: str) -> Tensor:
        return torch.from_numpy(states[name].astype(np.uint8))

    torch.set_rng_state(state("cpu"))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(state("cuda"))
    for n, generator in enumerate(host.generators(call)):
        generator.set_state(state(str(n)))
