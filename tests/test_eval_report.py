"""The record of an evaluation as a Markdown table and as a page: what the page does is asked of a real browser.

Where no Chromium (or no playwright to drive it) is installed, those tests are skipped.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffcache.errors import BadOption, DocumentError
from diffcache.eval.report import findings, pictures, write_html
from diffcache.eval.table import markdown, number

Record = dict[str, Any]
STEPS, SAMPLES, SITES = 50, 24, 19
EVIL = """a "fox" & <b>moon</b></script><script>window.stolen = 1</script>'"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


# A record as a run of fifty steps leaves it, and its pictures.


def evaluation() -> Record:
    """Numbers by formula: our methods lose 1.1 dB to a peer at 25 steps and win below; one peer is slower than full."""
    randomly = np.random.default_rng(0)
    prompts = ["a lighthouse at dusk, oil on canvas", EVIL, "three red kites over a field", "a quiet harbour"]
    rows = [
        ("full run", "full", 50, None, 1.0),
        ("diffcache, 25 steps", "ours", 25, 44.1, 1.93),
        ("diffcache, 12 steps", "ours", 12, 37.6, 3.85),
        ("diffcache, 8 steps", "ours", 8.2, 31.9, 5.6),
        ("25 steps, DPM++", "fewer steps", 25, 33.0, 1.98),
        ("12 steps, DPM++", "fewer steps", 12, 27.4, 4.05),
        ("8 steps, DPM++", "fewer steps", 8, 23.8, 6.0),
        ("every 4th step", "reuse", 13, 24.9, 3.7),
        ("every 2nd step", "reuse", 25, 31.2, 1.96),
        ("cache-dit DBCache", "peer", 22, 45.2, 2.05),
        ("diffusers FirstBlockCache", "peer", 20.4, 29.9, 2.3),
        ("eager cache", "peer", 50, 52.0, 0.91),
    ]
    methods = [_method(*row, randomly) for row in rows]
    return {
        "format": "diffcache.evaluation",
        "version": 1,
        "title": "Caching on a small text-to-image model",
        "circumstances": {
            "created": "2026-03-14T09:26:53+00:00",
            "diffcache": "0.1.0",
            "torch": "2.15.0",
            "diffusers": "0.42.1",
            "python": "3.11.2",
            "device": "CPU (x86_64)",
            "threads": 2,
            "dtype": "float32",
            "commit": "0f3c2ab",
        },
        "pipeline": {
            "class": "FluxPipeline",
            "denoiser": "FluxTransformer2DModel",
            "noise_scheduler": "FlowMatchEulerDiscreteScheduler",
            "steps": STEPS,
            "guidance": "3.5, distilled",
        },
        "samples": [{"id": f"{n:05d}", "prompt": prompts[n % 4], "seed": 100 + n} for n in range(SAMPLES)],
        "metrics": {
            "psnr": {
                "title": "PSNR",
                "unit": "dB",
                "better": "higher",
                "about": "To the full run's picture",
                "floor": None,
            },
            "ssim": {"title": "SSIM", "unit": "", "better": "higher", "about": "Structure in windows", "floor": None},
            "fd": {"title": "FD-EffLite0", "unit": "", "better": "lower", "about": "Distance of sets", "floor": 7.9},
        },
        "methods": methods,
    }


