"""Finds wrong labels in one training, mends them, and trains again on what was mended.

    python examples/find_label_issues.py                    # scikit-learn's digits, one label in five made wrong
    python examples/find_label_issues.py --data photos      # a folder with a folder of images for each class
    python examples/find_label_issues.py --data train.parquet --label worse_label --answers label

The digits come with scikit-learn, so nothing is downloaded. Which of their labels were made wrong is known, and what
was found is compared with it. Four networks are trained with the same recipe: plainly on the given labels, with FSR,
plainly on the mended set, and plainly on what is left when the flagged samples are dropped. A fifth of the images is
kept for the test; where the right labels are not known (no --answers), it is tested on given ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import positive, share
from networks import make_network
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fsr_wrap import FSRWrapper, with_index

EPOCHS, SIDE = 40, 32


@dataclass
class Data:
    """Images (n, ...), given and right labels (None if they are not known), of training and test, and class names."""

    images: Tensor
    given: Tensor
    right: Tensor | None
    test_images: Tensor
    test_labels: Tensor
    names: list[str]
    places: list[str]  # of the training images: their files, or their rows in the Parquet file


# --- data ------------------------------------------------------------------------------------------------------------


def make_digits(noise: float, seed: int) -> Data:
    """The digits, this share of the training labels replaced by another one."""
    digits = load_digits()
    images, right = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    other = (right + torch.randint(1, 10, right.shape, generator=generator)) % 10
    given = torch.where(torch.rand(right.shape, generator=generator) < noise, other, right)
    names = [str(number) for number in range(10)]
    return split(images, given, right, right, names, [str(row) for row in range(len(right))], generator)


def read_data(args: argparse.Namespace) -> Data:
    """A Parquet file or a folder of images, `--limit` of them, 32×32."""
    from datasets import Image, load_dataset

    if args.data.is_dir():
        dataset = load_dataset("imagefolder", data_dir=str(args.data), split="train")
    elif args.data.is_file():
        dataset = load_dataset("parquet", data_files=str(args.data), split="train")
    else:
        raise SystemExit(f"--data {args.data}: there is no such file or folder.")
    for name in (args.image, args.label, args.answers):
        if name is not None and name not in dataset.column_names:
            raise SystemExit(f"{args.data} has no column {name!r}; its columns are {', '.join(dataset.column_names)}.")
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(dataset), generator=generator)[: args.limit].tolist()
    print(f"{len(rows)} of {len(dataset)} images are read (--limit {args.limit}), a fifth of them for the test")
    dataset = dataset.select(rows)
    places = [str(row) for row in rows]
    if args.data.is_dir():
        places = [one["path"] for one in dataset.cast_column(args.image, Image(decode=False))[args.image]]
    arrays = [np.asarray(image.convert("RGB").resize((SIDE, SIDE))) for image in dataset[args.image]]
    images = torch.tensor(np.stack(arrays), dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
    given = torch.tensor(dataset[args.label][:])
    right = None if args.answers is None else torch.tensor(dataset[args.answers][:])
    feature = dataset.features[args.answers or args.label]
    names = getattr(feature, "names", None) or [str(number) for number in range(int(given.max()) + 1)]
    return split(images, given, right, given if right is None else right, names, places, generator)


def split(
    images: Tensor,
    given: Tensor,
    right: Tensor | None,
    answers: Tensor,
    names: list[str],
    places: list[str],
    generator: torch.Generator,
) -> Data:
    """A fifth for the test."""
    train, test = torch.randperm(len(images), generator=generator).tensor_split([-(len(images) // 5)])
    right = None if right is None else right[train]
    return Data(images[train], given[train], right, images[test], answers[test], names, [places[i] for i in train])


# --- training --------------------------------------------------------------------------------------------------------


def make_model(images: Tensor, classes: int) -> nn.Module:
    """One hidden layer for the digits, timm's smallest residual network for images."""
    if images.ndim == 4:
        return make_network("test_resnet", classes)
    return nn.Sequential(nn.Linear(images.shape[1], 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, classes))


def train(dataset: Dataset[Any], data: Data, seed: int, epochs: int, fsr: bool = False) -> tuple[float, Any]:
    """Test accuracy, and the optimizer: FSR's wrapper or the plain one. Samples are image, label and index."""
    torch.manual_seed(seed)
    model = make_model(data.images, len(data.names))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=len(dataset) > 64)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    if fsr:
        optimizer = FSRWrapper(model, optimizer, dataset=dataset, samples_per_epoch=len(loader) * 64)
    for _ in range(epochs):
        for x, y, index in loader:
            logits = model(x)
            loss = optimizer.loss(logits, y, index) if fsr else F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in data.test_images.split(500)])
    return (predicted == data.test_labels).float().mean().item(), optimizer


# --- what was found --------------------------------------------------------------------------------------------------


def summary(issues: Any, data: Data) -> Iterator[str]:
    """How many labels were flagged, and how many of them are wrong."""
    found = torch.tensor(issues["is_label_issue"].to_numpy())
    yield f"{int(found.sum())} of {len(found)} labels look wrong"
    if data.right is None:
        return
    wrong = data.given != data.right
    both = int((found & wrong).sum())
    yield f"{int(wrong.sum())} are wrong: {both} of them were found, and {int(found.sum()) - both} right ones flagged"
    suggested = torch.tensor(
        issues["predicted_label"].to_numpy(dtype=np.int64, na_value=-1)
    )  # of flagged ones never −1
    mended = torch.where(found, suggested, data.given)
    yield f"with the suggested labels in their place {int((mended != data.right).sum())} are wrong"


def main() -> None:
    """Trains, prints what was found, mends, and trains again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=share, default=0.2, help="the share of the digits' labels to make wrong")
    parser.add_argument("--data", type=Path, help="a Parquet file, or a folder with a folder of images for each class")
    parser.add_argument("--image", default="image", help="column of the images (%(default)s)")
    parser.add_argument("--label", default="label", help="column of the given labels (%(default)s)")
    parser.add_argument("--answers", help="column of the right labels, if they are known")
    parser.add_argument("--limit", type=positive, default=10_000, help="images to read (%(default)s)")
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="where to write the whole list")
    args = parser.parse_args()
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
    data = read_data(args) if args.data else make_digits(args.noise, args.seed)

    train_set = with_index(TensorDataset(data.images, data.given))
    with_fsr, fsr = train(train_set, data, args.seed, args.epochs, fsr=True)
    issues = fsr.label_issues(class_names=data.names)
    issues.insert(0, "place", data.places)
    print(*summary(issues, data), sep="\n")
    columns = ["place", "label_quality", "given_name", "predicted_name"]
    print(f"\nthe worst:\n{issues.sort_values('label_quality')[columns].head(8).to_string()}\n")
    if args.csv:
        issues.to_csv(args.csv)

    accuracy = {"plain, on the given labels": train(train_set, data, args.seed, args.epochs)[0], "FSR": with_fsr}
    for title, clean in (
        ("plain, on the mended set", fsr.cleaned(train_set, relabel=True)),
        ("plain, without what was flagged", fsr.cleaned(train_set, drop=True)),
    ):
        accuracy[title] = train(clean, data, args.seed, args.epochs)[0]
    print("test accuracy" + ("" if data.right is not None else ", on given labels"))
    for title, value in accuracy.items():
        print(f"{title:<32} {value:.3f}")


if __name__ == "__main__":
    main()
