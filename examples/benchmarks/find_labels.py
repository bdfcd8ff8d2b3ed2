"""Which labels are wrong: FSR's list from one training, against cleanlab's from five and signals of a plain training.

    python examples/benchmarks/find_labels.py --out DIR --fashion DIR --cifar DIR [--cases fashion] [--seeds 0 1 2]
    python examples/benchmarks/find_labels.py --out DIR --table [--pack FILE]

Cases, networks and schedules are those of `compare.py`. The methods:

- *FSR*: `label_issues()` of one training at the default.
- *cleanlab, five folds*: five trainings of cross-entropy, each on four fifths of the samples, give every sample
  probabilities of a network that was not trained on it; from them cleanlab's self-confidence and normalised margin, and
  what its `find_label_issues` flags. Once with the case's epochs, and once with a third of them, where less is learned
  by heart; of the two the better one by AUROC is shown, which favours it.
- *threshold samples* (Pleiss et al., NeurIPS 2020): N/(C + 1) samples get a class of their own as their label; samples
  whose mean margin over the epochs is below the 99th percentile of theirs are flagged. The threshold samples themselves
  are judged by a second training, with others in their place.
- *one plain training*: the mean margin of all samples, for ranking only, the loss at the last epoch, how often a label
  was learned and forgotten (Toneva et al., ICLR 2019), and a vote of the ten nearest samples by the last layer's input
  (as SimiFeat, Zhu et al., ICML 2022).

AUROC and average precision rank wrong labels before right ones; *flagged* is the number flagged over the number wrong.
Each run writes a JSON file of its own; two processes with the same command share the work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases import BATCH_SIZE, CASES, Case, Data, get_transforms, make_case_network, make_data, make_recipe
from compare import claim, find_cases, load, run_or_show, write
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fsr_wrap import FSRWrapper

FOLDS, NEIGHBOURS, QUANTILE = 5, 10, 0.99
METHODS = ("fsr", "plain", "aum", "folds")
TITLES = {
    "fsr": "FSR, one training",
    "self_confidence": "cleanlab, five folds: self-confidence",
    "normalized_margin": "cleanlab, five folds: normalised margin",
    "threshold_samples": "mean margin and threshold samples",
    "margin": "plain training: mean margin",
    "loss": "plain training: last loss",
    "forgetting": "plain training: forgetting",
    "neighbours": "plain training: nearest neighbours",
}
COSTS = {"fsr": "1", "self_confidence": "5", "normalized_margin": "5", "threshold_samples": "2"}


class Trained:
    """A training of cross-entropy or FSR on some of the samples, and what was seen of each sample on the way."""

    def __init__(
        self,
        case: Case,
        data: Data,
        chosen: Tensor,
        epochs: int,
        seed: int,
        *,
        with_fsr: bool = False,
        more_classes: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.case, self.data = case, data
        self.model = make_case_network(case, case.classes + more_classes, data.start)
        self.fsr: FSRWrapper | None = None
        self.margins = torch.zeros(len(data.given))
        self.events, self.learned = torch.zeros(len(data.given)), torch.zeros(len(data.given), dtype=torch.bool)
        steps = max(1, len(chosen) // BATCH_SIZE)
        optimizer, schedule = make_recipe(case, self.model.parameters(), epochs * steps)
        if with_fsr:
            self.fsr = FSRWrapper(self.model, optimizer, num_samples=len(data.given), seed=seed)
        augmented = get_transforms(case)[0]
        for _ in range(epochs):
            for part in torch.randperm(len(chosen)).tensor_split(steps):
                index = chosen[part]
                y = data.given[index]
                logits = self.model(augmented(data.images[index]))
                loss = F.cross_entropy(logits, y) if self.fsr is None else self.fsr.loss(logits, y, index)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                self.note(logits.detach(), y, index, epochs)

    def note(self, logits: Tensor, y: Tensor, index: Tensor, epochs: int) -> None:
        """The margin of the given label, and whether it was known before and is not now."""
        margin = margins(logits, y)
        self.margins[index] += margin / epochs
        right = margin > 0
        self.events[index] += (self.learned[index] & ~right).float()
        self.learned[index] = right

    @torch.no_grad()
    def predict(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (n, C) and the last layer's input (n, d), without augmentation."""
        plain, features = get_transforms(self.case)[1], []
        last = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
        handle = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        self.model.eval()
        logits = torch.cat([self.model(plain(self.data.images[part])) for part in index.split(1000)])
        handle.remove()
        return logits.softmax(1), torch.cat(features)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """The label's logit minus the largest other one, (b,)."""
    return logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def above_threshold(margin: Tensor, threshold_samples: Tensor) -> Tensor:
    """By how much each margin is above that of nearly all threshold samples (indices)."""
    return margin - margin[threshold_samples].quantile(QUANTILE)


