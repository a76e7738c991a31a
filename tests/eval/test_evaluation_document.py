"""docs/evaluation.md and docs/evaluation-record.md state every field of a record, every metric and every number."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pipelines import TINY, shared
from typer.main import get_command

from diffcache import evaluate, registry
from diffcache.cli import app
from diffcache.documents import Expected
from diffcache.eval import evenly_reused, extractors, frechet, kernel_distance, metrics, record, saved_parts, statistics
from diffcache.eval.methods import Kind
from diffcache.eval.metrics import psnr, scorer
from diffcache.eval.reference import ReferenceStatistics

ROOT = Path(__file__).parents[2]
PAGES = "docs/evaluation.md", "docs/evaluation-record.md"
DOCUMENT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
EITHER = "better", "worse", "no difference"

Kinds = Mapping[str, Callable[[Any], bool]]
NUMBER = int, float
TYPES: Kinds = {
    "text": lambda v: isinstance(v, str),
    "whole number": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, NUMBER) and not isinstance(v, bool),
    "true or false": lambda v: isinstance(v, bool),
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "null": lambda v: v is None,
}


def tables(document: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Objects of the record: their name, a heading above a table of fields; field -> (type, what is allowed)."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for name, body in re.findall(
        r"^### (\w+)\n\n(?:(?:[^|#\n][^\n]*\n)+\n)?\| field \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", document, re.M
    ):
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|([^|\n]*)\|$", body, re.M)
        assert len(rows) == body.count("\n"), f"a row of {name} cannot be read"
        found[name.lower()] = {field: (kind.strip(), allowed.strip()) for field, kind, allowed in rows}
    return found


def objects(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every object of a record whose fields are fixed, with its name in the document."""
    listed: list[tuple[str, Any]] = [("record", found)]
    listed += [(name, found[name]) for name in ("circumstances", "pipeline")]
    listed += [("sample", sample) for sample in found["samples"]]
    listed += [("metric", metric) for metric in found["metrics"].values()]
    for method in found["methods"]:
        listed += [("method", method), *(("spread", spread) for spread in method["seconds"].values())]
        listed += [("score", score) for score in method["scores"].values()]
        listed += [("verdict", one) for score in method["scores"].values() for one in score.get("verdicts", ())]
        listed += [("trajectory", method["trajectory"])] if method["trajectory"] else []
        listed += [("promise", method["promised"])] if method["promised"] else []
        if method["schedule"]:
            listed.append(("schedule", method["schedule"]))
            listed += [("site", s) for sites in method["schedule"]["denoisers"].values() for s in sites.values()]
    return listed


