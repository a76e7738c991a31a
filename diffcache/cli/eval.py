"""``diffcache eval``: evaluate schedules, and measure folders of pictures against other pictures or their prompts.

Each file of this folder defines a function or a group of its name. This file defines a group. Each of its subcommands
is a function here under ``@eval.command("name", cls=Command)``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffcache.cli import _samples
from diffcache.cli._help import Command, Group
from diffcache.cli._options import Batch, Device, Dtype, Extra, Guidance, Model, Pixels, Prompts, Seeds, Steps
from diffcache.cli._printing import markdown, note
from diffcache.documents.destinations import check_file, check_folder
from diffcache.errors import BadOption, Unusable

if TYPE_CHECKING:
    import torch

    from diffcache.eval.evaluation import Evaluation

eval = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Measure what a schedule costs, and folders of pictures: distances between sets, fit to prompts.\n\n"
    "Example:\n    diffcache eval run my-flux ten.safetensors --prompts others.txt --steps 28",
)

BatchSize = Annotated[int, typer.Option(help="Pictures that a network sees at a time.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Schedules = Annotated[
    list[str],
    typer.Argument(
        help="Schedules: files of one or of a schedule set, hub ids or rules (taylorseer:every=3). NAME=SCHEDULE "
        "names one."
    ),
]
Store = Annotated[
    str | None, typer.Option(help="Format of kept outputs: bf16, int8, fp8, int4; else as schedules say.")
]
Measured = Annotated[
    Path | None,
    typer.Option("--profile", help="A profile of this loop: draws the error it predicts with the measured one."),
]
Title = Annotated[str, typer.Option(help="Of the report. The model if not given.")]
Out = Annotated[Path, typer.Option(help="Folder. A run that is stopped goes on there.")]


@eval.command("run", cls=Command)
def run(
    model: Model,
    schedules: Schedules,
    prompts: Prompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Pixels = None,
    width: Pixels = None,
    call: Extra = None,
    seeds: Seeds = None,
    batch: Batch = 1,
    store: Store = None,
    metrics: Annotated[str, typer.Option(help="Of pairs with the full run, with commas.")] = "psnr,ssim,latent",
    alone: Annotated[bool, typer.Option("--alone", help="Do not compare with fewer steps and uniform reuse.")] = False,
    extractor: Annotated[
        str | None, typer.Option(help="For distances of sets: inception, efflite0, package.module:function.")
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Real pictures, or statistics; without it, the full run's are the reference.")
    ] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="package.module:function, (pictures, prompts) -> scores. May be repeated.")
    ] = None,
    profile: Measured = None,
    dtype: Dtype = None,
    device: Device = None,
    title: Title = "",
    out: Out = Path("evaluation"),
) -> None:
    """Compare schedules with the full run and with other methods of the same cost; write a table and a report.

    Use prompts that were not used for the calibration.

    Example:
        diffcache eval run my-flux ours=schedule.safetensors taylorseer:every=3 \\
            --prompts others.txt --steps 28 --out evaluation
    """
    options = _samples.options(call, steps=steps, guidance=guidance, height=height, width=width)
    rows = _samples.read(prompts) if prompts else None
    named = _by_name(schedules)
    check_folder("out", out)

    from diffcache.cli import _calls, _matching, _models  # imports torch and diffusers
    from diffcache.documents.profile import Profile
    from diffcache.eval.checks import check_title
    from diffcache.eval.evaluation import judges_of
    from diffcache.eval.methods import ours
    from diffcache.eval.metrics import scorer as judge
    from diffcache.eval.set_distances import sets_of

    check_title(title)
    methods = [ours(name, source, store=store) for name, source in named.items()]
    _own_code(extractor, *(scorer or ()))
    judges = [judge(address) for address in scorer or ()]
    names = _metric_names(metrics)
    judges_of(names, judges, {})
    asked = _calls.Asked(rows, prompts, seeds, batch, options)
    found_model = _models.named(model, dtype, device)
    asked.check(found_model, decoded=True)
    _matching.check(found_model, asked, methods)
    measured = None if profile is None else Profile.load(profile)
    sets = sets_of(extractor, real)
    loaded = found_model.load()
    found = _evaluated(
        loaded.pipe,
        methods,
        asked.calls(loaded, decoded=True),
        metrics=names,
        scorers=judges,
        compare=() if alone else None,
        extractor=None if sets is None else sets.extractor,
        real=real,
        profile=measured,
        out=out,
        title=title or model,
    )
    if _models.is_first_process():
        markdown(str(found))
        typer.echo(f"\nreport: {found.report.resolve()}")


def _evaluated(pipe: Any, methods: Any, calls: Any, **given: Any) -> Evaluation:
    """Evaluate methods on calls of a pipeline that is not a language model."""
    from diffcache import host
    from diffcache.eval.evaluation import Evaluation, evaluate

    found = None if host.language_model_of(pipe) is not None else evaluate(pipe, methods, calls, **given)
    if not isinstance(found, Evaluation):
        raise Unusable("model", "it is a language model", "Call diffcache.evaluate(loop, rules, calls) in Python")
    return found


def _metric_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _own_code(*addresses: str | None) -> None:
    """Let ``package.module:function`` find modules in the current folder, as ``python -m`` does."""
    here = str(Path.cwd())
    if any(address and ":" in address for address in addresses) and here not in sys.path:
        sys.path.insert(0, here)


def _by_name(schedules: list[str]) -> dict[str, str]:
    named = dict(_named(schedule) for schedule in schedules)
    if len(named) < len(schedules):
        raise BadOption("schedules", " ".join(schedules), "a different name for each, as NAME=SCHEDULE")
    return named


def _named(text: str) -> tuple[str, str]:
    """Return the name and the source in ``NAME=SCHEDULE``. The equals signs of a rule's options come after a colon."""
    name, mark, source = text.partition("=")
    return (name, source) if mark and ":" not in name and "/" not in name else (Path(text).stem, text)


