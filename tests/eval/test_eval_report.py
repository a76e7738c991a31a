"""The record of an evaluation as a Markdown table and as one file of HTML."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluations import EVIL, SAMPLES, Record, evaluation
from PIL import Image

from diffcache.errors import BadOption, DocumentError
from diffcache.eval.report import findings, pictures, write_html
from diffcache.eval.table import markdown, number


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
    record["methods"][1]["scores"]["fd"]["verdicts"] = [
        {"verdict": "no difference", "against": "full run"},
        {"verdict": "better", "against": "cache-dit DBCache"},
    ]
    table = markdown(record)
    assert cells(table, "eager cache")["speed-up (loop)"] == "0.91× (slower)"
    assert cells(table, "diffcache, 25 steps")["verdict"] == (
        "worse (than cache-dit DBCache): PSNR; no difference (from full run): FD-EffLite0; "
        "better (than cache-dit DBCache): FD-EffLite0"
    )


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
    assert "cache (MB)" not in table
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
        "In PSNR, against the best other method of the same time, diffcache is better at 2 of 3 budgets "
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
    for count, words in ((2, " at both budgets"), (1, "")):
        ours = [m["name"] for m in record["methods"] if m["kind"] == "ours"]
        record["methods"] = [m for m in record["methods"] if m["name"] not in ours[count:]]
        assert f"not clearly different{words}." in findings.sentence(record, "psnr")


def test_what_the_clock_cannot_distinguish_counts_as_the_same_time() -> None:
    record = evaluation()
    ours, slow = record["methods"][2], record["methods"][-1]
    slow["seconds"]["loop"]["median"] = ours["seconds"]["loop"]["high"] * 0.999
    assert findings.findings(record, "psnr")[1].other is slow
    slow["seconds"]["loop"]["median"] = ours["seconds"]["loop"]["high"] * 1.001
    assert findings.findings(record, "psnr")[1].other is not slow


@pytest.mark.parametrize("kinds", [(), ("full",), ("full", "ours"), ("full", "peer")])
def test_a_report_without_comparisons_states_it(kinds: tuple[str, ...]) -> None:
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
    assert (
        sorted(shown["order"]) == sorted(shown["full"]) == sorted(s["id"] for s in data(written)["record"]["samples"])
    )


def test_the_worst_and_the_median_sample_come_first(folder: Path) -> None:
    record = evaluation()
    ids = [s["id"] for s in record["samples"]]
    fewest = min((m for m in record["methods"] if m["kind"] == "ours"), key=lambda m: m["computed_steps"])
    fewest["scores"]["psnr"]["values"] = [30.0, 90.0, 11.0, *range(12, 22), *range(31, 42)]
    shown = pictures.shown(record, folder)
    assert shown["order"] == [ids[2], ids[0]]  # ten are worse than sample 0 besides the worst, and twelve better
    assert shown["named"] == {ids[2]: "worst", ids[0]: "median"}
    assert shown["judged"] == fewest["name"]
    record["metrics"]["psnr"]["better"] = "lower"
    assert pictures.named_samples(record)["samples"] == {ids[1]: "worst", ids[13]: "median"}


def test_two_samples_are_shown_for_many_methods(folder: Path) -> None:
    record = evaluation()
    record["methods"] += [{**record["methods"][-1], "name": f"peer {n}"} for n in range(4)]
    shown = pictures.shown(record, folder)
    assert sorted(shown["named"].values()) == ["median", "worst"]
    assert {len(each) for each in shown["methods"].values()} == {2}


def test_without_scores_of_samples_the_first_samples_are_shown_without_a_name(folder: Path) -> None:
    record = evaluation()
    for m in record["methods"]:
        for score in m["scores"].values():
            score["values"] = None
    shown = pictures.shown(record, folder)
    assert shown["order"] == [s["id"] for s in record["samples"]][:2]
    assert (shown["named"], shown["judged"]) == ({}, None)


def test_promises_and_measurements_stand_in_one_sentence() -> None:
    record = evaluation()
    assert findings.promises(record) == ""
    first, second = (m for m in record["methods"] if m["name"] in ("diffcache, 25 steps", "diffcache, 12 steps"))
    first |= {"promised": {"mean_db": 50.0}}
    first["scores"]["state"] = {"mean": 52.3, "low": 50.0, "high": 54.0, "values": None}
    assert findings.promises(record) == (
        "Measured against promised state PSNR: 52.3 against 50.0 dB (diffcache, 25 steps); the promise is kept."
    )
    second |= {"promised": {"mean_db": 40.0}}
    second["scores"]["state"] = {"mean": 39.4, "low": 38.0, "high": 41.0, "values": None}
    assert findings.promises(record).endswith("1 of 2 promises are missed by more than 0.5 dB.")


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
    with pytest.raises(DocumentError, match=r"'diffcache\.evaluation', version 1 or 2"):
        write_html({**evaluation(), "version": 3}, folder, tmp_path / "a.html")
    with pytest.raises(BadOption, match="a folder that exists"):
        write_html(evaluation(), folder, tmp_path / "nowhere" / "a.html")


def test_numbers_that_json_lacks_become_nothing(folder: Path, tmp_path: Path) -> None:
    record = evaluation()
    record["methods"][1]["scores"]["psnr"]["mean"] = float("inf")
    record["methods"][2]["scores"]["psnr"]["values"][0] = float("nan")
    found = data(write_html(record, folder, tmp_path / "a.html"))["record"]["methods"]
    assert found[1]["scores"]["psnr"]["mean"] is None
    assert found[2]["scores"]["psnr"]["at"]["00000"] is None
