"""Early-learning regularization, ELR (Liu et al., NeurIPS 2020).

    p ← clamp(softmax(z), 1e-4, 1 − 1e-4);  t_i ← β t_i + (1 − β) sg(p / Σp), zeros at first;
    CE + λ · mean log(1 − ⟨t_i, p⟩).

The gradient pulls p to what the network thought of the sample earlier on. β = 0.7, λ = 3 for 10 classes or fewer,
0.9 and 7 for more (the paper's, for CIFAR-10 and CIFAR-100; its 0.9 and 1 for asymmetric noise on CIFAR-10 did worse on
Fashion-MNIST than 0.7 and 3: 0.67 against 0.84).
Source: the paper and shengliu66/ELR (MIT; read for facts). Cost: 1. State: t, N×C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task


class ELR(Method):
    title = "ELR"
    state = ("target",)

    def __init__(self, task: Task, beta: float | None = None, weight: float | None = None) -> None:
        super().__init__(task)
        published = (0.7, 3.0) if task.num_classes <= 10 else (0.9, 7.0)
        self.beta = published[0] if beta is None else beta
        self.weight = published[1] if weight is None else weight
        self.target = torch.zeros(task.num_samples, task.num_classes, device=task.labels.device)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        logits = model(x)
        p = logits.float().softmax(1).clamp(1e-4, 1 - 1e-4)
        seen = p.detach()
        target = self.beta * self.target[index] + (1 - self.beta) * seen / seen.sum(1, keepdim=True)
        self.target[index] = target
        return F.cross_entropy(logits, y) + self.weight * (1 - (target * p).sum(1)).log().mean()
