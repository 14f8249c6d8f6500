"""A plain recurrent network that continues a sine wave: smooth L1 loss, RMSprop."""

import argparse
import math

import torch
from torch import nn


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(1, 32, nonlinearity="tanh", batch_first=True)
        self.cell = nn.GRUCell(32, 16)
        self.linear = nn.Linear(16, 1)

    def forward(self, x):
        _, hidden = self.rnn(x)
        return self.linear(self.cell(hidden[-1]))


def waves(count, length=20):
    start = torch.rand(count, 1) * 2 * math.pi
    speed = 0.2 + 0.3 * torch.rand(count, 1)
    wave = torch.sin(start + speed * torch.arange(length + 1))
    return wave[:, :-1].unsqueeze(-1), wave[:, -1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(7)
    model = Forecaster().to(args.device)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.002, centered=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.995)
    for step in range(args.steps):
        x, y = waves(32)
        loss = nn.functional.smooth_l1_loss(model(x.to(args.device)), y.to(args.device), beta=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