def _method(name: str, kind: str, computed: float, psnr: float | None, speedup: float, randomly: Any) -> Record:
    loop, pipeline = 6.4 / speedup, 6.4 / speedup + 0.61
    scores: Record = {}
    fd = 8.3 if psnr is None else 8.3 + 3000 * 10 ** (-psnr / 11)
    if psnr is not None:
        values = randomly.normal(psnr, 1.4, SAMPLES)
        verdict = {"ours": "worse" if computed == 25 else "better"}.get(kind)
        scores["psnr"] = {
            "mean": psnr,
            "low": psnr - 0.9,
            "high": psnr + 0.9,
            "values": values.tolist(),
            "verdict": verdict,
        }
        loss = 10 ** (-psnr / 22)
        scores["ssim"] = {
            "mean": 1 - loss,
            "low": 1 - 1.2 * loss,
            "high": 1 - 0.85 * loss,
            "values": None,
            "verdict": None,
        }
    scores["fd"] = {"mean": fd, "low": fd * 0.96, "high": fd * 1.05, "values": None, "verdict": None}
    steps = np.arange(STEPS)
    error = None if psnr is None else 10 ** (-psnr / 20) * (steps / STEPS) ** 1.5 * (1 + 0.1 * np.sin(steps))
    return {
        "name": name,
        "kind": kind,
        "detail": "closed_loop, fitted to 64 runs" if kind == "ours" else "",
        "steps": int(computed) if kind == "fewer steps" else STEPS,
        "computed_steps": computed,
        "seconds": {
            part: {"median": s, "low": s * 0.985, "high": s * 1.02, "runs": 8}
            for part, s in (("loop", loop), ("pipeline", pipeline))
        },
        "speedup": {"loop": speedup, "pipeline": 7.01 / pipeline},
        "flops_fraction": computed / STEPS,
        "cache_bytes": 3_900_000 if kind in ("ours", "peer") else None,
        "peak_bytes": None,
        "scores": scores,
        "schedule": _schedule(computed, several=computed == 12) if kind == "ours" else None,
        "trajectory": None
        if error is None or kind == "fewer steps"
        else {
            "steps": steps.tolist(),
            "measured": error.tolist(),
            "expected": (error * 0.93).tolist() if kind == "ours" else None,
        },
        "pictures": {f"{n:05d}": f"{_folder(name)}/{n:05d}.png" for n in range(SAMPLES)},
        "note": "ran without its own fallback" if name == "eager cache" else "",
    }


