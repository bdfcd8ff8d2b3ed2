"""Co-teaching (Han et al., NeurIPS 2018).

Two networks; each trains on the (1 − R) b samples of the batch that the *other* finds easiest (smallest cross-entropy):

    R = ε · min(1, epoch/T),  ε the share of wrong labels, which must be told,  T = 10 of 200 epochs, scaled to the run.

The first network is evaluated. The released code divides the mean loss by the number of samples once more, which Adam
does not notice; here it is the mean.
Source: the paper and bhanML/Co-teaching (no licence; read for facts). Cost: 2. State: the second network and the epoch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task


def exchange(first: Tensor, second: Tensor, y: Tensor, keep: int) -> Tensor:
    """Both networks' mean losses, summed, each on the `keep` samples that the other finds easiest; logits (b, C)."""
    with torch.no_grad():
        easiest = [F.cross_entropy(z, y, reduction="none").argsort()[:keep] for z in (first, second)]
    return F.cross_entropy(first[easiest[1]], y[easiest[1]]) + F.cross_entropy(second[easiest[0]], y[easiest[0]])


class CoTeaching(Method):
    title = "Co-teaching"
    cost = "2"
    needs_rate = True
    state = ("second", "epoch")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.second = task.make_model()
        self.ramp = max(1.0, task.scaled(10, 200))
        self.epoch = 0

    def parameters(self) -> list[nn.Parameter]:
        return list(self.second.parameters())

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def dropped(self, rate: float) -> float:
        """R in this epoch."""
        return rate * min(1.0, self.epoch / self.ramp)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        keep = max(1, int((1 - self.dropped(self.task.noise_rate)) * len(y)))
        return exchange(model(x), self.second(x), y, keep)
