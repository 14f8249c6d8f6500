"""Data: the right bytes from every source, and a one-sentence error for everything that can go wrong.

A tiny MNIST with the same four names replaces the real one. Servers listen on the loopback only.
"""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reproml.errors import ReproError
from reproml.pipeline import data

IMAGES = "train-images-idx3-ubyte.gz"


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _tiny() -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    shapes = [(50, 5, 4), (50,), (20, 5, 4), (20,)]
    arrays = [rng.integers(0, 10, shape) for shape in shapes]
    return {name: gzip.compress(idx(array), mtime=0) for name, array in zip(data.MNIST, arrays)}


FILES = _tiny()
TABLE = {
    name: data._File(len(content), hashlib.sha256(content).hexdigest())
    for name, content in FILES.items()
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, no user settings, no public mirror, no proxy and no pauses."""
    for name in ("REPROML_DATA_DIR", "REPROML_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    folder = tmp_path / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: folder)
    monkeypatch.setattr(data, "MIRRORS", ())
    monkeypatch.setattr(data, "PAUSE", 0.0)
    return folder / "mnist"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MNIST", TABLE)


@pytest.fixture
def folder(tmp_path: Path, tiny: None) -> Path:
    """Make a folder with the tiny MNIST."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


def good(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


def error_page(request: BaseHTTPRequestHandler, content: bytes) -> None:
    good(request, b"<html>Please log in to the hotel's network</html>")


def not_found(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_error(404)


def altered(request: BaseHTTPRequestHandler, content: bytes) -> None:
    good(request, content[:-1] + bytes([content[-1] ^ 1]))


def longer(request: BaseHTTPRequestHandler, content: bytes) -> None:
    good(request, content + b"\0")


def cut_off(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content[: len(content) // 2])
    request.close_connection = True


def endless(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    try:
        while True:
            request.wfile.write(bytes(1 << 16))
    except OSError:
        pass


def piecemeal(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    for byte in content[:20]:
        request.wfile.write(bytes([byte]))
        time.sleep(0.001)
    request.wfile.write(content[20:])


def stalled(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    request.wfile.write(content[:10])
    request.server.stop.wait(60)  # type: ignore[attr-defined]


def garbage(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.wfile.write(b"\0\1\2 not http at all\r\n\r\n")


def redirect(to: str) -> Answer:
    """Redirect to a path on this mirror, or to another address."""

    def answer(request: BaseHTTPRequestHandler, content: bytes) -> None:
        request.send_response(302)
        request.send_header("Location", to)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


class Mirror(ThreadingHTTPServer):
    """A mirror of the tiny MNIST that gives each answer in turn, and then repeats the last."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[str] = []
        self.stop = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path.lstrip("/"))
                answer = mirror.answers.pop(0) if len(mirror.answers) > 1 else mirror.answers[0]
                answer(self, FILES[mirror.requests[-1]])

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def mirror(tiny: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    """Yield a function that starts a mirror with these answers and sets REPROML_MIRROR to it."""
    servers = []

    def start(*answers: Answer) -> Mirror:
        server = Mirror(*answers)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("REPROML_MIRROR", server.url + "/")
        return server

    yield start
    for server in servers:
        server.stop.set()
        server.shutdown()
        server.server_close()


def check_tiny(dataset: data.Dataset) -> None:
    for split, images, labels in [
        (dataset.train, IMAGES, "train-labels-idx1-ubyte.gz"),
        (dataset.test, "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    ]:
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64
        assert idx(split.images) == gzip.decompress(FILES[images])
        assert idx(split.labels) == gzip.decompress(FILES[labels])
    assert (dataset.name, dataset.levels, dataset.classes) == ("mnist", 256, 10)
    assert dataset.hashes == {name: file.sha256 for name, file in TABLE.items()}


def error_message(folder: Optional[Path] = None) -> str:
    with pytest.raises(ReproError) as caught:
        data.load_dataset("mnist", folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}  # also hidden ones


# --- the real data --------------------------------------------------------------------------------


def test_mnist_has_published_content(mnist_mirror: Path) -> None:
    dataset = data.load_dataset("mnist", mnist_mirror)
    assert dataset.train.images.shape == (60000, 28, 28)
    assert dataset.test.images.shape == (10000, 28, 28)
    # The published counts of the classes: 5,923 zeros and 6,742 ones among the training labels.
    assert np.bincount(dataset.train.labels).tolist()[:2] == [5923, 6742]
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert dataset.hashes[IMAGES].startswith("440fcabf73cc546f")


def test_mnist_equals_torchvision(mnist_mirror: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data.MNIST:
        (raw / name[: -len(".gz")]).write_bytes(gzip.decompress((mnist_mirror / name).read_bytes()))
    ours = data.load_dataset("mnist", mnist_mirror)
    for split, train in [(ours.train, True), (ours.test, False)]:
        theirs = datasets.MNIST(str(tmp_path), train=train)
        assert np.array_equal(split.images, theirs.data.numpy())
        assert np.array_equal(split.labels, theirs.targets.numpy())


def test_digits_equal_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch, dataset = load_digits(), data.load_dataset("digits")
    assert dataset.train.images.shape == (1500, 8, 8)
    assert dataset.test.images.shape == (297, 8, 8)
    assert np.array_equal(np.concatenate([dataset.train.images, dataset.test.images]), bunch.images)
    assert np.array_equal(np.concatenate([dataset.train.labels, dataset.test.labels]), bunch.target)
    for split in (dataset.train, dataset.test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64
        assert set(split.labels.tolist()) == set(range(dataset.classes))
        assert split.images.max() == dataset.levels - 1


@pytest.mark.parametrize("change", [1, 256, 0.5])
def test_altered_digits_raise(change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    bunch.images[3, 2, 1] += change  # 256 is lost in a cast to uint8
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bunch)
    with pytest.raises(ReproError, match="altered: the SHA-256 of images.uint8"):
        data.load_dataset("digits")


def test_unreadable_digits_raise_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    def broken() -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr(sklearn.datasets, "load_digits", broken)
    with pytest.raises(ReproError, match="digits cannot be read: .*; reinstall"):
        data.load_dataset("digits")


# --- IDX ------------------------------------------------------------------------------------------


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_idx_round_trip(array: np.ndarray) -> None:
    decoded = data._decode_idx(idx(array))
    assert decoded.dtype == np.uint8 and decoded.shape == array.shape
    assert np.array_equal(decoded, array)


def test_other_idx_types_raise() -> None:
    with pytest.raises(ValueError, match="not an IDX file"):
        data._decode_idx(b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0")


@given(st.binary(max_size=60), st.booleans())
def test_arbitrary_idx_bytes_decode_or_raise(junk: bytes, headed: bool) -> None:
    """The hash check keeps such bytes from the decoder, but the decoder handles them as well."""
    content = b"\0\0\x08" + junk if headed else junk
    try:
        decoded = data._decode_idx(content)
    except ValueError:
        return
    assert idx(decoded) == content


# --- a folder with the files -----------------------------------------------------------------


def test_data_folder_is_read_in_place(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tiny(data.load_dataset("mnist", folder))
    monkeypatch.setenv("REPROML_DATA_DIR", str(folder))
    check_tiny(data.load_dataset("mnist"))
    assert not cache.exists()  # nothing is copied


def test_folder_argument_overrides_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPROML_DATA_DIR", str(tmp_path / "other"))
    check_tiny(data.load_dataset("mnist", folder))


def test_data_folder_is_the_only_source(folder: Path, mirror) -> None:
    server = mirror(good)
    (folder / IMAGES).unlink()
    assert f"{folder / IMAGES} is missing" in error_message(folder)
    assert server.requests == []


@pytest.mark.parametrize("name", list(FILES))
def test_every_file_is_checked(name: str, folder: Path) -> None:
    content = FILES[name]
    for wrong, words in [
        (content[:-1], f"it ends after {len(content) - 1} of {len(content)} bytes"),
        (b"", "it ends after 0 of"),
        (content + b"\0", "it is longer than"),
    ]:
        (folder / name).write_bytes(wrong)
        message = error_message(folder)
        assert f"{folder / name} is not MNIST's file: " in message and words in message


@given(place=st.integers(min_value=0), bit=st.integers(0, 7), name=st.sampled_from(list(FILES)))
def test_one_altered_bit_is_detected(place: int, bit: int, name: str) -> None:
    content = bytearray(FILES[name])
    content[place % len(content)] ^= 1 << bit
    found = hashlib.sha256(content).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MNIST", TABLE)
        assert data._defect(name, FILES[name]) is None
        wrong = data._defect(name, bytes(content))
    assert wrong == f"its SHA-256 is {found}, not {TABLE[name].sha256}"


def test_hash_is_checked_before_decoding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def decompress(content: bytes) -> bytes:
        decoded.append(hashlib.sha256(content).hexdigest())
        return gzip_decompress(content)

    gzip_decompress = gzip.decompress
    monkeypatch.setattr(gzip, "decompress", decompress)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"a bomb")
    error_message(folder)
    assert decoded == [file.sha256 for file in list(TABLE.values())[:2]]


def test_paths_that_are_not_files_raise(folder: Path, tmp_path: Path) -> None:
    (folder / IMAGES).unlink()
    (folder / IMAGES).mkdir()
    assert "is not a file" in error_message(folder)
    (folder / IMAGES).rmdir()
    os.mkfifo(folder / IMAGES)  # reading it would block
    assert "is not a file" in error_message(folder)
    assert "is missing" in error_message(tmp_path / "none")
    assert "Not a directory" in error_message(folder / "t10k-labels-idx1-ubyte.gz")
    assert "cannot be read" in error_message(Path("a\0b"))
    (folder / IMAGES).unlink()
    (folder / IMAGES).symlink_to(IMAGES)
    assert "cannot be read" in error_message(folder)


# --- the cache and the mirrors --------------------------------------------------------------------


def test_second_load_uses_the_cache(mirror, cache: Path) -> None:
    server = mirror(good)
    check_tiny(data.load_dataset("mnist"))
    assert server.requests == list(FILES) and files(cache) == FILES
    check_tiny(data.load_dataset("mnist"))
    assert server.requests == list(FILES)


def test_cache_works_without_mirror(mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror(good)
    data.load_dataset("mnist")
    monkeypatch.delenv("REPROML_MIRROR")
    check_tiny(data.load_dataset("mnist"))


def test_mirror_folder_is_read_in_place(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPROML_MIRROR", str(folder))
    check_tiny(data.load_dataset("mnist"))
    assert not cache.exists()
    (folder / IMAGES).write_bytes(b"")
    assert f"{folder / IMAGES} is not MNIST's file" in error_message()


def test_public_mirrors_are_tried_in_turn(mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = mirror(not_found), mirror(good)
    monkeypatch.delenv("REPROML_MIRROR")
    monkeypatch.setattr(data, "MIRRORS", (first.url, second.url))
    check_tiny(data.load_dataset("mnist"))
    assert first.requests == second.requests == list(FILES)


def test_named_mirror_replaces_public_mirrors(mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    public, named = mirror(good), mirror(good)
    monkeypatch.setattr(data, "MIRRORS", (public.url,))
    data.load_dataset("mnist")
    assert public.requests == [] and named.requests == list(FILES)


@pytest.mark.parametrize("bad", [error_page, not_found, altered, longer, cut_off, garbage, stalled])
def test_transient_failure_is_retried(
    bad: Answer, mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bad is stalled:
        monkeypatch.setattr(data, "TIMEOUT", 1.0)
    server = mirror(bad, bad, good)
    check_tiny(data.load_dataset("mnist"))
    assert server.requests[:4] == [IMAGES] * 3 + [list(FILES)[1]] and files(cache) == FILES


@pytest.mark.parametrize(
    "bad, words",
    [
        (error_page, "it ends after 49 of"),
        (not_found, "HTTP Error 404"),
        (altered, "its SHA-256 is"),
        (longer, "it is longer than"),
        (endless, "it is longer than"),
        (cut_off, "it ends after"),
        (garbage, "not http"),
        (stalled, "timed out"),
        (redirect("file:///etc/hostname"), "is not allowed"),
    ],
)
def test_permanent_failure_raises_one_sentence(
    bad: Answer, words: str, mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bad is stalled:
        monkeypatch.setattr(data, "TIMEOUT", 1.0)
    server = mirror(bad)
    message = error_message()
    assert words in message and f"{server.url}/{IMAGES}" in message
    assert server.requests == [IMAGES] * data.ROUNDS
    assert files(cache) == {}


def test_redirected_download_is_checked(mirror, cache: Path) -> None:
    elsewhere, server = mirror(altered, good), mirror(good)
    server.answers = [redirect(f"{elsewhere.url}/{IMAGES}"), redirect(f"/{IMAGES}"), good]
    check_tiny(data.load_dataset("mnist"))
    assert elsewhere.requests == [IMAGES]  # wrong bytes; then the mirror's other path is used
    assert server.requests[:3] == [IMAGES] * 3 and files(cache) == FILES


def test_password_of_mirror_is_used_not_shown(
    mirror, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent to the mirror alone, not to the server that it redirects to."""
    seen: list[Optional[str]] = []

    def noting(answer: Answer) -> Answer:
        def note(request: BaseHTTPRequestHandler, content: bytes) -> None:
            seen.append(request.headers["Authorization"])
            answer(request, content)

        return note

    elsewhere = mirror(noting(good))
    server = mirror(noting(redirect(f"{elsewhere.url}/{IMAGES}")), noting(good))
    address = server.url.replace("http://", "HTTP://user:pass%40word@") + "/"
    monkeypatch.setenv("REPROML_MIRROR", address)
    check_tiny(data.load_dataset("mnist"))
    basic = "Basic " + base64.b64encode(b"user:pass@word").decode()
    assert seen == [basic, None, *[basic] * 3]
    assert "word" not in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["http", "HTTPS", "ftp"])
def test_password_of_mirror_is_in_no_message(
    scheme: str, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPROML_MIRROR", f"{scheme}://user:secret@127.0.0.1:1/x")
    message = error_message()
    assert "127.0.0.1:1/x" in message and "secret" not in message and "user" not in message


@pytest.mark.parametrize("headers", [True, False])
def test_dripping_mirror_is_given_up(
    headers: bool, mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LIMIT", 0.3)

    def dripping(request: BaseHTTPRequestHandler, content: bytes) -> None:
        if headers:
            request.send_response(200)
            request.end_headers()
        while not request.server.stop.wait(0.01):  # type: ignore[attr-defined]
            request.wfile.write(b"x")

    server = mirror(dripping)
    assert "not complete after 0 seconds" in error_message()
    assert server.requests == [IMAGES] * data.ROUNDS and files(cache) == {}


def test_circular_redirection_raises(mirror, cache: Path) -> None:
    mirror(redirect(f"/{IMAGES}"))
    assert "infinite loop" in error_message() and files(cache) == {}


def test_slow_mirror_succeeds(mirror) -> None:
    mirror(piecemeal)
    check_tiny(data.load_dataset("mnist"))


def test_damaged_cache_is_downloaded_again(mirror, cache: Path, capsys) -> None:
    mirror(good)
    data.load_dataset("mnist")
    (cache / IMAGES).write_bytes(FILES[IMAGES][:-3])
    check_tiny(data.load_dataset("mnist"))
    assert files(cache) == FILES
    assert "it ends after" in capsys.readouterr().err


def test_damaged_cache_stays_if_download_fails(mirror, cache: Path) -> None:
    server = mirror(good)
    data.load_dataset("mnist")
    server.answers = [not_found]
    (cache / IMAGES).write_bytes(b"damaged")
    assert "HTTP Error 404" in error_message()
    assert files(cache) == {**FILES, IMAGES: b"damaged"}


def test_offline_without_cache_raises(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Mirror(good)
    closed.server_close()  # nothing listens there any more
    monkeypatch.setattr(data, "MIRRORS", (closed.url,))
    message = error_message()
    assert "Connection refused" in message
    assert "REPROML_MIRROR" in message and "digits-mlp" in message


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a b/"])
def test_malformed_mirror_address_raises(
    url: str, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPROML_MIRROR", url)
    assert "cannot download MNIST from" in error_message()


@pytest.mark.parametrize("url", ["ftp://x/", "file://host/mnist"])
def test_unsupported_mirror_scheme_raises(
    url: str, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPROML_MIRROR", url)
    message = error_message()
    assert message.startswith(f"{url} is not a folder: give its path")
    assert "REPROML_MIRROR" in message


@pytest.mark.parametrize("variable", ["REPROML_DATA_DIR", "REPROML_MIRROR"])
@pytest.mark.parametrize("form", ["~", "file"])
def test_folder_accepts_home_and_file_address(
    form: str, variable: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = folder.rename(folder.with_name("a folder"))
    monkeypatch.setenv("HOME", str(named.parent))
    address = f"file://{named}".replace(" ", "%20")
    monkeypatch.setenv(variable, address if form == "file" else f"~/{named.name}")
    check_tiny(data.load_dataset("mnist"))
    (named / IMAGES).unlink()
    message = error_message()
    assert f"{named / IMAGES} is missing" in message and variable in message


def test_redirected_output_has_no_progress_bar(mirror, capsys) -> None:
    server = mirror(good)
    data.load_dataset("mnist")
    output = capsys.readouterr()
    assert output.out == ""  # reserved for --json
    assert output.err == "".join(f"reproml: downloading {server.url}/{name}\n" for name in FILES)


# --- no half-written files -------------------------------------------------------------------------


def test_unwritable_cache_raises_before_download(mirror, cache: Path) -> None:
    server = mirror(good)
    cache.parent.write_text("a file in the way")
    message = error_message()
    assert f"cannot store {cache / IMAGES}: " in message and "REPROML_DATA_DIR" in message
    assert server.requests == []  # raised before the download


def test_full_disk_leaves_no_file(mirror, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror(good)

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    message = error_message()
    assert "No space left on device" in message and "make room" in message
    assert files(cache) == {}


def test_file_size_limit_leaves_no_file(mirror, cache: Path) -> None:
    mirror(good)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the write itself stops in the middle
    try:
        message = error_message()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot store" in message and files(cache) == {}


def test_interrupted_download_leaves_no_file(mirror, tmp_path: Path) -> None:
    server = mirror(stalled)
    table = {name: tuple(file) for name, file in TABLE.items()}
    script = f"""
import signal
from reproml.pipeline import data
signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored in a background job
data.MNIST = {{name: data._File(*file) for name, file in {table!r}.items()}}
data.load_dataset("mnist")
"""
    home = tmp_path / "home"
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home)},
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(3000):
            if server.requests or child.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(0.1)  # most likely in the middle of the body; any moment must work
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert server.requests == [IMAGES]
    assert b"KeyboardInterrupt" in err  # the command line reduces it to one line
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("place", ["_fetch", "_defect"])
def test_interrupt_elsewhere_leaves_no_file(
    place: str, mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(good)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load_dataset("mnist")
    assert files(cache) == {}


def test_concurrent_downloads_agree(mirror, cache: Path) -> None:
    mirror(good)
    threads = [threading.Thread(target=data.load_dataset, args=("mnist",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(cache) == FILES
