"""Iterative noisy cross-validation, INCV ("Iterative-CV"), and Co-teaching on what it selects (Chen et al., ICML 2019).

Selection, 4 rounds: the samples not yet selected are halved at random; a fresh network learns from one half and all
selected ones, and of the other half those samples are selected whose given label it predicts; then the halves change
roles. The first round's agreement a also gives the noise rate ε, from a = (1 − ε)² + ε²/(C − 1). From each half the
round also discards, for good, the min(2, ε/(1 − ε)) samples of largest loss for each one that it selected.

Training: Co-teaching on the selected samples with the rate ε_S = ε²/(ε² + (C − 1)(1 − ε)²), ramped over 10 of 200
epochs; after 40 of 200 (80 if ε > 0.6) the samples neither selected nor discarded join the batches, up to half as many.

The selecting networks take 50 of 200 epochs, scaled to the run, with the run's recipe; in the first rounds (1 if
ε > 0.6, 2 if > 0.3, else all) the epoch that best predicts the other half's given labels is kept, as published. The
paper does not discard under asymmetric noise and keeps the best epoch in the first round alone; nobody tells us which
noise it is, so the rules are always those for symmetric noise. The batches hold what they have of the selection; the
number of steps stays.
Source: chenpf1025/noisy_label_understanding_utilizing (no licence; read for facts).
Cost: about 1 for the selection and 2 for Co-teaching. State: as Co-teaching, and the selection, 2N, and ε.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Task, evaluating, fit
from .co_teaching import CoTeaching, exchange
from .features import record_all


def noise_rate(agreement: float, num_classes: int) -> float:
    """The smallest ε, in steps of 0.001, at which (1 − ε)² + ε²/(C − 1) is at most `agreement`; at most 1."""
    rates = (step / 1000 for step in range(1, 1000))
    return next((r for r in rates if (1 - r) ** 2 + r**2 / (num_classes - 1) <= agreement), 1.0)


class INCV(CoTeaching):
    title = "Iterative-CV"
    cost = "≈ 3"
    needs_rate = False
    state = ("second", "epoch", "selected", "candidate", "rate")

    def __init__(self, task: Task, rounds: int = 4) -> None:
        super().__init__(task)
        self.rounds = rounds
        self.selected = torch.zeros(task.num_samples, dtype=torch.bool, device=task.labels.device)
        self.candidate = ~self.selected
        self.rate = 0.0

    def prepare(self) -> None:
        for number in range(1, self.rounds + 1):
            rest = self.candidate.nonzero()[:, 0]
            halves = rest[torch.randperm(len(rest), device=rest.device)].tensor_split(2)
            if min(len(half) for half in halves) < 2:
                return
            best_only = number <= (1 if self.rate > 0.6 else 2 if self.rate > 0.3 else self.rounds) or number == 1
            found = [self.judge(*pair, best_only) for pair in (halves, halves[::-1])]
            for agreeing, hardest in found:
                self.selected[agreeing] = True
                self.candidate[agreeing] = False
                self.candidate[hardest] = False

    def judge(self, learned: Tensor, judged: Tensor, best_only: bool) -> tuple[Tensor, Tensor]:
        """Of the half `judged`, the samples to select and the ones to discard."""
        task = self.task
        chosen = self.selected.nonzero()[:, 0]

        def score(model: nn.Module) -> float:
            with evaluating(model):
                hits = [model(task.inputs(part)).argmax(1) == task.labels[part] for part in judged.split(500)]
            return torch.cat(hits).float().mean().item()

        network = fit(task, torch.cat([learned, chosen]), max(1, round(task.scaled(50, 200))), score, best_only)
        logits, _ = record_all(task, network, index=judged)
        agree = logits.argmax(1) == task.labels[judged]
        if self.rate == 0:
            self.rate = noise_rate(agree.float().mean().item(), task.num_classes)
        discard = int(min(2, self.rate / max(1 - self.rate, 1e-3)) * agree.sum().item())
        losses = F.cross_entropy(logits, task.labels[judged], reduction="none").masked_fill(agree, -1)
        hardest = judged[losses.argsort(descending=True)[: min(discard, int((~agree).sum()))]]
        return judged[agree], hardest

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        own = self.selected[index].nonzero()[:, 0]
        wrong, right = self.rate**2, (self.task.num_classes - 1) * (1 - self.rate) ** 2
        keep = round(len(own) * (1 - self.dropped(wrong / (wrong + right))))
        rows = own
        if self.epoch > self.task.scaled(80 if self.rate > 0.6 else 40, 200):
            rows = torch.cat([own, self.candidate[index].nonzero()[:, 0][: len(own) // 2]])
        if keep < 2:  # BatchNorm needs two
            return F.cross_entropy(model(x), y) + F.cross_entropy(self.second(x), y)
        return exchange(model(x[rows]), self.second(x[rows]), y[rows], keep)
