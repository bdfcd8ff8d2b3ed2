"""FSR on iNaturalist 2018 (Section 5.2 of the paper): ResNet-50, 90 epochs, deferred re-weighting.

    accelerate launch examples/inat2018.py --data-dir /data/inat2018 --mixed-precision bf16
    accelerate launch examples/inat2018.py                # a small long-tailed set of digits, a minute on a CPU

`--data-dir` holds what https://github.com/visipedia/inat_comp/tree/master/2018 offers: train2018.json, val2018.json and
the images, train_val2018/<supercategory>/<category>/<name>.jpg. Any other set in this layout works as well.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from common import long_tail_counts, shot_accuracy
from image_files import Split, Task, add_common_flags, check_some, fill_defaults, launch, limit, write_digit
from image_files import find_data as find

from fsr_wrap import FSRConfig

NAME, SOURCE = "inat2018", "The official files: https://github.com/visipedia/inat_comp/tree/master/2018"
REAL: dict[str, Any] = {"model": "resnet50", "image_size": 224, "epochs": 90, "batch_size": 32, "lr": 0.1, "workers": 8}
DIGITS: dict[str, Any] = {
    "model": "test_resnet",
    "image_size": 32,
    "epochs": 36,
    "batch_size": 32,
    "lr": 0.4,
    "workers": 0,
}
MAY_CHANGE = frozenset({"many_shot", "few_shot"})  # in a resumed run

# --- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="train2018.json, val2018.json, train_val2018/; without it, digits are written")
    add_common_flags(parser, NAME, REAL, DIGITS, label_smoothing=0.1)
    add("--lr-warmup-epochs", type=float, help="epochs of linear warm-up (default: 1/18 of all: 5)")
    add(
        "--decay-epochs",
        type=int,
        nargs="*",
        help="where lr is multiplied by 0.1 (default: 2/3 and 8/9 of all: 60, 80)",
    )
    add("--fsr-start", type=int, help="epochs without re-weighting (default: the first of --decay-epochs: deferred)")
    add("--many-shot", type=int, default=100, help="classes with more training images are many-shot (%(default)s)")
    add("--few-shot", type=int, default=20, help="classes with fewer training images are few-shot (%(default)s)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the recipe filled in."""
    args = build_parser().parse_args(argv)
    fill_defaults(args, NAME, REAL, DIGITS)
    if args.lr_warmup_epochs is None:
        args.lr_warmup_epochs = args.epochs / 18
    if args.decay_epochs is None:
        args.decay_epochs = [round(args.epochs * 2 / 3), round(args.epochs * 8 / 9)]
    if args.fsr_start is None:
        args.fsr_start = min(args.decay_epochs, default=1)
    return args


# --- data ------------------------------------------------------------------------------------------------------------


def read_json(data_dir: Path, name: str) -> dict[str, Any]:
    """train2018.json or val2018.json. **Raises:** `FileNotFoundError` or `ValueError` saying what was expected."""
    path = data_dir / f"{name}2018.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {SOURCE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is not an annotated iNaturalist file. {SOURCE}")
    return content


def read_split(data_dir: Path, name: str, classes: dict[int, int]) -> Split:
    """The files of a split, relative to `data_dir`, and their classes; `classes` maps category ids to 0 … C−1."""
    content = read_json(data_dir, name)
    category = {annotation["image_id"]: annotation["category_id"] for annotation in content["annotations"]}
    if len(category) < len(content["annotations"]):
        raise ValueError(f"{data_dir / name}2018.json has several annotations for an image. {SOURCE}")
    files = [image["file_name"] for image in content["images"]]
    labels = [classes.get(category.get(image["id"]), -1) for image in content["images"]]
    if not files or -1 in labels:
        found = f"{labels.count(-1)} images without a category of train2018.json" if files else "no images"
        raise ValueError(f"{data_dir / name}2018.json has {found}. {SOURCE}")
    check_some(data_dir, files)
    return files, torch.tensor(labels)


def read_data(data_dir: Path) -> tuple[Split, Split, list[int]]:
    """Training and validation split, and how many training images each class has. Category ids may have gaps."""
    categories = sorted(category["id"] for category in read_json(data_dir, "train")["categories"])
    classes = {category: number for number, category in enumerate(categories)}
    train, val = read_split(data_dir, "train", classes), read_split(data_dir, "val", classes)
    return train, val, torch.bincount(train[1], minlength=len(classes)).tolist()


# --- the stand-in: digits in iNaturalist's layout --------------------------------------------------------------------


def write_digits(data_dir: Path, n_max: int = 130, ratio: float = 50, n_val: int = 40) -> None:
    """scikit-learn's digits, with a long tail over the training images and `n_val` validation images a class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}
    for digit, count in enumerate(long_tail_counts(n_max, 10, ratio)):
        rows = np.random.default_rng(digit).permutation(np.flatnonzero(digits.target == digit)).tolist()
        splits["val"] += [(row, digit) for row in rows[:n_val]]
        splits["train"] += [(row, digit) for row in rows[n_val : n_val + count]]
    groups = ["Even", "Odd"]
    categories = [{"id": 100 + 11 * d, "name": f"digit {d}", "supercategory": groups[d % 2]} for d in range(10)]
    for name, samples in splits.items():
        images, annotations = [], []
        for row, digit in samples:
            category = categories[digit]
            file = f"train_val2018/{category['supercategory']}/{category['id']}/{row:04d}.jpg"
            write_digit(digits.images[row], data_dir / file)
            images.append({"id": row, "file_name": file, "width": 32, "height": 32})
            annotations.append({"id": row, "image_id": row, "category_id": category["id"]})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (data_dir / f"{name}2018.json").write_text(json.dumps(content), encoding="utf-8")


def find_data(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """--data-dir, or digits in its layout."""
    return find(args, accelerator, "digits2018", write_digits)


# --- training --------------------------------------------------------------------------------------------------------


def lr_factor(step: int, steps_per_epoch: int, warmup: float, decays: list[int]) -> float:
    """Linear over the `warmup` epochs, then × 0.1 at each of `decays`."""
    rising = (step + 1) / (warmup * steps_per_epoch) if warmup else 1.0
    return min(1.0, rising) * 0.1 ** sum(step >= decay * steps_per_epoch for decay in decays)


def define(args: argparse.Namespace, accelerator: Accelerator) -> Task:
    """The data, FSR's preset, the schedule, and few-shot accuracy."""
    data_dir = find_data(args, accelerator)
    train, val, counts = read_data(data_dir)
    chosen = {"warmup_epochs": args.fsr_start, "label_smoothing": args.label_smoothing, "seed": args.seed}
    return Task(
        data_dir,
        len(counts),
        limit(train, args.limit, args.seed),
        {"": limit(val, args.limit, args.seed)},
        FSRConfig.preset("inat2018", **chosen),
        partial(lr_factor, warmup=args.lr_warmup_epochs, decays=args.decay_epochs),
        partial(shot_accuracy, train_counts=counts, many=args.many_shot, few=args.few_shot),
        may_change=MAY_CHANGE,
    )


if __name__ == "__main__":
    launch(NAME, parse_args(), define)
