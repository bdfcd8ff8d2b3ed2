"""What FSR costs as things grow: bytes a sample, time of a step and of the epoch's end, without images.

    python examples/benchmarks/scale.py --out docs/results/scale.json --plot docs/results/scale.svg

The model is its head alone, a linear layer on random features of a batch of 100. `loss()` and `end_epoch()` are FSR's
own, with the weights active. Simulated is how an epoch comes about: the score table has all N rows, each visited once,
but with random scores, given to `ScoreTable.update` a million at a time; before each `end_epoch()` three times the
dictionary's quota of each class, again with random scores, goes to `ScoreTable.update` and `RewardDictionary.push`, so
that all C·k members, the best of the epoch and old members compete. iNaturalist's long tail is a Zipf law; elsewhere
all classes have equally many samples.

A step's cost is the time of `loss()` minus that of the cross-entropy that it replaces; neither includes the backward
pass. One step in |R| / 100, at least in 5, also sorts the buffer of candidates: the mean has these in their share,
except at |R| = 100,000, where one in a thousand takes about as long as the epoch's end and none is measured. Settings
take turns, step by step, in an order that changes every round. One thread; its CPU time, which other programs disturb
less than the clock. Several processes, on gloo, share the batch of 100, and the cores if there are too few; theirs is
the clock's time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from figures import pyplot
from torch import Tensor, nn

from fsr_wrap import FSRConfig, FSRWrapper, distributed

BATCH_SIZE, CHUNK = 100, 2**20
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """N, C, |R|, q, d; the exponent of the classes' sizes; the preset that gives the rest, p, and the form of ŷ."""

    samples: int = 100_000
    classes: int = 100
    size: int = 1000
    reward: int = 100
    width: int = 256
    zipf: float = 0.0
    preset: str = "cifar_noise"
    relabel: float = 0.0
    storage: str | int = "float16"


INATURALIST = Setting(437_513, 8142, 2000, 350, 2048, 1.0, "inat2018")
SIZES = {
    "iNaturalist 2018": INATURALIST,
    "iNaturalist 2018, re-labelling": replace(INATURALIST, relabel=1.0),
    "the same, ŷ in int8": replace(INATURALIST, relabel=1.0, storage="int8"),
    "the same, the 10 largest of ŷ": replace(INATURALIST, relabel=1.0, storage=10),
    "N = 10⁸, C = 1,000": Setting(10**8, 1000, 5000, 200, 2048, 0.0, "webvision"),
}
FACTORS: dict[str, tuple[str, list[int]]] = {
    "samples": ("N", [10**4, 10**5, 10**6, 10**7, 10**8]),
    "classes": ("C", [10, 100, 1000, 8142]),
    "size": ("|R|", [10**2, 10**3, 10**4, 10**5]),
    "reward": ("q", [50, 100, 200, 400, 800]),
    "width": ("d", [64, 256, 1024, 4096]),
}
GROWTH = {f"{sign} = {n:,}": Setting(**{name: n}) for name, (sign, values) in FACTORS.items() for n in values}
PROCESSES = ("processes", [1, 2, 4])


