"""Count the full runs that ``optimize`` costs, and compute the minutes that they take in a network of FLUX.1's size.

    python benchmarks/calibration_cost.py
    python benchmarks/calibration_cost.py --model flux-guided
    python benchmarks/calibration_cost.py --again   # the table, from the committed count

Runs ``optimize`` on the Flux demo model, as the README does: 16 prompts, 10 computed steps of 28. It counts every
sample that passes through the network, in the recorded runs, the search and the last fits. 28 of them are one full run,
or 56 with true classifier-free guidance. The seconds of a full run are those of
``results/flux-size-nvidia-h200.json``, twice for two forwards a step. The minutes are their product: they are computed
and not measured. Writes ``results/calibration-cost.md`` and ``.json``, and for the guided model
``results/calibration-cost-flux-guided.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from torch import nn

from diffcache import optimize
from diffcache.assets import MODELS, load
from diffcache.demo.run import machine
from diffcache.documents import files

RESULTS = Path(__file__).parent / "results"
GPU = "flux-size-nvidia-h200.json"
LIKE_FLUX = [name for name, about in MODELS.items() if about.family == "flux"]  # the seconds are of this network


class Counter:
    """Counts the samples that pass through a network.

    Args:
        network: The network. Its first argument, or the argument ``hidden_states``, holds a batch.
    """

    def __init__(self, network: nn.Module) -> None:
        self.samples = 0
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.samples += len(args[0] if args else kwargs["hidden_states"])


def counted(name: str, prompts: int, steps: int, computed: int) -> dict[str, Any]:
    """Run ``optimize`` on a demo model, one call for each prompt, and return what it costs."""
    model = load(name)
    forwards = 1 + model.about.separate_cfg  # of a step
    subjects = [model.subjects[i % len(model.subjects)] for i in range(prompts)]
    calls = [model.call([subject], [seed], steps=steps, output_type="latent") for seed, subject in enumerate(subjects)]
    counter = Counter(model.pipe.transformer)
    model.pipe(**calls[0])
    if counter.samples != steps * forwards:
        raise RuntimeError(f"a full run of {steps} steps passed {counter.samples} samples; expected {steps * forwards}")
    counter.samples = 0
    schedule = optimize(model.pipe, calls, computed, progress=False)
    return {
        "model": name,
        "forwards": forwards,
        "prompts": prompts,
        "steps": steps,
        "computed_steps": computed,
        "samples": counter.samples,
        "full_runs": counter.samples / (steps * forwards),
        "fits": int(schedule.provenance["fits"]),
        "search": schedule.provenance["search"],
        "circumstances": machine(),
    }


def seconds_of_full_run(record: dict[str, Any], steps: int, forwards: int = 1) -> float:
    """Return the median seconds of a full run in a record of ``benchmarks/kernels/flux_size.py``.

    Args:
        record: The record. Its runs have one forward a step.
        steps: Steps of a full run.
        forwards: Forwards of a step. The seconds are multiplied by them.
    """
    if record["steps"] != steps:
        raise ValueError(f"the record has full runs of {record['steps']} steps; pass a count of that many, not {steps}")
    (row,) = (row for row in record["rows"] if row["method"] == "full run")
    return forwards * statistics.median(row["seconds"])


def minutes(count: dict[str, Any], record: dict[str, Any]) -> float:
    """Return the minutes that the counted full runs take."""
    return float(count["full_runs"] * seconds_of_full_run(record, count["steps"], count.get("forwards", 1)) / 60)


def table(count: dict[str, Any], record: dict[str, Any]) -> str:
    forwards = count.get("forwards", 1)  # a count without the field is of the model without guidance
    seconds = seconds_of_full_run(record, count["steps"], forwards)
    model = MODELS[count.get("model", "flux")].short
    twice = "" if forwards == 1 else ", times 2 for the two forwards of a step"
    about = ", ".join(f"{name} {value}" for name, value in count["circumstances"].items())
    return "\n".join(
        [
            "| prompts | computed steps | fits of the search | full runs, recorded | full runs, all "
            "| seconds a full run | minutes, computed |",
            "|---:|---:|---:|---:|---:|---:|---:|",
            f"| {count['prompts']} | {count['computed_steps']} of {count['steps']} | {count['fits']} "
            f"| {count['prompts']} | {count['full_runs']:.0f} | {seconds:.2f} | {minutes(count, record):.0f} |",
            "",
            f"The minutes are the product of the two columns before. They are **computed, not measured**. The full "
            f"runs are counted in `optimize` on the {model} demo model ({about}). The seconds are those of FLUX.1's "
            f"configuration with random weights on an {record['circumstances']['device']}, for one picture of "
            f"{record['network']['pixels']} px, without text encoders and decoder{twice}. The arithmetic of the fits "
            f"is not included.",
        ]
    )


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", choices=LIKE_FLUX, default=LIKE_FLUX[0])
    args.add_argument("--prompts", type=int, default=16)
    args.add_argument("--computed", type=int, default=10, help="computed steps")
    args.add_argument("--out", type=Path, default=RESULTS)
    args.add_argument("--again", action="store_true", help="write the table of the record under --out anew")
    o = args.parse_args()
    record = json.loads((RESULTS / GPU).read_text())
    name = "calibration-cost" if o.model == LIKE_FLUX[0] else f"calibration-cost-{o.model}"
    if o.again:
        count = json.loads((o.out / f"{name}.json").read_text())
    else:
        count = counted(o.model, o.prompts, record["steps"], o.computed)
        files.write(o.out / f"{name}.json", json.dumps(count, indent=1) + "\n")
    text = table(count, record)
    files.write(o.out / f"{name}.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
