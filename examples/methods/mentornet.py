"""MentorNet PD: the predefined curriculum (Jiang et al., ICML 2018), not DD, which is learned on clean labels.

    a ← 0.5 a + 0.5 · (the batch's p-th percentile of the losses), 0 at first;  δ_i = ℓ_i − a
    v_i = 1 up to 18 % of the run;  1[δ_i ≤ 0] up to 90 %;  clamp(1 − δ_i, 0, 1) afterwards
    a share of the batch, at random, gets v = 0: 50 % of it in the first 17 % of the run, 5 % afterwards
    loss = (1/b) Σ v_i ℓ_i

p = 0.75, and 0.5 at 80 % noise, as in the released commands: the rate must be told. The released weights are a small
recurrent network trained to imitate this very rule; here it is the rule itself. (The code also scales the weight decay
by the mean of v.) Epochs are percentages of the run, as published.
Source: the paper and google/mentornet (Apache 2.0; read for facts). Cost: 1. State: a and the steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task


def curriculum(losses: Tensor, average: Tensor, percent: float) -> Tensor:
    """v, (b,)."""
    if percent <= 18:
        return torch.ones_like(losses)
    over = losses - average
    return (over <= 0).to(losses) if percent < 90 else (1 - over).clamp(0, 1)


class MentorNetPD(Method):
    title = "MentorNet PD"
    needs_rate = True
    state = ("average", "step")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.percentile = 0.75 if task.noise_rate < 0.6 else 0.5
        self.average = torch.zeros((), device=task.labels.device)
        self.step = 0
        self.steps = task.epochs * max(1, task.num_samples // task.batch_size)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        percent = 100 * self.step // self.steps
        self.step += 1
        with torch.no_grad():
            self.average.lerp_(losses.float().quantile(self.percentile), 0.5)
            weights = curriculum(losses, self.average, percent)
            rate = 0.5 if percent < 17 else 0.05
            weights[torch.randperm(len(y), device=y.device)[int(len(y) * (1 - rate)) :]] = 0
        return (weights * losses).mean()
