"""FLUX.1-dev: fit a schedule to a handful of prompts once, save it, and draw with it from then on."""

from pathlib import Path

import torch
from diffusers import FluxPipeline

from diffcache import accelerate, optimize, report

COMPUTED = 10  # of 28 steps; diffcache.Budget(speedup=2.5) or Budget(min_psnr_db=40) are goals as well
THINGS = ("a lighthouse", "a fox in the snow", "a market street", "an old sailor")
STYLES = ("a photo of {}", "a watercolour of {}", "{} at night, neon lights", "a pencil drawing of {}, detailed")


def main(pipe, calls, out):
    """The last call is kept for trying; the others are what the schedule is fitted to."""
    *fitted, tried = calls
    out.mkdir(parents=True, exist_ok=True)
    schedule = optimize(pipe, fitted, COMPUTED)  # runs every call once in full, then searches and fits
    print(schedule)  # which steps are computed, and how near to the full run that comes
    schedule.save(out / "schedule.safetensors")  # a small file; once it is there, start below

    accelerate(pipe, out / "schedule.safetensors")
    pipe(**tried).images[0].save(out / "picture.png")
    print(report(pipe))  # what was computed, predicted and kept


if __name__ == "__main__":
    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
    prompts = [style.format(thing) for style in STYLES for thing in THINGS] + ["a glass teapot on a windowsill"]
    calls = [
        {"prompt": prompt, "num_inference_steps": 28, "generator": torch.Generator("cpu").manual_seed(seed)}
        for seed, prompt in enumerate(prompts)
    ]
    main(pipe, calls, Path("flux-example"))
