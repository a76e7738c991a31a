"""``diffcache plan``: make a schedule from a profile and a budget, without calling a network."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from diffcache import planning, registry, schedulers
from diffcache.cli._goal import goal
from diffcache.cli._options import Computed, MaxErrorDb, Memory, MemoryBytes, MinPsnr, Speedup, either
from diffcache.cli._printing import remark, table, use_next
from diffcache.documents.destinations import check_file
from diffcache.documents.expected import decibels
from diffcache.documents.profile import Profile
from diffcache.errors import BadOption, Unusable

DEFAULT = "closed_loop"
ANY, WITHOUT, NOTHING = "any profile", "no profile", "–"


def plan(
    context: typer.Context,
    profile: Annotated[Path | None, typer.Argument(help="A profile, as `diffcache profile` writes it.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Name of a scheduler, options behind a colon: meancache:gamma=4. See --list.")
    ] = None,
    computed: Computed = None,
    steps: Annotated[float | None, typer.Option("--steps", hidden=True)] = None,  # the old name of --computed
    speedup: Speedup = None,
    min_psnr_db: MinPsnr = None,
    max_error_db: MaxErrorDb = None,
    memory: Memory = None,
    memory_bytes: MemoryBytes = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Format of kept outputs: bf16, int8, fp8, int4; auto: for each site the one with which all fit into "
            "--memory at the least error. Without it, as they are."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output file of the schedule.")] = Path("schedule.safetensors"),
    list_: Annotated[
        bool,
        typer.Option("--list", help="List all methods and rules, or describe --scheduler NAME. Plans nothing."),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Plan with every scheduler and sort by expected PSNR. Writes nothing."),
    ] = False,
) -> None:
    """Plan a schedule from a profile: which steps are computed, and how the others are predicted.

    No network is called. With the pipeline at hand, diffcache optimize fits the plan to full runs and reaches more.

    Example:
        diffcache plan profile.safetensors --computed 10 --out ten.safetensors
        diffcache plan profile.safetensors --computed 10 --compare
        diffcache plan --list
    """
    if list_:
        _list(scheduler)
        return
    if profile is None:
        raise BadOption("profile", None, "the file of a profile, or --list")
    budget = goal(
        computed=either("--computed", computed, "--steps", steps),
        speedup=speedup,
        min_psnr_db=min_psnr_db,
        max_error_db=max_error_db,
        memory=memory,
        memory_bytes=memory_bytes,
    )
    if compare:
        _demand_comparable(context)
        _print_comparison(planning.compare(Profile.load(profile), budget))
        return
    scheduler = scheduler or DEFAULT
    check_file("out", out)
    planning.check_scheduler(scheduler)
    schedule = planning.plan(Profile.load(profile), scheduler, budget, store=store)
    typer.echo(schedule.describe())
    typer.echo(f"written to {schedule.save(out)}")
    use_next(out)


def _demand_comparable(context: typer.Context) -> None:
    """Raise BadOption if an option is given that has no effect with --compare."""
    sources = {name: context.get_parameter_source(name) for name in ("scheduler", "store", "out")}
    given = [f"--{name}" for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    if given:
        raise Unusable(
            "--compare",
            f"it plans with every scheduler and writes no file, and {' and '.join(given)} was given too",
            "Use --compare with a profile, one goal and --memory only",
        )


def _list(scheduler: str | None) -> None:
    """Print all schedulers by group, or the options and the source of one scheduler."""
    found = {one.name: one for one in planning.available()}
    if scheduler is not None:
        typer.echo(_description(scheduler, found))
        return
    models = sorted({model for one in found.values() for model in one.demo_db})
    decibels = [f"{model} dB" for model in models]
    groups = {group: [_row(one, models) for one in found.values() if one.group == group] for group in schedulers.GROUPS}
    empty = [WITHOUT, *(NOTHING for _ in models)]
    rules = [[name, *empty, _summary(name)] for name in schedulers.rules()]
    token_rules = [[name, *empty, summary] for name, summary in _token_rules().items()]
    remark(
        f"PSNR on the demo models in dB, {planning.DEMO_STEPS}. Start with {DEFAULT}. With the pipeline at hand, "
        "diffcache optimize fits the plan to full runs and reaches more. Options and source of one: "
        "diffcache plan --list --scheduler NAME"
    )
    table(
        ["scheduler", "needs", *decibels, "summary"],
        groups
        | {
            'rules, without a profile: accelerate(pipe, "uniform:every=2")': rules,
            'language models, without a profile: accelerate(model, "dkv:refresh=8")': token_rules,
        },
        right=decibels,
    )


def _description(spec: str, found: Mapping[str, planning.Scheduler]) -> str:
    """Return the options of a name as a scheduler, a rule and a token rule, as far as it is one of them.

    Raises:
        UnknownName: It is none of them.
    """
    name, _, rest = spec.partition(":")
    plain, options = name.lower().replace("-", "_"), registry.options(spec, rest)
    planner, rule = (schedulers.canonical(name, options, kind)[0] for kind in ("plan", "rule"))
    parts = []
    if planner in found:
        parts.append(_described(found[planner]))
    if rule in schedulers.rules():
        module = registry.load(schedulers.__name__, rule)
        parts.append(_rule_described(module, module.rule, "a rule without a profile: accelerate(pipe, {})", rule))
    if plain in _token_rules():
        module = registry.load("diffcache.tokens.rules", plain)
        parts.append(_rule_described(module, module.fresh, "a rule for language models: accelerate(model, {})", plain))
    if not parts:
        schedulers.parse_spec(spec, "plan")  # raises the error that lists the schedulers
    return "\n".join(parts)


def _rule_described(module: ModuleType, function: Callable[..., Any], title: str, name: str) -> str:
    """Return the options and the source of a rule.

    Args:
        module: The file of the rule.
        function: Its function. The keyword-only arguments are the options.
        title: What the rule is, with a place for its name.
        name: The name.
    """
    parameters = inspect.signature(function).parameters.values()
    options = ", ".join(f"{p.name}={p.default}" for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
    summary = (module.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    quoted = f'"{name}"'
    lines = [title.format(quoted), summary, f"options: {options or 'none'}", f"source: {module.SOURCE}"]
    return "\n".join([name, *(f"  {line}" for line in lines)])


def _described(one: planning.Scheduler) -> str:
    """Return the options and the source of a scheduler."""
    options = ", ".join(f"{option}={default}" for option, default in one.options.items())
    lines = [one.summary, f"needs: {one.needs or ANY}", f"options: {options or 'none'}", f"source: {one.source}"]
    return "\n".join([one.name, *(f"  {line}" for line in lines)])


def _print_comparison(found: list[planning.Compared]) -> None:
    """Print the results of all schedulers for one profile, best first."""
    rows = []
    for one in found:
        schedule = one.schedule
        if schedule is None:
            rows.append([one.name, NOTHING, NOTHING, f"cannot plan: {one.reason}"])
            continue
        computed = f"{schedule.computed_steps:g}"
        expected = schedule.expected
        if expected is None:
            rows.append([one.name, computed, NOTHING, "the final state of such a schedule is not simulated"])
        else:
            note = str(expected).removeprefix(f"{decibels(expected.mean_db)}, ")
            rows.append([one.name, computed, f"{expected.mean_db:.1f}", note])
    table(["scheduler", "computed steps", "expected dB", "note"], {"": rows}, right=["computed steps", "expected dB"])


def _row(one: planning.Scheduler, models: list[str]) -> list[str]:
    decibels = (f"{one.demo_db[model]:.1f}" if model in one.demo_db else NOTHING for model in models)
    return [one.name, one.needs or ANY, *decibels, one.summary]


def _token_rules() -> dict[str, str]:
    """Return token rule -> its summary. The files are read and not imported, because their package imports torch."""
    files = resources.files("diffcache").joinpath("tokens", "rules").iterdir()
    texts = {file.name[:-3]: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".py")}
    found = {name: ast.get_docstring(ast.parse(text)) or "" for name, text in texts.items() if name[0] != "_"}
    return {name: found[name].partition("\n\n")[0].replace("\n", " ") for name in sorted(found)}


def _summary(name: str) -> str:
    return (registry.load(schedulers.__name__, name).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
