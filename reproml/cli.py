"""The command line: `python -m reproml VERB`. tasks.py makes its tasks from the same VERBS and OPTIONS.

Exit status: 0 success; 1 a mismatch; 2 bad input, reported in one sentence; 130 interrupted; 141 the
program that reads a pipe ended before the work was done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

from reproml.errors import NotExactError, ReproError
from reproml.files import write_atomically
from reproml.terminal import Terminal, complain, printable
from reproml.torchrun import this_worker

if TYPE_CHECKING:
    import torch

    from reproml.matrix import Row
    from reproml.pipeline.checkpoint import Checkpoint
    from reproml.pipeline.recipe import Recipe

# The modules that exact() does without, and the extra that has them.
EXTRAS = {
    **dict.fromkeys(
        "jinja2 msgspec platformdirs rich safetensors sklearn tomli".split(), "pipeline"
    ),
    "OpenSSL": "sign",
    "mlflow": "mlflow",
    "model_signing": "sign",
    "rocrate": "ro-crate",
}

Result = tuple[int, dict[str, Any]]  # exit status, and the object that --json prints


def data_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Get the recipe's data and check every hash."""
    from reproml.pipeline import data as datasets

    dataset = datasets.load_dataset(_recipe(args).data.name, args.data)
    for name, sha256 in dataset.hashes.items():
        terminal.print(f"{sha256}  {name}")
    return 0, {"dataset": dataset.name, "sha256": dataset.hashes}


def train_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train and evaluate the recipe and write a run folder."""
    from reproml.pipeline import run

    device = _device(args)
    _refuse_unusable_builder(args)
    if args.steps is not None:
        return _train_steps(args, _recipe(args), device, terminal)
    out, recipe, start = _starting_point(args, terminal)
    items = None
    if args.resume is not None and start is None:
        items = run.finished_items(out, recipe, args.numerics)
        if items is not None:  # as when a job is started once more after its training has finished
            terminal.print(f"{out} is already a finished run of {recipe.name}")
        elif args.checkpoint_every is None:
            raise ReproError(
                f"no checkpoint of {out} to resume from; "
                "add --checkpoint-every N to start a training that can be resumed"
            )
    if items is None:
        items = _train_run(args, out, recipe, start, device, terminal)
    sha256 = items["weights.safetensors.sha256"]
    terminal.print(f"SHA-256 of the file {out / run.WEIGHTS}: {sha256}")
    return 0, {"run": str(out), "items": items}


def _starting_point(
    args: argparse.Namespace, terminal: Terminal
) -> tuple[Path, Recipe, Optional[Checkpoint]]:
    """Return the run folder, the recipe and the checkpoint to resume from, if any."""
    from reproml.pipeline import checkpoint, run

    if args.resume is None:
        recipe = _recipe(args)
        out = args.out or _default_folder(args, recipe)
        if checkpoint.checkpoint_paths(checkpoint.checkpoint_folder(out)):
            raise ReproError(
                f"{checkpoint.checkpoint_folder(out)} has checkpoints of an unfinished training; "
                f"resume it with --resume {out}, or delete that folder"
            )
        return out, recipe, None
    if args.out is not None:
        raise ReproError("--resume DIR already names the run folder; leave out --out")
    out = checkpoint.run_folder(args.resume)
    start = checkpoint.latest_checkpoint(checkpoint.checkpoint_folder(out), terminal.print)
    if start:
        return out, _recipe(args) if args.recipe else start.head.recipe, start
    return out, _recipe(args, out if (out / run.RUN).is_file() else None), None


def _train_run(
    args: argparse.Namespace,
    out: Path,
    recipe: Recipe,
    start: Optional[Checkpoint],
    device: torch.device,
    terminal: Terminal,
) -> dict[str, Any]:
    """Train into the run folder; save checkpoints if requested now or when the training was started."""
    from reproml.pipeline import checkpoint, run
    from reproml.pipeline.train import Output

    checkpoints = None
    every = args.checkpoint_every or (start.head.every if start else None)
    with run.reserve_run_folder(out) as save, terminal.bar("train") as progress:
        if every:
            folder = checkpoint.checkpoint_folder(out)
            checkpoints = checkpoint.Checkpoints(folder, recipe, args.numerics, every, start)
        recipe_trace = None
        if recipe.trace and not args.trace:
            recipe_trace = out.parent / f".{out.name}.trace.jsonl"
        result = run.perform(
            recipe,
            args.data,
            args.numerics,
            Output(terminal.print, progress),
            run.Recording(checkpoints, args.trace or recipe_trace),
            device,
            args.micro_batch,
        )
        save(replace(result, trace=recipe_trace, builder=args.builder))
        if checkpoints:
            checkpoints.delete()
        if recipe_trace:  # deleted last, because a checkpoint needs it
            recipe_trace.unlink(missing_ok=True)
    return result.items


def _train_steps(
    args: argparse.Namespace, recipe: Recipe, device: torch.device, terminal: Terminal
) -> Result:
    """Train a number of steps to compare digests; write no run folder."""
    from reproml.digest import digest
    from reproml.distributed import joined
    from reproml.pipeline.run import prepare, trace_training
    from reproml.pipeline.train import Output, train

    if args.checkpoint_every or args.resume:
        raise ReproError("--steps writes no run folder; leave out --checkpoint-every and --resume")
    dataset, prepared, _ = prepare(recipe, args.data, args.numerics)
    traced = trace_training(args.trace, recipe, args.numerics, dataset, device)
    job = recipe, args.numerics, args.steps, None
    with joined(recipe.train.batch_size, job, device), traced, terminal.bar("train") as progress:
        output = Output(terminal.print, progress)
        trained = train(
            *(recipe, prepared, args.numerics, args.steps, output),
            device=device,
            micro_batch=args.micro_batch,
        )
    sha256 = digest(trained.model)
    terminal.print(f"digest of the state dict after at most {args.steps} steps: {sha256}")
    return 0, {"weights.state_dict.sha256": sha256}


def evaluate_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Evaluate the weights of a run folder on the training set and the test set."""
    from reproml.pipeline import run

    device, recipe = _device(args), _recipe(args, args.run)
    folder = args.run or _default_folder(args, recipe)
    _, prepared, _ = run.prepare(recipe, args.data, args.numerics)
    model, _, sha256 = run.load_run_model(folder, recipe, prepared, args.numerics, device)
    run.refuse_damaged(folder, sha256)
    return 0, {
        "run": str(folder),
        "items": run.score(model, recipe, prepared, args.numerics, terminal.print),
    }


