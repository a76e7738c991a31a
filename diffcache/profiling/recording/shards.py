"""Run a function in every process of torch.distributed, and share the results between all processes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch import distributed as dist

from diffcache.errors import DiffCacheError

_groups_made = itertools.count()  # the same number in every process

Share = Callable[[int, int], bytes]  # (rank, number of processes) -> what this process found


def all_shares(share: Share) -> list[bytes]:
    """Run ``share`` in every process, and return the results of all processes by rank.

    The processes are those of torch.distributed's default group, or of ``torchrun``; else there is only this one.

    Raises:
        DiffCacheError: Another process failed. The error contains its reason.
    """
    with _group() as (rank, size):
        if size == 1:
            return [share(rank, size)]
        found, failure = b"", None
        try:
            found = share(rank, size)
        except Exception as error:  # the other processes wait for this one, which has to report the error first
            failure = error
        trouble = "" if failure is None else f"{type(failure).__name__}: {failure}"
        troubles = [text.decode() for text in _exchanged(trouble.encode(), size)]
        if failure is not None:
            raise failure
        for other, text in enumerate(troubles):
            if text:
                raise DiffCacheError(f"process {other} of {size} could not measure its share of the calls: {text}")
        return list(_exchanged(found, size))


@contextlib.contextmanager
def _group() -> Iterator[tuple[int, int]]:
    """Yield the rank and the number of processes. Under ``torchrun``, create a group for the block if there is none."""
    if not dist.is_available():
        yield 0, 1
    elif dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
    elif dist.is_torchelastic_launched():
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        # torchrun keeps one store, so entries of an earlier group could be read as entries of this one.
        store, rank, size = next(rendezvous("env://"))
        own = PrefixStore(f"diffcache/{next(_groups_made)}", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
        try:
            yield dist.get_rank(), dist.get_world_size()
        finally:
            dist.destroy_process_group()
    else:
        yield 0, 1


def _exchanged(data: bytes, size: int) -> Iterator[bytes]:
    """Yield the data of every process by rank. Every process must iterate to the end."""
    device = "cpu" if "gloo" in dist.get_backend() else torch.device("cuda", torch.cuda.current_device())
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    for source in range(size):
        length = torch.tensor([len(mine)], device=device)
        dist.broadcast(length, source)
        sent = mine.to(device) if source == dist.get_rank() else _room(int(length), device)
        if len(sent):
            dist.broadcast(sent, source)
        yield sent.cpu().numpy().tobytes()


def _room(length: int, device: str | torch.device) -> Tensor:
    return torch.empty(length, dtype=torch.uint8, device=device)
