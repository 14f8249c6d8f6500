"""A convolutional GAN on scikit-learn's digits: two networks, two optimizers."""

import argparse

import torch
import torch.nn as nn
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()
device = torch.device(args.device)


def weights_init(m):
    name = m.__class__.__name__
    if "Conv" in name:
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif "BatchNorm" in name:
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.constant_(m.bias, 0)


torch.manual_seed(999)
images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1

generator = nn.Sequential(
    nn.ConvTranspose2d(16, 32, 2, bias=False),  # 1x1 -> 2x2
    nn.BatchNorm2d(32),
    nn.ReLU(True),
    nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, bias=False),  # -> 4x4
    nn.BatchNorm2d(16),
    nn.ReLU(True),
    nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),  # -> 8x8
    nn.Tanh(),
)
discriminator = nn.Sequential(
    nn.Conv2d(1, 16, 4, stride=2, padding=1),
    nn.LeakyReLU(0.2, inplace=True),
    nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.LeakyReLU(0.2, inplace=True),
    nn.Conv2d(32, 1, 2),
    nn.Sigmoid(),
)
generator.apply(weights_init).to(device)
discriminator.apply(weights_init).to(device)
criterion = nn.BCELoss()
optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))

for step in range(args.steps):
    real = images[torch.randint(len(images), (32,))].to(device)
    noise = torch.randn(32, 16, 1, 1).to(device)
    ones, zeros = torch.ones(32, device=device), torch.zeros(32, device=device)

    discriminator.zero_grad()
    fake = generator(noise)
    loss_real = criterion(discriminator(real).view(-1), ones)
    loss_real.backward()
    loss_fake = criterion(discriminator(fake.detach()).view(-1), zeros)
    loss_fake.backward()
    optimizer_d.step()

    generator.zero_grad()
    loss_g = criterion(discriminator(fake).view(-1), ones)
    loss_g.backward()
    optimizer_g.step()
print(f"discriminator {(loss_real + loss_fake).item():.4f}, generator {loss_g.item():.4f}")
