from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

import reproml
from reproml.diff.compare import compare
from reproml.tracing import chain, facts
from reproml.tracing.chain import Reader
from tests.tracing.test_trace import entries, small, steps


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(5))


class Endless(Dataset):
    def __getitem__(self, i):
        return torch.ones(1)


class NoLength(Endless):
    """A data set, or a sampler, whose length cannot be asked for."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_loader_settings_are_described():
    _, loader = small()
    assert facts.loader(loader) == {
        "dataset": "TensorDataset",
        "samples": 12,
        "batch_size": 4,
        "drop_last": False,
        "sampler": "RandomSampler",
        "generator": False,
        "collate_fn": "default_collate",
        "num_workers": 0,
        "persistent_workers": False,
        "worker_init_fn": "NoneType",
    }
    batches = BatchSampler(SequentialSampler(range(4)), 2, drop_last=True)
    found = facts.loader(DataLoader(loader.dataset, batch_sampler=batches))
    assert (found["sampler"], found["batch_size"]) == ("BatchSampler", None)
    assert facts.loader(DataLoader(Stream()))["samples"] is None
    assert facts.loader(DataLoader(Endless(), sampler=range(3)))["samples"] is None
    lists: Any = [[0, 1], [2, 3]]
    assert facts.loader(DataLoader(Endless(), batch_sampler=lists))["sampler"] == "list"
    assert facts.loader(DataLoader(NoLength(), batch_sampler=lists))["samples"] is None
    lists = NoLength()
    assert facts.loader(DataLoader(NoLength(), batch_sampler=lists))["sampler"] == "NoLength"


def test_tensor_is_described():
    x = torch.ones(4, 3)
    assert facts.tensor(x) == "float32[4, 3]"
    assert facts.tensor(torch.ones(3, 4).byte().t()) == "uint8[4, 3] with strides [1, 4]"
    assert facts.tensor(x.to_sparse()) == "float32[4, 3] torch.sparse_coo"
    assert facts.tensor(x.to("meta")) == "float32[4, 3] on meta"


def test_module_settings_have_neither_addresses_nor_paths():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Dropout(0.25).eval()
            self.created, self.file, self.table = 2.5, "/a/long/path/to/some/file", [object()]
            self.activation = nn.functional.relu

        def extra_repr(self) -> str:
            return "rate=3"

    class Failing(nn.Module):
        def extra_repr(self) -> str:
            raise KeyError("rate")

    assert list(facts.modules(Failing())) == [": Failing()"]
    assert list(facts.modules(Own())) == [
        ": Own(rate=3)",
        "layer: Dropout(training=False, p=0.25, inplace=False)",
    ]


def test_facts_are_written_when_they_change(tmp_path):
    with reproml.trace(tmp_path / "trace"):
        model, loader = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def each(*seen: Any) -> None:
            optimizer.param_groups[0]["lr"] = 0.25

        steps(model, loader, optimizer, each=each)
    found = [entry.get("about") for entry in entries(tmp_path / "trace", "step")]
    assert found[1:] == [{"lr": [0.25]}, None, None, None, None]
    first = found[0]
    assert first is not None and first["lr"] == [0.5] and first["seed"] == "1"
    assert first["batch"] == ["float32[4, 4]", "int64[4]"] and first["training"] is True
    assert [x["batch_size"] for x in first["loaders"]] == [4]
    assert first["threads"] == torch.get_num_threads()


def test_exact_trace_has_no_fact_of_the_machine(tmp_path):
    with reproml.trace(tmp_path / "trace"), reproml.exact():
        model, loader = small()
        steps(model, loader, torch.optim.SGD(model.parameters(), lr=0.5))
    first = entries(tmp_path / "trace", "step")[0]["about"]
    assert "batch" in first and not {"threads", "precision"} & first.keys()


@pytest.mark.parametrize("batch_size", [4, 6])
def test_older_trace_without_facts_is_compared(tmp_path, batch_size):
    def train(path: Path, size: int) -> None:
        with reproml.trace(path):
            model, loader = small()
            loader = DataLoader(loader.dataset, size, shuffle=True)
            steps(model, loader, torch.optim.SGD(model.parameters(), lr=0.5))

    train(tmp_path / "new", 4)
    train(tmp_path / "other", batch_size)
    header = {k: v for k, v in Reader(tmp_path / "other").header.items() if k not in ("sha256",)}
    header.pop("reproml trace")
    writer = chain.Writer(tmp_path / "old", header)
    for entry in entries(tmp_path / "other"):
        new = ("about", "gradient", "kinds", "modules")
        writer.append({key: value for key, value in entry.items() if key not in new})
    writer.close()
    for pair in (("new", "old"), ("old", "new")):
        found = compare(*(tmp_path / name for name in pair))
        assert (found and found.cause[0]) == (None if batch_size == 4 else "data or shuffle")
