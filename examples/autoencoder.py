"""An autoencoder of scikit-learn's digits: mean squared error, Adadelta, two batches to a step."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(0)
images = torch.from_numpy(load_digits().images).float() / 16
loader = DataLoader(images.unsqueeze(1), batch_size=16, shuffle=True)


def init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("sigmoid"))
        nn.init.zeros_(module.bias)


encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 8))
decoder = nn.Sequential(
    nn.Linear(8, 32),
    nn.PReLU(),
    nn.Unflatten(1, (2, 4, 4)),
    nn.Upsample(scale_factor=2, mode="nearest"),
    nn.Conv2d(2, 1, 3, padding=1),
    nn.Sigmoid(),
)
model = nn.Sequential(encoder, decoder).apply(init).to(args.device)
optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
criterion = nn.MSELoss()

step, accumulate = 0, 2  # two batches to an optimizer step
while step < args.steps:
    for i, batch in enumerate(loader):
        batch = batch.to(args.device)
        loss = criterion(model(batch), batch) / accumulate
        loss.backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == args.steps:
                break
print(f"loss {loss.item() * accumulate:.4f}")
