"""What the Triton kernels compile to: registers, spills, shared memory and the width of loads and stores. Needs no GPU.

    python benchmarks/kernels/ahead_of_time.py [--out benchmarks/results/kernels-ahead-of-time.md] [--json]

Every kernel is compiled for three GPUs, with the arguments that its ``launch`` passes for each call in ``COMPILED`` of
its ``example.py``. Figures of NVIDIA GPUs are read from the machine code with the cuobjdump that comes with Triton,
those of AMD GPUs from the assembly. 16 bits in a column of narrowest accesses would be a bfloat16 tensor read one value
at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from diffcache.documents import files  # noqa: E402
from diffcache.kernels.examples import COMPILED_ROWS, Compiled, EmptyTensors  # noqa: E402
from diffcache.kernels.library import operations  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
CASES: dict[str, tuple[Compiled, ...]] = {
    name: import_module(f"diffcache.kernels.{name}.example").COMPILED for name in operations()
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, and what it was made for."""

    operation: str
    options: str
    format: str
    length: int
    nvidia_registers: int  # at most
    amd_registers: int
    function: Any
    args: dict[str, Any]
    launch_options: dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """Bits are of the widest and the narrowest access to global memory.

    filled  masked loads whose masked lanes are filled with a constant other than 0; None: not read for this GPU
    """

    operation: str
    options: str
    format: str
    length: int
    target: str
    warps: int
    registers: int
    most_registers: int
    spills: int
    shared_bytes: int
    widest_load: int
    narrowest_load: int
    widest_store: int
    narrowest_store: int
    filled: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there as well")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table, with the planted faults")
    o = parser.parse_args()
    rows = [compiled(launch, name) for name in TARGETS for launch in launches(name) if has(name, launch.format)]
    if o.json:
        planted = {fault: asdict(compiled(launch, "sm_90")) for fault, launch in faults()}
        print(json.dumps({"kernels": [asdict(row) for row in rows], "faults": planted}))
        return
    print(table(rows))
    if o.out:
        files.write(o.out, f"{HEAD}\n{table(rows)}\n")


def has(target: str, format: str) -> bool:
    """e4m3 came with compute capability 8.9; before it, the plain form runs."""
    return not (target == "sm_80" and format == "fp8")


def launches(target: str) -> Iterator[Launch]:
    """As on this GPU."""
    with mock.patch.object(torch.version, "hip", "7.0" if target.startswith("gfx") else None):
        yield from every_launch()


def every_launch() -> Iterator[Launch]:
    for operation, cases in CASES.items():
        for case in cases:
            for format in case.formats:
                yield from recorded(operation, case, format)


def case_of(operation: str, options: str, length: int) -> Compiled:
    """The call with these options, of tensors with this many columns."""
    return replace(next(case for case in CASES[operation] if case.options == options), length=length)


def faults() -> Iterator[tuple[str, Launch]]:
    """Kernels compiled as they should not be: what is read from them must say so."""
    (good,) = recorded("quantize", case_of("quantize", "minus", 1152), "int8")
    apart = {name: one_further(a) if isinstance(a, Tensor) else a for name, a in good.args.items()}
    yield "unaligned", replace(good, args=apart)
    (wide,) = recorded("residual_modulate", case_of("residual_modulate", "all", 5120), "int8")
    codes = torch.empty(COMPILED_ROWS, dtype=torch.uint8)
    arguments = {"x": codes, "out": codes, "count": 261, "BLOCK": 512}
    yield "filled", Launch("", "", "int4", 261, 0, 0, _copy_zeros_beyond, arguments, {"num_warps": 1})
    yield "few warps", replace(wide, launch_options=wide.launch_options | {"num_warps": 1})


