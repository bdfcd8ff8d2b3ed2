"""Uniform label noise on Fashion-MNIST: the one-minute experiment, method by method.

The first 20,000 images of a fixed permutation, labels redrawn uniformly from all ten classes with probability
`--noise`; an MLP (784-256-256-256-10, BatchNorm, ReLU), SGD 0.05, momentum 0.9, weight decay 5e-4, one-cycle, b = 100,
30 epochs, no augmentation. Plain training memorises the noise here. Reported is the test accuracy at the *last* epoch.

    python examples/benchmarks/noisy_fashion_mnist.py --data-dir DIR --out fashion.json

`--pushers` makes Figure 5 (right) of the paper: all pushers, with MixUp and without.

With `--pairs` an input is two images side by side, one of 100 classes.

`--data-dir` holds the four gzipped IDX files; without it the data set comes from the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from fsr_wrap import FSRConfig, FSRWrapper
from fsr_wrap.pushers import PUSHERS

TRAIN_SIZE, BATCH_SIZE, EPOCHS = 20_000, 100, 30


@dataclass(frozen=True)
class Method:
    """A row of the table: no `fsr` is cross-entropy; `mixup` mixes the batch; `paper`, its preset for wrong labels."""

    name: str
    fsr: dict[str, Any] | None = None
    mixup: bool = False
    paper: bool = True


def pusher_rows(name: str) -> dict[str, Method]:
    """Figure 5 (right): `"clip"` and re-labelling with this pusher, without MixUp and with."""
    return {
        f"pusher-{name}": Method(f"FSR, {name}", {"pusher": name}),
        f"pusher-{name}-mixup": Method(f"FSR, {name} + MixUp", {"pusher": name}, True),
    }


METHODS = {
    "ce": Method("cross-entropy"),
    "relabel": Method("re-labelling only", {"weight_rule": "uniform"}),
    "meta-margin": Method(
        "FSR, literal Eq. 5 margin, fresh", {"pusher": "meta_margin", "reward": "fresh", "relabel_weight": 0.0}
    ),
    "negative-loss": Method("FSR, negative loss, cached", {"pusher": "negative_loss", "relabel_weight": 0.0}),
    "paper": Method("FSR, authors' margin + MixUp + re-labelling, cached", {"pusher": "authors_margin"}, True),
    "no-relabel": Method("FSR, area under margin, cached", {"relabel_weight": 0.0}),
    "default-fresh": Method("FSR, clip, fresh", {"reward": "fresh"}),
    "depth-2": Method("FSR, clip, Θ^meta = the last 2 layers", {"head": ["6", "7", "9"]}),
    "depth-3": Method("FSR, clip, Θ^meta = the last 3 layers", {"head": ["3", "4", "6", "7", "9"]}),
    "depth-4": Method("FSR, clip, Θ^meta = the whole network", {"head": "all"}),
    "depth-4-every-5": Method("the same, G every 5 steps", {"head": "all", "reward_every": 5}),
    "depth-4-every-20": Method("the same, G every 20 steps", {"head": "all", "reward_every": 20}),
    "int8": Method("FSR, clip, ŷ in int8", {"relabel_storage": "int8"}),
    "largest-1": Method("FSR, clip, the largest value of ŷ", {"relabel_storage": 1}),
    "largest-3": Method("FSR, clip, the 3 largest values of ŷ", {"relabel_storage": 3}),
    "largest-10": Method("FSR, clip, the 10 largest values of ŷ", {"relabel_storage": 10}),
    **{key: method for name in PUSHERS for key, method in pusher_rows(name).items()},
    "default": Method("FSR, clip (area under margin + re-labelling, cached)", {}),
    "select": Method("FSR, default (select)", {}, paper=False),
}


@dataclass
class Result:
    """What one run gave."""

    seed: int
    last: float
    best: float
    seconds: float
    weight_on_wrong: float | None = None
    purity: float | None = None
    zero_weights: float | None = None
    curve: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Data:
    """Images (N, 784) standardised, and labels; `given` are the noisy ones."""

    train: Tensor
    clean: Tensor
    given: Tensor
    test: Tensor
    test_label: Tensor


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes."""
    with gzip.open(path) as file:
        raw = file.read()
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_images(data_dir: Path | None) -> dict[str, np.ndarray]:
    """The four arrays of Fashion-MNIST, from IDX files or from the hub."""
    if data_dir is None:
        from datasets import load_dataset

        hub = load_dataset("zalando-datasets/fashion_mnist").with_format("numpy")
        return {f"{split}_{key}": hub[split][key][:] for split in ("train", "test") for key in ("image", "label")}
    names = {"train": "train", "test": "t10k"}
    return {
        f"{split}_{key}": read_idx(data_dir / f"{prefix}-{kind}-ubyte.gz")
        for split, prefix in names.items()
        for key, kind in (("image", "images-idx3"), ("label", "labels-idx1"))
    }


