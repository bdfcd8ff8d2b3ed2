"""RoG, a robust generative classifier on a trained network's features (Lee et al., ICML 2019).

Training is cross-entropy. After the last epoch, at each of several depths (averaged over space), a Gaussian a class
with a common covariance is fitted robustly, by an approximate minimum covariance determinant:

1. mean of a random 70 % of each class, and the pooled covariance of those;
2. of each class, the 70 % of smallest Mahalanobis distance under 1; their mean, and their covariance; the covariances
   averaged by class size.

Each depth is then a linear classifier, softmax(μ Σ⁻¹ h − μ Σ⁻¹ μ/2), and the answer is Σ_l w_l of it. The weights,
a softmax of one parameter a depth, are learned on 50 samples a class set aside, of which the half is kept whose given
labels are the likeliest at the last depth (negative log-likelihood, Adam 0.02, 20 epochs, b = 50). The published code
sets aside images of the test set for that and makes their labels noisy; here they come from the training set, and only
the fit of the Gaussians leaves them out.

Before the last epoch the network itself is evaluated.
Source: pokaxpoka/RoGNoisyLabel (no licence; read for facts). Cost: 1, and a forward pass over the data at the end.
State: the classifiers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Task
from .features import record, record_all, stages

KEPT = 0.7


def covariance(x: Tensor) -> Tensor:
    """Of rows around their mean, divided by their number."""
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def robust_gaussians(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Class means (C, d) and the precision of the common covariance (d, d); float64."""
    features = features.double()
    classes = [features[labels == cls] for cls in range(num_classes)]
    classes = [rows if len(rows) else features for rows in classes]  # nothing is known of an empty class
    sizes = torch.tensor([len(rows) for rows in classes], dtype=features.dtype, device=features.device)
    share = (sizes / sizes.sum())[:, None, None]
    numbers = [max(1, int(KEPT * len(rows))) for rows in classes]
    sampled = [
        rows[torch.randperm(len(rows), device=rows.device)[:n]] for rows, n in zip(classes, numbers, strict=True)
    ]
    precision = torch.linalg.pinv((share * torch.stack([covariance(rows) for rows in sampled])).sum(0), hermitian=True)
    trimmed = []
    for rows, sample, number in zip(classes, sampled, numbers, strict=True):
        off = rows - sample.mean(0)
        trimmed.append(rows[((off @ precision) * off).sum(1).argsort()[:number]])
    pooled = (share * torch.stack([covariance(rows) for rows in trimmed])).sum(0)
    return torch.stack([rows.mean(0) for rows in trimmed]), torch.linalg.pinv(pooled, hermitian=True)


def linear_classifier(means: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) of the Gaussians' posterior under equal priors; float32."""
    weight = means @ precision
    return weight.float(), (-0.5 * (weight * means).sum(1)).float()


class RoG(Method):
    title = "RoG"
    state = ("classifiers", "shares")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.stages = stages(task.model)
        self.classifiers: list[tuple[Tensor, Tensor]] = []
        self.shares: list[float] = []

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def end_epoch(self, epoch: int) -> None:
        if epoch == self.task.epochs - 1:
            self.fit()

    def fit(self) -> None:
        """The classifiers and their shares."""
        labels, classes = self.task.labels, self.task.num_classes
        _, depths = record_all(self.task, self.task.model, self.stages)
        order = torch.randperm(len(labels), device=labels.device)
        aside, rest = order.tensor_split([min(50 * classes, len(labels) // 4)])
        gaussians = [robust_gaussians(features[rest], labels[rest], classes) for features in depths]
        self.classifiers = [linear_classifier(*gaussian) for gaussian in gaussians]
        means, precision = gaussians[-1]
        off = depths[-1][aside].double() - means[labels[aside]]
        likely = aside[((off @ precision) * off).sum(1).argsort()[: len(aside) // 2]]
        answers = torch.stack([self.answer(layer, features[likely]) for layer, features in enumerate(depths)])
        self.shares = self.learn_shares(answers, labels[likely])

    def answer(self, layer: int, features: Tensor) -> Tensor:
        """softmax at one depth, (n, C)."""
        weight, bias = (value.to(features.device) for value in self.classifiers[layer])
        return (features.float() @ weight.T + bias).softmax(1)

    @staticmethod
    def learn_shares(answers: Tensor, labels: Tensor) -> list[float]:
        """w, one a depth; answers (depths, n, C)."""
        free = torch.ones(len(answers), device=answers.device, requires_grad=True)
        adam = torch.optim.Adam([free], lr=0.02)
        for _ in range(20):
            for rows in torch.randperm(len(labels), device=labels.device).split(50):
                mixed = (free.softmax(0)[:, None, None] * answers[:, rows]).sum(0)
                F.nll_loss((mixed + 1e-10).log(), labels[rows]).backward()
                adam.step()
                adam.zero_grad()
        return free.detach().softmax(0).tolist()

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        if not self.classifiers:
            return model(x)
        _, depths = record(model, x, self.stages)
        return torch.stack([share * self.answer(n, depths[n]) for n, share in enumerate(self.shares)]).sum(0)
