"""Trained routers: their files are read without running anything, and their tables run as they are."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import DIGEST, profile, site
from probes import leaf_calls
from torch import Tensor

from diffcache import accelerated, assets, planning, report
from diffcache.documents import DenoiserProfile, Profile
from diffcache.errors import BadOption, DocumentError, ScheduleMismatch
from diffcache.host import find_sites
from diffcache.profiling import router_file
from diffcache.schedulers._router import Router
from diffcache.schedulers.learning_to_cache import plan

pytestmark = pytest.mark.fast

STEPS, DEPTH = 6, 5  # the depth of the demo's DiT
LAST = STEPS - 1  # the row of the noisiest step, which runs first


def probs(seed: int = 0, steps: int = STEPS, depth: int = DEPTH) -> Tensor:
    """[T, 2 · depth], row 0 the cleanest; some above and some below the threshold (sigmoid(-2.197) = 0.1)."""
    return torch.randn(steps, 2 * depth, generator=torch.Generator().manual_seed(seed)) * 2 - 2


def content(rows: Tensor, **args: Any) -> dict[str, Any]:
    """As torch.save is given by both projects: with the optimiser's state and the arguments of the training."""
    routers = OrderedDict((f"{i}.prob", row.clone()) for i, row in enumerate(rows))
    opt = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": rows[0].clone()}}, "param_groups": [{"lr": 0.01}]}
    return {"routers": routers, "opt": opt, "args": argparse.Namespace(lr=0.01, model="DiT-XL/2", **args)}


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


@pytest.fixture
def harmonica(tmp_path: Path) -> Path:
    rows = probs()
    rows[LAST] = 5.0
    return saved(tmp_path / "harmonica.pt", content(rows, lambda_c=500))


@pytest.fixture
def l2c(tmp_path: Path) -> Path:
    return saved(tmp_path / "l2c.pt", content(probs(1)))


def above(rows: Tensor) -> np.ndarray:
    return (torch.sigmoid(rows) > 0.1).numpy()


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_router_of_harmonica_is_its_table_from_the_noisiest_step_on(harmonica: Path) -> None:
    router = router_file.read(harmonica)
    rows = probs()
    rows[LAST] = 5.0
    assert (router.compute == above(rows)[::-1]).all()
    assert not router.compute.all()
    assert str(router) == "harmonica.pt (harmonica)"


def test_a_router_of_learning_to_cache_is_used_at_every_second_step(l2c: Path) -> None:
    """Index 5 runs first, in full; index 4 is routed; and so on down to index 0, the cleanest, which is routed."""
    router = router_file.read(l2c)
    rows = above(probs(1))
    for run in range(STEPS):
        index = LAST - run
        assert (router.compute[run] == (rows[index] if index % 2 == 0 else True)).all()
    assert str(router) == "l2c.pt (learning-to-cache)"


def test_with_an_odd_number_of_steps_the_first_one_runs_in_full_all_the_same(tmp_path: Path) -> None:
    path = saved(tmp_path / "odd.pt", content(probs(1, steps=5)))
    router = router_file.read(path)
    assert router.compute[0].all()
    assert (router.compute[2] == above(probs(1, steps=5))[2]).all()
    assert router.compute[1].all()


def test_the_kind_of_a_router_comes_from_the_arguments_the_frozen_row_or_the_user(tmp_path: Path) -> None:
    rows = probs()
    by_args = saved(tmp_path / "a.pt", content(rows, lambda_c=500))
    assert "harmonica" in str(router_file.read(by_args))
    bare = {"routers": content(rows)["routers"]}
    assert "learning" in str(router_file.read(saved(tmp_path / "b.pt", bare)))
    assert "harmonica" in str(router_file.read(tmp_path / "b.pt", kind="harmonica"))
    bare["routers"][f"{LAST}.prob"][:] = 5.0
    assert "harmonica" in str(router_file.read(saved(tmp_path / "c.pt", bare)))
    assert "learning" in str(router_file.read(tmp_path / "c.pt", kind="learning-to-cache"))


def test_the_threshold_can_be_another(harmonica: Path) -> None:
    high, low = (router_file.read(harmonica, threshold=t).compute for t in (0.5, 0.0))
    assert high.sum() < router_file.read(harmonica).compute.sum() < low.sum()
    assert low.all()


