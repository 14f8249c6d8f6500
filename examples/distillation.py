"""A small network learns from a large one (Hinton et al., 2015): KL divergence, weighted classes."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(6)
digits = load_digits()
x = (torch.tensor(digits.data, dtype=torch.float32) / 16).to(args.device)
y = torch.tensor(digits.target).to(args.device)
weight = 1 / torch.bincount(y[:1500]).float()
weight = weight / weight.mean()

teacher = nn.Sequential(nn.Linear(64, 128), nn.Hardswish(), nn.Linear(128, 10)).to(args.device)
student = nn.Sequential(nn.Linear(64, 12), nn.Mish(), nn.Linear(12, 10)).to(args.device)
fast = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9, dampening=0.1)
slow = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.1, fused=True)

for step in range(args.steps):
    rows = torch.randint(1500, (64,))
    fast.zero_grad()
    F.cross_entropy(teacher(x[rows]), y[rows], weight=weight).backward()
    fast.step()

temperature = 3.0
for step in range(args.steps):
    rows = torch.randint(1500, (64,))
    with torch.no_grad():
        soft = F.softmax(teacher(x[rows]) / temperature, dim=1)
    logits = student(x[rows])
    distance = F.kl_div(F.log_softmax(logits / temperature, dim=1), soft, reduction="batchmean")
    loss = temperature**2 * distance + 0.5 * F.cross_entropy(logits, y[rows], label_smoothing=0.05)
    slow.zero_grad()
    loss.backward()
    slow.step()

student.eval()
with torch.inference_mode():
    right = (student(x[1500:]).argmax(1) == y[1500:]).sum().item()
print(f"loss {loss.item():.4f}, {right} of {len(y) - 1500} right")
