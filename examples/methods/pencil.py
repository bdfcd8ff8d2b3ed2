"""PENCIL, probabilistic end-to-end noise correction (Yi & Wu, CVPR 2019).

Every sample has label logits ỹ, 10·onehot(y) at first, and ŷ = softmax(ỹ).

    epochs 1–70 of 320:    CE(z, y)
    epochs 71–200:         KL(p‖ŷ)/C + 0.4·CE(softmax of ŷ as logits, y) + 0.1·H(p)/C,  ỹ ← ỹ − 600 ∂/∂ỹ
    epochs 201–320:        KL(p‖ŷ)/C, ŷ fixed

The means run over b·C, as in the released code, which also puts ŷ through a second softmax in the middle term.
The ends of the stages are scaled to the run's length; the step of 600, a visit's, is not. (Multiplied by 320/epochs it
carries a label over in one visit, on one prediction of a network that is still learning: at 10 epochs half of all
labels changed at once, and the result was worse than cross-entropy's.) In a short run labels then soften more than they
change, and much of the effect is that of KL(p‖ŷ), which forgives a wrong label more than cross-entropy does.
The published rates (0.06 and 0.06, then 0.2 falling) belong to the division by C; the run's own schedule is used here,
and the loss of the later stages times C, so that a step has its usual size.
Source: the paper and yikun2019/PENCIL (no licence; read for facts). Cost: 1. State: ỹ, N×C, and the epoch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from .base import Method, Task


class PENCIL(Method):
    title = "PENCIL"
    state = ("label_logits", "epoch")

    def __init__(self, task: Task, alpha: float = 0.4, beta: float = 0.1, step: float = 600.0) -> None:
        super().__init__(task)
        self.alpha, self.beta, self.step = alpha, beta, step
        self.first, self.second = round(task.scaled(70, 320)), round(task.scaled(200, 320))
        self.label_logits = 10 * task.one_hot(task.labels)
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        logits = model(x)
        if self.epoch < self.first:
            return F.cross_entropy(logits, y)
        classes = self.task.num_classes
        log_p = logits.float().log_softmax(1)
        own = self.label_logits[index].requires_grad_(self.epoch < self.second)
        loss = (log_p.exp() * (log_p - own.log_softmax(1))).mean()
        if self.epoch < self.second:
            entropy = -(log_p.exp() * log_p).mean()
            loss = loss + self.alpha * F.cross_entropy(own.softmax(1), y) + self.beta * entropy
            (moved,) = grad(loss, own, retain_graph=True)
            self.label_logits[index] = own.detach() - self.step * moved
        return classes * loss