def _folder(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _schedule(computed: float, several: bool) -> Record:
    def mask(count: float) -> list[int]:
        chosen = np.unique((np.linspace(0, 1, round(count)) ** 1.3 * (STEPS - 1)).round().astype(int))
        return [int(t in chosen) for t in range(STEPS)]

    if not several:
        return {"denoisers": {"transformer": {"model": {"compute": mask(computed), "store": None}}}}
    return {
        "denoisers": {
            "transformer": {
                f"block:transformer_blocks.{n}": {
                    "compute": mask(6 + 12 * n / SITES),
                    "store": ("int8", "bf16")[n % 2] if n > 9 else None,
                }
                for n in range(SITES)
            }
        }
    }


def paint(record: Record, folder: Path, size: int = 160) -> None:
    """A scene per sample, and for each method the scene with noise of about its PSNR."""
    y, x = np.mgrid[0:size, 0:size] / size
    for n, sample in enumerate(record["samples"][:3]):  # no page shows more
        sky = np.stack([0.95 - 0.5 * y, 0.6 - 0.1 * y + 0.02 * n * x, 0.45 + 0.4 * y * (1 - 0.03 * n)], -1)
        scene = Image.fromarray((np.clip(sky, 0, 1) * 255).astype(np.uint8))
        draw = ImageDraw.Draw(scene)
        draw.ellipse([size * (0.1 + 0.02 * n), size * 0.15, size * (0.35 + 0.02 * n), size * 0.4], fill=(250, 236, 190))
        draw.polygon([(0, size), (size * 0.45, size * (0.5 + 0.01 * n)), (size, size)], fill=(44, 62, 80))
        draw.rectangle([size * 0.62, size * 0.45, size * 0.7, size * 0.9], fill=(190, 60, 50))
        exact = np.asarray(scene) / 255
        for m in record["methods"]:
            spread = 10 ** (-m["scores"]["psnr"]["mean"] / 20) if m["kind"] != "full" else 0
            noise = np.random.default_rng(n).normal(0, spread, (size // 4, size // 4, 3)).repeat(4, 0).repeat(4, 1)
            path = folder / m["pictures"][sample["id"]]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((np.clip(exact + noise, 0, 1) * 255).round().astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pictures")
    paint(evaluation(), made)
    return made


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(evaluation(), folder, tmp_path_factory.mktemp("report") / "report.html")


def data(page: Path) -> Record:
    """What the page carries."""
    found = re.search(r'<script type="application/json" id="record">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


# The table that people paste.


def cells(table: str, method: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:1] == "|"]
    (row,) = [line for line in lines if line[0].strip() == method]
    return dict(zip((head.strip() for head in lines[0]), row, strict=True))


def test_the_table_holds_steps_times_scores_and_the_floor() -> None:
    table = markdown(evaluation())
    found = cells(table, "diffcache, 8 steps")
    assert found["computed steps"] == "8.2 of 50"
    assert found["speed-up (loop)"] == "5.60×"
    assert found["seconds (loop)"] == "1.14 (1.13 to 1.17)"
    assert found["PSNR (dB) ↑"] == "31.90 (31.00 to 32.80)"
    assert found["cache (MB)"] == "3.9"
    assert cells(table, "full run")["PSNR (dB) ↑"] == "–"
    assert table.splitlines()[-1].startswith("Floors")
    assert "FD-EffLite0 7.900" in table


def test_losses_look_like_losses() -> None:
    record = evaluation()
    record["methods"][1]["scores"]["psnr"]["against"] = "cache-dit DBCache"
    record["methods"][1]["scores"]["fd"]["verdict"] = "better"
    table = markdown(record)
    assert cells(table, "eager cache")["speed-up (loop)"] == "0.91× (slower)"
    assert cells(table, "diffcache, 25 steps")["verdict"] == "worse (than cache-dit DBCache): PSNR; better: FD-EffLite0"


def test_the_full_run_is_not_scored_against_itself(tmp_path: Path) -> None:
    record = evaluation()
    record["warning"] = "Only 24 samples | few"
    record["metrics"]["psnr"]["of_pairs"] = True
    record["methods"][0]["scores"]["psnr"] = {"mean": 120.0, "low": 120.0, "high": 120.0, "values": None}
    table = markdown(record)
    assert cells(table, "full run")["PSNR (dB) ↑"] == "–"
    assert cells(table, "full run")["FD-EffLite0 ↓"].startswith("8.300")
    assert table.endswith("\n\nOnly 24 samples \\| few")
    scores = data(write_html(record, tmp_path, tmp_path / "a.html"))["record"]["methods"][0]["scores"]
    assert scores.keys() == {"fd"}


def test_what_nothing_fills_has_no_column_and_foreign_text_stays_in_its_cell() -> None:
    record = evaluation()
    record["methods"] = record["methods"][:2]
    record["methods"][1] |= {"name": "a | b\n<i>", "cache_bytes": None, "speedup": {}}
    record["methods"][1]["scores"].pop("ssim")
    table = markdown(record)
    assert "cache" not in table
    assert "SSIM" not in table
    assert "| a \\| b &lt;i&gt; | 25 of 50 | – |" in table
    assert markdown({"methods": []}).startswith("| method |")


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (31.904, "31.90"), (0.99987, "0.9999"), (-1.1, "-1.100"), (12345.6, "12346")]
)
def test_numbers_have_four_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_very_small_numbers_have_an_exponent() -> None:
    assert number(3.2e-7) == "3.200e-07"


# The result that matters.


def test_ours_is_compared_with_the_best_other_method_that_is_as_fast() -> None:
    found = findings.findings(evaluation(), "psnr")
    assert [(f.ours["name"], f.other and f.other["name"]) for f in found] == [
        ("diffcache, 25 steps", "cache-dit DBCache"),  # not "eager cache", which scores more and is slower
        ("diffcache, 12 steps", "12 steps, DPM++"),
        ("diffcache, 8 steps", "8 steps, DPM++"),
    ]
    assert [f.gain for f in found] == pytest.approx([-1.1, 10.2, 8.1])
    assert findings.sentence(evaluation(), "psnr") == (
        "In PSNR, against the best other method of the same time, our methods are better at 2 of 3 budgets "
        "(by 8.10 to 10.2 dB) and worse at 1 (by 1.10 dB)."
    )


def test_a_lower_value_wins_where_lower_is_better() -> None:
    gains = [f.gain for f in findings.findings(evaluation(), "fd")]
    assert [round(g or 0, 2) for g in gains] == [-0.06, 8.54, 16.81]


def test_intervals_that_overlap_are_no_clear_difference() -> None:
    record = evaluation()
    for m in record["methods"]:
        if "psnr" in m["scores"]:
            m["scores"]["psnr"] |= {"values": None, "low": 10.0, "high": 60.0}
    assert "not clearly different at all 3 budgets" in findings.sentence(record, "psnr")


def test_what_the_clock_cannot_tell_apart_counts_as_the_same_time() -> None:
    record = evaluation()
    ours, slow = record["methods"][2], record["methods"][-1]
    slow["seconds"]["loop"]["median"] = ours["seconds"]["loop"]["high"] * 0.999
    assert findings.findings(record, "psnr")[1].other is slow
    slow["seconds"]["loop"]["median"] = ours["seconds"]["loop"]["high"] * 1.001
    assert findings.findings(record, "psnr")[1].other is not slow


@pytest.mark.parametrize("kinds", [(), ("full",), ("full", "ours"), ("full", "peer")])
def test_nothing_to_compare_is_said(kinds: tuple[str, ...]) -> None:
    record = evaluation()
    record["methods"] = [m for m in record["methods"] if m["kind"] in kinds]
    assert "nothing to compare" in findings.sentence(record, findings.main_metric(record))


# The file.


def test_the_page_loads_nothing(written: Path) -> None:
    text = written.read_text("utf-8")
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name of elements, never asked for
    assert not re.search(r"""(https?:)?//[a-z0-9-]+\.[a-z]""", text), "an address"
    assert not re.search(r"<link|@import|<script[^>]+src|<iframe|url\(", text)
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert "connect-src" not in text
    assert "unsafe" not in text
    assert written.stat().st_size < 10e6


def test_foreign_text_cannot_become_markup(folder: Path, tmp_path: Path) -> None:
    record = evaluation()
    record["title"] = "{{script}} " + EVIL
    record["circumstances"]["device"] = "<!--<script>"
    text = write_html(record, folder, tmp_path / "a.html").read_text("utf-8")
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "<!--" not in text
    assert "{{script}}" in text  # not filled in
    assert data(tmp_path / "a.html")["record"]["samples"][1]["prompt"] == EVIL


def test_at_most_24_triplets_are_shown_and_counted(written: Path) -> None:
    shown = data(written)["pictures"]
    assert (shown["count"], shown["of"]) == (22, 11 * SAMPLES)
    assert {len(each) for each in shown["methods"].values()} == {2}
    assert list(shown["full"]) == ["00000", "00001"]
    assert [s["id"] for s in data(written)["record"]["samples"]] == ["00000", "00001"]


def test_more_methods_than_triplets_leave_ours_in(folder: Path) -> None:
    record = evaluation()
    record["methods"] += [{**record["methods"][-1], "name": f"peer {n}"} for n in range(20)]
    record["methods"].append({**record["methods"][1], "name": "ours, last"})
    shown = pictures.shown(record, folder)
    assert shown["count"] == 24
    assert "ours, last" in shown["methods"]


def test_pictures_are_the_files_own_and_the_difference_is_taken_before_they_shrink(tmp_path: Path) -> None:
    record = evaluation()
    record["methods"], record["samples"] = record["methods"][:2], record["samples"][:1]
    a = np.full((1024, 768, 3), 100, np.uint8)
    b = a.copy()
    b[::2, ::2] += 40  # one of four: gone in the mean of a shrunken difference's signs, not in that of its sizes
    b[1::2, 1::2] -= 40
    for m, pixels in zip(record["methods"], (a, b), strict=True):
        path = tmp_path / m["pictures"]["00000"]
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
    shown = pictures.shown(record, tmp_path)
    difference = decoded(shown["methods"]["diffcache, 25 steps"]["00000"]["difference"])
    assert difference.shape == (512, 384, 3)
    assert abs(difference[50:-50, 50:-50].mean() / shown["factor"] - 20) < 1
    assert np.abs(decoded(shown["full"]["00000"]).astype(int) - 100).max() <= 2


def decoded(uri: str) -> np.ndarray:
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB"))


def test_large_noise_is_compressed_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "BYTES", 80_000)
    record = evaluation()
    record["methods"], record["samples"] = record["methods"][:3], record["samples"][:1]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for n, m in enumerate(record["methods"]):
        path = tmp_path / m["pictures"]["00000"]
        path.parent.mkdir(parents=True)
        Image.fromarray(np.roll(noise, n, 0)).save(path)

    def size(shown: Record) -> int:
        uris = [*shown["full"].values(), *(u for m in shown["methods"].values() for u in m["00000"].values())]
        return sum(len(u) for u in uris)

    exact = pictures.shown(record, tmp_path)
    assert exact["lossless"] is True  # five of 12 kB
    assert np.array_equal(decoded(exact["full"]["00000"]), noise)
    monkeypatch.setattr(pictures, "BYTES", 15_000)
    coarse = pictures.shown(record, tmp_path)
    assert coarse["lossless"] is False
    assert size(coarse) < 15_000 * 4 / 3 + 5 * 40 < size(exact)


def test_videos_sounds_and_missing_files_are_counted(folder: Path, tmp_path: Path) -> None:
    record = evaluation()
    shutil.copytree(folder, tmp_path / "p")
    record["methods"][1]["pictures"]["00000"] = "clip.mp4"
    (tmp_path / "p" / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (tmp_path / "p" / record["methods"][2]["pictures"]["00001"]).unlink()
    shown = pictures.shown(record, tmp_path / "p")
    assert shown["count"] == 20
    assert shown["note"].startswith("2 could not be shown: a video")


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/secret.png", "..\\secret.png"])
def test_pictures_outside_the_folder_are_refused(folder: Path, tmp_path: Path, path: str) -> None:
    record = evaluation()
    record["methods"][1]["pictures"]["00000"] = path
    with pytest.raises(BadOption, match="inside the folder"):
        write_html(record, folder, tmp_path / "a.html")


def test_other_documents_and_folders_that_are_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"'diffcache\.evaluation', version 1"):
        write_html({**evaluation(), "version": 2}, folder, tmp_path / "a.html")
    with pytest.raises(BadOption, match="a folder that exists"):
        write_html(evaluation(), folder, tmp_path / "nowhere" / "a.html")


def test_numbers_that_json_lacks_become_nothing(folder: Path, tmp_path: Path) -> None:
    record = evaluation()
    record["methods"][1]["scores"]["psnr"]["mean"] = float("inf")
    record["methods"][2]["scores"]["psnr"]["values"][0] = float("nan")
    found = data(write_html(record, folder, tmp_path / "a.html"))["record"]["methods"]
    assert found[1]["scores"]["psnr"]["mean"] is None
    assert found[2]["scores"]["psnr"]["at"]["00000"] is None


# What the page does, in a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, which drives Chromium, is not installed")
    with driver.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


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
    assert "NaN" not in visit.page.inner_html("main")


def test_a_page_with_a_fault_is_heard_of(browser: Any, written: Path, tmp_path: Path) -> None:
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
    expected = evaluation()["methods"][7]["scores"]["psnr"]["values"][1]
    assert f"PSNR {expected:.2f}" in visit.page.inner_text("#pictures p.facts").replace("\u00a0", " ")
    visit.page.click("#pictures .choices button:nth-of-type(1)")
    assert visit.page.evaluate("document.querySelector('.apart img').style.filter") == "brightness(1)"
    assert "multiplied by 4" in visit.page.inner_text("#pictures")


def test_a_prompt_with_a_script_stays_text(visit: Visit) -> None:
    visit.page.click("#pictures .thumbs button:nth-child(2)")
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


def test_better_is_up_and_faster_is_left_whatever_the_metric(visit: Visit) -> None:
    for metric in ("psnr", "fd"):
        visit.page.click(f"#quality button[data-value={metric}]")

        def at(name: str) -> tuple[float, float]:
            point = visit.page.locator(f'#quality [data-method="{name}"] .reach')
            return float(point.get_attribute("cx")), float(point.get_attribute("cy"))

        (good_x, good_y), (bad_x, bad_y) = at("diffcache, 8 steps"), at("every 4th step")
        assert good_x < bad_x
        assert good_y < bad_y


def test_a_point_tells_its_numbers_to_pointer_and_keyboard(visit: Visit) -> None:
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
