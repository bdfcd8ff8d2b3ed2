"""What the averaged predictions say of each label: from all C values of a sample, or from the K that are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .confusions import log_ratio
from .functional import distribution
from .memory import Memory
from .relabel import Largest

_CHUNK = 2**22  # pairs of classes compared at once


@dataclass(frozen=True)
class Opinion:
    """What the network thinks of the given labels, (N,) each, on the host.

    **Arguments:** `own`, the averaged probability of the given label; `rival`, the likeliest other class; `predicted`,
    the likeliest of all; `doubted`, whether that is another class; `confident`, whether another class is as likely as
    it is on average for the samples that were given it (confident learning; Northcutt et al., JAIR 2021). `against`:
    once labels are judged, `log_ratio`, which `own`, `doubted` and `predicted` take into account; else 0.
    """

    own: Tensor
    rival: Tensor
    predicted: Tensor
    doubted: Tensor
    confident: Tensor
    against: Tensor


class AllOf:
    """Averaged predictions of some samples: `values` (n, C), rows that sum to 1."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def sum(self) -> Tensor:
        """Of each class, (C,) float64."""
        return self._values.double().sum(0)

    def own(self, label: Tensor) -> Tensor:
        """Of a class of each sample, (n,)."""
        return self._values.gather(1, label[:, None])[:, 0]

    def likeliest(self, besides: Tensor | None = None) -> Tensor:
        """The likeliest class, besides one of each sample, (n,)."""
        values = self._values if besides is None else self._values.scatter(1, besides[:, None], -1)
        return values.argmax(1)

    def surest(self, least: Tensor) -> Tensor:
        """The likeliest of those classes that are at least as likely as `least` (C,) says, (n,); −1 if none is."""
        value, label = torch.where(self._values >= least, self._values, 0).max(1)
        return torch.where(value > 0, label, -1)


class LargestOf:
    """As `AllOf`, of `values` of the `classes`, (n, K) each; of any other class c, `rest`·`weight`_c, (n,) and (C,)."""

    def __init__(self, classes: Tensor, values: Tensor, rest: Tensor, weight: Tensor) -> None:
        self._classes, self._values, self._rest, self._weight = classes, values, rest, weight
        self._order = weight.argsort(descending=True, stable=True)  # the likeliest of what is not stored first

    def sum(self) -> Tensor:
        more = self._values.double() - self._rest[:, None] * self._weight[self._classes]
        others = self._rest.double().sum() * self._weight
        return others.double().index_add(0, self._classes.flatten(), more.flatten())

    def own(self, label: Tensor) -> Tensor:
        stored = torch.where(self._classes == label[:, None], self._values, -1).amax(1)
        return torch.where(stored < 0, self._rest * self._weight[label], stored)

    def likeliest(self, besides: Tensor | None = None) -> Tensor:
        # Of the K + 2 likeliest of those of which nothing is known, one at least is neither stored nor `besides`.
        few = self._order[: self._classes.shape[1] + 2]
        values, taken = self._values, (few[:, None] == self._classes[:, None]).any(2)
        if besides is not None:
            values = torch.where(self._classes == besides[:, None], -1, values)
            taken = taken | (few == besides[:, None])
        other = few[taken.byte().argmin(1)]
        other_value = torch.where(taken.all(1), -1, self._rest * self._weight[other])
        return self._better(values, other, other_value)

    def surest(self, least: Tensor) -> Tensor:
        values = torch.where(self._values >= least[self._classes], self._values, 0)
        # Of the others, in the order in which a growing `rest` lifts them to what is asked: the likeliest so far.
        asked, order = (least.nan_to_num(torch.inf) / self._weight).sort()
        best = self._order[self._order.argsort()[order].cummin(0).values]
        number = torch.searchsorted(asked, self._rest, right=True)
        other = best[(number - 1).clamp(min=0)]
        known = (number == 0) | (self._classes == other[:, None]).any(1)
        other_value = torch.where(known, 0, self._rest * self._weight[other])
        label = self._better(values, other, other_value)
        return torch.where(torch.maximum(values.amax(1), other_value) > 0, label, -1)

    def _better(self, values: Tensor, other: Tensor, other_value: Tensor) -> Tensor:
        """The class of the largest value, of equal ones the first, as `argmax` has it."""
        value = torch.maximum(values.amax(1), other_value)
        nobody = len(self._weight)
        stored = torch.where(values == value[:, None], self._classes, nobody).amin(1)
        return torch.minimum(stored, torch.where(other_value == value, other, nobody))


def known_rows(memory: Memory) -> int:
    """N, or if it is not known the largest index that was seen plus 1. **Raises:** `RuntimeError` if nothing was."""
    if not memory.ready:
        raise RuntimeError("FSR knows nothing yet: train for an epoch first.")
    if memory.scattered:
        raise RuntimeError(
            "In mid-epoch each process knows a part of the averaged predictions only: call consolidate() in all "
            "processes before, or ask when the epoch has ended."
        )
    return memory.num_samples or memory.largest + 1 or memory.table.num_samples