def test_bfloat16_and_the_older_file_format_are_read_too(tmp_path: Path) -> None:
    value = content(probs().bfloat16())
    path = saved(tmp_path / "old.pt", value, _use_new_zipfile_serialization=False)
    assert (router_file.read(path).compute[1] == above(probs().bfloat16())[4]).all()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["routers", "args", "extra"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(tmp_path: Path, place: str, zipped: bool) -> None:
    value = content(probs()) | {place: Malicious(tmp_path / "ran")}
    path = saved(tmp_path / "bad.pt", value, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DocumentError, match=r"bad.pt: field 'file': asks for posix.mkdir. .*Nothing in it was run"):
        router_file.read(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the trap works
    assert (tmp_path / "ran").exists()


def test_reading_leaves_nothing_allowed_that_was_not(l2c: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    assert argparse.Namespace not in before
    router_file.read(l2c)
    assert set(torch.serialization.get_safe_globals()) == before


def without(routers: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: row for n, row in routers.items() if n != name}


ROWS = content(probs())["routers"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "found NoneType"),
        ({"state_dict": {}}, "found NoneType"),
        ({"routers": {}}, "found dict"),
        ({"routers": without(ROWS, "2.prob")}, "found 5 entries, '2.prob' missing or too many"),
        ({"routers": ROWS | {"bias": torch.ones(3)}}, "'6.prob' missing|'bias' missing or too many"),
        ({"routers": ROWS | {"2.prob": torch.ones(8)}}, r"found \[8\]"),
        ({"routers": ROWS | {"2.prob": torch.ones(2, 5)}}, r"found \[2, 5\]"),
        ({"routers": ROWS | {"2.prob": [1.0] * 10}}, "found list"),
        ({"routers": {"0.prob": torch.ones(3)}}, r"found \[3\]"),
        ({"routers": {"0.prob": torch.ones(0)}}, "found NaN, Inf or nothing"),
        ({"routers": ROWS | {"2.prob": torch.full((10,), float("nan"))}}, "found NaN, Inf or nothing"),
    ],
)
def test_something_other_than_a_router_is_refused(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(DocumentError, match=words):
        router_file.read(saved(tmp_path / "none.pt", value))


def test_something_other_than_a_file_of_torch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("routers")
    with pytest.raises(DocumentError, match="damaged, or not a file of torch"):
        router_file.read(tmp_path / "text.pt")
    with pytest.raises(DocumentError, match="no such file"):
        router_file.read(tmp_path / "nothing.pt")


@pytest.mark.parametrize("options", [{"kind": "other"}, {"threshold": 1.5}, {"threshold": -1}])
def test_options_that_cannot_be_are_refused(l2c: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=next(iter(options))):
        router_file.read(l2c, **options)


# --- the table -------------------------------------------------------------------------------------------------------


def table(seed: int = 0, steps: int = STEPS, depth: int = DEPTH) -> Router:
    compute = np.random.default_rng(seed).random((steps, 2 * depth)) > 0.5
    compute[0] = True
    return Router(compute, "by hand")


def measured(depth: int = DEPTH, outside: float = 2.0, **changes: Any) -> Profile:
    """A DiT of blocks whose feed-forward takes twice the time of their attention."""
    outputs = np.random.default_rng(0).normal(size=(1, STEPS, 8)).cumsum(axis=1)
    parts = {"attn1": 1.0, "ff": 2.0}
    sites = {
        f"sublayer:transformer_blocks.{i}.{part}": site(outputs, seconds=s)
        for i in range(depth)
        for part, s in parts.items()
    }
    sites["model"] = site(outputs, seconds=3.0 * depth + outside)
    denoiser = DenoiserProfile(class_name="DiTTransformer2DModel", config_digest=DIGEST, sites=sites)
    return profile(**{"start": 0, "denoisers": {"transformer": denoiser}, "guidance": None} | changes)


def work(router: Router) -> float:
    seconds = np.tile([1.0, 2.0], DEPTH) * router.compute
    return float((seconds.sum() + 2 * STEPS) / (3 * DEPTH + 2))


def test_the_columns_are_attention_and_feed_forward_of_each_block() -> None:
    router = table()
    plans = plan(measured(), STEPS, file=router).sites
    for i in range(DEPTH):
        assert (plans[f"sublayer:transformer_blocks.{i}.attn1"].compute == router.compute[:, 2 * i]).all()
        assert (plans[f"sublayer:transformer_blocks.{i}.ff"].compute == router.compute[:, 2 * i + 1]).all()


def test_its_budget_is_its_own() -> None:
    router = table()
    least = work(router)
    assert 2 < least < 5
    schedule = planning.plan(measured(), "routers", 5, file=router)
    assert schedule.provenance["scheduler"] == "learning_to_cache:file=by hand"
    assert schedule.provenance["work"] == f"{least:.4g} of 6 full steps"
    assert plan(measured(), least, file=router).sites.keys() == plan(measured(), 6, file=router).sites.keys()
    with pytest.raises(BadOption, match=rf"{least:.3f}\d* or more: the work of by hand, which is fixed"):
        plan(measured(), least - 0.01, file=router)


def test_a_table_can_be_kept_in_a_file_that_needs_no_torch(tmp_path: Path) -> None:
    router = table()
    np.save(tmp_path / "table.npy", router.compute)
    schedule = planning.plan(measured(), f"learning_to_cache:file={tmp_path / 'table.npy'}", 6)
    by_hand = planning.plan(measured(), "routers", 6, file=router)
    assert schedule.denoisers == by_hand.denoisers


@pytest.mark.parametrize(
    ("router", "found", "words"),
    [
        (table(steps=5), measured(), "a router of 5 steps, and the profile has 6 steps"),
        (table(), measured(start=2), "a router of 6 steps, and the profile has 6 steps of 8, from step 2 on"),
        (table(), measured(after=1), "a router of 6 steps, and the profile has 6 steps of 7, from step 0 on"),
        (
            table(depth=4),
            measured(),
            "8 sublayers in 4 blocks of a DiT, and the network has 10 sublayers; .*blocks.4.attn1'",
        ),
        (table(depth=6), measured(), "12 sublayers in 6 blocks of a DiT, and the network has 10 sublayers"),
        (table(), profile(start=0), "it measured .* sites, and sublayer sites are needed"),
        ("", measured(), r"no trained router was given\. Pass file=router\.npy, .*router_file\.read\(path\)"),
        ("DDIM20_router.pt", measured(), r"router_file\.read\(path\)"),
        ("missing.npy", measured(), "Found: .*no such file"),
    ],
)
def test_another_network_or_number_of_steps_is_refused(router: Any, found: Profile, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        plan(found, 6, file=router)


def test_files_of_numpy_hold_tables_only(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([Malicious(tmp_path / "ran")]), allow_pickle=True)
    np.save(tmp_path / "floats.npy", np.ones((6, 10)))
    for name in ("objects.npy", "floats.npy"):
        with pytest.raises(BadOption, match="Found: "):
            plan(measured(), 6, file=str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (np.ones((6, 9), bool), r"a bool array of shape \[6, 9\]"),
        (np.ones(6, bool), r"a bool array of shape \[6\]"),
        (np.ones((6, 10)), "a float64 array"),
        (np.ones((0, 10), bool), r"\[0, 10\]"),
        (np.zeros((6, 10), bool), "it skips a sublayer at the first step"),
    ],
)
def test_a_table_that_cannot_run_is_refused(compute: np.ndarray, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        Router(compute)


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit() -> Any:
    return assets.load("dit")


@pytest.mark.parametrize("kind", ["harmonica", "l2c"])
def test_what_is_skipped_is_what_the_table_says(dit: Any, kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    router = router_file.read(path)
    call = dit.call(dit.subjects[:1], [0], steps=STEPS, output_type="latent")
    with accelerated(dit.pipe, router_file.schedule(path, dit.pipe)), leaf_calls(dit.pipe, ["transformer"]) as calls:
        with torch.no_grad():
            dit.pipe(**call)
        rows = {row.site: row for row in report(dit.pipe).rows}
    assert set(router.sites) <= set(rows)
    for name, column in zip(router.sites, router.compute.T, strict=True):
        assert (rows[name].computed, rows[name].predicted) == (column.sum(), (~column).sum())
        assert not rows[name].failed_open
    for i in range(DEPTH):  # and these forwards really ran, or did not
        attention, feed_forward = router.compute[:, 2 * i], router.compute[:, 2 * i + 1]
        assert calls["transformer", f"transformer_blocks.{i}.attn1.to_q"] == attention.sum()
        assert calls["transformer", f"transformer_blocks.{i}.ff.net.2"] == feed_forward.sum()


def test_a_reused_site_hands_on_what_it_returned_at_its_last_step(dit: Any, harmonica: Path) -> None:
    """Before the gate of the block, which runs at every step."""
    handed: list[Tensor] = []
    feed_forward = dit.pipe.transformer.transformer_blocks[1].ff
    handle = feed_forward.register_forward_hook(lambda _module, _args, output: handed.append(output.clone()))
    column = router_file.read(harmonica).compute[:, 3]
    assert not column.all()
    with accelerated(dit.pipe, router_file.schedule(harmonica, dit.pipe)), torch.no_grad():
        dit.pipe(**dit.call(dit.subjects[:1], [0], steps=STEPS, output_type="latent"))
    handle.remove()
    for i, output in enumerate(handed):
        assert torch.equal(output, handed[np.flatnonzero(column[: i + 1])[-1]])
        assert not column[i] or i == 0 or not torch.equal(output, handed[i - 1])


def test_the_schedule_is_for_this_network_and_this_grid_only(dit: Any, harmonica: Path) -> None:
    schedule = router_file.schedule(harmonica, dit.pipe)
    assert schedule.steps == STEPS
    assert schedule.denoisers["transformer"].config_digest is not None
    assert schedule.noise_scheduler is not None
    assert schedule.noise_scheduler.class_name == "DDIMScheduler"
    assert schedule.provenance["scheduler"] == "router file: harmonica.pt (harmonica)"
    with accelerated(dit.pipe, schedule), pytest.raises(ScheduleMismatch, match="made for 6 steps; this run takes 7"):
        dit.pipe(**dit.call(dit.subjects[:1], [0], steps=7, output_type="latent"))


def test_a_router_of_another_depth_is_refused(dit: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "deep.pt", content(probs(depth=28)))
    with pytest.raises(BadOption, match="56 sublayers in 28 blocks of a DiT, and the network has 10 sublayers"):
        router_file.schedule(path, dit.pipe)


def test_a_noise_scheduler_that_takes_more_steps_than_asked_for_is_refused(dit: Any, harmonica: Path) -> None:
    from diffusers import PNDMScheduler

    before = dit.pipe.scheduler
    dit.pipe.scheduler = PNDMScheduler.from_config(before.config)
    try:
        with pytest.raises(ScheduleMismatch, match="trained for 6 steps; asked for these, PNDMScheduler takes"):
            router_file.schedule(harmonica, dit.pipe)
    finally:
        dit.pipe.scheduler = before


def test_the_pipeline_and_the_profile_give_the_same_decisions(dit: Any, harmonica: Path) -> None:
    router = router_file.read(harmonica)
    from_profile = planning.plan(measured(), "routers", 6, file=router).denoisers["transformer"]
    from_pipe = router_file.schedule(harmonica, dit.pipe).denoisers["transformer"]
    apart = {"config_digest": None, "called": None}  # a profile says at which steps the denoiser is called
    assert dataclasses.replace(from_profile, **apart) == dataclasses.replace(from_pipe, **apart)
    assert set(from_pipe.sites) == {s for s in find_sites(dit.pipe.transformer) if s.startswith("sublayer:")}


def _archive(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


LONG = b"c" + b"a" * 50_000 + b"\n" + b"b" * 50_000 + b"\n."  # asks for a class of a long name


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (LONG, "not a file of torch.save"),
        (b"c" * 100_000, "not a file of torch.save"),
        (_archive(b"\x80\x02" + LONG), "names of up to 200 letters"),
        (router_file.OLDER + b"\x80\x02M\xe9\x03." + b"\x80\x02" + LONG, "names of up to 200 letters"),
        (_archive(bytes(10_000), zipfile.ZIP_DEFLATED), "a compressed archive"),
        (_archive(b"\x80\x05\x96" + (10**11).to_bytes(8, "little")), "damaged"),
    ],
    ids=["pickle", "letters", "archive", "older", "compressed", "endless"],
)
def test_a_hostile_file_is_refused_before_torch_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, words: str
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw it"))
    (tmp_path / "r.pt").write_bytes(data)
    with pytest.raises(DocumentError, match=words):
        router_file.read(tmp_path / "r.pt")
