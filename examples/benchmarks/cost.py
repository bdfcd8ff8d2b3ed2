"""What a step costs, in time and memory: plain SGD, FSR with cached and with fresh reward data, with MixUp and with the
whole model as Θ^meta, and L2R by two libraries of differentiable optimizers (see `peers.py`; without the extra `bench`
their rows are left out), side by side.

    pip install "fsr_wrap[bench]"
    python examples/benchmarks/cost.py --out docs/results/cost.json --plot docs/results/cost.svg

b = 100, q = 200, |R| = 2000, random images: neither time nor memory depends on what is in them. At 32×32 there are ten
classes. On CUDA the large networks (wrn28_10 at 32×32; resnet50 and vit_base_patch16_224 at 224×224, 1000 classes) run
too, all in bfloat16 autocast, and all networks everywhere in channels_last.

- *Time.* The variants take turns, step by step in one process and in an order that changes every round, each with a
  model and an optimizer of its own on the same batches; FSR's have an epoch behind them and re-weight by the paper's
  rule. Reported are the median time of a step and the median of the ratios to the plain step of the same round, with
  the quartiles.
- *Memory.* The peak of ten steps in a fresh process for each variant: of the resident set on a CPU, of
  `torch.cuda.max_memory_allocated` on CUDA. Most of the former is PyTorch itself; so there is also the ratio of what
  exceeds a process that imports the same and builds the data.
- *Operations.* How many of them PyTorch runs in a forward and backward more than plain training, apart from views.
- *Split.* Where FSR's time goes, of other steps than those above: functions of the package are replaced by timed ones
  for one more epoch (fewer steps if there are fewer rounds), which themselves take time. Means; a function's time is
  without the timed ones that it calls. *yours* is the user's forward, backward and step, *extra forward* that of the
  reward or, under MixUp, the clean images, *meta* the look-ahead, the scores and the weights (with the whole model as
  Θ^meta its reward forward, backward and jvp), *rest* are checks, metrics, the loss itself and Python.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import platform
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import pyplot
from networks import make_network
from peers import PEERS

from fsr_wrap import FSRConfig, FSRWrapper, RewardDictionary, heads, pushers, relabel, replay, rules, step

SAMPLES, BATCH_SIZE, REWARD_SIZE, LR = 4000, 100, 200, 0.01
EPOCH = SAMPLES // BATCH_SIZE
START = EPOCH + 3  # the first batch that counts: the first steps that re-weight are slower
LARGE = ("resnet50", "vit_base_patch16_224")  # at 224×224
FSR: dict[str, dict[str, Any]] = {
    "FSR": {},  # the default; all others are the paper's
    "FSR cached": {},
    "FSR fresh": {"reward": "fresh"},
    "FSR cached + MixUp": {"pusher": "authors_margin"},
    "FSR full model": {"head": "all", "lookahead_lr": 0.0},  # L2R's meta-gradient
    "FSR full model, G every 5 steps": {"head": "all", "lookahead_lr": 0.0, "reward_every": 5},
}
FLOOR, BOTH = "plain + no-grad forward of q", "plain on b + q images"
VARIANTS = ("plain", *list(FSR)[:3], FLOOR, *list(FSR)[3:], *PEERS, BOTH)
PARTS = {
    "extra forward": ((replay.Replay, "_run"),),
    "meta": (
        (step.Reweighting, "_look_ahead"),
        (rules, "normalize"),
        *((kind, name) for kind in (heads.KernelStep, heads.GradientStep) for name in ("logits", "scores")),
        *((heads.GradientStep, name) for name in ("reward_gradient", "scores_along")),
    ),
    "dictionary": tuple((RewardDictionary, name) for name in ("push", "plan", "payload", "update")),
    "scores": (
        *((pushers.ScoreTable, name) for name in ("is_new", "update")),
        *((kind, "__call__") for kind in pushers.PUSHERS.values()),
    ),
    "re-labelling": tuple((relabel.PseudoLabels, name) for name in ("stored", "update", "average")),
    "rest": ((FSRWrapper, "loss"), (FSRWrapper, "mixup")),
}


# --- a variant -------------------------------------------------------------------------------------------------------


def make_model(name: str) -> nn.Module:
    """`mlp` (3072-256-256-256-10), a network of the examples, or timm's; a small ViT in patches of 4×4."""
    if name == "mlp":
        layers: list[nn.Module] = [nn.Flatten()]
        for width in (3072, 256, 256):
            layers += [nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(256, 10))
    if "vit" in name and name not in LARGE:
        import timm

        return timm.create_model(name, num_classes=10, img_size=32, patch_size=4)
    return make_network(name, 1000 if name in LARGE else 10).to(memory_format=torch.channels_last)


