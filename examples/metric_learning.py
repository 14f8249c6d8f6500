"""Embeddings of scikit-learn's digits: triplet margin and cosine embedding losses, Adagrad."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(8)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
groups = [x[:1500][y[:1500] == label] for label in range(10)]


def pick(labels):
    """A random training image of each label."""
    return torch.stack([groups[i][torch.randint(len(groups[i]), ()).item()] for i in labels])


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Hardtanh(), nn.Dropout(0.2), nn.Linear(64, 16)
        )

    def forward(self, x):
        return F.normalize(self.layers(x), dim=1)


model = Embed().to(args.device)
triplet = nn.TripletMarginLoss(margin=0.5)
cosine = nn.CosineEmbeddingLoss(margin=0.2)
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02, lr_decay=1e-3)

for step in range(args.steps):
    same = torch.randint(10, (24,))
    other = (same + torch.randint(1, 10, (24,))) % 10
    stacked = torch.cat([pick(same), pick(same), pick(other)]).to(args.device)
    anchor, positive, negative = model(stacked).chunk(3)
    sign = torch.ones(24, device=args.device)
    loss = triplet(anchor, positive, negative)
    loss = loss + cosine(anchor, positive, sign) + 0.5 * cosine(anchor, negative, -sign)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.eval()
with torch.no_grad():
    known, new = model(x[:1500].to(args.device)), model(x[1500:].to(args.device))
    nearest = (new @ known.T).argmax(1).cpu()
print(f"loss {loss.item():.4f}, {(y[nearest] == y[1500:]).sum()} of {len(new)} nearest are alike")