class Run:
    """A wrapper in full operation: the table full, the dictionary full, the weights active."""

    def __init__(self, setting: Setting, now: Callable[[], float]) -> None:
        self.setting, s, self.now = setting, setting, now
        self.random = torch.Generator().manual_seed(0)  # the same in all processes
        share = torch.arange(1, s.classes + 1).double().pow(-s.zipf)
        self.counts = (share * s.samples / share.sum()).long()
        self.counts[: s.samples - int(self.counts.sum())] += 1
        self.bounds = self.counts.cumsum(0)
        sizes = {"dictionary_size": s.size, "reward_batch_size": s.reward}
        self.config = FSRConfig.preset(
            s.preset, **sizes, relabel_weight=s.relabel, relabel_storage=s.storage, warmup_epochs=1
        )
        torch.manual_seed(0)
        self.head = nn.Linear(s.width, s.classes)
        inner = torch.optim.SGD(self.head.parameters(), lr=0.1)
        lengths = {"num_samples": s.samples, "samples_per_epoch": sys.maxsize}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "dictionary_size=")  # |R| = N, to see how time grows
            self.fsr = FSRWrapper(self.head, inner, **lengths, config=self.config)
        self.step()  # makes the tables
        self.memory = self.fsr._memory
        for start in range(0, s.samples, CHUNK):
            index = torch.arange(start, min(start + CHUNK, s.samples))
            self.memory.table.update(index, torch.randn(len(index)), epoch=0)
        for _ in range(2):
            self.end()
            self.step()

    def label(self, index: Tensor) -> Tensor:
        """Samples are numbered class by class."""
        return torch.searchsorted(self.bounds, index, right=True)

    def step(self) -> dict[str, float]:
        """Seconds of what `loss()` costs, and of the head's own forward and backward."""
        index = torch.randint(self.setting.samples, (BATCH_SIZE,), generator=self.random)
        index = index[distributed.rank() :: distributed.world_size()].contiguous()
        x, y = torch.randn(len(index), self.setting.width), self.label(index)
        times = [self.now()]
        logits = self.head(x)
        times.append(self.now())
        loss = F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        times.append(self.now())
        torch.autograd.grad(loss, list(self.head.parameters()))
        times.append(self.now())
        distributed.barrier()
        start = self.now()
        self.fsr.loss(logits, y, index)
        return {"step": self.now() - start - (times[2] - times[1]), "head": times[3] - times[0]}

    def end(self) -> dict[str, float]:
        """Seconds of `end_epoch()`, after an epoch's candidates."""
        dictionary = self.fsr.dictionary
        first = torch.rand(len(self.counts), generator=self.random, dtype=torch.float64) * self.counts
        nth = (torch.arange(3 * dictionary.quota)[:, None] + first.long()) % self.counts
        index = (nth + self.bounds - self.counts).flatten()
        score, label = torch.randn(len(index), generator=self.random), self.label(index)
        self.memory.table.update(index, score, self.fsr.epoch)
        here = -(-len(index) // distributed.world_size())
        offset = distributed.rank() * here
        payload = torch.randn(1, self.setting.width).expand(len(index[offset : offset + here]), -1)
        dictionary.push(index, label, score, (payload,), offset=offset)
        distributed.barrier()
        start = self.now()
        self.fsr.end_epoch()
        return {"end": self.now() - start}

    def facts(self) -> dict[str, Any]:
        """The setting, and bytes: of the table with its spare row, of the dictionary with its payloads, of ŷ."""
        assert self.fsr.is_reweighting
        columns = [value for value in vars(self.memory.table).values() if isinstance(value, Tensor)]
        pseudo = self.memory.pseudo
        return {
            **asdict(self.setting),
            "slots": len(self.fsr.dictionary.slots),
            "members": len(self.fsr.dictionary),
            "table_bytes": sum(column.nbytes for column in columns),
            "dictionary_bytes": self.fsr.dictionary.nbytes,
            "pseudo_bytes": 0 if pseudo is None else sum(column.nbytes for column in pseudo.columns.values()),
            "seconds": {"step": [], "head": [], "end": []},
        }


def measure(
    settings: dict[str, Setting], rounds: int, ends: int, now: Callable[[], float] = time.thread_time
) -> Results:
    """Facts and seconds of each setting."""
    runs = {name: Run(setting, now) for name, setting in settings.items()}
    results = {name: run.facts() for name, run in runs.items()}
    for number in range(ends + rounds):
        for name in random.Random(number).sample(list(runs), len(runs)):
            if number < ends:
                runs[name].step()  # without one there is no epoch to end
            for kind, seconds in (runs[name].end() if number < ends else runs[name].step()).items():
                results[name]["seconds"][kind].append(round(seconds, 7))
    return results


def process(rank: int, world: int, setting: Setting, folder: str, rounds: int, ends: int) -> None:
    """A setting, in one of several processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(minutes=10))
    result = measure({"": setting}, rounds, ends, time.perf_counter)[""]
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def measure_processes(setting: Setting, world: int, rounds: int, ends: int) -> dict[str, Any]:
    """A setting in several processes, as the first of them sees it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (world, setting, folder, rounds, ends), nprocs=world)
        result: dict[str, Any] = json.loads(Path(folder, "0.json").read_text())
    return result


