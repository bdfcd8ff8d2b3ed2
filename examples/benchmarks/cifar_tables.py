"""CE against FSR on CIFAR-10: real human label errors, or a long tail; several seeds, one table.

    python examples/benchmarks/cifar_tables.py noise --data DIR --out cifar10n.json
    python examples/benchmarks/cifar_tables.py long-tail --data DIR --out cifar10_lt.json

`--data` is a folder with train.parquet and test.parquet; `noise` needs CIFAR-10N's column `worse_label` in it (40 % of
the labels are wrong). Same network, schedule, data and seeds for all methods; sized for two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cifar

COMMON = ["--model", "test_resnet", "--augment", "flip", "--lr", "0.05", "--batch-size", "100", "--quiet"]
TASKS: dict[str, list[str]] = {
    "noise": [
        "--noise",
        "column:worse_label",
        "--limit",
        "10000",
        "--epochs",
        "30",
        "--schedule",
        "cosine",
        "--weight-decay",
        "5e-4",
    ],
    "long-tail": [
        *["--imbalance", "100", "--limit", "20000", "--epochs", "40", "--schedule", "steps"],
        *["--many-shot", "500", "--few-shot", "100"],
    ],
}
METHODS: dict[str, dict[str, list[str]]] = {
    "noise": {"CE": ["--method", "ce"], "FSR": [], "FSR, paper's recipe (MixUp)": ["--mixup"]},
    "long-tail": {"CE": ["--method", "ce"], "FSR": [], "FSR-DF (deferred)": ["--deferred"]},
}


def summary(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def table(task: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table, a row a method."""
    columns = {"last": "last accuracy", "best": "best"}
    if task == "noise":
        columns["purity"] = "dictionary purity"
    else:
        columns |= {"many": "many-shot", "medium": "medium-shot", "few": "few-shot"}
    lines = ["| method | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, runs in results.items():
        if not runs:
            continue
        cells = [summary([run[key] for run in runs]) if key in runs[0] else "" for key in columns]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the methods of a task, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--out", type=Path, help="JSON; runs that are in it already are not run again")
    options, rest = parser.parse_known_args()
    methods = {name: flags for name, flags in METHODS[options.task].items() if name in (options.methods or [name])}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    if options.out and options.out.exists():  # a run that was cut short goes on
        results |= json.loads(options.out.read_text())["results"]
    for seed in options.seeds:
        data = None
        for name, flags in methods.items():
            if any(run["seed"] == seed for run in results[name]):
                continue
            command = ["--data", options.data, "--seed", str(seed), *COMMON, *TASKS[options.task], *flags, *rest]
            args = cifar.parse(command)
            data = data or cifar.read(args)
            results[name].append(cifar.run(args, data))
            print(seed, name, cifar.report(results[name][-1]), flush=True)
            if options.out:
                command_line = " ".join([*COMMON, *TASKS[options.task], *rest])
                options.out.write_text(json.dumps({"flags": command_line, "results": results}, indent=1))
    print(table(options.task, results))


if __name__ == "__main__":
    main()
