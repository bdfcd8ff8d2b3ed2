"""Generalized cross-entropy (Zhang & Sabuncu, NeurIPS 2018), plain and truncated.

    GCE = (1 − p_y^q)/q,  q = 0.7 (between cross-entropy, q → 0, and the mean absolute error, q = 1).

Truncated: w_i (GCE − (1 − k^q)/q), k = 0.5. From epoch 40 of 120 on, every 10 epochs, the network looks at all samples
and w_i becomes 1[p_y > k]: samples that it does not believe leave the loss. Both counts are scaled to the run's length.
The paper asks the network of the best validation epoch, and the code named below that of the best test epoch; here it
is the present one, as nothing is held out.

Source: the paper and AlanChou/Truncated-Loss (by others; no licence; read for facts). Cost: 1; truncated, a forward
pass over the data every 10 epochs besides. State: w, N.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Method, Task
from .features import record_all


def gce(logits: Tensor, y: Tensor, q: float) -> Tensor:
    """(1 − p_y^q)/q, (b,). As 1 − exp(q log p_y), so that its gradient is finite at p_y = 0."""
    log_p = logits.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -torch.expm1(q * log_p) / q


class GCE(Method):
    title = "GCE"

    def __init__(self, task: Task, q: float = 0.7) -> None:
        super().__init__(task)
        self.q = q

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return gce(model(x), y, self.q).mean()


class TruncatedGCE(GCE):
    title = "GCE, truncated"
    state = ("kept",)

    def __init__(self, task: Task, q: float = 0.7, k: float = 0.5) -> None:
        super().__init__(task, q)
        self.k = k
        self.start, self.every = round(task.scaled(40, 120)), max(1, round(task.scaled(10, 120)))
        self.kept = torch.ones(task.num_samples, device=task.labels.device)

    def start_epoch(self, epoch: int) -> None:
        if epoch >= self.start and (epoch - self.start) % self.every == 0:
            logits, _ = record_all(self.task, self.task.model)
            believed = logits.softmax(1).gather(1, self.task.labels[:, None])[:, 0] > self.k
            self.kept.copy_(believed)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        at_k = (1 - self.k**self.q) / self.q
        return (self.kept[index] * (gce(model(x), y, self.q) - at_k)).mean()