def side_by_side(arrays: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """So many images of a split side by side, one of 10^number classes; each image comes once in each place."""
    out = {}
    for split in ("train", "test"):
        image, label = arrays[f"{split}_image"], arrays[f"{split}_label"].astype(np.int64)
        places = [np.random.default_rng(place).permutation(len(label)) for place in range(1, number + 1)]
        out[f"{split}_image"] = np.concatenate([image[place].reshape(-1, 784) for place in places], axis=1)
        out[f"{split}_label"] = sum(label[place] * 10 ** (number - k) for k, place in enumerate(places, 1))
    return out


def make_data(arrays: dict[str, np.ndarray], noise: float, seed: int) -> Data:
    """The fixed subset, with labels redrawn by `seed` (the true class may be drawn again, as in the released code)."""
    length = len(arrays["train_label"])
    chosen = np.random.default_rng(0).permutation(length)[:TRAIN_SIZE]
    images = torch.tensor(arrays["train_image"][chosen].reshape(TRAIN_SIZE, -1) / 255, dtype=torch.float32)
    mean, std = images.mean(), images.std()
    test = torch.tensor(arrays["test_image"].reshape(-1, images.shape[1]) / 255, dtype=torch.float32)
    clean = torch.tensor(arrays["train_label"][chosen].astype(np.int64))
    classes = int(clean.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    redrawn = torch.rand(TRAIN_SIZE, generator=generator) < noise
    given = torch.where(redrawn, torch.randint(classes, (TRAIN_SIZE,), generator=generator), clean)
    labels = torch.tensor(arrays["test_label"].astype(np.int64))
    return Data((images - mean) / std, clean, given, (test - mean) / std, labels)


def make_model(width: int = 784, classes: int = 10) -> nn.Sequential:
    """width-256-256-256-classes with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for size in (width, 256, 256):
        layers += [nn.Linear(size, 256), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, classes))


def evaluate(model: nn.Module, data: Data) -> float:
    """Test accuracy."""
    model.eval()
    with torch.no_grad():
        correct = (model(data.test).argmax(1) == data.test_label).float().mean().item()
    model.train()
    return correct


def train(method: Method, data: Data, seed: int, epochs: int) -> Result:
    """One run from scratch; the time excludes evaluation."""
    torch.manual_seed(seed)
    model = make_model(data.train.shape[1], int(data.clean.max()) + 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = TRAIN_SIZE // BATCH_SIZE
    scheduler = OneCycleLR(inner, 0.05, epochs=epochs, steps_per_epoch=steps)
    fsr: FSRWrapper | None = None
    if method.fsr is not None:
        config = FSRConfig.preset("cifar_noise") if method.paper else None
        fsr = FSRWrapper(model, inner, num_samples=TRAIN_SIZE, config=config, seed=seed, **method.fsr)
    optimizer = fsr or inner
    wrong = data.given != data.clean
    curve, seconds, on_wrong = [], 0.0, 0.0
    for _ in range(epochs):
        start, on_wrong = time.perf_counter(), 0.0
        for index in torch.randperm(TRAIN_SIZE).split(BATCH_SIZE):
            x, y = data.train[index], data.given[index]
            if fsr is None:
                loss = F.cross_entropy(model(x), y)
            else:
                x, y = fsr.mixup(x, y) if method.mixup else (x, y)
                loss = fsr.loss(model(x), y, index)
                on_wrong += fsr.weights[wrong[index]].sum().item() / steps
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        seconds += time.perf_counter() - start
        curve.append(evaluate(model, data))
    result = Result(seed, curve[-1], max(curve), seconds, curve=curve)
    if fsr is not None:
        members = fsr.dictionary.index
        result.weight_on_wrong = on_wrong
        result.purity = (data.clean[members] == data.given[members]).float().mean().item()
        result.zero_weights = fsr.metrics()["fsr/zero_weight_ratio"]
    return result


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def table(results: dict[str, dict[str, list[Result]]]) -> str:
    """A Markdown table, a row a method and noise rate."""
    lines = [
        "| noise | method | last accuracy | best | weight on wrong | dictionary purity |",
        "|---|---|---|---|---|---|",
    ]
    for noise, rows in results.items():
        for key, runs in ((key, rows[key]) for key in METHODS if rows.get(key)):
            optional = [
                "" if runs[0].weight_on_wrong is None else f"{statistics.mean(getattr(r, name) for r in runs):.3f}"
                for name in ("weight_on_wrong", "purity")
            ]
            accuracies = spread([run.last for run in runs]), spread([run.best for run in runs])
            lines.append(f"| {noise} | {METHODS[key].name} | {' | '.join([*accuracies, *optional])} |")
    return "\n".join(lines)


def write(path: Path | None, epochs: int, results: dict[str, dict[str, list[Result]]]) -> None:
    """All runs so far, as JSON."""
    if path:
        plain = {
            noise: {key: [vars(run) for run in runs] for key, runs in rows.items()} for noise, rows in results.items()
        }
        path.write_text(json.dumps({"epochs": epochs, "results": plain}, indent=1))


def main() -> None:
    """Runs every method at every noise rate over the seeds; writes JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of the four gzipped IDX files; default: the hub")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.4, 0.0])
    usual = [name for name in METHODS if not name.startswith("pusher-")]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual)
    parser.add_argument("--pushers", action="store_true", help="all pushers with MixUp and without (Figure 5, right)")
    parser.add_argument(
        "--clean-methods", nargs="+", choices=METHODS, default=["ce", "default", "select"], help="at noise 0"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--pairs", action="store_true", help="100 classes: two images side by side")
    parser.add_argument("--out", type=Path, help="JSON; runs that are in it already are not run again")
    args = parser.parse_args()
    arrays = read_images(args.data_dir)
    if args.pairs:
        arrays = side_by_side(arrays, 2)
    results: dict[str, dict[str, list[Result]]] = {}
    if args.out and args.out.exists():  # a run that was cut short goes on
        saved = json.loads(args.out.read_text())["results"]
        results = {
            noise: {key: [Result(**run) for run in runs] for key, runs in rows.items()} for noise, rows in saved.items()
        }
    for noise in args.noise:
        methods = [name for name in METHODS if name.startswith("pusher-")] if args.pushers else args.methods
        methods = methods if noise else args.clean_methods
        rows = results.setdefault(str(noise), {})
        for seed in args.seeds:
            data = make_data(arrays, noise, seed)
            for method in methods:
                runs = rows.setdefault(method, [])
                if any(run.seed == seed for run in runs):
                    continue
                runs.append(train(METHODS[method], data, seed, args.epochs))
                print(noise, seed, METHODS[method].name, round(runs[-1].last, 4), flush=True)
                write(args.out, args.epochs, results)
    print(table(results))


if __name__ == "__main__":
    main()
