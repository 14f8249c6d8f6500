"""Take two training steps of ResNet-50 or of the smallest GPT-2: a plain script for exact numerics.

invoke matrix --script "verification/workloads.py resnet50"   # torchvision; also: gpt2, with transformers

These are the models of Srivastava, Arora and Boneh, "Optimistic verifiable training by controlling hardware
nondeterminism" (NeurIPS 2024), with random weights, random data and a small batch.
"""

import sys

import torch
from torch.nn import functional as F

torch.manual_seed(0)
optimizer: torch.optim.Optimizer
if sys.argv[1] == "resnet50":
    import torchvision

    model = torchvision.models.resnet50(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
else:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    tokens = torch.randint(50257, (2, 64))
    model.train()

print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
for _ in range(2):
    optimizer.zero_grad()
    if sys.argv[1] == "resnet50":
        loss = F.cross_entropy(model(images), labels)
    else:
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.4f}", flush=True)