def vote(features: Tensor, given: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """How many of a sample's nearest others, by the angle, have its label; as a share, (N,)."""
    features, votes = F.normalize(features), []
    for start in range(0, len(features), 1000):
        near = features[start : start + 1000] @ features.T
        near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -torch.inf
        label = given[near.topk(neighbours).indices]
        votes.append((label == given[start : start + 1000, None]).float().mean(1))
    return torch.cat(votes)


def measure(quality: Tensor, wrong: Tensor, flagged: Tensor | None = None) -> dict[str, float]:
    """How well low quality tells wrong labels, and what is flagged. On clean labels only the share that is flagged."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    out: dict[str, float] = {}
    if wrong.any():
        out["auroc"] = float(roc_auc_score(wrong.numpy(), -quality.numpy()))
        out["average_precision"] = float(average_precision_score(wrong.numpy(), -quality.numpy()))
    if flagged is not None:
        hits, number = int((flagged & wrong).sum()), int(flagged.sum())
        out |= {"flagged": number / len(wrong), "precision": hits / max(1, number)}
        if wrong.any():
            out |= {"recall": hits / int(wrong.sum()), "flagged_to_wrong": number / int(wrong.sum())}
    return out


def run_fsr(case: Case, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    """The list of `label_issues()`."""
    trained = Trained(case, data, torch.arange(len(data.given)), epochs, seed, with_fsr=True)
    assert trained.fsr is not None
    issues = trained.fsr.label_issues()
    wrong = data.given != data.right
    quality, flagged = (torch.tensor(issues[name].to_numpy()) for name in ("label_quality", "is_label_issue"))
    out = measure(quality, wrong, flagged)
    by_class = [
        measure(quality[data.given == c], wrong[data.given == c], flagged[data.given == c]) for c in data.given.unique()
    ]
    return {"fsr": {**out, "by_class": by_class}}


def run_plain(case: Case, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    """What one training of cross-entropy tells."""
    everyone = torch.arange(len(data.given))
    trained = Trained(case, data, everyone, epochs, seed)
    probability, features = trained.predict(everyone)
    own = probability.gather(1, data.given[:, None])[:, 0]
    never = (~trained.learned).float() * epochs
    signals = {
        "margin": trained.margins,
        "loss": own,
        "forgetting": -trained.events - never,
        "neighbours": vote(features, data.given),
    }
    wrong = data.given != data.right
    return {name: measure(quality, wrong) for name, quality in signals.items()}


def run_aum(case: Case, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    """The rule of the area under the margin, with two trainings' threshold samples."""
    everyone, number = torch.arange(len(data.given)), len(data.given) // (case.classes + 1)
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed))
    found = []
    for chosen in (order[:number], order[number : 2 * number]):
        relabelled = replace(data, given=data.given.index_fill(0, chosen, case.classes))
        trained = Trained(case, relabelled, everyone, epochs, seed, more_classes=1)
        found.append(above_threshold(trained.margins, chosen))
    quality = found[0].index_copy(0, order[:number], found[1][order[:number]])
    wrong = data.given != data.right
    return {"threshold_samples": measure(quality, wrong, quality <= 0)}


