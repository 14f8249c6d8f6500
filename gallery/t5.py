"""T5 of transformers learns to reverse a sequence: encoder, decoder, relative positions."""

import argparse

import torch
from transformers import T5Config, T5ForConditionalGeneration

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

torch.manual_seed(0)
config = T5Config(
    vocab_size=32,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
)
model = T5ForConditionalGeneration(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

model.train()
for step in range(args.steps):
    source = torch.randint(2, 32, (4, 10))
    target = source.flip(1)
    loss = model(input_ids=source, labels=target).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")

model.eval()
print(model.generate(source[:1], max_new_tokens=5, num_beams=2)[0].tolist())