@eval.command("policy", cls=Command)
def policy(
    model: Annotated[
        str, typer.Argument(help="package.module:function of yours, which returns a policy, and calls: observations.")
    ],
    schedules: Schedules,
    play: Annotated[
        str | None, typer.Option(help="package.module:function, (policy, episodes) -> whether each succeeded.")
    ] = None,
    episodes: Annotated[int, typer.Option(help="Of the task, for every method.")] = 300,
    store: Store = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Of pairs with the full run, with commas: action,state. Those of policies if not given."),
    ] = None,
    profile: Measured = None,
    dtype: Dtype = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Do not compare with other samplers and uniform reuse.")
    ] = False,
    device: Device = None,
    title: Title = "",
    out: Out = Path("evaluation"),
) -> None:
    """Compare schedules of a policy with the full run and other samplers; write a table and a report.

    Example:
        diffcache eval policy robot.models:policy ours=schedule.safetensors \\
            --play robot.task:play --episodes 300
    """
    named = _by_name(schedules)
    if episodes < 1:
        raise BadOption("episodes", episodes, "1 or more")

    check_folder("out", out)

    from diffcache.cli import _models
    from diffcache.documents.profile import Profile
    from diffcache.eval.checks import check_title
    from diffcache.eval.evaluation import judges_of
    from diffcache.eval.methods import ours
    from diffcache.eval.trials import Trials

    check_title(title)
    methods = [ours(name, source, store=store) for name, source in named.items()]
    names = None if metrics is None else _metric_names(metrics)
    judges_of(names or (), (), {})
    measured = None if profile is None else Profile.load(profile)
    wanted = "a function that returns a policy and calls, each with a seed"
    found_model = _models.named(model, dtype, device)
    if found_model.kind != "function":
        raise BadOption("model", model, f"package.module:function, {wanted}")
    trials = None if play is None else Trials(_models.function_at("play", play), episodes, play)
    loaded = found_model.load()
    if not loaded.calls:
        raise BadOption("model", model, wanted)
    found = _evaluated(
        loaded.pipe,
        methods,
        loaded.calls,
        metrics=names,
        compare=() if alone else None,
        profile=measured,
        trials=trials,
        title=title or model,
        out=out,
    )
    if _models.is_first_process():
        markdown(str(found))
        typer.echo(f"\nreport: {found.report.resolve()}")


