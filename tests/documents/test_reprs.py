"""One line at the prompt, a card in a notebook, and the whole text when printed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium
from documents import profile, schedule
from evaluations import small_record
from online import toy_schedule

from diffcache.documents import CacheSchedule, DenoiserPlan, Expected, SitePlan
from diffcache.eval import Evaluation
from diffcache.executor import Estimate, Notice, Report, Row
from diffcache.text import card

pytestmark = pytest.mark.fast


class Tags(HTMLParser):
    """Counts open tags, and collects text and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words, self.attributes = "", ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "wbr":  # it has no end
            self.open.append(tag)
        self.attributes += f"{attrs}"
        assert not {name for name, _ in attrs} - {"style"}, "a notebook loads nothing else"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data + " "


def evaluation() -> Evaluation:
    return Evaluation(small_record(), Path("made"))


def wide_evaluation() -> Evaluation:
    """An evaluation by ten metrics, with long names of methods and metrics."""
    record = small_record()
    names = (
        "PSNR",
        "SSIM",
        "LPIPS-EffLite0",
        "FD-EffLite0",
        "latent error",
        "worst tenth",
        "ImageReward",
        "CLIP score",
    )
    for name in names:
        record["metrics"][name] = {"title": name, "better": "higher", "of_pairs": name != "FD-EffLite0"}
    for n, method in enumerate(record["methods"]):
        method["scores"] |= {name: {"mean": 31.4159 * (n + 1)} for name in names}
    record["methods"][2]["name"] = "diffusers FirstBlockCache, threshold 0.12"
    return Evaluation(record, Path("made"))


def report() -> Report:
    """The report of a run with two branches, two sites and a criterion, with long names."""
    names = ("stack:transformer_blocks", "stack:single_transformer_blocks")
    rows = [
        Row("transformer", site, branch, 5, 2, {"shape": 3}, strip="■■■■■··", kept_as="int8", peak_bytes=123456789)
        for site in names
        for branch in (0, 1)
    ]
    online = {"transformer": "first_block"}
    return Report(tuple(rows), 1, 0, 493827156, online, "triton", computed=20, predicted=8, skipped=0.286)


THINGS = {
    "<Report of run 2: 6 forwards computed, 6 predicted, 50% skipped, late-start 3>": lambda: Report(
        (), 2, 0, 0, notices=(Notice("late-start", 3, "x"),), computed=6, predicted=6, skipped=0.5
    ),
    "<Report of run 1: 20 forwards computed, 8 predicted, 29% skipped>": lambda: report(),
    "<Report: no run yet>": lambda: Report((), 0, 0, 0),
    "<Estimate 50.0% of the work of 20 steps, 32.8 kB of cache>": lambda: Estimate(20, 0.5, 32768),
    "<Estimate at least 50.0% of the work of 20 steps, 8 bytes of cache>": lambda: Estimate(20, 0.5, 8, online=True),
    "<Evaluation of 4 methods on 2 samples, FluxPipeline, in 'made'>": evaluation,
}


@pytest.mark.parametrize("line", THINGS)
def test_the_line_at_the_prompt(line: str) -> None:
    assert repr(THINGS[line]()) == line


def test_the_line_of_a_schedule() -> None:
    made = schedule()
    assert made.expected is not None
    line = repr(made)
    assert re.match(rf"<CacheSchedule {made.computed_steps} of {made.called.sum()} steps, \w+, ", line)
    assert f"{made.expected.mean_db:.1f} dB" in line
    held = Expected(mean_db=53.24, low_db=49, high_db=56, samples=8, origin="held-out")
    assert repr(dataclasses.replace(made, expected=held)).endswith(", 53.2 dB held out>")
    exact = Expected(mean_db=200, low_db=200, high_db=200, samples=8, origin="held-out")
    assert repr(dataclasses.replace(made, expected=exact)).endswith(", exact held out>")
    whole = SitePlan(compute=np.ones(6, bool), weights=np.zeros((1, 6, 1)))
    made = CacheSchedule(steps=6, denoisers={"unet": DenoiserPlan(sites={"model": whole})})
    assert repr(made) == "<CacheSchedule 6 of 6 steps, unet, nothing is skipped>"
    assert "nothing is skipped" in str(made)
    assert repr(toy_schedule("first_block")).endswith("decided by first_block>")


