"""Wrong labels, long tails, or both, on CIFAR-10/100 or any data set of small images.

    python examples/cifar.py --data DIR --noise column:worse_label --model test_resnet
    accelerate launch examples/cifar.py --noise uniform:0.4 --model resnet32            # CIFAR-10 from the hub
    accelerate launch examples/cifar.py --data uoft-cs/cifar100 --label fine_label --imbalance 50
    python examples/cifar.py --noise uniform:0.4 --model resnet32 --paper --mixup       # the paper's own recipe
    python examples/cifar.py --noise uniform:0.4 --model resnet32 --method elr          # one of examples/methods

`--data` is a data set of the Hugging Face hub, or a folder that `datasets` can read: parquet files named train* and
test*, or an imagefolder with train/ and test/. The images are decoded once, resized to `--image-size` and kept in
memory. FSR is the default configuration, or with `--paper` the preset of Table 4 for the task. The task chooses the
schedule; every choice has a flag. With `--output-dir` a run that
was stopped goes on bit for bit when it is called again with `--resume`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from checkpoints import Checkpoints, Progress, add_flags, get_settings
from common import long_tail_counts, positive, share, shot_accuracy
from methods import METHODS, Method, Task, make_method
from networks import make_network
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LambdaLR, LRScheduler
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

from fsr_wrap import FSRConfig, FSRWrapper, with_index

# The released code's asymmetric noise on CIFAR-10: truck→automobile, bird→airplane, deer→horse, cat↔dog.
CIFAR10_CONFUSIONS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
PEERS = [name for name in METHODS if not name.startswith("fsr") and name != "ce"]
MAY_CHANGE = {"data", "many_shot", "few_shot", "out", "quiet"}  # in a resumed run


@dataclass(frozen=True)
class Data:
    """uint8 images (N, 3, S, S), the given and the clean training labels, the test set, and what is kept aside for
    methods that need clean labels."""

    images: Tensor
    given: Tensor
    clean: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    aside_images: Tensor
    aside_labels: Tensor


# --- data ------------------------------------------------------------------------------------------------------------


def read(args: argparse.Namespace) -> Data:
    """Reads the data set and makes its labels wrong and its classes long-tailed, as the arguments say."""
    from datasets import load_dataset

    sets = load_dataset(args.data)
    missing = {"train", args.test_split} - set(sets)
    if missing:
        raise SystemExit(f"{args.data} has the splits {sorted(sets)}; {sorted(missing)} is missing (see --test-split).")
    train, test = sets["train"], sets[args.test_split]
    if args.label not in train.column_names:
        raise SystemExit(f"{args.data} has no column {args.label!r}, only {train.column_names}: pass --label.")
    rng = np.random.default_rng(args.seed)
    clean = np.asarray(train[args.label][:])
    num_classes = int(max(clean.max(), max(test[args.label][:]))) + 1
    order, spare = rng.permutation(len(clean)), args.clean_images
    limit = len(clean) - spare if args.limit is None else args.limit
    chosen, aside = order[:limit], order[limit : limit + spare]
    if len(aside) < spare:
        raise SystemExit(f"Of {len(clean)} images --limit {limit} leaves {len(aside)}, not --clean-images {spare}.")
    if args.imbalance > 1:
        chosen = long_tail(chosen, clean, num_classes, args.imbalance)
    chosen.sort()
    kind, _, value = args.noise.partition(":")
    given = np.asarray(train[value][:])[chosen] if kind == "column" else clean[chosen].copy()
    if kind in ("uniform", "asymmetric"):
        given = add_noise(given, kind, float(value), num_classes, rng)
    test = test if args.test_limit is None else test.select(range(min(args.test_limit, len(test))))
    return Data(
        decode(train.select(chosen), args.image_size),
        torch.tensor(given),
        torch.tensor(clean[chosen]),
        decode(test, args.image_size),
        torch.tensor(test[args.label][:]),
        num_classes,
        decode(train.select(aside), args.image_size),
        torch.tensor(clean[aside]),
    )


def decode(dataset: Any, size: int) -> Tensor:
    """All images as uint8 (N, 3, size, size)."""
    from datasets import Image

    column = next(name for name, feature in dataset.features.items() if isinstance(feature, Image))
    out = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    for row, image in enumerate(dataset.select_columns(column)):
        picture = image[column].convert("RGB")
        picture = picture if picture.size == (size, size) else picture.resize((size, size))
        out[row] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return out


def long_tail(chosen: np.ndarray, labels: np.ndarray, num_classes: int, ratio: float) -> np.ndarray:
    """The first n_i of each class (Cui et al.)."""
    per_class = [chosen[labels[chosen] == c] for c in range(num_classes)]
    counts = long_tail_counts(max(len(rows) for rows in per_class), num_classes, ratio)
    return np.concatenate([rows[:count] for rows, count in zip(per_class, counts, strict=True)])


def add_noise(labels: np.ndarray, kind: str, rate: float, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise draws from all classes, the true one included; asymmetric noise confuses alike classes."""
    hit = rng.random(len(labels)) < rate
    if kind == "uniform":
        return np.where(hit, rng.integers(num_classes, size=len(labels)), labels)
    confused = np.arange(num_classes)
    if num_classes == 10:
        confused[list(CIFAR10_CONFUSIONS)] = list(CIFAR10_CONFUSIONS.values())
    else:
        confused = (confused + 1) % num_classes
    return np.where(hit, confused[labels], labels)