class Data:
    """Random images and labels: N samples that share b + q images."""

    def __init__(self, network: str, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        size, classes = (224, 1000) if network in LARGE else (32, 10)
        images = torch.randn(BATCH_SIZE + REWARD_SIZE, 3, size, size, generator=generator).to(device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(classes, (SAMPLES,), generator=generator).to(device)
        self.reward = self.images[:REWARD_SIZE], self.labels[:REWARD_SIZE]
        self.both = self.images, self.labels[: len(self.images)]

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and indices of a step's batch."""
        start = number % EPOCH * BATCH_SIZE
        index = torch.arange(start, start + BATCH_SIZE)
        return self.images[index % len(self.images)], self.labels[index], index


class Run:
    """A variant's training: model, optimizer and step. FSR re-weights from the first epoch that can be."""

    def __init__(self, variant: str, network: str, data: Data):
        torch.manual_seed(0)
        self.variant, self.data = variant, data
        self.model = make_model(network).to(data.images.device)
        self.inner = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9)
        self.fsr: FSRWrapper | None = None
        if variant in FSR:
            paper = FSRConfig.preset("cifar_noise", warmup_epochs=1, reward_batch_size=REWARD_SIZE)
            config = FSRConfig() if variant == "FSR" else paper
            self.fsr = FSRWrapper(self.model, self.inner, num_samples=SAMPLES, config=config, **FSR[variant])

    def judge(self) -> None:
        """The default judges labels from here on, the dearer half of its training, as if it had seen noise enough."""
        selection = self.fsr._memory.selection if self.fsr else None
        if selection is not None:
            selection.active, selection.estimated = True, True
            selection.share.fill_(0.2)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> None:
        """One step."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            loss = self._loss(x, y, index)
        loss.backward()
        self.inner.step()
        self.inner.zero_grad()

    def _loss(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if self.fsr is not None:
            x, target = self.fsr.mixup(x, y) if "MixUp" in self.variant else (x, y)
            return self.fsr.loss(self.model(x), target, index)
        if self.variant in PEERS:
            losses, weights = PEERS[self.variant](self.model, LR, x, y, *self.data.reward)
            return (weights * losses).sum()
        if self.variant == FLOOR:
            with torch.no_grad():
                self.model(self.data.reward[0])
        if self.variant == BOTH:
            x, y = self.data.both
        return F.cross_entropy(self.model(x), y)


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(network: str, variants: list[str], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each step, peak bytes, and mean seconds a step of each part, all by variant."""
    peak = {name or "nothing": peak_bytes(name, network, device) for name in ("", *variants)}
    data = Data(network, device)
    runs = {name: Run(name, network, data) for name in variants}
    for run in runs.values():
        for number in range(0 if run.fsr else START - 5, START):
            run.step(*data.batch(number))
            if number == 0:
                run.judge()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        batch = data.batch(START + number)
        for name in random.Random(number).sample(variants, len(variants)):
            synchronize(device)
            start, steps = time.perf_counter(), FSR.get(name, {}).get("reward_every", 1)  # which differ: timed together
            for _ in range(steps):
                runs[name].step(*batch)
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / steps)
    parts = {name: split(run, rounds) for name, run in runs.items() if run.fsr}
    numbers = {name: operations(run, data.batch(START + rounds)) for name, run in runs.items()}
    return {"seconds": seconds, "peak": peak, "split": parts, "operations": numbers}


class Counter(TorchDispatchMode):
    """Counts what PyTorch runs, apart from views and from reading a number: on CUDA about a kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        self.number += not (is_view or "_local_scalar_dense" in str(func) or "lift_fresh" in str(func))
        return func(*args, **(kwargs or {}))


def operations(run: Run, batch: tuple[Tensor, Tensor, Tensor]) -> int:
    """Operations of one step without the optimizer's, forward and backward."""
    with Counter() as counter, torch.autocast(batch[0].device.type, torch.bfloat16, enabled=batch[0].is_cuda):
        loss = run._loss(*batch)
        loss.backward()
    run.inner.zero_grad()
    return counter.number


def synchronize(device: torch.device) -> None:
    """Waits for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(variant: str, network: str, device: torch.device) -> int:
    """Peak memory of ten steps of the variant, or of none if it is empty, in a fresh process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_here, variant, network, device, torch.get_num_threads()).result()


