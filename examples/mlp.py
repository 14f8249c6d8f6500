"""A multilayer perceptron on scikit-learn's digits: SGD with Nesterov momentum, gradient clipping."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--device", default="cpu")
parser.add_argument("--save", metavar="FILE", help="write the weights here")
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
x = (x - x[:1500].mean()) / x[:1500].std()
train = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=32, shuffle=True)

model = nn.Sequential(
    nn.Linear(64, 64),
    nn.Tanh(),
    nn.Linear(64, 32),
    nn.ReLU(),
    nn.Linear(32, 10),
).to(args.device)
optimizer = torch.optim.SGD(
    model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.5)

step = 0
while step < args.steps:
    for inputs, labels in train:
        inputs, labels = inputs.to(args.device), labels.to(args.device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        step += 1
        if step == args.steps:
            break

model.eval()
with torch.no_grad():
    correct = (model(x[1500:].to(args.device)).argmax(1).cpu() == y[1500:]).sum().item()
print(f"loss {loss.item():.4f}, {correct} of {len(y) - 1500} right")
if args.save:
    torch.save(model.state_dict(), args.save)
