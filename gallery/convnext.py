"""ConvNeXt of timm with timm's optimizer, schedule and moving average of the weights."""

import argparse

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(
    "convnext_atto",
    pretrained=False,
    num_classes=10,
    depths=(1, 1, 2, 1),
    dims=(8, 16, 24, 32),
    drop_path_rate=0.1,
)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
scheduler = CosineLRScheduler(optimizer, t_initial=args.steps, warmup_t=1, warmup_lr_init=1e-5)
criterion = LabelSmoothingCrossEntropy(0.1)
ema = ModelEmaV3(model, decay=0.99)

model.train()
for step in range(args.steps):
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    loss = criterion(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model, step=step)
    scheduler.step(step + 1)
    print(f"step {step}: loss {loss.item():.4f}")

ema.module.eval()
with torch.no_grad():
    print(ema.module(images).argmax(1).tolist())
