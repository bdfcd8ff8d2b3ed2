"""timm's pieces in a small loop, with FSR behind one flag.

    torchrun --nproc-per-node 4 examples/timm_train.py --data-dir /data/imagenet --model resnet50 --amp --fsr
    python examples/timm_train.py --fsr                # scikit-learn's digits, 40 % of their labels wrong: a minute

Data sets, loader, augmentation, mixing, optimizer, schedule, averaged weights and checkpoints are timm's, and so are
the names of the flags. `--fsr` is in four places, marked FSR.
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from image_files import write_digit
from timm.data import Mixup, create_dataset, resolve_data_config
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    ModelEmaV3,
    accuracy,
    dispatch_clip_grad,
    init_distributed_device,
    is_primary,
    random_seed,
    reduce_tensor,
)
from torch import Tensor, nn

from fsr_wrap import FSRWrapper
from fsr_wrap.integrations.timm import create_loader

DIGITS = {
    **{"model": "test_resnet", "img_size": 32, "num_classes": 10, "epochs": 20, "batch_size": 50, "workers": 0},
    **{"opt": "sgd", "lr": 0.1, "warmup_epochs": 2, "no_aug": True},
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--fsr", action="store_true", help="re-weighting, in place of plain cross-entropy")
    add("--data-dir", help="root of the data set; without it, digits are written to --output")
    add("--dataset", default="", help='as timm names them: "" for folders, "hfds/...", "torch/..." (%(default)r)')
    add("--train-split", default="train")
    add("--val-split", default="validation")
    add("--model", default="resnet50")
    add("--pretrained", action="store_true")
    add("--num-classes", type=int)
    add("--img-size", type=int)
    add("--batch-size", type=int, default=128, help="per process")
    add("--epochs", type=int, default=300)
    add("--warmup-epochs", type=int, default=5)
    add("--sched", default="cosine")
    add("--opt", default="sgd")
    add("--lr", type=float, default=0.1)
    add("--weight-decay", type=float, default=2e-5)
    add("--layer-decay", type=float)
    add("--clip-grad", type=float)
    add("--no-aug", action="store_true")
    add("--aa", help="auto-augmentation, rand-m9-mstd0.5-inc1 say")
    add("--reprob", type=float, default=0.0)
    add("--mixup", type=float, default=0.0)
    add("--cutmix", type=float, default=0.0)
    add("--smoothing", type=float, default=0.1)
    add("--model-ema", action="store_true")
    add("--model-ema-decay", type=float, default=0.9998)
    add("--amp", action="store_true", help="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=4)
    add("--seed", type=int, default=42)
    add("--output", type=Path, default=Path("runs/timm"))
    add("--resume", help="path of a checkpoint, as --output has them")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; those of the digits, where there is no data set, stand unless another is given."""
    parser = build_parser()
    if not parser.parse_known_args(argv)[0].data_dir:
        parser.set_defaults(**DIGITS)
    return parser.parse_args(argv)


def write_digits(root: Path, noise: float = 0.4) -> None:
    """scikit-learn's digits in a folder a class; of the training images a share lies in wrong folders."""
    from sklearn.datasets import load_digits

    digits, random = load_digits(), np.random.default_rng(0)
    order = random.permutation(len(digits.target))
    for place, row in enumerate(order.tolist()):
        label, split = int(digits.target[row]), "validation" if place < 500 else "train"
        if split == "train" and random.random() < noise:
            label = (label + int(random.integers(1, 10))) % 10
        write_digit(digits.images[row], root / split / str(label) / f"{row:04d}.png")


