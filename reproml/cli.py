"""The command line: `python -m reproml VERB`, also behind the invoke tasks.

Exit status: 0 good; 1 something differs; 2 bad input, told in one sentence; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

from reproml.errors import NotExactError, ReproError
from reproml.terminal import Terminal

if TYPE_CHECKING:
    from reproml.pipeline.checkpoint import Checkpoint
    from reproml.pipeline.recipe import Recipe

Result = tuple[int, dict[str, Any]]  # exit status, what --json prints


def data(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Get the recipe's data and check every hash."""
    from reproml.pipeline import data as datasets

    dataset = datasets.load(_recipe(args).data.name, args.data)
    for name, sha256 in dataset.hashes.items():
        terminal.say(f"{sha256}  {name}")
    return 0, {"dataset": dataset.name, "sha256": dataset.hashes}


def train(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train and evaluate the recipe; leave a run folder."""
    from reproml.pipeline import run

    if args.steps is not None:
        return _train_steps(args, _recipe(args), terminal)
    out, recipe, start = _beginning(args, terminal)
    resume_none = args.resume is not None and start is None
    items = run.finished(out, recipe, args.numerics) if resume_none else None
    if items is not None:  # a loop that starts a killed training again may end so
        terminal.say(f"{out} is a finished run of {recipe.name} already")
    elif resume_none and args.checkpoint_every is None:
        raise ReproError(
            f"there is no checkpoint of {out} to resume from; "
            "add --checkpoint-every N to begin a training that can be resumed"
        )
    else:
        items = _train_whole(args, out, recipe, start, terminal)
    sha256 = items["weights.safetensors.sha256"]
    terminal.say(f"SHA-256 of the file {out / run.WEIGHTS}: {sha256}")
    return 0, {"run": str(out), "items": items}


def _beginning(
    args: argparse.Namespace, terminal: Terminal
) -> tuple[Path, Recipe, Optional[Checkpoint]]:
    """Return the run folder, the recipe and the checkpoint to go on from, if there is one."""
    from reproml.pipeline import checkpoint, run

    if args.resume is None:
        recipe = _recipe(args)
        out = _out(args, recipe)
        if checkpoint.paths_in(checkpoint.folder_of(out)):
            raise ReproError(
                f"{checkpoint.folder_of(out)} has checkpoints of an unfinished training; "
                f"go on with --resume {out}, or delete that folder"
            )
        return out, recipe, None
    if args.out is not None:
        raise ReproError("--resume DIR names the run folder already; leave out --out")
    out = checkpoint.run_of(args.resume)
    start = checkpoint.latest(checkpoint.folder_of(out), terminal.say)
    if start:
        return out, _recipe(args) if args.recipe else start.head.recipe, start
    return out, _recipe(args, out if (out / run.RUN).is_file() else None), None


def _train_whole(
    args: argparse.Namespace,
    out: Path,
    recipe: Recipe,
    start: Optional[Checkpoint],
    terminal: Terminal,
) -> dict[str, Any]:
    """Train into the run folder, with checkpoints beside it if they are asked for or there."""
    from reproml.pipeline import checkpoint, run

    checkpoints = None
    every = args.checkpoint_every or (start.head.every if start else None)
    with run.place(out) as save, terminal.bar("train") as progress:
        if every:
            folder = checkpoint.folder_of(out)
            checkpoints = checkpoint.Checkpoints(folder, recipe, args.numerics, every, start)
        own = out.parent / f".{out.name}.trace.jsonl" if recipe.trace and not args.trace else None
        result = run.perform(
            recipe,
            args.data,
            args.numerics,
            terminal.say,
            progress,
            checkpoints,
            args.trace or own,
        )
        save(replace(result, trace=own))
        if checkpoints:
            checkpoints.delete()
        if own:
            own.unlink(missing_ok=True)  # last, as a checkpoint needs it
    return result.items


def _train_steps(args: argparse.Namespace, recipe: Recipe, terminal: Terminal) -> Result:
    """Train some steps only: for a comparison of hashes, not a run, so it leaves no folder."""
    from reproml.digest import digest
    from reproml.distributed import joined
    from reproml.pipeline.run import prepare, tracing
    from reproml.pipeline.train import train

    if args.checkpoint_every or args.resume:
        raise ReproError("--steps leaves nothing behind; leave out --checkpoint-every and --resume")
    dataset, prepared, _ = prepare(recipe, args.data, args.numerics)
    traced = tracing(args.trace, recipe, args.numerics, dataset)
    task = recipe, args.numerics, args.steps, None
    with joined(recipe.train.batch_size, task), traced, terminal.bar("train") as progress:
        trained = train(recipe, prepared, args.numerics, args.steps, terminal.say, progress)
    sha256 = digest(trained.model)
    terminal.say(f"digest of the state dict after at most {args.steps} steps: {sha256}")
    return 0, {"weights.state_dict.sha256": sha256}


def evaluate(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Evaluate the weights of a run folder on the training and the test set."""
    from reproml.pipeline import run

    recipe = _recipe(args, args.run)
    folder = args.run or _default_run(args, recipe)
    _, prepared, _ = run.prepare(recipe, args.data, args.numerics)
    model, _, sha256 = run.load(folder, recipe, prepared, args.numerics)
    run.refuse_damaged(folder, sha256)
    return 0, {"run": str(folder), "items": run.score(model, prepared, args.numerics, terminal.say)}


def verify(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train anew, or take the run folder --run DIR, and compare all of it with the golden file."""
    from reproml.pipeline import golden, run

    _refuse_native(args)
    recipe = _recipe(args, args.run)
    path = golden.find(recipe.name)
    expected = golden.read(path)
    if args.run is None:
        with terminal.bar("train") as progress:
            found = run.perform(recipe, args.data, "exact", terminal.say, progress).items
        comparisons = golden.compare(expected, found)
    else:
        found, recorded = run.recompute(args.run, recipe, args.data)
        comparisons = golden.compare_run(expected, found, recorded, args.run)
    comparisons.sort(key=lambda c: c.match)  # what differs comes first, in the pipeline's order
    differing = [c for c in comparisons if not c.match]
    terminal.table(comparisons)
    if differing:
        terminal.say(
            f"{recipe.name}: {len(differing)} of {len(comparisons)} items differ from {path}; "
            f"the first is {differing[0].item}"
        )
    else:
        terminal.say(f"{recipe.name}: verified, all {len(comparisons)} items are those of {path}")
    return int(bool(differing)), {
        "recipe": recipe.name,
        "golden": str(path),
        "verified": not differing,
        "items": [
            {"item": c.item, "expected": c.expected, "found": c.found, "match": c.match}
            for c in comparisons
        ],
    }


def pipeline(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Do it all in order: data, train, evaluate, verify (the run just trained)."""
    from reproml.pipeline import golden

    _refuse_native(args)
    recipe = _recipe(args)
    golden.read(golden.find(recipe.name))  # found missing now, not after the training
    args.run, args.steps, args.trace = _out(args, recipe), None, None
    args.checkpoint_every, args.resume = None, None
    status, results = 0, {}
    for verb in (data, train, evaluate, verify):
        terminal.say(f"== {verb.__name__}")
        status, results[verb.__name__] = verb(args, terminal)
    return status, results


def golden(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train the recipe and write what it comes to as its golden file."""
    from reproml.pipeline import golden as goldens
    from reproml.pipeline import run

    _refuse_native(args)
    recipe = _recipe(args)
    path = goldens.place(recipe.name)
    goldens.refuse_overwrite(path, args.force)
    with terminal.bar("train") as progress:
        items = run.perform(recipe, args.data, "exact", terminal.say, progress).items
    goldens.save(items, path, args.force)
    terminal.say(f"wrote {path}")
    return 0, {"golden": str(path), "items": items}


def run(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Run a training script, unmodified, and print the digests of what it trained and saved."""
    from reproml import script

    first = _worker() == 0  # of several, that torchrun started: they all come to the same
    digest = args.digest if first else None
    wish, result = script.execute(args.script, args.arguments, args.numerics, digest, args.trace)
    lines = script.lines(result) if first else []
    for line in lines:
        terminal.say(line)
    if first and not lines and wish is None:
        nothing = "no optimizer took a step and no state dict was saved: there is nothing to digest"
        print(f"reproml: {nothing}", file=sys.stderr)
    if wish is not None:
        raise wish  # with any status that the script chose
    return 0, result


def matrix(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train natively and exactly under every setting of this CPU; exact hashes must agree."""
    from reproml import matrix as matrices

    def line(setting: str, native: str, exact: str) -> None:
        terminal.say(f"{setting:<32} {native[:16]:<16} {exact[:16]}")

    def each(row: matrices.Row) -> None:
        line(row.setting, row.native, row.exact)

    subject: dict[str, Any]
    if args.script:
        if args.steps is not None:
            raise ReproError("a script takes its steps itself: --script 'train.py --steps 5', say")
        subject = {"script": args.script}
        terminal.say(f"{args.script}: SHA-256 of all it trained and saved (the first 16 digits)")
        line("setting", "native", "exact")
        rows = matrices.run_script(args.script, matrices.offered(args.workers), each)
    else:
        steps = _steps(args)
        subject = {"recipe": _recipe(args).name, "steps": steps}
        terminal.say(
            f"{subject['recipe']}, {steps} steps: digest of the state dict (the first 16 digits)"
        )
        line("setting", "native", "exact")
        settings = matrices.offered(args.workers)
        rows = matrices.run(args.recipe or _DEFAULT, steps, args.data, settings, each)
    natives, exacts = {row.native for row in rows}, {row.exact for row in rows}
    line("different hashes", str(len(natives)), str(len(exacts)))
    return int(len(exacts) != 1), {
        **subject,
        "settings": [vars(row) for row in rows],
        "native_hashes": len(natives),
        "exact_hashes": len(exacts),
    }


def doctor(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Say what this machine is and test here all that exact arithmetic takes for granted."""
    from reproml import doctor as doctors
    from reproml.arithmetic import selftest

    differing = [] if args.run is None else doctors.differences(args.run)
    described = doctors.here()
    for fact, value in described.items():
        terminal.say(f"{fact:<32} {value}")
    if args.run is not None:
        terminal.say(f"{len(differing)} of these are not what {args.run} recorded:")
        for d in differing:
            terminal.say(f"{d.fact:<32} {d.here}, in the run {d.run}")
        terminal.say("an exact run has the same bits all the same, a native one may have others")
    outcomes = []
    for outcome in selftest.self_test():
        outcomes.append(outcome)
        said = outcome.fault or outcome.note
        label = "ok     " if outcome.fault is None else "BROKEN "
        terminal.say(f"{label}  {outcome.name}" + f": {said}" * bool(said))
    broken = [outcome for outcome in outcomes if outcome.fault is not None]
    verdict = f"{len(broken)} are broken; no hash from this machine counts"
    terminal.say(
        f"{len(outcomes)} assumptions tested: {verdict if broken else 'all hold on this machine'}"
    )
    return int(bool(broken)), {
        "healthy": not broken,
        "facts": described,
        "differences": None if args.run is None else [vars(d) for d in differing],
        "assumptions": [outcome.as_json() for outcome in outcomes],
    }


def report(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Write one page for a run folder: its verdict against the golden file, where it parts from another."""
    from reproml import report as reports

    recipe = _recipe(args, args.run)
    folder = args.run or _default_run(args, recipe)
    named = folder.resolve() if folder.name in ("", "..") else folder  # --run . or / has no name
    out = args.out or named.parent / f"{named.name}.html"
    page = reports.build(folder, args.recipe or recipe.name, args.data, args.diff)
    reports.save(page.html, out)
    verdict = {True: "verified", False: "not the golden run", None: "no golden file"}[page.verified]
    terminal.say(f"wrote {out}: {verdict}")
    result = {"report": str(out), "verified": page.verified}
    if args.diff:
        terminal.say(page.compared)
        result["differ"] = page.differs
    return int(page.verified is False or page.differs), result


def diff(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Tell where two traces, runs, weights or golden files first part, by how much, and why."""
    from dataclasses import asdict

    from reproml.diff import compare as differences

    found = differences.compare(args.a, args.b, args.rerun)
    for line in differences.lines(found, str(args.a), str(args.b)):
        terminal.say(line)
    return int(found is not None), {"differ": found is not None, **(asdict(found) if found else {})}


def _worker() -> int:
    """This process's number among those that torchrun started, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _refuse_workers(args: argparse.Namespace) -> None:
    """Raise ReproError if torchrun started several workers for what one process does."""
    trains = args.verb in (train, pipeline, golden) or (args.verb is verify and args.run is None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (trains or args.verb is run):
        raise ReproError(
            f"{args.verb.__name__} does not train, so several workers have nothing to share; "
            "start it without torchrun"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and getattr(args, "trace", None):
        raise ReproError("--trace records the training of one process; start it without torchrun")


def _let_others_go(args: argparse.Namespace) -> None:
    """End the workers that wait for a training, if the first one found that there is none to do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.verb is not run:
        from reproml import distributed

        if not distributed.has_joined():
            with distributed.joined():
                pass


def _help(args: argparse.Namespace) -> None:
    """What all workers but the first do: their part of the training, in silence."""
    from reproml import distributed
    from reproml.pipeline import run
    from reproml.pipeline.train import train

    with distributed.joined() as task:
        if task is None:
            return  # the first one had no training to do
        recipe, numerics, steps, start = task
        _, prepared, _ = run.prepare(recipe, args.data, numerics)
        train(recipe, prepared, numerics, steps, start=start)


def _steps(args: argparse.Namespace) -> int:
    """Return --steps, or the number of steps that the recipe's training has."""
    from reproml.pipeline import data as datasets
    from reproml.pipeline.train import step_count

    recipe = _recipe(args)
    samples = len(datasets.load(recipe.data.name, args.data).train.labels)
    return min(args.steps or sys.maxsize, step_count(recipe, samples))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


_DEFAULT = "mnist-mlp"
_OPTIONS: dict[str, dict[str, Any]] = {
    "--recipe": {
        "metavar": "NAME|PATH",
        "help": f"default: {_DEFAULT}, or that of the --run or --resume folder",
    },
    "--data": {"type": Path, "metavar": "DIR", "help": "folder that holds the data files"},
    "--out": {
        "type": Path,
        "metavar": "DIR",
        "help": "run folder, default: runs/RECIPE; of report the page: RUN.html",
    },
    "--run": {
        "type": Path,
        "metavar": "DIR",
        "help": "run folder; default: verify trains, doctor compares with none, others: runs/RECIPE",
    },
    "--numerics": {
        "choices": ["exact", "native"],
        "default": "exact",
        "help": "native: plain PyTorch with its determinism switches, for comparison",
    },
    "--steps": {
        "type": _positive,
        "metavar": "N",
        "help": "stop after N steps and leave no run folder",
    },
    "--checkpoint-every": {
        "type": _positive,
        "metavar": "N",
        "help": "save a checkpoint each N steps, beside the run folder",
    },
    "--resume": {
        "type": Path,
        "metavar": "DIR",
        "help": "go on with the run folder DIR from its newest checkpoint",
    },
    "--force": {"action": "store_true", "help": "replace the golden file"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--digest": {
        "type": Path,
        "metavar": "FILE",
        "help": "write the digests here too, as JSON; stands before SCRIPT.py",
    },
    "--script": {
        "metavar": "'SCRIPT.py ARGS'",
        "help": "run this training script instead of a recipe",
    },
    "--trace": {
        "type": Path,
        "metavar": "FILE",
        "help": "record each step here, to compare with: reproml diff",
    },
    "--diff": {
        "type": Path,
        "metavar": "RUN|TRACE",
        "help": "tell on the page where the run parts from this run folder or trace",
    },
    "--rerun": {
        "action": "store_true",
        "help": "run the step that parts again, on both sides, to find the operator",
    },
    "a": {"type": Path, "metavar": "A", "help": "trace, run folder, .safetensors or golden .json"},
    "b": {"type": Path, "metavar": "B", "help": "another of the same kind"},
    "--workers": {
        "type": _counts,
        "default": [],
        "metavar": "N,N,...",
        "help": "also with so many workers, started by torchrun",
    },
    "script": {"metavar": "SCRIPT.py", "help": "a training script"},
    "arguments": {"metavar": "ARGS", "nargs": argparse.REMAINDER, "help": "all for the script"},
}
_VERBS: dict[Callable[..., Result], str] = {
    data: "--recipe --data --json",
    train: "--recipe --data --out --numerics --steps --trace --checkpoint-every --resume --json",
    evaluate: "--recipe --data --run --numerics --json",
    verify: "--recipe --data --run --numerics --json",
    pipeline: "--recipe --data --out --numerics --json",
    golden: "--recipe --data --numerics --force --json",
    run: "--numerics --digest --trace script arguments",
    matrix: "--recipe --script --data --steps --workers --json",
    doctor: "--run --json",
    report: "--recipe --data --run --out --diff --json",
    diff: "a b --rerun --json",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one verb, return the exit status. Raises SystemExit only for a misspelt command line."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.refuse(f"unrecognized arguments: {' '.join(unknown)}")  # with the usage of the verb
    try:
        _refuse_workers(args)
        if _worker() and args.verb is not run:
            _help(args)
            return 0
        status, result = args.verb(args, Terminal(to_stderr=args.json))
        _let_others_go(args)
        if args.json:
            print(json.dumps(result, indent=2))
        return int(status)
    except (ReproError, NotExactError, OSError) as error:
        print(f"reproml: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproml: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reproml", description="Deep learning that is reproducible to the last bit."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, options in _VERBS.items():
        sub = verbs.add_parser(verb.__name__, help=verb.__doc__, description=verb.__doc__)
        sub.set_defaults(verb=verb, json=False, refuse=sub.error)
        for option in options.split():
            action = sub.add_argument(option, **_OPTIONS[option])
            if action.nargs == argparse.REMAINDER:
                action.required = False  # a script may have no arguments
    return parser


def _recipe(args: argparse.Namespace, folder: Optional[Path] = None) -> Recipe:
    """Return the recipe that was named, else that of the run folder, else the default."""
    from reproml.pipeline.recipe import load

    if folder is not None and args.recipe is None:
        from reproml.pipeline import run

        return run.recipe_of(folder)
    return load(args.recipe or _DEFAULT)


def _out(args: argparse.Namespace, recipe: Recipe) -> Path:
    return args.out or _default_run(args, recipe)


def _default_run(args: argparse.Namespace, recipe: Recipe) -> Path:
    suffix = "-native" if getattr(args, "numerics", "exact") == "native" else ""
    return Path("runs") / (recipe.name + suffix)


def _refuse_native(args: argparse.Namespace) -> None:
    if args.numerics == "native":
        raise ReproError(
            "native numerics have no golden file, as their result depends on the machine; "
            "leave out --numerics native, or see the drift with: python -m reproml matrix"
        )