@triton.jit
def _copy_zeros_beyond(x, out, count, BLOCK: tl.constexpr):
    """Codes, and the code of two zeros in four bits each where there are none."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < count, other=0x88))


def one_further(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:]


class Recorder:
    """In place of a kernel: keeps the arguments of its launches."""

    def __init__(self, function: Any, found: list[tuple[Any, dict[str, Any], dict[str, Any]]]) -> None:
        self.function, self.found = function, found

    def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        names = self.function.arg_names
        given = dict(zip(names, args)) | {name: v for name, v in kwargs.items() if name in names}  # noqa: B905 — the rest are keywords
        self.found.append((self.function, given, {name: v for name, v in kwargs.items() if name not in names}))


def recorded(operation: str, case: Compiled, format: str) -> Iterator[Launch]:
    """The launches of one call of an operation."""
    module = import_module(f"diffcache.kernels.{operation}.kernel")
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    with ExitStack() as stack:
        for name, function in vars(module).copy().items():
            if isinstance(function, triton.runtime.JITFunction):
                stack.enter_context(mock.patch.object(module, name, Recorder(function, found)))
        args, options = case.arguments(EmptyTensors(format, case.length))
        module.launch(*args, **options)
    for function, arguments, launch_options in found:
        second = function.__name__ != f"_{operation}"
        if not second or (format, case.length) == ("int8", 1152):  # the second launch has neither
            what = (f"{case.options}: second launch", "", 0) if second else (case.options, format, case.length)
            most = case.registers, case.amd_registers
            yield Launch(operation, *what, *most, function, arguments, launch_options)


def compiled(launch: Launch, target: str) -> Figures:
    """With the specialisations that Triton makes at a launch: of ones, of absent tensors, of multiples of sixteen."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    multiples: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.function.params):
        value = launch.args[parameter.name]
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[place,] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(address, int) and address % 16 == 0:
            multiples[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=multiples)
    made = triton.compile(source, target=TARGETS[target], options=launch.launch_options)
    amd = target.startswith("gfx")
    most, read = (launch.amd_registers, read_amd) if amd else (launch.nvidia_registers, read_nvidia)
    options = {name: getattr(launch, name) for name in ("operation", "options", "format", "length")}
    warps = made.metadata.num_warps
    return Figures(**options, target=target, warps=warps, most_registers=most, **read(made.asm))


# A predicated load, after a constant in its register.
FILL = r"mov\.[bu]\d+ %\w+, 0x([0-9a-f]+);\s+@%p\d+ ld\.global"


def read_nvidia(asm: Any) -> dict[str, int | None]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, cubin], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "--dump-sass")
        )
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spilled = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    bits = r"(?:\.[A-Z]+)*?(?:\.(U8|S8|U16|S16|64|128))?(?:\.[A-Z]+)*\s"
    return {
        "registers": numbers["REG"],
        "spills": spilled,
        "shared_bytes": numbers["SHARED"],
        **widths("load", [int(w.strip("US") or 32) for w in re.findall(rf"\bLDG\.E{bits}", sass)]),
        **widths("store", [int(w.strip("US") or 32) for w in re.findall(rf"\bSTG\.E{bits}", sass)]),
        "filled": sum(int(constant, 16) != 0 for constant in re.findall(FILL, asm["ptx"])),
    }


AMD_BITS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}


def read_amd(asm: Any) -> dict[str, int | None]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    def bits(kind: str) -> list[int]:
        found = re.findall(rf"\b(?:global|buffer|flat)_{kind}_([a-z]+?)(?:x(\d))?(?:_d16\w*)?\b", text)
        return [AMD_BITS[name] * int(times or 1) for name, times in found]

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "shared_bytes": number("group_segment_fixed_size"),
        **widths("load", bits("load")),
        **widths("store", bits("store")),
        "filled": None,
    }


def widths(kind: str, bits: list[int]) -> dict[str, int]:
    return {f"widest_{kind}": max(bits), f"narrowest_{kind}": min(bits)}


HEAD = f"""# What the Triton kernels compile to

`python benchmarks/kernels/ahead_of_time.py --out benchmarks/results/kernels-ahead-of-time.md`, with Triton
{triton.__version__}; no GPU was there. Tensors are bfloat16 [{COMPILED_ROWS}, length]. At most: the registers that the
kernel's `example.py` allows. Scales are one number of 32 bits a group,
which is the narrowest access that should be. Masked lanes not 0: loads that fill them with another constant, which
Triton before 3.9 gets wrong for bytes from 0x80 on; not read for AMD GPUs.
"""


def table(rows: list[Figures]) -> str:
    lines = [
        "| kernel | options | format | length | GPU | warps | registers | at most | spills | shared memory, bytes | "
        "widest load, bits | narrowest | widest store, bits | narrowest | masked lanes not 0 |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join('–' if v is None else str(v) for v in asdict(row).values())} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
