"""What the examples share: a kind of flag, long-tailed class sizes, top-k and few-shot accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor


def positive(text: str) -> int:
    """A whole number >= 1, for `argparse`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number >= 1")
    return value


def share(text: str) -> float:
    """A number from 0 to 1, for `argparse`."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share from 0 to 1")
    return value


def long_tail_counts(n_max: int, num_classes: int, ratio: float) -> list[int]:
    """Samples of each class under an exponential long tail: n_i = int(n_max · μ^(i/(C−1))), μ = 1/ratio."""
    if num_classes < 2 or ratio < 1:
        raise ValueError(f"A long tail takes at least 2 classes and a ratio >= 1, not {num_classes} and {ratio}.")
    return [int(n_max * ratio ** (-i / (num_classes - 1))) for i in range(num_classes)]


def topk_correct(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether the target is among the k largest logits; (b, C) and (b,) → (b,) bool. k is at most C."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == target[:, None]).any(1)


def shot_accuracy(
    correct: Tensor, labels: Tensor, train_counts: Sequence[int], many: int, few: int
) -> dict[str, float]:
    """Mean per-class accuracy of the classes with many, a medium number of, and few training samples.

    **Arguments:** `correct` (n,) bool and `labels` (n,) of the evaluation samples; `train_counts` (C,); classes above
    `many` samples are many-shot, those below `few` few-shot.

    **Returns:** `many`, `medium`, `few`; a group none of whose classes was evaluated is left out.
    """
    counts = torch.as_tensor(train_counts)
    labels = labels.cpu()
    seen = torch.bincount(labels, minlength=len(counts))
    hits = torch.bincount(labels, weights=correct.cpu().double(), minlength=len(counts))
    groups = {"many": counts > many, "medium": (counts >= few) & (counts <= many), "few": counts < few}
    groups = {name: group & (seen > 0) for name, group in groups.items()}
    return {name: (hits[group] / seen[group]).mean().item() for name, group in groups.items() if group.any()}
