"""Swin of transformers classifies images: shifted windows, relative position bias, stochastic depth."""

import argparse

import torch
from transformers import SwinConfig, SwinForImageClassification

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

torch.manual_seed(0)
config = SwinConfig(
    image_size=32,
    patch_size=4,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    drop_path_rate=0.1,
    num_labels=5,
)
model = SwinForImageClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

model.train()
for step in range(args.steps):
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(5, (2,))
    loss = model(pixel_values=images, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
