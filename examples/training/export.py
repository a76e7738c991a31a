"""Put trained networks into the package: bfloat16 safetensors in diffusers' layout, shards below 5 MB.

    python export.py --vae runs/vae/model --flux runs/flux/transformer --dit runs/dit/transformer \\
        --words runs/words.safetensors --noto PACKAGE_DIR --to ../../diffcache/assets/weights
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import data
import torch
import train_dit
from diffusers import AutoencoderKL, DiTTransformer2DModel, FluxTransformer2DModel


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vae", "flux", "dit", "words", "noto"):
        args.add_argument(f"--{name}", type=Path, required=True)
    args.add_argument("--to", type=Path, required=True)
    o = args.parse_args()

    for name, kind, source in (
        ("vae", AutoencoderKL, o.vae),
        ("flux", FluxTransformer2DModel, o.flux),
        ("dit", DiTTransformer2DModel, o.dit),
    ):
        if source.exists():
            shutil.rmtree(o.to / name, ignore_errors=True)
            kind.from_pretrained(source).to(torch.bfloat16).save_pretrained(o.to / name, max_shard_size="4900KB")
            config = o.to / name / "config.json"
            kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
            config.write_text(json.dumps(kept, indent=2) + "\n")  # where it was trained is nobody's business
    train_dit.noise_scheduler().save_pretrained(o.to / "dit")
    shutil.copy(o.words, o.to / "words.safetensors")
    pictures = data.noto(o.noto)
    captions = {c for c, s in zip(pictures.captions, pictures.subcategories, strict=True) if s in data.DRAWN}
    (o.to / "captions.json").write_text(json.dumps(sorted(captions), indent=0) + "\n")
    (o.to / "classes.json").write_text(json.dumps(list(data.CLASSES)) + "\n")
    total = sum(f.stat().st_size for f in o.to.rglob("*") if f.is_file())
    print(f"{total / 1e6:.1f} MB in {o.to}")


if __name__ == "__main__":
    main()
