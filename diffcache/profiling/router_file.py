"""Router files of Learning-to-Cache and HarmoniCa: read without running anything in them, and made into schedules.

    schedule = router_file.schedule("DDIM20_router.pt", pipe)     # pipe: a DiTPipeline
    diffcache.accelerate(pipe, schedule)

The files are torch's: ``{"routers": {"0.prob": [2 · depth], …}, "args": …}``, row 0 the cleanest step. A site runs
where sigmoid(prob) is above a threshold.
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
OLDER_PICKLES = 5  # this number, the version, sizes of the machine, the object, the names of its tensors
LONGEST = 200  # letters in the name of a class
FROZEN = 5.0  # HarmoniCa keeps the prob of the noisiest step there


def read(path: str | Path, *, kind: str = "auto", threshold: float = 0.1) -> Router:
    """The table in a router file, in the order in which steps run.

    kind       "learning-to-cache" trains every second row, the others run in full; "harmonica" trains all rows but the
               noisiest; "auto" tells by the training arguments, or by that row
    threshold  of both papers' code

    Only tensors, plain values and an ``argparse.Namespace`` are read; a file that asks for more is refused. Raises
    DocumentError, BadOption.
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
    runs = 1 / (1 + np.exp(-prob)) > threshold
    if kind == "learning-to-cache":
        runs[1::2] = True
    compute = runs[::-1].copy()
    compute[0] = True
    return Router(compute, f"{Path(path).name} ({kind})")


def schedule(path: str | Path, pipe: Any, *, kind: str = "auto", threshold: float = 0.1) -> CacheSchedule:
    """The router in ``path`` for a pipeline around diffusers' DiT, and for as many steps as it was trained for.

    The sampler that it was trained with stands in no file: it is taken to be the pipeline's, with the pipeline's
    spacing, and a run with another is refused. Raises DocumentError, BadOption; ScheduleMismatch where the noise
    scheduler takes another number of steps than it is asked for.
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
    _demand_tensors(where, data)
    allowing: Any = getattr(torch.serialization, "safe_globals", None)  # from torch 2.5 on
    with allowing([argparse.Namespace]) if allowing else nullcontext():
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # of any class, for damaged files
            # Torch's own words end in the advice to run the file.
            asked = re.search(r"GLOBAL (\S+)", str(error))
            found = f"asks for {asked[1]}" if asked else f"damaged, or no file of torch.save ({type(error).__name__})"
            refuse(where, "file", found, "tensors, plain values and arguments", "Nothing in it was run.")


def _demand_tensors(where: str, data: bytes) -> None:
    """Raise DocumentError unless ``data`` begins as torch.save begins, is not compressed, and names short classes.

    Torch takes other bytes for pickles, and spends minutes on a message that holds a long name. Nothing is unpickled.
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
    """Yield streams that stand at the beginning of a pickle."""
    if data.startswith(OLDER):
        stream = io.BytesIO(data)
        yield from itertools.repeat(stream, OLDER_PICKLES)
    elif data.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                refuse(where, "file", "a compressed archive", "one that is not", "Nothing in it was run.")
            yield from (io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".pkl"))
    else:
        refuse(where, "file", "damaged, or no file of torch.save", "a file of torch.save", "Nothing in it was run.")


def _rows(where: str, routers: object) -> np.ndarray:
    """float64 [T, 2 · depth], row 0 the cleanest."""
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
