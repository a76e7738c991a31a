"""Find the model that a command line names, without loading it, and load its pipeline."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from diffcache import host
from diffcache.assets.models import memory_options
from diffcache.documents import files, hub
from diffcache.errors import BadOption, HubUnavailable, UnknownName, UnsupportedModel
from diffcache.eval.requirements import device_named

DEMO = "demo:"
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
INDEX = "model_index.json"
NETWORKS = ("transformer", "unet", "prior", "decoder", "scheduler")  # the beginnings of names of what a loop needs
CLASSES = 2  # the entries of a component in the index of a pipeline are its library and its class

Call = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline, and how it is called.

    Attributes:
        pipe: The pipeline.
        prepare: Maps the arguments that users give (prompts as text) to those of this pipeline.
        samples: Samples that the model offers if the user gives none: arguments of one sample each.
        calls: Calls that came with the pipeline. None: the user must give them.
    """

    pipe: Any
    prepare: Callable[[Call], Call] = lambda call: call
    samples: Sequence[Mapping[str, Any]] = ()
    calls: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """A model that is not loaded.

    Attributes:
        name: The name that the user gave.
        kind: "demo", "function" for a function of the user, or "pretrained" for a pipeline in a folder or on the Hub.
        dtype: None: the model's own, or the default for the device.
        device: None: the first GPU for a pipeline in a folder or on the Hub, if there is one.
        classes: For a saved pipeline, name of a component -> its class, and "" -> the class of the pipeline.
        absent: For a saved pipeline, components that it is saved without. They are None in the loaded pipeline.
    """

    name: str
    kind: str
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    @property
    def pipeline(self) -> type | None:
        """The class of a saved pipeline. None if diffusers does not have it."""
        import diffusers

        found = getattr(diffusers, self.classes.get("", ""), None)
        return found if isinstance(found, type) else None

    def planned(self, steps: int) -> int | None:
        """Return the iterations that the saved noise scheduler plans for ``steps`` steps; None if unknown."""
        import diffusers

        kind = getattr(diffusers, self.classes.get("scheduler", ""), None)
        if kind is None:
            return None
        try:
            scheduler = kind.from_pretrained(self.name, subfolder="scheduler")
        except (OSError, ValueError, TypeError):
            return None  # loading the pipeline raises the error
        return host.planned(scheduler, steps)

    def load(self) -> Loaded:
        """Return the pipeline.

        Raises:
            BadOption: If an address does not lead to a function.
            UnsupportedModel: If the pipeline cannot be loaded or is not supported.
        """
        if self.kind == "pretrained":
            return Loaded(self._pretrained())
        found = _demo(self.name.removeprefix(DEMO)) if self.kind == "demo" else _of_function(self.name)
        host.denoisers(host.adopted(found.pipe))
        if self.dtype or self.device:
            found.pipe.to(*filter(None, (self.dtype, self.device)))
        return found

    def _pretrained(self) -> Any:
        import diffusers

        where = self.device or _own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        kind = self.dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
        known = () if self.pipeline is None else inspect.signature(self.pipeline).parameters
        absent: dict[str, Any] = {name: None for name in self.absent if name in known}
        try:
            options = absent | memory_options()
            pipe: Any = diffusers.DiffusionPipeline.from_pretrained(self.name, dtype=kind, **options)
        except Exception as error:  # missing files or packages, wrong names and damaged weights raise many classes
            raise UnsupportedModel(
                f"{self.name!r} could not be loaded as a diffusers pipeline: {_short(error)}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        host.denoisers(pipe)
        return pipe.to(where)


def named(name: str, dtype: str | None, device: str | None) -> Named:
    """Return the model of a name, without loading it.

    Args:
        name: ``demo:flux``, ``demo:flux-guided`` or ``demo:dit``; ``package.module:function``, which returns a
            pipeline, or a pipeline and calls; or a folder or an id on the Hub.
        dtype: A name in DTYPES. None: see ``Named``.
        device: The name of a device. None: see ``Named``.

    Raises:
        BadOption: If the dtype, the device or the address is not valid.
        UnknownName: If there is no such demo model.
        UnsupportedModel: If there is no such pipeline.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BadOption("dtype", dtype, f"one of {', '.join(DTYPES)}")
    kind = None if dtype is None else DTYPES[dtype]
    where = None if device is None else _own_device(device_named(device))
    if name.startswith(DEMO):
        from diffcache import assets

        if name.removeprefix(DEMO) not in assets.NAMES:
            raise UnknownName("demo model", name.removeprefix(DEMO), assets.NAMES)
        return Named(name, "demo", kind, where)
    if ":" in name and not os.path.exists(name):  # noqa: PTH110 (Path.exists raises for a name that is too long)
        _demand_address("model", name, "a folder, an id on the Hub, demo:flux, or package.module:function")
        return Named(name, "function", kind, where)
    index = _index(name)
    return Named(name, "pretrained", kind, where, _classes(index), _absent(name, index))


def _index(name: str) -> dict[str, Any]:
    """Return the index of a saved pipeline.

    Raises:
        UnsupportedModel: If there is no index.
    """
    if os.path.isfile(name):  # noqa: PTH113
        raise UnsupportedModel(f"{name!r} is a file. Allowed: the folder of a pipeline, as save_pretrained writes it.")
    if os.path.isdir(name) and not (Path(name) / INDEX).is_file():  # noqa: PTH112
        raise UnsupportedModel(f"the folder {name!r} holds no diffusers pipeline: there is no {INDEX} in it.")
    try:
        return files.read_json(hub.fetch(name, INDEX, revision=None, token=None))
    except HubUnavailable as error:
        raise UnsupportedModel(
            f"no folder {name!r:.200} here; as a Hub id it could not be reached: {_cut(error.cause)}"
        ) from error


def _classes(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class of each component that an index lists, and the class of the pipeline under ""."""
    own = index.get("_class_name")
    parts = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == CLASSES}
    return {k: v for k, v in ({"": own} | parts).items() if isinstance(v, str)}


