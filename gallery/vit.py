"""A vision transformer (ViT) of transformers classifies images: patches, label smoothing, SGD."""

import argparse

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

torch.manual_seed(0)
config = ViTConfig(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout_prob=0.1,
    num_labels=10,
)
model = ViTForImageClassification(config)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)

model.train()
for step in range(args.steps):
    images, labels = torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    images[range(4), 0, labels] = 1.0  # a red line at the height of the label
    logits = model(pixel_values=(images - 0.5) / 0.5).logits
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    print(f"step {step}: loss {loss.item():.4f}")
