"""Which given labels are wrong: told by what the network predicts before it knows them by heart.

`weight_rule="select"` needs no reward data. A few samples are held out of training. As long as the network agrees with
their labels as often as with those it trains on, it has learned nothing by heart, and training stays plain. Meanwhile
the samples that it is surest of tell how many labels of each class are wrong. When it agrees more with what it trains
on, it has begun to learn wrong labels too: from then on as large a share of each class, of lowest P̂, loses its label.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .pushers import LAST, ScoreTable, stored_epoch
from .relabel import PseudoLabels

TRAINED, HELD, WRONG = range(3)  # what becomes of a given label: trained on, held out, taken for wrong

_32_BITS = 2**32 - 1
_HELD = 0.02  # of the samples, at least 200 and at most 1,000 of them
_FEWEST, _MOST, _LARGEST_SHARE = 200, 1000, 0.05
_VISITS = 3  # epochs, after which predictions are averaged enough
_ANCHORS, _FEW_ANCHORS = 0.2, 20  # the surest samples of each predicted class: a share, and a number at least
_STEPS = 5  # of EM
_FEW = 10  # samples that tell little: anchors, at which a class's share is half its own and half that of all; held out
_NOISY = 0.1  # the share of wrong labels from which on the regulariser has its full strength
_GAP = 0.04  # in agreement, that counts
_ERRORS = 3.0  # standard errors of it
_GROWTH = 0.02  # in agreement, within two epochs, by which one tells that the network still changes


class Selection:
    """What becomes of each given label, and what tells it. 1 byte a sample.

    **Arguments:** `num_samples`, rows; `num_classes`, C; `known`, whether there are as many samples as rows;
    `seed`, of which samples are held out.
    """

    def __init__(self, num_samples: int, num_classes: int, *, known: bool, seed: int, device: torch.device | str):
        share = _HELD
        if known:
            share = min(max(_HELD, _FEWEST / num_samples), _MOST / num_samples, _LARGEST_SHARE)
        self._below, self._seed = int(share * 2**32), seed
        self.active = False  # whether labels are taken for wrong
        self.share = torch.zeros(num_classes, dtype=torch.float32, device="cpu")  # wrong labels of each given class
        self.estimated = False  # whether the shares were found
        # In the last two epochs, of the network with the labels that it trained on, and with those held out.
        self.agreement: list[tuple[float, float]] = []
        self.pull = 0.0  # in [0, 1], the part of the regulariser that the share of wrong labels asks for
        self.best = 0.0  # the most that it agreed with the labels held out so far
        self.apart = 0  # epochs in a row in which it agreed less with what was held out
        self.code = torch.zeros(num_samples + 1, dtype=torch.uint8, device=device)
        self.code[:-1] = self._codes(0, num_samples)

    def _codes(self, start: int, stop: int) -> Tensor:
        """Of samples that no epoch has judged yet."""
        if self.active:
            return torch.full((stop - start,), TRAINED, dtype=torch.uint8, device=self.code.device)
        number = torch.arange(start, stop, dtype=torch.int64, device="cpu") + self._seed * 0x9E3779B1 % 2**32
        number &= _32_BITS
        # A hash of 32 bits (Wellons' lowbias32), so that it makes no difference when the tables grow.
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            number = (number ^ number >> shift) * factor & _32_BITS
        return torch.where(number < self._below, HELD, TRAINED).to(torch.uint8)

    def grow(self, num_samples: int) -> None:
        """Make room for at least `num_samples`."""
        held = len(self.code) - 1
        if num_samples > held:
            bigger = self.code.new_zeros(num_samples + 1)
            bigger[:held] = self.code[:-1]
            bigger[held:-1] = self._codes(held, num_samples)
            self.code = bigger

    def weigh(self, index: Tensor, valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """1 for each sample whose label is trained on, else 0, (b,); and how many take part in the loss, (1,).

        **Arguments:** `index` (b,), -1 for nobody; `valid` (b,) bool, or None if all are.
        """
        code = self.code[index]
        trained, part = code == TRAINED, code != HELD
        if valid is not None:
            trained, part = trained & valid, part & valid
        return trained.to(dtype), part.sum(dtype=dtype)[None]

    @property
    def balance(self) -> float:
        """How many times the log-prior is added to the logits.

        A network that learns by heart fits any label, so that the log-prior has less and less effect on it: it takes
        more of it. Not so where labels are wrong, as most wrong ones are those of rare classes.
        """
        return 2 - self.pull if self.active else 1.0

    def end_epoch(
        self,
        epoch: int,
        warmup: int,
        table: ScoreTable,
        given: Tensor,
        average: PseudoLabels,
        log_prior: Tensor | None = None,
    ) -> dict[str, float | None]:
        """Looks whether the network learns by heart, and then which labels are wrong. Synchronises with the device.

        **Arguments:** `epoch`, the one that ended; `warmup`, how many are plain at least; `given`, the label of each
        sample or −1, (N,); `average`, its averaged probabilities; `log_prior`, (C,), what was added to the logits in
        the loss. They must be the same in all processes.

        **Returns:** how often the network agreed with the labels that it trained on, and with those held out, in this
        epoch, and the estimated share of wrong labels; None for what is not known.
        """
        assert table.learned is not None
        given, code = given.cpu().long(), self.code[:-1].cpu()
        seen = (table.epoch[:-1] == stored_epoch(epoch)).cpu() & (given >= 0)
        right = (table.learned[:-1] == LAST).cpu()
        trained, held = _mean(right[seen & (code == TRAINED)]), _mean(right[seen & (code == HELD)])
        if not self.active:
            learns = self._watch(trained[0], held)
            if epoch + 1 >= _VISITS and (learns or not self.estimated):
                self._estimate(seen, code, given, average, log_prior)
            self.active = self.apart >= 2 and self.estimated and epoch + 1 >= warmup
        if self.active:
            self.code[:-1] = self._judged(table.score[:-1].cpu(), given).to(self.code.device)
        agreement = {"agreement": trained, "held_out_agreement": held}
        told: dict[str, float | None] = {name: one for name, (one, number) in agreement.items() if number}
        if self.estimated:
            label = given[given >= 0]
            told["wrong_share"] = int(self._wrong(label).sum()) / max(1, len(label))
        return told

    def _watch(self, agreement: float, held: tuple[float, int]) -> bool:
        """Compares what is trained on with what is held out.

        A network that learns agrees more with both, one that learns by heart with the former alone. What is held out is
        few: its agreement must be the best so far, else chance looks like learning.

        **Returns:** whether it may still learn: it changes, and agrees with what is held out about as often as ever.
        """
        outside, number = held
        earlier, self.agreement = self.agreement, [*self.agreement[-1:], (agreement, outside)]
        if number < _FEW:
            self.apart = 0
            return False
        error = _error(number, agreement, outside)
        growth, rises = 0.0, False
        if len(earlier) == 2:
            before, outside_before = earlier[0]
            growth = agreement - before
            rises = outside - outside_before > max(0.0, growth / 2)
        stalls = not rises or outside <= self.best
        learns = growth > _GROWTH and outside > self.best - error
        self.best = max(self.best, outside)
        apart = stalls and agreement - outside > max(_GAP, _ERRORS * error)
        self.apart = self.apart + 1 if apart else 0
        return learns

    def _estimate(
        self, seen: Tensor, code: Tensor, given: Tensor, average: PseudoLabels, log_prior: Tensor | None
    ) -> None:
        """The shares of wrong labels.

        A label is given as often as its class occurs: to tell whether it is wrong takes that back into the predictions
        which the log-prior took out of them. Else hard samples of frequent classes look like rare ones.
        """
        confidence, predicted, prior = average.surest(log_prior)
        averaged = seen & (confidence > 0)
        sure = anchors(confidence, predicted, averaged, least=_FEW_ANCHORS)
        if not sure.any():
            return
        found = wrong_shares(predicted, prior, given, averaged, sure)
        if self.estimated:
            # Confident mistakes of a network that still learns look like wrong labels: the lowest share counts. Wrong
            # labels that are known by heart look right: they are put back, where labels were wrong so far.
            number = torch.bincount(given[averaged], minlength=len(found)).double()
            right, share = ((number * part).sum() / number.sum() for part in (1 - found, self.share))
            sure = anchors(confidence, predicted, averaged, least=0)
            by_heart = 1 - _still_right((predicted == given)[sure], code[sure])
            found = torch.minimum(self.share, found + self.share * (right * by_heart / share.clamp(min=1e-12)).float())
        self.share, self.estimated = found, True

    def _judged(self, score: Tensor, given: Tensor) -> Tensor:
        """The code of each sample: of each class the share of lowest P̂ is taken for wrong."""
        known = (given >= 0) & score.isfinite()
        label = given[known]
        wrong = self._wrong(label)
        self.pull = min(1.0, int(wrong.sum()) / max(1, len(label)) / _NOISY)
        code = torch.full(score.shape, TRAINED, dtype=torch.uint8)
        code[known] = torch.where(rank_within(score[known], label) < wrong[label], WRONG, TRAINED).to(torch.uint8)
        return code

    def _wrong(self, label: Tensor) -> Tensor:
        """How many labels of each class are wrong, (C,), by the estimated shares."""
        number = torch.bincount(label, minlength=len(self.share))
        return (number * self.share.double()).long()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; the codes without the spare row."""
        state: dict[str, Any] = {name: getattr(self, name) for name in ("active", "estimated", "apart", "best", "pull")}
        return state | {"agreement": list(self.agreement), "share": self.share.clone(), "code": self.code[:-1].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all of it back. There must be as many samples."""
        self.active, self.estimated, self.apart = state["active"], state["estimated"], state["apart"]
        self.pull, self.agreement = state["pull"], list(state["agreement"])
        self.best = state.get("best", max((outside for _, outside in self.agreement), default=0.0))
        self.share.copy_(state["share"])
        self.code[:-1] = state["code"]

    def to(self, device: torch.device) -> None:
        """Moves the codes; the rest is the host's."""
        self.code = self.code.to(device)


def anchors(confidence: Tensor, predicted: Tensor, seen: Tensor, least: int) -> Tensor:
    """The samples that the network is surest of, of each class that it predicts, (N,) bool.

    **Arguments:** `confidence` and `predicted` (N,), the largest averaged probability and its class; `seen` (N,) bool,
    who may be one; `least`, so many of each class at least, as far as there are. On the host.
    """
    confidence, group = confidence[seen], predicted[seen]
    number = torch.bincount(group)
    enough = torch.maximum((number * _ANCHORS).long(), number.clamp(max=least))
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
    return ((number * shares + _FEW * overall) / (number + _FEW)).float()


def rank_within(value: Tensor, group: Tensor) -> Tensor:
    """The place of each value among those of its group, from the smallest on. (n,) and (n,) int64 → (n,)."""
    order = value.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    number = torch.bincount(group)
    first = (number.cumsum(0) - number)[group[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) - first)


def _mean(values: Tensor) -> tuple[float, int]:
    """Of booleans, and how many they are."""
    return float(values.double().mean()) if len(values) else 0.0, len(values)


def _still_right(right: Tensor, code: Tensor) -> float:
    """What part of the labels of anchors that look right do so where nobody could learn them by heart, in [0, 1].

    Half a standard error less, as those are few; all, where they are fewer than `_FEW`.
    """
    (trained, _), (held, number) = (_mean(right[code == part]) for part in (TRAINED, HELD))
    if number < _FEW:
        return 1.0
    return min(1.0, max(0.0, held - _error(number, trained, held) / 2) / max(trained, 1e-12))


def _error(number: int, *shares: float) -> float:
    """The standard error of a share of `number` samples; of that of `shares` that scatters most, 0.01 at least."""
    return math.sqrt(max(share * (1 - share) for share in (*shares, 0.01)) / max(number, 1))
