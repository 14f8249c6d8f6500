"""A small residual network on striped images, with float16 autocast and a gradient scaler."""

import argparse

import torch
import torch.nn as nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def stripes(count, size=16):
    """Noisy images of horizontal, vertical and diagonal stripes."""
    y = torch.randint(3, (count,))
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    patterns = torch.stack([rows, columns, rows + columns]) // 2 % 2
    x = patterns[y].float().unsqueeze(1).repeat(1, 3, 1, 1)
    return x + torch.randn_like(x), y


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.manual_seed(42)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(inplace=True),
    Block(8, 8, stride=1),
    Block(8, 16, stride=2),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(16, 3),
)
for module in model.modules():
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
model = model.to(args.device)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
scaler = torch.amp.GradScaler(args.device, init_scale=2.0**20)  # the first step overflows

for step in range(args.steps):
    x, y = (t.to(args.device) for t in stripes(16))
    with torch.autocast(args.device, dtype=torch.float16):
        loss = criterion(model(x), y)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()

model.eval()
with torch.inference_mode():
    x, y = (t.to(args.device) for t in stripes(200))
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"loss {loss:.4f}, scale {scaler.get_scale():.0f}, accuracy {accuracy:.3f}")
