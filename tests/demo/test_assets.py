"""The trained models that come with the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffcache import accelerated
from diffcache.assets import NAMES, PromptEncoder, load, save_grid
from diffcache.assets.models import FOLDER
from diffcache.errors import BadOption, UnknownName


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return load(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_printed_while_a_model_loads_and_no_setting_of_diffusers_changes(name, monkeypatch, capfd):
    from diffusers.models import modeling_utils
    from diffusers.utils import logging

    monkeypatch.setattr(
        "diffusers.utils.import_utils.is_accelerate_available", lambda: False
    )  # as in a fresh environment
    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: False)
    heard = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda text, *_: heard.append(text))
    load(name)
    assert heard == []
    assert "Loading" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    monkeypatch.setattr("diffcache.assets.models.memory_options", dict)
    load(name)
    assert "accelerate" in heard[0]


def images(model, *, seed: int = 5, steps: int = 12, **more) -> np.ndarray:
    subjects = model.subjects[:2]
    return model.pipe(**model.call(subjects, [seed, seed + 1], steps=steps, **more)).images


@pytest.mark.parametrize("granularity", ["model", "stack", "block", "sublayer"])
def test_computing_every_step_changes_no_bit_of_the_pictures(model, granularity):
    plain = images(model)
    with accelerated(model.pipe, f"full:sites={granularity}"):
        same = images(model)
    assert np.array_equal(plain, same)


def test_skipping_steps_does_change_the_pictures(model):
    with accelerated(model.pipe, "uniform:every=3"):
        skipped = images(model)
    assert not np.array_equal(images(model), skipped)


def test_the_models_are_trained(model):
    """What they draw for a subject is nearer to another draw of it than to noise: most of an emoji's rim is white."""
    rim = np.concatenate([part.reshape(-1) for part in images(model, steps=30)[:, :3].transpose(1, 0, 2, 3)])
    assert np.median(rim) > 0.9


def test_the_subject_decides_the_picture(model):
    one, other = model.subjects[0], model.subjects[-1]
    a, b = (model.pipe(**model.call([s], [3], steps=12)).images for s in (one, other))
    assert np.abs(a - b).mean() > 0.02


def test_guidance_of_flux_runs_a_second_forward_with_the_empty_prompt():
    guided, plain = load("flux-guided"), load("flux")
    seen = []
    handle = guided.pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["encoder_hidden_states"].abs().sum().item()), with_kwargs=True
    )
    pictures = images(guided, steps=3)
    assert [value > 0 for value in seen] == [True, False] * 3
    assert not np.array_equal(pictures, images(plain, steps=3))
    assert np.array_equal(images(guided, steps=3, true_cfg_scale=1.0), images(plain, steps=3))
    handle.remove()


@pytest.mark.fast
def test_all_weights_together_stay_within_32_megabytes():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 32e6


@pytest.mark.fast
def test_every_caption_of_the_demo_model_can_be_encoded():
    model = load("flux")
    embeds, pooled = model.encoder(model.subjects)
    assert embeds.shape == (len(model.subjects), 8, 128)
    assert pooled.shape == (len(model.subjects), 128)
    assert (pooled.abs().sum(1) > 0).all()


@pytest.mark.fast
def test_word_order_carries_no_meaning_but_words_do():
    encoder = PromptEncoder(["big", "cat", "dog"], torch.eye(3))
    _, one = encoder(["big cat"])
    _, turned = encoder(["cat big"])
    _, other = encoder(["big dog"])
    assert torch.equal(one, turned)
    assert not torch.equal(one, other)


@pytest.mark.fast
def test_an_unknown_word_is_an_error_that_names_near_ones():
    encoder = PromptEncoder(["banana", "cherry"], torch.eye(2))
    with pytest.raises(BadOption, match=r"prompt word='bananna' was given.*2 words of the demo model.*such as banana"):
        encoder(["a ripe bananna".split()[-1]])


@pytest.mark.fast
def test_unknown_models_and_classes_are_named_with_what_there_is():
    with pytest.raises(UnknownName, match=r"no demo model called 'sdxl'. Known: flux, dit, flux-guided"):
        load("sdxl")
    with pytest.raises(UnknownName, match=r"no class called 'hart'.*Did you mean 'heart'"):
        load("dit").call(["hart"], [0])


@pytest.mark.fast
def test_a_grid_holds_every_picture_where_it_belongs(tmp_path):
    pictures = np.stack([np.full((5, 7, 3), v) for v in (0.0, 0.5, 1.0)])
    save_grid(pictures, tmp_path / "grid.png", columns=2, gap=1)
    canvas = np.asarray(Image.open(tmp_path / "grid.png"))
    assert canvas.shape == (2 * 6 + 1, 2 * 8 + 1, 3)
    assert (canvas[1:6, 1:8] == 0).all()
    assert (canvas[1:6, 9:16] == 128).all()
    assert (canvas[7:12, 1:8] == 255).all()
