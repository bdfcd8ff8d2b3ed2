"""The cases of `compare.py`: which images, which wrong labels or long tail, which network and recipe.

Fashion-MNIST: 20,000 images (`few300` and `few1000`: so many), the MLP and recipe of `noisy_fashion_mnist.py`.
`many100` and `many1000`: two and three of them side by side, of so many classes; each image comes once in each place.
CIFAR-10 and CIFAR-10N: 10,000 images (20,000 before a long tail is cut from them), b = 100, one-cycle, two networks:

- `small`: a stem of 16 channels at stride 2 and residual blocks of 32 and 64, about 80,000 parameters, too few to learn
  wrong labels by heart; SGD 0.1, flips and shifts;
- `resnet`: timm's `test_resnet`, 0.37 million parameters, which does memorise; SGD 0.05, flips;
- `finetune`: the same after 8 epochs on 20,000 other images with right labels; a new head, 5 epochs, SGD 0.005.

A split is a random choice of the training images, of 1,000 more with right labels for the methods that need them, and
of those that a network to fine-tune was trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cifar
from common import long_tail_counts
from networks import make_network
from noisy_fashion_mnist import make_model, read_images, side_by_side

BATCH_SIZE, CLEAN = 100, 1000

# Each class to one that looks like it: T-shirt → shirt → coat → pullover → dress → T-shirt, sandal → sneaker → ankle
# boot → sandal, trouser → dress, bag → ankle boot.
FASHION_CONFUSIONS = (6, 3, 3, 0, 2, 7, 4, 9, 9, 5)
# Of CIFAR-10 those of `cifar.py`; classes that it leaves out keep their labels.
CONFUSIONS = {"fashion": FASHION_CONFUSIONS, "cifar": tuple(cifar.CIFAR10_CONFUSIONS.get(c, c) for c in range(10))}


@dataclass(frozen=True)
class Case:
    """One column of the table.

    **Arguments:** `noise` is none, uniform:RATE, asymmetric:RATE or column:NAME, as in `cifar.py`; `limit`, images
    before a long tail is cut from them; `augment`, as in `cifar.py`; `pretrained`, whether the network was trained on
    other images before; `sides`, images of Fashion-MNIST side by side, which make 10^sides classes.
    """

    title: str
    source: str
    noise: str = "none"
    imbalance: float = 1.0
    network: str = "mlp"
    epochs: int = 30
    limit: int = 20_000
    lr: float = 0.05
    augment: str = "none"
    pretrained: bool = False
    sides: int = 1

    @property
    def classes(self) -> int:
        """How many there are."""
        return 10**self.sides


PRETRAINING = Case("before fine-tuning", "cifar", network="test_resnet", epochs=8, augment="flip")


@dataclass(frozen=True)
class Data:
    """One split of a case: images as they are stored, given and right labels, clean images, the test set, and what a
    network to fine-tune starts from, without its head."""

    images: Tensor
    given: Tensor
    right: Tensor
    clean_images: Tensor
    clean_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    start: dict[str, Tensor] | None = None

    @property
    def wrong(self) -> float:
        """The share of wrong labels."""
        return (self.given != self.right).float().mean().item()


def make_cases() -> dict[str, Case]:
    """All cases, by name."""
    kinds = {
        "clean": ("clean", "none", 1),
        "uniform20": ("uniform 20 %", "uniform:0.2", 1),
        "uniform40": ("uniform 40 %", "uniform:0.4", 1),
        "uniform80": ("uniform 80 %", "uniform:0.8", 1),
        "asymmetric40": ("asymmetric 40 %", "asymmetric:0.4", 1),
        "tail50": ("imbalance 50", "none", 50),
        "tail100": ("imbalance 100", "none", 100),
        "tail50-uniform20": ("imbalance 50 + uniform 20 %", "uniform:0.2", 50),
        "tail50-uniform40": ("imbalance 50 + uniform 40 %", "uniform:0.4", 50),
    }
    cases = {f"fashion-{key}": Case(f"Fashion-MNIST, {t}", "fashion", noise, r) for key, (t, noise, r) in kinds.items()}
    for few in (300, 1000):
        for key in ("clean", "uniform20", "uniform40"):
            title = f"Fashion-MNIST, {few:,} images, {kinds[key][0]}"
            cases[f"few{few}-{key}"] = Case(title, "fashion", kinds[key][1], limit=few)
    for sides in (2, 3):
        for key, (title, noise, imbalance) in kinds.items():
            title = f"{10**sides:,} classes, {title}"
            cases[f"many{10**sides}-{key}"] = Case(title, "fashion", noise, imbalance, sides=sides)
    networks: dict[str, dict[str, Any]] = {
        "small": {"network": "small", "lr": 0.1, "augment": "crop"},
        "resnet": {"network": "test_resnet", "lr": 0.05, "augment": "flip"},
    }
    columns = {"clean": "none", "aggre": "column:aggre_label", "random1": "column:random_label1"}
    columns |= {"worse": "column:worse_label", "asymmetric40": "asymmetric:0.4"}
    titles = {key: key for key in columns} | {"asymmetric40": "asymmetric 40 %"}
    for network, recipe in networks.items():
        for key, noise in columns.items():
            title = f"CIFAR-10, {titles[key]}, {network}"
            cases[f"cifar-{network}-{key}"] = Case(title, "cifar", noise, limit=10_000, **recipe)
        for key, rate in {"tail100": 0, "tail100-uniform20": 20, "tail100-uniform40": 40}.items():
            title = "imbalance 100" + (f" + uniform {rate} %" if rate else "")
            noise = f"uniform:{rate / 100}" if rate else "none"
            cases[f"cifar-{network}-{key}"] = Case(
                f"CIFAR-10, {title}, {network}", "cifar", noise, imbalance=100, epochs=40, **recipe
            )
    tuned: dict[str, Any] = {**networks["resnet"], "lr": 0.005, "epochs": 5, "limit": 10_000, "pretrained": True}
    for key, noise in columns.items():
        cases[f"cifar-finetune-{key}"] = Case(f"CIFAR-10, {titles[key]}, fine-tuning", "cifar", noise, **tuned)
    return cases


CASES = make_cases()


class SmallConvNet(nn.Module):
    """A stem of 16 channels at stride 2, residual blocks of 32 and 64 at stride 2, global pooling and the head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block1, self.short1 = self.block(16, 32), nn.Conv2d(16, 32, 1, 2, bias=False)
        self.block2, self.short2 = self.block(32, 64), nn.Conv2d(32, 64, 1, 2, bias=False)
        self.fc = nn.Linear(64, num_classes)

    @staticmethod
    def block(width_in: int, width: int) -> nn.Sequential:
        """Two convolutions with BatchNorm, the first at stride 2."""
        first = [nn.Conv2d(width_in, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.block1(x) + self.short1(x))
        x = F.relu(self.block2(x) + self.short2(x))
        return self.fc(x.mean((2, 3)))


def make_case_network(case: Case, classes: int | None = None, start: dict[str, Tensor] | None = None) -> nn.Module:
    """A fresh network, from the global random stream; all but its head from `start`, if given."""
    classes = classes or case.classes
    if case.network == "mlp":
        return make_model(784 * case.sides, classes)
    network = SmallConvNet(classes) if case.network == "small" else make_network(case.network, classes)
    if start is not None:
        network.load_state_dict(network.state_dict() | start)
    return network.to(memory_format=torch.channels_last)


def make_recipe(
    case: Case, parameters: Iterable[nn.Parameter], steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """SGD with momentum, and one cycle of so many steps."""
    sgd = torch.optim.SGD(parameters, lr=case.lr, momentum=0.9, weight_decay=5e-4)
    return sgd, OneCycleLR(sgd, case.lr, total_steps=max(steps, 2))


def pretrain(case: Case, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """The state of a network after plain training on these images, without its head. Leaves the random stream alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, augmented = make_case_network(case), get_transforms(case)[0]
        steps = len(labels) // BATCH_SIZE
        sgd, schedule = make_recipe(case, network.parameters(), case.epochs * steps)
        for _ in range(case.epochs):
            for index in torch.randperm(len(labels)).tensor_split(steps):
                F.cross_entropy(network(augmented(images[index])), labels[index]).backward()
                sgd.step()
                sgd.zero_grad()
                schedule.step()
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


def get_transforms(case: Case) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Stored images to inputs: as trained on, and as evaluated."""
    if case.source == "fashion":
        return (lambda images: images), (lambda images: images)
    return (lambda images: cifar.augment(images, case.augment)), cifar.standardise


# --- data ------------------------------------------------------------------------------------------------------------


@cache
def read_fashion(folder: Path | None, sides: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 784 · sides) in [0, 1] and labels, training and test."""
    arrays = read_images(folder)
    if sides > 1:
        arrays = side_by_side(arrays, sides)
    splits, width = ("train", "test"), 784 * sides
    images = [torch.tensor(arrays[f"{s}_image"].reshape(-1, width) / 255, dtype=torch.float32) for s in splits]
    labels = [torch.tensor(arrays[f"{s}_label"].astype(np.int64)) for s in splits]
    return images[0], labels[0], images[1], labels[1]


@cache
def read_cifar(folder: Path) -> tuple[Any, Tensor, Tensor]:
    """The training set, undecoded, and the test images and labels; `folder` has train.parquet and test.parquet."""
    from datasets import load_dataset

    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    sets = load_dataset("parquet", data_files=files)
    return sets["train"], cifar.decode(sets["test"], 32), torch.tensor(sets["test"]["label"][:])


def make_given(case: Case, right: Tensor, seed: int) -> Tensor:
    """The given labels where they are made by us; of uniform noise the redrawn label may be the right one again."""
    kind, _, value = case.noise.partition(":")
    if kind not in ("uniform", "asymmetric"):
        return right.clone()
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(len(right), generator=generator) < float(value)
    if kind == "uniform":
        return torch.where(hit, torch.randint(case.classes, (len(right),), generator=generator), right)
    last = right % 10  # of several images side by side the last one's class
    return torch.where(hit, right - last + torch.tensor(CONFUSIONS[case.source])[last], right)


@cache
def make_data(case: Case, folder: Path | None, split: int, seed: int) -> Data:
    """The images of a split, the first n_i of each class under a long tail; noise of our own is drawn by `seed`."""
    if case.source == "fashion":
        images, labels, test_images, test_labels = read_fashion(folder, case.sides)
    else:
        if folder is None:
            raise SystemExit("CIFAR-10N needs --cifar, a folder with train.parquet and test.parquet.")
        train, test_images, test_labels = read_cifar(folder)
        labels = torch.tensor(train["label"][:])
    order = np.random.default_rng(split).permutation(len(labels))
    if len(order) < case.limit + CLEAN:
        raise SystemExit(f"{case.title} takes {case.limit + CLEAN:,} images of {folder}, which has {len(order):,}.")
    chosen, clean = order[: case.limit], order[case.limit : case.limit + CLEAN]
    if case.imbalance > 1:
        classes = [chosen[labels[chosen].numpy() == c] for c in range(case.classes)]
        counts = long_tail_counts(max(len(rows) for rows in classes), case.classes, case.imbalance)
        chosen = np.concatenate([rows[:count] for rows, count in zip(classes, counts, strict=True)])
    right = labels[chosen]
    given = make_given(case, right, seed)
    if case.source == "fashion":
        own = images[chosen]
        mean, std = own.mean(), own.std()
        parts = [(part - mean) / std for part in (own, images[clean], test_images)]
    else:
        kind, _, value = case.noise.partition(":")
        given = torch.tensor(train[value][:])[chosen] if kind == "column" else given
        parts = [cifar.decode(train.select(chosen), 32), cifar.decode(train.select(clean), 32), test_images]
    start = find_start(folder, split, case.limit + CLEAN) if case.pretrained and folder else None
    return Data(parts[0], given, right, parts[1], labels[clean], parts[2], test_labels, start)


@cache
def find_start(folder: Path, split: int, used: int) -> dict[str, Tensor]:
    """What a network to fine-tune starts from: `pretrain` on images of the split that come after those in use."""
    train = read_cifar(folder)[0]
    order = np.random.default_rng(split).permutation(len(train))[used:][: PRETRAINING.limit]
    rows = train.select(order)
    return pretrain(PRETRAINING, cifar.decode(rows, 32), torch.tensor(rows["label"][:]), split)
