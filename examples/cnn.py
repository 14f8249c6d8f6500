"""A convolutional network on scikit-learn's digits: batch norm, max pooling, dropout, Adam."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.dropout = nn.Dropout(0.25)
        self.fc = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return F.log_softmax(self.fc(self.dropout(x.flatten(1))), dim=1)


def evaluate(model, x, y):
    model.eval()
    with torch.no_grad():
        output = model(x)
        loss = F.nll_loss(output, y, reduction="sum").item() / len(y)
        correct = (output.argmax(dim=1) == y).sum().item()
    print(f"test loss {loss:.4f}, {correct} of {len(y)} right")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).div(16).sub(0.5)
    y = torch.tensor(digits.target)
    train = DataLoader(
        TensorDataset(x[:1500], y[:1500]), batch_size=32, shuffle=True, drop_last=True
    )
    model = Net().to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    step = 0
    while step < args.steps:
        model.train()
        for inputs, labels in train:
            inputs, labels = inputs.to(args.device), labels.to(args.device)
            optimizer.zero_grad()
            F.nll_loss(model(inputs), labels).backward()
            optimizer.step()
            step += 1
            if step == args.steps:
                break
        evaluate(model, x[1500:].to(args.device), y[1500:].to(args.device))


if __name__ == "__main__":
    main()
