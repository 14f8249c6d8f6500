"""Alter the files that reproml reads: their bytes, the values of their JSON or TOML, or their type.

Traces and checkpoints get the right hashes again, as anybody can write them, so that the code after the
check of the hashes is reached as well.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any, Callable

import tomli

from reproml.tracing import chain

# fmt: off
MARKUP = ["<script>CANARY</script>", '"><img src=CANARY>']
CODE = [
    "$(touch CANARY)", "`touch CANARY`", "'; touch CANARY; '", "__import__('os').system('touch CANARY')",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "!!python/object/apply:os.system ['touch CANARY']", "cos\nsystem\n(S'touch CANARY'\ntR.",
]
TEXTS = [
    "", "x", "-1", "1e999", "0" * 16, "0" * 64, "exact", "native", "none", "step", "op", "end", "mnist",
    "sgd", "../../up", "/etc/passwd", "..", ".", "a\0b", "new\nline", "x" * 100_000, "é", "\u202e",
    "\udcff", "\ufeff", "\x1b[77m", "\x1b]0;CANARY\x07", "\x9b77m", "\r", "\x7f\b", "\u2028", "{}{0}%s",
    "[/]", "[bold]x[/bold]", "F64", "F16", "BF16", "BOOL", "I64", "U16", "C64", "F8_E4M3", "F4",
    "LD_PRELOAD", "__metadata__", "2026-11-29T00:00:00+00:00", "١٢", *MARKUP, *CODE,
]
# A text <<...>> stands for itself without quotes, where json.dumps has no such value.
RAW = [
    "NaN", "-Infinity", "inf", "1e999", "1e-400", "-0.0", "9" * 20_000, "1" + "0" * 400, '"\\ud800"',
    "1979-05-27", "[" * 3000, "[" * 900 + "]" * 900, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 900 + "1" + "}" * 900,
]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 5, 2**31, 2**53, 2**63, 2**64, 10**400, 1e308, 5e-324, -0.5, [], {}, [[]],
    [{}], ["x"], [None], [1], [["0"]], [["0", "0"]], ["\x1b[77m"], {"x": "\x1b[77m"}, {"\x1b[77m": 1},
    {"kind": []}, [0, 0], [0, 8], [8, 0], [-1, 4], [0, 2**63], [2**32, 2**32], [10**9] * 3, [1] * 100, [0],
    [1.5, "x"], *TEXTS, *(f"<<{raw}>>" for raw in RAW),
]
SNIPPETS = [
    b"", b"\0", b"\xff", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"\n", b"[" * 2000,
    b"9" * 20_000, b"\xff" * 8, b"\x80\x02c", b'"../../up"', b'{"a":1,"a":2}', b"= [[", b"e308",
    b"\x1b[77m", b"\\u001b[77m", b"\\u202e", b"\\udcff", b"\xef\xbb\xbf", b"\r\n",
    *(text.encode() for text in MARKUP + CODE),
]
# fmt: on


def kind_of(path: Path) -> str:
    """Return the kind of a file, for the choice of its alterations and for the statistics."""
    if path.suffix == ".safetensors":
        return "checkpoint" if path.name.startswith("step-") else "safetensors"
    if path.suffix in (".trace", ".again", ".jsonl"):
        return "trace"
    kinds = {"golden": "golden", "mnist": "data"}
    return "recipe" if path.suffix == ".toml" else kinds.get(path.parent.name, "run")


def alter_file(path: Path, chance: random.Random) -> str:
    """Damage a file; return its kind."""
    kind, old = kind_of(path), path.read_bytes()
    if chance.random() < 0.03:
        alter_type(path, chance)
        return kind
    try:
        new = alter_bytes(old, chance) if chance.random() < 0.4 else STRUCTURED[kind](old, chance)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        new = alter_bytes(old, chance)  # it was damaged before, or has no structure
    path.write_bytes(new)
    if kind == "checkpoint" and chance.random() < 0.8:
        step = path.name[:14] if chance.random() < 0.9 else "step-00000004-"
        path.rename(path.with_name(f"{step}{hashlib.sha256(new).hexdigest()}.safetensors"))
    return kind


def alter_type(path: Path, chance: random.Random) -> None:
    """Replace a file by an empty one or by something that is not a file."""
    path.unlink()
    make: list[Callable[[Path], Any]] = [Path.touch, Path.mkdir, os.mkfifo]
    link = chance.choice(["absent", "/dev/zero", path.name])
    make += [lambda path: path.symlink_to(link)] * 3
    chance.choice(make)(path)


def alter_bytes(content: bytes, chance: random.Random) -> bytes:
    """Return the bytes altered in one to four places."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        at = chance.randrange(len(content) + 1)
        if chance.random() < 0.5:
            at = min(at, chance.randrange(400))  # headers of binary files more often
        end = min(len(content), at + chance.choice([0, 1, 1, 2, 8, 100, 100_000]))
        new = chance.choice(SNIPPETS)
        if chance.random() < 0.3 and at < len(content):
            end, new = at + 1, bytes([content[at] ^ 1 << chance.randrange(8)])
        if chance.random() < 0.1:
            start = chance.randrange(len(content) + 1)
            new = content[start : start + chance.randrange(200)]
        content = content[:at] + new + content[end:]
        if chance.random() < 0.1:
            content = content[:at]
    return content


