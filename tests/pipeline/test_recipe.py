"""Recipes: what is accepted, which message an error has, and what the hash covers."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Union, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reproml.errors import ReproError
from reproml.pipeline import data, recipe

TEXT = """\
name = "mine"
seed = 1
[data]
name = "digits"
[preprocess]
kind = "standardize"
[model]
kind = "mlp"
hidden = [128]
[train]
epochs = 2
batch_size = 64
[optimizer]
kind = "adamw"
learning_rate = 0.001
"""


def changed(old: str, new: str) -> str:
    assert TEXT.count(old) == 1, old
    return TEXT.replace(old, new)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: Union[str, bytes], name: str = "mine.toml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_bundled_recipe_names_equal_file_names() -> None:
    assert recipe.recipe_names() == ["digits-mlp", "mnist-cnn", "mnist-mlp", "mnist-mlp-bf16"]
    for name in recipe.recipe_names():
        assert recipe.load_recipe(name).name == name


def test_mnist_mlp_has_documented_values() -> None:
    assert recipe.load_recipe("mnist-mlp") == recipe.Recipe(
        name="mnist-mlp",
        seed=1,
        data=recipe.Data("mnist"),
        preprocess=recipe.Standardize(),
        model=recipe.MLP((128,)),
        train=recipe.Train(epochs=2, batch_size=64),
        optimizer=recipe.AdamW(learning_rate=0.001),
    )


def test_mnist_mlp_bf16_differs_in_name_and_precision() -> None:
    changes = {"name": "mnist-mlp-bf16", "precision": "bfloat16"}
    expected = msgspec.structs.replace(recipe.load_recipe("mnist-mlp"), **changes)
    assert recipe.load_recipe("mnist-mlp-bf16") == expected


def test_mnist_cnn_has_documented_values() -> None:
    assert recipe.load_recipe("mnist-cnn") == recipe.Recipe(
        name="mnist-cnn",
        seed=1,
        data=recipe.Data("mnist"),
        preprocess=recipe.Standardize(),
        model=recipe.LeNet5(),
        train=recipe.Train(epochs=2, batch_size=100),
        optimizer=recipe.Adam(learning_rate=0.001),
    )


def test_every_dataset_name_has_a_loader() -> None:
    names = get_args(get_type_hints(recipe.Data)["name"])
    assert set(names) == set(data._LOADERS)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_optimizer_defaults_equal_pytorch(kind: str) -> None:
    import torch

    ours = msgspec.to_builtins(getattr(recipe, kind)(learning_rate=0.001))
    assert ours.pop("kind") == kind.lower() == getattr(recipe, kind)(1.0).kind
    ours["lr"] = ours.pop("learning_rate")
    theirs = inspect.signature(getattr(torch.optim, kind)).parameters
    assert {name: theirs[name].default for name in ours} == ours


# Each entry: a change of the text above (old, new), and words that the message must contain.
REFUSED = [
    (
        "batch_size = 64",
        "bach_size = 64",
        "unknown key `bach_size`; its keys are epochs, batch_size",
    ),
    ("[model]", "[modle]", "contains unknown key `modle`; its keys are name, seed, data"),
    (
        "0.001",
        "0.001\nmomentum = 0.9",
        "unknown key `momentum`; its keys are kind, learning_rate, betas",
    ),
    (
        'kind = "standardize"',
        "scale = 2",
        "preprocess: contains unknown key `scale`; its keys are kind",
    ),
    ("epochs = 2\n", "", "train: missing required key `epochs`"),
    (
        'kind = "mlp"',
        'kind = "lenet5"',
        "model: contains unknown key `hidden`; its keys are kind",
    ),
    ('kind = "mlp"\n', "", "model: missing required key `kind`; allowed: mlp, lenet5"),
    ('kind = "standardize"\n', "", "preprocess: missing required key `kind`"),
    ('kind = "adamw"\n', "", "missing required key `kind`; allowed: adamw, adam, sgd"),
    ('"mlp"', '"lstm"', "model.kind: invalid value 'lstm'; allowed: mlp, lenet5"),
    ('"adamw"', '"lion"', "invalid value 'lion'; allowed: adamw, adam, sgd"),
    ('"digits"', '"../digits"', "invalid enum value '../digits'; allowed: mnist, digits"),
    ("64", "-64", "train.batch_size: expected `int` >= 1"),
    ("64", "0", "train.batch_size: expected `int` >= 1"),
    ("64", '"64"', "train.batch_size: expected `int`, got `str`"),
    ("64", "64.0", "train.batch_size: expected `int`, got `float`"),
    ("64", "true", "train.batch_size: expected `int`, got `bool`"),
    ("64", "1" + "0" * 30, "train.batch_size: expected `int` <="),
    ("64", "1" + "0" * 5000, "mine.toml"),
    ("64", "2020-01-01", "train.batch_size: expected `int`, got `date`"),
    ("seed = 1", "seed = -1", "seed: expected `int` >= 0"),
    ("seed = 1", "seed = 9223372036854775808", "seed: expected `int` <= 9223372036854775807"),
    ("seed = 1", "seed = 18446744073709551616", "seed: expected `int` <= 9223372036854775807"),
    ("[128]", "[0]", "model.hidden[0]: expected `int` >= 1"),
    ("[128]", "[1000000000]", "model.hidden[0]: expected `int` <= 65536"),
    ("[128]", "128", "model.hidden: expected `array`, got `int`"),
    ("0.001", "nan", "optimizer.learning_rate: expected `float` > 0"),
    ("0.001", "inf", "optimizer.learning_rate: expected `float` <="),
    ("0.001", "-inf", "optimizer.learning_rate: expected `float` > 0"),
    ("0.001", "1e999", "optimizer.learning_rate: expected `float` <="),
    ("0.001", "0", "optimizer.learning_rate: expected `float` > 0"),
    ("0.001", "-0.001", "optimizer.learning_rate: expected `float` > 0"),
    ("0.001", '"0.001"', "optimizer.learning_rate: expected `float`, got `str`"),
    ("0.001", "1" + "0" * 400, "optimizer.learning_rate"),
    ("0.001", "0.001\nbetas = [0.9, 1.0]", "optimizer.betas[1]: expected `float` < 1"),
    ("0.001", "0.001\nbetas = [0.9]", "optimizer.betas: expected `array` of length 2"),
    ("0.001", "0.001\neps = nan", "optimizer.eps: expected `float` >= 0"),
    ("0.001", "0.001\nweight_decay = nan", "optimizer.weight_decay: expected `float` >= 0"),
    ('"adamw"', '"sgd"\nnesterov = true', "optimizer: nesterov needs a momentum above 0"),
    (
        "seed = 1",
        'seed = 1\nprecision = "float16"',
        "precision: invalid enum value 'float16'; allowed: float32, bfloat16",
    ),
    ("seed = 1", "seed = 1\nprecision = 16", "precision: expected `str`, got `int`"),
    ("seed = 1", "seed = 1\nprecison = 1", "its keys are name, seed"),
    ('"mine"', '"../mine"', "name: expected `str` matching"),
    ('"mine"', '"mine\\n"', "name: expected `str` matching"),
    ('"mine"', '"-mine"', "name: expected `str` matching"),
    ('"mine"', '""', "; a name has lower-case letters, digits and hyphens"),
    ('"mine"', '"' + "m" * 65 + '"', "name: expected `str` of length <= 64"),
    ("[train]", "[train", "not TOML"),
    ("seed = 1", "seed = 1\nseed = 2", "not TOML"),
    ("[128]", "[" * 5000, "not TOML"),
    ("[train]", "[data]", "not TOML"),
]


@pytest.mark.parametrize("old, new, words", REFUSED)
def test_invalid_recipe_raises_with_key(old: str, new: str, words: str, write) -> None:
    path = write(changed(old, new))
    with pytest.raises(ReproError) as caught:
        recipe.load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"recipe {path}: ") and words in message and "\n" not in message


def test_custom_recipe_is_loaded(write) -> None:
    text = changed("[128]", "[64, 32]").replace('"adamw"', '"sgd"\nmomentum = 0.9\nnesterov = true')
    mine = recipe.load_recipe(write(text))
    assert mine.model == recipe.MLP((64, 32)) and mine.model.kind == "mlp"
    assert mine.optimizer == recipe.SGD(learning_rate=0.001, momentum=0.9, nesterov=True)


def test_unknown_name_lists_bundled_recipes() -> None:
    with pytest.raises(
        ReproError, match="'mnist-mpl'.*digits-mlp, mnist-cnn, mnist-mlp, mnist-mlp-bf16"
    ):
        recipe.load_recipe("mnist-mpl")


@pytest.mark.parametrize("name", ["", ".", "..", "mnist-mlp\0", "*", "Mnist-MLP"])
def test_invalid_name_raises(name: str) -> None:
    with pytest.raises(ReproError, match="no recipe is named"):
        recipe.load_recipe(name)


def test_files_that_are_not_recipes_raise(tmp_path: Path, write, monkeypatch) -> None:
    write("# Not TOML\nat all", "there.md")
    monkeypatch.chdir(tmp_path)
    for path, words in [
        (str(tmp_path / "none.toml"), "no such file"),
        ("a\0b.toml", "cannot be read"),
        (str(tmp_path) + "/", "not a file"),
        ("/dev/zero", "not a file"),
        (write(b"name = '\xff'", "latin.toml"), "byte 9 is not UTF-8"),
        ("there.md", "not TOML"),
        (write(b"", "empty.toml"), "missing required key `name`"),
        (write(b"#" * (2 << 20), "large.toml"), "larger than"),
        (write("", "file") + "/x.toml", "cannot be read: Not a directory"),
    ]:
        with pytest.raises(ReproError) as caught:
            recipe.load_recipe(path)
        assert words in str(caught.value)


def test_recipe_is_immutable() -> None:
    mine = recipe.load_recipe("digits-mlp")
    for table, key in [(mine, "seed"), (mine.train, "epochs"), (mine.optimizer, "learning_rate")]:
        with pytest.raises(AttributeError):
            setattr(table, key, 3)
    hash(mine)  # raises TypeError if a list is inside


def test_sha256_is_of_sorted_json(write) -> None:
    values: dict[str, Any] = {
        "name": "mine",
        "seed": 1,
        "data": {"name": "digits"},
        "preprocess": {"kind": "standardize"},
        "model": {"kind": "mlp", "hidden": [128]},
        "train": {"epochs": 2, "batch_size": 64},
        "optimizer": {
            "kind": "adamw",
            "learning_rate": 0.001,
            "betas": [0.9, 0.999],
            "eps": 1e-08,
            "weight_decay": 0.01,
            "amsgrad": False,
        },
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert recipe.load_recipe(write(TEXT)).sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_sha256_ignores_formatting(write) -> None:
    head, *tables = TEXT.split("\n[")
    for same in [
        "# a comment\n" + TEXT,
        TEXT.replace("\n", "\r\n"),
        "\n[".join([head, *reversed(tables)]),
        changed("0.001", "1e-3"),
        changed("0.001", "0.001\nweight_decay = 0.01"),  # the default
        changed("seed = 1", 'seed = 1\nprecision = "float32"'),
    ]:
        assert recipe.load_recipe(write(same)).sha256 == recipe.load_recipe(write(TEXT)).sha256


@pytest.mark.parametrize(
    "old, new",
    [
        ('"mine"', '"yours"'),
        ("seed = 1", "seed = 2"),
        ("seed = 1", 'seed = 1\nprecision = "bfloat16"'),
        ("digits", "mnist"),
        ("[128]", "[128, 128]"),
        ("epochs = 2", "epochs = 3"),
        ("64", "65"),
        ('"adamw"', '"adam"'),
        ("0.001", "0.0010000000000000002"),
        ("0.001", "0.001\namsgrad = true"),
    ],
)
def test_sha256_depends_on_every_value(old: str, new: str, write) -> None:
    assert (
        recipe.load_recipe(write(changed(old, new))).sha256
        != recipe.load_recipe(write(TEXT)).sha256
    )


@given(junk=st.binary(max_size=200), place=st.integers(0, len(TEXT)))
def test_arbitrary_bytes_raise_at_most_repro_error(
    junk: bytes, place: int, tmp_path_factory
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.toml"
    path.write_bytes(TEXT.encode()[:place] + junk + TEXT.encode()[place:])
    try:
        recipe.load_recipe(str(path))
    except ReproError as error:
        assert str(error).startswith(f"recipe {path}: ")


def test_byte_order_mark_is_accepted(write) -> None:
    marked = recipe.load_recipe(write(b"\xef\xbb\xbf" + TEXT.encode()))
    assert marked == recipe.load_recipe(write(TEXT))


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_recipe_toml_is_read_back(name: str, write) -> None:
    loaded = recipe.load_recipe(name)
    for one in (loaded, msgspec.structs.replace(loaded, trace="op")):
        assert recipe.load_recipe(write(recipe.recipe_toml(one))) == one
