"""Wan 2.1, text to video: a rule at every block, its memory reckoned beforehand and halved by keeping int8."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_gif

from diffcache import accelerate, estimate, report

RULE = "uniform:every=2,sites=block"  # needs no calibration; a CacheSchedule or the path of one can stand here
MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def main(pipe, calls, out):
    out.mkdir(parents=True, exist_ok=True)
    for store in ("exact", "int8"):  # runs the first step only
        print(f"{store}: {estimate(pipe, RULE, store=store, **calls[0])}")

    accelerate(pipe, RULE, store="int8")
    for number, call in enumerate(calls):
        frames = pipe(**call).frames[0]
        export_to_gif(frames, str(out / f"{number}.gif"), fps=16)
    print(report(pipe))  # bytes and format of every block in the last run


if __name__ == "__main__":
    vae = AutoencoderKLWan.from_pretrained(MODEL, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(MODEL, vae=vae, torch_dtype=torch.bfloat16).to("cuda")
    size = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
    calls = [
        {"prompt": prompt, "generator": torch.Generator("cpu").manual_seed(0), "output_type": "pil", **size}
        for prompt in ("a heron takes off from a lake in the morning mist", "waves break on a rocky shore")
    ]
    main(pipe, calls, Path("wan-example"))
