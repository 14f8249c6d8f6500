"""Record the files that a script reads, by Python's audit events, for the provenance of `reproml run`.

Python reports every file that it opens. Recorded are regular files that are opened for reading, each with
its SHA-256 at that moment, also by processes that this one forks, such as the workers of a DataLoader. Left
out are Python's own files, those of installed packages and of the system, and what the script itself wrote.
"""

from __future__ import annotations

import json
import os
import site
import stat
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Optional

import safetensors.torch

from reproml.arithmetic.patches import replaced
from reproml.digest import file_sha256
from reproml.evidence.provenance import DATA, MODULE, Descriptor, describe

_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/run", "/usr", "/lib", "/lib64", "/bin")


class Inputs:
    """The files that are opened for reading while `watching`."""

    def __init__(self, script: str) -> None:
        self._folder = os.getcwd()
        # Read or written already; the script has an entry of its own.
        self._known = {os.path.abspath(script)}
        self._modules = set(sys.modules)  # PyTorch generates some of them
        self._busy = threading.local()
        # Forked processes append to this file too.
        self._log = tempfile.TemporaryFile(buffering=0)
        self._excluded = tuple(
            path.rstrip(os.sep) + os.sep for path in _excluded_folders() if path.rstrip(os.sep)
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record until the end of the block."""
        global _watching
        _install_hook()
        places = (safetensors, "safe_open"), (safetensors.torch, "safe_open")  # opens files in Rust
        _watching = self
        try:
            with replaced([(*place, self._recording_open) for place in places]):
                yield
        finally:
            _watching = None

    def dependencies(self) -> list[Descriptor]:
        """Return all files that were read, and the modules that were imported from elsewhere."""
        self._log.seek(0)
        digests = dict(json.loads(line) for line in self._log)  # by path
        found = {
            path: describe(self._name(path), {"sha256": d}, kind=DATA)
            for path, d in digests.items()
        }
        for module in [sys.modules[name] for name in {*sys.modules} - self._modules]:
            path = os.path.abspath(getattr(module, "__file__", None) or "/")
            written = path in self._known and path not in digests
            if path.endswith(".py") and not written and not self._is_excluded(path):
                with suppress(OSError):
                    digest = {"sha256": file_sha256(Path(path))}
                    found[path] = describe(self._name(path), digest, kind=MODULE)
        return sorted(found.values(), key=lambda described: str(described["name"]))

    def opened(self, path: Any, mode: Any, flags: Any) -> None:
        """Record a file that is about to be opened. It must not raise: the script would see it."""
        if getattr(self._busy, "recording", False) or not isinstance(flags, int):
            return
        if not isinstance(path, (str, bytes, os.PathLike)):  # an open file
            return
        name = os.path.abspath(os.fsdecode(path))
        if name in self._known or _is_compiled(name) or self._is_excluded(name):
            return
        self._busy.recording = True
        try:
            # A file that is opened to be changed in place is read, too.
            if flags & os.O_WRONLY or flags & os.O_TRUNC:
                self._known.add(name)
            elif stat.S_ISREG(os.stat(name).st_mode):
                self._known.add(name)
                entry = [name, file_sha256(Path(name))]
                os.write(self._log.fileno(), (json.dumps(entry) + "\n").encode())
            elif flags & os.O_CREAT:
                self._known.add(name)
        except FileNotFoundError:
            if flags & os.O_CREAT:
                self._known.add(name)
        except OSError:
            pass  # the script cannot read it either
        finally:
            self._busy.recording = False

    def renamed(self, source: Any, target: Any) -> None:
        """Record that a file which was written gets another name."""
        if isinstance(source, (str, bytes, os.PathLike)) and isinstance(
            target, (str, bytes, os.PathLike)
        ):
            if os.path.abspath(os.fsdecode(source)) in self._known:
                self._known.add(os.path.abspath(os.fsdecode(target)))

    def _recording_open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def safe_open(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.opened(path, "rb", os.O_RDONLY)
            return original(path, *args, **kwargs)

        return safe_open

    def _is_excluded(self, path: str) -> bool:
        return path.startswith(self._excluded) or _is_metadata(path)

    def _name(self, path: str) -> str:
        """Return the path, relative to the working folder for a file below it."""
        inside = path.startswith(self._folder.rstrip(os.sep) + os.sep)
        return Path(os.path.relpath(path, self._folder) if inside else path).as_posix()


def _is_compiled(path: str) -> bool:
    """Return whether Python compiles modules to a file of this name, beside their source."""
    folder, cache = os.path.dirname(path), sys.pycache_prefix
    in_cache = cache and path.startswith(os.path.abspath(cache) + os.sep)
    return path.endswith(".pyc") and bool(os.path.basename(folder) == "__pycache__" or in_cache)


def _is_metadata(path: str) -> bool:
    """Return whether the file is the metadata of a package that Python can import."""
    folder = os.path.dirname(path)
    if not folder.endswith((".dist-info", ".egg-info")):
        return False
    return os.path.dirname(folder) in {os.path.abspath(place) for place in sys.path}


_watching: Optional[Inputs] = None
_installed = False


def _install_hook() -> None:
    """Install the hook, which Python cannot remove; it does nothing unless something watches."""
    global _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    if event == "open":
        _watching.opened(*arguments)
    elif event == "os.rename":
        _watching.renamed(*arguments[:2])


def _excluded_folders() -> set[str]:
    """Return the folders of Python, of installed packages, of reproml and of the system."""
    names = ("stdlib", "platstdlib", "purelib", "platlib", "scripts", "data")
    folders = {sysconfig.get_paths()[name] for name in names}
    folders |= {sys.prefix, sys.base_prefix, sys.exec_prefix, site.getusersitepackages()}
    folders |= {*site.getsitepackages(), str(Path(__file__).parents[1]), *_SYSTEM}
    return {form(folder) for folder in folders for form in (os.path.abspath, os.path.realpath)}
