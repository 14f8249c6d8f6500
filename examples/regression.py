"""Regression on scikit-learn's diabetes data: Huber loss, RMSprop, rate reduced on a plateau."""

import argparse

import torch
from sklearn.datasets import load_diabetes
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(0)
data = load_diabetes(scaled=False)
x = torch.tensor(data.data, dtype=torch.float32)
y = torch.tensor(data.target, dtype=torch.float32).unsqueeze(1)
order = torch.randperm(len(x))
train, test = order[:350], order[350:]
x = (x - x[train].mean(0)) / x[train].std(0)
center, scale = y[train].mean(), y[train].std()
x, y = x.to(args.device), ((y - center) / scale).to(args.device)

model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
for layer in model:
    if isinstance(layer, nn.Linear):
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.normal_(layer.bias, std=0.01)
model.to(args.device)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=20)
criterion = nn.HuberLoss(delta=1.0)

for step in range(args.steps):
    model.train()
    rows = train[torch.randperm(len(train))[:64]]
    loss = criterion(model(x[rows]), y[rows])
    loss += 1e-4 * sum(p.abs().sum() for p in model.parameters())  # a small L1 penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        scheduler.step(criterion(model(x[test]), y[test]))

with torch.no_grad():
    residual = (y[test] - model(x[test])).square().sum()
    r2 = 1 - residual / (y[test] - y[test].mean()).square().sum()
print(f"loss {loss.item():.4f}, R2 {r2.item():.4f}")
