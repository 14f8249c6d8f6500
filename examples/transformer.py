"""A small causal transformer that learns to reverse sequences, every part written out."""

import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

TOKENS, LENGTH, WIDTH, HEADS = 12, 13, 32, 4  # 10 digits, a separator, padding that is not scored
SEPARATOR, PADDING = 10, 11


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, n, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        position = torch.arange(LENGTH).unsqueeze(1)
        rate = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
        table = torch.zeros(LENGTH, WIDTH)
        table[:, 0::2], table[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)
        self.register_buffer("positions", table)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, tokens):
        x = self.embedding(tokens) * math.sqrt(WIDTH) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(11)
model = Transformer().to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
for step in range(args.steps):
    digits = torch.randint(10, (32, 6))
    tokens = torch.cat([digits, torch.full((32, 1), SEPARATOR), digits.flip(1)], dim=1)
    targets = tokens[:, 1:].clone()
    targets[:, :6] = PADDING
    tokens, targets = tokens.to(args.device), targets.to(args.device)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PADDING)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
print(f"loss {loss.item():.4f}")
