"""How many labels of each class are wrong, by the samples that the network is surest of; how likely each is right."""

from __future__ import annotations

import torch
from torch import Tensor

_ANCHORS, _FEW_ANCHORS = 0.2, 20  # the surest samples of each predicted class: a share, and so many if there are
_STEPS = 5  # of EM
_TELL_LITTLE = 10  # anchors, at which a class's share is half its own and half that of all
_SHARPNESS = 4.0  # by which averaged log-odds are multiplied, as several visits tell more than one
_HALVINGS = 50  # of the interval in which the log-odds are at which a label is as likely right as wrong
_SURE, _FAR = 1e8, 20.0  # in log-odds: more is as good as it, as where a mask shuts a class; beyond all others


def anchors(confidence: Tensor, predicted: Tensor, seen: Tensor) -> Tensor:
    """The samples that the network is surest of, of each class that it predicts, (N,) bool.

    **Arguments:** `confidence` and `predicted` (N,), the largest averaged probability and its class; `seen` (N,) bool,
    who may be one. On the host.
    """
    confidence, group = confidence[seen], predicted[seen]
    number = torch.bincount(group)
    enough = torch.maximum((number * _ANCHORS).long(), number.clamp(max=_FEW_ANCHORS))
    sure = torch.zeros_like(seen)
    sure[seen] = rank_within(-confidence, group) < enough[group]
    return sure


def wrong_shares(predicted: Tensor, prior: Tensor, given: Tensor, seen: Tensor, sure: Tensor) -> Tensor:
    """The share of wrong labels among the samples of each given class, (C,), from those the network is surest of.

    The surest of each predicted class c are taken to be of class c (anchor points; Patrini et al., CVPR 2017, take one,
    here it is a fifth of them). How their given labels are distributed is P(given g | true c), with one right label
    more than there are. The sizes of the true classes are then those that make the given labels likeliest: EM, from
    `prior` on. By Bayes P(true c | given g) follows, and the share is 1 − P(true g | given g). A class of few anchors
    takes part of the share of all.

    **Arguments:** `predicted` (N,), the class of the largest averaged probability; `prior` (C,), the mean of the
    averaged probabilities; `given` (N,), labels; `seen` (N,) bool, who counts; `sure` (N,) bool, the anchors among
    them. On the host.
    """
    classes = len(prior)
    label = given[seen]
    count = torch.bincount(label, minlength=classes).double() / max(1, len(label))
    predicted, given = predicted[sure], given[sure]
    number = torch.bincount(predicted, minlength=classes)

    def given_from(size: Tensor) -> tuple[Tensor, Tensor]:
        """Of true classes of these sizes, how much one anchor stands for, and how many labels of each class come."""
        each = size / (number + 1)
        return each, each + torch.bincount(given, each[predicted], minlength=classes)

    size = prior.double()
    for _ in range(_STEPS):
        each, mass = given_from(size)
        ratio = count / mass.clamp(min=1e-12)
        size = each * (ratio + torch.bincount(predicted, ratio[given], minlength=classes))
    each, mass = given_from(size)
    right = given[predicted == given]
    own = each + torch.bincount(right, each[right], minlength=classes)
    overall = 1 - own.sum() / mass.sum().clamp(min=1e-12) if len(given) else 0.0
    shares = 1 - own / mass.clamp(min=1e-12)
    return ((number * shares + _TELL_LITTLE * overall) / (number + _TELL_LITTLE)).float()


def likely_right(score: Tensor, label: Tensor, share: Tensor) -> Tensor:
    """How likely each label is right, (n,) float64: σ(4 (score − t)), on average 1 − the share of the label's class.

    **Arguments:** `score` (n,), log-odds; `label` (n,) int64; `share` (C,), the wrong ones. On the host.
    """
    right = score = score.double().clamp(-_SURE, _SURE)
    if not len(score):
        return right
    number = torch.bincount(label, minlength=len(share)).clamp(min=1)
    low, high = (score.min() - _FAR).repeat(len(share)), (score.max() + _FAR).repeat(len(share))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        right = torch.sigmoid(_SHARPNESS * (score - middle[label]))
        too_few = torch.bincount(label, right, minlength=len(share)) / number < 1 - share.double()
        low, high = torch.where(too_few, low, middle), torch.where(too_few, middle, high)
    return right


def rank_within(value: Tensor, group: Tensor) -> Tensor:
    """The place of each value among those of its group, from the smallest on. (n,) and (n,) int64 → (n,)."""
    order = value.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    number = torch.bincount(group)
    first = (number.cumsum(0) - number)[group[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) - first)
