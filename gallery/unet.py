"""U-Net of diffusers segments images: bilinear upsampling of the logits, cross entropy for each pixel."""

import argparse

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()

torch.manual_seed(0)
model = UNet2DModel(
    sample_size=16,
    in_channels=3,
    out_channels=2,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=args.steps)

for step in range(args.steps):
    images = torch.rand(2, 3, 32, 32)
    masks = (images.mean(1) > 0.5).long()
    small = F.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    logits = model(small, timestep=0).sample
    logits = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    print(f"step {step}: loss {loss.item():.4f}")