def augment(images: Tensor, how: str) -> Tensor:
    """Standardised float images; `flip` mirrors half of them, `crop` also shifts each by up to 4 pixels."""
    if how != "none":
        mirrored = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if how == "crop":
        size = images.shape[3]
        rows, columns = torch.randint(9, (2, len(images), 1), device=images.device)
        span = torch.arange(size, device=images.device)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
        images = padded[batch, (rows + span)[:, :, None], (columns + span)[:, None, :]].permute(0, 3, 1, 2)
    return standardise(images)


def standardise(images: Tensor) -> Tensor:
    """uint8 to float, mean 0.5 and deviation 0.25 taken off, in the memory format that convolutions like."""
    return images.float().div_(63.75).sub_(2.0).contiguous(memory_format=torch.channels_last)


# --- recipe ----------------------------------------------------------------------------------------------------------


def make_config(args: argparse.Namespace) -> FSRConfig:
    """The default or, for the paper's recipes, the preset of Table 4 for the task; the arguments' choices on top."""
    chosen = json.loads(args.fsr) if args.fsr else {}
    if not (args.paper or args.mixup or args.deferred):
        return FSRConfig(**{"seed": args.seed, **chosen})
    noisy, long_tailed = args.noise != "none", args.imbalance > 1
    preset = {
        (True, False): "cifar_noise",
        (False, True): "cifar_long_tailed",
        (True, True): "cifar_long_tailed_noise",
        (False, False): "cifar_noise",
    }[noisy, long_tailed]
    if args.deferred:
        chosen.setdefault("warmup_epochs", first_decay(args.epochs))
    if args.mixup:
        chosen.setdefault("pusher", "authors_margin")
    return FSRConfig.preset(preset, **{"seed": args.seed, **chosen})


def first_decay(epochs: int) -> int:
    """The epoch at which the step schedule first decays: 160 of 200."""
    return round(0.8 * epochs)


def make_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Per step: cosine restarts after 1, 3, 7, … epochs; × 0.01 at 80 and 90 % after a warm-up; or one cosine."""
    if args.schedule == "restarts":
        return CosineAnnealingWarmRestarts(optimizer, T_0=steps, T_mult=2)
    if args.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps * args.epochs)
    warm, first, second = (steps * part for part in (0.025 * args.epochs, first_decay(args.epochs), 0.9 * args.epochs))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(warm, 1)) * 0.01 ** ((step >= first) + (step >= second))

    return LambdaLR(optimizer, factor)


def make_optimizer(args: argparse.Namespace, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """SGD with momentum."""
    flags = {"lr": args.lr, "weight_decay": args.weight_decay, "nesterov": args.nesterov}
    return torch.optim.SGD(parameters, momentum=0.9, **flags)


def make_peer(args: argparse.Namespace, data: Data, model: nn.Module, device: torch.device) -> Method:
    """One of the methods that FSR is compared with. It is told the true share of wrong labels if it needs that."""

    def recipe(parameters: Iterable[nn.Parameter], steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        sgd = make_optimizer(args, parameters)
        return sgd, make_schedule(args, sgd, max(1, steps // args.epochs))

    def make_model() -> nn.Module:
        return make_network(args.model, data.num_classes).to(device, memory_format=torch.channels_last)

    images = data.images
    task = Task(
        model=model,
        labels=data.given.to(device),
        num_classes=data.num_classes,
        epochs=args.epochs,
        batch_size=args.batch_size,
        inputs=lambda index: standardise(images[index.cpu()].to(device)),
        augmented=lambda index: augment(images[index.cpu()].to(device), args.augment),
        make_model=make_model,
        recipe=recipe,
        clean=(standardise(data.aside_images.to(device)), data.aside_labels.to(device)) if args.clean_images else None,
        noise_rate=(data.given != data.clean).float().mean().item(),
        noise=args.noise.partition(":")[0],
        seed=args.seed,
    )
    return make_method(args.method, task)


# --- run -------------------------------------------------------------------------------------------------------------


@dataclass
class Measured(Progress):
    """How far training is, the seed of the epoch's order, and what was measured so far."""

    order: int = 0
    curve: list[float] = field(default_factory=list)  # test accuracy after each epoch
    metrics: dict[str, float] = field(default_factory=dict)  # FSR's own in the last epoch


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, device: torch.device, peer: Method | None) -> Tensor:
    """Whether each test image is classified rightly, (n,) bool on the host."""
    predict: Callable[[Tensor], Tensor] = model if peer is None else partial(peer.predict, model)
    model.eval()
    parts = [predict(standardise(part.to(device))).argmax(1).cpu() for part in data.test_images.split(500)]
    model.train()
    return torch.cat(parts) == data.test_labels