def _peak_here(variant: str, network: str, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    data = Data(network, device)
    if variant:
        run = Run(variant, network, data)
        for number in range(10):
            run.step(*data.batch(number))
            if number == 1 and run.fsr is not None:
                run.judge()
                run.fsr.end_epoch()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage(): its peak survives exec, so a process starts with that of its parent.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Stopwatch:
    """Seconds by part. The clock of a part stands while another that it calls runs."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._stack, self._since = device, ["yours"], time.perf_counter()

    def charge(self) -> None:
        """Books the time since the last call on the part that runs."""
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time booked on the part."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self._stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self._stack.pop()

        return wrapped


def split(run: Run, rounds: int) -> dict[str, float]:
    """Mean seconds a step of each part, over one epoch at most."""
    batches = [run.data.batch(START + rounds + number) for number in range(min(rounds, EPOCH))]
    with ExitStack() as patches:
        watch = Stopwatch(run.data.images.device)
        for part, functions in PARTS.items():
            for owner, name in functions:
                timed = watch.timed(part, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, timed))
        for batch in batches:
            run.step(*batch)
        watch.charge()
    return {part: watch.seconds[part] / len(batches) for part in ("yours", *PARTS)}


# --- what is shown ---------------------------------------------------------------------------------------------------


def ratios(seconds: dict[str, list[float]], variant: str) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios to the plain step of the same round."""
    pairs = zip(seconds[variant], seconds["plain"], strict=True)
    return statistics.quantiles([mine / plain for mine, plain in pairs], n=4)


def memory_ratios(peak: dict[str, int], variant: str) -> tuple[float, float]:
    """Of the peaks, and of what they exceed a process by that does nothing."""
    nothing, plain = peak["nothing"], peak["plain"]
    return peak[variant] / plain, (peak[variant] - nothing) / (plain - nothing)


def tables(networks: dict[str, dict[str, Any]]) -> str:
    """Two Markdown tables."""
    lines = [
        "| network | variant | ms a step | ratio to plain (quartiles) | ms more | operations more | peak MB | ratio | "
        "ratio above imports |",
        "|---" * 9 + "|",
    ]
    for network, result in networks.items():
        for name, seconds in result["seconds"].items():
            low, middle, high = ratios(result["seconds"], name)
            time_cells = f"{1000 * statistics.median(seconds):.1f} | {middle:.3f} ({low:.3f} to {high:.3f})"
            more = [mine - plain for mine, plain in zip(seconds, result["seconds"]["plain"], strict=True)]
            count = result["operations"][name] - result["operations"]["plain"]
            time_cells += f" | {1000 * statistics.median(more):.2f} | {count}"
            whole, above = memory_ratios(result["peak"], name)
            memory_cells = f"{result['peak'][name] / 1e6:.0f} | {whole:.2f} | {above:.2f}"
            lines.append(f"| {network} | {name} | {time_cells} | {memory_cells} |")
    parts = ("yours", *PARTS)
    lines += ["", f"| network | ms a step of | {' | '.join(parts)} |", "|---" * (2 + len(parts)) + "|"]
    for network, result in networks.items():
        for name, split in result["split"].items():
            cells = [f"{1000 * split[part]:.2f}" for part in parts]
            lines.append(f"| {network} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(networks: dict[str, dict[str, Any]], path: Path) -> None:
    """A row of panels a network: ratios to plain of time, with quartiles, and of memory above imports."""
    plt = pyplot()
    colors = {"plain": "#8a8a8a", "FSR": "#2a86b8", "L2R": "#c8553d"}
    rows = [len(result["seconds"]) for result in networks.values()]
    size = (10, 0.28 * sum(rows) + 0.8 * len(rows))
    figure, panels = plt.subplots(len(networks), 2, figsize=size, squeeze=False, sharey="row", height_ratios=rows)
    for (left, right), (network, result) in zip(panels, networks.items(), strict=True):
        names = list(result["seconds"])
        places = [-number for number in range(len(names))]
        shades = [colors[name.split()[0]] for name in names]
        times = [ratios(result["seconds"], name) for name in names]
        errors = [[m - low for low, m, _ in times], [high - m for _, m, high in times]]
        memory = [memory_ratios(result["peak"], name)[1] for name in names]
        left.barh(places, [middle for _, middle, _ in times], xerr=errors, color=shades)
        right.barh(places, memory, color=shades)
        left.set(yticks=places, yticklabels=names)
        left.set_title(f"{network}: time of a step, plain = 1", fontsize=10)
        right.set_title("peak memory above imports, plain = 1", fontsize=10)
        for panel, middles in ((left, [middle for _, middle, _ in times]), (right, memory)):
            panel.spines[["top", "right"]].set_visible(False)
            panel.axvline(1, color="#8a8a8a", linewidth=0.8)
            panel.set_xlim(0, 1.15 * max(panel.get_xlim()[1], 1))
            for place, middle in zip(places, middles, strict=True):
                panel.annotate(f"{middle:.2f}", (panel.get_xlim()[1], place), ha="right", va="center", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measures every network, prints the tables, writes the JSON and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", help="also names of timm; the default depends on the device")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON; networks that are in it already are not run again")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpu
    variants = [name for name in VARIANTS if name == "plain" or name in args.variants]
    small = ["mlp", "resnet20", "resnet32", "test_vit"]
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "networks": {}}
    results["device"] = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    for network in args.networks or [*small, *(["wrn28_10", *LARGE] if on_gpu else [])]:
        if network in results["networks"]:
            continue
        results["networks"][network] = measure(network, variants, args.rounds, device)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    shown = {name: result for name, result in results["networks"].items() if name in (args.networks or [name])}
    print(tables(shown))
    if args.plot:
        plot(shown, args.plot)


if __name__ == "__main__":
    main()