class Twin(str):
    """A key that a dictionary can have beside the equal one, so that JSON has it twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def alter_value(tree: Any, chance: random.Random) -> None:
    """Replace, delete, add, rename or double one value somewhere in a tree of JSON."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = chance.choice(keys)
        if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.2:
            break
        node = node[key]
    value, how = copy.deepcopy(chance.choice(VALUES)), chance.random()
    if how < 0.1:
        del node[key]
    elif how < 0.3 and isinstance(node, dict):
        name = Twin(key) if how < 0.15 else chance.choice(TEXTS)
        node[name] = node.pop(key) if how > 0.22 else chance.choice([value, node[key]])
    elif how < 0.35 and isinstance(node, list):
        node.insert(key, value)
    elif how < 0.45:
        node[key] = copy.deepcopy(node[chance.choice(keys)])
    elif how < 0.65 and isinstance(node[key], (int, float)):
        node[key] = chance.choice([node[key] + 1, node[key] - 1, -node[key], node[key] * 1000])
    elif how < 0.65 and isinstance(node[key], str):
        node[key] = node[key][1:] + chance.choice("0f")  # a hash remains one
    else:
        node[key] = value


def altered(tree: Any, chance: random.Random) -> Any:
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        if tree:
            alter_value(tree, chance)
    return tree


def encoded(tree: Any) -> bytes:
    """Return a tree as JSON on one line, with raw values."""
    text = json.dumps(tree, separators=(",", ":"))
    return re.sub(r'"<<(.*?)>>"', lambda m: str(json.loads(f'"{m[1]}"')), text).encode()


def alter_json(content: bytes, chance: random.Random) -> bytes:
    return encoded(altered(json.loads(content), chance))


def alter_recipe(content: bytes, chance: random.Random) -> bytes:
    tree = altered(tomli.loads(content.decode()), chance)
    tables = {k: v for k, v in tree.items() if isinstance(v, dict)}
    lines = [encoded(k) + b" = " + encoded(v) for k, v in tree.items() if k not in tables]
    for table, members in tables.items():
        lines.append(b"[" + encoded(table) + b"]")
        lines += [
            encoded(k) + b" = " + encoded(v).replace(b'":', b'"=') for k, v in members.items()
        ]
    return b"\n".join(lines)


def alter_tensors(content: bytes, chance: random.Random) -> bytes:
    """Alter the header of a safetensors file: offsets, shapes, dtypes, names, metadata, its length."""
    length = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    head = header.get("__metadata__", {}).get("reproml")
    if head and chance.random() < 0.6:  # of a checkpoint
        header["__metadata__"]["reproml"] = alter_json(head.encode(), chance).decode()
    else:
        altered(header, chance)
    text = encoded(header)
    length = len(text)
    if chance.random() < 0.1:
        length = chance.choice([0, 1, length - 1, length + 1, 10**8 + 1, 2**63, 2**64 - 1])
    if chance.random() < 0.1:
        tensors = chance.choice([b"", tensors[:-1], tensors + b"\0" * 8, b"\xff" * len(tensors)])
    return length.to_bytes(8, "little") + text + tensors


def alter_trace(content: bytes, chance: random.Random) -> bytes:
    def alter(lines: list[Any]) -> None:
        for _ in range(chance.choice([1, 1, 2, 4])):
            alter_value(chance.choice([lines[0], *lines[:4], *lines]), chance)
        if chance.random() < 0.2:
            at = chance.randrange(1, len(lines))
            lines[at : at + chance.randrange(2)] = [chance.choice(lines[1:])] * chance.randrange(3)

    return forge(content, alter)


def forge(content: bytes, alter: Callable[[list[Any]], None]) -> bytes:
    """Return a trace with altered lines and all hashes right, as anybody can write it."""
    lines = [json.loads(line) for line in content.splitlines()]
    for line in lines:
        line.pop("head", line.pop("sha256", None))
    alter(lines)
    text, head = encoded(lines[0]), chain._START
    sha256 = hashlib.sha256(text).hexdigest().encode()
    forged = text[:-1] + b',"sha256":"' + sha256 + b'"}\n'
    for text in map(encoded, lines[1:]):
        head = hashlib.sha256(head.encode() + text).hexdigest()
        forged += text[:-1] + chain._tail(head)
    return forged


STRUCTURED = {"trace": alter_trace, "recipe": alter_recipe, "golden": alter_json, "run": alter_json}
STRUCTURED |= {"checkpoint": alter_tensors, "safetensors": alter_tensors, "data": alter_bytes}
