"""LDAM-DRW, label-distribution-aware margins with deferred re-weighting (Cao et al., NeurIPS 2019).

    CE(s·(z − m_y onehot(y)), y),  m_c = 0.5·n_c^(−1/4) / max_j n_j^(−1/4),  s = 30
    z = cosines of feature and class vector: the head is replaced by a normalised one, without bias
    class-balanced weights (β = 0.9999, over their sum in the batch) from 160 of 200 epochs on, scaled to the run.

The released class vectors have length 1 at first; these are longer, which made no difference on Fashion-MNIST's tails.
Source: the paper and kaidic/LDAM-DRW (MIT; read for facts). Cost: 1. State: the epoch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task
from .class_balanced import class_weights
from .features import last_linear


class CosineHead(nn.Module):
    """Cosines of the feature and C class vectors."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(head.weight).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class LDAM(Method):
    title = "LDAM-DRW"
    state = ("epoch",)

    def __init__(self, task: Task, max_margin: float = 0.5, scale: float = 30.0) -> None:
        super().__init__(task)
        name, head = last_linear(task.model)
        parent, _, child = name.rpartition(".")
        setattr(task.model.get_submodule(parent), child, CosineHead(head))
        counts = task.class_counts()
        margins = counts**-0.25
        self.margins, self.scale = max_margin * margins / margins.max(), scale
        self.weights, self.start = class_weights(counts), round(task.scaled(160, 200))
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        margin = self.margins[y][:, None] * self.task.one_hot(y)
        weights = self.weights if self.epoch >= self.start else None
        return F.cross_entropy(self.scale * (model(x) - margin), y, weight=weights)
