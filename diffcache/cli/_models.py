"""The pipeline that a word on the command line stands for."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from diffcache import host
from diffcache.errors import BadOption, UnsupportedModel

DEMO = "demo:"
DTYPES = ("float32", "float16", "bfloat16")

Call = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline and how it is called.

    prepare  turns the arguments of a call as users give them (prompts as text) into those of this pipeline
    samples  what can be asked for where nothing is given: arguments of one sample each
    calls    that came with the pipeline, None if the user has to say
    """

    pipe: Any
    prepare: Callable[[Call], Call] = lambda call: call
    samples: Sequence[Mapping[str, Any]] = ()
    calls: Sequence[Mapping[str, Any]] | None = None


def load(name: str, dtype: str | None, device: str | None) -> Loaded:
    """``demo:flux`` or ``demo:dit``; ``package.module:function``, which returns a pipeline, or it and calls; else a
    folder or an id on the Hub. Raises BadOption, UnknownName, UnsupportedModel."""
    if dtype not in (None, *DTYPES):
        raise BadOption("dtype", dtype, f"one of {', '.join(DTYPES)}")
    if name.startswith(DEMO):
        found = _demo(name.removeprefix(DEMO))
    elif ":" in name and not Path(name).exists():
        found = _of_function(name)
    else:
        return Loaded(_pretrained(name, dtype, device))
    host.denoisers(host.adopted(found.pipe))
    if dtype or device:
        found.pipe.to(*([getattr(torch, dtype)] if dtype else []), *([_device(device)] if device else []))
    return found


def _pretrained(name: str, dtype: str | None, device: str | None) -> Any:
    import diffusers

    where = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    try:
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=kind)
    except (OSError, ValueError, ImportError) as error:  # missing files, wrong names, missing packages
        reason = " ".join(str(error).split())
        raise UnsupportedModel(f"{name!r} could not be loaded as a diffusers pipeline: {reason:.300}") from error
    pipe.set_progress_bar_config(disable=True)
    host.denoisers(pipe)
    return pipe.to(where)


def _device(name: str) -> torch.device:
    """Under ``torchrun``, ``cuda`` is each process's own."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadOption("device", name, "cpu, cuda, cuda:1, mps") from None
    if device.type == "cuda" and device.index is None and dist.is_available() and dist.is_torchelastic_launched():
        return torch.device("cuda", dist.get_node_local_rank())
    return device


def _demo(name: str) -> Loaded:
    from diffcache import assets

    model = assets.load(name)

    def prepare(call: Call) -> Call:
        subjects = call.pop("prompt", None)
        if subjects is None:
            return call
        own = model.call([subjects] if isinstance(subjects, str) else subjects, [])
        del own["generator"], own["num_inference_steps"], own["output_type"]
        return own | call

    return Loaded(model.pipe, prepare, [{"prompt": subject} for subject in model.subjects[:16]])


def _of_function(address: str) -> Loaded:
    found = function_at("model", address, "a folder, an id on the Hub, demo:flux, or package.module:function")()
    if isinstance(found, tuple) and len(found) == 2:
        pipe, calls = found
        return Loaded(pipe, calls=list(calls))
    return Loaded(found)


def function_at(option: str, address: str, allowed: str = "package.module:function") -> Any:
    """Imports the user's own code: errors in it are the user's to see in full."""
    module, _, attribute = address.partition(":")
    if not all(map(str.isidentifier, (*module.split("."), *attribute.split(".")))):
        raise BadOption(option, address, allowed)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as ``python -m`` has it
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module was found; what it imports itself was not
        raise BadOption(option, address, f"package.module:function; there is no module {module!r}") from None
    except AttributeError:
        raise BadOption(option, address, f"package.module:function; {module!r} has no {attribute!r}") from None


def is_first_process() -> bool:
    """Of this machine: the one that writes and speaks."""
    return not dist.is_available() or not dist.is_torchelastic_launched() or dist.get_node_local_rank() == 0
