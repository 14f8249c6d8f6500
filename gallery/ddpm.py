"""A denoising diffusion model of diffusers: U-Net, DDPM scheduler, moving average, a few samples."""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()

torch.manual_seed(0)
model = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
noise_scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="linear")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 1, args.steps)
ema = EMAModel(model.parameters(), decay=0.99)

for step in range(args.steps):
    clean = torch.rand(4, 1, 8, 8) * 2 - 1
    noise = torch.randn_like(clean)
    timesteps = torch.randint(0, 100, (4,))
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    loss = F.mse_loss(model(noisy, timesteps).sample, noise)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    ema.step(model.parameters())
    print(f"step {step}: loss {loss.item():.4f}")

ema.copy_to(model.parameters())
sampler = DDIMScheduler.from_config(noise_scheduler.config)
sampler.set_timesteps(2)
images = torch.randn(2, 1, 8, 8)
with torch.no_grad():
    for t in sampler.timesteps:
        images = sampler.step(model(images, t).sample, t, images).prev_sample
print(f"mean of the samples {images.mean().item():.4f}")