def verify_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train again, or take the run folder --run DIR, and compare every item with the golden file."""
    from reproml.pipeline import golden, run

    if args.signature is not None:
        return _verify_signature(args, terminal)
    _refuse_native(args)
    device, recipe = _device(args), _recipe(args, args.run)
    path = golden.find_golden(recipe.name)
    expected = golden.read_golden(path)
    if args.run is None:
        found = _train_exactly(args, recipe, device, terminal)
        comparisons = golden.compare_items(expected, found)
    else:
        found, recorded = run.recompute(args.run, recipe, args.data, device)
        comparisons = golden.compare_run(expected, found, recorded, args.run)
    comparisons.sort(key=lambda c: c.match)  # mismatches first, in the order of the pipeline
    differing = [c for c in comparisons if not c.match]
    terminal.table(comparisons)
    if differing:
        terminal.print(
            f"{recipe.name}: {len(differing)} of {len(comparisons)} items differ from {path}; "
            f"the first is {differing[0].item}"
        )
    else:
        terminal.print(f"{recipe.name}: verified, all {len(comparisons)} items match {path}")
    if golden.differs_from_installed(path):
        terminal.print(f"{path} is not the golden file that reproml has for {recipe.name}")
    return int(bool(differing)), {
        "recipe": recipe.name,
        "golden": str(path),
        "verified": not differing,
        "items": [
            {"item": c.item, "expected": c.expected, "found": c.found, "match": c.match}
            for c in comparisons
        ],
    }


def _verify_signature(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Check a run folder's model.sig with the public key --signature FILE, and every file with it."""
    from reproml.evidence import signature

    folder = args.run or _default_folder(args, _recipe(args))
    signed = signature.read_signature(folder)
    differences = signature.differences(folder, args.signature)
    for difference in differences:
        terminal.print(difference)
    if not differences:
        terminal.print(
            f"{folder}: signature verified, {len(signed.files)} files are as the owner of "
            f"{args.signature} signed them"
        )
    return int(bool(differences)), {
        "run": str(folder),
        "verified": not differences,
        "key.sha256": signed.key,
        "files": signed.files,
        "differences": differences,
    }


