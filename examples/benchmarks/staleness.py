"""What cached reward features lose against fresh ones: how far apart the two reward gradients and weights are.

    python examples/benchmarks/staleness.py --data-dir FASHION --cifar CIFAR --out staleness.json --plot staleness.svg

Trains with `reward="cached"` on wrong labels, and eight times an epoch stops to look: the features that the dictionary
holds against those that the network would give the same samples now. From both come the reward gradient G on the head
over the whole dictionary (Eq. 6's first factor, at φ) and the scores of the next batch, and of these

- the cosine of the two G; for comparison, that of the fresh G over q = 200 random members and over all of them, which
  is what drawing the reward batch costs anyway, and that of two fresh G whose samples went through BatchNorm in other
  company,
- Spearman's rank correlation of the two vectors of scores, and the share of samples whose weight is zero in one of them
  only,
- the cosine of old and new features, sample by sample.

The looks change nothing in the training: they run without gradients on the network as it is, in train mode on copies of
its statistics. Networks: the MLP of noisy_fashion_mnist.py on Fashion-MNIST, and a small ResNet on CIFAR-10 with real
human label errors (`--cifar`, a folder of train and test parquet files), without augmentation, so that all that differs
is the network's age. Each at three learning rates, one-cycle. The accuracies of cached and fresh training stand beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import noisy_fashion_mnist as fashion
import torch
import torch.nn.functional as F
from figures import pyplot
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import OneCycleLR

from fsr_wrap import FSRConfig, FSRWrapper, functional

LOOKS = 8  # an epoch
RATES = {"mlp": (0.02, 0.05, 0.2), "resnet": (0.02, 0.1, 0.4)}


def read_cifar(folder: Path, samples: int, seed: int) -> fashion.Data:
    """CIFAR-10 with the column `worse_label`, standardised, and 2,000 test images."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import cifar

    flags = ["--data", str(folder), "--noise", "column:worse_label", "--limit", str(samples), "--test-limit", "2000"]
    data = cifar.read(cifar.parse([*flags, "--seed", str(seed)]))
    return fashion.Data(
        cifar.standardise(data.images), data.clean, data.given, cifar.standardise(data.test_images), data.test_labels
    )


def make_network(name: str) -> tuple[nn.Module, nn.Linear]:
    """The network and its head."""
    if name == "mlp":
        model: Any = fashion.make_model()
        return model, model[-1]
    import timm

    model = timm.create_model("test_resnet", num_classes=10).to(memory_format=torch.channels_last)
    return model, model.get_classifier()


