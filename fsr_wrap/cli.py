"""The command `fsr-wrap`: what a checkpoint says of the labels, without the model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .issues import label_issues_from_memory
from .memory import Memory
from .report import write_report, write_table
from .saved import read_data, read_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. **Returns:** the exit status, 2 if what was asked for cannot be had."""
    options = _parser().parse_args(arguments)
    try:
        said = options.run(options)
        if said:
            print(said)
    except BrokenPipeError:  # who reads the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ImportError, OSError, RuntimeError, ValueError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"fsr-wrap: {text}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fsr-wrap", description="What a run knows of its labels, from its checkpoint.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    issues = commands.add_parser("issues", help="which labels look wrong, as CSV", description=_issues.__doc__)
    report = commands.add_parser("report", help="the same as a page to look at", description=_report.__doc__)
    for command, run in ((issues, _issues), (report, _report)):
        command.set_defaults(run=run)
        command.add_argument("checkpoint", type=Path, help="what fsr.save() wrote: the folder, or fsr.safetensors")
    issues.add_argument(
        "--csv", type=Path, required=True, metavar="FILE", help="where to write it; - for standard output"
    )
    report.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write it")
    report.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="the training set, in the order it was trained on: a .parquet file, a folder of them, or a folder of "
        "pictures with one folder a class",
    )
    return parser


def _issues(options: argparse.Namespace) -> str:
    """Writes all labels to a CSV file, those that look wrong first."""
    table = label_issues_from_memory(read_memory(options.checkpoint))
    if str(options.csv) == "-" or _is_output(options.csv):
        write_table(sys.stdout, table)
        return ""
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    write_table(options.csv, table)
    return f"{options.csv}: {int(table['is_label_issue'].sum()):,} of {len(table):,} labels look wrong."


def _is_output(path: Path) -> bool:
    """Whether it is standard output by another name, /dev/stdout say."""
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # there is no such file, or no output
        return False


def _report(options: argparse.Namespace) -> str:
    """Writes a page that shows which labels look wrong, and the same as CSV."""
    memory = read_memory(options.checkpoint)
    dataset = None if options.data is None else read_data(options.data)
    page = write_report(options.out, memory, dataset=dataset, class_names=_names(memory, dataset))
    return f"{page}"


def _names(memory: Memory, dataset: Any) -> list[str] | None:
    """The data set's names of the classes, if the run had none and there are as many."""
    names = None if dataset is None else dataset.classes
    fitting = names is not None and len(names) == memory.num_classes and memory.class_names is None
    return names if fitting else None
