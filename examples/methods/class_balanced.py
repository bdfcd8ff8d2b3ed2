"""Class-balanced softmax and focal losses (Cui et al., CVPR 2019).

    w_c ∝ (1 − β)/(1 − β^n_c),  β = 0.9999, normalised to sum C
    softmax:  mean of w_y · CE
    focal:    mean over the batch of w_y Σ_c (1 − s_c)^γ · BCE_c,  BCE_c = −log s_c,
              s_c = sigmoid(z_c) for the given class, 1 − sigmoid(z_c) for the others,  γ = 1

Focal is over sigmoids, as released; the head's bias starts at −log(C − 1), so that all start at 1/C. (The paper also
spares that bias the weight decay, which is the optimizer's business here.)
Source: the paper and richardaecn/class-balanced-loss (MIT; read for facts). Cost: 1. State: none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task
from .features import last_linear


def class_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """(1 − β)/(1 − β^n_c), (C,), normalised to sum C; in float64 inside, since 1 − β^n is small."""
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights / weights.sum() * len(counts)).float()


class ClassBalancedSoftmax(Method):
    title = "class-balanced softmax"

    def __init__(self, task: Task, beta: float = 0.9999) -> None:
        super().__init__(task)
        self.weights = class_weights(task.class_counts(), beta)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return (self.weights[y] * F.cross_entropy(model(x), y, reduction="none")).mean()


class ClassBalancedFocal(ClassBalancedSoftmax):
    title = "class-balanced focal"

    def __init__(self, task: Task, beta: float = 0.9999, gamma: float = 1.0) -> None:
        super().__init__(task, beta)
        self.gamma = gamma
        bias = last_linear(task.model)[1].bias
        if bias is not None:
            nn.init.constant_(bias, -math.log(max(task.num_classes - 1, 1)))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        logits = model(x).float()
        sign = 2 * self.task.one_hot(y) - 1
        log_s = F.logsigmoid(sign * logits)
        focal = (-torch.expm1(log_s)) ** self.gamma * -log_s
        return (self.weights[y] * focal.sum(1)).mean()
