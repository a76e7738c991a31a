"""What the page of an evaluation does, asked of a real browser.

Where no Chromium (or no playwright to drive it) is installed, these tests are skipped.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium
from evaluations import EVIL, SAMPLES, Record, evaluation

from diffcache.eval.report import write_html


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


class Visit:
    """A page that is open, and all that it complained of or asked the network for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.heard: list[str] = []
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page.on("console", lambda m: self.heard.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.heard.append(str(e)))
        self.page.on(
            "request", lambda r: self.heard.append(r.url) if not r.url.startswith(("file:", "data:")) else None
        )
        self.page.set_default_timeout(5000)
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("#table tbody tr, [data-missing=table]")
        self.page.wait_for_timeout(120)  # charts are drawn when their width is known

    def column(self, n: int) -> list[str]:
        return [t.split("\n")[0] for t in self.page.locator(f"#table tbody tr > :nth-child({n})").all_inner_texts()]


@pytest.fixture
def visit(browser: Any, written: Path) -> Iterator[Visit]:
    opened = Visit(browser, written)
    yield opened
    assert opened.heard == []
    opened.page.close()


def test_the_page_opens_in_silence_with_all_its_sections(visit: Visit) -> None:
    assert visit.page.locator("main > section").count() == 7
    assert visit.page.locator("[data-missing]").count() == 0
    assert "better at 2 of 3 budgets" in visit.page.inner_text(".lede")
    assert visit.page.locator(".findings li.behind").count() == 1
    assert "null" not in visit.page.inner_text("main")
    assert "undefined" not in visit.page.inner_text("main")
    assert "NaN" not in re.sub(r'"data:[^"]*"', "", visit.page.inner_html("main"))


def test_a_page_with_a_fault_is_reported(browser: Any, written: Path, tmp_path: Path) -> None:
    """The twin of the silence: neither a script of another's nor a picture from elsewhere gets through."""
    text = written.read_text("utf-8").replace(
        "</main>", "<script>window.stolen = 1</script><img src='http://example.invalid/a.png'></main>"
    )
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    spoiled = Visit(browser, tmp_path / "a.html")
    assert len(spoiled.heard) >= 2
    assert spoiled.page.evaluate("window.stolen") is None


def split(visit: Visit) -> float:
    """Where the full run's picture ends, in percent of the width, as the browser cuts it."""
    cut = visit.page.evaluate("getComputedStyle(document.querySelector('.split img + img')).clipPath")
    found = re.search(r"calc\(100% - ([\d.]+)%\)|inset\(0(?:px)? ([\d.]+)%", cut)
    assert found, cut
    return float(found[1]) if found[1] else 100 - float(found[2])


def test_the_slider_follows_mouse_and_arrow_keys(visit: Visit) -> None:
    area = visit.page.locator(".split")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    middle = box["y"] + box["height"] / 3
    assert split(visit) == 50
    visit.page.mouse.move(box["x"] + box["width"] / 2, middle)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] / 4, middle, steps=4)
    assert split(visit) == pytest.approx(25, abs=1)
    visit.page.mouse.up()
    for _ in range(3):
        visit.page.keyboard.press("ArrowRight")
    assert split(visit) == pytest.approx(31, abs=1)
    visit.page.keyboard.press("Shift+ArrowLeft")
    assert split(visit) == pytest.approx(21, abs=1)


