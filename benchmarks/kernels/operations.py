"""How fast are the operations on kept tensors? Each in each format, beside plain torch, torch.compile and a bare copy.

    python benchmarks/kernels/operations.py [--quick] [--out FILE]

On a GPU "ours" is the Triton kernel, on a CPU the compiled form. Every result is compared with the plain form's before
anything is timed; a wrong one stops the script. Writes a Markdown table and JSON beside it, after every row.

Bytes are those that cannot be avoided: every tensor of [rows, length] that the contract reads, once, and every one that
it writes, once; a bfloat16 tensor takes 2 a value, a kept one 2 (bf16), 1.03 (int8, fp8) or 0.53 (int4), scales
included. Vectors (gates, factors) are left out: they are some thousandths. The ceiling is ``copy_`` of as many bytes.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from measuring import Budget, Clock, Copies, circumstances, in_words, results, this_device, write
from torch import Tensor

from diffcache.kernels import FORMATS
from diffcache.kernels.coding import decode
from diffcache.kernels.examples import TimedTensors, Variant
from diffcache.kernels.library import has_triton, operations

OPERATIONS: dict[str, Any] = dict(operations())
EXAMPLES = {name: import_module(f"diffcache.kernels.{name}.example") for name in OPERATIONS}
RETURNED: dict[str, tuple[str, ...]] = {name: example.RETURNED for name, example in EXAMPLES.items()}
SIZES = {
    "14M": (4608, 3072),  # the tokens of FLUX.1 at 1024 pixels
    "10M": (8704, 1152),
    "168M": (54688, 3072),
    "1M": (864, 1152),
}
AT_MOST_OFF = 1e-3  # share of values that may be a rounding apart


class WrongResult(SystemExit):
    """What ours gives is not what the plain form gives: times would be of something else."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A variant of an operation."""

    op: str
    how: Variant

    @property
    def name(self) -> str:
        return self.how.name


VARIANTS = tuple(Timed(name, variant) for name, example in EXAMPLES.items() for variant in example.TIMED)


@dataclass(slots=True)
class Row:
    """Milliseconds, medians. None: not measured. ``host_ms``: until the call of ours returns, the work handed over."""

    size: str
    op: str
    variant: str
    format: str
    shape: tuple[int, int]
    moved: int
    eager_ms: float
    ours_ms: float
    host_ms: float
    copy_gb_s: float
    uncompressed_ms: float
    compile_ms: float | None = None

    @property
    def gb_s(self) -> float:
        return 1e-6 * self.moved / self.ours_ms

    def cells(self) -> list[str]:
        compiled = self.compile_ms
        return [
            f"`{self.op}`",
            self.variant,
            self.format,
            f"{self.eager_ms:.3f}",
            "–" if compiled is None else f"{compiled:.3f}",
            f"{self.ours_ms:.3f}",
            f"{self.host_ms:.3f}",
            f"{self.moved / math.prod(self.shape):.2f}",
            f"{self.gb_s:.0f}" if self.gb_s >= 100 else f"{self.gb_s:.1f}",
            f"{self.gb_s / self.copy_gb_s:.0%}",
            f"{self.eager_ms / self.ours_ms:.1f}x",
            "–" if compiled is None else f"{compiled / self.ours_ms:.2f}x",
            f"{self.uncompressed_ms:.3f}",
            f"{self.uncompressed_ms / self.ours_ms:.2f}x",
        ]


