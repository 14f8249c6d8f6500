"""Load a data set: get its bytes, check their SHA-256, decode them.

    dataset = load_dataset("mnist")    # from REPROML_DATA_DIR, else the cache, else a mirror
    dataset = load_dataset("digits")   # bundled with scikit-learn: needs no download

To add a data set, write a function here that returns a `Dataset`, enter it in `_LOADERS` and `SHAPES` at
the end of this file, and add its name to `Data` in recipe.py. Images have the shape [n, h, w];
preprocess.py and models.py need no change for them.

Nothing is decoded or kept before its hash has been checked. The bytes that are hashed are the bytes that
are decoded: each file is read once.

Environment variables: REPROML_DATA_DIR is a folder with the files, and then the only source.
REPROML_MIRROR is a folder, a file:// or an http(s) address to use instead of the public mirrors.

The package pooch (1.9) does not replace this code: it reads a response of any length (an endless one
fills the disk), knows one address per file instead of several mirrors, does not flush files to the disk,
returns a path whose file would be read a second time to decode it, and depends on requests.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Callable, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from reproml.errors import ReproError
from reproml.terminal import complain


class Split(NamedTuple):
    """Samples: images uint8 [n, h, w] (grey levels) and labels int64 [n] (classes)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A data set with pixels in range(levels) and labels in range(classes).

    `hashes` maps the name of each hashed file, or the name and dtype of each hashed array, to its SHA-256.
    """

    name: str
    train: Split
    test: Split
    levels: int
    classes: int
    hashes: dict[str, str]


def load_dataset(name: str, folder: Optional[Path] = None) -> Dataset:
    """Return the data set "mnist" or "digits".

    `folder` contains MNIST's four .gz files (default: REPROML_DATA_DIR, else the cache and mirrors).
    Raises ReproError if a file is missing, truncated or altered, or cannot be downloaded or stored.
    """
    return _LOADERS[name](folder)


# --- MNIST (LeCun, Cortes, Burges), as first distributed ------------------------------------------


class _File(NamedTuple):
    size: int  # bytes
    sha256: str


MNIST = {
    "train-images-idx3-ubyte.gz": _File(
        9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": _File(
        28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": _File(
        1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": _File(
        4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
ROUNDS = 3  # how often all mirrors are tried for a file
PAUSE = 1.0  # seconds between two rounds
TIMEOUT = 30.0  # seconds without a byte until a download fails
LIMIT = 600.0  # seconds until the download of a file fails


def _mnist(folder: Optional[Path]) -> Dataset:
    if folder is None and os.environ.get("REPROML_DATA_DIR"):
        with _naming("REPROML_DATA_DIR"):
            return _mnist(_folder(os.environ["REPROML_DATA_DIR"]))
    arrays = {}
    for name in MNIST:
        content = _cached_or_downloaded(name) if folder is None else _read_checked(folder / name)
        arrays[name] = _decode_idx(gzip.decompress(content))
        del content  # frees ten megabytes before the next file is read
    train_images, train_labels, test_images, test_labels = arrays.values()
    return Dataset(
        "mnist",
        Split(train_images, train_labels.astype(np.int64)),
        Split(test_images, test_labels.astype(np.int64)),
        levels=256,
        classes=10,
        hashes={name: file.sha256 for name, file in MNIST.items()},  # checked above
    )


def _decode_idx(content: bytes) -> NDArray[np.uint8]:
    """Decode IDX: 0, 0, type (8: uint8), number of dimensions, their big-endian sizes, elements."""
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError("not an IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def _read_checked(path: Path) -> bytes:
    """Read one of MNIST's files. Raises ReproError unless its bytes are the right ones."""
    try:
        if path.exists() and not path.is_file():
            raise ReproError(f"{path} is not a file; put MNIST's {path.name} there")
        with path.open("rb") as file:
            content = file.read(MNIST[path.name].size + 1)  # one byte more, to notice a longer file
    except FileNotFoundError:
        raise ReproError(f"{path} is missing; put MNIST's file of that name there") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the folder's name
        raise ReproError(f"{path} cannot be read: {_reason(error)}") from None
    defect = _defect(path.name, content)
    if defect:
        raise ReproError(f"{path} is not MNIST's file: {defect}; replace it")
    return content


def _defect(name: str, content: bytes) -> Optional[str]:
    """Describe what is wrong with the bytes of a file; return None if they are right."""
    size, sha256 = MNIST[name]
    if len(content) < size:
        return f"it ends after {len(content)} of {size} bytes"
    if len(content) > size:
        return f"it is longer than {size} bytes"
    found = hashlib.sha256(content).hexdigest()
    return None if found == sha256 else f"its SHA-256 is {found}, not {sha256}"


def _cached_or_downloaded(name: str) -> bytes:
    """Return one of MNIST's files from the cache, else from a mirror."""
    import platformdirs

    path = platformdirs.user_cache_path("reproml", appauthor=False) / "mnist" / name
    try:
        cached = path.exists()
    except OSError:
        cached = False  # the folder may not be searched: writing below raises the error
    if cached:
        try:
            return _read_checked(path)
        except ReproError as error:
            complain(f"{error}: downloading it again")
    mirror = os.environ.get("REPROML_MIRROR", "")
    if mirror and not mirror.lower().startswith(("http://", "https://")):
        with _naming("REPROML_MIRROR"):
            return _read_checked(_folder(mirror) / name)  # already on the disk: no second copy
    try:
        with _atomic_file(path) as file:
            content = _download(name, (mirror,) if mirror else MIRRORS)
            file.write(content)
    except OSError as error:
        raise ReproError(
            f"cannot store {path}: {_reason(error)}; "
            "make room, or set REPROML_DATA_DIR to a folder with MNIST's files"
        ) from None
    return content


