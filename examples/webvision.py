"""FSR on mini-WebVision (Section 5.1 of the paper): the first 50 classes, ResNet-50, 128 epochs of cosine cycles.

    accelerate launch examples/webvision.py --data-dir /data/webvision --imagenet-dir /data/imagenet
    accelerate launch examples/webvision.py               # digits with wrong labels, a minute or two on a CPU

`--data-dir` holds what https://data.vision.ee.ethz.ch/cvl/webvision/dataset2017.html offers for WebVision 1.0 (images
of 256 pixels; mini-WebVision takes those of Google alone):

    info/synsets.txt                   the classes, a line each: synset and names
    info/train_filelist_google.txt     "google/q0001/xxx.jpg 0", a line an image: file and class
    info/val_filelist.txt              "val000001.jpg 0"
    google/, val_images_256/           the images

`--imagenet-dir` holds val/<synset>/<name>.JPEG. The same classes are found there by their synsets; both validation sets
are evaluated after every epoch.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from image_files import Split, Task, add_common_flags, check_some, fill_defaults, find_data, launch, limit, write_digit

from fsr_wrap import FSRConfig

NAME, SOURCE = "webvision", "The official files: https://data.vision.ee.ethz.ch/cvl/webvision/dataset2017.html"
# The paper trains with 16 images on each of 8 GPUs; the released code's learning rate is 0.1 for these 128.
REAL: dict[str, Any] = {
    "model": "resnet50",
    "image_size": 224,
    "epochs": 128,
    "batch_size": 16,
    "lr": 0.2,
    "workers": 8,
    "classes": 50,
    "cycles": 7,
}
DIGITS: dict[str, Any] = {
    "model": "test_resnet",
    "image_size": 32,
    "epochs": 30,
    "batch_size": 32,
    "lr": 0.4,
    "workers": 0,
    "classes": 10,
    "cycles": 3,
}
MAY_CHANGE = frozenset({"imagenet_dir"})  # in a resumed run

# --- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="info/, google/, val_images_256/; without it, digits are written")
    add("--imagenet-dir", type=Path, help="val/<synset>/ (default: imagenet/ in --data-dir, if it is there)")
    add_common_flags(parser, NAME, REAL, DIGITS, label_smoothing=0.0)
    add("--classes", type=int, help=f"the first so many (default: {REAL['classes']}; for the digits 10)")
    add("--lr-warmup-epochs", type=float, help="epochs of linear warm-up (default: 3/128 of all: 3)")
    add("--cycles", type=int, help=f"of the cosine, each twice as long as the last (default: {REAL['cycles']})")
    add("--fsr-start", type=int, help="epochs without re-weighting (default: 5/32 of all: 20)")
    add("--mixup", action="store_true", help="MixUp and the authors' margin, the paper's own recipe")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the recipe filled in."""
    parser = build_parser()
    args = parser.parse_args(argv)
    fill_defaults(args, NAME, REAL, DIGITS)
    if args.lr_warmup_epochs is None:
        args.lr_warmup_epochs = args.epochs * 3 / 128
    if args.fsr_start is None:
        args.fsr_start = max(1, round(args.epochs * 5 / 32))
    if args.mixup and args.method == "ce":
        parser.error("--mixup is a part of FSR's recipe here: leave it out with --method ce")
    if args.classes < 2 or args.cycles < 1:
        parser.error("--classes takes at least 2, --cycles at least 1")
    return args


# --- data ------------------------------------------------------------------------------------------------------------


def read_lines(data_dir: Path, name: str) -> list[str]:
    """The lines of a file in info/ that are not empty. **Raises:** `FileNotFoundError`."""
    path = data_dir / "info" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {SOURCE}")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_synsets(data_dir: Path, classes: int) -> list[str]:
    """The synsets of the first classes. **Raises:** `FileNotFoundError`; `ValueError` if there are fewer."""
    synsets = [line.split()[0] for line in read_lines(data_dir, "synsets.txt")]
    if len(synsets) < classes:
        raise ValueError(f"{data_dir / 'info' / 'synsets.txt'} has {len(synsets)} classes: lower --classes {classes}.")
    return synsets[:classes]


def read_list(data_dir: Path, name: str, folder: str, classes: int) -> Split:
    """The images of the first classes in a file list; `folder` is where the files are that it names.

    **Raises:** `FileNotFoundError`; `ValueError` for a line of another form, or if there are no such images.
    """
    files, labels = [], []
    for number, line in enumerate(read_lines(data_dir, name), start=1):
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal():
            raise ValueError(f"Line {number} of {data_dir / 'info' / name} is {line!r}, not a file and a class.")
        if int(label) < classes:
            files.append(f"{folder}{file.strip()}")
            labels.append(int(label))
    if not files:
        raise ValueError(f"{data_dir / 'info' / name} has no images of the first {classes} classes. {SOURCE}")
    check_some(data_dir, files)
    return files, torch.tensor(labels)


