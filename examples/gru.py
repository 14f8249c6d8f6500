"""A bidirectional GRU that decides whether a sequence of brackets is balanced; packed lengths."""

import argparse

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()


def brackets(count):
    """Random walks of +1 and -1 as tokens 1 and 2, and whether they end where they began."""
    lengths = 2 * torch.randint(2, 7, (count,))
    sequences = [torch.randint(1, 3, (int(n),)) for n in lengths]
    balanced = torch.tensor([int((2 * s - 3).sum() == 0) for s in sequences])
    return pad_sequence(sequences, batch_first=True), lengths, balanced.float()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 8, padding_idx=0)
        self.gru = nn.GRU(8, 24, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(48)
        self.output = nn.Linear(48, 1)
        for name, parameter in self.gru.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        _, hidden = self.gru(packed)
        return self.output(self.norm(torch.cat([hidden[0], hidden[1]], dim=1))).squeeze(1)


torch.manual_seed(5)
model = Classifier().to(args.device)
criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0, device=args.device))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)

for step in range(args.steps):
    tokens, lengths, balanced = brackets(32)
    optimizer.zero_grad()
    loss = criterion(model(tokens.to(args.device), lengths), balanced.to(args.device))
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()

model.eval()
with torch.no_grad():
    tokens, lengths, balanced = brackets(200)
    right = ((model(tokens.to(args.device), lengths).cpu() > 0) == balanced.bool()).sum()
print(f"loss {loss.item():.4f}, {right} of 200 right")