def sign_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Sign every file of a run folder with a private key, in its file model.sig."""
    from reproml.evidence import signature
    from reproml.pipeline.run import SIGNATURE

    signed = signature.sign(args.run, args.key, args.force)
    path = args.run / SIGNATURE
    terminal.print(f"wrote {path}: {len(signed.files)} files, signed by the key {signed.key}")
    return 0, {"signature": str(path), "key.sha256": signed.key, "files": signed.files}


def export_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Export a run folder as an RO-Crate, a model card or a run of MLflow."""
    from reproml.evidence import exports

    where = exports.FORMATS[args.format](args.run, args.out)
    terminal.print(f"exported {args.run} to {where}")
    return 0, {"run": str(args.run), "format": args.format, "exported": where}


def pipeline_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Run data, train, evaluate and verify in turn; verify checks the run just trained."""
    from reproml.pipeline import golden

    _refuse_native(args)
    _refuse_unusable_builder(args)
    _device(args)
    recipe = _recipe(args)
    golden.read_golden(golden.find_golden(recipe.name))  # fails now, not after the training
    args.run = args.out or _default_folder(args, recipe)
    args.steps = args.trace = args.checkpoint_every = args.resume = None
    args.signature = args.micro_batch = None
    status, results = 0, {}
    for verb in ("data", "train", "evaluate", "verify"):
        terminal.print(f"== {verb}")
        status, results[verb] = VERBS[verb].command(args, terminal)
    return status, results


def golden_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train the recipe and write its results as the golden file, or list the golden files."""
    from reproml.pipeline import golden as goldens

    if args.list:
        return _list_golden_files(terminal)
    _refuse_native(args)
    device, recipe = _device(args), _recipe(args)
    path = goldens.golden_path(recipe.name)
    goldens.refuse_overwrite(path, args.force)
    items = _train_exactly(args, recipe, device, terminal)
    goldens.write_golden(items, path, args.force)
    terminal.print(f"wrote {path}")
    return 0, {"golden": str(path), "items": items}


def _list_golden_files(terminal: Terminal) -> Result:
    """List the golden files; the status is 1 if a recipe or a confirmation contradicts one."""
    from reproml.evidence import registry

    entries = registry.entries()
    terminal.print(registry.HEADING)
    for entry in entries:
        for line in registry.lines(entry):
            terminal.print(line)
    wrong = any(entry.defects for entry in entries)
    return int(wrong), {"golden": [asdict(entry) for entry in entries]}


