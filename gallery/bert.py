"""BERT of transformers classifies sequences of tokens: dropout, padding, AdamW."""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=32,
    num_labels=3,
)
model = BertForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)

tokens = torch.randint(1, 100, (64, 20))
length = torch.randint(8, 21, (64, 1))
mask = (torch.arange(20) < length).long()
labels = (tokens * mask).sum(1) % 3
dataset = TensorDataset(tokens * mask, mask, labels)

step = 0
model.train()
while step < args.steps:
    for input_ids, attention_mask, target in DataLoader(dataset, batch_size=8, shuffle=True):
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=target)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        print(f"step {step}: loss {output.loss.item():.4f}")
        if step == args.steps:
            break