def averaged_probabilities(memory: Memory, log_prior: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The averaged predictions of all samples, some rows at a time: which they are, and (n, C) float32 that sum to 1.

    They are p̄ where labels are judged, else softmax(ŷ), for classes as frequent as `log_prior` says, see `true_prior`.
    Who was never seen has 1/C everywhere.
    """
    assert memory.pseudo is not None
    rows = known_rows(memory)
    for where, values in memory.pseudo.parts():
        where = slice(where.start, min(where.stop, rows))
        if where.start >= where.stop:
            return
        values = values[: where.stop - where.start]
        values = distribution(values) if memory.config.selects else values.softmax(1)
        if log_prior is not None:
            values = distribution(values * log_prior.to(values.device).exp())
        seen = ~memory.table.score[where].isnan()[:, None] & (values.sum(1, keepdim=True) > 0)
        yield where, torch.where(seen, values, 1 / values.shape[1]).cpu()


def largest_probabilities(memory: Memory, log_prior: Tensor | None) -> Iterator[tuple[slice, LargestOf]]:
    """As `averaged_probabilities`, from the K values alone."""
    assert memory.pseudo is not None
    columns, total, number = memory.pseudo.columns, known_rows(memory), memory.pseudo.num_classes
    size = max(1, _CHUNK // (columns["logits"].shape[1] + 2) ** 2)
    even = torch.ones(number, dtype=torch.float64)
    weight = even if log_prior is None else log_prior.cpu().double().exp()
    for where in (slice(start, min(start + size, total)) for start in range(0, total, size)):
        classes, values = columns["classes"][where].cpu().long(), columns["logits"][where].cpu().double()
        rest = columns["rest"][where].cpu().double()
        if not memory.config.selects:
            high = torch.maximum(values.amax(1, keepdim=True), rest)
            values, rest = (values - high).exp(), (rest - high).exp()
        values = values * weight[classes]
        mass = values.sum(1, keepdim=True) + rest * (weight.sum() - weight[classes].sum(1, keepdim=True))
        seen = ~memory.table.score[where].cpu().isnan()[:, None] & (mass > 0)
        values, rest = (torch.where(seen, one / mass, 1 / number).float() for one in (values, rest))
        yield where, LargestOf(classes, values, rest[:, 0], weight.float())


def predictions(memory: Memory, log_prior: Tensor | None) -> Iterator[tuple[slice, AllOf | LargestOf]]:
    """The averaged predictions of all samples, some rows at a time, in the form that costs least."""
    assert memory.pseudo is not None
    if isinstance(memory.pseudo.storage, Largest):
        yield from largest_probabilities(memory, log_prior)
    else:
        for where, values in averaged_probabilities(memory, log_prior):
            yield where, AllOf(values)


def true_prior(memory: Memory) -> Tensor | None:
    """τ log of how frequent each class is, (C,), as far as the network was trained as if all were equally frequent.

    As the network says it: the given labels say it wrongly where they are wrong.
    """
    if memory.pseudo is None or memory.log_prior is None:
        return None
    total = sum(rows.sum() for _, rows in predictions(memory, None))
    assert isinstance(total, Tensor)
    total = total - memory.table.score[: known_rows(memory)].isnan().sum().cpu() / len(total)  # who was never seen
    return (memory.balance * (total / total.mean()).clamp(min=1e-6).log()).float()


def gather_opinion(memory: Memory, given: Tensor, log_prior: Tensor | None) -> Opinion | None:
    """What the averaged predictions say of the given labels (N,), −1 where there is none; None if there are none."""
    if memory.pseudo is None:
        return None
    columns = []
    for where, rows in predictions(memory, log_prior):
        label = given[where].clamp(min=0)
        rival, predicted = rows.likeliest(besides=label), rows.likeliest()
        columns.append((rows.own(label), rival, rows.own(rival), predicted, rows.own(predicted)))
    own, rival, other, predicted, confidence = (torch.cat(column) for column in zip(*columns, strict=True))
    seen, classes = given >= 0, memory.pseudo.num_classes
    number = torch.bincount(given[seen], minlength=classes)
    usual = torch.bincount(given[seen], own[seen].double(), minlength=classes) / number  # NaN: of no sample
    confident = torch.zeros_like(seen)
    for where, rows in predictions(memory, log_prior):
        surest = rows.surest(usual.float())
        confident[where] = (surest >= 0) & (surest != given[where]) & seen[where]
    doubted, against = predicted != given, torch.zeros_like(own)
    if memory.selection is not None and memory.selection.active:
        confidence[memory.table.score[: len(given)].isnan().cpu()] = 0  # never seen
        against = log_ratio(memory.pseudo, given, confidence, predicted, rival, log_prior)
        odds = against.exp()
        doubted, own = other * odds > own, own / (own + (1 - own) * odds)
        predicted = torch.where(doubted & (predicted == given), rival, predicted)
    return Opinion(own, rival, predicted, doubted, confident, against)
