"""A small Mistral in transformers' Trainer with bf16=True: autocast in bfloat16, float32 weights."""

import argparse
import tempfile

import torch
from transformers import MistralConfig, MistralForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

set_seed(0)
config = MistralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
tokens = torch.randint(64, (16, 12))

with tempfile.TemporaryDirectory() as folder:
    training_args = TrainingArguments(
        output_dir=folder,
        bf16=True,
        use_cpu=True,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        activation_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model=MistralForCausalLM(config), args=training_args, train_dataset=rows).train()
