"""A regression of scikit-learn's diabetes data in float64 by L-BFGS with a line search."""

import argparse

import torch
from sklearn.datasets import load_diabetes
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
data = load_diabetes()
x = torch.from_numpy(data.data).to(args.device)
x = (x - x.mean(0)) / x.std(0)
y = torch.from_numpy(data.target).to(args.device)
y = ((y - y.mean()) / y.std()).unsqueeze(1)

model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).to(args.device)
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
