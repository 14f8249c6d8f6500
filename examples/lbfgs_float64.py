"""A regression on scikit-learn's digits in float64: L-BFGS with a line search, mean squared error."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
digits = load_digits()
x = torch.from_numpy(digits.data[:300] / 16).to(args.device)
x = x - x.mean(0)
y = torch.from_numpy(digits.target[:300]).double().to(args.device)
y = ((y - y.mean()) / y.std()).unsqueeze(1)

model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1)).to(args.device)
optimizer = torch.optim.LBFGS(
    model.parameters(), max_iter=5, history_size=10, line_search_fn="strong_wolfe"
)


def closure():
    optimizer.zero_grad()
    penalty = sum(p.square().sum() for p in model.parameters())
    loss = nn.functional.mse_loss(model(x), y) + 1e-3 * penalty
    loss.backward()
    return loss


for step in range(args.steps):
    loss = optimizer.step(closure)
    print(f"step {step + 1}: loss {loss.item():.17g}")