def test_the_slider_follows_a_finger(browser: Any, written: Path) -> None:
    phone = Visit(browser, written, viewport={"width": 390, "height": 844}, has_touch=True)
    area = phone.page.locator(".split")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    phone.page.touchscreen.tap(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    assert split(phone) == pytest.approx(80, abs=1.5)
    assert phone.heard == []


def test_pictures_change_with_method_and_sample(visit: Visit) -> None:
    source = "[...document.querySelectorAll('.pair img')].map((i) => i.src)"
    first = visit.page.evaluate(source)
    visit.page.select_option("#pictures select", "every 4th step")
    second = visit.page.evaluate(source)
    assert first[1] == second[1]
    assert first[0] != second[0]
    assert first[2] != second[2]
    assert visit.page.inner_text(".pair figcaption .right") == "every 4th step"
    visit.page.click("#pictures .thumbs button:nth-child(2)")
    third = visit.page.evaluate(source)
    assert third[1] != second[1]
    assert third[0] != second[0]
    expected = evaluation()["methods"][7]["scores"]["psnr"]["values"][0]
    assert f"PSNR {expected:.2f}" in visit.page.inner_text("#pictures p.facts").replace("\u00a0", " ")
    visit.page.click("#pictures .choices button:nth-of-type(1)")
    assert visit.page.evaluate("document.querySelector('.apart img').style.filter") == "brightness(1)"
    assert "multiplied by 4" in visit.page.inner_text("#pictures")
    differences = visit.page.locator("#pictures .row img.difference")
    assert differences.count() == 11  # all but the full run
    assert {differences.nth(n).evaluate("(i) => i.style.filter") for n in range(11)} == {"brightness(1)"}
    assert visit.page.locator("#pictures .row [aria-pressed=true] strong").inner_text() == "every 4th step"


def test_the_worst_sample_is_shown_first_and_named(visit: Visit) -> None:
    assert visit.page.locator("#pictures .thumbs small").all_inner_texts() == ["worst", "median"]
    assert visit.page.inner_text(".pair figcaption .right") == "diffcache, 8 steps"
    assert visit.page.inner_text("#pictures p.facts").startswith(
        f"the worst of {SAMPLES} samples for diffcache, 8 steps"
    )


def test_a_prompt_with_a_script_stays_text(visit: Visit) -> None:
    visit.page.click("#pictures .thumbs button:nth-child(1)")
    assert visit.page.inner_text(".prompt") == f"“{EVIL}”"
    assert visit.page.evaluate("window.stolen") is None
    assert visit.page.locator("main b", has_text="moon").count() == 0


def test_the_table_sorts_numbers_as_numbers_both_ways(visit: Visit) -> None:
    head = visit.page.locator("#table thead th", has_text="seconds (loop)")
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    seconds = [float(t) for t in visit.column(4)]
    assert head.get_attribute("aria-sort") == "ascending"
    assert seconds == sorted(seconds)
    head.locator("button").press("Enter")  # by keyboard
    seconds = [float(t) for t in visit.column(4)]
    assert head.get_attribute("aria-sort") == "descending"
    assert seconds == sorted(seconds, reverse=True)
    visit.page.locator("#table thead button", has_text="FD-EffLite0").click()
    values = [float(t) for t in visit.column(8)]
    assert values == sorted(values)
    assert "8.300" in visit.column(8)
    assert "11.30" in visit.column(8)
    assert head.get_attribute("aria-sort") == "none"


def test_what_is_missing_is_last_in_either_order(visit: Visit) -> None:
    button = visit.page.locator("#table thead button", has_text="PSNR")
    for way in (1, -1):
        button.click()
        found = visit.column(6)
        numbers = [way * float(t) for t in found[:-1]]
        assert found[-1] == "–"
        assert numbers == sorted(numbers)


def test_buttons_choose_the_metric_and_the_clock_of_the_plot(visit: Visit) -> None:
    def heights() -> list[float]:
        each = visit.page.locator("#quality .point .reach").all()
        return [float(c.get_attribute("cy")) for c in each]

    before = heights()
    assert len(before) == 11  # of the full run only the time is known
    visit.page.click("#quality button[data-value=fd]")
    assert visit.page.locator("#quality svg[data-metric=fd]").count() == 1
    assert len(heights()) == 12
    assert heights() != before
    pressed = visit.page.locator("#quality .choices").first.locator("[aria-pressed=true]").all_inner_texts()
    assert pressed == ["FD-EffLite0"]
    assert "turned over" in visit.page.inner_text("#quality .about")
    visit.page.click("#quality button[data-value=pipeline]")
    assert visit.page.locator("#quality svg[data-part=pipeline]").count() == 1


def test_better_is_up_and_faster_is_left_for_every_metric(visit: Visit) -> None:
    for metric in ("psnr", "fd"):
        visit.page.click(f"#quality button[data-value={metric}]")

        def at(name: str) -> tuple[float, float]:
            point = visit.page.locator(f'#quality [data-method="{name}"] .reach')
            return float(point.get_attribute("cx")), float(point.get_attribute("cy"))

        (good_x, good_y), (bad_x, bad_y) = at("diffcache, 8 steps"), at("every 4th step")
        assert good_x < bad_x
        assert good_y < bad_y


def test_a_point_shows_its_numbers_to_pointer_and_keyboard(visit: Visit) -> None:
    point = visit.page.locator('#quality [data-method="diffcache, 12 steps"]')
    note = visit.page.locator("#quality .note")
    assert note.is_hidden()
    point.hover()
    assert "37.60" in note.inner_text()
    assert "3.85×" in note.inner_text()
    visit.page.mouse.move(5, 5)
    assert note.is_hidden()
    point.focus()
    assert "12 of 50" in note.inner_text()


BOXES = """[...document.querySelectorAll('#quality %s')].map((e) => e.getBoundingClientRect())
    .map((r) => [r.left, r.top, r.right, r.bottom])"""


def overlaps(a: list[list[float]], b: list[list[float]]) -> int:
    """How many pairs of boxes lie on each other by more than 2 px, no box with itself."""
    return sum(
        p is not q and p[0] + 2 < q[2] and q[0] + 2 < p[2] and p[1] + 2 < q[3] and q[1] + 2 < p[3] for p in a for q in b
    )


@pytest.mark.parametrize("width", [390, 760, 1280])
def test_no_label_lies_on_another_label_or_on_a_mark(browser: Any, written: Path, width: int) -> None:
    opened = Visit(browser, written, viewport={"width": width, "height": 844})
    texts, marks = (opened.page.evaluate(BOXES % which) for which in ("text.name", ".mark:not(.legend .mark)"))
    assert len(texts) == 11
    assert overlaps(texts, texts) == overlaps(texts, marks) == 0
    opened.page.evaluate("document.querySelectorAll('#quality text.name')[1].setAttribute('x', 0)")
    opened.page.evaluate("document.querySelectorAll('#quality text.name')[0].setAttribute('x', 0)")
    for k in (0, 1):  # the fault is seen
        opened.page.evaluate(f"document.querySelectorAll('#quality text.name')[{k}].setAttribute('y', 50)")
    assert overlaps(*[opened.page.evaluate(BOXES % "text.name")] * 2) > 0


def test_a_phone_has_numbers_at_the_points_a_key_and_notes_on_tap(browser: Any, written: Path) -> None:
    phone = Visit(browser, written, viewport={"width": 390, "height": 844}, has_touch=True)
    assert phone.page.locator("#quality .key li").count() == 11
    note = phone.page.locator("#quality .note")
    mark = phone.page.locator('#quality [data-method="diffcache, 12 steps"] .mark')
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    phone.page.touchscreen.tap(box["x"] + 12, box["y"] + 12)  # next to it
    assert note.is_visible()
    assert "37.60" in note.inner_text()
    phone.page.locator("#quality .key button", has_text="every 4th step").tap()
    assert "every 4th step" in note.inner_text()
    assert phone.heard == []


def test_the_first_column_stays_and_a_wide_table_says_so(browser: Any, written: Path) -> None:
    phone = Visit(browser, written, viewport={"width": 390, "height": 844})
    assert "wider than the page" in phone.page.inner_text("#table .hint")
    head = phone.page.locator("#table tbody th").first
    before = head.bounding_box()["x"]
    phone.page.evaluate("document.querySelector('.scroll').scrollLeft = 200")
    assert head.bounding_box()["x"] == before
    phone.page.evaluate("document.querySelector('.scroll').scrollLeft = 1e5")
    phone.page.wait_for_timeout(100)
    assert phone.page.locator(".scrolled.more").count() == 0
    wide = Visit(browser, written, viewport={"width": 2400, "height": 844})
    wide.page.evaluate(
        "document.querySelectorAll('#table tr').forEach((r) => [...r.cells].slice(5).forEach((c) => c.remove()))"
    )
    wide.page.set_viewport_size({"width": 2000, "height": 844})
    wide.page.wait_for_timeout(100)
    assert wide.page.locator("#table .hint").is_hidden()


def test_prose_is_folded_below_the_table_and_circumstances_come_last(visit: Visit) -> None:
    assert visit.page.locator("main > section").last.get_attribute("id") == "circumstances"
    for part in ("#table dl.prose", "#circumstances dl"):
        assert visit.page.locator(part).is_hidden()
    visit.page.click("#table summary")
    assert "Intervals: PSNR 31.00 to 32.80" in visit.page.inner_text("#table dl.prose").replace("\u00a0", " ")


def test_schedules_and_trajectories_are_drawn(visit: Visit) -> None:
    assert visit.page.locator("#schedules .strip").count() == 3
    first = visit.page.locator("#schedules .strip").first
    assert first.locator(".c-computed").count() == sum(
        evaluation()["methods"][1]["schedule"]["denoisers"]["transformer"]["model"]["compute"]
    )
    assert "int8" in visit.page.inner_text("#schedules .map")
    chart = visit.page.locator("#trajectory .chart")
    assert chart.locator("path.line.expected").count() == 3
    lines = chart.locator("path.line").count()
    visit.page.click("#trajectory .choices button:nth-of-type(1)")
    assert chart.locator("path.line").count() == lines - 2
    chart.hover()
    assert "after step" in chart.inner_text()


def test_dark_is_another_paper_by_the_system_and_by_the_button(browser: Any, written: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        opened = Visit(browser, written, color_scheme=scheme)
        paper = "getComputedStyle(document.body).backgroundColor"
        colours[scheme] = opened.page.evaluate(paper)
        opened.page.click("#theme")
        colours[scheme, "turned"] = opened.page.evaluate(paper)
        opened.page.emulate_media(media="print")
        colours[scheme, "printed"] = opened.page.evaluate(paper)
        assert opened.heard == []
        opened.page.close()
    assert colours["light"] != colours["dark"]
    assert colours["light", "turned"] == colours["dark"]
    assert colours["dark", "turned"] == colours["light"]
    assert colours["light", "printed"] == colours["dark", "printed"] == colours["light"]


@pytest.mark.parametrize("width", [390, 760, 1280])
def test_nothing_lies_beyond_the_edge_of_the_window(browser: Any, written: Path, width: int) -> None:
    opened = Visit(browser, written, viewport={"width": width, "height": 844})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.page.evaluate("document.querySelector('.chart svg').getBoundingClientRect().right") <= width


def without(record: Record, part: str) -> Record:
    record = copy.deepcopy(record)
    record["methods"] = record["methods"][:4]
    for method in record["methods"]:
        method |= {"pictures": None} if part == "pictures" else {}
        method |= {"trajectory": None} if part == "trajectory" else {}
        method |= {"schedule": None} if part == "schedules" else {}
        method |= {"scores": {}} if part == "quality" else {}
    if part == "circumstances":
        record |= {"circumstances": {}, "pipeline": {}}
    if part == "table":
        record["methods"] = []
    return record


@pytest.mark.parametrize("part", ["pictures", "trajectory", "schedules", "quality", "circumstances", "table"])
def test_a_part_that_the_record_lacks_leaves_a_sentence(browser: Any, folder: Path, tmp_path: Path, part: str) -> None:
    opened = Visit(browser, write_html(without(evaluation(), part), folder, tmp_path / "a.html"))
    assert opened.page.locator(f"section#{part}").count() == 0
    assert opened.page.locator(f"[data-missing={part}]").inner_text().endswith(".")
    if part != "table":
        assert opened.page.locator("[data-missing]").count() == 1
    assert opened.heard == []


def test_a_record_of_one_method_and_of_nothing_open_too(browser: Any, tmp_path: Path) -> None:
    one = evaluation()
    one["methods"] = one["methods"][1:2]
    bare = {"format": "diffcache.evaluation", "version": 1}
    for name, record in (("one", one), ("bare", bare)):
        opened = Visit(browser, write_html(record, tmp_path, tmp_path / f"{name}.html"))
        assert opened.heard == []
        assert "nothing to compare" in opened.page.inner_text(".lede")
