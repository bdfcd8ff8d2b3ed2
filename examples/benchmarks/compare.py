"""All methods on all cases: accuracy and cost, several seeds and splits, one table and one plot.

    python examples/benchmarks/compare.py --out DIR --fashion DIR --cifar DIR [--cases fashion] [--methods ce elr fsr]
    python examples/benchmarks/compare.py --out DIR --table
    python examples/benchmarks/compare.py --out DIR --plot compare.svg --curves curves.svg --pack compare.json

`--out` may be the packed file for what only reads.

Each run writes a JSON file of its own into `--out`; runs that are there already are not run again, and two processes
with the same command share the work. The cases are in `cases.py`, the methods in `examples/methods`. Everybody has the
same images, network, initial weights, schedule and number of steps; methods that need the noise rate are told the true
share of wrong labels, those that need clean images get 1,000 from outside the training set. MixUp and SOP have other
published settings for wrong labels and for asymmetric noise, and take them there.

Cost is in cross-entropy steps. Every tenth step a second network takes a plain step on the same batch in the same
process: `step` is the ratio of the medians, `cost` the whole training time, with all that a method does before and
between epochs, over that of as many plain steps. Times are the processor's, so that other processes do not count, and
evaluation is left out.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases import BATCH_SIZE, CASES, Case, Data, get_transforms, make_case_network, make_data, make_recipe
from common import shot_accuracy
from figures import pyplot
from methods import METHODS, Method, Task, make_method
from methods.fsr import FSR
from torch import Tensor, nn

BUILT_IN = frozenset(METHODS)
TIMED_EVERY = 10
MANY_SHOT, FEW_SHOT = 500, 100

Run = dict[str, Any]


# --- one run ---------------------------------------------------------------------------------------------------------


def make_task(case: Case, data: Data, epochs: int, seed: int) -> Task:
    """What the methods may know; the network is made from the global random stream."""
    augmented, plain = get_transforms(case)
    return Task(
        model=make_case_network(case, start=data.start),
        labels=data.given,
        num_classes=case.classes,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        inputs=lambda index: plain(data.images[index]),
        augmented=lambda index: augmented(data.images[index]),
        make_model=lambda: make_case_network(case, start=data.start),
        recipe=partial(make_recipe, case),
        clean=(plain(data.clean_images), data.clean_labels),
        noise_rate=data.wrong,
        noise=case.noise.partition(":")[0],
        seed=seed,
    )


class Clock:
    """Times the method's work, and next to some of its steps a plain step of a network of the same kind."""

    def __init__(self, task: Task) -> None:
        with torch.random.fork_rng():
            self.twin = task.make_model()
        self.sgd = torch.optim.SGD(self.twin.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.steps: list[float] = []
        self.pairs: list[tuple[float, float]] = []
        self.other = 0.0

    def plain_step(self, x: Tensor, y: Tensor) -> None:
        start = time.process_time()
        F.cross_entropy(self.twin(x), y).backward()
        self.sgd.step()
        self.sgd.zero_grad()
        self.pairs.append((self.steps[-1], time.process_time() - start))

    @contextmanager
    def work(self) -> Iterator[None]:
        """Anything that is no step."""
        start = time.process_time()
        yield
        self.other += time.process_time() - start

    def summary(self) -> dict[str, float]:
        own, plain = (statistics.median(times) for times in zip(*self.pairs, strict=True))
        return {
            "step": own / plain,
            "cost": (sum(self.steps) + self.other) / (len(self.steps) * plain),
            "seconds": sum(self.steps) + self.other,
            "plain_step_seconds": plain,
        }


@torch.no_grad()
def evaluate(method: Method, model: nn.Module, case: Case, data: Data) -> Tensor:
    """Whether each test image is classified rightly."""
    plain = get_transforms(case)[1]
    model.eval()
    parts = [method.predict(model, plain(part)).argmax(1) for part in data.test_images.split(1000)]
    model.train()
    return torch.cat(parts) == data.test_labels


def train(name: str, case: Case, data: Data, seed: int, epochs: int) -> Run:
    """One run from scratch."""
    torch.manual_seed(seed)
    task = make_task(case, data, epochs, seed)
    method, model, samples = make_method(name, task), task.model, len(data.given)
    clock, steps = Clock(task), max(1, samples // BATCH_SIZE)
    optimizer, schedule = task.recipe([*model.parameters(), *method.parameters()], epochs * steps)
    optimizer = method.attach(optimizer)
    with clock.work():
        method.prepare()
    curve: list[float] = []
    for epoch in range(epochs):
        with clock.work():
            method.start_epoch(epoch)
        for number, index in enumerate(torch.randperm(samples).tensor_split(steps)):
            x, y = task.augmented(index), data.given[index]
            start = time.process_time()
            method.loss(model, x, y, index).backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.steps.append(time.process_time() - start)
            schedule.step()
            if number % TIMED_EVERY == 0:
                clock.plain_step(x, y)
        with clock.work():
            method.end_epoch(epoch)
        correct = evaluate(method, model, case, data)
        curve.append(correct.float().mean().item())
    counts = torch.bincount(data.given, minlength=case.classes)
    return {
        "last": curve[-1],
        "best": max(curve),
        **clock.summary(),
        **shot_accuracy(correct, data.test_labels, counts, MANY_SHOT, FEW_SHOT),
        "samples": samples,
        "wrong": data.wrong,
        "metrics": method.metrics(),
        "purity": purity(method, data),
        "curve": curve,
    }


def purity(method: Method, data: Data) -> float | None:
    """The share of right labels in FSR's dictionary."""
    if not isinstance(method, FSR):
        return None
    members = method.wrapper.dictionary.index
    return (data.given[members] == data.right[members]).float().mean().item()


# --- all runs --------------------------------------------------------------------------------------------------------


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may do the run: it isn't done, and no other process is at it. A dead process holds none."""
    name = path.with_suffix(".lock")
    with name.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not path.exists()
        if path.exists():
            name.unlink(missing_ok=True)


def write(path: Path, run: Run) -> None:
    """Whole or not at all."""
    partial_path = path.with_suffix(f".{os.getpid()}.partial")
    partial_path.write_text(json.dumps(run, indent=1))
    partial_path.replace(path)


def run_all(args: argparse.Namespace) -> None:
    """Seed by seed, so that a first table comes early."""
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, split, key in ((seed, split, key) for seed in args.seeds for split in args.splits for key in args.cases):
        case = CASES[key]
        folder = args.fashion if case.source == "fashion" else args.cifar
        epochs = args.epochs or case.epochs
        for name in args.methods:
            path = args.out / f"{key}_{name}_split{split}_seed{seed}_epochs{epochs}.json"
            with claim(path) as mine:
                fields = args.fields.get(name)
                if path.exists() and json.loads(path.read_text()).get("fields") != fields:
                    raise SystemExit(
                        f"{path} is of other fields than --variant {name} {json.dumps(fields)}: move it away."
                    )
                if not mine:
                    continue
                result = train(name, case, make_data(case, folder, split, seed), seed, epochs)
                setting = {"case": key, "method": name, "split": split, "seed": seed, "epochs": epochs}
                if fields is not None:
                    setting["fields"] = fields
                write(path, {**setting, "title": METHODS[name].title, **result})
                print(f"{path.stem}: last {result['last']:.4f}, cost {result['cost']:.2f}", flush=True)
        make_data.cache_clear()


def read_runs(args: argparse.Namespace) -> dict[tuple[str, str], list[Run]]:
    """The runs in `--out` that the flags name, by case and method, in the flags' order; those of other lengths are left
    out. All methods found are shown if `--methods` is not given."""
    runs: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(load(args.out), key=lambda run: (run["case"], run["method"], run["split"], run["seed"])):
        key, name = run["case"], run["method"]
        if key not in args.cases or run["split"] not in args.splits or run["seed"] not in args.seeds:
            continue
        if run["epochs"] == (args.epochs or CASES[key].epochs):
            runs.setdefault((key, name), []).append(run)
    names = list(METHODS) if args.all_methods else args.methods
    names += [name for _, name in runs if args.all_methods and name not in names]
    return {(key, name): runs[key, name] for key in args.cases for name in dict.fromkeys(names) if (key, name) in runs}


# --- table and plot --------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in three digits."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def label(name: str, runs: list[Run]) -> str:
    """The method's name, and what it was given beyond the labels."""
    method = METHODS.get(name, FSR)
    extra = ["clean images"] if method.needs_clean else []
    extra += ["noise rate"] if method.needs_rate else []
    return runs[0]["title"] + (f" ({', '.join(extra)})" if extra else "")


def table(runs: dict[tuple[str, str], list[Run]], value: str) -> str:
    """A Markdown table: a row a method; the mean over the cases, cost as the median over runs, and a column a case."""
    cases, names = ([*dict.fromkeys(pair[n] for pair in runs)] for n in (0, 1))
    titles = [CASES[key].title for key in cases]
    sets = {title.partition(", ")[0] for title in titles}
    if len(sets) == 1:  # the name of the data set need not be said in each column
        titles = [title.partition(", ")[2] for title in titles]
    head = ["method", "mean", "cost (CE = 1)", "a step", *titles]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        found = [runs.get((key, name), []) for key in cases]
        cells = [
            spread([run[value] for run in part if value in run]) if part and value in part[0] else "" for part in found
        ]
        flat = [run for part in found for run in part]
        means = [statistics.mean(run[value] for run in part) for part in found if part and value in part[0]]
        mean = f"{statistics.mean(means):.3f}" if len(means) == len(cases) else ""
        cost = [f"{statistics.median(run[key] for run in flat):.2f}" for key in ("cost", "step")]
        lines.append("| " + " | ".join([label(name, flat), mean, *cost, *cells]) + " |")
    return "\n".join(lines)


def gains(runs: dict[tuple[str, str], list[Run]]) -> str:
    """A Markdown table of what FSR gains on cross-entropy, in points: the mean over pairs of one split and seed, with
    its standard error."""
    lines = ["| case | pairs | FSR − cross-entropy |", "|---|---|---|"]
    for key in dict.fromkeys(key for key, _ in runs):
        plain, ours = (
            {(run["split"], run["seed"]): run["last"] for run in runs.get((key, n), [])} for n in ("ce", "fsr")
        )
        found = [100 * (ours[pair] - plain[pair]) for pair in plain.keys() & ours.keys()]
        error = f" ± {statistics.stdev(found) / math.sqrt(len(found)):.2f}" if len(found) > 1 else ""
        if found:
            lines.append(f"| {CASES[key].title} | {len(found)} | {statistics.mean(found):+.2f}{error} |")
    return "\n".join(lines)


def plot_curves(runs: dict[tuple[str, str], list[Run]], path: Path) -> None:
    """Test accuracy by epoch of cross-entropy and FSR, mean and range over the runs, a panel a case."""
    plt = pyplot()
    cases = [key for key in dict.fromkeys(key for key, _ in runs) if {(key, "ce"), (key, "fsr")} <= set(runs)]
    figure, panels = plt.subplots(1, len(cases), figsize=(4.6 * len(cases), 3.6), squeeze=False)
    for panel, key in zip(panels[0], cases, strict=True):
        for name, color, title in (("ce", "#c8553d", "cross-entropy"), ("fsr", "#2a86b8", "FSR")):
            curves = np.array([run["curve"] for run in runs[key, name]])
            epochs = np.arange(1, curves.shape[1] + 1)
            panel.plot(epochs, curves.mean(0), color=color, linewidth=2, label=title)
            panel.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
        panel.set(title=CASES[key].title, xlabel="epoch", ylabel="test accuracy")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def plot(runs: dict[tuple[str, str], list[Run]], path: Path) -> None:
    """Accuracy at the last epoch against cost, both as means over the cases; of methods that have them all."""
    plt = pyplot()
    cases, names = ([*dict.fromkeys(pair[n] for pair in runs)] for n in (0, 1))
    figure, panel = plt.subplots(figsize=(7.5, 5))
    points = []
    for name in names:
        parts = [runs[key, name] for key in cases if (key, name) in runs]
        if len(parts) == len(cases):
            y = statistics.mean(statistics.mean(run["last"] for run in part) for part in parts)
            points.append((y, statistics.median(run["cost"] for part in parts for run in part), name))
    right = max(x for _, x, _ in points) if points else 1.0
    height = (max(points)[0] - min(points)[0]) / 18 if points else 0.0  # of a name
    place = math.inf
    for y, x, name in sorted(points, reverse=True):
        clean = METHODS.get(name, FSR).needs_clean
        color = "#2a86b8" if name.startswith("fsr") else "#c8963e" if clean else "#888888"
        place = min(y, place - height)  # names stand in a column, so that none is written over another
        panel.plot([x, right + 0.06], [y, place], color=color, linewidth=0.5, alpha=0.5)
        panel.plot(x, y, "o", color=color, markersize=9 if name == "fsr" else 6)
        title = METHODS[name].title if name in METHODS else name
        panel.annotate(title, (right + 0.08, place), va="center", fontsize=10, color=color)
    panel.set(xlabel="training time (cross-entropy = 1)", ylabel="test accuracy, mean of the cases")
    panel.margins(y=0.1)
    left, _ = panel.get_xlim()
    panel.set_xticks([tick for tick in panel.get_xticks() if left <= tick < right + 0.1])  # none below the names
    panel.set_xlim(right=right + 0.5 * (right - left))
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def load(path: Path) -> list[Run]:
    """All runs of a folder, or of a file that `pack` wrote."""
    if path.is_file():
        return json.loads(path.read_text())
    return [json.loads(file.read_text()) for file in path.glob("*.json")]


def pack(path: Path, runs: list[Run]) -> None:
    """Writes runs into one file, a line each."""
    lines = [json.dumps(rounded(run), separators=(",", ":")) for run in runs]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def run_or_show(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], None],
    read: Callable[[argparse.Namespace], list[Run]],
    table: Callable[[list[Run]], str],
) -> None:
    """Runs what is missing; or, with `--table` or `--pack`, prints what is there or writes it into one file."""
    if not args.table and not args.pack:
        run(args)
        return
    runs = read(args)
    if args.table:
        print(table(runs))
    if args.pack:
        pack(args.pack, runs)


