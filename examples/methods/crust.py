"""CRUST, coresets for robust training (Mirzasoleiman et al., NeurIPS 2020).

Before every epoch but the first few (5 of 120, scaled to the run), each class is cut to half: greedy facility location
on the gradients of the samples' losses by the head's input, g_i = (p_i − y_i) W,

    S ← S ∪ argmax_j Σ_i max_{k ∈ S ∪ j} s_ik,  s_ij = max distance − ‖g_i − g_j‖.

Training then sees S alone, each input mixed with one of its class in S, x̃ = λ x + (1 − λ) x', λ ~ Beta(1, 0.1).
The paper weighs a medoid by the samples that are near it; in the released code "near" is a distance of 2 between
gradients of a batch's *mean* loss, which takes in the whole class, so that all weights of a class are the same. So
here: a sample weighs what its class does there, its number of samples, over the batch's sum.
The batches hold what they have of S, half on average; the number of steps stays.
Source: the paper's abstract and snap-stanford/crust (MIT; read for facts). Cost: a forward pass over the data an epoch
and the selection, but half the samples a step. State: S, N, and the class weights.
"""

from __future__ import annotations

import heapq

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task
from .features import last_linear, record_all
from .mixup import draw


def facility_location(similarity: np.ndarray, budget: int) -> list[int]:
    """Greedy maximisation of Σ_i max_{j ∈ S} s_ij, by lazy evaluation: gains only shrink. `similarity` (n, n) >= 0."""
    nearest = np.zeros(len(similarity), similarity.dtype)
    heap = [(-gain, j) for j, gain in enumerate(similarity.sum(0).tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < budget:
        _, j = heapq.heappop(heap)
        gain = float(np.maximum(similarity[j] - nearest, 0).sum())
        if not heap or gain >= -heap[0][0]:
            chosen.append(j)
            np.maximum(nearest, similarity[j], out=nearest)
        else:
            heapq.heappush(heap, (-gain, j))
    return chosen


class CRUST(Method):
    title = "CRUST"
    cost = "≈ 1"
    state = ("kept", "selecting")

    def __init__(self, task: Task, share: float = 0.5) -> None:
        super().__init__(task)
        self.share, self.warmup = share, max(1, round(task.scaled(5, 120)))
        self.kept = torch.ones(task.num_samples, dtype=torch.bool, device=task.labels.device)
        self.selecting = False
        self.counts = task.class_counts()

    def start_epoch(self, epoch: int) -> None:
        self.selecting = epoch >= self.warmup
        if not self.selecting:
            return
        logits, _ = record_all(self.task, self.task.model)
        residual = logits.float().softmax(1) - self.task.one_hot(self.task.labels)
        gradients = residual @ last_linear(self.task.model)[1].weight.detach().float()
        self.kept.fill_(False)
        for cls in range(self.task.num_classes):
            rows = (self.task.labels == cls).nonzero()[:, 0]
            distance = torch.cdist(gradients[rows], gradients[rows])
            if len(rows):
                similarity = (distance.max() - distance).cpu().numpy()
                self.kept[rows[facility_location(similarity, max(1, int(self.share * len(rows))))]] = True

    def partners(self, y: Tensor) -> Tensor:
        """For each sample one of its class in S, drawn at random."""
        kept = self.kept.nonzero()[:, 0]
        labels = self.task.labels[kept]
        order = labels.argsort(stable=True)
        sizes = torch.bincount(labels, minlength=self.task.num_classes)
        first = sizes.cumsum(0) - sizes
        return kept[order[first[y] + (torch.rand(len(y), device=y.device) * sizes[y]).long()]]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        kept = self.kept[index]
        if not self.selecting or kept.sum() < 2:  # BatchNorm needs two
            return F.cross_entropy(model(x), y)
        x, y = x[kept], y[kept]
        share, _ = draw(x, 1.0, 0.1)
        x = share * x + (1 - share) * self.task.augmented(self.partners(y))
        weights = self.counts[y] / self.counts[y].sum()
        return (weights * F.cross_entropy(model(x), y, reduction="none")).sum()
