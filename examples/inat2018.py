"""FSR on iNaturalist 2018 (Section 5.2 of the paper): ResNet-50, 90 epochs, deferred re-weighting.

    accelerate launch examples/inat2018.py --data-dir /data/inat2018 --mixed-precision bf16
    accelerate launch examples/inat2018.py                # a small long-tailed set of digits, a minute on a CPU

`--data-dir` holds what https://github.com/visipedia/inat_comp/tree/master/2018 offers: train2018.json, val2018.json and
the images, train_val2018/<supercategory>/<category>/<name>.jpg. Any other set in this layout works as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from checkpoints import Checkpoints, Progress, add_flags, get_settings
from common import long_tail_counts, positive, shot_accuracy, topk_correct
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from tqdm import tqdm

from fsr_wrap import FSRConfig, FSRWrapper, with_index

SOURCE = "The official files: https://github.com/visipedia/inat_comp/tree/master/2018"
REAL: dict[str, Any] = {"model": "resnet50", "image_size": 224, "epochs": 90, "lr": 0.1, "workers": 8}
DIGITS: dict[str, Any] = {"model": "test_resnet", "image_size": 32, "epochs": 36, "lr": 0.4, "workers": 0}
MAY_CHANGE = {"data_dir", "epochs", "workers", "many_shot", "few_shot", "log_steps"}  # in a resumed run

# --- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def add_default(name: str, kind: Callable[[str], Any], text: str) -> None:
        key = name[2:].replace("-", "_")
        add(name, type=kind, help=f"{text} (default: {REAL[key]}; for the digits {DIGITS[key]})")

    add("--data-dir", type=Path, help="train2018.json, val2018.json, train_val2018/; without it, digits are written")
    add("--output-dir", type=Path, default=Path("runs/inat2018"), help="checkpoints, logs, summary.json (%(default)s)")
    add("--method", choices=("fsr", "ce"), default="fsr", help="re-weighting or plain cross-entropy (%(default)s)")
    add_default("--model", str, "any timm model")
    add("--pretrained", action="store_true", help="start from timm's pretrained weights")
    add("--head", default="auto", help='dotted name of the classifier in the model, or "auto" (%(default)s)')
    add_default("--image-size", positive, "side of the square the model sees")
    add_default("--epochs", positive, "epochs")
    add("--batch-size", type=positive, default=32, help="images per process and step (%(default)s)")
    add_default("--lr", float, "learning rate at a total batch of 256; scaled by batch size × processes / 256")
    add("--lr-warmup-epochs", type=float, help="epochs of linear warm-up (default: 1/18 of all: 5)")
    add(
        "--decay-epochs",
        type=int,
        nargs="*",
        help="where lr is multiplied by 0.1 (default: 2/3 and 8/9 of all: 60, 80)",
    )
    add("--fsr-start", type=int, help="epochs without re-weighting (default: the first of --decay-epochs: deferred)")
    add("--weight-decay", type=float, default=1e-4, help="(%(default)s)")
    add("--label-smoothing", type=float, default=0.1, help="(%(default)s)")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="(default: as `accelerate config` says)")
    add("--many-shot", type=int, default=100, help="classes with more training images are many-shot (%(default)s)")
    add("--few-shot", type=int, default=20, help="classes with fewer training images are few-shot (%(default)s)")
    add("--limit", type=positive, help="use at most so many images of each split, for a smoke run")
    add_default("--workers", int, "loader processes per process")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add_flags(parser)
    add("--log-steps", type=positive, default=50, help="steps between two entries of the training log (%(default)s)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the recipe filled in."""
    args = build_parser().parse_args(argv)
    for name, value in (REAL if args.data_dir else DIGITS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
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
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is not an annotated iNaturalist file. {SOURCE}")
    return content


def read_split(data_dir: Path, name: str, classes: dict[int, int]) -> tuple[list[str], Tensor]:
    """The files of a split, relative to `data_dir`, and their classes; `classes` maps category ids to 0 … C−1."""
    content = read_json(data_dir, name)
    category = {annotation["image_id"]: annotation["category_id"] for annotation in content["annotations"]}
    files = [image["file_name"] for image in content["images"]]
    labels = [classes.get(category.get(image["id"]), -1) for image in content["images"]]
    if not files or -1 in labels:
        found = f"{labels.count(-1)} images without a category of train2018.json" if files else "no images"
        raise ValueError(f"{data_dir / name}2018.json has {found}. {SOURCE}")
    for file in files[:: 1 + len(files) // 100]:  # a glance: all of them would take minutes on a network disk
        check_image(data_dir / file)
    return files, torch.tensor(labels)


def check_image(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is listed in the JSON file, but missing: unpack train_val2018. {SOURCE}")


class INaturalist(Dataset[tuple[Tensor, int]]):
    """The images of one split.

    Augmentation draws from a stream of its own for each seed, epoch and image, so that a run that was stopped goes on
    with the same images, whatever the number of workers and processes.
    """

    def __init__(
        self, root: Path, files: list[str], labels: Tensor, transform: Callable[[Image.Image], Tensor], seed: int
    ):
        self.root, self.files, self.labels, self.transform, self.seed = root, files, labels, transform, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / self.files[index]
        check_image(path)
        with Image.open(path) as file:
            image = file.convert("RGB")
        outside = torch.get_rng_state()
        torch.default_generator.manual_seed(hash((self.seed, self.epoch, int(index))) % 2**63)
        try:
            return self.transform(image), int(self.labels[index])
        finally:
            torch.set_rng_state(outside)


def make_transforms(args: argparse.Namespace, mean: Any, std: Any) -> tuple[T.Compose, T.Compose]:
    """For training and for evaluation. Digits are not flipped, and only shifted a little."""
    size, larger = args.image_size, round(args.image_size * 256 / 224)
    natural, digits = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()], [T.Resize(larger), T.RandomCrop(size)]
    last = [T.ToTensor(), T.Normalize(mean, std)]
    train = T.Compose([*(natural if args.data_dir else digits), *last])
    return train, T.Compose([T.Resize(larger), T.CenterCrop(size), *last])


def read_data(data_dir: Path) -> tuple[tuple[list[str], Tensor], tuple[list[str], Tensor], list[int]]:
    """Training and validation split, and how many training images each class has. Category ids may have gaps."""
    categories = sorted(category["id"] for category in read_json(data_dir, "train")["categories"])
    classes = {category: number for number, category in enumerate(categories)}
    train, val = read_split(data_dir, "train", classes), read_split(data_dir, "val", classes)
    return train, val, torch.bincount(train[1], minlength=len(classes)).tolist()


def limit(split: tuple[list[str], Tensor], size: int | None, seed: int) -> tuple[list[str], Tensor]:
    """A random part of a split."""
    files, labels = split
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:size].sort().values
    return [files[i] for i in chosen.tolist()], labels[chosen]


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
            path = data_dir / file
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8))
            pixels.resize((32, 32), Image.Resampling.BICUBIC).save(path, quality=95)
            images.append({"id": row, "file_name": file, "width": 32, "height": 32})
            annotations.append({"id": row, "image_id": row, "category_id": category["id"]})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (data_dir / f"{name}2018.json").write_text(json.dumps(content), encoding="utf-8")


