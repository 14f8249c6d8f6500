"""Run commands of reproml in another process, and watch what it must not do.

The process is forked, so that a command takes as long as its work, and replaced when one does not end. An
audit hook sees each program that it would execute, each piece of code that it would load from a file, and
each file that it would write.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, NamedTuple

import reproml
from reproml import cli, matrix
from reproml.arithmetic import selftest
from reproml.diff.rerun import VARIABLES
from reproml.evidence import provenance
from reproml.pipeline import models
from reproml.pipeline.recipe import MLP
from reproml.pipeline.train import Training
from reproml.tracing.recorder import RERUN

SECONDS = 30  # until a command counts as one that does not end
STEPS, WIDTH = 30, 20_000  # of the largest training and the largest network
MEMORY = 12 << 30
# The only program that a command may execute.
RERUN_WORDS = [sys.executable, "-m", "reproml", "train"]

_FORK = multiprocessing.get_context("fork")
_PACKAGE = os.path.dirname(reproml.__file__)
_EXECUTING = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen"}
_EXECUTING |= {"pickle.find_class"}
_CHANGING = set("os.remove os.mkdir os.rmdir os.truncate os.symlink os.link os.chmod".split())
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Outcome(NamedTuple):
    """What a command did: its status, what it wrote to both streams, and what it must not do."""

    status: Any
    output: str
    errors: str
    forbidden: list[str]


class LongTraining(BaseException):
    """Ends a training whose recipe asks for more than the fuzzer's time."""


class Watch:
    """Records, by an audit hook, what this process must not do: it remains until the process ends."""

    def __init__(self) -> None:
        self.begin(Path("/none"), ("/",))
        sys.addaudithook(self.audit)

    def begin(self, folder: Path, writable: tuple[str, ...]) -> None:
        """Expect that files are written only below these names in the folder."""
        self.folder, self.found = folder, list[str]()
        self.writable = [os.path.realpath(folder / name).rstrip("/") for name in writable]

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _EXECUTING or event.startswith("socket."):
            words = args[1] if event == "subprocess.Popen" else []
            if list(map(str, words))[:4] != RERUN_WORDS:
                self.found.append(f"executed: {event} {args!r:.300}")
        elif event in ("exec", "compile"):
            caller = sys._getframe(1).f_code.co_filename
            name = getattr(args[0], "co_filename", args[-1])
            if caller.startswith(_PACKAGE) or str(name).startswith(str(self.folder)):
                self.found.append(f"executed: {event} {args!r:.300}")
        elif event == "open" and not isinstance(args[0], int) and args[2] & _WRITING:
            self.write(os.path.realpath(os.fsdecode(args[0])))
        elif event == "os.rename":
            self.change(args[0])
            self.change(args[1])
        elif event in _CHANGING and args[-1] in (-1, None):  # else relative to a folder of rmtree
            self.change(args[0])

    def change(self, path: Any) -> None:
        """Check a name that is changed, itself if it is a link."""
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        self.write(os.path.join(os.path.realpath(folder), name))

    def write(self, real: str) -> None:
        if real != os.devnull and not any(f"{real}/".startswith(f"{w}/") for w in self.writable):
            self.found.append(f"wrote {real!r}")


def call(command: list[str], terminal: bool = False, encoding: str = "utf-8") -> Outcome:
    """Run a command in this process."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True)
        for errors in ("strict", "backslashreplace")  # as Python opens its own
    )
    if terminal:
        out.isatty = lambda: True  # type: ignore[method-assign]
    status: Any
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(command)
        except SystemExit as exit_request:
            status = exit_request.code
        except LongTraining:
            status = "a long training"
        except BaseException:
            status = f"a traceback\n{traceback.format_exc()}"
    output, errors = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    return Outcome(status, output, errors, [])


def _rerun_here(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return a subprocess.run for `diff --rerun` that forks, which is faster; seldom the real one."""

    def run_here(command: list[str], env: dict[str, str], **options: Any) -> Any:
        changed = {name for name in {*env, *os.environ} if os.environ.get(name) != env.get(name)}
        assert command[:4] == RERUN_WORDS and changed <= VARIABLES | {RERUN}, (command, changed)
        if random.random() < 0.05:
            return real(command, env=env, **options)

        def child() -> None:
            os.environ.update(env)
            os._exit(call(command[3:]).status != 0)

        process = _FORK.Process(target=child)
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode or 0, "", "")

    return run_here


def _limited(original: Callable[..., Any], count: Callable[..., int], limit: int) -> Any:
    """Return a function that ends the training if `count` of its arguments exceeds the limit."""

    def function(*args: Any) -> Any:
        if count(*args) > limit:
            raise LongTraining
        return original(*args)

    return function


class Worker:
    """A process that runs commands one after another, and is replaced when one does not end."""

    def __init__(self, folder: Path) -> None:
        self.pipe, pipe = _FORK.Pipe()
        self.process = _FORK.Process(target=_serve, args=(pipe, folder))
        self.process.start()
        pipe.close()

    def run(self, command: list[str], writable: tuple[str, ...], seed: int) -> Outcome:
        self.pipe.send((command, writable, seed))
        if not self.pipe.poll(SECONDS):
            return Outcome("no end", "", "", [])
        try:
            outcome: Outcome = self.pipe.recv()
        except EOFError:
            self.process.join()
            return Outcome(f"a crash, {self.process.exitcode}", "", "", [])
        return outcome

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)  # with the process of a rerun
        self.process.kill()
        self.process.join()


def _serve(pipe: Any, folder: Path) -> None:
    """Run the commands that come through the pipe, and send their outcomes."""
    os.setsid()
    matrix.SETTINGS.clear()  # a process for each takes too long
    selftest.self_test = lambda: iter(())  # depends on no file, and takes seconds
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    Training.step = _limited(Training.step, lambda training: training.done, STEPS)  # type: ignore[method-assign]
    models._KINDS[MLP] = _limited(models._mlp, lambda model, *_: sum(model.hidden), WIDTH)
    subprocess.run = _rerun_here(subprocess.run)
    provenance.revision = lambda file, name: []  # which asks git
    watch = Watch()
    while True:
        command, writable, seed = pipe.recv()
        os.chdir(folder)
        chance = random.Random(seed)
        random.seed(seed)
        watch.begin(folder, writable)
        outcome = call(command, chance.random() < 0.2, chance.choice(["utf-8", "utf-8", "ascii"]))
        pipe.send(outcome._replace(forbidden=watch.found))
