"""Measure the cost of identifying a pipeline: seconds to hash its weights, compared with SHA-256 of the same bytes.

    python benchmarks/digest_cost.py

Hashes one bfloat16 tensor several times and takes the fastest. On a machine with a GPU it does so on the GPU as well.
Then it takes the identity of the demo pipeline, which is mostly small tensors and attributes. Prints the table and
writes ``results/digest-cost.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffcache import host
from diffcache.assets import load
from diffcache.demo.run import machine
from diffcache.documents import files
from diffcache.host.tensor_hash import tensor_hash

RESULTS = Path(__file__).parent / "results"
LARGE = 24.0  # GB: 12 billion parameters in bfloat16


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--megabytes", type=int, default=512, help="size of the tensor")
    args.add_argument("--repeats", type=int, default=5)
    o = args.parse_args()
    rows = ["| what | where | GB/s | seconds for 24 GB |", "|---|---|---:|---:|"]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        tensor = torch.randn(o.megabytes * 500_000, device=device).to(torch.bfloat16)
        rows.append(row("`tensor_hash`", device, tensor, lambda t=tensor: tensor_hash(t), o.repeats))
    data = tensor.cpu().view(torch.uint8).numpy()
    rows.append(row("SHA-256, one thread", "cpu", tensor, lambda: hashlib.sha256(data).digest(), o.repeats))
    pipe = load("flux").pipe
    seconds = fastest(lambda: host.identity(pipe, refuse), o.repeats)
    parameters = sum(p.numel() for part in (pipe.transformer, pipe.vae) for p in part.parameters()) / 1e6
    rows.append(f"\nIdentity of the Flux demo pipeline ({parameters:.1f} M parameters in float32): {seconds:.2f} s.")
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    text = "\n".join([*rows, f"\n{about}. `python benchmarks/digest_cost.py`."])
    files.write(RESULTS / "digest-cost.md", f"{text}\n")
    print(text)


def row(what: str, where: str, tensor: torch.Tensor, work: Callable[[], Any], repeats: int) -> str:
    speed = tensor.numel() * tensor.element_size() / fastest(work, repeats) / 1e9
    return f"| {what} | {where} | {speed:.2f} | {LARGE / speed:.1f} |"


def fastest(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def refuse(name: str, reason: Exception) -> str:
    raise reason


if __name__ == "__main__":
    main()
