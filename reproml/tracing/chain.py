"""Write and read a trace file: JSON lines in a hash chain, so that no change goes unnoticed.

The first line is the header: {"reproml trace": 1, "level": ..., ..., "sha256": of the line without it}.
Each further line is an entry whose last key is its head,

    head = SHA-256 of (the head before it, in hexadecimal, then the line without ',"head":"..."'),

where the head before the first entry is the SHA-256 of "reproml trace 1". The header is not part of the
chain: two runs that did the same on two machines have the same heads, and equal heads mean that all entries
up to them are equal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional, Union

import msgspec
from msgspec import Meta

from reproml.errors import ReproError
from reproml.files import open_regular

FORMAT = 1
_KEY = "reproml trace"
_BEGINNING = b'{"reproml trace":'
_encode = msgspec.json.Encoder().encode
_SHA256 = hashlib.sha256()
_START = hashlib.sha256(b"reproml trace 1").hexdigest()

_Hex = Annotated[str, Meta(pattern="^[0-9a-f]{1,16}$")]
_Count = Annotated[int, Meta(ge=0, lt=2**53)]


class _Optimizer(msgspec.Struct, tag_field="entry", tag="optimizer"):
    """Made when an optimizer takes its first step. The recorder writes these entries."""

    optimizer: _Count
    kind: str
    numerics: str
    settings: list[dict[str, str]]
    tensors: list[str]
    shapes: list[list[int]]
    weights: list[str]
    kinds: list[str] = []
    modules: list[str] = []


class _About(msgspec.Struct):
    """How a step was computed; only what has changed since the step before."""

    loaders: list[dict[str, Union[str, int, bool, None]]] = []
    batch: list[str] = []
    losses: list[str] = []  # dtypes and shapes; none if all losses so far are float32
    lr: list[Optional[float]] = []
    seed: str = ""
    threads: _Count = 0
    precision: str = ""
    training: bool = True
    autocast: str = ""
    compiled: bool = False


class _Step(msgspec.Struct, tag_field="entry", tag="step"):
    epoch: _Count
    step: _Count
    optimizer: _Count
    random: str
    batch: list[tuple[str, _Hex]]
    loss: list[str]
    gradients: list[Optional[str]]
    weights: list[str]
    sample: list[Optional[float]]
    gradient: list[Optional[float]] = []
    about: _About = msgspec.field(default_factory=_About)


class _Operator(msgspec.Struct, tag_field="entry", tag="op", rename={"inputs": "in"}):
    step: _Count
    op: str
    line: str
    inputs: list[str]
    out: list[str]
    shapes: list[str]
    backward: Optional[str] = None


class _Epoch(msgspec.Struct, tag_field="entry", tag="epoch"):
    epoch: _Count
    step: _Count
    weights: list[list[str]]


class _End(_Epoch, tag_field="entry", tag="end"):
    pass


_check = msgspec.json.Decoder(Union[_Optimizer, _Step, _Operator, _Epoch, _End]).decode


class Writer:
    """Appends entries, each with one write to the file, so that a crash truncates at most the last line."""

    def __init__(self, path: Path, header: dict[str, Any], head: Optional[dict[str, Any]] = None):
        """Begin a file, which may replace only another trace; or, with `head`, continue one.

        Raises ReproError if the file cannot be written, is not a trace, or does not contain that head.
        """
        self.entries, self.head = 0, _START
        try:
            if head is not None:
                self._resume(path, header["level"], head)
                return
            if path.is_fifo() or (path.exists() and path.stat().st_size and not is_trace(path)):
                raise ReproError(
                    f"{path} exists and is not a trace of reproml; choose another file"
                )
            self._file = path.open("wb", buffering=0)
            self._file.write(_sealed({_KEY: FORMAT, **header}))
        except OSError as error:
            raise ReproError(f"cannot write the trace {path}: {error.strerror}") from None

    def _resume(self, path: Path, level: str, head: dict[str, Any]) -> None:
        if not path.exists():
            raise ReproError(
                f"cannot resume trace {path}: file not found; restore it, resume without --trace, "
                "or start the training again"
            )
        reader = Reader(path)
        if reader.header["level"] != level:
            raise ReproError(
                f"{path} was traced at level {reader.header['level']}, so it cannot be resumed "
                f"at level {level}"
            )
        entries = iter(reader)
        while reader.entries < head["entries"] and next(entries, None) is not None:
            pass
        if (reader.entries, reader.head) != (head["entries"], head["sha256"]):
            raise ReproError(
                f"cannot resume trace {path}: it does not contain the checkpoint's entry "
                f"{head['entries']}; it belongs to another run or was truncated; restore the right "
                "file, resume without --trace, or start the training again"
            )
        self.entries, self.head = reader.entries, reader.head
        os.truncate(path, reader.offset)
        self._file = path.open("ab", buffering=0)

    def append(self, entry: dict[str, Any]) -> None:
        text = _encode(entry)
        sha = _SHA256.copy()  # half as expensive as a new one
        sha.update(self.head.encode())
        sha.update(text)
        self.head = sha.hexdigest()
        self.entries += 1
        self._file.write(text[:-1] + _tail(self.head))

    def sync(self) -> None:
        """Flush the file to the disk, so that no checkpoint outlives the entries that it counts."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Reader:
    """Iterates over the entries of a trace file line by line and checks the chain."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ReproError if the file is not a trace or has a newer format."""
        self.path, self.entries, self.head = path, 0, _START
        self.cut = False  # whether the last line is truncated
        try:
            with open_regular(path) as file:
                first = file.readline(1 << 24)
        except OSError as error:
            raise ReproError(f"cannot read the trace {path}: {error.strerror}") from None
        if not first:
            raise ReproError(f"{path} is empty: the run ended before its trace began")
        if first.startswith(_BEGINNING) and not first.endswith(b"\n"):
            raise ReproError(f"{path} is truncated in its first line: the run recorded nothing")
        self.header = _object(first)
        version = self.header.get(_KEY)
        if not isinstance(version, int) or version < 1:
            raise ReproError(f"{path} is not a trace of reproml")
        if version > FORMAT:
            raise ReproError(
                f"{path} has format {version} of traces, this reproml reads {FORMAT}; update reproml"
            )
        unsealed = {key: value for key, value in self.header.items() if key != "sha256"}
        if _sealed(unsealed) != first:
            raise ReproError(f"{path} is damaged: its first line does not have its SHA-256")
        if not isinstance(self.header.get("level"), str):
            raise ReproError(f"{path} is damaged: it has no level of tracing; record it again")
        self.offset = len(first)  # where the last entry that was returned ends

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the entries, without their heads. Raises ReproError at the first that is damaged."""
        with open_regular(self.path) as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    self.cut = True
                    return
                text = line[:-_TAIL] + b"}"
                head = hashlib.sha256(self.head.encode() + text).hexdigest()
                entry = _entry(text)
                if line[-_TAIL:] != _tail(head) or entry is None:
                    raise ReproError(
                        f"{self.path} is damaged: entry {self.entries + 1} (line {self.entries + 2}) "
                        "is not what was written; record the trace again"
                    )
                self.entries, self.head, self.offset = (
                    self.entries + 1,
                    head,
                    self.offset + len(line),
                )
                yield entry


def last_head(path: Path) -> Optional[str]:
    """Return the head of a trace's last entry, None if there is none. It does not check the chain."""
    with open_regular(path) as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL))
        end = file.read()
    head = end[-67:-3].decode("ascii", "replace")
    return head if end == _tail(head) else None


def is_trace(path: Path) -> bool:
    """Return whether the file begins like a trace, damaged or not."""
    with open_regular(path) as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


def _entry(text: bytes) -> Optional[dict[str, Any]]:
    """Return an entry, None if it is not one. The chain does not show it: anybody can make one."""
    try:
        _check(text)
        entry: dict[str, Any] = json.loads(text)  # fails for a number of thousands of digits
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return entry


def _tail(head: str) -> bytes:
    return b',"head":"%s"}\n' % head.encode()


_TAIL = len(_tail(_START))


def _sealed(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"))
    return f'{text[:-1]},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
