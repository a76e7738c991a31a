"""The trained text model: its tasks, its decoding loop and its demo."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from diffcache.assets.text import TextModel, decode, is_exact, load_text, text_calls, text_of
from diffcache.assets.text_tasks import MASK, TASKS, batch, solved
from diffcache.demo.text import TextSize, duration, run_text_demo
from diffcache.documents import TokenSchedule
from diffcache.errors import BadOption, UnknownName


@pytest.fixture(scope="module")
def model() -> TextModel:
    return load_text()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [64, 128])
def test_an_answer_follows_from_its_prompt(task: str, length: int) -> None:
    prompts, answers = batch(task, 20, length, 0)
    assert [solved(prompt).tolist() for prompt in prompts] == answers.tolist()


def test_a_walk_stays_on_the_line() -> None:
    prompts, answers = batch("walk", 20, 128, 0)
    for prompt, answer in zip(prompts, answers, strict=True):
        moves, places = text_of(prompt)[1:], text_of(answer)[1:]
        for at in range(len(moves)):
            if moves[at].isdigit():
                assert places[at] == moves[at]
            else:
                wanted = int(places[at - 1]) + "-=+".index(moves[at]) - 1
                assert int(places[at]) == min(max(wanted, 0), 9)


def test_a_puzzle_has_rows_columns_and_boxes_of_four_digits() -> None:
    _, answers = batch("sudoku", 5, 64, 0)
    for answer in answers:
        cells = text_of(answer)[1:49]
        for which in range(3):
            grid = np.array(list(cells[which::3])).reshape(4, 4)
            boxes = grid.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
            for four in (*grid, *grid.T, *boxes):
                assert sorted(four) == list("1234")


def test_a_wrong_token_makes_an_answer_wrong() -> None:
    call = text_calls("walk", 2, length=64)[0]
    right = torch.cat([call["prompt"], torch.stack([torch.from_numpy(solved(p.numpy())) for p in call["prompt"]])], 1)
    assert is_exact(call, right) == [True, True]
    right[1, -3] = (right[1, -3] + 1) % 10
    assert is_exact(call, right) == [True, False]


@pytest.mark.parametrize("task", TASKS)
def test_the_model_solves_most_prompts(model: TextModel, task: str) -> None:
    (call,) = text_calls(task, 8, length=64, seed=11)
    assert sum(is_exact(call, model.sample(call["prompt"], per_step=2))) >= 5


def test_a_step_commits_the_most_confident_masks_of_the_block() -> None:
    seen = []

    class Out:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    def network(x: torch.Tensor) -> Out:
        seen.append(x.clone())
        logits = torch.zeros(*x.shape, 4)
        logits[..., 2] = torch.arange(x.shape[1])  # more confident on the right
        return Out(logits)

    found = decode(network, torch.ones(1, 4, dtype=torch.long), block=2)
    assert found[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert [(x[0, 4:] == MASK).tolist() for x in seen] == [
        [True] * 4, [True, False, True, True], [False, False, True, True], [False, False, True, False],
    ]  # fmt: skip
    seen.clear()
    decode(network, torch.ones(1, 4, dtype=torch.long), block=4, threshold=0.9)
    assert len(seen) == 1


def test_a_task_or_length_that_does_not_exist_is_one_error() -> None:
    with pytest.raises(UnknownName, match="walk, sudoku"):
        text_calls("sums", 1)
    with pytest.raises(BadOption, match="64, 128, 256"):
        text_calls("walk", 1, length=100)


def test_the_demo_writes_schedules_tables_and_answers(tmp_path: Path) -> None:
    said: list[str] = []
    size = TextSize(length=64, calibration=4, held_out=2, batch=2, share=0.7, tries=2)
    found = run_text_demo(tmp_path, size, say=said.append)
    for task in TASKS:
        assert isinstance(TokenSchedule.load(tmp_path / f"text-{task}.safetensors"), TokenSchedule)
        assert (tmp_path / task / "table.md").read_text().startswith("| method")
        assert found.evaluations[task]["diffcache, calibrated"].computed < 0.75
    text = (tmp_path / "text.txt").read_text()
    assert text == f"{found}\n"
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("full loop  ") == 2
    first, *lines = "\n".join(said).splitlines()
    assert re.fullmatch(r"This takes about \d+ (seconds|minutes) on this machine\.", first)
    assert [line for line in lines if line] == [line for line in text.splitlines() if line]
    rows = {f"{name} " for one in found.evaluations.values() for name in one}
    assert sum(any(one.startswith(name) for name in rows) for one in said) == 2 * 7  # a text for each row


def test_a_row_is_given_before_the_next_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.demo import text

    class StopError(Exception):
        pass

    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("dKV-Cache "):
            raise StopError

    monkeypatch.setattr(text, "TASKS", ("walk",))
    with pytest.raises(StopError):
        run_text_demo(tmp_path, TextSize(length=64, calibration=2, held_out=1, batch=1, share=0.7, tries=1), say=say)
    assert [line[:20].strip() for line in said[-3:]] == ["full run", "diffcache, calibrate", "dKV-Cache"]
    assert not (tmp_path / "walk").exists()


def test_the_quick_demo_does_less_than_half_of_the_work() -> None:
    quick, full = TextSize.quick(), TextSize()
    assert quick.decodes < full.decodes / 2
    assert TextSize(tries=16).decodes > full.decodes
    assert TextSize(held_out=64).decodes > full.decodes


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "10 seconds"), (44, "40 seconds"), (89, "90 seconds"), (100, "2 minutes"), (400, "7 minutes")],
)
def test_a_duration_is_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_command_runs_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache.cli import app
    from diffcache.demo import text

    sizes = []

    def run(out: Path, size: TextSize) -> None:
        sizes.append(size)
        print("the table")

    monkeypatch.setattr(text, "run_text_demo", run)
    result = CliRunner().invoke(app, ["demo", "--model", "text", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert sizes == [TextSize.quick()]
    assert result.output.startswith("the table\n")
