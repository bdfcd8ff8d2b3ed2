"""Which classes are mistaken for which in the given labels, more often than the network mistakes them itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .relabel import PseudoLabels
from .shares import anchors

_STEPS = 30  # of the fit
_LEAST = 1e-12


@dataclass(frozen=True)
class Confusions:
    """How often each label is given to samples of each other class, as a ratio to what would be expected.

    Expected is E_ga = v_g u_a (1 + r_ga): that wrong labels come as classes look alike. The ratio is (k + n)/(k + E),
    its mean given n, if n is Poisson-distributed and the ratio a Gamma variable of mean 1 and variance 1/k.

    **Arguments:** `label` g and `other` a, the pairs of which there are any, (m,) int64, with `found` n and `alike` r,
    (m,) float64, see `log_ratio`; `label_effect` v and `class_effect` u (C,) float64; `concentration` k.
    """

    label: Tensor
    other: Tensor
    found: Tensor
    alike: Tensor
    label_effect: Tensor
    class_effect: Tensor
    concentration: float

    @classmethod
    def fit(cls, found: tuple[Tensor, Tensor], alike: tuple[Tensor, Tensor], classes: int) -> Confusions | None:
        """Finds v and u, for which E has the sums of n by label and by class (iterative proportional fitting; as under
        quasi-independence, Goodman, 1968), and k by the method of moments: Σ (n − E)² = Σ E + Σ (v u)² r + Σ E²/k,
        as r is Poisson-distributed too.

        **Arguments:** of each sample that counts in n, and in r, its label and its other class; (·,) int64 on the host.

        **Returns:** None if n is no farther from E than chance has it.
        """
        keys = [label * classes + other for label, other in (found, alike)]
        key, place = torch.cat(keys).unique(return_inverse=True)
        n, r = (torch.bincount(part, minlength=len(key)).double() for part in place.split([len(keys[0]), len(keys[1])]))
        label, other = key // classes, key % classes

        def by(group: Tensor, value: Tensor) -> Tensor:
            return torch.bincount(group, value, minlength=classes)

        u = v = torch.ones(classes, dtype=torch.float64, device="cpu")
        for _ in range(_STEPS):
            v = by(label, n) / (u.sum() - u + by(label, r * u[other])).clamp(min=_LEAST)
            u = by(other, n) / (v.sum() - v + by(other, r * v[label])).clamp(min=_LEAST)
        base = v[label] * u[other]
        squares = v.square().sum() * u.square().sum() - (v * u).square().sum()  # of E, first as if r were 0
        squares = squares + (base.square() * (2 * r + r.square())).sum()
        by_chance = n.sum() + (base.square() * r).sum()
        excess = n.square().sum() - 2 * (n * base * (1 + r)).sum() + squares - by_chance
        return cls(label, other, n, r, v, u, float(squares / excess)) if squares > 0 and excess > 0 else None

    def log_ratio(self, label: Tensor) -> Tensor:
        """Of some labels (n,), each once, and each other class, (n, C) float32; on the labels' device."""
        classes, device = len(self.label_effect), label.device
        place = torch.full((classes,), -1, dtype=torch.int64, device=device)
        place[label] = torch.arange(len(label), device=device)
        row, column = place[self.label.to(device)], self.other.to(device)
        mine = row >= 0
        where, k = (row[mine], column[mine]), self.concentration
        n, r = (torch.zeros(len(label), classes, dtype=torch.float32, device=device) for _ in range(2))
        n[where], r[where] = self.found.float().to(device)[mine], self.alike.float().to(device)[mine]
        v, u = self.label_effect.float().to(device), self.class_effect.float().to(device)
        return ((k + n) / (k + v[label, None] * u * (1 + r))).log()


def log_ratio(
    average: PseudoLabels,
    given: Tensor,
    confidence: Tensor,
    predicted: Tensor,
    rival: Tensor,
    log_prior: Tensor | None = None,
) -> Tensor:
    """How much likelier each label is if it is wrong than if it is right, by what else the network makes of the sample.

    Where the network predicts a label g and thinks of a class a besides, the label may be right: of those labels g
    which it predicts, r_ga have a as the likeliest other class. Or the sample is of class a and was given g: of the
    samples that it is surest are of class a, n_ga were. If no shirt is ever given as a coat, a label of a coat is right
    though the network thinks of a shirt. `Confusions` compares n with r, and says nothing where they go together.

    **Arguments:** `given` (n,) int64, of the first n samples, −1 where there is none; their `confidence`, `predicted`
    and `rival`, and `log_prior`, as in `PseudoLabels.read`. On the host.

    **Returns:** (n,) float32, the mean of the logarithm over all other classes as likely as p̄ has them. 0 where there
    are none, and if there is nothing to tell.
    """
    known = (given >= 0) & (confidence > 0)
    agrees = predicted == given
    wrong, right = anchors(confidence, predicted, known) & ~agrees, known & agrees & (confidence < 1)
    pairs = (given[wrong], predicted[wrong]), (given[right], rival[right])
    confusions = Confusions.fit(*pairs, average.num_classes)
    out = torch.zeros_like(confidence)
    if confusions is None:
        return out
    for where, values in average.parts():
        label = given[where].clamp(min=0).to(values.device)
        other = values[: len(label)]
        if log_prior is not None:
            other = other * log_prior.to(values.device).exp()
        other = other.scatter(1, label[:, None], 0)
        some, place = label.unique(return_inverse=True)
        mean = (other * confusions.log_ratio(some)[place]).sum(1) / other.sum(1).clamp(min=_LEAST)
        out[where] = mean.cpu()
    return out
