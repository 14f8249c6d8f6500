"""Llama of transformers, fine-tuned with LoRA adapters of peft; gradients are accumulated."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
lora = LoraConfig(
    r=4,
    lora_alpha=8,
    lora_dropout=0.05,
    target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(LlamaForCausalLM(config), lora)
model.print_trainable_parameters()
trainable = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=2e-3)
scheduler = get_cosine_schedule_with_warmup(optimizer, 1, args.steps)

accumulate = 2  # batches to an optimizer step
model.train()
for step in range(args.steps):
    for _ in range(accumulate):
        tokens = (torch.randint(64, (2, 1)) + 5 * torch.arange(16)) % 64
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0  # padding on the left
        labels = tokens.masked_fill(mask == 0, -100)
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss / accumulate
        loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item() * accumulate:.4f}")
