"""The code in the README and in ``docs/`` runs, and the commands in them exist.

The Python blocks of a page run in order, in one namespace and in an empty folder. Comments in front of a block:

    <!-- snippets: pipe -->                  Define names for this page: see ``SETUPS``. Commas separate several.
    <!-- snippets: short pipe -->            The same, with fewer steps and prompts: see ``SHORTER``.
    <!-- snippets: replace "A" by "B" -->    Replace text of this block.
    <!-- not run: reason -->                 Check only the syntax of this block.
    <!-- later: name -->                     The same, until the interface exists. Delete the line then.

A block with ``title="package/file.py"`` is a file that later blocks import. Of a shell block, the ``diffcache``
commands are parsed and not run.
"""

from __future__ import annotations

import ast
import io
import logging
import re
import shlex
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import policies
import pytest
import torch
import typer.main
from pipelines import TINY, fresh
from torch import nn

import diffcache
from diffcache import cli
from diffcache.profiling import Calibration

pytestmark = pytest.mark.filterwarnings("ignore")  # pages show on purpose what is warned of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r'(?P<comments>(?:<!-- [^\n]* -->\n)*)(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"\n]+)")?\n'
    r"(?P<code>.*?)(?P=indent)```",
    re.DOTALL,
)
COMMENT = re.compile(r"<!-- (snippets|not run|later): (.*) -->")
REPLACE = re.compile(r'replace "(.*)" by "(.*)"')
SHORTER = {"28": "8", "50": "10", "100": "10", "10": "4", "14": "5", "12": "4", "16": "3", "17": "5", "20": "7"}
README_SETUP = "short pipe, FluxPipeline, policies, restored"  # where the README itself has no comments
MOST_NOT_RUN = 6


@dataclass(frozen=True)
class Block:
    """A fenced block, with the comments in front of it as (kind, text)."""

    language: str
    title: str | None
    code: str
    line: int
    comments: tuple[tuple[str, str], ...]

    def marked(self, kind: str) -> list[str]:
        return [text for found, text in self.comments if found == kind]

    @property
    def runs(self) -> bool:
        return not self.marked("not run") and not self.marked("later")