def main(args: argparse.Namespace) -> float:
    """Trains. **Returns:** the accuracy at the end, in percent."""
    device = init_distributed_device(args)
    random_seed(args.seed, args.rank)
    if not args.data_dir:
        args.data_dir = args.output / "digits"
        if is_primary(args) and not args.data_dir.exists():
            partial = args.output / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            write_digits(partial)
            partial.rename(args.data_dir)  # whole or not at all

    model = create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes).to(device)
    look = resolve_data_config({"img_size": args.img_size}, model=model)
    shape = {key: look[key] for key in ("interpolation", "mean", "std", "crop_pct")}
    common: dict[str, Any] = {**shape, "num_workers": args.workers, "persistent_workers": args.workers > 0}
    common |= {"distributed": args.distributed, "device": device}
    train_set = create_dataset(args.dataset, root=args.data_dir, split=args.train_split, is_training=True)
    val_set = create_dataset(args.dataset, root=args.data_dir, split=args.val_split)
    for split, dataset in ((args.train_split, train_set), (args.val_split, val_set)):
        if not args.dataset and Path(dataset.reader.root) == Path(args.data_dir):  # timm then takes all there is
            raise SystemExit(f"{args.data_dir} has no folder {split!r}: see --train-split and --val-split.")
    augment = {"no_aug": args.no_aug, "auto_augment": args.aa, "re_prob": args.reprob}
    loader = create_loader(train_set, look["input_size"], args.batch_size, is_training=True, **common, **augment)  # FSR
    val_loader = create_loader(val_set, look["input_size"], args.batch_size, **common)
    if not len(loader):
        raise SystemExit(f"{len(train_set)} training images are less than one batch: lower --batch-size.")
    mix = None
    if args.mixup or args.cutmix:
        mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)

    groups = {"weight_decay": args.weight_decay, "layer_decay": args.layer_decay}
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, momentum=0.9, **groups)
    if args.fsr:  # FSR
        options = {"samples_per_epoch": loader.samples_per_epoch, "label_smoothing": 0.0 if mix else args.smoothing}
        optimizer = FSRWrapper(model, optimizer, dataset=train_set, **options)
    start = (resume_checkpoint(model, args.resume, optimizer) or 0) if args.resume else 0
    schedule, epochs = create_scheduler_v2(
        optimizer, args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, updates_per_epoch=len(loader)
    )
    schedule.step(start)
    ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
    if ema and args.resume:
        load_checkpoint(ema.module, args.resume, use_ema=True)
    saver = None
    if is_primary(args):
        args.output.mkdir(parents=True, exist_ok=True)
        saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(args.output), max_history=2)
        best = args.output / "model_best.pth.tar"
        if args.resume and best.is_file():
            saved = torch.load(best, map_location="cpu", weights_only=False)
            saver.best_metric, saver.best_epoch = saved["metric"], saved["epoch"]
    network = nn.parallel.DistributedDataParallel(model) if args.distributed else model

    top1 = 0.0
    for epoch in range(start, epochs):
        if args.distributed:
            loader.sampler.set_epoch(epoch)
        train_epoch(args, network, loader, optimizer, mix, ema)
        schedule.step(epoch + 1)
        top1 = evaluate(args, ema.module if ema else model, val_loader)
        if is_primary(args):
            found = f", {optimizer.metrics()['fsr/zero_weight_ratio']:.0%} of the weight taken away" if args.fsr else ""
            print(f"epoch {epoch + 1}/{epochs}: top-1 {top1:.1f}{found}", flush=True)
        if saver:
            saver.save_checkpoint(epoch, metric=top1)
    return top1


def autocast(args: argparse.Namespace) -> Any:
    return torch.autocast(args.device.split(":")[0], torch.bfloat16) if args.amp else nullcontext()


def train_epoch(args: argparse.Namespace, network: nn.Module, loader: Any, optimizer: Any, mix: Any, ema: Any) -> None:
    network.train()
    for images, label, index in loader:  # FSR
        inputs, target = mix(images, label) if mix else (images, label)
        with autocast(args):
            output = network(inputs)
            if args.fsr:  # FSR
                loss = optimizer.loss(output, target, index, label=label)
            else:
                loss = F.cross_entropy(output, target, label_smoothing=0.0 if mix else args.smoothing)
        loss.backward()
        if args.clip_grad:
            dispatch_clip_grad(network.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update(network)


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: nn.Module, loader: Any) -> float:
    """Top-1 in percent."""
    model.eval()
    meter = AverageMeter()
    for images, label, _ in loader:
        with autocast(args):
            top1: Tensor = accuracy(model(images), label)[0]
        meter.update(float(reduce_tensor(top1, args.world_size) if args.distributed else top1), len(label))
    return float(meter.avg)


if __name__ == "__main__":
    main(parse_args())
