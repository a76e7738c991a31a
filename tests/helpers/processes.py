"""Several processes that form a group, on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def _process(rank: int, size: int, store: str, job: Callable[[int], Any], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        results[rank] = job(rank)
    except Exception as error:
        results[rank] = f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group()


def in_processes(size: int, job: Callable[[int], Any], tmp_path: Path) -> list[Any]:
    """What ``job(rank)`` returned, or raised as text, in processes that form a group; None of one that hung."""
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        processes = [
            context.Process(target=_process, args=(rank, size, str(tmp_path / "store"), job, results))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()
        return [results.get(rank) for rank in range(size)]
