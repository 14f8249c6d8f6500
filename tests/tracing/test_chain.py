from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reproml.errors import ReproError
from reproml.tracing import chain
from reproml.tracing.chain import Reader, Writer, is_trace

ENTRIES = [{"entry": "end", "epoch": 1, "step": i, "weights": [[f"{i}"]]} for i in range(1, 6)]


def written(path: Path, entries: list = ENTRIES) -> list[dict]:
    """Write the entries; return the head after each."""
    writer = Writer(path, {"level": "step", "name": "ü"})
    heads = []
    for entry in entries:
        writer.append(entry)
        heads.append({"entries": writer.entries, "sha256": writer.head})
    writer.close()
    return heads


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written(tmp_path / "trace")
    return tmp_path / "trace"


def test_entries_are_read_back(path):
    reader = Reader(path)
    assert list(reader) == ENTRIES
    assert reader.header["level"] == "step" and reader.header["name"] == "ü"
    assert not reader.cut and reader.entries == 5 and is_trace(path)


def test_chain_follows_its_documented_definition(path):
    """Follow the docstring of the module, with sha256sum."""
    head = hashlib.sha256(b"reproml trace 1").hexdigest()
    for line in path.read_text().splitlines()[1:]:
        text, _, tail = line.rpartition(',"head":')
        head = hashlib.sha256(f"{head}{text}}}".encode()).hexdigest()
        assert tail == f'"{head}"}}' and json.loads(line)["head"] == head


def test_equal_heads_mean_equal_entries(tmp_path):
    a = written(tmp_path / "a")
    b = written(tmp_path / "b", [*ENTRIES[:2], {**ENTRIES[2], "epoch": 2}, *ENTRIES[3:]])
    assert [x == y for x, y in zip(a, b)] == [True, True, False, False, False]


@given(st.data())
@settings(max_examples=200)
def test_any_flipped_bit_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flipped") / "trace"
    written(path)
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    try:
        reader = Reader(path)
        entries = list(reader)
        assert reader.cut and entries == ENTRIES[:-1]  # the end of the last line
    except ReproError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@given(st.data())
def test_truncated_file_yields_its_complete_entries(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "trace"
    written(path)
    raw = path.read_bytes()
    length = data.draw(st.integers(0, len(raw) - 1))
    path.write_bytes(raw[:length])
    complete = raw[:length].count(b"\n")
    if complete == 0:
        with pytest.raises(
            ReproError, match="is empty|is truncated in its first line|is not a trace"
        ):
            Reader(path)
        return
    reader = Reader(path)
    assert list(reader) == ENTRIES[: complete - 1]
    assert reader.cut == (not raw[:length].endswith(b"\n"))


def test_damaged_entry_is_named(path):
    path.write_text(path.read_text().replace('"step":3', '"step":4'))
    with pytest.raises(ReproError, match=r"is damaged: entry 3 \(line 4\) is not what was written"):
        list(Reader(path))


def test_number_of_many_digits_is_damage(path):
    """Anyone can write a key that no entry has, with the right header."""
    text = b'{"entry":"end","epoch":1,"step":1,"weights":[],"more":%s}' % (b"9" * 20_000)
    head = hashlib.sha256(chain._START.encode() + text).hexdigest()
    header = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(header + text[:-1] + chain._tail(head))
    with pytest.raises(ReproError, match="entry 1"):
        list(Reader(path))


def test_removed_entry_is_found(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(ReproError, match="entry 2"):
        list(Reader(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello\n", "is not a trace of reproml"),
        (b'{"a": 1}\n', "is not a trace of reproml"),
        (b"[" * 100_000 + b"\n", "is not a trace of reproml"),
        (b"\xff\x00\n", "is not a trace of reproml"),
        (b'{"reproml trace":2,"more":0}\n', "has format 2 of traces, this reproml reads 1; update"),
        (b'{"reproml trace":1,"level":"step"}\n', "is damaged: its first line"),
        (b'{"reproml trace":1,"lev', "is truncated in its first line"),
    ],
)
def test_unusable_file_is_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(ReproError, match=message):
        Reader(path)


def test_only_a_trace_is_replaced(path, tmp_path):
    written(path, ENTRIES[:1])
    assert list(Reader(path)) == ENTRIES[:1]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ReproError, match="is not a trace"):
        Writer(tmp_path / "notes.txt", {"level": "step"})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReproError, match="is not a trace"):
        Writer(tmp_path / "pipe", {"level": "step"})
    with pytest.raises(ReproError, match="cannot write the trace .*No such file"):
        Writer(tmp_path / "none" / "trace", {"level": "step"})


@pytest.mark.parametrize("rest", [b"", b'{"entry":"st'])  # and after a crash
@pytest.mark.parametrize("at", range(5))
def test_resume_from_a_head(tmp_path, at, rest):
    heads = written(tmp_path / "trace")
    complete = (tmp_path / "trace").read_bytes()
    (tmp_path / "trace").write_bytes(complete + rest)
    writer = Writer(tmp_path / "trace", {"level": "step"}, heads[at])
    for entry in ENTRIES[at + 1 :]:
        writer.append(entry)
    writer.close()
    assert (tmp_path / "trace").read_bytes() == complete


def test_resume_from_foreign_head_is_refused(path):
    before = path.read_bytes()
    for head in ({"entries": 3, "sha256": "0" * 64}, {"entries": 6, "sha256": "0" * 64}):
        with pytest.raises(ReproError, match="does not contain the checkpoint"):
            Writer(path, {"level": "step"}, head)
    with pytest.raises(ReproError, match="at level step, so it cannot be resumed at level op"):
        Writer(path, {"level": "op"}, {"entries": 0, "sha256": ""})
    assert path.read_bytes() == before