def test_the_line_of_a_profile() -> None:
    found = profile()
    assert re.fullmatch(rf"<Profile {found.steps} steps, {found.samples} samples?, \w+, sites: [\w, ]+>", repr(found))


@pytest.mark.parametrize("make", [schedule, profile, *THINGS.values()])
def test_lines_are_single_and_cards_stand_alone(make: Any) -> None:
    thing = make()
    assert "\n" not in repr(thing)
    assert len(repr(thing)) < 200
    page = thing._repr_html_()
    tags = Tags(page)
    assert tags.open == []
    assert len(page) < 20_000
    assert "http" not in page
    assert "rgba(127,127,127" in tags.attributes  # on light and on dark
    assert "inherit" in tags.attributes
    assert not re.search(r"#[0-9a-f]{3}|black|white(?!-space)", tags.attributes)
    if isinstance(thing, Evaluation):
        assert repr(thing)[1:-1].removeprefix("Evaluation of ") in tags.words
    elif not isinstance(thing, Report):
        assert str(thing).splitlines()[0] in tags.words


def test_the_card_of_a_report_holds_all_that_it_prints_in_a_table() -> None:
    page = report()._repr_html_()
    tags = Tags(page)
    assert page.count("<tr>") == 5
    assert page.count("<td ") == 20
    words = " ".join(tags.words.split())
    for text in (
        "denoiser, site computed predicted failed open kept",
        "transformer stack: transformer_ blocks, branch 0 5 2 3 int8, 123,456,789 bytes",
        "transformer stack: single_ transformer_ blocks, branch 1 5 2 3 int8, 123,456,789 bytes",
        "transformer: decided in the run by first_block stack:transformer_blocks, branch 0 ■■■■■·· stack",
    ):
        assert text in words
    assert words.endswith(" ".join(str(report()).splitlines()[-1].split()))
    one = Report((Row("unet", "model", 0, 5, 2, {}),), 1, 0, 0, computed=5, predicted=2)._repr_html_()
    assert "unet model</td>" in one
    assert "branch" not in one
    assert "<table" not in Report((), 0, 0, 0)._repr_html_()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def overflow(browser: Any, html: str, width: int) -> int:
    """The pixels by which the widest element is wider than its place."""
    page = browser.new_page(viewport={"width": width, "height": 600})
    try:
        page.set_content(f"<body style='font-family:sans-serif;margin:8px'>{html}")
        return int(
            page.evaluate("Math.max(...[...document.querySelectorAll('div')].map(d => d.scrollWidth - d.clientWidth))")
        )
    finally:
        page.close()


def test_the_card_of_an_evaluation_holds_all_metrics_in_tables_that_name_the_methods() -> None:
    page = wide_evaluation()._repr_html_()
    assert page.count("<table") == 3  # of 3 columns of work and time, and 10 metrics
    words = " ".join(Tags(page).words.split())
    for title in ("PSNR <b>", "latent error", "LPIPS-Eff Lite0", "Image Reward"):
        assert title in words
    assert words.count("diffusers First Block Cache, threshold 0. 12") == 3
    assert words.count("94.25") == 8
    assert "full run 8 of 8 4 1.00× – –" in words  # not compared with itself
    small = evaluation()._repr_html_()
    assert small.count("<table") == 1


@pytest.mark.parametrize("make", [report, schedule, profile, evaluation, wide_evaluation])
@pytest.mark.parametrize("width", [760, 390])
def test_no_card_is_wider_than_its_place(browser: Any, width: int, make: Any) -> None:
    assert overflow(browser, make()._repr_html_(), width) == 0


def test_a_card_that_does_not_wrap_is_noticed(browser: Any) -> None:
    page = report()._repr_html_()
    assert overflow(browser, page.replace("white-space:normal", "white-space:nowrap"), 390) > 0
    wide = wide_evaluation()._repr_html_()
    assert overflow(browser, wide.replace("white-space:normal", "white-space:nowrap"), 390) > 0
    assert overflow(browser, card("Report", str(report())).replace("white-space:pre-wrap", "white-space:pre"), 760) > 0


def test_text_of_others_is_escaped() -> None:
    page = evaluation()._repr_html_()
    assert "<script>" not in page
    assert "PSNR &lt;b&gt;" in page
    assert "<i>" not in schedule(provenance={"note": "<i>"})._repr_html_()
    assert "&lt;i&gt;" in schedule(provenance={"note": "<i>"})._repr_html_()
