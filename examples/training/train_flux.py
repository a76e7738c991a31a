"""Train the text-conditional demo model: a 6 M-parameter Flux transformer on 300 captioned Noto emoji, 64 px.

    python train_flux.py --noto PACKAGE_DIR --vae runs/vae/model --words runs/words.safetensors --out runs/flux

Rectified flow: x_s = (1 - s) x_0 + s noise, the network predicts noise - x_0; one caption in ten is left empty, so that
true classifier-free guidance works too. Resumable: run the same command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import data
import loop
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from diffcache.assets import PromptEncoder, save_grid

LATENT = 16


def build(latent_channels: int, width: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(8, 20, 20),
        guidance_embeds=False,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] -> scaled latents [N, C, 16, 16]."""
    x = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(64)])
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--noto", type=Path, required=True)
    args.add_argument("--vae", type=Path, required=True)
    args.add_argument("--words", type=Path, required=True)
    args.add_argument("--out", type=Path, default=Path("runs/flux"))
    args.add_argument("--minutes", type=float, default=50)
    args.add_argument("--batch", type=int, default=64)
    args.add_argument("--lr", type=float, default=1e-3)
    o = args.parse_args()
    torch.manual_seed(0)

    pictures = data.noto(o.noto)
    chosen = [i for i, s in enumerate(pictures.subcategories) if s in data.DRAWN]
    captions = [pictures.captions[i] for i in chosen]
    vae = AutoencoderKL.from_pretrained(o.vae).eval()
    encoder = PromptEncoder.load(o.words)
    latents = encode(vae, torch.from_numpy(pictures.pixels[chosen]))
    packed = FluxPipeline._pack_latents(latents, len(latents), latents.shape[1], LATENT, LATENT)
    embeds, pooled = encoder(captions)
    positions = FluxPipeline._prepare_latent_image_ids(1, LATENT // 2, LATENT // 2, "cpu", torch.float32)
    text_positions = torch.zeros(embeds.shape[1], 3)
    print(f"{len(captions)} pictures", flush=True)

    model = build(latents.shape[1], embeds.shape[2])

    forward = torch.compile(model)  # the same weights; fused element-wise work

    def loss_of_batch() -> Tensor:
        i = torch.randint(len(packed), (o.batch,))
        keep = (torch.rand(o.batch) > 0.1).float()
        sigma = torch.sigmoid(torch.randn(o.batch))
        clean, noise = packed[i], torch.randn_like(packed[i])
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = forward(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=embeds[i] * keep[:, None, None],
                pooled_projections=pooled[i] * keep[:, None],
                txt_ids=text_positions,
                img_ids=positions,
                return_dict=False,
            )[0]
        return F.mse_loss(predicted.float(), noise - clean)

    average = loop.train(model, loss_of_batch, o.out, minutes=o.minutes, lr=o.lr)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=average,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    average.save_pretrained(o.out / "transformer")
    prompts = [captions[i] for i in torch.linspace(0, len(captions) - 1, 48).long()]
    embeds, pooled = encoder(prompts)
    images = pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=64, width=64, num_inference_steps=50,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    save_grid(images, o.out / "samples.png", columns=12)
    print(prompts)


if __name__ == "__main__":
    main()
