"""What the examples on files of images share: flags, data, the loop, evaluation, and the summary with its baseline."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
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
from common import positive, topk_correct
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from tqdm import tqdm

from fsr_wrap import FSRConfig, FSRWrapper, with_index

MAY_CHANGE = {"data_dir", "epochs", "workers", "log_steps"}  # in a resumed run, of the flags below
Split = tuple[list[str], Tensor]
"""The files of a split, relative to one folder, and their classes."""

# --- command line ----------------------------------------------------------------------------------------------------


def add_common_flags(
    parser: argparse.ArgumentParser, name: str, real: dict[str, Any], digits: dict[str, Any], label_smoothing: float
) -> None:
    """The flags that all these examples have.

    **Arguments:** `name` of the example; `real` and `digits`, defaults with --data-dir and without; `label_smoothing`,
    its default.
    """
    add = parser.add_argument

    def add_default(flag: str, kind: Callable[[str], Any], text: str) -> None:
        key = flag[2:].replace("-", "_")
        add(flag, type=kind, help=f"{text} (default: {real[key]}; for the digits {digits[key]})")

    add(
        "--output-dir",
        type=Path,
        help=f"checkpoints, logs, summary.json (runs/{name}, with --method ce runs/{name}-ce)",
    )
    add("--method", choices=("fsr", "ce"), default="fsr", help="re-weighting or plain cross-entropy (%(default)s)")
    add_default("--model", str, "any timm model")
    add("--pretrained", action="store_true", help="start from timm's pretrained weights")
    add("--head", default="auto", help='dotted name of the classifier in the model, or "auto" (%(default)s)')
    add_default("--image-size", positive, "side of the square the model sees")
    add_default("--epochs", positive, "epochs")
    add_default("--batch-size", positive, "images per process and step")
    add_default("--lr", float, "learning rate at a total batch of 256; scaled by batch size × processes / 256")
    add("--weight-decay", type=float, default=1e-4, help="(%(default)s)")
    add("--label-smoothing", type=float, default=label_smoothing, help="(%(default)s)")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="(default: as `accelerate config` says)")
    add("--limit", type=positive, help="use at most so many images of each split, for a smoke run")
    add_default("--workers", int, "loader processes per process")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add_flags(parser)
    add("--log-steps", type=positive, default=50, help="steps between two entries of the training log (%(default)s)")


def fill_defaults(args: argparse.Namespace, name: str, real: dict[str, Any], digits: dict[str, Any]) -> None:
    """Puts the recipe where no flag was given."""
    for key, value in (real if args.data_dir else digits).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.output_dir is None:
        args.output_dir = Path("runs", name if args.method == "fsr" else f"{name}-ce")


# --- data ------------------------------------------------------------------------------------------------------------


def check_image(path: Path) -> None:
    """**Raises:** `FileNotFoundError` if there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is listed, but missing: unpack the images, and see where --help says they lie."
        )


def check_some(root: Path, files: list[str]) -> None:
    """Checks about a hundred of the files: all of them would take minutes on a network disk."""
    for file in files[:: 1 + len(files) // 100]:
        check_image(root / file)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """The images of one split.

    Augmentation draws from a stream of its own for each seed, epoch and image, so that a run that was stopped goes on
    with the same images, whatever the number of workers and processes.
    """

    def __init__(self, root: Path, split: Split, transform: Callable[[Image.Image], Tensor], seed: int):
        self.root, (self.files, self.labels), self.transform, self.seed = root, split, transform, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / self.files[index]
        check_image(path)
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise OSError(f"{path} cannot be read as an image ({error}): replace it, or leave it out.") from error
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


def limit(split: Split, size: int | None, seed: int) -> Split:
    """A random part of a split."""
    files, labels = split
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:size].sort().values
    return [files[i] for i in chosen.tolist()], labels[chosen]


def find_data(args: argparse.Namespace, accelerator: Accelerator, name: str, write: Callable[[Path], None]) -> Path:
    """--data-dir, or the digits, written by the first process."""
    if args.data_dir:
        return args.data_dir
    data_dir = args.output_dir / name
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            print(f"No --data-dir: scikit-learn's digits are written to {data_dir}", flush=True)
            write(data_dir)
    return data_dir


def write_digit(pixels: np.ndarray, path: Path) -> None:
    """One of scikit-learn's digits, (8, 8) from 0 to 16, as an image file of 32×32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
    image.resize((32, 32), Image.Resampling.BICUBIC).save(path, quality=95)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What an example trains and evaluates on, and how.

    **Arguments:**

    - `root`, the folder of all files; `classes`, C; `train`; `val`, the validation splits by the name in the summary.
    - `config`, of FSR.
    - `lr_factor`: (step, steps per epoch) → what the learning rate is multiplied by.
    - `measure`: (rightly classified or not, labels) of a validation split → figures besides top-1 and top-5.
    - `may_change`: more flags that a resumed run may change.
    """

    root: Path
    classes: int
    train: Split
    val: dict[str, Split]
    config: FSRConfig
    lr_factor: Callable[[int, int], float]
    measure: Callable[[Tensor, Tensor], dict[str, float]] = lambda correct, labels: {}
    mixup: bool = False
    may_change: frozenset[str] = frozenset()


