"""A small GPT on sums of digits, with weights, gradients and states of AdamW in bfloat16."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F

TOKENS, LENGTH, WIDTH, HEADS = 12, 9, 32, 4  # 10 digits, plus, equals
PLUS, EQUALS = 10, 11


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, WIDTH))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.tokens.weight  # tied

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))


def sums(count):
    """Rows such as 4 7 + 3 8 = 0 8 5: two numbers of two digits, and their sum."""
    a, b = torch.randint(100, (2, count))
    sign = torch.full((count,), PLUS), torch.full((count,), EQUALS)
    c = a + b
    digits = [a // 10, a % 10, sign[0], b // 10, b % 10, sign[1], c // 100, c // 10 % 10, c % 10]
    return torch.stack(digits, 1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(19)
model = GPT().to(args.device, torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
for step in range(args.steps):
    tokens = sums(64).to(args.device)
    logits = model(tokens[:, :-1])[:, 5:]  # of the three digits of the sum
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 6:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
print(f"loss {loss.item():.4f}")