def find_data(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """--data-dir, or the digits, written by the first process; their last run is forgotten if it is not resumed."""
    if args.data_dir:
        return args.data_dir
    data_dir = args.output_dir / "digits2018"
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            if data_dir.exists() and not args.resume:
                shutil.rmtree(args.output_dir / "checkpoints", ignore_errors=True)
            print(f"No --data-dir: scikit-learn's digits, made long-tailed, are written to {data_dir}", flush=True)
            write_digits(data_dir)
    return data_dir


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that training needs, prepared by Accelerate. `optimizer` is AcceleratedOptimizer, `fsr` is inside it."""

    args: argparse.Namespace
    accelerator: Accelerator
    checkpoints: Checkpoints
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    fsr: FSRWrapper | None
    scheduler: Any
    train_set: INaturalist
    train_loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    counts: list[int]

    @property
    def progress(self) -> Progress:
        return self.checkpoints.progress

    def loss(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        if self.fsr is None:
            return F.cross_entropy(logits, target, label_smoothing=self.args.label_smoothing)
        return self.fsr.loss(logits, target, index)


def lr_factor(step: int, steps_per_epoch: int, warmup: float, decays: list[int]) -> float:
    """Linear over the `warmup` epochs, then × 0.1 at each of `decays`."""
    rising = (step + 1) / (warmup * steps_per_epoch) if warmup else 1.0
    return min(1.0, rising) * 0.1 ** sum(step >= decay * steps_per_epoch for decay in decays)


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Run:
    """Model, data, optimizer, and the three lines that make it FSR."""
    import timm

    data_dir = find_data(args, accelerator)
    train, val, counts = read_data(data_dir)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(counts))
    look = timm.data.resolve_model_data_config(model)
    to_train, to_evaluate = make_transforms(args, look["mean"], look["std"])
    train_set = INaturalist(data_dir, *limit(train, args.limit, args.seed), to_train, args.seed)
    val_set = INaturalist(data_dir, *limit(val, args.limit, args.seed), to_evaluate, args.seed)
    indexed = with_index(train_set)
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "pin_memory": torch.cuda.is_available()}
    # The loader's own generator: starting an epoch then leaves the global stream, which drop-out uses, alone.
    train_loader = DataLoader(indexed, shuffle=True, generator=torch.Generator().manual_seed(args.seed), **options)
    val_loader = DataLoader(val_set, **options)

    total_batch = args.batch_size * accelerator.num_processes
    lr = args.lr * total_batch / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=args.weight_decay)
    fsr = None
    if args.method == "fsr":
        chosen = {"warmup_epochs": args.fsr_start, "label_smoothing": args.label_smoothing, "seed": args.seed}
        config = FSRConfig.preset("inat2018", **chosen)
        optimizer = fsr = FSRWrapper(model, optimizer, head=args.head, dataset=indexed, config=config)

    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    steps = len(train_loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer.optimizer, lambda step: lr_factor(step, steps, args.lr_warmup_epochs, args.decay_epochs)
    )
    scheduler = accelerator.prepare(scheduler)
    progress = Progress(get_settings(args, MAY_CHANGE, total_batch, train_set.labels), steps)
    folder = args.output_dir / "checkpoints"
    checkpoints = Checkpoints(accelerator, progress, fsr, folder, args.checkpoint_steps, args.keep)
    return Run(
        args, accelerator, checkpoints, model, optimizer, fsr, scheduler, train_set, train_loader, val_loader, counts
    )


def train_epoch(run: Run) -> None:
    """What is left of the epoch."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    run.train_set.set_epoch(progress.epoch)
    run.train_loader.set_epoch(progress.epoch)
    loader = accelerator.skip_first_batches(run.train_loader, progress.step) if progress.step else run.train_loader
    run.model.train()
    losses: list[Tensor] = []
    title = f"epoch {progress.epoch + 1}/{args.epochs}"
    bar = tqdm(loader, title, leave=False, disable=not accelerator.is_main_process)
    for x, y, index in bar:
        logits = run.model(x)
        loss = run.loss(logits, y, index)
        accelerator.backward(loss)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()

        progress.step += 1
        losses.append(loss.detach())
        if run.progress.total_steps % args.log_steps == 0:
            bar.set_postfix(loss=f"{log_training(run, losses):.3f}")
            losses.clear()
        run.checkpoints.save_in_epoch()
    progress.end_epoch()
    run.checkpoints.save()


def log_training(run: Run, losses: list[Tensor]) -> float:
    """Sends the mean of the losses and FSR's own figures to the trackers."""
    loss = torch.stack(losses).mean().item()
    values = {"train/loss": loss, "train/lr": run.optimizer.param_groups[0]["lr"]}
    run.accelerator.log({**values, **(run.fsr.metrics() if run.fsr else {})}, step=run.progress.total_steps)
    return loss


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Accuracies on the validation set, over all processes."""
    run.model.eval()
    parts = []
    for x, y in tqdm(run.val_loader, "validation", leave=False, disable=not run.accelerator.is_main_process):
        logits = run.model(x)
        part = torch.stack([topk_correct(logits, y, 1).long(), topk_correct(logits, y, 5).long(), y], dim=1)
        parts.append(run.accelerator.gather_for_metrics(part))
    top1, top5, labels = torch.cat(parts).cpu().unbind(1)
    shots = shot_accuracy(top1, labels, run.counts, run.args.many_shot, run.args.few_shot)
    return {"top1": top1.double().mean().item(), "top5": top5.double().mean().item(), **shots}


def fit(run: Run) -> dict[str, Any]:
    """Trains to the end. **Returns:** the summary."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    if run.fsr and args.fsr_start >= args.epochs:
        accelerator.print(f"Nothing will be re-weighted: --fsr-start {args.fsr_start} of {args.epochs} epochs")
    start, accuracy = time.perf_counter(), {}
    while progress.epoch < args.epochs:
        train_epoch(run)
        accuracy = evaluate(run)
        accelerator.log({f"val/{name}": value for name, value in accuracy.items()}, step=run.progress.total_steps)
        shown = ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())
        accelerator.print(f"epoch {progress.epoch}/{args.epochs}: {shown}")
    return {
        "method": args.method,
        "model": args.model,
        "epochs": progress.epoch,
        "steps": run.progress.total_steps,
        "classes": len(run.counts),
        "train_images": len(run.train_set),
        "val_images": len(run.val_loader.dataset),
        "seconds": round(time.perf_counter() - start, 1),
        **(accuracy or evaluate(run)),
    }


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / "logs")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        step_scheduler_with_optimizer=False,  # one step of the schedule a step, whatever the number of processes
    )
    set_seed(args.seed)
    try:
        run = prepare(args, accelerator)
        run.checkpoints.restore(args.resume)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"inat2018.py: {error}") from None
    if accelerator.is_main_process and run.progress.total_steps == 0:
        shutil.rmtree(accelerator.logging_dir, ignore_errors=True)
    flags = {name: str(value) for name, value in vars(args).items()}
    accelerator.init_trackers("inat2018", config=flags)
    summary = fit(run)
    if accelerator.is_main_process:
        path = args.output_dir / "summary.json"
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(summary, indent=2), f"\nwritten to {path}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