@torch.no_grad()
def features_now(model: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    """The head's input for these images, leaving the statistics of BatchNorm and the wrapper alone."""
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    functional_call(model, buffers, (x,))
    handle.remove()
    return caught[0]


def reward_gradient(head: nn.Linear, features: Tensor, label: Tensor) -> dict[str, Tensor]:
    """G over the whole dictionary, at φ."""
    residual = functional.residual(head(features), label) / len(label)
    return {"weight": residual.T @ features, "bias": residual.sum(0)}


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().float()


@torch.no_grad()
def look(model: nn.Module, head: nn.Linear, fsr: FSRWrapper, data: fashion.Data, index: Tensor) -> dict[str, float]:
    """Old against new, for the dictionary and the next batch."""
    kept = fsr.dictionary.draw(10 * len(fsr.dictionary), torch.Generator().manual_seed(0))
    _, first = torch.unique(kept.index, return_inverse=True)
    one_of_each = torch.zeros(int(first.max()) + 1, dtype=torch.long).scatter_(0, first, torch.arange(len(first)))
    members, label, old = kept.index[one_of_each], kept.label[one_of_each], kept.payload[0][one_of_each]
    chance = torch.Generator().manual_seed(len(index))
    order = torch.randperm(len(members), generator=chance)
    new, regrouped = (
        torch.cat([features_now(model, head, data.train[part]) for part in members[way].split(fashion.BATCH_SIZE)])
        for way in (torch.arange(len(members)), order)
    )
    h = features_now(model, head, data.train[index])
    residual = functional.residual(head(h), data.given[index])
    gradients = [reward_gradient(head, features, label) for features in (old, new)]
    drawn = torch.randperm(len(new), generator=chance)[:200]
    others = [reward_gradient(head, new[drawn], label[drawn]), reward_gradient(head, regrouped, label[order])]
    scores = [functional.linear_meta_gradient_along(h, residual, gradient, lr=1.0) for gradient in gradients]
    flat = [torch.cat([one["weight"].flatten(), one["bias"]]) for one in (*gradients, *others)]
    return {
        "gradient_cosine": F.cosine_similarity(*flat[:2], dim=0).item(),
        "sampling_cosine": F.cosine_similarity(flat[1], flat[2], dim=0).item(),
        "regrouped_cosine": F.cosine_similarity(flat[1], flat[3], dim=0).item(),
        "rank_correlation": torch.corrcoef(torch.stack([ranks(one) for one in scores]))[0, 1].item(),
        "zero_in_one_only": ((scores[0] > 0) != (scores[1] > 0)).float().mean().item(),
        "feature_cosine": F.cosine_similarity(old, new, dim=1).mean().item(),
    }


def epochs_of(samples: int, epochs: int, seed: int) -> Iterator[tuple[int, int, Tensor]]:
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for number, index in enumerate(torch.randperm(samples, generator=order).split(fashion.BATCH_SIZE)):
            yield epoch, number, index


def train(network: str, data: fashion.Data, lr: float, epochs: int, seed: int, reward: str) -> dict[str, Any]:
    """One run: the looks by epoch (cached only), and the accuracy at the end."""
    torch.manual_seed(seed)
    model, head = make_network(network)
    samples = len(data.train)
    steps = -(-samples // fashion.BATCH_SIZE)
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = OneCycleLR(inner, lr, epochs=epochs, steps_per_epoch=steps)
    options = {"dictionary_size": samples // 10, "reward": reward, "seed": seed}
    fsr = FSRWrapper(model, inner, head, num_samples=samples, config=FSRConfig.preset("cifar_noise"), **options)
    looks: list[dict[str, float]] = []
    for epoch, number, index in epochs_of(samples, epochs, seed):
        if reward == "cached" and epoch > 0 and number % max(1, steps // LOOKS) == steps // LOOKS // 2:
            looks.append({"epoch": epoch + number / steps, **look(model, head, fsr, data, index)})
        fsr.loss(model(data.train[index]), data.given[index], index).backward()
        fsr.step()
        fsr.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in zip(data.test.split(500), data.test_label.split(500), strict=True)]
    return {
        "lr": lr,
        "seed": seed,
        "reward": reward,
        "accuracy": torch.cat(right).float().mean().item(),
        "looks": looks,
    }


def by_rate(runs: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The first two cells of each row of a table, and the runs that belong to it."""
    for network, rows in runs.items():
        for lr in sorted({run["lr"] for run in rows}):
            yield f"| {network} | {lr} |", [run for run in rows if run["lr"] == lr]


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: medians over the looks of all seeds, and mean accuracies."""
    lines = [
        "| network | learning rate | cosine of G (lowest decile) | of 200 drawn and all | of other batches "
        "| rank correlation of scores | zero in one only | accuracy cached | fresh |",
        "|---" * 9 + "|",
    ]
    for start, mine in by_rate(runs):
        seen = {name: [one[name] for run in mine for one in run["looks"]] for name in mine[0]["looks"][0]}
        accuracy = {
            kind: statistics.mean(run["accuracy"] for run in mine if run["reward"] == kind)
            for kind in ("cached", "fresh")
        }
        middle = {name: f"{statistics.median(values):.3f}" for name, values in seen.items()}
        lowest = statistics.quantiles(seen["gradient_cosine"], n=10)[0]
        lines.append(
            f"{start} {middle['gradient_cosine']} ({lowest:.3f}) | {middle['sampling_cosine']} "
            f"| {middle['regrouped_cosine']} | {middle['rank_correlation']} | {middle['zero_in_one_only']} "
            f"| {accuracy['cached']:.4f} | {accuracy['fresh']:.4f} |"
        )
    return "\n".join(lines)


def table_by_epoch(runs: dict[str, list[dict[str, Any]]], bounds: tuple[int, ...] = (1, 4, 8, 14, 20)) -> str:
    """A Markdown table: medians over the looks of all seeds within some epochs."""
    names = ("gradient_cosine", "sampling_cosine", "regrouped_cosine", "rank_correlation", "zero_in_one_only")
    lines = [
        "| network | learning rate | epochs | cosine of G | of 200 drawn and all | of other batches "
        "| rank correlation of scores | zero in one only |",
        "|---" * 8 + "|",
    ]
    for start, mine in by_rate(runs):
        looks = [one for run in mine for one in run["looks"]]
        for first, last in pairwise(bounds):
            within = [one for one in looks if first <= one["epoch"] < last]
            cells = [f"{statistics.median(one[name] for one in within):.2f}" for name in names]
            lines.append(f"{start} {first} to {last} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_differences(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: accuracy with cached features minus with fresh ones, in points, seed by seed."""
    lines = ["| network | learning rate | cached − fresh, points, by seed | mean |", "|---" * 4 + "|"]
    for start, mine in by_rate(runs):
        found = {(run["seed"], run["reward"]): 100 * run["accuracy"] for run in mine}
        gaps = [found[seed, "cached"] - found[seed, "fresh"] for seed in sorted({seed for seed, _ in found})]
        lines.append(f"{start} {', '.join(f'{gap:+.2f}' for gap in gaps)} | {statistics.mean(gaps):+.2f} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The cosine of the two reward gradients and the rank correlation of scores, by epoch."""
    plt = pyplot()
    networks = {"mlp": "MLP", "resnet": "small ResNet"}
    measures = {"gradient_cosine": "cosine of the two gradients", "rank_correlation": "rank correlation of the scores"}
    figure, panels = plt.subplots(len(runs), 2, figsize=(9, 3.2 * len(runs)), squeeze=False, sharey=True)
    for row, (network, results) in zip(panels, runs.items(), strict=True):
        for panel, (name, title) in zip(row, measures.items(), strict=True):
            mine = [run for run in results if run["reward"] == "cached" and run["seed"] == results[0]["seed"]]
            for run, color in zip(mine, ("#2a86b8", "#c8963e", "#c8553d"), strict=True):
                epochs, values = ([one[key] for one in run["looks"]] for key in ("epoch", name))
                panel.plot(epochs, values, color=color, linewidth=1.5, label=f"learning rate {run['lr']:g}")
            panel.set(title=f"{networks[network]}: {title}", xlabel="epoch", ylim=(-0.05, 1.02))
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.3, linewidth=0.5)
        row[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def found(path: Path | None) -> bool:
    return path is not None and path.exists()


def main() -> None:
    """Runs every network, rate and seed, both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="Fashion-MNIST's IDX files; else the hub")
    parser.add_argument("--cifar", type=Path, help="folder of parquet files; without it the ResNet is left out")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=10_000, help="of Fashion-MNIST")
    parser.add_argument("--cifar-samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, help="JSON; seeds that are in it already are not run again")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = json.loads(args.out.read_text())["runs"] if found(args.out) else {}
    for network in ("mlp", "resnet") if args.cifar else ("mlp",):
        mine = runs.setdefault(network, [])
        for seed in args.seeds:
            if any(run["seed"] == seed for run in mine):
                continue
            if network == "mlp":
                full = fashion.make_data(fashion.read_images(args.data_dir), 0.4, seed)
                part = [values[: args.samples] for values in (full.train, full.clean, full.given)]
                data = fashion.Data(*part, full.test, full.test_label)
            else:
                data = read_cifar(args.cifar, args.cifar_samples, seed)
            for lr in RATES[network]:
                for reward in ("cached", "fresh"):
                    mine.append(train(network, data, lr, args.epochs, seed, reward))
                    print(network, lr, seed, reward, f"{mine[-1]['accuracy']:.4f}", flush=True)
            if args.out:
                size = [args.samples, args.cifar_samples]
                args.out.write_text(json.dumps({"epochs": args.epochs, "samples": size, "runs": runs}, indent=1))
    print(table(runs), table_by_epoch(runs), table_of_differences(runs), sep="\n\n")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
