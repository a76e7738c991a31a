"""Train the small autoencoder that both demo models share: 64x64x3 pictures <-> 16x16x8 latents.

    python train_vae.py --noto PACKAGE_DIR --fluent PACKAGE_DIR --out runs/vae --minutes 12

Resumable: run the same command again and it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import data
import loop
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

LATENT_CHANNELS = 8
KL = 1e-3  # weight of the latents' divergence from a unit normal, per element


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=data.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences: sharpness enters the loss through them."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(a: Tensor, b: Tensor) -> Tensor:
    return F.l1_loss(a, b) + 2 * sum(F.l1_loss(p, q) for p, q in zip(edges(a), edges(b), strict=True))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--noto", type=Path, required=True)
    args.add_argument("--fluent", type=Path, required=True)
    args.add_argument("--out", type=Path, default=Path("runs/vae"))
    args.add_argument("--minutes", type=float, default=12)
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--lr", type=float, default=2e-3)
    o = args.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    pictures = [data.noto(o.noto), data.fluent(o.fluent, o.noto)]
    pixels = torch.cat([torch.from_numpy(p.pixels) for p in pictures]).permute(0, 3, 1, 2)
    vae = build().to(memory_format=torch.channels_last)

    def loss_of_batch() -> Tensor:
        x = pixels[torch.randint(len(pixels), (o.batch,))].float().div(127.5).sub(1)
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return reconstruction_loss(decoded.float(), x) + KL * posterior.kl().mean() / x[0].numel()

    vae = loop.train(vae, loss_of_batch, o.out, minutes=o.minutes, lr=o.lr, ema_decay=0.99)
    finish(vae, pixels, o.out)


@torch.no_grad()
def finish(vae: AutoencoderKL, pixels: Tensor, out: Path) -> None:
    """Measure the latent scale, save the model in diffusers' layout and draw reconstructions."""
    vae.eval()
    with torch.autocast("cpu", torch.bfloat16):
        sample = pixels[torch.randperm(len(pixels))[:512]].float().div(127.5).sub(1)
        latents = torch.cat([vae.encode(x).latent_dist.mode().float() for x in sample.split(64)])
        decoded = torch.cat([vae.decode(z).sample.float() for z in latents.split(64)])
    mse = ((decoded.clamp(-1, 1) - sample) / 2).square().mean((1, 2, 3))
    print(f"PSNR {(-10 * mse.log10()).mean():.2f} dB, latent mean {latents.mean():.3f}, std {latents.std():.3f}")
    scale, shift = round(1 / latents.std().item(), 4), round(latents.mean().item(), 4)
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    vae.save_pretrained(out / "model")
    rows = torch.cat([sample[:32].reshape(2, 16, 3, 64, 64), decoded[:32].reshape(2, 16, 3, 64, 64)])
    grid = rows.permute(0, 3, 1, 4, 2).reshape(4 * 64, 16 * 64, 3)
    Image.fromarray(grid.add(1).mul(127.5).clamp(0, 255).byte().numpy()).save(out / "reconstructions.png")


if __name__ == "__main__":
    main()