def read_imagenet(imagenet_dir: Path, synsets: list[str]) -> Split:
    """ImageNet's validation images of the same classes, by absolute path.

    **Raises:** `FileNotFoundError` if a class has none.
    """
    files, labels = [], []
    for label, synset in enumerate(synsets):
        folder = imagenet_dir.absolute() / "val" / synset
        images = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
        if not images:
            raise FileNotFoundError(f"{folder} has no images: --imagenet-dir takes the folder of val/<synset>/*.JPEG.")
        files += [str(path) for path in images]
        labels += [label] * len(images)
    return files, torch.tensor(labels)


def read_data(data_dir: Path, imagenet_dir: Path | None, classes: int) -> tuple[Split, dict[str, Split]]:
    """The training split, and the validation splits by name."""
    synsets = read_synsets(data_dir, classes)
    train = read_list(data_dir, "train_filelist_google.txt", "", classes)
    val = {"webvision": read_list(data_dir, "val_filelist.txt", "val_images_256/", classes)}
    if imagenet_dir is None and (data_dir / "imagenet").is_dir():
        imagenet_dir = data_dir / "imagenet"
    return train, val if imagenet_dir is None else {**val, "imagenet": read_imagenet(imagenet_dir, synsets)}


# --- the stand-in: digits in WebVision's layout ----------------------------------------------------------------------


def write_digits(data_dir: Path, wrong: float = 0.4, n_val: int = 30) -> None:
    """scikit-learn's digits, `wrong` of the training labels another digit's; two validation sets of `n_val` a class.

    An eleventh class is listed, whose images are not there, to be left out.
    """
    from sklearn.datasets import load_digits

    digits, random = load_digits(), np.random.default_rng(0)
    synsets = [f"n{1000 + digit:08d}" for digit in range(11)]
    train, val = ["google/q0011/none.jpg 10"], ["val999999.jpg 10"]
    for digit in range(10):
        rows = random.permutation(np.flatnonzero(digits.target == digit)).tolist()
        for row in rows[:n_val]:
            write_digit(digits.images[row], data_dir / "val_images_256" / f"val{row:06d}.jpg")
            val.append(f"val{row:06d}.jpg {digit}")
        for row in rows[n_val : 2 * n_val]:
            write_digit(digits.images[row], data_dir / "imagenet" / "val" / synsets[digit] / f"{row:06d}.JPEG")
        for row in rows[2 * n_val :]:
            given = digit if random.random() >= wrong else int(digit + random.integers(1, 10)) % 10
            file = f"google/q{1 + given:04d}/{row:06d}.jpg"  # found by a query for what it is not
            write_digit(digits.images[row], data_dir / file)
            train.append(f"{file} {given}")
    (data_dir / "info").mkdir(exist_ok=True)
    names = [f"{synset} digit {number}" for number, synset in enumerate(synsets)]
    for name, lines in {"synsets": names, "train_filelist_google": train, "val_filelist": val}.items():
        (data_dir / "info" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- training --------------------------------------------------------------------------------------------------------


def lr_factor(step: int, steps_per_epoch: int, epochs: int, warmup: float, cycles: int) -> float:
    """Linear over the `warmup` epochs, then cosines to 0, each twice as long as the last and starting at 0.9 of it.

    The first one is such that the last ends with the last epoch. In the paper's 128 epochs they are about 1, 2, 4, …,
    64 epochs long.
    """
    start = warmup * steps_per_epoch
    if step < start:
        return (step + 1) / max(start, 1)
    unit = (epochs * steps_per_epoch - start) / (2**cycles - 1)
    cycle = min(int(math.log2((step - start) / unit + 1)), cycles - 1)
    done = ((step - start) / unit + 1) / 2**cycle - 1
    return 0.9**cycle * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def define(args: argparse.Namespace, accelerator: Accelerator) -> Task:
    """The data, FSR's preset and the schedule."""
    data_dir = find_data(args, accelerator, "digits", write_digits)
    train, val = read_data(data_dir, args.imagenet_dir, args.classes)
    train = limit(train, args.limit, args.seed)
    chosen: dict[str, Any] = {"warmup_epochs": args.fsr_start, "label_smoothing": args.label_smoothing}
    if args.mixup:
        chosen["pusher"] = "authors_margin"
    # Table 4's 5,000 of WebVision's 65,944 images; as large a part of fewer would hold wrong labels.
    chosen["dictionary_size"] = min(5000, max(args.classes, len(train[0]) // 10))
    return Task(
        data_dir,
        args.classes,
        train,
        {name: limit(split, args.limit, args.seed) for name, split in val.items()},
        FSRConfig.preset("webvision", seed=args.seed, **chosen),
        partial(lr_factor, epochs=args.epochs, warmup=args.lr_warmup_epochs, cycles=args.cycles),
        mixup=args.mixup,
        may_change=MAY_CHANGE,
    )


if __name__ == "__main__":
    launch(NAME, parse_args(), define)
