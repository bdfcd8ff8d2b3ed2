"""FSR beside plain training and ELR in settings that were drawn, not chosen: does it do harm, and what does it win?

    python examples/benchmarks/any_setting.py --out DIR --fashion DIR [--settings 20] [--first 210]
    python examples/benchmarks/any_setting.py --out docs/results/any_setting.json --table

A setting's number is the seed of all that is drawn: how many images of Fashion-MNIST and which, how many classes, a
long tail, which labels are wrong, the network, the optimizer with its learning rate and schedule, the batch size and
the number of epochs. All methods have the same images, initial weights and number of steps, and FSR its default.

Each run writes a JSON file of its own into `--out`; runs that are there already are not run again, and two processes
with the same command share the work. `--out` may be a packed file for what only reads.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cases import FASHION_CONFUSIONS, read_fashion
from common import long_tail_counts, positive
from compare import claim, load, run_or_show, write
from methods import METHODS, Task, make_method
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from fsr_wrap import FSRWrapper

NAMES = ("ce", "elr", "fsr")
NOISE = ("uniform", "pair", "look-alike", "one class", "half of the images")
MOST_VISITS = 400_000  # images times epochs

Data = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # images, given and right labels, test images and labels


@dataclass(frozen=True)
class Setting:
    """What was drawn. `rate` of the labels is drawn anew, so that somewhat fewer are wrong."""

    number: int
    images: int
    classes: int
    imbalance: int
    noise: str
    rate: float
    network: str
    optimizer: str
    lr: float
    weight_decay: float
    batch: int
    epochs: int


def draw(number: int) -> Setting:
    """The setting of this number."""
    pick = random.Random(number)
    images, classes = int(10 ** pick.uniform(2.7, 4.3)), pick.choice([2, 3, 10, 10, 10, 10])
    tail = pick.choice([1, 1, 1, 20, 100]) if classes == 10 and images > 3000 else 1
    noise = pick.choice(["none", "none", "none", *NOISE])
    optimizer = pick.choice(["one-cycle", "step", "constant", "AdamW, cosine", "Adam, constant"])
    adam = optimizer.startswith("Adam")
    return Setting(
        number,
        images,
        classes,
        tail,
        noise,
        0.0 if noise == "none" else pick.choice([0.1, 0.2, 0.3, 0.4]),
        pick.choice(["MLP", "wide", "deep", "dropout", "convolutions"]),
        optimizer,
        pick.choice([3e-4, 1e-3, 2e-3] if adam else [0.02, 0.05, 0.1]),
        0.05 if optimizer.startswith("AdamW") else pick.choice([0.0, 5e-4]),
        pick.choice([32, 64, 128, 256]),
        max(5, min(pick.choice([10, 20, 30, 40]), MOST_VISITS // images)),
    )


def make_given(setting: Setting, right: Tensor, alike: Tensor, generator: torch.Generator) -> Tensor:
    """The given labels. `alike` (n,): the class that looks like each right one, −1 where it is not in the setting."""
    count = setting.classes
    hit = torch.rand(len(right), generator=generator) < setting.rate
    anew = torch.randint(count, (len(right),), generator=generator)
    if setting.noise == "pair":
        anew = (right + 1) % count
    elif setting.noise == "look-alike":
        anew = torch.where(alike < 0, right, alike)
    elif setting.noise == "one class":
        hit &= right == 0
    elif setting.noise == "half of the images":
        hit &= torch.arange(len(right)) % 2 == 0
    return torch.where(hit, anew, right)


def make_data(setting: Setting, folder: Path | None) -> Data:
    """The images of the setting, standardised, and the whole test set of its classes."""
    images, labels, test_images, test_labels = read_fashion(folder)
    generator = torch.Generator().manual_seed(setting.number)
    classes = torch.randperm(10, generator=generator)[: setting.classes]
    place = torch.full((10,), -1).index_copy(0, classes, torch.arange(setting.classes))
    order = torch.randperm(len(labels), generator=generator)
    order = order[place[labels[order]] >= 0][: setting.images]
    right = place[labels[order]]
    counts = long_tail_counts(int(torch.bincount(right).max()), setting.classes, setting.imbalance)
    rows = torch.cat([(right == c).nonzero()[:count, 0] for c, count in enumerate(counts)])
    order, right = order[rows], right[rows]
    alike = place[torch.tensor(FASHION_CONFUSIONS)[labels[order]]]
    given = make_given(setting, right, alike, generator)
    test = place[test_labels] >= 0
    own = images[order]
    mean, std = own.mean(), own.std()
    return (own - mean) / std, given, right, (test_images[test] - mean) / std, place[test_labels[test]]


def make_body(kind: str) -> tuple[list[nn.Module], int]:
    """All layers but the last one, and the width of what they give."""
    if kind == "MLP":
        return [m for n in (784, 256, 256) for m in (nn.Linear(n, 256), nn.BatchNorm1d(256), nn.ReLU())], 256
    if kind == "deep":
        return [m for n in (784, *[128] * 4) for m in (nn.Linear(n, 128), nn.LayerNorm(128), nn.GELU())], 128
    if kind == "dropout":
        return [m for n in (784, 512) for m in (nn.Linear(n, 512), nn.ReLU(), nn.Dropout(0.3))], 512
    if kind == "convolutions":
        widths = ((1, 16), (16, 32), (32, 64))
        layers = [m for n, wider in widths for m in (nn.Conv2d(n, wider, 3, 2, 1), nn.ReLU())]
        return [nn.Unflatten(1, (1, 28, 28)), *layers, nn.Flatten()], 1024
    return [nn.Linear(784, 1024), nn.ReLU()], 1024


class Network(nn.Module):
    """A body and a linear head."""

    def __init__(self, kind: str, num_classes: int) -> None:
        super().__init__()
        layers, width = make_body(kind)
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def make_recipe(setting: Setting, parameters: Iterable[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
    """The optimizer, and a schedule of so many steps."""
    parameters, kind, more = list(parameters), setting.optimizer, {"weight_decay": setting.weight_decay}
    if kind == "Adam, constant":
        adam = Adam(parameters, setting.lr, **more)
        return adam, LambdaLR(adam, lambda _: 1.0)
    if kind == "AdamW, cosine":
        adamw = AdamW(parameters, setting.lr, **more)
        return adamw, CosineAnnealingLR(adamw, steps)
    sgd = SGD(parameters, setting.lr, momentum=0.9, **more)
    if kind == "one-cycle":
        return sgd, OneCycleLR(sgd, setting.lr, total_steps=steps)
    milestones = [steps // 2, 3 * steps // 4] if kind == "step" else []
    return sgd, MultiStepLR(sgd, milestones)


def train(name: str, setting: Setting, data: Data) -> dict[str, Any]:
    """One run from scratch: test accuracy by epoch, and of FSR when it began to judge labels, None if it never did.

    Where training diverges, as some of these settings make it do, accuracy is that of guessing from then on.
    """
    torch.manual_seed(setting.number)
    images, given, _, test_images, test_labels = data
    model, steps = Network(setting.network, setting.classes), max(1, len(given) // setting.batch)
    task = Task(
        model=model,
        labels=given,
        num_classes=setting.classes,
        epochs=setting.epochs,
        batch_size=setting.batch,
        inputs=lambda index: images[index],
        augmented=lambda index: images[index],
        make_model=lambda: Network(setting.network, setting.classes),
        recipe=lambda parameters, total: make_recipe(setting, parameters, total),
        seed=setting.number,
    )
    method = make_method(name, task)
    optimizer, schedule = task.recipe([*model.parameters(), *method.parameters()], setting.epochs * steps)
    optimizer = method.attach(optimizer)
    method.prepare()
    curve: list[float] = []
    judged = None
    for epoch in range(setting.epochs):
        method.start_epoch(epoch)
        try:
            for index in torch.randperm(len(given)).tensor_split(steps):
                method.loss(model, images[index], given[index], index).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        except ValueError as error:  # FSR says so, plain training goes on with NaN
            if "NaN or infinite" not in str(error):
                raise
            curve += [1 / setting.classes] * (setting.epochs - epoch)
            break
        method.end_epoch(epoch)
        if judged is None and isinstance(optimizer, FSRWrapper) and optimizer.is_reweighting:
            judged = epoch + 1
        model.eval()
        with torch.no_grad():
            curve.append((method.predict(model, test_images).argmax(1) == test_labels).float().mean().item())
        model.train()
    return {"last": curve[-1], "best": max(curve), "curve": curve, "judged": judged}


def run_all(args: argparse.Namespace) -> None:
    """All runs that are not there."""
    args.out.mkdir(parents=True, exist_ok=True)
    for setting in map(draw, range(args.first, args.first + args.settings)):
        path = args.out / f"{setting.number}.json"
        with claim(path) as mine:
            if not mine:
                continue
            data = make_data(setting, args.fashion)
            runs = {name: train(name, setting, data) for name in NAMES}
            wrong = (data[1] != data[2]).float().mean().item()
            write(path, {**asdict(setting), "images": len(data[1]), "wrong": wrong, "runs": runs})
            print(setting, {name: round(run["last"], 4) for name, run in runs.items()}, flush=True)


def gain(run: dict[str, Any], name: str = "fsr") -> float:
    """On plain training, in points."""
    return 100 * (run["runs"][name]["last"] - run["runs"]["ce"]["last"])


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown tables: the mean gains, their standard errors and the worst; and the settings where FSR lost most."""
    kinds = {"right labels": lambda run: not run["wrong"], "wrong labels": lambda run: run["wrong"] > 0}
    lines = ["| | settings | method | mean gain | worst | more than a point below |", "|---" * 6 + "|"]
    for kind, belongs in kinds.items():
        for name in NAMES[1:]:
            gains = [gain(run, name) for run in runs if belongs(run)]
            if not gains:
                continue
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
            cells = [kind, len(gains), METHODS[name].title, f"{statistics.mean(gains):+.1f} ± {error:.1f}"]
            cells += [f"{min(gains):+.1f}", sum(one < -1 for one in gains)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    heads = ["FSR − plain", "FSR − ELR", "images", "classes", "imbalance", "wrong"]
    heads += ["network", "optimizer", "batch", "epochs"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for run in sorted(runs, key=gain):
        noise = f"{run['wrong']:.0%}" + (f", {run['noise']}" if run["wrong"] else "")
        gains = f"{gain(run):+.1f}", f"{gain(run) - gain(run, 'elr'):+.1f}"
        size = f"{run['images']:,}", run["classes"], run["imbalance"], noise
        recipe = run["network"], f"{run['optimizer']}, {run['lr']:g}", run["batch"], run["epochs"]
        lines.append("| " + " | ".join(map(str, (*gains, *size, *recipe))) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, or shows what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, a JSON file each")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's four IDX files; default: the hub")
    parser.add_argument("--settings", type=positive, default=20, help="how many")
    parser.add_argument("--first", type=int, default=210, help="the first one's number; FSR was mended by some below")
    parser.add_argument("--table", action="store_true", help="print what came out")
    parser.add_argument("--pack", type=Path, help="write all runs into one JSON file")
    args = parser.parse_args()
    run_or_show(args, run_all, lambda _: sorted(load(args.out), key=lambda run: run["number"]), table)


if __name__ == "__main__":
    main()
