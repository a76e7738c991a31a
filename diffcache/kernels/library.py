"""Bundle the forms of an operation in one object: plain torch, plain torch compiled, and a Triton kernel.

The plain form is the specification. It is registered with torch.library for every device, and the kernel for CUDA (also
the name of ROCm in torch). So an operation has a schema, can be traced, and is one node for ``torch.compile``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffcache.errors import BadOption, Unusable

_OTHERS = "Use 'auto', 'torch' or 'compiled'"

KINDS = 256  # the most kinds of arguments for which an operation is compiled

Backend = Literal["auto", "torch", "compiled", "triton"]


class Operation:
    """An operation, called as ``operation(*arguments, backend="auto")`` with the arguments of the plain form.

    The backends are:

    * ``"auto"``: the kernel for tensors on a GPU if Triton is installed, else plain torch.
    * ``"torch"``: plain torch.
    * ``"compiled"``: plain torch through ``torch.compile``. The first call of each shape takes seconds.
    * ``"triton"``: the kernel. BadOption is raised without Triton, and for tensors that are not on a GPU.

    Args:
        name: The name of the operation and of its folder.
        schema: Its schema for torch.library.
        plain: Its plain form.
    """

    def __init__(self, name: str, schema: str, plain: Callable[..., Any]) -> None:
        self.name = name
        self.plain = plain
        self._op = torch.library.custom_op(f"diffcache::{name}", plain, mutates_args=(), schema=schema)
        self._op.register_fake(plain)  # plain torch also works on tensors without values
        self._op.register_kernel("cuda")(self._on_gpu)

    def __call__(self, *args: Any, backend: Backend = "auto", **kwargs: Any) -> Any:
        """Run the operation with a backend.

        Raises:
            BadOption: ``backend`` is "triton", and the kernel cannot run on the tensors.
        """
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
        """Return the compiled plain form."""
        return torch.compile(self.plain)

    def _on_gpu(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel, or the plain form if Triton is not installed."""
        if not has_triton():
            return self.plain(*args, **kwargs)
        kernel = importlib.import_module(f"diffcache.kernels.{self.name}.kernel")
        return kernel.launch(*args, **kwargs)


def operations() -> dict[str, Operation]:
    """Return the operation of every folder of ``diffcache/kernels``, by name, sorted."""
    package = importlib.import_module("diffcache.kernels")
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__) if found.ispkg)
    return {name: getattr(importlib.import_module(f"{package.__name__}.{name}"), name) for name in names}


def _many_kinds() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Dynamo compiles a function for ``KINDS`` kinds of arguments.

    By default it stops compiling after eight kinds, without a warning. Combinations of formats, dtypes and options are
    more.
    """
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # since torch 2.7
    return config.patch({name: KINDS})  # type: ignore[no-any-return]


def check_backend(backend: str) -> None:
    """Raise BadOption if this machine does not have the backend."""
    if backend not in get_args(Backend):
        raise BadOption("backend", backend, ", ".join(map(repr, get_args(Backend))))
    if backend == "triton":
        demand_gpu([])


def demand_gpu(tensors: list[Tensor]) -> None:
    """Raise BadOption if Triton kernels cannot run on ``tensors``."""
    if not has_triton():
        raise Unusable("backend='triton'", "the package triton is not installed", _OTHERS)
    if not torch.cuda.is_available():
        raise Unusable("backend='triton'", "torch finds no GPU on this machine", _OTHERS)
    if any(t.device.type != "cuda" for t in tensors):
        raise Unusable("backend='triton'", "a tensor is not on a GPU", f"{_OTHERS}, or move the tensors to a GPU")


def in_use(backend: Backend, device: torch.device) -> Literal["torch", "compiled", "triton"]:
    """Return the backend that runs operations on tensors of ``device`` if ``backend`` was asked for."""
    if backend != "auto":
        return backend
    return "triton" if device.type == "cuda" and has_triton() else "torch"


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