def run_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Run a training script, unmodified, and print the digests of what it trained and saved."""
    from reproml import script

    first = this_worker().rank == 0  # all workers that torchrun started have the same results
    digest = args.digest if first else None
    command = args.script, args.arguments
    exit_request, result = script.execute(
        *command, args.numerics, digest, args.trace, args.seed, args.provenance, args.builder
    )
    lines = script.lines(result) if first else []
    for line in lines:
        terminal.print(line)
    if lines and result.get("unseeded"):
        complain(
            f"the script drew numbers from {' and '.join(result['unseeded'])} without a seed: if the "
            "training uses them, each run has another digest; seed each generator in the script, or put "
            "--seed N before SCRIPT.py"
        )
    if first and not lines and exit_request is None:
        complain(
            "nothing to digest: no optimizer of torch.optim took a step, no state dict was saved and no "
            "global variable of the script holds a model; save one with "
            "torch.save(model.state_dict(), FILE), or print reproml.digest(model)"
        )
    if exit_request is not None:
        raise exit_request  # with the status that the script chose
    return 0, result


def matrix_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Train natively and exactly under every setting of this CPU; exact hashes must agree."""
    from reproml import matrix

    def print_line(setting: str, native: str, exact: str) -> None:
        terminal.print(f"{setting:<32} {native[:16]:<16} {exact[:16]}")

    def print_row(row: Row) -> None:
        print_line(row.setting, row.native, row.exact)

    if args.script and args.device != "cpu":
        raise ReproError("--device is for recipes; a script chooses its device itself")
    _device(args)
    settings = matrix.offered(args.workers, args.device)
    subject: dict[str, Any]
    if args.script:
        if args.steps is not None:
            raise ReproError(
                "--steps is for recipes; give a script its own option, "
                "for example --script 'train.py --steps 5'"
            )
        subject = {"script": args.script}
        hashed = f"{args.script}: SHA-256 of all it trained and saved"
    else:
        subject = {"recipe": _recipe(args).name, "steps": _steps(args)}
        hashed = f"{subject['recipe']}, {subject['steps']} steps: digest of the state dict"
    terminal.print(f"{hashed} (the first 16 digits)")
    print_line("setting", "native", "exact")
    if args.script:
        rows = matrix.run_script(args.script, settings, print_row)
    else:
        recipe = args.recipe or DEFAULT_RECIPE
        rows = matrix.run_recipe(recipe, subject["steps"], args.data, settings, print_row)
    natives, exacts = {row.native for row in rows}, {row.exact for row in rows}
    print_line("different hashes", str(len(natives)), str(len(exacts)))
    return int(len(exacts) != 1), {
        **subject,
        "settings": [vars(row) for row in rows],
        "native_hashes": len(natives),
        "exact_hashes": len(exacts),
    }


def doctor_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Describe this machine and test here every assumption of exact arithmetic."""
    from reproml import doctor
    from reproml.arithmetic import selftest

    differing = [] if args.run is None else doctor.differences(args.run)
    facts = doctor.here()
    for fact, value in facts.items():
        terminal.print(f"{fact:<32} {value}")
    if args.run is not None:
        terminal.print(
            f"{len(differing)} of these facts differ from those that {args.run} recorded:"
        )
        for d in differing:
            terminal.print(f"{d.fact:<32} {d.here}, in the run {d.run}")
        terminal.print("an exact run has the same bits regardless; a native run may have others")
    outcomes = []
    for outcome in selftest.self_test():
        outcomes.append(outcome)
        label = "ok     " if outcome.fault is None else "BROKEN "
        detail = outcome.fault or outcome.note
        terminal.print(f"{label}  {outcome.name}" + f": {detail}" * bool(detail))
    broken = sum(outcome.fault is not None for outcome in outcomes)
    verdict = (
        f"{broken} failed; do not rely on any hash from this machine"
        if broken
        else "all hold on this machine"
    )
    terminal.print(f"{len(outcomes)} assumptions tested: {verdict}")
    return int(bool(broken)), {
        "healthy": not broken,
        "facts": facts,
        "differences": None if args.run is None else [vars(d) for d in differing],
        "assumptions": [outcome.as_json() for outcome in outcomes],
    }


def report_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Write an HTML page about a run folder: its verdict, figures, hashes and first divergence."""
    from reproml import report

    recipe = _recipe(args, args.run)
    folder = args.run or _default_folder(args, recipe)
    named = folder.resolve() if folder.name in ("", "..") else folder  # --run . or / has no name
    out = args.out or named.parent / f"{named.name}.html"
    page = report.build_page(folder, args.recipe, args.data, args.diff)
    report.write_page(page.html, out)
    verdict = {True: "verified", False: "not the golden run", None: "no golden file"}[page.verified]
    terminal.print(f"wrote {out}: {verdict}")
    result = {"report": str(out), "verified": page.verified}
    if args.diff:
        terminal.print(page.compared)
        result["differ"] = page.differs
    return int(page.verified is False or page.differs), result