def _absent(name: str, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the components that a pipeline is saved without: null in its index, or without a folder.

    Raises:
        UnsupportedModel: If a network or a noise scheduler has no folder.
    """
    parts = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == CLASSES}
    null = {key for key, value in parts.items() if value[0] is None}
    folder = Path(name)
    lost = {key for key in parts.keys() - null if folder.is_dir() and not (folder / key).is_dir()}
    for key in sorted(lost):
        if key.startswith(NETWORKS):
            raise UnsupportedModel(
                f"the folder {name!r} lacks the folder {key!r} that its {INDEX} names. Copy the whole pipeline."
            )
    return tuple(sorted(null | lost))


def _short(error: BaseException) -> str:
    """Return the class and the first words of an error of another library, on one line."""
    text = _cut(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cut(text: str) -> str:
    """Return the first words of a long text."""
    return text if len(text) <= 200 else f"{text[:200].rpartition(' ')[0]} …"


def _own_device(device: torch.device) -> torch.device:
    """Return the device of this process. Under ``torchrun``, ``cuda`` is the GPU of the process's rank."""
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
        lists = calls is None or isinstance(calls, (str, Mapping))  # not lists of calls, which the check reports
        return Loaded(_no_plain(address, pipe), calls=calls if lists else list(calls))
    return Loaded(_no_plain(address, found))


def _no_plain(address: str, found: Any) -> Any:
    """Return what a function of the user returned. Raise BadOption for None and plain values."""
    if found is None or isinstance(found, (str, int, float, Mapping, Sequence)):
        returned = "None" if found is None else type(found).__name__
        raise BadOption(
            "model", address, f"a function that returns a pipeline, or a pipeline and calls; it returned {returned}"
        )
    return found


def _demand_address(option: str, address: str, allowed: str) -> tuple[str, str]:
    module, _, attribute = address.partition(":")
    if not all(map(str.isidentifier, (*module.split("."), *attribute.split(".")))):
        raise BadOption(option, address, allowed)
    return module, attribute


def function_at(option: str, address: str, allowed: str = "package.module:function") -> Any:
    """Import the user's code and return the callable at an address.

    Args:
        option: Name of the option, for errors.
        address: ``package.module:function``. The current folder is searched too.
        allowed: Description of the allowed values, for errors.

    Raises:
        BadOption: If there is no module, attribute or callable at the address.
    """
    module, attribute = _demand_address(option, address, allowed)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as ``python -m`` does
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module was found, but a module that it imports was not
        raise BadOption(option, address, f"package.module:function; there is no module {module!r}") from None
    except AttributeError:
        raise BadOption(option, address, f"package.module:function; {module!r} has no {attribute!r}") from None
    if not callable(found):
        raise BadOption(option, address, f"a function; {attribute!r} of {module!r} is a {type(found).__name__}")
    return found


def is_first_process() -> bool:
    """Return whether this is the first process of the machine. It alone writes files and prints."""
    return not dist.is_available() or not dist.is_torchelastic_launched() or dist.get_node_local_rank() == 0
