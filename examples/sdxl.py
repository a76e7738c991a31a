"""SDXL: a schedule for the whole U-Net, put to the proof against fewer steps; the result is an HTML report."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from diffcache import evaluate, optimize
from diffcache.eval.methods import fewer_steps

COMPUTED = 12  # of 30 steps
THINGS = ("a lighthouse", "a fox in the snow", "a market street", "an old sailor", "a glass teapot", "a red bicycle")
STYLES = ("a photo of {}", "a watercolour of {}", "{} at night, neon lights", "a pencil drawing of {}", "{}, pop art")


def main(pipe, calls, out):
    """Half of the calls the schedule is fitted to; by the other half it is judged."""
    fitted, judged = calls[::2], calls[1::2]
    out.mkdir(parents=True, exist_ok=True)
    schedule = optimize(pipe, fitted, COMPUTED)
    schedule.save(out / "schedule.safetensors")

    others = [fewer_steps(pipe, COMPUTED), fewer_steps(pipe, COMPUTED, better=True)]  # as much work, without a cache
    found = evaluate(pipe, {"diffcache": schedule}, judged, compare=others, out=out)  # if stopped, goes on next time
    print(found)  # seconds and fidelity to the full run
    print(f"open {found.report}")


if __name__ == "__main__":
    model = "stabilityai/stable-diffusion-xl-base-1.0"
    pipe = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float16, variant="fp16").to("cuda")
    calls = [
        {"prompt": prompt, "num_inference_steps": 30, "generator": torch.Generator("cpu").manual_seed(seed)}
        for seed, prompt in enumerate(style.format(thing) for thing in THINGS for style in STYLES)
    ]
    main(pipe, calls, Path("sdxl-example"))
