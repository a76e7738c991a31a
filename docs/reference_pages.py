"""Make the pages of the reference that describe the command line and the methods.

    python docs/reference_pages.py cli       # print a page
    python docs/reference_pages.py methods

``docs/site_hooks.py`` makes them when the site is built, so they cannot differ from the package.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import typer.main

from diffcache import cli, planning, registry, schedulers, tokens

KINDS = {"str": "text", "path": "path", "int": "integer", "float": "number"}  # name of a type -> how the page calls it


def command_line() -> str:
    """Return the page about ``diffcache`` and all its commands."""
    root = typer.main.get_command(cli.app)
    lines = [
        "# Command line",
        "",
        "`diffcache COMMAND --help` shows the same text. An error takes one line and exit status 2; `--debug` at any "
        "position, or `DIFFCACHE_DEBUG=1`, also shows the traceback.",
    ]
    for name, command in commands(root, "diffcache"):
        lines += ["", f"## {name}", "", *described(name, command)]
    return "\n".join(lines) + "\n"


def commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the full name and the click command of every command that runs something."""
    for word, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def described(name: str, command: Any) -> Iterator[str]:
    """Yield the summary, the usage, and tables of the arguments and options of one command."""
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    options = [one for one in shown if one.param_type_name == "option"]
    usage = " ".join([name, *(metavar(one) for one in arguments), *(["[OPTIONS]"] if options else [])])
    summary, _, rest = inspect.cleandoc(command.help or "").partition("\n\n")
    yield from (prose(summary), "", "```text", usage, "```")
    if rest:
        yield from ("", *paragraphs(rest))
    if arguments:
        yield from ("", "| argument | meaning |", "|---|---|")
        yield from (f"| `{metavar(one)}` | {cell(one.help or '')} |" for one in arguments)
    if options:
        yield from ("", "| option | value | default | meaning |", "|---|---|---|---|")
        for one in options:
            names = ", ".join(f"`{word}`" for word in (*one.opts, *one.secondary_opts))
            value = "" if one.is_flag else f"`{kind(one)}`".replace("|", "\\|")
            yield f"| {names} | {value} | {default(one)} | {cell(one.help or '')} |"


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text as Markdown; indented ones and those after ``\\b`` as code."""
    for part in text.split("\n\n"):
        lines = [line for line in part.split("\n") if line.strip() != "\b"]
        if len(lines) < len(part.split("\n")) or all(line.startswith("  ") for line in lines):
            yield from ("```text", *(line.removeprefix("  ") for line in lines), "```", "")
        else:
            yield from (prose(" ".join(lines)), "")


def kind(option: Any) -> str:
    """Return how a value is written: its choices, or the kind of text."""
    type_ = getattr(option, "type", None)  # in click; typer's own parser has an annotation instead
    choices = getattr(type_, "choices", None) or get_args(annotation(option)) or ()
    if choices:
        return "|".join(str(getattr(one, "value", one)) for one in choices)
    name = getattr(type_, "name", None) or getattr(annotation(option), "__name__", "text")
    return KINDS.get(name.lower(), name.lower())


def annotation(option: Any) -> Any:
    """Return the Python type of an option, or None where typer is built on click."""
    return getattr(getattr(option, "type_descriptor", None), "annotation", None)


def metavar(argument: Any) -> str:
    """Return how the usage line shows an argument."""
    text = argument.name.upper() + ("..." if argument.nargs != 1 else "")
    return text if argument.required else f"[{text}]"


def default(option: Any) -> str:
    """Return the default of an option as a cell; empty for None and for switches that are off."""
    value = option.default
    if value is None or value is False or callable(value) or (isinstance(value, (list, tuple)) and not value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def prose(text: str) -> str:
    """Return a help text on one line, without angle brackets that Markdown would take for tags."""
    return " ".join(text.split()).replace("<", "&lt;")


def cell(text: str) -> str:
    """Return a help text as a cell of a table."""
    return prose(text).replace("|", "\\|")


def methods() -> str:
    """Return the page with all schedulers and rules."""
    found = planning.available()
    rules = schedulers.rules()
    models = sorted({model for one in found for model in one.demo_db})
    lines = [
        "# Methods",
        "",
        "Every method is one file of `diffcache/schedulers/`, called what its paper calls it. The names work in "
        "`diffcache.plan(profile, NAME, budget)` and `diffcache plan --scheduler NAME`. Where the column "
        '"without calibration" says yes, the name also works at once, as in `accelerate(pipe, "uniform:every=3")`. '
        "Options follow a colon, with commas: `firstblockcache:threshold=0.1,most=2`.",
        "",
        f"The columns with the demo models' names are the PSNR in dB of the decoded picture, at {planning.DEMO_STEPS}; "
        "–: not measured. They compare methods on small models: measure on yours "
        "([Evaluate](../how-to/evaluate.md)). `optimize`, which needs the pipeline, reaches more than every method "
        "here ([Benchmarks](../benchmarks.md)).",
    ]
    for group in schedulers.GROUPS:
        members = [one for one in found if one.group == group]
        if not members:
            continue
        lines += ["", f"## {group[:1].upper()}{group[1:]}", ""]
        lines += [f"| name | {' | '.join(models)} | needs | without calibration | about | source |"]
        lines += ["|---" * (5 + len(models)) + "|"]
        for one in members:
            decibels = (f"{one.demo_db[model]:.1f}" if model in one.demo_db else "–" for model in models)
            spec = "[yes](#rules-that-need-no-profile)" if one.name in rules else "–"
            about = (one.needs or "any profile", spec, cell(one.summary), source(one.source))
            row = (f"`{one.name}`", *decibels, *about)
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", "## Rules that need no profile", "", "| spec, with its defaults | about |", "|---|---|"]
    for name in rules:
        summary = (registry.load(schedulers.__name__, name).__doc__ or "").partition("\n\n")[0]
        lines.append(f"| `{rule_spec(name)}` | {cell(summary)} |")
    lines += [
        "",
        "## Token rules",
        "",
        'These rules are for [language models](../language-models.md): `accelerate(model, "dkv:refresh=8")`.',
        "",
        "| spec, with its defaults | about | source |",
        "|---|---|---|",
    ]
    for name in tokens.token_rules():
        module = registry.load(tokens.RULES, name)
        summary = (module.__doc__ or "").partition("\n\n")[0]
        lines.append(f"| `{spec_of(name, module.fresh)}` | {cell(summary)} | {source(module.SOURCE) or '–'} |")
    lines += ["", "## Options", "", "| name | options of `plan`, with their defaults |", "|---|---|"]
    for one in found:
        options = ", ".join(f"`{option}={value}`" for option, value in one.options.items())
        lines.append(f"| `{one.name}` | {options or '–'} |")
    return "\n".join(lines) + "\n"


def rule_spec(name: str) -> str:
    """Return the spec of a rule with the defaults of its options."""
    return spec_of(name, registry.load(schedulers.__name__, name).rule)


def spec_of(name: str, function: Callable[..., Any]) -> str:
    """Return the spec of a rule with the defaults of its options, which are the keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    options = [f"{one.name}={one.default}" for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]
    given = [option for option in options if not option.endswith("=None")]
    return f"{name}:{','.join(given)}" if given else name


def source(text: str) -> str:
    """Return a source with links to arXiv."""
    text = text.replace("docs/architecture.md", "[How a schedule is made](../explanation/schedule.md)")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", cell(text))


PAGES = {"reference/cli.md": command_line, "reference/methods.md": methods}


if __name__ == "__main__":
    print({"cli": command_line, "methods": methods}[sys.argv[1]](), end="")
