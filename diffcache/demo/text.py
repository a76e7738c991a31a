"""Run the demo of the text model: calibrate a token schedule, compare it with token rules, show answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffcache import host
from diffcache.api import accelerated
from diffcache.assets.text import TextModel, is_exact, load_text, text_calls, text_of
from diffcache.assets.text_tasks import MASK, TASKS
from diffcache.documents import Budget, files
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.eval.methods import FULL
from diffcache.eval.text import TextEvaluation, TextResult, evaluate_text, token_method
from diffcache.profiling.calibration.token_search import JUDGING_SHARE, TRIES, DecodingCalibration

CALIBRATION_SEED, HELD_OUT_SEED = 1, 2
TITLES = {
    "walk": "walk: the place on a line after each move, which depends on the one before",
    "sudoku": "sudoku: 4x4 grids, interleaved cell by cell, to be filled in any order",
}
HEADINGS = ("method", "exact", "same tokens", "tokens/s", "speed-up", "computed")
CACHED = 0.4  # the time of a decode with a cache, in decodes of the full loop; only for the forecast of the duration


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSize:
    """The amount of work in the demo of the text model.

    Attributes:
        length: The number of tokens of a prompt, and of its answer.
        calibration: The number of prompts for calibration, for each task.
        held_out: The number of prompts for the comparison, for each task.
        share: The share of the positions that the schedule may compute. It is work, not time, so that busy and slow
            machines find a schedule too.
        batch: The number of prompts in a call.
        tries: The most plans that the calibration decodes with, for each task.
    """

    length: int = 128
    calibration: int = 24
    held_out: int = 32
    share: float = 0.25
    batch: int = 8
    tries: int = TRIES

    @classmethod
    def quick(cls) -> TextSize:
        """Return the size for a quick run."""
        return cls(length=64, calibration=16, held_out=8, tries=2)

    @property
    def decodes(self) -> float:
        """Return about how long one task takes, in decodes of a batch by the full loop."""
        calls = -(-self.calibration // self.batch)
        judging = max(1, calls // JUDGING_SHARE)
        compared = -(-self.held_out // self.batch)
        timed, recorded, full = 2.5, 1.5 * (calls - judging), judging + compared * (1 + 1 / 2 + 1 / 4)
        cached = self.tries * (calls - judging) + judging + compared * (3 + 1 / 2)
        return timed + recorded + full + CACHED * cached


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
            lines = [TITLES[task], "", *table(list(found.results)), "", *_answers(self.examples[task])]
            parts.append("\n".join(lines))
        return "\n\n\n".join(parts) + f"\n\n{self.note}"

    @property
    def note(self) -> str:
        """Return what the tables hold."""
        answers = next(iter(self.evaluations.values())).results[0].answers
        return (
            f"{answers} held-out prompts for each task, in batches of {self.size.batch}; the first one is printed.\n"
            f"The schedule was calibrated on {self.size.calibration} other prompts,\n"
            f"to compute {self.size.share:.0%} of the positions.\n"
            "exact: answers that are right in every token. With so few answers, a difference\n"
            "of a few is not significant: table.md has the intervals.\n"
            "same tokens: generated tokens that equal those of the full loop."
        )


def run_text_demo(out: Path, size: TextSize, *, say: Callable[[str], object] = tqdm.write) -> TextDemo:
    """Calibrate on some prompts of each task, compare on others, and write everything to the folder ``out``.

    Args:
        out: The folder.
        size: The amount of work.
        say: Called with each text when it is known: about how long the demo takes, each row of a table, the answers.
    """
    files.make_folder(out)
    model = load_text()
    loop = host.Loop(model.network, model.sample)
    say(f"This takes about {duration(_seconds(model, size))} on this machine.")
    evaluations, examples = {}, {}
    for task in TASKS:
        say(f"\n{TITLES[task]}\n")
        calls = text_calls(task, size.calibration, length=size.length, batch_size=size.batch, seed=CALIBRATION_SEED)
        calibration = DecodingCalibration.record(loop, calls, progress=True)
        schedule = calibration.schedule(
            Budget(computed_steps=size.share * size.length), tries=size.tries, progress=True
        )
        schedule.save(out / f"text-{task}.safetensors")
        held_out = text_calls(task, size.held_out, length=size.length, batch_size=size.batch, seed=HELD_OUT_SEED)
        methods = [
            token_method("diffcache, calibrated", schedule),
            token_method("dKV-Cache", "dkv:refresh=8"),
            token_method("Fast-dLLM, dual cache", "dual:block=32"),
            token_method("2 tokens per step", per_step=2),
            token_method("4 tokens per step", per_step=4),
            token_method("diffcache, 2 tokens per step", schedule, per_step=2),
        ]
        names = [FULL, *(one.name for one in methods)]
        for line in _head(names):
            say(line)
        evaluations[task] = evaluate_text(
            loop,
            methods,
            held_out,
            score=is_exact,
            out=out / task,
            measured=partial(_say_row, say, names),
            progress=True,
        )
        examples[task] = _example(model, loop, schedule, held_out[0])
        say("\n" + "\n".join(_answers(examples[task])))
    found = TextDemo(evaluations, examples, size)
    say(f"\n{found.note}")
    files.write(out / "text.txt", f"{found}\n")
    return found


def _seconds(model: TextModel, size: TextSize) -> float:
    """Return about how many seconds the demo takes, by the time of forwards of one batch."""
    (call, *_) = text_calls(TASKS[0], size.batch, length=size.length, batch_size=size.batch, seed=CALIBRATION_SEED)
    ids = torch.cat([call["prompt"], torch.full_like(call["prompt"], MASK)], 1)
    times = []
    with torch.no_grad():
        for _ in range(4):
            began = time.perf_counter()
            model.network(ids)
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * size.length * size.decodes * len(TASKS)  # the first one is slower


def duration(seconds: float) -> str:
    """Return a duration in words, in steps that suit a forecast: "40 seconds", "3 minutes"."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{max(2, round(seconds / 60)):.0f} minutes"


