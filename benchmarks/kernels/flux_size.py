"""What do kept tensors cost in a network of FLUX.1's size? Wall-clock and memory, with and without compression.

    python benchmarks/kernels/flux_size.py [--out FILE]

On a GPU: FluxTransformer2DModel in FLUX.1's configuration (12 billion parameters, bfloat16), 4096 picture and 512 text
tokens, 28 steps. Weights are random and made on the device: times and bytes do not depend on them, and the latents'
error says no more than that nothing is broken. On a CPU the same with a tiny network, to try the script.

Every row is one method on the same noise, in one process: first a run that counts what was really computed (see
``peers/work.py``), then timed ones. Writes a Markdown table and JSON beside it, after every row; what does not run says
why, and when time is over the rest is left out.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from measuring import Budget, circumstances, in_words, results, this_device, write
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package ``peers`` lies

from peers import cache_dit_peers, diffusers_peers
from peers.peer import Peer
from peers.work import Work, counted

from diffcache import accelerated, report
from diffcache.profiling.recording import loop_clock, wait

EVERY = (2, 3, 4)  # one step of so many is computed
STORES = ("bf16", "int8")  # of a network in bfloat16, the first compresses nothing
TINY = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 4, 8),
}
TRIES = 8  # runs in search of a threshold, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    layers: int
    single_layers: int
    pixels: int
    text: int
    over: dict[str, Any]  # of FLUX.1's configuration, which is FluxTransformer2DModel's own

    @property
    def tokens(self) -> int:
        return (self.pixels // 16) ** 2


REAL_SIZE = Size(layers=19, single_layers=38, pixels=1024, text=512, over={})
TINY_SIZE = Size(layers=2, single_layers=3, pixels=128, text=16, over=TINY)


@dataclass(frozen=True, slots=True)
class Case:
    """One method.

    on    (pipeline, steps) -> what switches it on and off; a text that it gives belongs to the setting
    ours  it can report
    """

    method: str
    setting: str
    store: str
    on: Callable[[Any, int], AbstractContextManager[Any]]
    ours: bool = False


@dataclass(slots=True)
class Row:
    """What one method did; None: not measured, or not to be had.

    computed     as many full steps as would have been the same work in the blocks
    complete     steps at which every layer of the blocks ran
    seconds      of every timed sampling loop
    cache_bytes  at most, by the report
    peak_bytes   allocated on the GPU at most, less what was there before: the network's
    error        of the final latents, relative to the full run's
    failed       why it did not run
    """

    method: str
    setting: str
    store: str
    computed: float | None = None
    complete: float | None = None
    seconds: tuple[float, ...] = ()
    speedup: float | None = None
    ideal: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    failed: str = ""

    def cells(self) -> list[str]:
        of_ideal = self.speedup / self.ideal if self.speedup and self.ideal else None
        return [
            self.method,
            self.setting + (f"; did not run: {self.failed}".replace("|", "/") if self.failed else ""),
            self.store,
            _cell(self.computed, "{:.2f}"),
            _cell(self.complete, "{:.0f}"),
            _cell(statistics.median(self.seconds) if self.seconds else None, "{:.3f}"),
            _cell(self.speedup, "{:.2f}x"),
            _cell(self.ideal, "{:.2f}x"),
            _cell(of_ideal, "{:.3f}"),
            _cell(self.cache_bytes, "{:.4g}", 1e-6),
            _cell(self.peak_bytes, "{:.5g}", 1e-6),
            _cell(self.error, "{:.2e}"),
        ]


HEAD = (
    "| method | setting | store | computed steps | complete steps | seconds | speed-up | ideal | of ideal | cache MB "
    "| peak MB over the network | error |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def _cell(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value * unit)


def build(size: Size, device: torch.device) -> Any:
    """FluxPipeline around a network of random weights, without encoders and decoder."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # never in float32: that would need twice the memory
    try:
        with device:
            network = diffusers.FluxTransformer2DModel(
                num_layers=size.layers, num_single_layers=size.single_layers, guidance_embeds=True, **size.over
            )
    finally:
        torch.set_default_dtype(usual)
    enliven(network)
    nothing = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(transformer=network.eval(), scheduler=scheduler, **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def enliven(network: nn.Module) -> None:
    """Noise on constant parameters (zeros would close gates), and matrices that do not shrink what passes through."""
    for parameter in network.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
        elif parameter.ndim > 1:
            parameter.mul_(1.5)


def call(pipe: Any, size: Size, steps: int, device: torch.device) -> dict[str, Any]:
    config = pipe.transformer.config
    generator = torch.Generator(device).manual_seed(1)
    random = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    return {
        "prompt_embeds": torch.randn((1, size.text, config.joint_attention_dim), **random),
        "pooled_prompt_embeds": torch.randn((1, config.pooled_projection_dim), **random),
        "height": size.pixels,
        "width": size.pixels,
        "num_inference_steps": steps,
        "guidance_scale": 3.5,
        "output_type": "latent",
    }


class Bench:
    """The pipeline, its full run, and the rows there are so far."""

    def __init__(self, size: Size, device: torch.device, steps: int, repeats: int, budget: Budget, out: Path) -> None:
        self.size, self.device, self.steps, self.repeats = size, device, steps, repeats
        self.budget, self.out = budget, out
        torch.manual_seed(0)
        self.pipe = build(size, device)
        self.parameters = sum(p.numel() for p in self.pipe.transformer.parameters())
        self.call = call(self.pipe, size, steps, device)
        self.own_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.rows: list[Row] = []
        self.remark = ""
        self._full: tuple[Tensor, Work, float] | None = None
        self._complete: dict[float, float] = {}
        print(f"{self.parameters / 1e9:.3f} billion parameters, {size.tokens} + {size.text} tokens", flush=True)
        print(HEAD, flush=True)

    def latents(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(2)
        with torch.no_grad():
            return self.pipe(generator=generator, **self.call).images  # type: ignore[no-any-return]

    def measure(self, case: Case) -> None:
        """A row for this case, whether it runs or not; none when time is over."""
        took = self._full[2] if self._full else 0.0
        if not self.budget.allows(took * (1 + self.repeats)):
            self.remark = "Time was over before every method was measured."
            return
        row = Row(case.method, case.setting, case.store)
        try:
            self._fill(row, case)
        except Exception as error:  # whatever is raised is the row's result; the others are wanted all the same
            row.failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        gc.collect()
        self.rows.append(row)
        print(f"| {' | '.join(row.cells())} |", flush=True)
        self.write()

    def _fill(self, row: Row, case: Case) -> None:
        with case.on(self.pipe, self.steps) as said:
            row.setting += said if isinstance(said, str) else ""
            with counted(self.pipe.transformer) as work:
                self.latents()  # the warm-up too
            with peak(self.device) as bytes_, loop_clock(self.pipe) as seconds:
                for _ in range(self.repeats):
                    found = self.latents().float()
            row.cache_bytes = report(self.pipe).peak_bytes if case.ours else None
        row.seconds = tuple(seconds)
        row.peak_bytes = bytes_[0] - self.own_bytes if bytes_ else None
        middle = statistics.median(seconds)
        full, full_work, full_seconds = self._full = self._full or (found, work, middle)
        row.error = float((found - full).norm() / full.norm())
        row.computed = work.computed(full_work, self.steps)
        row.complete = work.complete(full_work, self.steps)
        row.speedup = full_seconds / middle
        row.ideal = self.steps / row.computed

    def complete(self, threshold: float) -> float:
        """Steps that FirstBlockCache computes whole at this threshold."""
        if threshold not in self._complete:
            assert self._full is not None, "the full run comes first"
            peer = diffusers_peers.first_block(threshold)
            with peer.on(self.pipe, self.steps), counted(self.pipe.transformer) as work:
                self.latents()
            self._complete[threshold] = work.complete(self._full[1], self.steps)
        return self._complete[threshold]

    def threshold(self, wanted: int) -> float:
        """At which FirstBlockCache computes about so many steps. Bisected, for more of it computes less."""
        low, high = -5.0, 1.0  # decades
        for _ in range(TRIES):
            middle = (low + high) / 2
            if self._complete and not self.budget.allows():
                break
            found = self.complete(10**middle)
            if found == wanted:
                break
            low, high = (middle, high) if found > wanted else (low, middle)
        return min(self._complete, key=lambda t: abs(self._complete[t] - wanted))

    def record(self) -> dict[str, Any]:
        size = {key: value for key, value in asdict(self.size).items() if key != "over"}
        return {
            "circumstances": circumstances(self.device),
            "network": {"parameters": self.parameters, **size, "configuration": self.size.over or "FLUX.1"},
            "steps": self.steps,
            "repeats": self.repeats,
            "rows": [asdict(row) for row in self.rows],
            "remark": self.remark,
        }

    def write(self) -> None:
        name = "FLUX.1's configuration" if not self.size.over else "a tiny network, to try the script"
        parts = [
            "# Caches in a network of FLUX.1's size",
            in_words(circumstances(self.device)) + ".",
            f"{name}: {self.size.layers} double and {self.size.single_layers} single blocks, "
            f"{self.parameters / 1e9:.3f} billion random parameters in bfloat16; {self.size.tokens} picture and "
            f"{self.size.text} text tokens; {self.steps} steps. Seconds of the sampling loop: the median of "
            f"{self.repeats} after a run that is not timed. Ideal: full over computed steps, by work in the blocks. "
            "The error is that of random weights: it says that nothing is broken, and no more.",
            "\n".join([HEAD, *(f"| {' | '.join(row.cells())} |" for row in self.rows)]),
            self.remark,
        ]
        write(self.out, "\n\n".join(filter(None, parts)), self.record())


@contextmanager
def peak(device: torch.device) -> Iterator[list[int]]:
    """Bytes allocated at most while the block lasts; nothing where there is no GPU."""
    found: list[int] = []
    if device.type == "cuda":
        wait()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        wait()
        found.append(torch.cuda.max_memory_allocated(device))


def ours(spec: str, store: str = "", backend: str = "auto") -> Case:
    more: dict[str, Any] = {"backend": backend} | ({"store": store} if store else {})
    setting = f"`{spec}`" + ("" if backend == "auto" else f", backend {backend}")
    return Case("diffcache", setting, store or "as it is", lambda pipe, _: accelerated(pipe, spec, **more), ours=True)


def theirs(peer: Peer, setting: str = "") -> Case:
    return Case(f"{peer.package}: {peer.name}", setting or peer.setting, "as it is", peer.on)


def masked(steps: int, computed: int, taylor: int = 0) -> Case:
    """cache-dit computing so many steps (of at most 50), evenly spread, and one block of the others."""
    peer = cache_dit_peers.masked(round(computed * 50 / steps), taylor=taylor)  # it counts in steps of 50
    return theirs(peer, f"F1B0, mask of {computed} steps" + (f", TaylorSeer order {taylor}" if taylor else ""))


FULL = Case("full run", "", "", lambda *_: nullcontext())


def cases(steps: int) -> Iterator[Case]:
    """All but FirstBlockCache, whose thresholds are found in the run. What matters most comes first."""
    for every in EVERY:
        yield ours(f"uniform:every={every}")
        for store in STORES:
            yield ours(f"uniform:every={every},sites=block", store)
        yield masked(steps, math.ceil(steps / every))
    for store in STORES:
        yield ours("taylorseer:every=3,order=1,sites=block", store)
    yield masked(steps, math.ceil(steps / 3), taylor=1)
    for every in EVERY:
        yield ours(f"uniform:every={every},sites=stack")
    for rule in ("uniform:every=3,sites=block", "taylorseer:every=3,order=1,sites=block"):
        yield ours(rule)
        yield ours(rule, "int8", "torch")  # what the kernels are worth


def first_block(bench: Bench, wanted: int) -> Case:
    """diffusers' FirstBlockCache where it computes about so many steps: random weights have thresholds of their own."""

    @contextmanager
    def on(pipe: Any, steps: int) -> Iterator[str]:
        threshold = bench.threshold(wanted)
        with diffusers_peers.first_block(threshold).on(pipe, steps):
            yield f": {threshold:.4g}"

    return Case("diffusers: FirstBlockCache", f"threshold for {wanted} steps", "as it is", on)


def options(device: torch.device, arguments: list[str] | None) -> argparse.Namespace:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--tiny", action="store_true", help="the tiny network, on a GPU too")
    args.add_argument("--layers", type=int, help="double blocks; FLUX.1 has 19")
    args.add_argument("--single-layers", type=int, help="single blocks; FLUX.1 has 38. Each takes 0.3 GB")
    args.add_argument("--steps", type=int, default=28, help="at most 50")
    args.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    args.add_argument("--minutes", type=float, default=8.0, help="begin nothing after that would end later")
    args.add_argument("--out", type=Path, default=results("flux-size", device))
    return args.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Bench:
    device = this_device()
    o = options(device, arguments)
    budget = Budget(o.minutes)
    size = TINY_SIZE if o.tiny or device.type == "cpu" else REAL_SIZE
    asked = {"layers": o.layers, "single_layers": o.single_layers}
    size = replace(size, **{name: count for name, count in asked.items() if count is not None})
    bench = Bench(size, device, o.steps, o.repeats, budget, o.out)
    bench.measure(FULL)
    if not bench.rows or bench.rows[0].failed:
        raise SystemExit("The full run did not run; there is nothing to compare with.")
    for case in cases(o.steps):
        bench.measure(case)
    for every in EVERY:
        bench.measure(first_block(bench, math.ceil(o.steps / every)))
    bench.measure(replace(FULL, setting="again, at the end"))  # what the machine's own drift was
    bench.write()
    print(f"written: {o.out}")
    return bench


if __name__ == "__main__":
    main()
