from __future__ import annotations

from typing import Any

import pytest

from reproml.diff.causes import CAUSES, Evidence, likely_cause


def header(**changes: Any) -> dict[str, Any]:
    environment: dict[str, dict[str, Any]] = {
        "torch": {"threads": 2, "capability": "AVX512", "mkl": True},
        "versions": {"torch": "2.8.0"},
        "machine": {"cpu": "A", "architecture": "x86_64"},
        "variables": {"OMP_NUM_THREADS": "2"},
    }
    for name in ("torch", "versions", "machine", "variables"):
        environment[name].update(changes.pop(name, {}))
    return {"environment": environment, "definitions": 1, "numerics": "native", **changes}


THREADS = {"torch": {"threads": 1}, "variables": {"OMP_NUM_THREADS": "1"}}
RECIPE = {"name": "a", "seed": 1, "optimizer": {"kind": "sgd", "learning_rate": 0.1}}

# name of the cause -> (changes planted in b, evidence, part of the sentence)
PLANTED: dict[str, tuple[dict, dict, str]] = {
    "definitions": (
        {"definitions": 2},
        {"part": "loss"},
        "definitions of exact arithmetic: 1 and 2",
    ),
    "data": ({"data.sha256": {"x": "1"}}, {"part": "batch"}, "different data"),
    "recipe": (
        {"recipe": {**RECIPE, "name": "b", "optimizer": {"kind": "sgd", "learning_rate": 0.2}}},
        {"part": "weights"},
        "different recipes: optimizer.learning_rate (0.1 and 0.2)",
    ),
    "scheduler": (
        {},
        {"part": "settings", "settings": ["initial_lr (unset and 0.1)"]},
        "a learning rate scheduler",
    ),
    "optimizer": ({}, {"part": "settings", "settings": ["lr (1 and 2)"]}, "lr (1 and 2)"),
    "model": ({}, {"part": "model"}, "different models"),
    "seed": (
        {},
        {"part": "initial weights", "same_random": False, "facts": {"seed": ("1", "2")}},
        "different seeds (1 and 2)",
    ),
    "draws before the weights": (
        {},
        {"part": "initial weights", "same_random": False},
        "before its seed was set",
    ),
    "numerics": (
        {"numerics": "exact"},
        {"part": "gradients"},
        "exact arithmetic on one side, native on the other",
    ),
    "contracted uniform_": (
        {"torch": {"capability": "NO AVX"}},
        {"part": "initial weights", "same_random": True, "operator": "aten.uniform_"},
        "by the CPU capability (AVX512 and NO AVX)",
    ),
    "initial weights": (
        {},
        {"part": "initial weights", "same_random": True},
        "another initialisation or checkpoint",
    ),
    "loader": (
        {},
        {"part": "batch", "facts": {"batch_size": (20, 40), "drop_last": (False, True)}},
        "by the batch size (20 and 40) and drop_last (False and True)",
    ),
    "draws between steps": (
        {},
        {"part": "batch", "same_random": False, "drawn": "between epoch 1 and epoch 2"},
        "random numbers between epoch 1 and epoch 2",
    ),
    "workers": (
        {},
        {"part": "batch", "same_samples": False, "facts": {"num_workers": (0, 2)}},
        "num_workers (0 and 2)",
    ),
    "module's input": ({}, {"part": "batch", "module_input": True}, "computed from it"),
    "kinds of batch": (
        {},
        {"part": "batch", "facts": {"batch": ("float32[4]", "float32[8]")}},
        "(float32[4] and float32[8])",
    ),
    "epoch": ({}, {"part": "epoch"}, "different numbers of steps"),
    "part of the batch": (
        {},
        {"part": "batch", "same_samples": True, "beside_same": True},
        "labels do not match their inputs",
    ),
    "draws before the batch": (
        {},
        {"part": "batch", "same_samples": True, "same_random": False},
        "after its model was made",
    ),
    "augmentation": (
        {},
        {"part": "batch", "same_samples": False, "same_random": False},
        "random augmentation",
    ),
    "shuffle": ({}, {"part": "batch", "same_samples": True}, "a different shuffle"),
    "other data": ({}, {"part": "batch", "same_samples": False}, "different data"),
    "data or shuffle": ({}, {"part": "batch"}, "would show which"),
    "one gradient": ({}, {"part": "gradients", "one_gradient": True}, "on one side only"),
    "kernels": (
        {},
        {"part": "loss", "size": 1e-7, "facts": {"kinds": ("a", "b")}},
        "the memory layout of the weights (a and b)",
    ),
    "model settings": (
        {},
        {"part": "loss", "facts": {"training": (True, False)}},
        "training mode (True and False)",
    ),
    "compiled": (
        {},
        {"part": "loss", "size": 0.5, "same_random": False, "facts": {"compiled": (False, True)}},
        "torch.compile (False and True)",
    ),
    "random numbers": ({}, {"part": "loss", "same_random": False}, "different random numbers"),
    "factor of the gradients": ({}, {"part": "gradients", "factor": "0.5"}, "a factor of 0.5"),
    "computation": ({}, {"part": "loss", "size": 0.5}, "differ by 50 %"),
    "order of a sum": (
        THREADS,
        {"part": "gradients", "same_random": True, "operator": "aten.mm", "same_inputs": True},
        "the order in which aten.mm adds up, by the number of threads (2 and 1)",
    ),
    "environment": (
        {"versions": {"torch": "2.9"}, "variables": {"MKL_CBWR": "COMPATIBLE"}},
        {"part": "loss", "same_random": True, "operator": "aten.exp", "same_inputs": True},
        "the version of PyTorch (2.8.0 and 2.9) and MKL_CBWR (unset and COMPATIBLE)",
    ),
    "interrupted": ({}, {"part": "length", "interrupted": True}, "was interrupted"),
    "length": ({}, {"part": "length", "steps": (1200, 600)}, "(1,200 and 600 steps)"),
    "outside a step": ({}, {"part": "weights", "outside_step": True}, "after the last step"),
    "level of the trace": (
        {"level": "epoch"},
        {"part": "weights", "outside_step": True},
        "trace both at level step",
    ),
    "learning rate": (
        {},
        {"part": "weights", "facts": {"lr": ("0.1", "0.05")}},
        "the learning rate (0.1 and 0.05)",
    ),
    "optimizer's schedule": (
        {},
        {"part": "weights", "same_random": True},
        "the same gradients gave different weights",
    ),
    "sum without order": (
        {},
        {"part": "gradients", "same_random": True, "operator": "aten.index_add"},
        "from run to run",
    ),
    "rounding": ({}, {"part": "loss", "size": 1e-7}, "only rounding"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_cause_is_found(name):
    changes, evidence, words = PLANTED[name]
    numerics = "exact" if name == "definitions" else "native"
    a = header(
        **{"recipe": RECIPE, "data.sha256": {"x": "0"}, "numerics": numerics},
        **{"level": "epoch"} if name == "level of the trace" else {},
    )
    b = header(**{"recipe": RECIPE, "data.sha256": {"x": "0"}, "numerics": numerics, **changes})
    found, sentence = likely_cause(Evidence(a, b, **evidence))
    assert found == name and words in sentence


def test_every_cause_is_planted():
    assert list(PLANTED) == [name for name, _, _ in CAUSES]


def test_no_known_cause_is_unknown():
    assert likely_cause(Evidence(header(), header(), "loss", same_random=True))[0] == "unknown"
    assert likely_cause(Evidence({}, {}, "item"))[0] == "unknown"


def test_machine_is_no_cause_of_exact_results():
    changes = {**THREADS, "device": "cuda:0"}
    for part in ("initial weights", "loss"):
        evidence = Evidence(
            header(numerics="exact", device="cpu"), header(numerics="exact", **changes), part
        )
        assert "threads" not in likely_cause(evidence)[1]


def test_large_values_are_shortened():
    facts = {"modules": ("x" * 10**6, "y")}
    sentence = likely_cause(Evidence(header(), header(), "loss", facts=facts))[1]
    assert len(sentence) < 1000


def test_device_is_a_cause():
    a, b = header(device="cpu"), header(device="cuda:0")
    name, sentence = likely_cause(Evidence(a, b, "loss", "aten.mm", same_random=True))
    assert name == "order of a sum" and sentence.endswith("by the device (cpu and cuda:0)")


@pytest.mark.parametrize("name, words", [("gpu", "the GPU (A and B)"), ("cuda", "version of CUDA")])
def test_gpu_is_a_cause(name, words):
    a, b = header(torch={name: "A"}), header(torch={name: "B"})
    assert words in likely_cause(Evidence(a, b, "loss", "aten.mm", same_random=True))[1]


def test_machine_is_no_cause_of_different_inputs():
    evidence = Evidence(header(), header(**THREADS), "operator", "aten.mm", same_inputs=False)
    assert likely_cause(evidence)[0] == "unknown"


def test_name_alone_is_no_different_recipe():
    a, b = header(recipe=RECIPE), header(recipe={**RECIPE, "name": "b", "trace": "op"}, **THREADS)
    assert likely_cause(Evidence(a, b, "loss", same_random=True))[0] == "environment"