def quartiles(result: dict[str, Any], kind: str) -> list[float]:
    """In milliseconds."""
    return [1000 * value for value in statistics.quantiles(result["seconds"][kind], n=4)]


def table(sizes: Results, growth: Results) -> str:
    """Two Markdown tables."""

    def times(result: dict[str, Any]) -> str:
        (low, middle, high), mean = quartiles(result, "step"), 1000 * statistics.mean(result["seconds"]["step"])
        head, (_, end, late) = quartiles(result, "head")[1], quartiles(result, "end")
        return f"{middle:.1f} ({low:.1f} to {high:.1f}) | {mean:.1f} | {head:.1f} | {end:.1f} ({late:.1f}) |"

    columns = "step, ms (quartiles) | mean | head alone, ms | epoch's end, ms (upper quartile) |"
    lines = [f"| | table, bytes a sample | dictionary, MB | ŷ, GB | {columns}", "|---" * 8 + "|"]
    for name, r in sizes.items():
        pseudo = f"{r['pseudo_bytes'] / 1e9:.3f}" if r["relabel"] else ""
        space = f"{r['table_bytes'] / r['samples']:.2f} | {r['dictionary_bytes'] / 1e6:.0f} | {pseudo}"
        lines.append(f"| {name} | {space} | {times(r)}")
    lines += ["", f"| | {columns}", "|---" * 5 + "|", *(f"| {name} | {times(r)}" for name, r in growth.items())]
    return "\n".join(lines).replace("|R|", r"\|R\|")


def draw(results: Results, path: Path) -> None:
    """One panel a factor: the time of a step and of the epoch's end, medians and quartiles."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 3, figsize=(10, 5.6), sharey=True)
    for panel, (sign, values) in zip(panels.flat, [*FACTORS.values(), PROCESSES], strict=True):
        for kind, label, color in (("step", "a step", "#c8553d"), ("end", "the epoch's end", "#2a86b8")):
            low, middle, high = zip(*(quartiles(results[f"{sign} = {n:,}"], kind) for n in values), strict=True)
            panel.plot(values, middle, color=color, linewidth=2, marker="o", markersize=4, label=label)
            panel.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=sign)
        if sign in ("q", PROCESSES[0]):
            panel.set_xticks(values, [str(n) for n in values])
            panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3, linewidth=0.5)
    for row in panels:
        row[0].set_ylabel("ms")
    panels[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measures, or reads what was measured; prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=250, help="steps of each setting; of the large ones a quarter")
    parser.add_argument("--ends", type=int, default=9)
    parser.add_argument("--out", type=Path, help="read if it is there already")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    else:
        results = {"torch": torch.__version__, "batch_size": BATCH_SIZE}
        results["sizes"] = measure(SIZES, args.rounds // 4, args.ends)
        for world in (1, 2):
            large = measure_processes(INATURALIST, world, args.rounds // 4, args.ends)
            results["sizes"][f"iNaturalist 2018, {world} process{'es'[: 2 * world - 2]}, wall clock"] = large
        results["growth"] = measure(GROWTH, args.rounds, args.ends)
        for world in PROCESSES[1]:
            base = measure_processes(Setting(), world, args.rounds, args.ends)
            results["growth"][f"{PROCESSES[0]} = {world}"] = base
    if args.out:
        args.out.write_text(json.dumps(results))
    if args.plot:
        draw(results["growth"], args.plot)
    print(table(results["sizes"], results["growth"]))


if __name__ == "__main__":
    main()
