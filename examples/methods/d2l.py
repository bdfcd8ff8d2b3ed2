"""Dimensionality-driven learning, D2L (Ma et al., ICML 2018).

Before every epoch, the local intrinsic dimensionality (LID) of the head's inputs is estimated on 1,280 random samples,
in groups of 128, from each one's k = 20 nearest neighbours in its group, r_1 <= ... <= r_k:

    LID = −k / Σ_j log(r_j / r_k), averaged.

It falls while the network generalises and rises when it memorises. At first the loss is cross-entropy. At the turning
point, where the LID exceeds the mean of the 5 epochs before by two of their standard deviations, the network goes back
one epoch, and from then on the labels are

    α onehot(y) + (1 − α) onehot(argmax p),  α = exp(−(epoch/epochs) · LID/min LID), anew each epoch.

The turning point is looked for from epoch 40 + 5 of 120 on, scaled to the run; the window stays at 5 epochs, or half
the epochs before that point if they are fewer. Going back is the paper's; in the released code the file that is loaded
is that of the epoch just ended. That code's later variant begins with SCE; this is the paper.
Source: the paper's abstract and xingjunm/dimensionality-driven-learning (no licence; read for facts).
Cost: 1. State: α, the LIDs, and the network of an epoch ago.
"""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task
from .features import last_linear, record_all


def lid(features: Tensor, k: int = 20) -> Tensor:
    """The LID of each of a group's samples, (n,), among the others; features (n, d)."""
    k = min(k, len(features) - 1)
    distance = torch.cdist(features, features).sort(dim=1).values[:, 1 : k + 1]
    return -k / (distance / distance[:, -1:] + 1e-8).log().sum(1)


class D2L(Method):
    title = "D2L"
    state = ("alpha", "turned", "lids", "before")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.first = round(task.scaled(40, 120))
        self.window = max(2, min(5, self.first // 2))
        self.alpha, self.turned = 1.0, False
        self.lids: list[float] = []
        self.before: dict[str, Any] = {}

    def start_epoch(self, epoch: int) -> None:
        model, head = self.task.model, last_linear(self.task.model)[1]
        index = torch.randperm(self.task.num_samples, device=self.task.labels.device)[:1280]
        _, (features,) = record_all(self.task, model, [head], index)
        groups = [group for group in features.float().split(128) if len(group) > 2]
        found = torch.cat([lid(group) for group in groups]).mean().item()
        self.lids.append(found if found > 0 and math.isfinite(found) else (self.lids or [1.0])[-1])
        if not self.turned and len(self.lids) > self.first + self.window:
            window = self.lids[-self.window - 1 : -1]
            if self.lids[-1] - statistics.mean(window) > 2 * statistics.pstdev(window):
                self.turned = True
                model.load_state_dict(self.before)
        if self.turned:
            self.alpha = math.exp(-epoch / self.task.epochs * self.lids[-1] / min(self.lids))
        else:
            self.before = copy.deepcopy(model.state_dict())

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        logits = model(x)
        predicted = F.cross_entropy(logits, logits.detach().argmax(1))
        return self.alpha * F.cross_entropy(logits, y) + (1 - self.alpha) * predicted
