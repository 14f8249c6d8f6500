"""Take two training steps of a torchvision model with random weights: a plain script for exact numerics.

invoke matrix --script "verification/torchvision_models.py resnet18"   # also: mobilenet_v2 vgg11 vit_b_16
"""

import sys

import torch
import torchvision

torch.manual_seed(0)
name = sys.argv[1]
options = {"image_size": 32} if name.startswith("vit") else {}
model = torchvision.models.get_model(name, num_classes=10, **options)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
for _ in range(2):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.4f}")
