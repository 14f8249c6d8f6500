"""Trains a multilayer perceptron on scikit-learn's digits with the workers that torchrun starts."""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

# The only line that differs from a script for PyTorch, which imports it from torch.nn.parallel.
from reproml.distributed import DistributedDataParallel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--device", default="cpu")
parser.add_argument("--save", metavar="FILE", help="write the weights to this file")
args = parser.parse_args()

os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # without torchrun: a single process
os.environ.setdefault("MASTER_PORT", "0")
if not dist.is_initialized():
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dist.init_process_group("gloo", rank=rank, world_size=size)

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
train = TensorDataset(x[:1500], y[:1500])
sampler = DistributedSampler(train, shuffle=True, seed=0)
loader = DataLoader(train, batch_size=60 // dist.get_world_size(), sampler=sampler)

model = nn.Sequential(
    nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10)
).to(args.device)
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)

step = 0
for epoch in range(args.steps):
    sampler.set_epoch(epoch)
    for inputs, labels in loader:
        inputs, labels = inputs.to(args.device), labels.to(args.device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        step += 1
        if step == args.steps:
            break
    if step == args.steps:
        break

model.eval()
with torch.no_grad():
    correct = (model(x[1500:].to(args.device)).argmax(1).cpu() == y[1500:]).sum().item()
if dist.get_rank() == 0:
    print(f"loss {loss.item():.4f}, {correct} of {len(y) - 1500} right")
    if args.save:
        torch.save(model.module.state_dict(), args.save)
