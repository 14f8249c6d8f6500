"""A 1d convolutional autoencoder that removes noise: dilated, grouped, strided and transposed."""

import argparse
import math

import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(3)


def batch(size=16, length=64):
    t = torch.linspace(0, 2 * math.pi, length)
    frequency = torch.randint(1, 6, (size, 1))
    phase = torch.rand(size, 1) * 2 * math.pi
    clean = torch.sin(frequency * t + phase).unsqueeze(1)
    return (clean + 0.3 * torch.randn_like(clean)).to(args.device), clean.to(args.device)


model = nn.Sequential(
    nn.Conv1d(1, 16, kernel_size=5, stride=2, padding=2),
    nn.GroupNorm(4, 16),
    nn.SiLU(),
    nn.Conv1d(16, 16, kernel_size=3, padding=2, dilation=2, groups=4),
    nn.ELU(),
    nn.AvgPool1d(2),
    nn.Conv1d(16, 32, kernel_size=3, padding=1),
    nn.LeakyReLU(0.1),
    nn.ConvTranspose1d(32, 16, kernel_size=4, stride=2, padding=1),
    nn.Softplus(),
    nn.ConvTranspose1d(16, 1, kernel_size=3, stride=2, padding=1, output_padding=1),
)
model.to(args.device)
optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3, alpha=0.95, momentum=0.5)

for step in range(args.steps):
    noisy, clean = batch()
    loss = nn.functional.l1_loss(model(noisy), clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: mean absolute error {loss.item():.4f}")