def _folder(text: str) -> Path:
    """Return the folder named by a path, which may begin with `~`, or by a file:// address."""
    from urllib.parse import unquote

    if text.lower().startswith("file:///"):
        text = unquote(text[len("file://") :])
    elif "://" in text:
        shown, _ = _without_password(text)
        raise ReproError(f"{shown} is not a folder: give its path, or file:///PATH")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


@contextmanager
def _naming(variable: str) -> Iterator[None]:
    """Add the name of the environment variable to a ReproError of the block."""
    try:
        yield
    except ReproError as error:
        raise ReproError(f"{error} (from the environment variable {variable})") from None


@contextmanager
def _atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `path` at the end of the block, or is deleted if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also KeyboardInterrupt
        with suppress(FileNotFoundError):  # it may have been renamed already
            os.unlink(temporary)
        raise


def _download(name: str, mirrors: tuple[str, ...]) -> bytes:
    """Return a file's bytes from the first mirror that has the right ones, or raise ReproError."""
    reasons: dict[str, str] = {}
    for round in range(ROUNDS):
        if round:
            time.sleep(PAUSE)
        for mirror in mirrors:
            url, password = _without_password(f"{mirror.rstrip('/')}/{name}")
            complain(f"downloading {url}")
            content, reason = _fetch(url, MNIST[name].size, password)
            reason = reason or _defect(name, content)
            if reason is None:
                return content
            reasons[url] = reason
    tried = ", ".join(f"{url} ({reason})" for url, reason in reasons.items())
    raise ReproError(
        f"cannot download MNIST from {tried}: connect to the network, or set REPROML_MIRROR to a "
        "mirror's address or a folder with the four files, or use the recipe digits-mlp, "
        "which needs no download"
    )


def _without_password(url: str) -> tuple[str, str]:
    """Split `USER:PASSWORD@` off an address, which may then be shown; return both, without the @."""
    scheme, _, rest = url.partition("://")
    server, slash, path = rest.partition("/")
    password, _, server = server.rpartition("@")
    return f"{scheme}://{server}{slash}{path}", password


def _fetch(url: str, size: int, password: str = "") -> tuple[bytes, Optional[str]]:
    """Return at most size + 1 bytes of an http(s) address, and the reason if that failed.

    The server is given TIMEOUT for each block and LIMIT for all, in a thread: one that sends its headers
    byte by byte would otherwise hold this process without end.
    """
    content, reasons = bytearray(), []
    with _bar(size) as progress:

        def receive() -> None:
            reasons.append(_receive(url, size, password, content, progress))

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        thread.join(LIMIT)
    if not reasons:
        return b"", f"not complete after {LIMIT:.0f} seconds"
    return (b"", reasons[0]) if reasons[0] else (bytes(content[: size + 1]), None)


def _receive(
    url: str, size: int, password: str, content: bytearray, progress: Callable[[int], None]
) -> Optional[str]:
    """Append the bytes of an address to `content`; return the reason if that failed."""
    from urllib.parse import unquote
    from urllib.request import Request, urlopen

    try:
        request = Request(url)
        if password:  # which no redirection passes on to another server
            coded = base64.b64encode(unquote(password).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {coded}")
        with urlopen(request, timeout=TIMEOUT) as response:
            while len(content) <= size:
                block = response.read1(1 << 16)
                if not block:
                    break
                content += block
                progress(len(content))
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a malformed address
        return _reason(error)
    return None


@contextmanager
def _bar(size: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows the number of bytes received, as a bar, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=size)
        yield lambda done: progress.update(task, completed=done)


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None)  # urllib wraps the operating system's error
    if isinstance(inner, Exception):
        error = inner
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    # The text may come from the mirror: keep one line of printable characters.
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]


# --- digits: scikit-learn's bundled 8x8 digits ----------------------------------------------------

DIGITS_TRAIN = 1500
DIGITS = {
    "images.uint8": "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3",
    "labels.uint8": "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0",
}


def _digits(folder: Optional[Path]) -> Dataset:
    """Return the first 1500 of 1797 digits for training, the rest for testing; `folder` is not used.

    The split needs no random numbers, and the classes are balanced: 146 to 153 samples of each for
    training, 27 to 33 for testing.
    """
    import zlib

    from sklearn.datasets import load_digits

    try:
        bunch = load_digits()
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ReproError(
            f"scikit-learn's digits cannot be read: {_reason(error)}; reinstall scikit-learn"
        ) from None
    arrays = {}
    for name, values in (("images.uint8", bunch.images), ("labels.uint8", bunch.target)):
        array = np.ascontiguousarray(values, dtype=np.uint8)
        found = hashlib.sha256(array.data).hexdigest()
        if found != DIGITS[name] or not np.array_equal(
            array, values
        ):  # the cast could hide a change
            raise ReproError(
                f"scikit-learn's digits are altered: the SHA-256 of {name} is {found}, "
                f"not {DIGITS[name]}; reinstall scikit-learn"
            )
        arrays[name] = array
    images, labels = arrays["images.uint8"], arrays["labels.uint8"].astype(np.int64)
    n = DIGITS_TRAIN
    return Dataset(
        "digits",
        Split(images[:n], labels[:n]),
        Split(images[n:], labels[n:]),
        levels=17,
        classes=10,
        hashes=dict(DIGITS),
    )


# To add a data set: a line in both, and its name in recipe.Data.
_LOADERS = {"mnist": _mnist, "digits": _digits}
SHAPES = {"mnist": ((28, 28), 10), "digits": ((8, 8), 10)}  # of an image, and the number of classes