HEAD = (
    "| operation | with | format | eager ms | torch.compile ms | ours ms | host ms | bytes a value | GB/s | of a copy "
    "| over eager | over torch.compile | uncompressed ms | over uncompressed |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


class Bench:
    """Everything that a run needs, and the rows it has so far."""

    def __init__(self, device: torch.device, backend: str, repeats: int, flush_bytes: int, out: Path) -> None:
        self.device, self.backend, self.out = device, backend, out
        self.clock = Clock(device, repeats, flush_bytes)
        self.copies = Copies(self.clock, device)
        self.ceiling_bytes = flush_bytes
        self.ceiling = self.copies.gb_s(flush_bytes)  # first: what follows is judged by it
        self.rows: list[Row] = []
        self.uncompressed: dict[tuple[str, str, str], float] = {}
        self.remark = ""
        print(f"copy_ of {flush_bytes / 2**20:.0f} MiB, reading and writing: {self.ceiling:.1f} GB/s", flush=True)

    def measure(self, size: str, data: TimedTensors, timed: Timed, form: str) -> Row:
        op = OPERATIONS[timed.op]
        args, kwargs = timed.how.arguments(data, form)
        torch._dynamo.reset()  # else the compiled form gives up after eight kinds of arguments
        check(timed, form, op.plain(*args, **kwargs), op(*args, backend=self.backend, **kwargs))
        ours = self.clock(lambda: op(*args, backend=self.backend, **kwargs))
        key = size, timed.op, timed.name
        if key not in self.uncompressed:
            self.uncompressed[key] = self.clock(lambda: timed.how.uncompressed(data)).ms
        moved = timed.how.moved(data.shape, form)
        row = Row(
            size=size,
            op=timed.op,
            variant=timed.name,
            format=form,
            shape=data.shape,
            moved=moved,
            eager_ms=self.clock(lambda: op.plain(*args, **kwargs)).ms,
            ours_ms=ours.ms,
            host_ms=ours.host_ms,
            copy_gb_s=self.copies.gb_s(moved),
            uncompressed_ms=self.uncompressed[key],
            compile_ms=ours.ms if self.backend == "compiled" else None,
        )
        self.rows.append(row)
        self.show(row)
        return row

    def compare_compiled(self, row: Row, data: TimedTensors, timed: Timed) -> None:
        args, kwargs = timed.how.arguments(data, row.format)
        torch._dynamo.reset()
        compiled = torch.compile(OPERATIONS[timed.op].plain, dynamic=False)
        try:
            row.compile_ms = self.clock(lambda: compiled(*args, **kwargs)).ms
        except Exception as error:  # what a compiler cannot do is no reason to lose the other rows
            self.remark += f"torch.compile of {timed.op}, {row.format}: {type(error).__name__}. "
        self.show(row)

    def show(self, row: Row) -> None:
        print(" ".join(["|", row.size, "|", " | ".join(row.cells()), "|"]), flush=True)
        write(self.out, self.markdown(), self.record())

    def record(self) -> dict[str, Any]:
        return {
            "circumstances": circumstances(self.device),
            "ours": self.backend,
            "copy": {"bytes": self.ceiling_bytes, "gb_s": self.ceiling},
            "rows": [asdict(row) | {"gb_s": row.gb_s} for row in self.rows],
            "remark": self.remark,
        }

    def markdown(self) -> str:
        parts = [
            "# Operations on kept tensors",
            in_words(circumstances(self.device)) + ".",
            f"Ours is the backend `{self.backend}`. `copy_` of {self.ceiling_bytes / 2**20:.0f} MiB moves "
            f'{self.ceiling:.0f} GB/s, reading and writing; the column "of a copy" compares with `copy_` of the '
            "row's own bytes. Uncompressed: a cache that keeps bfloat16, in eager torch; its drift is the relative "
            "change of means.",
            "Bytes a value, at least, k being those of a kept value with its part of the scale (bf16 2, int8 and fp8 "
            "1.03, int4 0.53): " + "; ".join(f"{v.op} ({v.name}) {v.how.formula}" for v in VARIANTS) + ".",
        ]
        for size in dict.fromkeys(row.size for row in self.rows):
            rows = [row for row in self.rows if row.size == size]
            count, length = rows[0].shape
            lines = [HEAD, *(f"| {' | '.join(row.cells())} |" for row in rows)]
            parts += [f"## {count * length / 1e6:.1f} M values, [{count}, {length}]", "\n".join(lines)]
        return "\n\n".join([*parts, *filter(None, [self.remark])])


def check(timed: Timed, form: str, wanted: Any, found: Any) -> None:
    """WrongResult unless ``found`` is what the plain form gave, up to roundings."""
    pairs = zip(RETURNED[timed.op], _several(wanted), _several(found), strict=True)
    for name, right, ours in pairs:
        reason = _shape_apart(right, ours) or apart(name, form, right, ours)
        if reason:
            raise WrongResult(
                f"{timed.op} ({timed.name}, {form}): {name} is not the plain form's: {reason}. Nothing was timed."
            )


def _several(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _shape_apart(right: Tensor, ours: Tensor) -> str:
    if (right.shape, right.dtype) == (ours.shape, ours.dtype):
        return ""
    return f"{tuple(ours.shape)} of {ours.dtype} instead of {tuple(right.shape)} of {right.dtype}"


def apart(name: str, form: str, right: Tensor, ours: Tensor) -> str:
    """Why these are not the same; "" if they are. NaN is never the same."""
    if not right.numel():
        return ""
    if name == "codes":
        # Codes as values: of one rounding apart are neighbours.
        a, b = (_values_of(codes, form) for codes in (right, ours))
        step = {"bf16": a.abs() / 128, "fp8": (a.abs() / 8).clamp_min(2.0**-9)}.get(form, torch.ones_like(a))
        return _beyond(a, b, torch.zeros_like(a), step)
    a, b = right.float(), ours.float()
    if name == "scales":
        return _beyond(a, b, a * 1e-6, a * 1e-6)
    if name == "sums":
        size = a.abs()
        size[:, 4] = (a[:, 3] * a[:, 5]).sqrt()  # products cancel; their bound does not
        return _beyond(a, b, size * 1e-4, size * 1e-4)
    root = a.square().mean().sqrt()
    # What torch.compile fuses it does not round in between, and a normalisation tells: y is near what it should be.
    usual = root / 128 if name == "y" else root * 1e-5
    return _beyond(a, b, a.abs() / 128 + usual, a.abs() / 128 + root / 32)


def _values_of(codes: Tensor, form: str) -> Tensor:
    how = FORMATS[form]
    length = codes.shape[1] * (2 if how.bits == 4 else 1)
    return decode(codes, torch.ones(len(codes), how.groups(length), device=codes.device), how, length)


def _beyond(right: Tensor, ours: Tensor, usual: Tensor, most: Tensor) -> str:
    """All within ``most``, and nearly all within ``usual``."""
    off = (right - ours).abs()
    if not bool((off <= most).all()):
        return f"{int((~(off <= most)).sum())} of {off.numel()} values are off, by up to {float(off.max()):.3g}"
    share = float((off > usual).double().mean())
    return f"{share:.2%} of {off.numel()} values are a rounding off" if share > AT_MOST_OFF else ""


def run(bench: Bench, sizes: list[str], formats: list[str], variants: list[Timed], budget: Budget) -> None:
    """All rows; then, as long as there is time, torch.compile beside them: compiling is what takes long."""
    for size in sizes:
        data = TimedTensors(SIZES[size], bench.device)
        for form in formats:
            for timed in variants:
                if not budget.allows():
                    bench.remark += "Time was over before every row was measured."
                    return
                bench.measure(size, data, timed, form)


def beside_compiled(bench: Bench, variants: list[Timed], budget: Budget) -> None:
    of = {(v.op, v.name): v for v in variants}
    data = TimedTensors((0, 0), bench.device)
    for row in bench.rows:
        if row.compile_ms is not None:
            continue
        if not budget.allows():
            bench.remark += "Time was over before torch.compile was measured beside every row."
            return
        if data.shape != row.shape:
            data = TimedTensors(row.shape, bench.device)
        bench.compare_compiled(row, data, of[row.op, row.variant])


def options(device: torch.device, arguments: list[str] | None) -> argparse.Namespace:
    gpu = device.type == "cuda"
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="one variant of each operation, 1 M values")
    args.add_argument("--sizes", nargs="+", choices=SIZES, help="of a GPU 14M 10M 168M, of a CPU 10M")
    args.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    args.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    args.add_argument("--repeats", type=int, default=25 if gpu else 5, help="timed runs of each")
    args.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out; on a CPU, ours is plain torch"
    )
    args.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after")
    args.add_argument("--out", type=Path, default=results("kernels", device))
    return args.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Bench:
    device = this_device()
    o = options(device, arguments)
    budget = Budget(o.minutes)
    sizes = o.sizes or (["1M"] if o.quick else ["14M", "10M", "168M"] if device.type == "cuda" else ["10M"])
    variants = [v for v in VARIANTS if v.op in o.ops and (v.how.quick or not o.quick)]
    if device.type == "cuda" and has_triton():
        backend = "triton"
    else:
        backend = "torch" if o.no_compile else "compiled"
    flush_bytes = 2**30 if device.type == "cuda" else 2**24 if o.quick else 2**28
    bench = Bench(device, backend, o.repeats, flush_bytes, o.out)
    run(bench, sizes, o.formats, variants, budget)
    if not o.no_compile:
        beside_compiled(bench, variants, budget)
    write(o.out, bench.markdown(), bench.record())
    print(f"written: {o.out}")
    return bench


if __name__ == "__main__":
    main()