def run(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Trains once, or what is left of it, and returns what was measured."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision, step_scheduler_with_optimizer=False)
    set_seed(args.seed)
    config = make_config(args)
    model = make_network(args.model, data.num_classes).to(accelerator.device, memory_format=torch.channels_last)
    peer = make_peer(args, data, model, accelerator.device) if args.method in PEERS else None
    if peer is not None and accelerator.num_processes > 1:
        raise SystemExit(f"--method {args.method} is for one process, not {accelerator.num_processes}.")
    inner = make_optimizer(args, [*model.parameters(), *(peer.parameters() if peer else [])])
    train_set = with_index(TensorDataset(data.images, data.given))
    fsr = FSRWrapper(model, inner, dataset=train_set, config=config) if args.method == "fsr" else None
    # Generators of its own, so that starting an epoch again leaves the global stream, which `augment` uses, alone.
    order = RandomSampler(train_set, generator=torch.Generator())
    alone = len(train_set) % args.batch_size == 1  # a last batch of one image, with which BatchNorm cannot do
    loader = DataLoader(train_set, args.batch_size, sampler=order, drop_last=alone, generator=torch.Generator())
    model, optimizer, loader = accelerator.prepare(model, fsr or inner, loader)
    schedule = accelerator.prepare(make_schedule(args, optimizer.optimizer, len(loader)))
    settings = get_settings(args, MAY_CHANGE, args.batch_size * accelerator.num_processes, data.given)
    progress = Measured(settings, len(loader))
    folder = args.output_dir and args.output_dir / "checkpoints"
    checkpoints = Checkpoints(accelerator, progress, fsr, folder, args.checkpoint_steps, args.keep)
    if peer is not None:
        peer.attach(inner)
        accelerator.register_for_checkpointing(peer)
    checkpoints.restore(args.resume)
    if peer is not None and progress.total_steps == 0:
        peer.prepare()

    epochs = range(progress.epoch, args.epochs)
    quiet = args.quiet or not accelerator.is_main_process
    bar = tqdm(epochs, initial=progress.epoch, total=args.epochs, disable=quiet, desc=args.method)
    for _ in bar:
        if progress.step == 0:
            progress.order = draw_seed()
            if peer is not None:
                peer.start_epoch(progress.epoch)
        order.generator.manual_seed(progress.order)
        for images, given, index in accelerator.skip_first_batches(loader, progress.step):
            loss = train_loss(args, config, model, fsr or peer, augment(images, args.augment), given, index)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.step += 1
            checkpoints.save_in_epoch()
        if peer is not None:
            peer.end_epoch(progress.epoch)
        progress.curve.append(evaluate(model, data, accelerator.device, peer).float().mean().item())
        progress.metrics = {} if fsr is None else fsr.metrics()
        progress.end_epoch()
        checkpoints.save()
        bar.set_postfix(test=f"{progress.curve[-1]:.4f}", best=f"{max(progress.curve):.4f}")
    correct = evaluate(model, data, accelerator.device, peer) if args.imbalance > 1 else None
    return summarise(args, data, progress, fsr, correct)


def summarise(
    args: argparse.Namespace, data: Data, progress: Measured, fsr: FSRWrapper | None, correct: Tensor | None
) -> dict[str, Any]:
    """What was measured; with `correct`, (n,) bool, also the accuracies of frequent and of rare classes."""
    curve, wrong = progress.curve, (data.given != data.clean).float().mean().item()
    result = {"method": args.method, "seed": args.seed, "last": curve[-1], "best": max(curve), "curve": curve}
    result |= {"samples": len(data.given), "wrong": wrong, "fsr": progress.metrics}
    if correct is not None:
        counts = torch.bincount(data.given, minlength=data.num_classes).tolist()
        result |= shot_accuracy(correct, data.test_labels, counts, args.many_shot, args.few_shot)
    if fsr is not None:
        members = fsr.dictionary.index.cpu()
        result["purity"] = (data.given[members] == data.clean[members]).float().mean().item()
    return result


def draw_seed() -> int:
    """A seed from the global stream: the second of two, as a `DataLoader` that shuffles would draw it itself."""
    return int(torch.empty(2, dtype=torch.int64).random_()[1])


def train_loss(
    args: argparse.Namespace,
    config: FSRConfig,
    model: nn.Module,
    method: FSRWrapper | Method | None,
    images: Tensor,
    given: Tensor,
    index: Tensor,
) -> Tensor:
    """The method's loss; without one, the cross-entropy that FSR replaces, with the same label smoothing."""
    if method is None:
        return F.cross_entropy(model(images), given, label_smoothing=config.label_smoothing)
    if isinstance(method, Method):
        return method.loss(model, images, given, index)
    target = given
    if args.mixup:
        images, target = method.mixup(images, given)
    return method.loss(model(images), target, index)


def report(result: dict[str, Any]) -> str:
    """One line a result."""
    parts = [f"{result['method']}: last {result['last']:.4f}, best {result['best']:.4f}"]
    parts += [f"{name}-shot {result[name]:.4f}" for name in ("many", "medium", "few") if name in result]
    if "purity" in result:
        parts.append(f"dictionary purity {result['purity']:.3f} ({1 - result['wrong']:.3f} of all labels are right)")
        parts.append(f"zero weights {result['fsr']['fsr/zero_weight_ratio']:.3f}")
        parts.append(f"effective sample size {result['fsr']['fsr/effective_sample_size']:.1f}")
    return ", ".join(parts)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is left open follows from the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="hub name or folder")
    parser.add_argument("--label", default="label", help="column of the clean labels")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--noise", default="none", help="none, uniform:RATE, asymmetric:RATE or column:NAME")
    parser.add_argument("--imbalance", type=float, default=1.0, help="largest class over smallest")
    parser.add_argument("--limit", type=positive, help="use this many training images, drawn by --seed")
    parser.add_argument("--test-limit", type=positive)
    parser.add_argument("--image-size", type=positive, default=32)
    parser.add_argument("--augment", choices=["none", "flip", "crop"], default="crop")
    parser.add_argument("--model", default="wrn28_10", help="resnet20, resnet32, wrn28_10 or any timm model")
    parser.add_argument("--method", choices=["fsr", "ce", *PEERS], default="fsr", help="see examples/methods")
    parser.add_argument("--clean-images", type=int, help="kept out of training for methods that need some: 1,000")
    parser.add_argument("--fsr", help='JSON of FSRConfig fields, as in \'{"pusher": "negative_loss"}\'')
    parser.add_argument("--paper", action="store_true", help="the paper's re-weighting: Table 4's preset for the task")
    parser.add_argument("--mixup", action="store_true", help="--paper with MixUp and the authors' margin, as they did")
    parser.add_argument("--deferred", action="store_true", help="--paper, from the first decay on (FSR-DF)")
    parser.add_argument("--epochs", type=positive, help="default: 127 with wrong labels, 200 for long tails alone")
    parser.add_argument("--schedule", choices=["restarts", "steps", "cosine"])
    parser.add_argument("--batch-size", type=positive, help="a process; default: 100, or 128 for long tails")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, help="default: 5e-4, or 2e-4 for long tails alone")
    parser.add_argument("--nesterov", action="store_true")
    parser.add_argument("--many-shot", type=int, default=100, help="more training samples than this are many")
    parser.add_argument("--few-shot", type=int, default=20, help="fewer are few")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--output-dir", type=Path, help="checkpoints; without it, none are written")
    add_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    kind, _, value = args.noise.partition(":")
    if kind not in ("none", "uniform", "asymmetric", "column") or (kind != "none" and not value):
        parser.error(f"--noise {args.noise}: give none, uniform:RATE, asymmetric:RATE or column:NAME")
    try:
        if kind in ("uniform", "asymmetric"):
            share(value)
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--noise {args.noise}: the rate is a share from 0 to 1")
    if args.imbalance < 1:
        parser.error(f"--imbalance {args.imbalance}: it is the largest class over the smallest, 1 or more")
    if args.output_dir is None and (args.resume or args.checkpoint_steps):
        parser.error("--resume and --checkpoint-steps need --output-dir, where the checkpoints are")
    needed = 1000 if METHODS[args.method].needs_clean else 0
    args.clean_images = needed if args.clean_images is None else args.clean_images
    if needed and not args.clean_images:
        parser.error(f"--method {args.method} needs clean images: pass --clean-images")
    tail_alone = args.imbalance > 1 and args.noise == "none"
    args.epochs = args.epochs or (200 if tail_alone else 127)
    args.schedule = args.schedule or ("steps" if tail_alone else "restarts")
    args.batch_size = args.batch_size or (128 if args.imbalance > 1 else 100)
    args.weight_decay = args.weight_decay if args.weight_decay is not None else (2e-4 if tail_alone else 5e-4)
    return args


def main() -> None:
    """Trains once and prints the result."""
    args = parse()
    result = run(args, read(args))
    if not PartialState().is_main_process:
        return
    print(report(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, **result}, indent=1))


if __name__ == "__main__":
    main()