@dataclass
class Run:
    """All that training needs, prepared by Accelerate. `optimizer` is AcceleratedOptimizer, `fsr` is inside it."""

    args: argparse.Namespace
    accelerator: Accelerator
    task: Task
    checkpoints: Checkpoints
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    fsr: FSRWrapper | None
    scheduler: Any
    train_set: ImageFiles
    train_loader: DataLoader[Any]
    val_loaders: dict[str, DataLoader[Any]]

    @property
    def progress(self) -> Progress:
        return self.checkpoints.progress

    def loss(self, x: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """Of one forward."""
        if self.fsr is None:
            return F.cross_entropy(self.model(x), target, label_smoothing=self.args.label_smoothing)
        if self.task.mixup:
            x, target = self.fsr.mixup(x, target)
        return self.fsr.loss(self.model(x), target, index)


def prepare(args: argparse.Namespace, accelerator: Accelerator, task: Task) -> Run:
    """Model, loaders, optimizer, and the three lines that make it FSR."""
    import timm

    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=task.classes)
    look = timm.data.resolve_model_data_config(model)
    to_train, to_evaluate = make_transforms(args, look["mean"], look["std"])
    train_set = ImageFiles(task.root, task.train, to_train, args.seed)
    indexed = with_index(train_set)
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "pin_memory": torch.cuda.is_available()}
    # The loader's own generator: starting an epoch then leaves the global stream, which drop-out uses, alone.
    generator, alone = torch.Generator().manual_seed(args.seed), len(indexed) % args.batch_size == 1
    # BatchNorm cannot do with a batch of one image.
    train_loader = DataLoader(indexed, shuffle=True, drop_last=alone, generator=generator, **options)
    val_sets = {name: ImageFiles(task.root, split, to_evaluate, args.seed) for name, split in task.val.items()}

    total_batch = args.batch_size * accelerator.num_processes
    lr = args.lr * total_batch / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=args.weight_decay)
    fsr = None
    if args.method == "fsr":
        optimizer = fsr = FSRWrapper(model, optimizer, head=args.head, dataset=indexed, config=task.config)

    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    val_loaders = {name: accelerator.prepare(DataLoader(val_set, **options)) for name, val_set in val_sets.items()}
    steps = len(train_loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: task.lr_factor(step, steps))
    scheduler = accelerator.prepare(scheduler)
    settings = get_settings(args, MAY_CHANGE | task.may_change, total_batch, train_set.labels)
    folder = args.output_dir / "checkpoints"
    checkpoints = Checkpoints(accelerator, Progress(settings, steps), fsr, folder, args.checkpoint_steps, args.keep)
    if not args.data_dir and not args.resume:
        checkpoints.forget()  # of the digits' last run
    return Run(
        args, accelerator, task, checkpoints, model, optimizer, fsr, scheduler, train_set, train_loader, val_loaders
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
        loss = run.loss(x, y, index)
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
    """Accuracies on the validation sets, over all processes."""
    run.model.eval()
    out = {}
    for name, loader in run.val_loaders.items():
        parts = []
        for x, y in tqdm(loader, "validation", leave=False, disable=not run.accelerator.is_main_process):
            logits = run.model(x)
            part = torch.stack([topk_correct(logits, y, 1).long(), topk_correct(logits, y, 5).long(), y], dim=1)
            parts.append(run.accelerator.gather_for_metrics(part))
        top1, top5, labels = torch.cat(parts).cpu().unbind(1)
        figures = {"top1": top1.double().mean().item(), "top5": top5.double().mean().item()}
        figures |= run.task.measure(top1, labels)
        out |= {f"{name}_{key}" if name else key: value for key, value in figures.items()}
    return out


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
    sizes = {f"{name or 'val'}_images": len(loader.dataset) for name, loader in run.val_loaders.items()}
    return {
        "method": args.method,
        "model": args.model,
        "epochs": progress.epoch,
        "steps": run.progress.total_steps,
        "classes": run.task.classes,
        "train_images": len(run.train_set),
        **sizes,
        "seconds": round(time.perf_counter() - start, 1),
        **(accuracy or evaluate(run)),
    }


def beside(args: argparse.Namespace, summary: dict[str, Any]) -> str:
    """The summary of the other method's run beside this one's, or how to get it."""
    folder, other = args.output_dir.resolve(), {"fsr": "ce", "ce": "fsr"}[args.method]
    sibling = folder.with_name(f"{folder.name}-ce" if other == "ce" else folder.name.removesuffix("-ce"))
    path = sibling / "summary.json"
    if sibling == folder or not path.is_file():
        return f"For the figures of --method {other} beside these, run the same with it and --output-dir {sibling}."
    theirs = json.loads(path.read_text(encoding="utf-8"))
    differing = [key for key, value in summary.items() if isinstance(value, int | str) and theirs.get(key) != value]
    differing = [key for key in differing if key != "method"]
    if differing:
        return f"{path} is of another run, with another {', '.join(differing)}: nothing to compare these figures with."
    lines = [f"{'':>16}  {args.method:>8}  {other:>8}"]
    for key, value in summary.items():
        if isinstance(value, float) and isinstance(theirs.get(key), float):
            lines.append(f"{key:>16}  {value:8.4g}  {theirs[key]:8.4g}")
    return "\n".join(lines)


def launch(name: str, args: argparse.Namespace, define: Callable[[argparse.Namespace, Accelerator], Task]) -> None:
    """Sets Accelerate up, trains, and writes summary.json."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / "logs")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        step_scheduler_with_optimizer=False,  # one step of the schedule a step, whatever the number of processes
    )
    set_seed(args.seed)
    try:
        run = prepare(args, accelerator, define(args, accelerator))
        run.checkpoints.restore(args.resume)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    if accelerator.is_main_process and run.progress.total_steps == 0:
        shutil.rmtree(Path(accelerator.logging_dir, name), ignore_errors=True)
    accelerator.init_trackers(name, config={key: str(value) for key, value in vars(args).items()})
    summary = fit(run)
    if accelerator.is_main_process:
        path = args.output_dir / "summary.json"
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(summary, indent=2), f"\nwritten to {path}\n{beside(args, summary)}")
    accelerator.end_training()
