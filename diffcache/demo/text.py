"""Run the demo of the text model: calibrate a token schedule, compare it with token rules, show answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffcache import host
from diffcache.api import accelerated
from diffcache.assets.text import TextModel, is_exact, load_text, text_calls, text_of
from diffcache.assets.text_tasks import TASKS
from diffcache.documents import Budget, files
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.eval.text import TextEvaluation, TextResult, evaluate_text, token_method
from diffcache.profiling.calibration.optimizing import optimize

CALIBRATION_SEED, HELD_OUT_SEED = 1, 2
TITLES = {
    "walk": "walk: the place on a line after each move, which depends on the one before",
    "sudoku": "sudoku: 4x4 grids, interleaved cell by cell, to be filled in any order",
}
HEADINGS = ("method", "exact", "same tokens", "tokens/s", "speed-up", "computed")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSize:
    """The amount of work in the demo of the text model.

    Attributes:
        length: The number of tokens of a prompt, and of its answer.
        calibration: The number of prompts for calibration, for each task.
        held_out: The number of prompts for the comparison, for each task.
        speedup: The speed-up that the schedule aims at.
        batch: The number of prompts in a call.
    """

    length: int = 128
    calibration: int = 24
    held_out: int = 32
    speedup: float = 3.0
    batch: int = 8

    @classmethod
    def quick(cls) -> TextSize:
        """Return the size for a quick run."""
        return cls(length=64, calibration=16, held_out=16)


@dataclass(frozen=True, slots=True)
class TextDemo:
    """The results of the demo.

    Attributes:
        evaluations: Task -> the comparison.
        examples: Task -> a prompt, the answer of the full loop, and the answer with the schedule.
        size: The amount of work.
    """

    evaluations: Mapping[str, TextEvaluation]
    examples: Mapping[str, tuple[str, str, str]]
    size: TextSize

    def __str__(self) -> str:
        parts = []
        for task, found in self.evaluations.items():
            prompt, full, ours = self.examples[task]
            lines = [TITLES[task], "", *table(list(found.results)), ""]
            lines += [f"prompt     {prompt}", f"full loop  {full}", f"diffcache  {ours}"]
            parts.append("\n".join(lines))
        answers = next(iter(self.evaluations.values())).results[0].answers
        note = (
            f"{answers} held-out prompts for each task, in batches of {self.size.batch}; the first one is printed.\n"
            f"The schedule was calibrated for {self.size.speedup:g}x on {self.size.calibration} other prompts.\n"
            "exact: answers that are right in every token. With so few answers, a difference\n"
            "of a few is not significant: table.md has the intervals.\n"
            "same tokens: generated tokens that equal those of the full loop."
        )
        return "\n\n\n".join(parts) + f"\n\n{note}"


def run_text_demo(out: Path, size: TextSize) -> TextDemo:
    """Calibrate on some prompts of each task, compare on others, and write everything to the folder ``out``."""
    files.make_folder(out)
    model = load_text()
    loop = host.Loop(model.network, model.sample)
    evaluations, examples = {}, {}
    for task in tqdm(TASKS, desc="calibrate and compare", unit="task"):
        calls = text_calls(task, size.calibration, length=size.length, batch_size=size.batch, seed=CALIBRATION_SEED)
        schedule = optimize(loop, calls, Budget(speedup=size.speedup), progress=False)
        if not isinstance(schedule, TokenSchedule):
            raise TypeError(type(schedule).__name__)
        schedule.save(out / f"text-{task}.safetensors")
        held_out = text_calls(task, size.held_out, length=size.length, batch_size=size.batch, seed=HELD_OUT_SEED)
        evaluations[task] = evaluate_text(
            loop,
            [
                token_method("diffcache, calibrated", schedule),
                token_method("dKV-Cache", "dkv:refresh=8"),
                token_method("Fast-dLLM, dual cache", "dual:block=32"),
                token_method("2 tokens per step", per_step=2),
                token_method("4 tokens per step", per_step=4),
                token_method("diffcache, 2 tokens per step", schedule, per_step=2),
            ],
            held_out,
            score=is_exact,
            out=out / task,
        )
        examples[task] = _example(model, loop, schedule, held_out[0])
    found = TextDemo(evaluations, examples, size)
    files.write(out / "text.txt", f"{found}\n")
    return found


def _example(model: TextModel, loop: Any, schedule: TokenSchedule, call: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return a prompt, and the answers without and with the schedule."""
    one = {"prompt": call["prompt"][:1]}
    full = loop(**one)[0]
    with accelerated(loop, schedule):
        ours = loop(**one)[0]
    length = len(full) // 2
    return text_of(full[:length]), text_of(full[length:]), text_of(ours[length:])


def table(results: list[TextResult]) -> list[str]:
    """Return the lines of a table that is narrow enough for a terminal.

    Args:
        results: The results of an evaluation, the full loop first.
    """
    rows = [HEADINGS, *(_row(one) for one in results)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(HEADINGS))]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _row(one: TextResult) -> tuple[str, ...]:
    return (
        one.name,
        "-" if one.exact is None else f"{one.exact[0]:.0%}",
        f"{one.same_tokens:.1%}",
        f"{one.tokens_per_s:.0f}",
        f"{one.speedup:.1f}x",
        f"{one.computed:.0%}",
    )
