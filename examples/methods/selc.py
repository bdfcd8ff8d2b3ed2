"""Self-ensemble label correction, SELC (Lu & He, IJCAI 2022).

    CE up to epoch e; then t_i ← 0.9 t_i + 0.1 sg(p), one-hot at first, and the loss is −Σ_c t_c log p_c.

The paper reads e off the training curve: 20 to 40 of 200 epochs. Here e = 30 of 200, scaled to the run's length.
Source: the paper and MacLLL/SELC (MIT; read for facts). Cost: 1. State: t, N×C, and the epoch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task


class SELC(Method):
    title = "SELC"
    state = ("target", "epoch")

    def __init__(self, task: Task, momentum: float = 0.9, start: float = 30 / 200) -> None:
        super().__init__(task)
        self.momentum, self.start = momentum, round(start * task.epochs)
        self.target = task.one_hot(task.labels)
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        logits = model(x)
        if self.epoch < self.start:
            return F.cross_entropy(logits, y)
        target = self.momentum * self.target[index] + (1 - self.momentum) * logits.detach().float().softmax(1)
        self.target[index] = target
        return F.cross_entropy(logits, target)
