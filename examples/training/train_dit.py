"""Train the class-conditional demo model: a 5 M-parameter DiT on 15 classes of Noto emoji, 64 px.

    python train_dit.py --noto PACKAGE_DIR --vae runs/vae/model --out runs/dit --minutes 50

Velocity prediction on a cosine noise schedule; one label in ten becomes the null class, for classifier-free guidance.
Resumable: run the same command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import data
import loop
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from diffcache.assets import save_grid

NULL_CLASS = 1000  # DiTPipeline hard-codes ImageNet's null label


def build(latent_channels: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        sample_size=16,
        patch_size=2,
        num_layers=5,
        num_attention_heads=4,
        attention_head_dim=48,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )


def noise_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] -> scaled latents [N, C, 16, 16]; DiTPipeline knows no shift."""
    x = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(64)]) * vae.config.scaling_factor


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--noto", type=Path, required=True)
    args.add_argument("--vae", type=Path, required=True)
    args.add_argument("--out", type=Path, default=Path("runs/dit"))
    args.add_argument("--minutes", type=float, default=50)
    args.add_argument("--batch", type=int, default=64)
    args.add_argument("--lr", type=float, default=1e-3)
    o = args.parse_args()
    torch.manual_seed(0)

    names = list(data.CLASSES)
    label_of = {sub: names.index(name) for name, subs in data.CLASSES.items() for sub in subs}
    pixels, labels = [], []
    pictures = data.noto(o.noto)
    for i, sub in enumerate(pictures.subcategories):
        if sub in label_of:
            pixels.append(torch.from_numpy(pictures.pixels[i].copy()))
            labels.append(label_of[sub])
    vae = AutoencoderKL.from_pretrained(o.vae).eval()
    latents, label = encode(vae, torch.stack(pixels)), torch.tensor(labels)
    mirrored = encode(vae, torch.stack(pixels).flip(2))
    by_class = [torch.nonzero(label == c).flatten() for c in range(len(names))]
    print({name: len(members) for name, members in zip(names, by_class, strict=True)}, flush=True)

    # eval(): the label dropout inside DiT would drop the label of each block on its own.
    model = build(latents.shape[1]).eval()
    forward = torch.compile(model)  # the same weights; fused element-wise work
    alphas = noise_scheduler().alphas_cumprod

    def loss_of_batch() -> Tensor:
        c = torch.randint(len(names), (o.batch,))  # classes weigh the same, large or small
        i = torch.stack([members[torch.randint(len(members), ())] for members in (by_class[k] for k in c)])
        clean = torch.where((torch.rand(o.batch) < 0.5)[:, None, None, None], latents[i], mirrored[i])
        t = torch.randint(len(alphas), (o.batch,))
        signal, spread = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        noise = torch.randn_like(clean)
        shown = torch.where(torch.rand(o.batch) < 0.1, NULL_CLASS, c)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = forward(signal * clean + spread * noise, timestep=t, class_labels=shown).sample
        return F.mse_loss(predicted.float(), signal * noise - spread * clean)

    average = loop.train(model, loss_of_batch, o.out, minutes=o.minutes, lr=o.lr)
    average.save_pretrained(o.out / "transformer")
    pipe = DiTPipeline(average, vae, noise_scheduler(), id2label=dict(enumerate(names)))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        class_labels=[c for c in range(len(names)) for _ in range(6)], guidance_scale=3.0, num_inference_steps=50,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    save_grid(images, o.out / "samples.png", columns=12)


if __name__ == "__main__":
    main()
