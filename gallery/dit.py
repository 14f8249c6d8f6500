"""A diffusion transformer: flow matching with SD3's transformer, whose place table is float64."""

import argparse

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()

torch.manual_seed(0)
model = SD3Transformer2DModel(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=16,
    caption_projection_dim=16,
    pooled_projection_dim=16,
    out_channels=4,
    pos_embed_max_size=8,
)
scheduler = FlowMatchEulerDiscreteScheduler()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(args.steps):
    images, noise = torch.randn(2, 8, 4, 8, 8).unbind()
    at = torch.randint(1000, (8,))
    sigma = scheduler.sigmas[at].view(-1, 1, 1, 1)
    found = model(
        hidden_states=(1 - sigma) * images + sigma * noise,
        timestep=scheduler.timesteps[at],
        encoder_hidden_states=torch.randn(8, 5, 16),
        pooled_projections=torch.randn(8, 16),
    ).sample
    loss = torch.nn.functional.mse_loss(found, noise - images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
