"""What FSR costs as things grow: bytes a sample, time of a step and of the epoch's end, without images.

    OMP_NUM_THREADS=1 python examples/benchmarks/scale.py --out docs/results/scale.json --plot docs/results/scale.svg

The model is its head alone, a linear layer on random features of a batch of 100. `loss()` and `end_epoch()` are FSR's
own, with the weights active. Simulated is how an epoch comes about: the score table has all N rows, each visited once,
but with random scores, given to `ScoreTable.update` a million at a time; before each `end_epoch()` three times the
dictionary's quota of each class (what repeats counts once), again with random scores, goes to `ScoreTable.update` and
`RewardDictionary.push`, so that all C·k members, the best of the epoch and old members compete. Labels follow
iNaturalist's long tail as a Zipf law where that is said, else all classes have equally many.

A step's cost is the time of `loss()` minus that of the cross-entropy that it replaces; neither includes the backward
pass. The median leaves out the steps that sort the buffer of candidates, one in (its length / 100); the mean is over
whole such cycles. Settings take turns, step by step, in an order that changes every round. In the rows of several
processes, on gloo, each has its share of the batch of 100, and a core has more than one process if there are too few.
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
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from fsr_wrap import FSRConfig, FSRWrapper, distributed

BATCH_SIZE, CHUNK, GIB = 100, 2**20, 2**30


@dataclass(frozen=True)
class Setting:
    """N, C, |R|, q, d; the exponent of the classes' sizes; the preset that gives the rest, and p."""

    samples: int = 100_000
    classes: int = 100
    size: int = 1000
    reward: int = 100
    width: int = 256
    zipf: float = 0.0
    preset: str = "cifar_noise"
    relabel: float = 0.0


INATURALIST = Setting(437_513, 8142, 2000, 350, 2048, 1.0, "inat2018")
SIZES = {
    "iNaturalist 2018": INATURALIST,
    "iNaturalist 2018, re-labelling": replace(INATURALIST, relabel=1.0),
    "N = 10⁸": Setting(10**8, 1000, 5000, 200, 2048, 0.0, "webvision"),
}
FACTORS: dict[str, tuple[str, list[int]]] = {
    "samples": ("N", [10**4, 10**5, 10**6, 10**7, 10**8]),
    "classes": ("C", [10, 100, 1000, 8142]),
    "size": ("|R|", [10**2, 10**3, 10**4, 10**5]),
    "reward": ("q", [50, 100, 200, 400, 800]),
    "width": ("d", [64, 256, 1024, 4096]),
}
GROWTH = {f"{sign} = {n}": Setting(**{name: n}) for name, (sign, values) in FACTORS.items() for n in values}
PROCESSES = ("processes", [1, 2, 4])