def diff_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Find where two traces, runs, weights or golden files first diverge, by how much, and why."""
    from reproml.diff import compare as differences
    from reproml.diff.rerun import Again, script_words

    if args.script is not None and not args.rerun:
        raise ReproError("--script names the script that --rerun runs; add --rerun")
    again = Again(script_words(args.script), terminal.print) if args.rerun else None
    found = differences.compare(args.a, args.b, again)
    for line in differences.lines(found, str(args.a), str(args.b)):
        terminal.print(line)
    return int(found is not None), {"differ": found is not None, **(asdict(found) if found else {})}


def reproduced_command(args: argparse.Namespace, terminal: Terminal) -> Result:
    """Compare provenances of different builders; if they agree, state it in a verification summary."""
    from reproml.evidence import provenance, reproduced

    paths = [args.first, args.second, *args.others]
    provenance.builder_id(args.builder)
    checked = reproduced.compare(paths, args.same_builder)
    out = args.out or reproduced.summary_path(args.first)
    for p in checked.provenances:
        if out.resolve() == p.path.resolve():
            raise ReproError(f"{out} is a provenance to compare; choose another file with --out")
    result: dict[str, Any] = {
        "reproduced": checked.difference is None,
        "difference": checked.difference,
        "builders": [p.builder for p in checked.provenances],
        "summary": None,
    }
    if checked.difference is not None:
        for p in checked.provenances:
            terminal.print(f"{p.path}: by {p.builder}")
        terminal.print(f"not reproduced: {checked.difference}")
        if out.exists():
            terminal.print(f"{out} is of an earlier comparison, not of this one")
        return 1, result
    compared, stated = 0, 0
    for p in checked.provenances:
        count, weights = reproduced.weights_beside(p), len(p.subjects)
        compared, stated = compared + count, stated + weights
        beside = "checked" if count == weights else f"of {count} of {weights} files checked"
        terminal.print(f"{p.path}: by {p.builder}, weights {beside if count else 'not beside it'}")
    try:
        write_atomically(out, checked.summary(args.builder))
    except OSError as error:
        raise ReproError(f"cannot write the summary {out}: {error.strerror}") from None
    count = len(checked.builders)
    terminal.print(
        f"reproduced by {count} builder{'s' * (count > 1)}: parameters, data and weights agree; "
        f"{compared} of {stated} stated weights were checked in their files; wrote {out}"
    )
    return 0, {**result, "summary": str(out)}


# --- several workers, started by torchrun -----------------------------------------------------------


def _refuse_useless_workers(args: argparse.Namespace) -> None:
    """Raise ReproError if torchrun started several workers for the work of one process."""
    if this_worker().size == 1:
        return
    only_reads = args.verb == "verify" and (args.run or args.signature)
    if not VERBS[args.verb].trains or only_reads:
        raise ReproError(
            f"{args.verb} does not train, so several workers have nothing to share; "
            "start it without torchrun"
        )
    for option in "trace", "provenance":
        if getattr(args, option, None):
            raise ReproError(
                f"--{option} records the training of one process; start it without torchrun"
            )
    if getattr(args, "micro_batch", None):
        raise ReproError(
            "--micro-batch is for the training of one process; start it without torchrun"
        )


def _refuse_useless_micro_batch(args: argparse.Namespace) -> None:
    """Raise ReproError if --micro-batch is given where it has no effect or no exact result."""
    if getattr(args, "micro_batch", None) is None:
        return
    if args.numerics == "native":
        raise ReproError(
            "--micro-batch gives the same results only in exact numerics; leave it out"
        )
    if getattr(args, "trace", None):
        raise ReproError("--trace records complete batches; leave out --micro-batch")
    if args.verb == "verify" and args.run is not None:
        raise ReproError("--run verifies a run without training, so leave out --micro-batch")


def _train_with_first_worker(args: argparse.Namespace) -> None:
    """Take part, without output, in the training that the first worker starts, if any."""
    from reproml import distributed
    from reproml.pipeline import run
    from reproml.pipeline.train import train

    device = _device(args)
    with distributed.joined(device=device) as job:
        if job is None:
            return
        recipe, numerics, steps, start = job
        _, prepared, _ = run.prepare(recipe, args.data, numerics)
        train(recipe, prepared, numerics, steps, start=start, device=device)


def _release_waiting_workers() -> None:
    """End the other workers, which still wait for a training if the first worker had none to do."""
    from reproml import distributed

    if not distributed.has_joined():
        with distributed.joined():
            pass


# --- options and verbs ------------------------------------------------------------------------------


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _positive_integers(text: str) -> list[int]:
    return [_positive_integer(count) for count in text.split(",")]


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # NumPy's limit
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**32 - 1")
    return int(text)


def _device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,2}))?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


DEFAULT_RECIPE = "mnist-mlp"
# The arguments of argparse's add_argument, by option. invoke shows the help too, without the metavar.
OPTIONS: dict[str, dict[str, Any]] = {
    "--recipe": {
        "metavar": "NAME|PATH",
        "help": f"name or TOML file; default: {DEFAULT_RECIPE}, or that of the --run or --resume folder",
    },
    "--data": {"type": Path, "metavar": "DIR", "help": "folder with the data files"},
    "--out": {
        "type": Path,
        "metavar": "PATH",
        "help": "run folder to write, default: runs/RECIPE; for report the page, default: RUN.html; for "
        "export the folder, default: RUN-FORMAT or what MLflow is set to; for reproduced the summary, "
        "default: FIRST.reproduced.json",
    },
    "--run": {
        "type": Path,
        "metavar": "DIR",
        "help": "run folder; default: runs/RECIPE, but verify trains and doctor compares with no run",
    },
    "--numerics": {
        "choices": ["exact", "native"],
        "default": "exact",
        "help": "exact (default), or native: PyTorch with its determinism switches, for comparison",
    },
    "--device": {
        "type": _device_name,
        "default": "cpu",
        "metavar": "cpu|cuda",
        "help": "where to compute, default: cpu; cuda:N names one of several GPUs; for matrix, cuda "
        "adds rows",
    },
    "--steps": {
        "type": _positive_integer,
        "metavar": "N",
        "help": "stop after N steps and write no run folder",
    },
    "--micro-batch": {
        "type": _positive_integer,
        "metavar": "N",
        "help": "compute each batch N rows at a time, in less memory, with the same results",
    },
    "--checkpoint-every": {
        "type": _positive_integer,
        "metavar": "N",
        "help": "save a checkpoint every N steps, beside the run folder",
    },
    "--resume": {
        "type": Path,
        "metavar": "DIR",
        "help": "resume the training of this run folder from its newest checkpoint",
    },
    "--list": {
        "action": "store_true",
        "help": "list the golden files: task, parameters, accuracy, hash, and where each was confirmed",
    },
    "--force": {"action": "store_true", "help": "replace an existing golden file or signature"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--digest": {
        "type": Path,
        "metavar": "FILE",
        "help": "also write the digests to this JSON file; must precede SCRIPT.py",
    },
    "--seed": {
        "type": _seed,
        "metavar": "N",
        "help": "seed Python's random, NumPy's global generator and PyTorch's before the script starts; "
        "must precede SCRIPT.py",
    },
    "--script": {
        "metavar": "'SCRIPT.py ARGS'",
        "help": "training script to run instead of a recipe, with its arguments in one string; for diff, "
        "the one that --rerun runs",
    },
    "--builder": {
        "metavar": "NAME",
        "help": "name of this machine in provenance.json or in the summary; default: REPROML_BUILDER, or "
        "the name of the host",
    },
    "--provenance": {
        "type": Path,
        "metavar": "FILE",
        "help": "write a statement of script, arguments, data and result to this JSON file",
    },
    "--trace": {
        "type": Path,
        "metavar": "FILE",
        "help": "record every step in this file, to be compared by: reproml diff",
    },
    "--diff": {
        "type": Path,
        "metavar": "RUN|TRACE",
        "help": "show where the run first diverges from this run folder or trace",
    },
    "--rerun": {
        "action": "store_true",
        "help": "run the first diverging step again, on both sides, to find the operator",
    },
    "a": {"type": Path, "metavar": "A", "help": "trace, run folder, .safetensors or golden .json"},
    "b": {"type": Path, "metavar": "B", "help": "another of the same kind"},
    "run": {"type": Path, "metavar": "RUN", "help": "run folder"},
    "--key": {
        "type": Path,
        "required": True,
        "metavar": "FILE",
        "help": "private key in PEM format, not encrypted, on the curve P-256, P-384 or P-521",
    },
    "--signature": {
        "type": Path,
        "metavar": "FILE",
        "help": "check only the run folder's model.sig, with this public key in PEM format",
    },
    "--format": {
        "choices": ["ro-crate", "model-card", "mlflow"],
        "required": True,
        "help": "ro-crate, model-card or mlflow",
    },
    "first": {"type": Path, "metavar": "FIRST", "help": "provenance.json or its run folder"},
    "second": {"type": Path, "metavar": "SECOND", "help": "another, of another builder"},
    "others": {
        "type": Path,
        "nargs": "*",
        "metavar": "OTHERS",
        "help": "more of them; for invoke in one string",
    },
    "--same-builder": {
        "action": "store_true",
        "help": "also compare provenances of one builder, which shows no independent reproduction",
    },
    "--workers": {
        "type": _positive_integers,
        "default": [],
        "metavar": "N,N,...",
        "help": "also train with these numbers of workers, such as 1,2,4, started by torchrun",
    },
    "script": {
        "metavar": "SCRIPT.py",
        "help": "training script; what stands behind it are its own arguments, not options of run",
    },
    "arguments": {
        "metavar": "ARGS",
        "nargs": argparse.REMAINDER,
        "help": "arguments of the script",
    },
}


@dataclass(frozen=True)
class Verb:
    """One verb: the function that carries it out, whose docstring is the help, and its options."""

    command: Callable[[argparse.Namespace, Terminal], Result]
    option_names: str
    trains: bool = False  # several workers can share its work

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        return {name: OPTIONS[name] for name in self.option_names.split()}


VERBS = {
    "data": Verb(data_command, "--recipe --data --json"),
    "train": Verb(
        train_command,
        "--recipe --data --out --numerics --device --steps --micro-batch --trace --checkpoint-every "
        "--resume --builder --json",
        trains=True,
    ),
    "evaluate": Verb(evaluate_command, "--recipe --data --run --numerics --device --json"),
    "verify": Verb(
        verify_command,
        "--recipe --data --run --numerics --device --micro-batch --signature --json",
        trains=True,
    ),
    "pipeline": Verb(
        pipeline_command, "--recipe --data --out --numerics --device --builder --json", trains=True
    ),
    "golden": Verb(
        golden_command, "--recipe --data --numerics --device --force --list --json", trains=True
    ),
    "run": Verb(
        run_command,
        "--numerics --digest --provenance --builder --trace --seed script arguments",
        trains=True,
    ),
    "matrix": Verb(matrix_command, "--recipe --script --data --device --steps --workers --json"),
    "doctor": Verb(doctor_command, "--run --json"),
    "sign": Verb(sign_command, "run --key --force --json"),
    "export": Verb(export_command, "run --format --out --json"),
    "report": Verb(report_command, "--recipe --data --run --out --diff --json"),
    "diff": Verb(diff_command, "a b --rerun --script --json"),
    "reproduced": Verb(
        reproduced_command, "first second others --same-builder --builder --out --json"
    ),
}


class _ShowVersions(argparse.Action):
    """Prints the versions on which results depend, without loading PyTorch."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from importlib.metadata import version

        from reproml.versions import DEFINITIONS, __version__

        pytorch = version("torch")
        print(f"reproml {__version__}, definitions {DEFINITIONS}, PyTorch {pytorch}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; `verb` in its result is a key of VERBS."""
    main_parser = argparse.ArgumentParser(
        prog="reproml", description="Deep learning that is reproducible to the last bit."
    )
    main_parser.add_argument("--version", action=_ShowVersions, nargs=0, help="print versions")
    subparsers = main_parser.add_subparsers(metavar="VERB", required=True)
    for name, verb in VERBS.items():
        text = verb.command.__doc__
        verb_parser = subparsers.add_parser(name, help=text, description=text)
        verb_parser.set_defaults(verb=name, json=False, usage_error=verb_parser.error)
        for option, settings in verb.options.items():
            action = verb_parser.add_argument(option, **settings)
            if action.nargs == argparse.REMAINDER:
                action.required = False  # a script may have no arguments
    return main_parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one verb and return the exit status. Raises SystemExit only for an invalid command line."""
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.usage_error(
            f"unrecognized arguments: {printable(' '.join(unknown))}"
        )  # shows the verb's usage
    try:
        _refuse_useless_workers(args)
        _refuse_useless_micro_batch(args)
        worker = this_worker()
        shared = worker.size > 1 and args.verb != "run"  # a script coordinates its own workers
        if shared and worker.rank > 0:
            _train_with_first_worker(args)
            return 0
        status, result = VERBS[args.verb].command(args, Terminal(to_stderr=args.json))
        if shared:
            _release_waiting_workers()
        if args.json:
            print(json.dumps(result, indent=2), flush=True)
        return status
    except BrokenPipeError:
        # What is still in the buffers at exit has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # of a program that SIGPIPE ends
    except (ReproError, NotExactError, OSError) as error:
        complain(error)
        return 2
    except RecursionError:
        complain("a file is nested too deeply to be read")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        complain(
            f"{args.verb} needs more memory than there is; use a smaller model or file, "
            "or a machine with more memory"
        )
        return 2
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        complain(f"{args.verb} needs the package {package}; install reproml[{EXTRAS[package]}]")
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


def _out_of_memory(error: Exception) -> bool:
    """Return whether Python or PyTorch, which has no class of error for the CPU, found no memory."""
    return (
        isinstance(error, MemoryError)
        or "DefaultCPUAllocator" in str(error)
        or type(error).__name__ == "OutOfMemoryError"  # of a GPU
    )


# --- what several verbs need ------------------------------------------------------------------------


def _steps(args: argparse.Namespace) -> int:
    """Return --steps, but at most the number of steps in the recipe's training."""
    from reproml.pipeline import data as datasets
    from reproml.pipeline.train import step_count

    recipe = _recipe(args)
    samples = len(datasets.load_dataset(recipe.data.name, args.data).train.labels)
    return min(args.steps or sys.maxsize, step_count(recipe, samples))


def _recipe(args: argparse.Namespace, folder: Optional[Path] = None) -> Recipe:
    """Return the recipe that --recipe names, else that of the run folder, else the default."""
    from reproml.pipeline.recipe import load_recipe

    if folder is not None and args.recipe is None:
        from reproml.pipeline import run

        return run.recorded_recipe(folder)
    return load_recipe(args.recipe or DEFAULT_RECIPE)


def _device(args: argparse.Namespace) -> torch.device:
    """Return the device that --device names. Raises ReproError if this machine lacks it."""
    from reproml.pipeline.device import choose_device

    return choose_device(args.device)


def _train_exactly(
    args: argparse.Namespace, recipe: Recipe, device: torch.device, terminal: Terminal
) -> dict[str, Any]:
    """Train the recipe in exact arithmetic, in memory, and return the items of a golden file."""
    from reproml.pipeline import run
    from reproml.pipeline.train import Output

    with terminal.bar("train") as progress:
        output = Output(terminal.print, progress)
        micro_batch = getattr(args, "micro_batch", None)
        return run.perform(
            recipe, args.data, "exact", output, device=device, micro_batch=micro_batch
        ).items


def _default_folder(args: argparse.Namespace, recipe: Recipe) -> Path:
    suffix = "-native" if getattr(args, "numerics", "exact") == "native" else ""
    return Path("runs") / (recipe.name + suffix)


def _refuse_unusable_builder(args: argparse.Namespace) -> None:
    """Raise ReproError before the training if --builder or REPROML_BUILDER is not a name."""
    from reproml.evidence import provenance

    provenance.builder_id(args.builder)


def _refuse_native(args: argparse.Namespace) -> None:
    if args.numerics == "native":
        raise ReproError(
            "native numerics have no golden file, as their result depends on the machine; "
            "leave out --numerics native, or see the drift with: python -m reproml matrix"
        )