def rounded(value: Any) -> Any:
    """With numbers of five digits, so that the file is small."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def find_cases(parser: argparse.ArgumentParser, names: list[str]) -> list[str]:
    """The cases of these names, or whose names begin so, in their order. Ends the program if a name is none."""
    found: set[str] = set()
    for name in names:
        matching = {name} if name in CASES else {key for key in CASES if key.startswith(name)}
        if not matching:
            parser.error(f"--cases {name}: give names, or beginnings of names, of {', '.join(CASES)}")
        found |= matching
    return [key for key in CASES if key in found]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--cases` takes beginnings of names too, `--variant` adds FSR with other fields as a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, a JSON file each")
    parser.add_argument(
        "--fashion", type=Path, help="folder of Fashion-MNIST's four gzipped IDX files; default: the hub"
    )
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10N as train.parquet and test.parquet")
    parser.add_argument("--cases", nargs="+", default=[""], help=f"names or their beginnings, of {', '.join(CASES)}")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--variant", nargs=2, action="append", default=[], metavar=("NAME", "JSON"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="default: the case's own")
    tables = ("last", "best", "many", "medium", "few")
    parser.add_argument("--table", nargs="?", const="last", choices=tables, help="print a table")
    parser.add_argument("--gains", action="store_true", help="print what FSR gains on cross-entropy, pair by pair")
    parser.add_argument("--plot", type=Path, help="draw accuracy against cost")
    parser.add_argument("--curves", type=Path, help="draw cross-entropy's and FSR's accuracy by epoch")
    parser.add_argument("--pack", type=Path, help="write all runs that the flags name into one JSON file")
    args = parser.parse_args(arguments)
    args.fields = {name: json.loads(fields) for name, fields in args.variant}
    for name, fields in args.fields.items():
        if name in BUILT_IN:
            parser.error(f"--variant {name}: that is a method's name, give another")
        METHODS[name] = type(name, (FSR,), {"title": name, "make_config": partial_config(fields)})
    unknown = set(args.methods or []) - set(METHODS)
    if unknown:
        parser.error(f"--methods {' '.join(sorted(unknown))}: give some of {', '.join(METHODS)}")
    args.cases = find_cases(parser, args.cases)
    args.all_methods = args.methods is None
    args.methods = args.methods or list(METHODS)
    return args


def partial_config(fields: dict[str, Any]) -> Any:
    """FSR's `make_config` with these fields."""
    return lambda self: FSR.make_config(self, **fields)


def main() -> None:
    """Runs what is missing, or shows what is there."""
    args = parse()
    shows = (args.table, args.gains, args.plot, args.curves, args.pack)
    if not any(shows):
        run_all(args)
        return
    runs = read_runs(args)
    if args.table:
        print(table(runs, args.table))
    if args.gains:
        print(gains(runs))
    if args.plot:
        plot(runs, args.plot)
    if args.curves:
        plot_curves(runs, args.curves)
    if args.pack:
        pack(args.pack, [run for part in runs.values() for run in part])


if __name__ == "__main__":
    main()
