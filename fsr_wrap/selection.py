"""Which given labels are wrong: told by what the network predicts before it knows them by heart.

`weight_rule="select"` needs no reward data. A few samples are held out of training. As long as their labels become as
likely as those that the network trains on, it learns nothing by heart, and training stays plain. Meanwhile the samples
that it is surest of tell how many labels of each class are wrong. When the labels that it trains on alone become
likelier, it has begun to learn wrong ones too: from then on each label counts with the probability that it is right,
told by its P̂ and by which classes are mistaken for which, so that each class loses as large a share of its weight as
there are wrong labels. So it is too where the network knows the right labels already, and hardly learns more of them:
then nothing is gained by waiting. A regulariser slows down learning by heart: before that where few labels are wrong.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from .confusions import log_ratio
from .pushers import LAST, ScoreTable, stored_epoch
from .relabel import PseudoLabels, Reading
from .shares import anchors, likely_right, rank_within, wrong_shares

TRAINED, HELD, WRONG = range(3)  # what becomes of a given label: trained on, held out, taken for wrong

_NUMBERS = "active", "estimated", "apart", "pull", "early", "peak", "drifts", "begun", "highest_rate", "down"
_LISTS = "agreement", "growth", "predicted", "readings"  # kept in the state with these
_32_BITS = 2**32 - 1
_HELD = 0.02  # of the samples, at least 200 and at most 1,000 of them
_FEWEST, _MOST, _LARGEST_SHARE = 200, 1000, 0.05
_OF_CLASS = 0.2  # of a class, the share that may be held out: of few samples it may be all, by chance
_START, VISITS = 2, 3  # epochs, after which averages may be compared with later ones, and tell who is wrong
_LINE = 3  # readings that make a line
_FEW = 10  # samples held out, or trained on, that tell little
_DRIFT, _BY_CHANCE = 0.015, 1.5  # by how much agreement may fall: at least, and in standard errors
_EARLY = 1 / 3  # of the regulariser where nothing was learned by heart when labels were judged
_NOISY = 0.1  # the share of wrong labels from which on the regulariser has its full strength
_LEAST_LIKELY = 1e-3  # probabilities below are as good as it
_GAP = 0.1  # in log-probability, that counts
_READ, _JUDGE = 3.0, 5.0  # standard errors of it, up to which shares are read, and from which on labels are judged
_GROWTH = 0.02  # in log-probability, within two epochs, by which one tells that the network still learns
# A network knows the right labels if it predicts so many of them, and if so large a part of those that it does not
# predict is wrong. In an epoch it must learn to predict few more: so many of the right ones, or for each wrong one.
_KNOWS, _MOSTLY, _LEARNS, _FOR_EACH = 0.8, 0.4, 0.006, 0.05
_SOME = 0.001  # the share of wrong labels that is worth it
_COMES_DOWN = 4  # the learning rate has come down when it is by a fourth below its highest
_TO_TELL = 2000  # samples: of fewer the share of wrong labels is read too low to say that few are wrong


class Selection:
    """What becomes of each given label, and what tells it. 5 bytes a sample, and 4 on the host.

    **Arguments:** `num_samples`, rows; `num_classes`, C; `samples`, how many there are, None if that is not
    known; `seed`, of which samples are held out; `log_odds`, whether P̂ are, else their order alone counts.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        samples: int | None,
        seed: int,
        device: torch.device | str,
        log_odds: bool = True,
    ):
        share = _HELD
        if samples is not None:
            share = min(max(_HELD, _FEWEST / samples), _MOST / samples, _LARGEST_SHARE)
        self._below, self._seed, self._log_odds = int(share * 2**32), seed, log_odds
        self.active = False  # whether labels are taken for wrong
        self.share = torch.zeros(num_classes, dtype=torch.float32, device="cpu")  # wrong labels of each given class
        self.estimated = False  # whether the shares were found
        self.predicted: list[float] = []  # after the last two epochs, the share of labels that p̄ predicts
        # In the last epoch before labels were judged, how often the network agreed with those that it trained on, and
        # with those held out.
        self.agreement: list[tuple[float, float]] = []
        self.pull = 0.0  # in [0, 1], the part of the regulariser that the share of wrong labels asks for
        self.early = False  # whether labels are judged because the right ones were known, and nothing by heart
        # Whether the network learned by heart in the last epoch, where few labels are wrong and none is judged yet.
        self.begun = False
        # Learning rate; and, in [0, 1], how far it has come down from that, 0 where there are few samples.
        self.highest_rate, self.down = 0.0, 0.0
        # Since labels are judged, how often at most the network agreed with those that it trained on, and whether that
        # fell: then the regulariser is off.
        self.peak, self.drifts = 0.0, False
        # The logarithm of the averaged probability of each given label after the second epoch, or when it was seen
        # first; else NaN. The spare row is nobody's.
        self.first = torch.full((num_samples + 1,), torch.nan, dtype=torch.float32, device="cpu")
        self.growth: list[float] = []  # in the last two epochs, the mean growth of that of the labels held out
        self.apart = 0  # epochs in a row in which the labels trained on alone became likelier
        # Since the network began to learn by heart, by how much these were ahead, and the share that was read.
        self.readings: list[tuple[float, float]] = []
        self.code = torch.zeros(num_samples + 1, dtype=torch.uint8, device=device)
        self.code[:-1] = self._codes(0, num_samples)
        # How much each label counts: 1 while it is trained on, 0 while held out; once labels are judged, as likely as
        # it is right.
        self.weight = (self.code != HELD).float()

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
            self.weight = torch.cat([self.weight[:-1], (bigger[held:] != HELD).float()])
            first = self.first.new_full((num_samples + 1,), torch.nan)
            first[:held] = self.first[:-1]
            self.first = first

    def weigh(self, index: Tensor, valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """How much the label of each sample counts, in [0, 1], (b,); and how many take part in the loss, (1,).

        **Arguments:** `index` (b,), -1 for nobody; `valid` (b,) bool, or None if all are.
        """
        weight, part = self.weight[index].to(dtype), self.code[index] != HELD
        if valid is not None:
            weight, part = weight * valid, part & valid
        return weight, part.sum(dtype=dtype)[None]

    @property
    def balance(self) -> float:
        """How many times the log-prior is added to the logits.

        A network that learns by heart fits any label, so that the log-prior has less and less effect on it: it takes
        more of it. Not so where labels are wrong, as most wrong ones are those of rare classes.
        """
        return 2 - self.pull if self.active else 1.0

    def hold(self, *, tail: bool) -> float:
        """In [0, 1], how much of the regulariser there is. It slows down learning by heart, and may do harm besides.

        Where few labels are wrong, it is the learning rate that decides: a network that is held to its own averages may
        drift from them while the rate is high, and what it learns by heart it learns when the rate comes down. So it
        begins as soon as something is learned by heart. In a long `tail` it holds rare classes where they were before
        they got their margins: it takes more wrong labels to be worth it, and to judge them first.
        """
        if self.drifts:
            return 0.0
        if not self.active:
            return self.down if self.begun and not tail else 0.0
        if tail or self.early:
            part = max(0.0, 2 * self.pull - 1) if tail else self.pull
            return part * (_EARLY if self.early else 1.0)
        return max(self.pull, self.down)

    def end_epoch(
        self,
        epoch: int,
        warmup: int,
        table: ScoreTable,
        given: Tensor,
        average: PseudoLabels,
        log_prior: Tensor | None = None,
        rate: float = 0.0,
    ) -> dict[str, float | None]:
        """Looks whether the network learns by heart, and then which labels are wrong. Synchronises with the device.

        **Arguments:** `epoch`, the one that ended; `warmup`, how many are plain at least; `given`, the label of each
        sample or −1, (N,); `average`, its averaged probabilities; `log_prior`, (C,), what was added to the logits in
        the loss; `rate`, the learning rate, 0 where that is not known. They must be the same in all processes.

        **Returns:** how often the network agreed with the labels that it trained on, and with those held out, in this
        epoch, and the estimated share of wrong labels; None for what is not known.
        """
        assert table.learned is not None
        given, code = given.cpu().long(), self.code[:-1].cpu()
        seen = (table.epoch[:-1] == stored_epoch(epoch)).cpu() & (given >= 0)
        right = (table.learned[:-1] == LAST).cpu()
        trained, held = _mean(right[seen & (code == TRAINED)]), _mean(right[seen & (code == HELD)])
        reading = average.read(given, log_prior) if self.active or epoch + 1 >= _START else None
        self.highest_rate, self.begun = max(self.highest_rate, rate), False
        if self.highest_rate and (given >= 0).sum() >= _TO_TELL:
            self.down = min(1.0, _COMES_DOWN * (1 - rate / self.highest_rate))
        if self.active:
            self._look_for_drift(*trained)
        else:
            self.agreement = [(trained[0], held[0])]
            self._decide(epoch + 1, warmup, seen, given, code, reading)
            self._release(given, code)
        if self.active:
            assert reading is not None
            score = table.score[:-1].cpu()
            if self._log_odds:
                _, confidence, predicted, _, rival = reading
                score = score - log_ratio(average, given, confidence, predicted, rival, log_prior)
            self._judge(score, given)
        agreement = {"agreement": trained, "held_out_agreement": held}
        told: dict[str, float | None] = {name: one for name, (one, number) in agreement.items() if number}
        if self.estimated:
            label = given[given >= 0]
            told["wrong_share"] = int(self._wrong(label).sum()) / max(1, len(label))
        return told

    def _decide(
        self, epochs: int, warmup: int, seen: Tensor, given: Tensor, code: Tensor, reading: Reading | None
    ) -> None:
        """Whether labels are judged from now on: the network learns by heart, or knows the right ones."""
        knows = False
        if reading is not None:
            learns, begun, ahead = self._watch(seen, code, reading.own)
            if epochs >= VISITS:
                knows = self._read(seen, given, reading, learns=learns and not begun, ahead=ahead)
                knows = knows and not learns and not begun
            few = self.estimated and float(self.share[given[given >= 0]].double().mean()) <= _NOISY
            self.begun = begun and few and epochs >= warmup
        by_heart = self.apart >= 2
        self.active = (by_heart or knows) and self.estimated and epochs >= warmup
        self.early = self.active and not by_heart
        if self.active and by_heart:
            self._look_back(given[given >= 0])

    def _release(self, given: Tensor, code: Tensor) -> None:
        """Who is held out of a class that would be learned from too few others is trained on."""
        held = (given >= 0) & (code == HELD)
        number, out = (torch.bincount(given[those], minlength=len(self.share)) for those in (given >= 0, held))
        free = (held & (out > _OF_CLASS * number)[given]).to(self.code.device)
        self.code[:-1][free], self.weight[:-1][free] = TRAINED, 1.0

    def _watch(self, seen: Tensor, code: Tensor, probability: Tensor) -> tuple[bool, bool, float | None]:
        """Compares what is trained on with what is held out: how much likelier their labels have become.

        A network that learns finds both likelier, one that learns by heart the former alone. As long as both become so,
        the former may be ahead by as much as the latter rises in two epochs. What is held out is few. But each sample
        is compared with itself, so that it matters little how hard those are, by chance, that are held out.

        **Returns:** whether it learns, so that labels held out become likelier; whether it has begun to learn by heart;
        and by how much the labels trained on are ahead, in log-probability, None where too few are held out to tell.
        """
        likelihood = probability.double().clamp(min=_LEAST_LIKELY).log()
        new = seen & self.first[:-1].isnan()
        self.first[:-1][new] = likelihood[new].float()
        growth = likelihood - self.first[:-1]
        trained, held = (growth[seen & (code == part)] for part in (TRAINED, HELD))
        if len(held) < _FEW or len(trained) < _FEW:
            self.apart = 0
            return False, False, None
        inside, outside = float(trained.mean()), float(held.mean())
        earlier, self.growth = self.growth, [*self.growth[-1:], outside]
        rise = outside - earlier[0] if earlier else 0.0
        error = float(trained.std()) / math.sqrt(len(held))  # of those held out, were they like the others
        ahead = inside - outside
        self.apart = self.apart + 1 if ahead > max(_GAP, _JUDGE * error) + max(0.0, rise) else 0
        return rise > _GROWTH, ahead > _READ * error, ahead

    def _read(self, seen: Tensor, given: Tensor, reading: Reading, *, learns: bool, ahead: float | None) -> bool:
        """Reads the shares of wrong labels.

        A label is given as often as its class occurs: to tell whether it is wrong, `reading` has taken that back into
        the predictions which the log-prior took out of them. Else hard samples of frequent classes look like rare ones.

        **Returns:** whether the network knows the right labels.
        """
        _, confidence, predicted, prior, _ = reading
        averaged = seen & (confidence > 0)
        if not averaged.any():
            return False
        found = wrong_shares(predicted, prior, given, averaged, anchors(confidence, predicted, averaged))
        if learns or not self.estimated:
            # Confident mistakes of a network that still learns look like wrong labels: the lowest share counts.
            self.share, self.estimated = torch.minimum(self.share, found) if self.estimated else found, True
            self.readings = []
        wrong = float(found[given[given >= 0]].double().mean())
        if ahead is not None:
            self.readings.append((ahead, wrong))
        return self._knows(wrong, float((predicted == given)[averaged].double().mean()))

    def _knows(self, wrong: float, predicted: float) -> bool:
        """Whether the network knows the right labels, and hardly learns more of them.

        Wrong labels do harm to a network that learns none by heart too. Those that it does not predict are then mostly
        the wrong ones, and nothing is gained by waiting.

        **Arguments:** the shares of labels that are wrong, and that it predicts.
        """
        right, earlier, self.predicted = 1 - wrong, self.predicted, [*self.predicted[-1:], predicted]
        if not earlier or (predicted - earlier[0]) / len(earlier) > min(_LEARNS, _FOR_EACH * wrong) * right:
            return False
        return predicted >= _KNOWS * right and wrong >= max(_SOME, _MOSTLY * (1 - predicted))

    def _look_back(self, label: Tensor) -> None:
        """Makes good what was learned by heart before the shares were read.

        Wrong labels that are known by heart look right: the more so, the farther ahead are those trained on. The line
        through the later readings says how many would look wrong if none were known. Halfway to it is closest.
        """
        ahead, read = ([pair[k] for pair in self.readings] for k in (0, 1))
        now = float(self.share[label].double().mean())
        if now and len(set(ahead)) >= _LINE:
            before = min(1.0, statistics.linear_regression(ahead, read).intercept)
            self.share = (self.share * ((1 + max(1.0, before / now)) / 2)).clamp(max=1.0)

    def _look_for_drift(self, agreement: float, number: int) -> None:
        """Whether the network agrees less with the labels that it trains on, of which `number` were seen.

        Else it agrees more and more. But where its learning rate stays high, a network that is held to its own averages
        may drift from them.
        """
        error = math.sqrt(2 * agreement * (1 - agreement) / max(1, number))
        self.drifts |= number > 0 and agreement < self.peak - max(_DRIFT, _BY_CHANCE * error)
        self.peak = max(self.peak, agreement)

    def _judge(self, score: Tensor, given: Tensor) -> None:
        """Of each class the share of lowest P̂ is taken for wrong, and each label counts as far as it is right.

        It is right with probability σ(4 (P̂ − t)), with a t for each class at which all of them miss as much as there is
        wrong.
        """
        known = (given >= 0) & score.isfinite()
        label, score = given[known], score[known]
        wrong, rank = self._wrong(label), rank_within(score, label)
        self.pull = min(1.0, int(wrong.sum()) / max(1, len(label)) / _NOISY)
        code = torch.full_like(known, TRAINED, dtype=torch.uint8)
        weight = torch.ones_like(known, dtype=torch.float32)
        code[known] = torch.where(rank < wrong[label], WRONG, TRAINED).to(torch.uint8)
        weight[known] = likely_right(score if self._log_odds else rank, label, self.share).float()
        self.code[:-1], self.weight[:-1] = code.to(self.code.device), weight.to(self.weight.device)

    def _wrong(self, label: Tensor) -> Tensor:
        """How many labels of each class are wrong, (C,), by the estimated shares."""
        number = torch.bincount(label, minlength=len(self.share))
        return (number * self.share.double()).long()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; the codes without the spare row."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        tensors = {"share": self.share, "code": self.code[:-1], "weight": self.weight[:-1], "first": self.first[:-1]}
        state |= {name: list(getattr(self, name)) for name in _LISTS}
        return state | {name: one.clone() for name, one in tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all of it back; what checkpoints of earlier versions lack stays as it is. There must be as many
        samples."""
        for name in _NUMBERS:
            setattr(self, name, state.get(name, getattr(self, name)))
        for name in _LISTS:
            setattr(self, name, list(state.get(name, ())))
        self.agreement = self.agreement[-1:]
        self.share.copy_(state["share"])
        self.code[:-1] = state["code"]
        self.weight[:-1] = state.get("weight", (self.code[:-1] == TRAINED).float())
        self.first[:-1] = state.get("first", torch.nan)

    def to(self, device: torch.device) -> None:
        """Moves the codes and weights; the rest is the host's."""
        self.code, self.weight = self.code.to(device), self.weight.to(device)


def _mean(values: Tensor) -> tuple[float, int]:
    """Of booleans, and how many they are."""
    return float(values.double().mean()) if len(values) else 0.0, len(values)
