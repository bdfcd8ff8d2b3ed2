"""F-correction, the forward correction with an estimated noise matrix (Patrini et al., CVPR 2017).

    −log (pᵀ T)_y,  T_ij = probability that class i was labelled j.

T comes from a first network, trained by cross-entropy on the given labels for as long; 10 % of the samples are held out
and the epoch of the lowest loss on them is taken, as in the released code. Row i of T is what that network says of the
sample that it finds most like class i: above the 97th percentile samples are passed over as outliers, if each class has
more samples than that (the released code does so but for CIFAR-100, whose classes have a hundredth of them).
Source: the paper and giorgiop/loss-correction (no licence; read for facts). Cost: 2, the first network's.
State: T, C×C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task, evaluating, fit
from .features import record_all


def estimate(p: Tensor, percentile: float | None) -> Tensor:
    """T, (C, C), rows summing to 1, from predictions p (N, C)."""
    rows = []
    for cls in range(p.shape[1]):
        column = p[:, cls]
        if percentile is not None:
            column = column.where(column < column.quantile(percentile, interpolation="higher"), 0)
        rows.append(p[column.argmax()])
    found = torch.stack(rows)
    return found / found.sum(1, keepdim=True)


class ForwardCorrection(Method):
    title = "F-correction"
    cost = "2"
    state = ("matrix",)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.matrix = torch.eye(task.num_classes, device=task.labels.device)

    def prepare(self) -> None:
        task = self.task
        order = torch.randperm(task.num_samples, device=task.labels.device)
        held_out, rest = order.tensor_split([max(1, task.num_samples // 10)])

        def score(model: nn.Module) -> float:
            with evaluating(model):
                return -F.cross_entropy(model(task.inputs(held_out)), task.labels[held_out]).item()

        logits, _ = record_all(task, fit(task, rest, task.epochs, score))
        smallest = task.class_counts().min().item() / task.num_samples
        self.matrix.copy_(estimate(logits.softmax(1), 0.97 if smallest > 1 - 0.97 else None))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        p = model(x).float().softmax(1) @ self.matrix
        return F.nll_loss(p.clamp(min=1e-7).log(), y)
