"""Read router files of Learning-to-Cache and HarmoniCa, without running code in them, and make schedules from them.

    schedule = router_file.schedule("DDIM20_router.pt", pipe)     # pipe: a DiTPipeline
    diffcache.accelerate(pipe, schedule)

The files are written by ``torch.save``: ``{"routers": {"0.prob": [2 · depth], …}, "args": …}``. Row 0 is the cleanest
step. A site runs if sigmoid(prob) is above a threshold.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache import host
from diffcache.documents import files
from diffcache.documents.checks import refuse
from diffcache.documents.context import ScheduleContext
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import BadOption, DocumentError, ScheduleMismatch
from diffcache.executor.bound import Bound
from diffcache.profiling.replay import run_facts
from diffcache.schedulers import harmonica, learning_to_cache
from diffcache.schedulers.learning_to_cache import Router

KINDS = ("auto", "learning-to-cache", "harmonica")
ZIP = b"PK\x03\x04"
OLDER = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: pickles one after another, then tensors
OLDER_PICKLES = 5  # the magic number, the version, sizes of C types, the object, the names of its tensors
LONGEST = 200  # the most letters in the name of a class
FROZEN = 5.0  # the prob of the noisiest step in files of HarmoniCa


def read(path: str | Path, *, kind: str = "auto", threshold: float = 0.1) -> Router:
    """Return the table in a router file, in the order in which steps run.

    Only tensors, plain values and an ``argparse.Namespace`` are read. Other files are refused.

    Args:
        path: The file.
        kind: "learning-to-cache" trains every second row, and the other rows run in full. "harmonica" trains all rows
            but the noisiest. "auto" decides by the training arguments, or by that row.
        threshold: The threshold of the probabilities. Both papers' code uses 0.1.

    Raises:
        BadOption: ``kind`` or ``threshold`` is out of range.
        DocumentError: The file is damaged or holds other content.
    """
    if kind not in KINDS:
        raise BadOption("kind", kind, ", ".join(KINDS))
    if not 0 <= threshold < 1:
        raise BadOption("threshold", threshold, "0 to 1")
    where = str(path)
    content = _load(where, files.read_bytes(Path(path)))
    prob = _rows(where, content.get("routers") if isinstance(content, Mapping) else None)
    if kind == "auto":
        trained_all = hasattr(content.get("args"), "lambda_c") or bool((prob[-1] == FROZEN).all())
        kind = "harmonica" if trained_all else "learning-to-cache"
    with np.errstate(over="ignore"):  # the logistic function of a large negative number is 0
        runs = 1 / (1 + np.exp(-prob)) > threshold
    if kind == "learning-to-cache":
        runs[1::2] = True
    compute = runs[::-1].copy()
    compute[0] = True
    return Router(compute, f"{Path(path).name} ({kind})")


def schedule(path: str | Path, pipe: Any, *, kind: str = "auto", threshold: float = 0.1) -> CacheSchedule:
    """Return the schedule of a router file, for a pipeline around diffusers' DiT and the router's number of steps.

    The file does not name the sampler that the router was trained with. It is assumed to be the pipeline's, with the
    pipeline's spacing, and a run with another sampler is refused.

    Args:
        path: The file.
        pipe: The pipeline.
        kind: As in ``read``.
        threshold: As in ``read``.

    Raises:
        BadOption: ``kind`` or ``threshold`` is out of range, or the pipeline's network does not fit the router.
        DocumentError: The file is damaged or holds other content.
        ScheduleMismatch: The noise scheduler takes another number of steps than it is asked for.
    """
    router = read(path, kind=kind, threshold=threshold)
    ((name, denoiser), *others) = host.denoisers(pipe).items()
    if others:
        raise BadOption("pipe", type(pipe).__name__, "a pipeline with one denoiser")
    router.check_sites(Bound.of(pipe).sites[name])
    scheduler = pipe.scheduler
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(router.steps)
    if len(twin.timesteps) != router.steps:
        raise ScheduleMismatch(
            f"{router} was trained for {router.steps} steps; asked for these, {type(scheduler).__name__} takes "
            f"{len(twin.timesteps)}. Set the noise scheduler that it was trained with."
        )
    context = ScheduleContext(
        steps=router.steps,
        networks={name: run_facts.network(denoiser)},
        noise_scheduler=run_facts.noise_scheduler_id(scheduler),
        timesteps=twin.timesteps.detach().cpu().double().numpy(),
        notes=host.configurations(**{name: denoiser, "scheduler": scheduler}),
    )
    return context.schedule(
        {name: router.plans()},
        notes={
            "scheduler": f"router file: {router}",
            "source": f"{learning_to_cache.SOURCE}; {harmonica.SOURCE}",
        },
    )


def _load(where: str, data: bytes) -> Any:
    """Return the content of a router file. Raise DocumentError if it is damaged or needs other classes."""
    _demand_tensors(where, data)
    allowing: Any = getattr(torch.serialization, "safe_globals", None)  # from torch 2.5 on
    with allowing([argparse.Namespace]) if allowing else nullcontext():
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise errors of any class
            # Torch's message advises to run the file, so it is not shown.
            asked = re.search(r"GLOBAL (\S+)", str(error))
            found = (
                f"asks for {asked[1]}" if asked else f"damaged, or not a file of torch.save ({type(error).__name__})"
            )
            refuse(where, "file", found, "tensors, plain values and arguments", "Nothing in it was run.")


def _demand_tensors(where: str, data: bytes) -> None:
    """Raise DocumentError unless ``data`` is like an uncompressed file of ``torch.save`` that names short classes.

    Torch reads other bytes as pickles, and needs minutes for a message that contains a long name. Nothing is unpickled
    here.
    """
    allowed, nothing_ran = "a file of torch.save", "Nothing in it was run."
    try:
        for stream in _pickles(where, data):
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "GLOBAL" and len(str(argument)) > LONGEST:
                    refuse(where, "file", f"asks for {argument:.40}…", f"names of up to {LONGEST} letters", nothing_ran)
    except DocumentError:
        raise
    except Exception as error:  # damaged archives and pickles raise many classes
        refuse(where, "file", f"damaged: {type(error).__name__}: {error!s:.100}", allowed, nothing_ran)


def _pickles(where: str, data: bytes) -> Iterator[io.BytesIO]:
    """Yield streams that are positioned at the beginning of a pickle."""
    if data.startswith(OLDER):
        stream = io.BytesIO(data)
        yield from itertools.repeat(stream, OLDER_PICKLES)
    elif data.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                refuse(where, "file", "a compressed archive", "one that is not", "Nothing in it was run.")
            yield from (io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".pkl"))
    else:
        refuse(where, "file", "damaged, or not a file of torch.save", "a file of torch.save", "Nothing in it was run.")


def _rows(where: str, routers: object) -> np.ndarray:
    """Return the probabilities, float64 [T, 2 · depth]. Row 0 is the cleanest step.

    Raises:
        DocumentError: ``routers`` is not a dictionary of such rows.
    """
    if not isinstance(routers, Mapping) or not routers:
        refuse(where, "routers", f"found {type(routers).__name__}", "a dictionary of '0.prob', '1.prob', …")
    names = [f"{i}.prob" for i in range(len(routers))]
    if set(routers) != set(names):
        odd = sorted(map(str, set(routers) ^ set(names)))[0]
        refuse(
            where, "routers", f"found {len(routers)} entries, {odd!r:.80} missing or too many", "'0.prob', '1.prob', …"
        )
    for name in names:
        row = routers[name]
        if not isinstance(row, Tensor) or row.ndim != 1 or len(row) != len(routers[names[0]]) or len(row) % 2:
            found = list(row.shape) if isinstance(row, Tensor) else type(row).__name__
            refuse(where, f"routers/{name}", f"found {found}", "one number for each attention and feed-forward")
        if len(row) == 0 or not bool(row.isfinite().all()):
            refuse(where, f"routers/{name}", "found NaN, Inf or nothing", "finite numbers")
    return np.stack([routers[name].detach().double().numpy() for name in names])