def _say_row(say: Callable[[str], object], names: Sequence[str], one: TextResult) -> None:
    """Say a row of a table."""
    say(_line(_row(one), names))


def _answers(example: tuple[str, str, str]) -> list[str]:
    """Return the lines with a prompt and its answers."""
    prompt, full, ours = example
    return [f"prompt     {prompt}", f"full loop  {full}", f"diffcache  {ours}"]


def _example(model: TextModel, loop: Any, schedule: TokenSchedule, call: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return a prompt, and the answers without and with the schedule."""
    one = {"prompt": call["prompt"][:1]}
    full = loop(**one)[0]
    with accelerated(loop, schedule):
        ours = loop(**one)[0]
    length = len(full) // 2
    return text_of(full[:length]), text_of(full[length:]), text_of(ours[length:])


def table(results: Sequence[TextResult]) -> list[str]:
    """Return the lines of a table that is narrow enough for a terminal.

    Args:
        results: The results of an evaluation, the full loop first.
    """
    names = [one.name for one in results]
    return [*_head(names), *(_line(_row(one), names) for one in results)]


def _head(names: Sequence[str]) -> list[str]:
    """Return the lines above the rows of a table of methods with these names."""
    heads = _line(HEADINGS, names)
    return [heads, "-" * len(heads)]


def _line(cells: Sequence[str], names: Sequence[str]) -> str:
    """Return a line of a table. Cells are no wider than their headings, so rows can be written one by one."""
    width = max(map(len, names))
    name, *numbers = cells
    right = [cell.rjust(len(heading)) for cell, heading in zip(numbers, HEADINGS[1:], strict=True)]
    return "  ".join([name.ljust(width), *right]).rstrip()


def _row(one: TextResult) -> tuple[str, ...]:
    return (
        one.name,
        "-" if one.exact is None else f"{one.exact[0]:.0%}",
        f"{one.same_tokens:.1%}",
        f"{one.tokens_per_s:.0f}",
        f"{one.speedup:.1f}x",
        f"{one.computed:.0%}",
    )
