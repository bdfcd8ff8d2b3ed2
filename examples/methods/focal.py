"""Focal loss (Lin et al., ICCV 2017), over softmax.

    (1 − p_y)^γ · CE,  γ = 2.

Source: the paper. Cost: 1. State: none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task


class Focal(Method):
    title = "focal"

    def __init__(self, task: Task, gamma: float = 2.0) -> None:
        super().__init__(task)
        self.gamma = gamma

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        return ((1 - (-losses).exp()) ** self.gamma * losses).mean()
