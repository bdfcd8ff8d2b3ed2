"""MixUp (Zhang et al., ICLR 2018).

    x̃ = λ x + (1 − λ) x',  λ CE(z̃, y) + (1 − λ) CE(z̃, y'),  λ ~ Beta(α, α), one a batch, x' a shuffle of the batch.

α = 1, as released for CIFAR; 8 where labels are known to be wrong (the paper's Section 3.4 finds large ones better
there, 8 or 32).
Source: the paper. Cost: 1. State: none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from .base import Method, Task


def draw(x: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """λ ~ Beta(alpha, beta), a scalar, and a permutation of the batch."""
    return Beta(alpha, beta).sample().to(x.device), torch.randperm(len(x), device=x.device)


class MixUp(Method):
    title = "MixUp"

    def __init__(self, task: Task, alpha: float | None = None) -> None:
        super().__init__(task)
        published = 1.0 if task.noise in (None, "none") else 8.0
        self.alpha = published if alpha is None else alpha

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        share, partner = draw(x, self.alpha, self.alpha)
        logits = model(share * x + (1 - share) * x[partner])
        weight = self.label_share(share, y, y[partner])
        own, other = (F.cross_entropy(logits, label, reduction="none") for label in (y, y[partner]))
        return (weight * own + (1 - weight) * other).mean()

    def label_share(self, share: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """The share of each sample's own label; `own`, `other` (b,)."""
        return share
