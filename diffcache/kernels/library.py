"""One name for the forms of an operation: plain torch, the same compiled, and a Triton kernel.

The plain form is the specification. torch.library holds it for every device, and the kernel for CUDA (which is what
ROCm calls itself in torch): so an operation has a schema, can be traced, and is one node for ``torch.compile``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffcache.errors import BadOption

KINDS = 256  # of arguments of one operation that are compiled

Backend = Literal["auto", "torch", "compiled", "triton"]


class Operation:
    """Callable as ``operation(*arguments, backend="auto")``. Keyword arguments are those of the plain form.

    backend  "auto": the kernel for tensors on a GPU where Triton is installed, else plain torch
             "torch": plain torch
             "compiled": plain torch through ``torch.compile``; seconds at the first call of each shape
             "triton": the kernel; BadOption for tensors that are on no GPU, or without Triton
    """

    def __init__(self, name: str, schema: str, plain: Callable[..., Any]) -> None:
        self.name = name
        self.plain = plain
        self._op = torch.library.custom_op(f"diffcache::{name}", plain, mutates_args=(), schema=schema)
        self._op.register_fake(plain)  # tensors without values go through it as they are
        self._op.register_kernel("cuda")(self._on_gpu)

    def __call__(self, *args: Any, backend: Backend = "auto", **kwargs: Any) -> Any:
        if backend == "torch":
            return self.plain(*args, **kwargs)
        if backend == "compiled":
            with _many_kinds():
                return self._compiled(*args, **kwargs)
        if backend == "triton":
            demand_gpu([a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)])
        return self._op(*args, **kwargs)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self.plain)

    def _on_gpu(self, *args: Any, **kwargs: Any) -> Any:
        if not has_triton():
            return self.plain(*args, **kwargs)
        kernel = importlib.import_module(f"diffcache.kernels.{self.name}.kernel")
        return kernel.launch(*args, **kwargs)


def _many_kinds() -> contextlib.AbstractContextManager[Any]:
    """Dynamo gives up on a function after eight kinds of arguments, silently; formats, types and options make more."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # since torch 2.7
    return config.patch({name: KINDS})  # type: ignore[no-any-return]


def check_backend(backend: str) -> None:
    """BadOption where this machine does not have it, whatever the tensors will be."""
    if backend not in get_args(Backend):
        raise BadOption("backend", backend, ", ".join(map(repr, get_args(Backend))))
    if backend == "triton":
        demand_gpu([])


def demand_gpu(tensors: list[Tensor]) -> None:
    if not has_triton():
        raise BadOption("backend", "triton", "'auto', 'torch' or 'compiled': the package triton is not installed")
    if not torch.cuda.is_available():
        raise BadOption("backend", "triton", "'auto', 'torch' or 'compiled': torch sees no GPU here")
    if any(t.device.type != "cuda" for t in tensors):
        raise BadOption("backend", "triton", "'auto', 'torch' or 'compiled' for tensors that are not on a GPU")


def in_use(backend: Backend, device: torch.device) -> Literal["torch", "compiled", "triton"]:
    """What runs tensors of this device under ``backend``."""
    if backend != "auto":
        return backend
    return "triton" if device.type == "cuda" and has_triton() else "torch"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