class Run:
    """A wrapper in full operation: the table full, the dictionary full, the weights active."""

    def __init__(self, setting: Setting) -> None:
        self.setting, s = setting, setting
        self.random = torch.Generator().manual_seed(0)  # the same in all processes
        share = torch.arange(1.0, s.classes + 1, dtype=torch.float64).pow(-s.zipf)
        self.counts = (share * s.samples / share.sum()).long()
        self.counts[: s.samples - int(self.counts.sum())] += 1
        self.bounds = self.counts.cumsum(0)
        self.config = FSRConfig.preset(
            s.preset, dictionary_size=s.size, reward_batch_size=s.reward, relabel_weight=s.relabel, warmup_epochs=1
        )
        torch.manual_seed(0)
        self.head = nn.Linear(s.width, s.classes)
        inner = torch.optim.SGD(self.head.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "dictionary_size=")  # |R| = N, to see how time grows
            self.fsr = FSRWrapper(
                self.head, inner, num_samples=s.samples, samples_per_epoch=sys.maxsize, config=self.config
            )
        self.step()
        for start in range(0, s.samples, CHUNK):
            index = torch.arange(start, min(start + CHUNK, s.samples))
            self.table.update(index, torch.randn(len(index)), self.label(index), epoch=0)
        for _ in range(2):
            self.end()
            self.step()
        assert self.fsr.is_reweighting and self.fsr.epoch == 2

    @property
    def table(self) -> Any:
        return self.fsr._memory.table

    def label(self, index: Tensor) -> Tensor:
        """Samples are numbered class by class."""
        return torch.searchsorted(self.bounds, index, right=True)

    def step(self) -> dict[str, float]:
        """Seconds of what `loss()` costs, and of the head's own forward and backward."""
        index = torch.randint(self.setting.samples, (BATCH_SIZE,), generator=self.random)
        index = index[distributed.rank() :: distributed.world_size()]
        x, y = torch.randn(len(index), self.setting.width), self.label(index)
        times = [time.perf_counter()]
        logits = self.head(x)
        times.append(time.perf_counter())
        plain = F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        times.append(time.perf_counter())
        torch.autograd.grad(plain, list(self.head.parameters()))
        times.append(time.perf_counter())
        distributed.barrier()
        start = time.perf_counter()
        self.fsr.loss(logits, y, index)
        loss = time.perf_counter() - start
        return {"step": loss - (times[2] - times[1]), "head": times[3] - times[0]}

    def end(self) -> dict[str, float]:
        """Seconds of `end_epoch()`, after an epoch's candidates."""
        quota = self.fsr.dictionary.quota
        shift = torch.rand(len(self.counts), generator=self.random, dtype=torch.float64) * self.counts
        nth = (torch.arange(3 * quota)[:, None] + shift.long()) % self.counts
        index = (nth + self.bounds - self.counts).flatten()
        score, label = torch.randn(len(index), generator=self.random), self.label(index)
        self.table.update(index, score, label, self.fsr.epoch)
        here = -(-len(index) // distributed.world_size())
        offset = distributed.rank() * here
        payload = torch.randn(1, self.setting.width).expand(len(index[offset : offset + here]), -1)
        self.fsr.dictionary.push(index, label, score, (payload,), offset=offset)
        distributed.barrier()
        start = time.perf_counter()
        self.fsr.end_epoch()
        return {"end": time.perf_counter() - start}

    def facts(self) -> dict[str, Any]:
        """The setting, and bytes: of the table with its spare row, of the dictionary with its payloads, of ŷ."""
        memory, s = self.fsr._memory, self.setting
        columns = [value for value in vars(memory.table).values() if isinstance(value, Tensor)]
        return {
            **asdict(s),
            "table_bytes": sum(column.nbytes for column in columns),
            "dictionary_bytes": memory.dictionary.nbytes,
            "members": len(memory.dictionary),
            "slots": s.classes * memory.dictionary.quota,
            "pseudo_bytes": 2 * (s.samples + 1) * s.classes,
            "pseudo_allocated": None if memory.pseudo is None else memory.pseudo.logits.nbytes,
        }


def measure(settings: dict[str, Setting], rounds: int, ends: int) -> dict[str, dict[str, Any]]:
    """Facts and seconds of each setting."""
    runs, results = {}, {}
    for name, setting in settings.items():
        if setting.relabel and 2 * setting.samples * setting.classes > 8 * GIB:
            continue
        runs[name] = Run(setting)
        cycle = max(1, max(128, setting.classes * runs[name].fsr.dictionary.quota // 4) // BATCH_SIZE)
        results[name] = {**runs[name].facts(), "steps": -(-rounds // cycle) * cycle, "seconds": {}}
    for number in range(max(result["steps"] for result in results.values()) + ends):
        for name in random.Random(number).sample(list(runs), len(runs)):
            if number < ends:
                seconds = runs[name].end()
                runs[name].step()  # an epoch has one step at least
            elif number < ends + results[name]["steps"]:
                seconds = runs[name].step()
            else:
                continue
            for kind, value in seconds.items():
                results[name]["seconds"].setdefault(kind, []).append(value)
    return results


def process(rank: int, world: int, folder: str, rounds: int, ends: int) -> None:
    """The base setting, in one of several processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(minutes=10))
    result = measure({"base": Setting()}, rounds, ends)["base"]
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def measure_processes(rounds: int, ends: int) -> dict[str, dict[str, Any]]:
    """The base setting in 1, 2, 4 processes."""
    results = {}
    for world in PROCESSES[1]:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, (world, folder, rounds, ends), nprocs=world)
            results[f"{PROCESSES[0]} = {world}"] = json.loads(Path(folder, "result.json").read_text())
    return results


def spread(result: dict[str, Any], kind: str) -> tuple[float, float, float]:
    """Quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(result["seconds"][kind], n=4)
    return 1000 * low, 1000 * middle, 1000 * high


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Two Markdown tables: the sizes, and the growth."""
    times = "step, ms (quartiles) | mean | head alone | epoch's end, ms |"
    lines = [f"| | table, bytes a sample | dictionary, MB | ŷ, GB | {times}", "|---" * 8 + "|"]

    def seconds(result: dict[str, Any]) -> str:
        low, middle, high = spread(result, "step")
        mean = 1000 * statistics.mean(result["seconds"]["step"])
        head, end = spread(result, "head")[1], spread(result, "end")[1]
        return f"{middle:.2f} ({low:.2f} to {high:.2f}) | {mean:.2f} | {head:.2f} | {end:.1f} |"

    for name, r in results["sizes"].items():
        a_sample, pseudo = r["table_bytes"] / r["samples"], r["pseudo_bytes"] / 1e9
        held = f"{pseudo:.1f}" if r["pseudo_allocated"] else f"({pseudo:.1f})"
        lines.append(f"| {name} | {a_sample:.2f} | {r['dictionary_bytes'] / 1e6:.0f} | {held} | {seconds(r)}")
    lines += ["", f"| | {times}", "|---" * 5 + "|"]
    lines += [f"| {name} | {seconds(r)}" for name, r in {**results["growth"], **results["processes"]}.items()]
    return "\n".join(lines)


def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """One panel a factor: the time of a step and of the epoch's end, medians and quartiles."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(10, 5.6), sharey=True)
    both = {**results["growth"], **results["processes"]}
    for panel, (sign, values) in zip(panels.flat, [*FACTORS.values(), PROCESSES], strict=True):
        for kind, label, color in (("step", "a step", "#b2484a"), ("end", "the epoch's end", "#2a6f97")):
            low, middle, high = zip(*(spread(both[f"{sign} = {n}"], kind) for n in values), strict=True)
            panel.plot(values, middle, color=color, marker="o", markersize=3.5, label=label)
            panel.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=sign)
        if sign == PROCESSES[0]:
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
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--ends", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())["results"]
    else:
        results = {"sizes": measure(SIZES, args.rounds // 2, args.ends)}
        results["growth"] = measure(GROWTH, args.rounds, args.ends)
        results["processes"] = measure_processes(args.rounds, args.ends)
    if args.out:
        meta = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": args.rounds}
        args.out.write_text(json.dumps({**meta, "results": results}, indent=1))
    if args.plot:
        draw(results, args.plot)
    print(table(results))


if __name__ == "__main__":
    main()
