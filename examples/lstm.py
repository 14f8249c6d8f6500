"""A two-layer LSTM that predicts the next character of a short text, and then writes some."""

import argparse

import torch
import torch.nn as nn

TEXT = """
The sum of a thousand numbers depends on who adds them, for each addition is rounded, and each
rounding forgets a little. Add them from left to right and you get one answer; add them in pairs and
you get another. Neither is wrong, and neither is the sum. The sum itself is one number and has no
order, so if everybody finds that number first and rounds it once, then everybody agrees.
"""


class CharLSTM(nn.Module):
    def __init__(self, characters, width=48):
        super().__init__()
        self.embedding = nn.Embedding(characters, 24)
        self.lstm = nn.LSTM(24, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, characters)

    def forward(self, tokens, state=None):
        output, state = self.lstm(self.embedding(tokens), state)
        return self.head(output), state


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(1234)
alphabet = sorted(set(TEXT))
data = torch.tensor([alphabet.index(c) for c in TEXT])
model = CharLSTM(len(alphabet)).to(args.device)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
criterion = nn.CrossEntropyLoss()

for step in range(args.steps):
    starts = torch.randint(len(data) - 33, (8,))
    chunks = torch.stack([data[s : s + 33] for s in starts]).to(args.device)
    logits, _ = model(chunks[:, :-1])
    loss = criterion(logits.reshape(-1, len(alphabet)), chunks[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()

model.eval()
token, state, written = data[:1].unsqueeze(0).to(args.device), None, ""
with torch.no_grad():
    for _ in range(40):
        logits, state = model(token, state)
        probabilities = torch.softmax(logits[0, -1] / 0.8, dim=-1)
        token = torch.multinomial(probabilities.cpu(), 1).unsqueeze(0).to(args.device)
        written += alphabet[token.item()]
print(f"loss {loss.item():.4f}: {written!r}")
