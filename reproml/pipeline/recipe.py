"""Read a recipe: the description of an experiment in a TOML file, checked completely when it is read.

    recipe = load_recipe("mnist-mlp")            # one of reproml/pipeline/recipes/
    recipe = load_recipe("experiments/my.toml")  # or a file of your own

Optimizer settings that are left out have PyTorch's defaults. Unknown keys, wrong types and values out of
range are errors that name the key.

Everything that a recipe can name is declared in this file. To add a data set, see data.py; a model,
models.py; a preprocessing, preprocess.py; an optimizer, `build_optimizer` in train.py.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_type_hints

import msgspec
from msgspec import Meta

from reproml.errors import ReproError
from reproml.evidence.provenance import Provenance, read_provenance

_FOLDER = Path(__file__).parent / "recipes"
_MAX_BYTES = 1 << 20  # a recipe is a page of text

# The upper limits only exclude typing errors and numbers that do not fit float32 or memory.
_Name = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9-]*\Z", max_length=64)]  # used in file names
_Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Width = Annotated[int, Meta(ge=1, le=65_536)]
_Count = Annotated[int, Meta(ge=1, le=1_000_000)]
_LearningRate = Annotated[float, Meta(gt=0, le=1000)]
_Decay = Annotated[float, Meta(ge=0, le=1000)]
_Epsilon = Annotated[float, Meta(ge=0, le=1)]
_Beta = Annotated[float, Meta(ge=0, lt=1)]
_Momentum = Annotated[float, Meta(ge=0, le=1)]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the recipe. It is immutable and has no unknown keys."""


class _Kind(_Table, frozen=True, tag_field="kind"):
    """A table whose key `kind` selects one of several classes."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


class Data(_Table, frozen=True):
    name: Literal["mnist", "digits"]


class Standardize(_Kind, frozen=True, tag="standardize"):
    """Compute (v - mean) / std, with mean and population standard deviation of the training set."""


class MLP(_Kind, frozen=True, tag="mlp"):
    """Flatten, then linear layers with ReLU between them; `hidden` are the inner widths."""

    hidden: Annotated[tuple[_Width, ...], Meta(max_length=64)]


class LeNet5(_Kind, frozen=True, tag="lenet5"):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, as is usual today."""


class Train(_Table, frozen=True):
    epochs: _Count
    batch_size: _Count


class AdamW(_Kind, frozen=True, tag="adamw"):
    """torch.optim.AdamW and its defaults."""

    learning_rate: _LearningRate
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: _Epsilon = 1e-8
    weight_decay: _Decay = 0.01
    amsgrad: bool = False


class Adam(_Kind, frozen=True, tag="adam"):
    """torch.optim.Adam and its defaults."""

    learning_rate: _LearningRate
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: _Epsilon = 1e-8
    weight_decay: _Decay = 0.0
    amsgrad: bool = False


class SGD(_Kind, frozen=True, tag="sgd"):
    """torch.optim.SGD and its defaults."""

    learning_rate: _LearningRate
    momentum: _Momentum = 0.0
    dampening: _Momentum = 0.0
    weight_decay: _Decay = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and no dampening")


# To add a kind: a class above, and its name here. Each class is one `kind` of its table.
Preprocess = Union[Standardize]
Model = Union[MLP, LeNet5]
Optimizer = Union[AdamW, Adam, SGD]


class Recipe(_Table, frozen=True):
    """Everything that the weights depend on, and the level at which the training is traced."""

    name: _Name
    seed: _Seed
    data: Data
    preprocess: Preprocess
    model: Model
    train: Train
    optimizer: Optimizer
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, float32 weights
    trace: Optional[Literal["epoch", "step", "op"]] = (
        None  # recorded at this level; changes no result
    )

    @property
    def sha256(self) -> str:
        """SHA-256 of all values, including defaults, as sorted JSON. Comments do not change it."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()


def canonical_json(recipe: Recipe) -> str:
    """Return everything that the weights depend on as ASCII JSON, keys sorted, without white space."""
    values = recipe_values(recipe)
    del values["trace"]
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as dictionaries and lists.

    `precision` is left out where it is float32: recipes are older than this key, and keep their hashes.
    """
    values: dict[str, Any] = msgspec.to_builtins(recipe)
    if recipe.precision == "float32":
        del values["precision"]
    return values


def recipe_toml(recipe: Recipe) -> str:
    """Return a recipe as the TOML file that `load_recipe` reads. JSON's values are also TOML's."""
    values = recipe_values(recipe)
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    plain = {k: v for k, v in values.items() if k not in tables and v is not None}
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    for table, members in tables.items():
        lines += [f"[{table}]", *(f"{k} = {json.dumps(v)}" for k, v in members.items())]
    return "\n".join(lines) + "\n"