def lies(document: str, records: list[dict[str, Any]]) -> list[str]:
    """Where the document and these records disagree; fields that none of them holds included."""
    told, found, seen = tables(document), [], set()
    for name, value in (pair for one in records for pair in objects(one)):
        seen.add(name)
        if set(value) != set(told.get(name, {})):
            found.append(f"{name}: {sorted(set(value) ^ set(told.get(name, {})))}")
        for field, (kind, _) in told.get(name, {}).items():
            plain = kind.removesuffix(" or null")
            fits = TYPES[plain](value.get(field)) or (value.get(field) is None and kind != plain)
            if field in value and not fits:
                found.append(f"{name}.{field} is {value[field]!r}, not {kind}")
    return found + [f"{name}: in no record" for name in told.keys() - seen]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of latents with all baselines, and of pictures with a scorer, sets and a peer."""
    pipe = shared("flux")

    def call(seed: int, **more: Any) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed + n) for n in range(2)]
        return TINY["flux"].call(pipe, batch=2) | {"generator": generators} | more

    expected = Expected(mean_db=30.0, low_db=25.0, high_db=35.0, samples=4, origin="held-out")
    promising = dataclasses.replace(evenly_reused(("transformer",), TINY["flux"].steps, 3), expected=expected)
    latents = evaluate(
        pipe, {"ours": "uniform:every=2", "promising": promising}, [call(1)], metrics=("latent",), progress=False,
        out=tmp_path_factory.mktemp("latents"),
    )  # fmt: skip
    pictures = evaluate(
        pipe, {"ours": "uniform:every=2,sites=block"}, [call(n, output_type="np") for n in range(1, 17, 2)],
        metrics=("psnr",),
        scorers=[scorer(lambda found, prompts: found.mean(axis=(1, 2, 3)), name="light")], progress=False,
        extractor=extractors.custom(lambda batch: batch.mean((2, 3)), name="Mean colour"),
        out=tmp_path_factory.mktemp("pictures"),
    )  # fmt: skip
    wanted = "exact/0000.npz", "record.json", "report.html", "table.md", "pictures/METHOD/0001-01.png"
    held = [p.relative_to(pictures.folder).as_posix() for p in pictures.folder.rglob("*") if p.is_file()]
    method = saved_parts.slug("full run")
    assert {path.replace("METHOD", method) for path in wanted} | {f"parts/{method}/0001.json"} <= set(held)
    return [json.loads((one.folder / "record.json").read_text()) for one in (latents, pictures)]


def test_every_field_of_a_record_is_described_and_nothing_else(records: list[dict[str, Any]]) -> None:
    assert lies(DOCUMENT, records) == []
    assert {m["kind"] for one in records for m in one["methods"]} == {"full", "ours", "fewer steps", "reuse"}
    (distance,) = [m for m in records[1]["metrics"].values() if m["floor"] is not None]
    assert distance["title"] == "FD-Mean colour"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one.update(extra=1),
        lambda one: one.pop("warning"),
        lambda one: one["circumstances"].update(host="x"),
        lambda one: one["samples"][0].pop("seed"),
        lambda one: one["samples"][0].update(seed="1"),
        lambda one: one["metrics"]["latent"].update(better=None),
        lambda one: one["methods"][1].update(note=None),
        lambda one: one["methods"][1].update(steps=6.0),
        lambda one: one["methods"][1]["seconds"]["loop"].update(mean=1.0),
        lambda one: one["methods"][1]["scores"]["latent"].pop("verdicts"),
        lambda one: one["methods"][1]["schedule"]["denoisers"]["transformer"]["model"].update(weights=[]),
        lambda one: one["methods"][1]["trajectory"].update(expected="0.0"),
    ],
)
def test_another_field_or_type_would_be_noticed(records: list[dict[str, Any]], spoil: Callable[[Any], Any]) -> None:
    spoilt = copy.deepcopy(records)
    spoil(spoilt[0])
    assert len(lies(DOCUMENT, spoilt)) == 1


@pytest.mark.parametrize("field", [f"| `{f}` |" for t in tables(DOCUMENT).values() for f in t])
def test_a_field_that_is_not_described_would_be_noticed(records: list[dict[str, Any]], field: str) -> None:
    lines = DOCUMENT.splitlines(keepends=True)
    assert lies("".join(line for line in lines if not line.startswith(field)), records)


def test_words_that_a_field_may_hold_are_those_of_the_code(records: list[dict[str, Any]]) -> None:
    told = tables(DOCUMENT)

    def words(name: str, field: str) -> set[str]:
        return set(re.findall(r"`([^`]+)`", told[name][field][1].partition("null")[0]))

    assert words("method", "kind") == set(get_args(Kind))
    assert words("verdict", "verdict") == set(get_args(statistics.Verdict)) == set(EITHER)
    assert words("metric", "better") == set(get_args(metrics.Better))
    assert words("record", "format") == {record.FORMAT}
    assert told["record"]["version"][1] == str(record.VERSION)
    assert f"| `{record.FORMAT}` | 1, {record.VERSION} | 0.1 |" in DOCUMENT
    for one in records:
        for method in one["methods"]:
            assert (
                set(method["seconds"]) == set(method["speedup"]) == words("method", "seconds") == {"loop", "pipeline"}
            )


def metric_rows(document: str) -> dict[str, list[str]]:
    body = document.split("| name | title | unit |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()[2:]]
    return {row[0].strip("` "): row for row in rows}


def test_every_metric_is_there_with_its_options() -> None:
    rows = metric_rows(DOCUMENT)
    assert set(rows) == set(metrics.available())
    for name, row in rows.items():
        metric = metrics.load(name)
        about = metric.ABOUT
        assert row[1:4] == [about.title, about.unit, about.better]
        known = {
            f"{p.name}={json.dumps(p.default) if isinstance(p.default, str) else p.default}"
            for p in inspect.signature(metric.score).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        assert set(re.findall(r"`(\w+=[^`]+)`", row[-1])) == known


def test_every_command_extractor_and_argument_is_there() -> None:
    named = {f"diffcache eval {name}" for name in get_command(app).get_command(None, "eval").commands}
    assert set(re.findall(r"`(diffcache eval \w+)", DOCUMENT)) == named
    body = DOCUMENT.split("| extractor | reported as |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", body, re.M)) == set(registry.names(extractors.__name__))
    for name in ("schedules", "calls", "metrics", "compare", "extractor", "real", "out"):
        assert name in inspect.signature(evaluate).parameters
        assert re.search(rf"`{name}[`=]|\b{name}=", DOCUMENT)
    arrays = re.findall(r"`(\w+)` F64", DOCUMENT)
    assert set(arrays) == {"mean", "covariance"}
    for field in fields(ReferenceStatistics):
        assert f"`{field.name}`" in DOCUMENT


@pytest.mark.parametrize(
    ("said", "is_so"),
    [
        ("fewer than 16 samples", statistics.FEW == 16),
        ("below 16 samples", statistics.FEW == 16),
        ("Below 64 samples", statistics.ENOUGH == 64),
        ("95 %, 10 000 resamples", statistics.LEVEL == 0.95 and statistics.MOST == 10_000),
        ("beyond 2000 samples, never below 2000", statistics.LEAST == 2000),
        ("fractions of a step rounded up", 0 < record.WHOLE < 0.1),
        ("120 dB", psnr.MOST_DB == 120),
        ("50 bootstrap resamples", frechet.RESAMPLES == 50),
        ("100 subsets of 1000 pictures", (kernel_distance.SUBSETS, kernel_distance.SUBSET_SIZE) == (100, 1000)),
    ],
)
def test_numbers_are_those_of_the_code(said: str, is_so: bool) -> None:
    assert said in " ".join(DOCUMENT.split())
    assert is_so


def test_the_narrowness_of_few_samples_is_what_the_statistics_say() -> None:
    for law in ("samples", "normal values", "log-normal values"):
        found = re.search(rf"^ +{law}((?: +\d+)+)", statistics.__doc__ or "", re.M)
        assert found is not None
        assert f"| {law} | {' | '.join(found[1].split())} |" in DOCUMENT


def test_the_example_of_the_bias_is_what_comes_out() -> None:
    random = np.random.default_rng(0)
    real, made = random.normal(size=(2000, 64)), random.normal(size=(2000, 64))
    target = frechet.moments(real)
    found = [frechet.distance(target, frechet.moments(made[:n])) for n in (250, 500, 1000, 2000)]
    assert f"| distance | {' | '.join(f'{value:.2f}' for value in found)} |" in DOCUMENT
    floor = frechet.floor(real, 2000)
    assert floor is not None
    said = f"The floor is {floor.value:.2f}, because each half has {floor.samples} pictures"
    assert said in " ".join(DOCUMENT.split())


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", DOCUMENT))
def test_every_link_leads_somewhere(link: str) -> None:
    path, _, heading = link.partition("#")
    assert (ROOT / "docs" / path).exists()
    titles = [re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^#+ (.+)$", DOCUMENT, re.M)]
    assert not heading or heading in titles
