"""Remix, rebalanced MixUp (Chou et al., ECCV workshops 2020).

Inputs are mixed as in MixUp with λ; the label's share λ_y goes to the rarer class whole where

    n_i/n_j ≥ κ and λ < τ:        λ_y = 0       (i, the sample's class, is the frequent one)
    n_i/n_j ≤ 1/κ and 1 − λ < τ:  λ_y = 1
    else:                         λ_y = λ

κ = 3, τ = 0.5, λ ~ Beta(1, 1). (The paper also combines it with deferred re-weighting; this is Remix alone.)
Source: the paper's abstract and ntucllab/imbalanced-DL (BSD 2-clause; read for facts). Cost: 1. State: none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Task
from .mixup import MixUp


class Remix(MixUp):
    title = "Remix"

    def __init__(self, task: Task, alpha: float = 1.0, kappa: float = 3.0, tau: float = 0.5) -> None:
        super().__init__(task, alpha)
        self.kappa, self.tau = kappa, tau
        self.counts = task.class_counts()

    def label_share(self, share: Tensor, own: Tensor, other: Tensor) -> Tensor:
        ratio = self.counts[own] / self.counts[other]
        shares = torch.where((ratio >= self.kappa) & (share < self.tau), 0.0, share)
        return torch.where((ratio <= 1 / self.kappa) & (1 - share < self.tau), 1.0, shares)
