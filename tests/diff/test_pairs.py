"""Pairs of native trainings, by one script and by an edit of it, and the cause that diff must name."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import torch

import reproml
from reproml.diff.compare import Divergence, compare, headline

# Lines that begin with @ mark where an edit may add lines.
SCRIPT = """
import random
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

torch.manual_seed(0)
x, y = torch.rand(50, 2, 6, 6), torch.randint(3, (50,))
@prepare

class Images(Dataset):
    def __len__(self):
        return len(x)

    def __getitem__(self, i):
        image = x[i]
        @augment
        return image, y[i]

torch.manual_seed(1)
@build
convolution, linear = nn.Conv2d(2, 4, 3), nn.Linear(64, 3)
model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Dropout(0), linear)
@wrap
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion = nn.CrossEntropyLoss()
loader = DataLoader(Images(), batch_size=20, shuffle=True)
@begin
for epoch in range(2):
    for step, (inputs, labels) in enumerate(loader):
        optimizer.zero_grad()
        output = model(inputs)
        loss = criterion(output, labels)
        loss.backward()
        @gradients
        optimizer.step()
        @stepped
    @evaluate
"""


class Row(NamedTuple):
    """An edit, as texts of the script and what takes their place, and the cause that it must have."""

    edit: dict[str, str]
    cause: Optional[str]  # the name in causes.CAUSES, None where no number differs
    words: str = ""  # a part of the sentence
    both: dict[str, str] = {}  # an edit of both sides
    where: str = ""  # a part of the headline's "epoch 1, step 1: the batch"


NOISE = {"@augment": "image = image + 0.1 * torch.randn(2, 6, 6)"}
OWN = {"shuffle=True": "shuffle=True, generator=torch.Generator().manual_seed(5)"}
DROPOUT = {"nn.Dropout(0)": "nn.Dropout(0.5)"}
BATCH = {"batch_size=20": "batch_size=40"}


def validation(body: str, gradients: str = "with torch.no_grad():") -> dict[str, str]:
    return {"@evaluate": f"model.eval()\n{gradients}\n    {body}\nmodel.train()"}


VALIDATION = validation("[model(a) for a, b in DataLoader(Images(), 25, shuffle=True)]")
EAGER = "backend=lambda graph, inputs: lambda *args: [o * (1 + 2**-23) for o in graph(*args)]"

PAIRS = {
    # --- the batches
    "batch size": Row(BATCH, "loader", "the batch size (20 and 40)"),
    "batch size, without shuffle": Row(
        BATCH, "loader", "the batch size (20 and 40)", {"shuffle=True": "shuffle=False"}
    ),
    "batch size and workers": Row(
        {**BATCH, "shuffle=True": "shuffle=True, num_workers=1"}, "loader", "size (20 and 40)"
    ),
    "drop_last": Row(
        {"shuffle=True": "shuffle=True, drop_last=True"},
        "loader",
        "drop_last (False and True)",
        where="epoch 1, step 3: the number of steps in the epoch",
    ),
    "drop_last in one epoch": Row(
        {"shuffle=True": "shuffle=True, drop_last=True", "range(2)": "range(1)"},
        "loader",
        "drop_last (False and True)",
    ),
    "shuffle off": Row(
        {"shuffle=True": "shuffle=False"},
        "loader",
        "the sampler (RandomSampler and SequentialSampler)",
    ),
    "sampler": Row(
        {"shuffle=True": "sampler=WeightedRandomSampler([1.0] * 50, 50)"},
        "loader",
        "the sampler (RandomSampler and WeightedRandomSampler)",
    ),
    "more data": Row(
        {"@prepare": "x, y = x[:45], y[:45]"}, "loader", "the number of samples (50 and 45)"
    ),
    "generator of the loader": Row(OWN, "loader", "a generator of its own (False and True)"),
    "seed of the loader": Row({"seed(5)": "seed(6)"}, "shuffle", "in another order", OWN),
    "workers without augmentation": Row({"shuffle=True": "shuffle=True, num_workers=2"}, None),
    "workers with augmentation": Row(
        {"shuffle=True": "shuffle=True, num_workers=2"}, "workers", "num_workers (0 and 2)", NOISE
    ),
    "workers with augmentation, own generator": Row(
        {"shuffle=True": "shuffle=True, num_workers=2"},
        "workers",
        "num_workers (0 and 2)",
        {**NOISE, **OWN},
    ),
    "augmentation": Row(NOISE, "augmentation", "random augmentation"),
    "augmentation by Python": Row(
        {"@augment": "image = image * random.random()"}, "other data", "draws from Python or NumPy"
    ),
    "normalisation": Row({"@prepare": "x = x * 2"}, "other data", "their preprocessing"),
    "labels": Row({"@prepare": "y = y.roll(1)"}, "part of the batch", "labels do not match"),
    "dtype of the batch": Row(
        {"@prepare": "x = (x * 9).byte()", "model(inputs)": "model(inputs.float())"},
        "kinds of batch",
        "float32[20, 2, 6, 6], int64[20] and uint8[20, 2, 6, 6], int64[20]",
    ),
    "padding": Row(
        {"@prepare": "x = F.pad(x, (0, 2))", "model(inputs)": "model(inputs[..., :6])"},
        "kinds of batch",
        "float32[20, 2, 6, 6], int64[20] and float32[20, 2, 6, 8], int64[20]",
    ),
    "collate": Row(
        {
            "shuffle=True": "shuffle=True, collate_fn=turned",
            "loader =": "def turned(batch):\n"
            "    images, labels = zip(*batch)\n"
            "    return torch.stack(images).flip(2), torch.stack(labels)\n"
            "loader =",
        },
        "loader",
        "collate_fn (default_collate and turned)",
    ),
    "loop left early": Row({"@stepped": "if step == 1: break"}, "epoch", "leaves the epoch early"),
    "accumulated gradients": Row(
        {
            "batch_size=20": "batch_size=10",
            "        optimizer.zero_grad()": "        if step % 2 == 0: optimizer.zero_grad()",
            "optimizer.step()": "(optimizer.step() if step % 2 else None)",
        },
        "loader",
        "the number of backward passes in a step (1 and 2), as gradients are accumulated and the batch "
        "size (20 and 10)",
    ),
    "a loop without a data loader": Row(
        {"x.split(25), y.split(25)": "x.split(10), y.split(10)"},
        "kinds of batch",
        "(float32[25, 2, 6, 6], int64[25] and float32[10, 2, 6, 6], int64[10])",
        {
            "enumerate(loader)": "enumerate(zip(x.split(25), y.split(25)))",
            "optimizer.zero_grad()": "reproml.tracing.batch(inputs, labels); optimizer.zero_grad()",
            "import random": "import random, reproml.tracing",
        },
    ),
    # --- random numbers
    "seed": Row({"manual_seed(1)": "manual_seed(2)"}, "seed", "seeds (1 and 2)"),
    "seed after the model": Row(
        {"torch.manual_seed(1)": "torch.manual_seed(7)", "@wrap": "torch.manual_seed(1)"},
        "draws before the weights",
        "made before its seed was set",
    ),
    "validation that shuffles": Row(
        VALIDATION, "draws between steps", "between epoch 1 and epoch 2", where="epoch 2, step 4"
    ),
    "validation without shuffle": Row(
        validation("[model(a) for a, b in DataLoader(Images(), 25)]"),
        "draws between steps",
        "between epoch 1 and epoch 2",
    ),
    "validation with gradients": Row(
        validation("[model(a) for a, b in DataLoader(Images(), 25)]", "if True:"),
        "draws between steps",
        "between epoch 1 and epoch 2",
    ),
    "validation with noise": Row(
        validation("model(x + torch.randn(x.shape))"),
        "draws between steps",
        "between epoch 1 and epoch 2",
    ),
    "validation that draws, dropout": Row(
        VALIDATION, "draws between steps", "between epoch 1 and epoch 2", {**OWN, **DROPOUT}
    ),
    "validation every other step": Row(
        {"@stepped": "if step == 1: torch.rand(1)"},
        "draws between steps",
        "between step 2 and step 3",
        {**OWN, **DROPOUT},
    ),
    "validation that draws nothing": Row(validation("model(x)"), None),
    "validation before the training": Row(
        {"@begin": "for a, b in DataLoader(Images(), 25): pass"},
        "draws before the batch",
        "after its model was made",
    ),
    "seed in each epoch": Row({"@evaluate": "torch.manual_seed(epoch)"}, "seed", "seeds (1 and 0)"),
    # --- the model
    "width": Row(
        {"nn.Conv2d(2, 4, 3)": "nn.Conv2d(2, 5, 3)", "nn.Linear(64": "nn.Linear(80"},
        "model",
        "0.weight is float32[4, 2, 3, 3] and float32[5, 2, 3, 3]",
    ),
    "unused layer": Row(
        {
            "@wrap": "model.unused = nn.Linear(2, 2)",
            "model(inputs)": "model[:5](inputs)",
        },
        "model",
        "only the second has 4, 5",
    ),
    "names only": Row(
        {"@wrap": "model = nn.Sequential(model)"},
        None,
    ),
    "order of the parameters": Row(
        {"model.parameters()": "[*model.parameters()][::-1]"},
        "model",
        "the same tensors in another order",
    ),
    "order of making": Row(
        {
            "@build": "linear = nn.Linear(64, 3)",
            ", linear = nn.Conv2d(2, 4, 3), nn.Linear(64, 3)": " = nn.Conv2d(2, 4, 3)",
        },
        "initial weights",
        "modules made in another order",
    ),
    "initialisation": Row(
        {"@wrap": "nn.init.xavier_uniform_(linear.weight)"},
        "draws before the weights",
        "another initialisation",
    ),
    "initialisation without draws": Row(
        {"@wrap": "nn.init.zeros_(linear.bias)"}, "initial weights", "another initialisation"
    ),
    "float64": Row(
        {"@wrap": "model.double()", "model(inputs)": "model(inputs.double())"},
        "model",
        "0.weight is float32[4, 2, 3, 3] and float64[4, 2, 3, 3]",
    ),
    "frozen layer": Row(
        {"@wrap": "convolution.requires_grad_(False)"}, "one gradient", "requires_grad=False"
    ),
    "frozen layer left out": Row(
        {"model.parameters()": "linear.parameters()"},
        "model",
        "only the first has 0.weight, 0.bias",
    ),
    "dropout": Row(
        {"nn.Dropout(0.5)": "nn.Dropout(0.1)"},
        "model settings",
        "a module (3: Dropout(p=0.5, inplace=False) and 3: Dropout(p=0.1, inplace=False))",
        DROPOUT,
    ),
    "dropout in the forward pass": Row(
        {"p=0.5": "p=0.1"},
        "computation",
        "more than rounding explains",
        {"criterion(output, labels)": "criterion(F.dropout(output, p=0.5), labels)"},
    ),
    "noise in the forward pass": Row(
        {"model(inputs)": "model(inputs + torch.randn(inputs.shape))"},
        "module's input",
        "noise, augmentation",
    ),
    "noise in the model": Row(
        {"criterion(output": "criterion(output + 0.1 * torch.randn(output.shape)"},
        "random numbers",
        "dropout, noise",
    ),
    "normalisation in the loop": Row(
        {"model(inputs * 1": "model(inputs * 2"},
        "module's input",
        "normalisation",
        {"model(inputs": "model(inputs * 1"},
    ),
    "another layer without weights": Row(
        {"nn.Dropout(0), ": "nn.Dropout(0), nn.Tanh(), "},
        "model settings",
        "a module (4: Linear(in_features=64, out_features=3) and 4: Tanh())",
    ),
    "evaluation mode": Row(
        {"@begin": "model.eval()"}, "model settings", "training mode (True and False)", DROPOUT
    ),
    "evaluation mode left on": Row(
        {"@evaluate": "model.eval()"},
        "model settings",
        "training mode (True and False)",
        DROPOUT,
        "epoch 2, step 4",
    ),
    "evaluation mode of a part": Row(
        {"@begin": "model[3].eval()"}, "model settings", "training=False", DROPOUT
    ),
    # --- the loss and the gradients
    "reduction": Row(
        {"CrossEntropyLoss()": "CrossEntropyLoss(reduction='sum')"},
        "model settings",
        "reduction='sum'",
    ),
    "label smoothing": Row(
        {"CrossEntropyLoss()": "CrossEntropyLoss(label_smoothing=0.1)"},
        "model settings",
        "label_smoothing=0.1",
    ),
    "reduction of a function": Row(
        {"(output, labels)": "(output, labels, reduction='sum')"},
        "computation",
        "the loss function",
        {"loss = criterion(": "loss = F.cross_entropy("},
    ),
    "scaled loss": Row(
        {"loss.backward()": "(loss / 2).backward()"}, "computation", "differ by 50 %"
    ),
    "clipped gradients": Row(
        {"@gradients": "nn.utils.clip_grad_norm_(model.parameters(), 0.01)"},
        "factor of the gradients",
        "clipped",
    ),
    "clipped values": Row(
        {"@gradients": "nn.utils.clip_grad_value_(model.parameters(), 0.001)"},
        "computation",
        "what happens to gradients",
    ),
    # The numbers of the first gradient are not recorded.
    "first gradient": Row({"@gradients": "convolution.weight.grad.mul_(2)"}, "unknown"),
    "last gradient": Row(
        {"@gradients": "linear.bias.grad.mul_(2)"}, "computation", "what happens to gradients"
    ),
    "zero_grad": Row({"zero_grad()": "zero_grad(set_to_none=False)"}, None),
    "no zero_grad": Row(
        {"optimizer.zero_grad()": "pass"}, "computation", "what happens to gradients"
    ),
    # --- the optimizer
    "learning rate": Row({"lr=0.1": "lr=0.2"}, "optimizer", "lr (0.1 and 0.2)"),
    "weight decay": Row(
        {"lr=0.1": "lr=0.1, weight_decay=0.01"}, "optimizer", "weight_decay (0 and 0.01)"
    ),
    "kind of optimizer": Row({"SGD(": "AdamW("}, "optimizer", "SGD and AdamW"),
    "foreach": Row({"lr=0.1": "lr=0.1, foreach=True"}, "optimizer", "foreach (None and True)"),
    "fused": Row({"lr=0.1": "lr=0.1, fused=True"}, "optimizer", "fused (None and True)"),
    "scheduler": Row(
        {
            "@begin": "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)",
            "@evaluate": "scheduler.step()",
        },
        "scheduler",
        "initial_lr (unset and 0.1)",
    ),
    "scheduler's settings": Row(
        {"gamma=0.5": "gamma=0.25"},
        "learning rate",
        "the learning rate (0.05 and 0.025)",
        {
            "@begin": "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)",
            "@evaluate": "scheduler.step()",
        },
    ),
    "learning rate set in the loop": Row(
        {"@stepped": "optimizer.param_groups[0]['lr'] /= 2"},
        "learning rate",
        "the learning rate (0.1 and 0.05)",
    ),
    "momentum set in the loop": Row(
        {"@stepped": "optimizer.param_groups[0]['momentum'] = 0.5"}, "optimizer's schedule"
    ),
    "average of the weights": Row(
        {"@evaluate": "with torch.no_grad(): linear.weight.mul_(0.9)"},
        "computation",
        "what changes weights outside of an optimizer's step",
    ),
    "average of the weights at the end": Row(
        {"@evaluate": "with torch.no_grad(): linear.weight.mul_(0.9)"},
        "outside a step",
        both={"range(2)": "range(1)"},
    ),
    "epochs": Row({"range(2)": "range(3)"}, "length", "(6 and 9 steps)"),
    "interruption": Row(
        {"@stepped": "if epoch: raise KeyboardInterrupt"}, "interrupted", "(6 and 4 steps)"
    ),
    # --- the kernels
    "compiled": Row(
        {"@wrap": f"model = torch.compile(model, {EAGER})"},
        "compiled",
        "torch.compile (False and True)",
    ),
    "compiled in place": Row(
        {"@wrap": f"model.compile({EAGER})"}, "compiled", "torch.compile (False and True)"
    ),
    "compiled to the same numbers": Row(
        {"@wrap": "model = torch.compile(model, backend='eager')"}, None
    ),
    "a compiled function": Row(
        {"criterion(output, labels)": f"torch.compile(criterion.forward, {EAGER})(output, labels)"},
        "rounding",
        "torch.compile of a function",
    ),
    "DataParallel": Row({"@wrap": "model = nn.DataParallel(model)"}, None),
    "DataParallel with dropout changed": Row(
        {"@wrap": "model[3].p = 0.1\nmodel = nn.DataParallel(model)"},
        "model settings",
        both=DROPOUT,
    ),
    "autocast": Row(
        {
            "        output = model(inputs)": "        with torch.autocast('cpu'): output = model(inputs)"
        },
        "model settings",
        "autocast (off and torch.bfloat16)",
    ),
    "threads set in the script": Row(
        {
            "@begin": "torch.set_num_threads(1)",
            "criterion(output, labels)": "criterion(output * (1 + 2**-23), labels)",
        },
        "environment",
        "the number of threads (2 and 1)",
        {"import random": "import random, torch; torch.set_num_threads(2)"},
    ),
    "channels_last": Row(
        {
            "@wrap": "model.to(memory_format=torch.channels_last)",
            "criterion(output, labels)": "criterion(output * (1 + 2**-23), labels)",
        },
        "kernels",
        "the memory layout of the weights (float32[4, 2, 3, 3] and float32[4, 2, 3, 3] with strides",
    ),
}


def edited(source: str, edits: dict[str, str]) -> str:
    """Return the script with these edits; each must find its text."""
    for old, new in edits.items():
        assert old in source, old
        at = source.index(old)
        indent = " " * (at - source.rindex("\n", 0, at) - 1) if old[0] == "@" else ""
        source = source.replace(old, new.replace("\n", "\n" + indent), 1)
    return source


def run(path: Path, source: str, level: str = "step") -> None:
    lines = [line for line in source.splitlines() if line.strip()[:1] != "@"]
    threads = torch.get_num_threads()
    try:
        with reproml.trace(path, level):
            exec(compile("\n".join(lines), "script.py", "exec"), {"__name__": "script"})
    except KeyboardInterrupt:
        pass
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the trace of a script, each of which runs once."""

    @functools.cache
    def trace(source: str) -> Path:
        path = tmp_path_factory.mktemp("pair") / "trace"
        run(path, source)
        return path

    return trace


def difference(traced: Any, row: Row) -> Optional[Divergence]:
    before = edited(SCRIPT, row.both)
    return compare(traced(before), traced(edited(before, row.edit)))


@pytest.mark.parametrize("name", PAIRS)
def test_pair_has_its_cause(traced, name):
    row = PAIRS[name]
    found = difference(traced, row)
    if row.cause is None:
        assert found is None, found
        return
    assert found is not None
    assert (found.cause[0], row.words in found.cause[1]) == (row.cause, True), found.cause
    assert row.where in headline(found, "a", "b")


@pytest.mark.parametrize(
    "name",
    ["batch size", "workers with augmentation", "validation that shuffles", "seed", "dropout"]
    + ["clipped gradients", "learning rate", "drop_last"],
)
def test_level_op_has_the_same_cause(tmp_path, name):
    row = PAIRS[name]
    before = edited(SCRIPT, row.both)
    run(tmp_path / "a", before, "op")
    run(tmp_path / "b", edited(before, row.edit), "op")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found is not None and found.cause[0] == row.cause and row.words in found.cause[1]
    assert found.operator is not None
