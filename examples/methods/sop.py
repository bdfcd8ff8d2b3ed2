"""Sparse over-parameterization, SOP (Liu et al., ICML 2022), without the consistency and balance terms of SOP+.

    U = clamp(u²·y, 0, 1),  V = clamp(v²·(1 − y), 0, 1)           y one-hot, u (N, 1), v (N, C) ~ N(0, 1e-8)
    CE(y, q) + ‖onehot(argmax z) + U − V − y‖² / b,  q = max(p + U − sg(V), 1e-4) normalised
    u ← u − lr_u ∂/∂u,  v ← v − lr_v ∂/∂v  by SGD without momentum.

lr_u = lr_v = 10 (the paper's for CIFAR-10; 1 and 10 for CIFAR-100). Where noise is asymmetric lr_u is a tenth of it and
lr_v ten times as large (as released for CIFAR-100: 0.1 and 100). Where the prediction is not the given label, v of
the predicted class grows by the factor 1 + 4 lr_v/b a visit: from 1e-8 to 1 takes about 70 visits, of the paper's 120
epochs. In a short run nothing would happen, so that the rates are scaled, which is our choice and not the paper's: the
factor's power over the run is that of 120 epochs at b = 128. lr_u is scaled alike, though u grows by the cross-entropy
besides.
Source: the paper and shengliu66/SOP (MIT; read for facts). Cost: 1. State: u and v, N(C + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Method, Task

EPOCHS, BATCH = 120, 128  # of the runs for which the rates were published


class SOP(Method):
    title = "SOP"
    state = ("u", "v")

    def __init__(self, task: Task, lr_u: float | None = None, lr_v: float | None = None, scale: bool = True) -> None:
        super().__init__(task)
        factor = 10.0 if task.noise == "asymmetric" else 1.0
        lr_u = (10.0 if task.num_classes <= 10 else 1.0) / factor if lr_u is None else lr_u
        lr_v = 10.0 * factor if lr_v is None else lr_v
        self.lr_u, self.lr_v = (self.rescale(lr) if scale else lr for lr in (lr_u, lr_v))
        device = task.labels.device
        self.u = torch.randn(task.num_samples, 1, device=device) * 1e-8
        self.v = torch.randn(task.num_samples, task.num_classes, device=device) * 1e-8

    def rescale(self, lr: float) -> float:
        """The rate at which 1 + 4 lr/b to the power of this run's epochs is what it was over 120 epochs at b = 128."""
        growth = (1 + 4 * lr / BATCH) ** (EPOCHS / self.task.epochs)
        return (growth - 1) * self.task.batch_size / 4

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        logits = model(x)
        label = self.task.one_hot(y)
        u, v = self.u[index].requires_grad_(), self.v[index].requires_grad_()
        more, less = (u**2 * label).clamp(0, 1), (v**2 * (1 - label)).clamp(0, 1)
        q = (logits.float().softmax(1) + more - less.detach()).clamp(min=1e-4)
        q = (q / q.sum(1, keepdim=True)).clamp(1e-4, 1)
        predicted = self.task.one_hot(logits.detach().argmax(1))
        squared = (predicted + more - less - label).square().sum() / len(y)
        loss = -(label * q.log()).sum(1).mean() + squared
        with torch.no_grad():
            grad_u, grad_v = torch.autograd.grad(loss, (u, v), retain_graph=True)
            self.u[index] = u - self.lr_u * grad_u
            self.v[index] = v - self.lr_v * grad_v
        return loss