def run_folds(case: Case, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    """cleanlab on out-of-sample probabilities: each of its two scores at the better of two lengths."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    wrong, found = data.given != data.right, []
    fold = torch.arange(len(data.given)) % FOLDS
    fold = fold[torch.randperm(len(fold), generator=torch.Generator().manual_seed(seed))]
    for length in (epochs, max(1, epochs // 3)):
        probability = torch.empty(len(data.given), case.classes)
        for number in range(FOLDS):
            trained = Trained(case, data, (fold != number).nonzero()[:, 0], length, seed)
            out = (fold == number).nonzero()[:, 0]
            probability[out] = trained.predict(out)[0]
        labels, probs = data.given.numpy(), probability.numpy().astype(np.float64)
        probs /= probs.sum(1, keepdims=True)
        flagged = torch.tensor(find_label_issues(labels, probs, n_jobs=1))
        result = {}
        for method in ("self_confidence", "normalized_margin"):
            quality = torch.tensor(get_label_quality_scores(labels, probs, method=method))
            result[method] = {**measure(quality, wrong, flagged), "epochs": length}
        found.append(result)
    best: dict[str, Any] = {}
    for method in found[0]:
        best[method] = max((result[method] for result in found), key=lambda one: one.get("auroc", -one["flagged"]))
    return best


RUN = {"fsr": run_fsr, "plain": run_plain, "aum": run_aum, "folds": run_folds}


def run_all(args: argparse.Namespace) -> None:
    """All runs that are not there."""
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, split, key, name in product(args.seeds, args.splits, args.cases, args.methods):
        path = args.out / f"{key}_{name}_split{split}_seed{seed}.json"
        with claim(path) as mine:
            if not mine:
                continue
            case = CASES[key]
            data = make_data(case, args.fashion if case.source == "fashion" else args.cifar, split, seed)
            result = RUN[name](case, data, case.epochs, seed)
            setting = {"case": key, "run": name, "split": split, "seed": seed, "wrong": data.wrong}
            write(path, {**setting, "results": result})
            print(
                path.stem, {method: one.get("auroc", one.get("flagged")) for method, one in result.items()}, flush=True
            )


def read_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of a folder or a packed file that the flags name."""
    found = [
        run
        for run in load(args.out)
        if run["case"] in args.cases and run["run"] in args.methods
        if run["seed"] in args.seeds and run["split"] in args.splits
    ]
    return sorted(found, key=lambda run: (list(CASES).index(run["case"]), run["run"], run["seed"], run["split"]))


def table(runs: list[dict[str, Any]]) -> str:
    """Two Markdown tables: AUROC and average precision by case, and what is flagged."""
    cases = list(dict.fromkeys(run["case"] for run in runs))
    values: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        for method, one in run["results"].items():
            values.setdefault((method, run["case"]), []).append(one)

    def cell(method: str, case: str, name: str) -> str:
        found = [one[name] for one in values.get((method, case), []) if name in one]
        return f"{statistics.mean(found):.3f}" if found else ""

    noisy = [case for case in cases if any(run["wrong"] > 0 for run in runs if run["case"] == case)]
    methods = [method for method in TITLES if any((method, case) in values for case in cases)]
    titles = [CASES[case].title for case in noisy]
    lines = [
        "| AUROC (average precision) | trainings | " + " | ".join(titles) + " | mean |",
        "|---" * (len(noisy) + 3) + "|",
    ]
    for method in methods:
        cells = [f"{cell(method, case, 'auroc')} ({cell(method, case, 'average_precision')})" for case in noisy]
        cells = ["" if one == " ()" else one for one in cells]
        means = []
        for name in ("auroc", "average_precision"):
            all_cases = [cell(method, case, name) for case in noisy]
            means.append(f"{statistics.mean(map(float, all_cases)):.3f}" if all(all_cases) else "")
        mean = f"{means[0]} ({means[1]})" if all(means) else ""
        lines.append("| " + " | ".join([TITLES[method], COSTS.get(method, "1"), *cells, mean]) + " |")
    lines += [
        "",
        "| flagged / wrong (precision, recall) | " + " | ".join(titles) + " | flagged where all labels are right |",
    ]
    lines.append("|---" * (len(noisy) + 2) + "|")
    flagging = {"fsr": "FSR", "self_confidence": "cleanlab", "threshold_samples": "threshold samples"}
    for method, title in ((method, title) for method, title in flagging.items() if method in methods):
        cells = []
        for case in noisy:
            parts = [cell(method, case, name) for name in ("flagged_to_wrong", "precision", "recall")]
            cells.append(f"{parts[0]} ({parts[1]}, {parts[2]})" if all(parts) else "")
        clean = [cell(method, case, "flagged") for case in cases if case not in noisy]
        cells.append(", ".join(f"{float(one):.1%}" for one in clean if one))
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, or shows what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, a JSON file each")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's IDX files; default: the hub")
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10N as train.parquet and test.parquet")
    parser.add_argument("--cases", nargs="+", default=[""], help=f"names or their beginnings, of {', '.join(CASES)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pack", type=Path, help="write all runs that the flags name into one JSON file")
    args = parser.parse_args()
    args.cases = find_cases(parser, args.cases)
    run_or_show(args, run_all, read_runs, table)


if __name__ == "__main__":
    main()
