"""A loop of your own. The cache finds its way by three names in it: `transformer`, `scheduler`, `progress_bar`."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DiTPipeline, ImagePipelineOutput

from diffcache import accelerate, report


class MyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler, vae):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)  # any module can be the first

    @torch.no_grad()
    def __call__(self, latents, labels, num_inference_steps=50, guidance=4.0):
        x, labels = latents.to(self.device), labels.to(self.device)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):  # `with self.progress_bar(total=…):` does as well
            asked = (labels, torch.full_like(labels, 1000))  # two branches: the class, and none
            a, b = (self.transformer(x, timestep=t.expand(len(x)), class_labels=y).sample for y in asked)
            x = self.scheduler.step((b + guidance * (a - b))[:, : x.shape[1]], t, x).prev_sample  # ends the step
        pixels = self.vae.decode(x / self.vae.config.scaling_factor).sample.permute(0, 2, 3, 1) / 2 + 0.5
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels.clamp(0, 1).cpu().numpy()))


def main(pipe, calls, out):
    out.mkdir(parents=True, exist_ok=True)
    accelerate(pipe, "taylorseer:every=3,order=1")  # estimate, optimize and evaluate take the pipeline just as well
    for number, picture in enumerate(picture for call in calls for picture in pipe(**call).images):
        picture.save(out / f"{number}.png")
    print(report(pipe))


if __name__ == "__main__":
    dit = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    calls = [{"latents": torch.randn(4, 4, 32, 32), "labels": torch.tensor([207, 360, 388, 933])}]
    main(MyPipeline(dit.transformer, dit.scheduler, dit.vae).to("cuda"), calls, Path("own-example"))