def blocks(text: str, *languages: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        if match["language"] in languages:
            line = text[: match.start("code")].count("\n") + 1
            comments = tuple(COMMENT.findall(match["comments"]))
            found.append(Block(match["language"], match["title"], textwrap.dedent(match["code"]), line, comments))
    return found


# ------------------------------------------------------------------ Python


def flux() -> Any:
    """A tiny FluxPipeline that takes prompts as text, and stays on the CPU."""
    pipe = fresh("flux")
    given = TINY["flux"].call(pipe)
    embeds, pooled = given["prompt_embeds"], given["pooled_prompt_embeds"]

    def encode_prompt(prompt: Any = None, **_: Any) -> tuple[Any, ...]:
        texts = [prompt] if isinstance(prompt, str) else list(prompt or [""])
        shift = torch.tensor([len(text) % 7 / 10 for text in texts])
        ids = torch.zeros(embeds.shape[1], 3)
        return embeds[:1] + shift[:, None, None], pooled[:1] + shift[:, None], ids

    pipe.encode_prompt = encode_prompt
    pipe.default_sample_size = given.get("height", 16) // pipe.vae_scale_factor
    pipe.to = lambda *args, **kwargs: pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_pipe(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    prompts = [f"picture {'x' * n}" for n in range(3)]
    names["pipe"] = flux()
    names["prompts"], names["other_prompts"] = prompts, [f"another {prompt}" for prompt in prompts[:2]]
    names["calls"], names["other_calls"] = (
        [
            {"prompt": prompt, "num_inference_steps": 8, "generator": torch.Generator().manual_seed(seed)}
            for seed, prompt in enumerate(texts)
        ]
        for texts in (prompts, names["other_prompts"])
    )
    for name in ("accelerate", "restore", "report"):
        names[name] = getattr(diffcache, name)


def with_schedule(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    names["schedule"] = diffcache.optimize(names["pipe"], names["calls"], 4)


def with_schedule_file(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    with_schedule(names, patch)
    for file in ("schedule.safetensors", "flux-dev-28-10.safetensors"):
        names["schedule"].save(file)
    names["metrics"] = SimpleNamespace(count=lambda name, times: None)


def with_flux_pipeline(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    def from_pretrained(model: str, *, torch_dtype: Any = None, **kwargs: Any) -> Any:
        assert "/" in model
        assert not kwargs
        return flux()

    patch.setattr(diffusers.FluxPipeline, "from_pretrained", from_pretrained)
    Path("prompts.txt").write_text("".join(f"picture {'x' * n}\n" for n in range(5)))


def with_policy(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    Path("examples").symlink_to(ROOT / "examples")
    kind = type(policies.diffusion_policy())
    patch.setattr(kind, "load", classmethod(lambda cls, path: policies.diffusion_policy()))
    patch.setitem(sys.modules, "model", sys.modules[kind.__module__])


def with_policies(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """The names on the page about policies and loops."""

    class Network(nn.Linear):
        def forward(self, x: Any, t: Any, *condition: Any) -> Any:
            return super().forward(x) * t + sum(condition)

    network, timesteps = Network(4, 4).requires_grad_(False), torch.linspace(1, 0, 9)[:-1]

    def sample(cond: Any) -> Any:
        x = torch.randn(1, 4)
        with diffcache.trajectory(network, timesteps):
            for t in timesteps:
                x = x - 0.1 * network(x, t, cond)
        return x

    observed = torch.randn(3, 1, 2, policies.OBS, generator=torch.Generator().manual_seed(0))
    names |= {"policy": policies.diffusion_policy(), "obs": observed[0], "recorded": list(observed), "network": network}
    names |= {"timesteps": timesteps, "x": torch.randn(1, 4), "dt": 0.1, "prompt": 0.1, "empty": 0.0}
    names |= {"guidance_end": 0.2, "sample": sample, "conditions": [0.1, 0.2, 0.3], "diffcache": diffcache}
    names["accelerate"] = diffcache.accelerate


def with_language_model(names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """A language model with random weights, a decoding loop and a prompt."""
    pytest.importorskip("transformers")
    import decoders

    model = decoders.decoder()
    names |= {"model": model, "prompt": decoders.prompts(1), "decode": decoders.decode}
    names["sample"] = lambda prompt, per_step=1: decoders.decode(model, prompt, per_step=per_step)[0]
    names["prompts"] = [decoders.prompts(2, seed=seed) for seed in range(2)]
    names["is_right"] = lambda row: int(row[-1]) == 1


SETUPS: dict[str, Callable[[dict[str, Any], pytest.MonkeyPatch], None]] = {
    "pipe": with_pipe,
    "schedule": with_schedule,
    "schedule file": with_schedule_file,
    "FluxPipeline": with_flux_pipeline,
    "policy": with_policy,
    "policies": with_policies,
    "language model": with_language_model,
    "restored": lambda names, patch: names.__setitem__("restored", True),  # each block begins without a schedule
}


def shorter(code: str) -> str:
    """Return code with the numbers of ``SHORTER`` replaced. Text in quotes stays."""
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        tokens.append((token.type, SHORTER.get(token.string, token.string) if token.type == 2 else token.string))
    return tokenize.untokenize(tokens)


def run_page(text: str, name: str, patch: pytest.MonkeyPatch, setup: str = "") -> int:
    """Run the Python blocks of a page, and return their number.

    Raises the error of a block, with the line in the page as a note of the traceback.
    """
    names: dict[str, Any] = {"__name__": "page"}
    short = False
    modules = set(sys.modules)
    patch.syspath_prepend(str(Path.cwd()))
    ran = 0
    try:
        for number, block in enumerate(blocks(text, "python")):
            ast.parse(block.code)
            code, wanted = block.code, [setup] if setup and not number else []
            for directive in block.marked("snippets"):
                if replaced := REPLACE.fullmatch(directive):
                    assert replaced[1] in code, f"{name}:{block.line} does not hold {replaced[1]!r}"
                    code = code.replace(replaced[1], replaced[2])
                else:
                    wanted.append(directive)
            for directive in wanted:
                short = directive.startswith("short ")
                for one in directive.removeprefix("short ").split(", "):
                    SETUPS[one](names, patch)
            if not block.runs:
                continue
            if block.title:
                path = Path(block.title)
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / "__init__.py").touch()
                path.write_text(code)
                continue
            if names.get("restored"):
                for value in list(names.values()):
                    if isinstance(value, (nn.Module, diffusers.DiffusionPipeline)):
                        diffcache.restore(value)
            source = compile("\n" * (block.line - 1) + (shorter(code) if short else code), name, "exec")
            exec(source, names)
            ran += 1
    finally:
        for module in set(sys.modules) - modules:
            if module.partition(".")[0] == "my_package":
                del sys.modules[module]
    return ran


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _few_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Search briefly, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Calibration.schedule.__kwdefaults__, "fits", 1)
    torch._dynamo.reset()
    logger = logging.getLogger("diffcache")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before  # a page adds a handler
    torch._dynamo.reset()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "python")], ids=label)
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    commented = any(block.comments for block in blocks(text, "python"))
    run_page(text, label(page), monkeypatch, README_SETUP if page.name == "README.md" and not commented else "")


def test_every_block_that_is_not_run_has_a_reason_and_they_are_few() -> None:
    reasons = [r for p in PAGES for b in blocks(p.read_text(), "python") for r in b.marked("not run")]
    assert all(len(reason.split()) > 2 for reason in reasons)
    assert len(reasons) <= MOST_NOT_RUN


PLANTED = """
<!-- snippets: pipe -->
```python
pipe = accelerate(pipe, "uniform:every=2")
```

```python
{}
```
"""


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ('pipe("a", num_inference_steps=2)', None),
        ('pipe("a", steps=2)', TypeError),
        ('restore(pipe); accelerate(pipe, "uniform:each=2")', diffcache.DiffCacheError),
        ("restore(pipe); accelerate(pipe, 'full', stored='int8')", TypeError),
        ("from diffcache import accelerated_run", ImportError),
        ("report(pipe).reason", AttributeError),
    ],
)
def test_a_wrong_snippet_fails(code: str, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PLANTED.format(code)
    if error is None:
        assert run_page(text, "planted", monkeypatch) == 2
    else:
        with pytest.raises(error):
            run_page(text, "planted", monkeypatch)


# ------------------------------------------------------------------ commands


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words after ``diffcache`` of every such command in shell code."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((n for n, word in enumerate(words) if word in ("&&", "||", "|", ";")), len(words))
            one, words = words[:end], words[end + 1 :]
            starts = [n for n, word in enumerate(one) if word.rpartition("/")[2] == "diffcache"]
            if starts and (starts[0] == 0 or one[starts[0] - 1] == "-m"):
                yield one[starts[0] + 1 :]


def parse(words: list[str]) -> None:
    """Parse a command line as ``diffcache`` does, without running it."""
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("diffcache", list(words))
    rest = [*getattr(context, "_protected_args", getattr(context, "protected_args", [])), *context.args]
    while hasattr(group, "commands"):
        name, group, rest = group.resolve_command(context, rest)
        context = group.make_context(name, rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "sh", "bash")], ids=label)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "sh", "bash"):
        for words in commands(block.code) if block.runs else ():
            parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "diffcache plan p.safetensors --computed-step 10",
        "diffcache plan p.safetensors --computed ten",
        "diffcache planned p.safetensors",
        "diffcache eval runs m s",
        "pip install diffcache && diffcache show",
        "torchrun --nproc_per_node 4 -m diffcache profile",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    found = list(commands(line))
    assert len(found) == 1
    with pytest.raises(BaseException, match=r"."):  # click's or typer's own class
        parse(found[0])


def test_a_right_command_is_parsed() -> None:
    (words,) = commands("diffcache plan p.safetensors \\\n  --computed 10  # a comment")
    parse(words)
