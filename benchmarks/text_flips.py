"""Compare what a token profile predicts with real decodes of the text model: differing tokens, speed-up, work.

    python benchmarks/text_flips.py --prompts 64 --calibration 24 --length 128

For each task, a profile is measured on prompts that are not compared. For each share of the work, the plan with the
fewest predicted flips is taken. A budget of work does not depend on times. Some token rules follow. The held-out
prompts are decoded in full and with all of them, batch by batch. ``results/text-flips.json`` keeps every batch, and
``--work`` the profiles. A run that is stopped goes on there. Other weights, profiles or settings begin anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffcache
from diffcache import Budget, Loop, TokenProfile, TokenSchedule
from diffcache.assets.text import FOLDER, TextModel, is_exact, load_text, text_calls
from diffcache.assets.text_tasks import TASKS
from diffcache.errors import Unusable
from diffcache.eval import evaluate_text, token_method
from diffcache.planning import token_plans
from diffcache.tokens import TokenRule

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "text-flips.json"
WORK = (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 8)  # 1 / the share of the forwards' work
RULES = ("dkv:refresh=8", "dkv:refresh=32", "prefix:block=32", "vicinity:block=32", "dual:block=32")
QUANTITIES = {  # name -> its heading
    "differing": "differing",
    "speedup": "speed-up",
    "computed": "computed",
}


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation. Equal values have the mean of their ranks. None if all values are equal."""
    ranks = []
    for values in (one, other):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts + 1) / 2)[group])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def profile_of(loop: Loop, task: str, given: argparse.Namespace, weights: str) -> TokenProfile:
    """Return the profile of a task, measured or from the folder ``--work``."""
    settings = [weights, task, given.calibration, given.length, given.batch, given.bf16]
    file = Path(given.work) / f"{task}-{digest(settings)[:12]}.safetensors"
    if not file.exists():
        calls = text_calls(task, given.calibration, length=given.length, batch_size=given.batch, seed=1)
        found = diffcache.measure(loop, calls)
        if not isinstance(found, TokenProfile):
            raise TypeError(type(found).__name__)
        file.parent.mkdir(parents=True, exist_ok=True)
        found.save(file)
    return TokenProfile.load(file)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def weights_digest() -> str:
    """Return the SHA-256 of the weights of the text model."""
    found = hashlib.sha256()
    for file in sorted(FOLDER.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def candidates(profile: TokenProfile) -> dict[str, TokenSchedule | str]:
    """Return the plan with the fewest predicted flips for each share of the work once, and the rules."""
    found: dict[str, TokenSchedule | str] = {}
    seen = set()
    for factor in WORK:
        try:
            plan = token_plans(profile, Budget(computed_steps=profile.forwards / factor))[0]
        except Unusable as error:
            print(f"1/{factor:g} of the work: {error}", flush=True)
            continue
        if (key := (plan.fresh, plan.weight, plan.starts)) not in seen:
            seen.add(key)
            found[f"plan, 1/{factor:g} of the work"] = plan.schedule(profile)
    return {**found, **{rule: rule for rule in RULES}}


def predicted(loop: Loop, source: TokenSchedule | str | TokenRule, profile: TokenProfile) -> dict[str, float]:
    """Return the quantities that the profile predicts."""
    found = diffcache.estimate(loop, source, profile=profile)
    return {"differing": found.flips, "speedup": found.speedup, "computed": found.compute_fraction}


def decoded(loop: Loop, sources: Mapping[str, TokenSchedule | str], call: Mapping[str, Any]) -> dict[str, Any]:
    """Decode one batch in full and with every method, and return the quantities of each."""
    methods = [token_method(name, source) for name, source in sources.items()]
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate_text(loop, methods, [call], score=is_exact, out=folder)
    return {
        one.name: {
            "differing": 1 - one.same_tokens,
            "speedup": one.speedup,
            "computed": one.computed,
            "right": one.exact[0] if one.exact else 0.0,
        }
        for one in found.results
    }


def run(model: TextModel, task: str, given: argparse.Namespace, cells: dict[str, Any]) -> None:
    """Add the batches of a task that are missing to ``cells``, and write the file after each."""
    loop = Loop(model.network, model.sample)
    weights = weights_digest()
    profile = profile_of(loop, task, given, weights)
    print(f"{task}\n{profile}", flush=True)
    sources = candidates(profile)
    key = f"{task}, {2 * given.length} positions, batch {given.batch}{', bfloat16' * given.bf16}"
    named = {name: one.digest() if isinstance(one, TokenSchedule) else one for name, one in sources.items()}
    made_of = digest([weights, profile.digest(), named])
    if cells.get(key, {}).get("made_of") != made_of:
        cells[key] = {
            "made_of": made_of,
            "calibration": given.calibration,
            "batch": given.batch,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "predicted": {name: predicted(loop, source, profile) for name, source in sources.items()},
            "batches": [],
        }
    calls = text_calls(task, given.prompts, length=given.length, batch_size=given.batch, seed=2)
    calls = [call for call in calls if len(call["prompt"]) == given.batch]
    done = cells[key]["batches"]
    for call in calls[len(done) :]:
        done.append(decoded(loop, sources, call))
        FILE.write_text(json.dumps(cells, indent=1) + "\n")
        print(f"{key}: {len(done)} of {len(calls)} batches", flush=True)


def real(cell: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return the quantities of a method over all batches: means, and the median speed-up."""
    batches = [batch[name] for batch in cell["batches"]]
    found = {what: statistics.fmean(one[what] for one in batches) for what in ("differing", "computed", "right")}
    return {**found, "speedup": statistics.median(one["speedup"] for one in batches)}


def correlations(cell: Mapping[str, Any], names: Sequence[str]) -> dict[str, float | None]:
    """Return the rank correlation of each quantity, predicted and real, over methods of these names."""
    return {
        what: spearman([cell["predicted"][n][what] for n in names], [real(cell, n)[what] for n in names])
        for what in QUANTITIES
    }


def page(cells: Mapping[str, Any]) -> str:
    """Return the tables of all cells as Markdown."""
    lines = [
        "# Predicted and real decodes of the text model",
        "",
        "`python benchmarks/text_flips.py`. A *plan* has the fewest predicted flips for its share of the work, and is",
        "not tried on prompts. A *forecast* is what `estimate` returns; *real* is measured on held-out prompts.",
        "Forecasts of differing tokens are those that differ at their commit. Real ones include the later tokens that",
        "differ because of them. So the rank correlation (Spearman) counts more than the values.",
    ]
    for key, cell in sorted(cells.items()):
        if not cell["batches"]:
            continue
        prompts = len(cell["batches"]) * cell["batch"]
        lines += [
            "",
            f"## {key.capitalize()}",
            "",
            f"{prompts} held-out prompts, {cell['calibration']} prompts in the profile, {cell['threads']} threads, "
            f"torch {cell['torch']}. Right answers of the full loop: {real(cell, 'full run')['right']:.1%}.",
            "",
            "| method | differing: forecast | real | speed-up: forecast | real | computed: forecast | real | right |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, one in cell["predicted"].items():
            other = real(cell, name)
            lines.append(
                f"| {name} | {one['differing']:.2%} | {other['differing']:.2%} | {one['speedup']:.2f}x | "
                f"{other['speedup']:.2f}x | {one['computed']:.1%} | {other['computed']:.1%} | {other['right']:.1%} |"
            )
        names = list(cell["predicted"])
        plans = [name for name in names if name.startswith("plan")]
        lines += ["", f"| rank correlation | {' | '.join(QUANTITIES.values())} |", "|---|---:|---:|---:|"]
        for title, some in ((f"{len(plans)} plans", plans), (f"{len(names)} plans and rules", names)):
            found = correlations(cell, some)
            shown = ("all equal" if value is None else f"{value:.2f}" for value in found.values())
            lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the batches that are missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts of each task")
    parser.add_argument("--calibration", type=int, default=24, help="prompts of the profile")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt; half a canvas")
    parser.add_argument("--batch", type=int, default=8, help="prompts of a call")
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--bf16", action="store_true", help="run the network in bfloat16")
    parser.add_argument("--work", default="text-flips", help="folder of the profiles")
    given = parser.parse_args()
    model = load_text()
    if given.bf16:
        model.network.to(torch.bfloat16)
    cells = json.loads(FILE.read_text()) if FILE.exists() else {}
    for task in given.task:
        run(model, task, given, cells)
    (RESULTS / "text-flips.md").write_text(page(cells))
    print(page(cells))


if __name__ == "__main__":
    main()
