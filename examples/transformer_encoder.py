"""PyTorch's own transformer encoder finds the largest number of a padded sequence."""

import argparse

import torch
from torch import nn


class Largest(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(21, width, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(12, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=64, dropout=0.1, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.classify = nn.Linear(width, 21)

    def forward(self, tokens):
        padding = tokens == 0
        x = self.embedding(tokens) + self.positions
        x = self.encoder(x, src_key_padding_mask=padding)
        x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        return self.classify(x.sum(1) / (~padding).sum(1, keepdim=True))


def batch(size):
    tokens = torch.randint(1, 21, (size, 12))
    lengths = torch.randint(3, 13, (size, 1))
    tokens = tokens * (torch.arange(12) < lengths)
    return tokens, tokens.amax(1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(2)
model = Largest().to(args.device)
decay = [p for p in model.parameters() if p.dim() > 1]
rest = [p for p in model.parameters() if p.dim() <= 1]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=2e-3
)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=args.steps + 1)

for step in range(args.steps):
    tokens, largest = (t.to(args.device) for t in batch(32))
    loss = nn.functional.cross_entropy(model(tokens), largest)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()

model.eval()
with torch.no_grad():
    tokens, largest = (t.to(args.device) for t in batch(200))
    accuracy = (model(tokens).argmax(1) == largest).float().mean().item()
print(f"loss {loss.item():.4f}, accuracy {accuracy:.3f}")