def recipe_names() -> list[str]:
    """Return the names of the recipes that are installed with reproml."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read and check a recipe.

    The argument is a path if it contains a `/`, ends in `.toml` or is an existing file; otherwise it must
    be one of `recipe_names()`. A path that ends in `.json` is a provenance, which states a recipe. Raises
    ReproError with the reason: no such recipe, not readable, not TOML, or the key that is unknown, missing,
    of the wrong type or out of range.
    """
    if "/" in name_or_path or "\\" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path)
    elif name_or_path in recipe_names():
        path = _FOLDER / f"{name_or_path}.toml"
    elif _is_file(name_or_path):
        path = Path(name_or_path)
    else:
        raise ReproError(
            f"no recipe is named {name_or_path!r}; the names are {', '.join(recipe_names())}, "
            "or give the path of a .toml file"
        )
    if path.suffix == ".json":
        return stated_recipe(read_provenance(path))
    content = _read_bytes(path).removeprefix(codecs.BOM_UTF8)  # Windows' editors write this mark
    try:
        return _decode(content)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8"
    except msgspec.ValidationError as error:
        reason = _readable(str(error)) + _allowed(str(error), content)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        reason = f"not TOML: {error}"
    raise ReproError(f"recipe {path}: {reason}")


def stated_recipe(provenance: Provenance) -> Recipe:
    """Return the recipe of a provenance. Raises ReproError if it has none."""
    if "script" in provenance.parameters:
        raise ReproError(
            f"{provenance.path} is of the script {provenance.parameters['script']}, not of a recipe; "
            "train it again with reproml run --provenance"
        )
    try:
        return msgspec.convert(provenance.parameters.get("recipe"), Recipe)
    except msgspec.ValidationError as error:
        raise ReproError(f"{provenance.path} states no valid recipe: {error}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a directory, or a device without an end
            raise ReproError(f"recipe {path}: not a file")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ReproError(f"recipe {path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ReproError(f"recipe {path}: cannot be read: {reason}") from None
    if len(content) > _MAX_BYTES:
        raise ReproError(f"recipe {path}: larger than {_MAX_BYTES} bytes, so not a recipe")
    return content


def _decode(content: bytes) -> Recipe:
    values: Any = msgspec.toml.decode(content)
    recipe = msgspec.convert(values, Recipe)
    if "kind" not in values["preprocess"]:  # optional for msgspec if only one kind exists
        raise msgspec.ValidationError("Object missing required field `kind` - at `$.preprocess`")
    return recipe


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # the name is too long or contains NUL
        return False


def _allowed(message: str, content: bytes) -> str:
    """Return the allowed values or keys to add to msgspec's message, or an empty text."""
    what, _, where = message.partition(" - at `$")
    table, _, key = where.strip(".`").partition(".")
    if table == "name" and "matching regex" in what:
        return (
            "; a name has lower-case letters, digits and hyphens, and does not begin with a hyphen"
        )
    if (table, key) == ("data", "name") and "enum" in what:
        return f"; allowed: {', '.join(get_args(get_type_hints(Data)['name']))}"
    if table == "precision":
        return f"; allowed: {', '.join(get_args(get_type_hints(Recipe)['precision']))}"
    tables: dict[str, Any] = {"": Recipe, "data": Data, "preprocess": Preprocess, "model": Model}
    tables.update(train=Train, optimizer=Optimizer)
    if table not in tables:
        return ""
    classes = get_args(tables[table]) or (tables[table],)
    kinds = {cls.__struct_config__.tag: cls for cls in classes}
    if key == "kind" or "missing required field `kind`" in what:
        return f"; allowed: {', '.join(kinds)}"
    if "unknown field" in what:
        values = msgspec.toml.decode(content).get(table)
        kind = values.get("kind") if isinstance(values, dict) else None
        cls = kinds.get(str(kind), classes[0])
        return (
            f"; its keys are {', '.join(['kind'] * (None not in kinds) + [*cls.__struct_fields__])}"
        )
    return ""


def _readable(message: str) -> str:
    """Return msgspec's message with the key first: "train.epochs: expected `int` >= 1"."""
    what, _, where = message.partition(" - at `$")
    what = what.replace("Object contains", "contains").replace("Object missing", "missing")
    what = what.replace("field", "key")
    where = where.strip(".`")
    return f"{where}: {what[0].lower()}{what[1:]}" if where else what[0].lower() + what[1:]