@eval.command("fid", cls=Command)
def fid(
    reference: Annotated[
        Path, typer.Argument(help="Real pictures: a folder; or statistics: .safetensors, or pytorch-fid's .npz.")
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Pictures to be measured: a folder, or the beginning of its name. May be left out with "
            "--save-statistics."
        ),
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="inception (FID, KID), efflite0 (FD-EffLite0, KD-EffLite0), package.module:function.")
    ] = "inception",
    weights: Annotated[
        Path | None, typer.Option(help="File of the Inception weights. Default: the folder of torch.hub.")
    ] = None,
    save_statistics: Annotated[
        Path | None, typer.Option(help="Also write the statistics of REFERENCE, a .safetensors file.")
    ] = None,
    batch_size: BatchSize = 32,
    resamples: Annotated[int, typer.Option(help="Resamples for the interval; 0 for no interval.")] = 50,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Print the Fréchet and kernel distance of a folder of pictures from a reference, and the reference's floor.

    Example:
        diffcache eval fid real-pictures evaluation/pictures/ours --extractor efflite0
    """
    if folder is None and save_statistics is None:
        raise BadOption("folder", None, "a folder of pictures to be measured, or --save-statistics FILE")
    if save_statistics is not None:
        check_file("save_statistics", save_statistics)
    _check_least(batch_size=(batch_size, 1), resamples=(resamples, 0))
    from diffcache.eval import extractors, folders
    from diffcache.eval import reference as references
    from diffcache.eval.distribution import Distribution

    measured = folders.pictures(folder) if folder is not None else []
    is_file = reference.is_file() or reference.suffix in references.SUFFIXES
    real = [] if is_file else folders.pictures(reference)
    _own_code(extractor)
    network = extractors.load(extractor, weights=weights, device=_device(device))
    statistics = references.read(reference, network) if is_file else None
    found = Distribution(network, statistics, batch_size=batch_size, resamples=resamples)
    for batch in folders.batches(real, batch_size):
        found.add(batch, real=True)
    for batch in folders.batches(measured, batch_size):
        found.add(batch)
    if save_statistics is not None:
        written = found.statistics().save(save_statistics)
        if not as_json:
            typer.echo(f"statistics of {reference} written to {written}")
    if folder is None:
        return
    distance = found.compute()
    typer.echo(json.dumps(distance.tree()) if as_json else distance.line())
    if not as_json and distance.samples <= distance.features:
        note(
            f"{distance.samples} pictures are few for {distance.features} features. The value depends on their number; "
            "compare it with the floor."
        )


@eval.command("clip", cls=Command)
def clip(
    folder: Annotated[Path, typer.Argument(help="Pictures: a folder, or the beginning of its name.")],
    prompts: Annotated[
        Path,
        typer.Argument(
            help="A text file with one line per picture, in the order of the names; or a folder with NAME.txt files."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Name of a model in open_clip; or a folder of a CLIPModel and its processor.")
    ] = "ViT-B-32",
    pretrained: Annotated[
        str | None,
        typer.Option(help="A tag of open_clip's weights (openai if not given), or the file of a checkpoint."),
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Print the CLIP score, 100 · max(cos, 0), which measures how well the pictures of a folder fit their prompts.

    Example:
        diffcache eval clip pictures prompts.txt --model ViT-B-32
        diffcache eval clip pictures prompts.txt --model my-clip
    """
    _check_least(batch_size=(batch_size, 1))
    from diffcache.eval import folders

    paths = folders.pictures(folder)
    texts = folders.prompts(prompts, paths)
    import numpy as np

    from diffcache.eval.alignment import ClipScore, by_chance, score

    judge = ClipScore(model, pretrained, device=_device(device), batch_size=batch_size)
    images, words = [], []
    done = 0
    for batch in folders.batches(paths, batch_size):
        image, text = judge.embedded(batch, texts[done : done + len(batch)])
        images.append(image)
        words.append(text)
        done += len(batch)
    image, text = np.concatenate(images), np.concatenate(words)
    values = score(image, text)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    chance = by_chance(image, text, texts)
    if as_json:
        named = {path.name: float(value) for path, value in zip(paths, values, strict=True)}
        tree: dict[str, Any] = {"name": judge.title, "value": float(values.mean()), "standard_error": error}
        typer.echo(json.dumps(tree | {"samples": len(values), "floor": chance, "values": named}))
        return
    line = f"{judge.title} {values.mean():.5g}{'' if error is None else f' ± {error:.2g}'}  N {len(values)}"
    floor = "unknown (one prompt for all)" if chance is None else f"{chance:.5g} (prompts of other pictures)"
    typer.echo(f"{line}  floor {floor}")


def _check_least(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise BadOption(name, value, f"{least} or more")


def _device(name: str | None) -> torch.device:
    import torch

    from diffcache.eval.requirements import device_named

    return device_named(name or ("cuda" if torch.cuda.is_available() else "cpu"))
