"""The Trainer of transformers: a small DistilBERT, accumulated gradients, evaluation each epoch."""

import argparse
import tempfile

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()

set_seed(0)
config = DistilBertConfig(
    vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=16
)
tokens = torch.randint(1, 50, (32, 12))
rows = [{"input_ids": row, "labels": row.sum() % 2} for row in tokens]


def compute_metrics(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


with tempfile.TemporaryDirectory() as folder:
    training_args = TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-4,
        warmup_steps=1,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(
        model=DistilBertForSequenceClassification(config),
        args=training_args,
        train_dataset=rows[:24],
        eval_dataset=rows[24:],
        compute_metrics=compute_metrics,
    )
    trainer.train()
