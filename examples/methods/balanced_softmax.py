"""Balanced softmax (Ren et al., NeurIPS 2020), which is logit adjustment (Menon et al., ICLR 2021) in the loss.

    CE(z + τ log π, y),  π_c = n_c/N,  τ = 1; z alone at evaluation.

Source: the papers. Cost: 1. State: none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task


class BalancedSoftmax(Method):
    title = "balanced softmax"

    def __init__(self, task: Task, tau: float = 1.0) -> None:
        super().__init__(task)
        counts = task.class_counts()
        self.shift = tau * (counts / counts.sum()).log()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(model(x) + self.shift, y)
