"""DiT on ImageNet: does acceleration change what is drawn, as a set? FID, with what real pictures themselves get."""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiTPipeline

from diffcache import accelerated, report
from diffcache.eval import extractors, folders
from diffcache.eval.distribution import Distribution

METHODS = ("full", "taylorseer:every=2,order=1", "taylorseer:every=3,order=1")  # rules, or paths of schedules


def main(pipe, calls, out, real, extractor="inception"):
    """``real``: a folder of real pictures. ``extractor``: the network that describes pictures."""
    out.mkdir(parents=True, exist_ok=True)
    distribution, found = Distribution(extractors.load(extractor, device=pipe.device)), {}
    for batch in folders.batches(folders.pictures(real), 32):
        distribution.add(batch, real=True)
    for method in METHODS:
        distribution.reset()  # forgets the method before, not the real pictures
        with accelerated(pipe, method):
            for seed, call in enumerate(calls):  # the same noise for every method
                distribution.add(pipe(**call, generator=torch.Generator("cpu").manual_seed(seed)).images)
            print(report(pipe))
        found[method] = distribution.compute()
        print(f"{method}: {found[method].line()}")
    (out / "distances.json").write_text(json.dumps({name: distance.tree() for name, distance in found.items()}))


if __name__ == "__main__":
    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256", torch_dtype=torch.float16).to("cuda")
    calls = [{"class_labels": [(50 * i + j) % 1000 for j in range(50)], "output_type": "np"} for i in range(200)]
    main(pipe, calls, Path("dit-example"), real=Path(sys.argv[1]))  # 10,000 pictures of every method
