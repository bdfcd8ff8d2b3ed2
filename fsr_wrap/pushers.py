"""Valuation ("pusher") functions P and the table of their moving averages P̂."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .functional import cross_entropy

NEVER, ONCE, LAST = range(3)  # when a sample was classified as its label: see `Visit`


@dataclass(frozen=True)
class Visit:
    """What a pusher may look at when a batch passes by; everything detached, at least float32.

    **Arguments:**

    - `logits`: (b, C), f(x; Θ_t) on the clean (not mixed) inputs.
    - `label`: (b,), the given class numbers.
    - `loss`: (b,), the training loss: of the mixed inputs under MixUp, smoothed under label smoothing.
    - `lookahead_logits`: (b, C), the clean inputs under the look-ahead head Θ*; None if the pusher does not need it.
    - `learned`: (b,) uint8, what earlier visits found: `NEVER` classified as its label, `ONCE` but not at the last
        visit, or at the `LAST` one; None if the pusher does not need it.
    """

    logits: Tensor
    label: Tensor
    loss: Tensor
    lookahead_logits: Tensor | None = None
    learned: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """Whether the clean input is classified as its label, (b,) bool."""
        return self.logits.argmax(1) == self.label


@dataclass(frozen=True)
class Pusher(ABC):
    """A valuation function: high where a sample would make good reward data (Eq. 4 takes the highest).

    `log_odds` says whether P is a logarithm of odds, or of a probability. Under `weight_rule="select"` a label then
    counts with the probability that it is right; by any other P fully or not at all, but for those at the border.
    """

    needs_lookahead: ClassVar[bool] = False
    needs_learned: ClassVar[bool] = False
    log_odds: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, visit: Visit) -> Tensor:
        """P of each sample, (b,)."""


@dataclass(frozen=True)
class MetaMargin(Pusher):
    """Eq. 5 to the letter: P = L(f(x; Θ_t), y) − L(f(x; Θ*_t), y), both on the clean input."""

    needs_lookahead: ClassVar[bool] = True

    def __call__(self, visit: Visit) -> Tensor:
        assert visit.lookahead_logits is not None
        return cross_entropy(visit.logits, visit.label) - cross_entropy(visit.lookahead_logits, visit.label)


@dataclass(frozen=True)
class AuthorsMargin(Pusher):
    """The released code's margin: the training loss (mixed, under MixUp) minus the clean loss at Θ*_t.

    Meant for training with MixUp; without it, it is `MetaMargin` (with the label smoothing left in the first term).
    """

    needs_lookahead: ClassVar[bool] = True

    def __call__(self, visit: Visit) -> Tensor:
        assert visit.lookahead_logits is not None
        return visit.loss - cross_entropy(visit.lookahead_logits, visit.label)


@dataclass(frozen=True)
class NegativeLoss(Pusher):
    """P = −L(f(x; Θ_t), y): the samples the model agrees with."""

    log_odds: ClassVar[bool] = True

    def __call__(self, visit: Visit) -> Tensor:
        return -cross_entropy(visit.logits, visit.label)


@dataclass(frozen=True)
class AreaUnderMargin(Pusher):
    """The logit of the label minus the largest other logit (Pleiss et al., NeurIPS 2020); P̂ averages it over visits."""

    log_odds: ClassVar[bool] = True

    def __call__(self, visit: Visit) -> Tensor:
        label = visit.label[:, None]
        others = visit.logits.scatter(1, label, -torch.inf)
        return visit.logits.gather(1, label)[:, 0] - others.amax(1)


@dataclass(frozen=True)
class MaxMargin(Pusher):
    """The largest probability minus the second largest: the samples the model is most certain of, whatever their label.

    The margin of active learning, at its largest in place of its smallest. The paper names it (Section 5.5) and gives
    no formula, and the released code has none: this is the usual one, of probabilities. As the label is not looked at,
    a sample of a wrong label is worth as much as one of a right label.
    """

    def __call__(self, visit: Visit) -> Tensor:
        largest = visit.logits.softmax(1).topk(2, dim=1).values
        return largest[:, 0] - largest[:, 1]


@dataclass(frozen=True)
class ForgettingEvent(Pusher):
    """P = −1 where the sample is forgotten at this visit, else 0 (Toneva et al., ICLR 2019).

    Forgotten: classified as its label at the last visit, and not now. A sample that never was classified as its label
    counts as forgotten at every visit, as Toneva et al. rank such samples with those forgotten most. P̂ is then minus
    the running rate of forgetting. The paper names the pusher (Section 5.5) and gives no formula; of it the released
    code has only the array of last scores. Many samples share P̂ = 0: among them the dictionary takes those of the
    lowest index.

    What earlier visits found is kept in one more byte a sample.
    """

    needs_learned: ClassVar[bool] = True

    def __call__(self, visit: Visit) -> Tensor:
        assert visit.learned is not None
        return -(~visit.right & (visit.learned != ONCE)).to(visit.logits.dtype)


PUSHERS: dict[str, type[Pusher]] = {
    "meta_margin": MetaMargin,
    "authors_margin": AuthorsMargin,
    "negative_loss": NegativeLoss,
    "area_under_margin": AreaUnderMargin,
    "max_margin": MaxMargin,
    "forgetting_event": ForgettingEvent,
}


def get_pusher(pusher: str | Pusher) -> Pusher:
    """The pusher of that name, or the pusher itself. **Raises:** `KeyError` for an unknown name."""
    return pusher if isinstance(pusher, Pusher) else PUSHERS[pusher]()


def stored_epoch(epoch: int) -> int:
    """The epoch as the table stores it, in 16 bits."""
    return epoch % 2**15


_LIMIT = torch.finfo(torch.float32).max / 2


class ScoreTable:
    """P̂ and the last epoch of each sample: 6 bytes a sample, 7 with `learned`, as by default.

    A sample counts once an epoch, at its first visit; what comes of it again before the epoch ends leaves no trace. So
    it makes no difference which process a repeated sample falls to, nor how often a loader repeats it to fill a batch.

    Rows are dataset indices. One row more than there are samples, the last one or -1, takes what is to be dropped, so
    that no write depends on the data.

    **Arguments:**

    - `num_samples`: N. `momentum`: λ. `learned`: whether to keep when each sample was classified as its label.
    """

    def __init__(
        self, num_samples: int, momentum: float, device: torch.device | str = "cpu", *, learned: bool = False
    ) -> None:
        self.momentum = momentum
        self.score: Tensor = torch.full((num_samples + 1,), torch.nan, dtype=torch.float32, device=device)
        self.epoch: Tensor = torch.full((num_samples + 1,), -1, dtype=torch.int16, device=device)
        seen = torch.full((num_samples + 1,), NEVER, dtype=torch.uint8, device=device) if learned else None
        self.learned: Tensor | None = seen
        self._columns = ("score", "epoch", "learned") if learned else ("score", "epoch")

    @property
    def num_samples(self) -> int:
        """N."""
        return self.score.shape[0] - 1

    def grow(self, num_samples: int) -> None:
        """Make room for at least `num_samples`."""
        if num_samples <= self.num_samples:
            return
        held, learned = self.num_samples, self.learned is not None
        bigger = ScoreTable(num_samples, self.momentum, self.score.device, learned=learned)
        for name in self._columns:
            getattr(bigger, name)[:held] = getattr(self, name)[:-1]
            setattr(self, name, getattr(bigger, name))

    def is_new(self, index: Tensor, epoch: int) -> Tensor:
        """Whether a sample was not visited in this epoch yet. (b,) int64 in [-1, N) → (b,) bool."""
        return self.epoch[index] != stored_epoch(epoch)

    def update(
        self, index: Tensor, score: Tensor, epoch: int, new: Tensor | None = None, right: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """P̂ ← λP̂ + (1−λ)P (Section 4.1) at a sample's first visit of the epoch; P̂ = P at its first of all.

        **Arguments:**

        - `index`: (b,) int64 in [0, N), or -1 for what must leave no trace. `epoch`: the current one.
        - `score`: P (b,); what is not finite, or as large as half the largest float32, leaves no trace.
        - `new`: `is_new` of them, if it is known. `right`: (b,) bool, `Visit.right`, if the table keeps it.

        **Returns:** the rows written to (b,), and P̂ of the samples after the visit (b,); -1 and −inf where nothing was
        kept.
        """
        # Numbers so large are left out with NaN and infinity: the difference of any two others does not overflow.
        keep = (score.abs() < _LIMIT) & (self.is_new(index, epoch) if new is None else new)
        row = torch.where(keep, index, -1)
        if index.device.type != "cpu" or len(set(index.tolist())) < len(index):
            row = torch.where(is_first_visit(row), row, -1)
        old = self.score[row]
        momentum = torch.where(old.isnan(), score, torch.lerp(score.float(), old, self.momentum)).float()
        self.score[row] = momentum
        self.epoch[row] = stored_epoch(epoch)
        if self.learned is not None and right is not None:
            self.learned[row] = torch.where(right, LAST, self.learned[row].clamp(max=ONCE))
        return row, momentum.masked_fill_(row < 0, -torch.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """The columns, without the spare row."""
        return {name: getattr(self, name)[:-1].clone() for name in self._columns}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the columns back. The table must be of the same N."""
        for name in self._columns:
            getattr(self, name)[:-1] = state[name]

    def to(self, device: torch.device) -> None:
        """Moves the table."""
        for name in self._columns:
            setattr(self, name, getattr(self, name).to(device))


def is_first_visit(index: Tensor) -> Tensor:
    """Whether a batch position is the first one of its index. (b,) int64 → (b,) bool."""
    order = index.argsort(stable=True)
    ordered = index[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(first).scatter_(0, order, first)
