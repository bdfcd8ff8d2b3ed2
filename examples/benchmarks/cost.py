"""What a step costs: plain SGD, FSR with cached and with fresh reward data, and with MixUp, side by side.

    python examples/benchmarks/cost.py --out cost.json

The variants take turns, step by step in one process and in an order that changes every round, each with a model and an
optimizer of its own on the same batches. Reported are the median time of a step and the median of the ratios to the
plain step of the same round, with the quartiles. b = 100, q = 200, |R| = 2000, ten classes, random images: time does
not depend on what is in them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from networks import make_network

from fsr_wrap import FSRWrapper

SAMPLES, BATCH_SIZE = 4000, 100
Step = Callable[[Tensor, Tensor, Tensor], None]
VARIANTS = {
    "plain": None,
    "FSR cached": {},
    "FSR fresh": {"reward": "fresh"},
    "FSR cached + MixUp": {"pusher": "authors_margin"},
    "plain + no-grad forward of q": None,
}


def make_model(name: str) -> nn.Module:
    """`mlp` (784-256-256-256-10), or a network of the examples."""
    if name != "mlp":
        return make_network(name, 10).to(memory_format=torch.channels_last)
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (3072, 256, 256):
        layers += [nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def make_step(variant: str, network: str, device: torch.device, reward: Tensor) -> Step:
    """A training step of the variant, re-weighting from the first epoch that can be."""
    torch.manual_seed(0)
    model = make_model(network).to(device)
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = VARIANTS[variant]
    fsr = None
    if options is not None:
        fsr = FSRWrapper(model, inner, num_samples=SAMPLES, warmup_epochs=1, **options)

    def step(x: Tensor, y: Tensor, index: Tensor) -> None:
        if "forward" in variant:
            with torch.no_grad():
                model(reward)
        target = y
        if "MixUp" in variant:
            x, target = fsr.mixup(x, y)
        loss = F.cross_entropy(model(x), y) if fsr is None else fsr.loss(model(x), target, index)
        loss.backward()
        inner.step()
        inner.zero_grad()

    return step


def measure(network: str, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, by variant; the first two epochs of every variant are not counted."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, 32, 32, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (SAMPLES,), generator=generator).to(device)
    steps = {name: make_step(name, network, device, images[:200]) for name in VARIANTS}
    batches = torch.arange(SAMPLES).split(BATCH_SIZE)
    short = len(batches) if network != "mlp" else 2 * len(batches)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(short + rounds):
        index = batches[number % len(batches)]
        x, y = images[index], labels[index]
        order = list(VARIANTS)
        random.Random(number).shuffle(order)
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            steps[name](x, y, index)
            synchronize(device)
            if number >= short:
                times[name].append(time.perf_counter() - start)
    return times


def synchronize(device: torch.device) -> None:
    """Waits for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table."""
    lines = ["| network | variant | ms a step | ratio to plain (quartiles) |", "|---|---|---|---|"]
    for network, times in results.items():
        for name, seconds in times.items():
            ratios = [mine / plain for mine, plain in zip(seconds, times["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            median = 1000 * statistics.median(seconds)
            lines.append(f"| {network} | {name} | {median:.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(lines)


def main() -> None:
    """Measures every network and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "mlp"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    results = {name: measure(name, args.rounds, device) for name in args.networks}
    if args.out:
        meta = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type}
        args.out.write_text(json.dumps({**meta, "rounds": args.rounds, "seconds": results}, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
