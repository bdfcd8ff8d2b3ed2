"""The whole of FSR once more, plainly: float64, one process, one sample after another.

Written from the paper and the docs as a twin for `test_property.py`. It shares no code with the library; of the
library's numbers it takes the draws of reward samples and of samples held out, and what is rounded where it is stored.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fsr_wrap import collisions, confusions, mixing
from fsr_wrap import functional as formulas  # its numbers alone, as those below
from fsr_wrap import selection as constants  # its numbers alone, as a test may have changed them
from fsr_wrap import shares as estimates  # its numbers too

Params = dict[str, Tensor]
TRAINED, HELD, WRONG = "trained on", "held out", "taken for wrong"


def body(p: Params, x: Tensor) -> Tensor:
    z = x @ p["body.weight"].T + p["body.bias"]
    if "norm.weight" in p:
        spread = (z - z.mean(0)).square().mean(0)
        z = (z - z.mean(0)) / (spread + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    return z.tanh()


def head(p: Params, h: Tensor) -> Tensor:
    if "head.2.weight" in p:
        z = (h @ p["head.0.weight"].T + p["head.0.bias"]).tanh()
        return z @ p["head.2.weight"].T + p["head.2.bias"]
    z = h @ p["head.weight"].flatten(1).T
    return z + p["head.bias"] if "head.bias" in p else z


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−Σ_c t_c log p_c, (b,)."""
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1)


@dataclass
class Batch:
    """What was passed to the model and to `loss`.

    `clean`: the inputs before MixUp; `partner` and `share`: how they were mixed. `spoiled`: samples of which somebody
    made the logits infinite. `hidden`: samples of which a target that somebody else mixed shows another class more than
    their own.
    """

    inputs: Tensor
    target: Tensor
    index: list[int]
    label: list[int]
    clean: Tensor | None = None
    partner: list[int] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    spoiled: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    own_label: bool = True  # not guessed from a soft target


@dataclass
class Sample:
    """What is remembered of one sample."""

    score: float = math.nan  # P̂
    epoch: int = -1  # of the last visit
    ever_right: bool = False
    last_right: bool = False
    pseudo: Tensor | None = None  # ŷ, or p̄, (C,)
    square: float = 0.0  # its mean square


@dataclass
class Entry:
    """A sample of the dictionary, or one that may enter it."""

    label: int
    payload: Tensor
    score: float = math.nan  # P̂ when it was selected


@dataclass
class Result:
    loss: float
    gradient: Params
    weights: Tensor
    condition: float  # how much normalising magnifies errors of the scores


class Oracle:
    """FSR of a configuration `c` (all its fields), for C classes; `per_epoch` samples make an epoch, if it is known;
    `deep`: the names of Θ^meta where it is more than the head; `held`: the samples that are held out."""

    def __init__(
        self, c: Any, classes: int, per_epoch: int | None, deep: tuple[str, ...] = (), held: tuple[int, ...] = ()
    ) -> None:
        self.c, self.classes, self.per_epoch, self.deep = c, classes, per_epoch, deep
        self.prior = torch.zeros(classes, dtype=torch.float64)  # τ log π
        self.margin = [0.0] * classes  # by how much labels must be ahead
        self.given: dict[int, int] = {}  # the label of each sample, as it came last
        self.came: Counter[int] = Counter()  # how often each class did, in this epoch
        self.often = [0.0] * classes  # and in an epoch, on average
        self.codes = dict.fromkeys(held, HELD)  # of samples that are not trained on
        self.judging = self.estimated = False
        self.pull = 0.0  # the part of the regulariser that there is
        self.early = False  # whether nothing was learned by heart when labels were judged
        self.rate = self.highest = self.down_to = (
            0.0  # the learning rate: now, and at epochs' ends the highest and last
        )
        self.held_early = False  # whether predictions are pulled before labels are judged
        self.peak, self.drifts = 0.0, False  # agreement since labels are judged, and whether it fell
        self.wrong = [0.0] * classes  # the share of wrong labels of each given class
        self.first: dict[int, float] = {}  # log p̄ of each sample's label after its first epoch
        self.outsides: list[float] = []  # how much it grew, on average, where it was held out, epoch by epoch
        self.apart = 0
        self.predicted: list[float] = []  # the share of labels that p̄ predicts, after each epoch
        self.knows = False  # whether those are the right ones
        self.readings: list[tuple[float, float]] = []  # by how much the labels trained on were ahead; the share read
        self.right: dict[int, float] = {}  # how likely each label is right, once they are judged
        self.surest: Callable[[int, float], float] = lambda i, value: value  # the same, rounded
        self.own: Callable[[int, float], float] = lambda i, value: value  # the same, rounded
        self.rival: Callable[[int, Tensor, int], int] = lambda i, p, best: best  # as likely but for rounding
        self.against: Callable[[dict[int, float]], dict[int, float]] = lambda values: values  # the same, rounded
        self.quota = max(1, c.dictionary_size // classes)
        self.epoch = self.consumed = self.age = 0
        self.samples: dict[int, Sample] = {}
        self.members: dict[int, Entry] = {}
        self.candidates: dict[int, Entry] = {}
        self.drawn: Counter[int] = Counter()  # how often, by class, since the dictionary is what it is
        self.luck: dict[int, float] = defaultdict(
            float
        )  # log-probability that a place in a class was not drawn for so long
        self.known: tuple[Params, float] = ({}, 0.0)  # G and the reward loss, where they serve several steps
        self.steps: list[dict[str, float]] = []

    @property
    def log_odds(self) -> bool:
        """Whether P̂ is a logarithm of odds; of others the order alone counts."""
        return self.c.pusher_name in ("area_under_margin", "negative_loss")

    @property
    def selects(self) -> bool:
        return self.c.weight_rule == "select"

    @property
    def active(self) -> bool:
        return self.judging if self.selects else self.epoch >= self.c.warmup_epochs and bool(self.members)

    # --- one step ----------------------------------------------------------------------------------------------------

    def loss(self, params: Params, batch: Batch, draw: Callable[[], list[int]]) -> Result:
        c, b = self.c, len(batch.index)
        leaves = {name: value.detach().double().requires_grad_() for name, value in params.items()}
        features = body(leaves, batch.inputs.double())
        logits = head(leaves, features)
        target = self.smooth(self.rows(batch.target))
        losses = cross_entropy(logits + self.prior, target)
        rows = [i for i in range(b) if logits[i].isfinite().all() and i not in batch.spoiled]
        clean = clean_features = batch.inputs.double()
        clean_logits = logits.detach()
        clean_features = features.detach()
        if batch.clean is not None:
            clean = batch.clean.double()
            clean_features = body(leaves, clean).detach()
            clean_logits = head(leaves, clean_features).detach()
        if self.deep:
            features, clean_features = batch.inputs.double(), clean

        values = {name: value.detach() for name, value in leaves.items()}
        ahead, scores, reward_loss = self.look_ahead(values, features.detach(), target, rows, b, draw)
        total = torch.zeros((), dtype=torch.float64)
        if self.selects:
            (weights, wanted, average), condition = self.select(batch, target, rows), 1.0
            for i in rows:
                agreement = (average[i] * logits[i].softmax(0)).sum()
                total = total + self.hold() * c.relabel_weight / b * (1 - agreement.clamp(max=1 - 1e-4)).log()
        else:
            weights, condition = self.weigh(scores, rows, b)
            pseudo, share = self.relabel(batch, clean_logits, rows, b)
            wanted = [weights[i] * target[i] + share[i] * pseudo[i] for i in range(b)]
        for i in rows:
            asked = wanted[i] / wanted[i].sum() if wanted[i].sum() > 0 else wanted[i]
            behind = torch.stack([asked[c] * self.margin[c] * self.judging for c in range(self.classes)])
            total = total + cross_entropy((logits[i] + self.prior - behind)[None], wanted[i][None])[0]
        trained = total if total.requires_grad else 0 * logits.sum()
        gradient = dict(zip(leaves, torch.autograd.grad(trained, list(leaves.values())), strict=True))

        lookahead_logits = self.forward({**values, **ahead}, clean_features)
        payload = clean if c.reward == "fresh" else clean_features
        for i in rows:
            sample = self.samples.setdefault(batch.index[i], Sample())
            if (batch.own_label or self.pure(batch.target[i].double())) and i not in batch.hidden:
                self.given[batch.index[i]] = batch.label[i]
                self.came[batch.label[i]] += 1
            if sample.epoch == self.epoch:
                continue  # once an epoch
            label, right = batch.label[i], clean_logits[i].argmax().item() == batch.label[i]
            value = self.value(clean_logits[i], label, losses[i].item(), lookahead_logits[i], sample, right)
            old = sample.score
            sample.score = value if math.isnan(old) else c.score_momentum * old + (1 - c.score_momentum) * value
            sample.epoch, sample.last_right, sample.ever_right = self.epoch, right, sample.ever_right or right
            if i in batch.hidden:
                continue  # neither a candidate, nor has it a pseudo-label
            self.candidates[batch.index[i]] = Entry(label, payload[i])
            if self.selects:
                self.store(sample, self.averaged(sample, clean_logits[i].softmax(0)))
            elif c.relabel_weight:
                self.renew(sample, clean_logits[i])

        square = weights.square().sum().item()
        self.steps.append(
            {
                "loss": sum(weights[i].item() * losses[i].item() for i in rows),
                "reward_loss": reward_loss,
                "zero_weight_ratio": sum(max(0, 1 - w * b) if self.selects else w <= 0 for w in weights.tolist()) / b,
                "effective_sample_size": weights.sum().item() ** 2 / square if square else 0.0,
                "max_weight": weights.max().item() * b,
                "all_zero_batches": float(weights.max().item() <= 0),
                "skipped_samples": b - len(rows),
                "skipped_reward_samples": 0,
            }
        )
        return Result(total.item(), gradient, weights, condition)

    @staticmethod
    def pure(target: Tensor) -> bool:
        """Whether it is a class's alone, smoothed or not."""
        *others, largest = target.sort().values.tolist()
        return others[-1] < largest and others[-1] <= mixing._SMALL and others[-1] - others[0] <= mixing._EQUAL

    def rows(self, target: Tensor) -> Tensor:
        """One row a sample: a class number becomes a one among zeros."""
        if target.ndim == 2:
            return target.double()
        rows = torch.zeros(len(target), self.classes, dtype=torch.float64)
        for i, label in enumerate(target.tolist()):
            rows[i, label] = 1
        return rows

    def smooth(self, rows: Tensor) -> Tensor:
        return (1 - self.c.label_smoothing) * rows + self.c.label_smoothing / self.classes

    def forward(self, p: Params, h: Tensor) -> Tensor:
        """Θ^meta as a function of what it is given: the head's features, or the model's inputs."""
        return head(p, body(p, h)) if self.deep else head(p, h)

    def look_ahead(
        self, p: Params, h: Tensor, target: Tensor, rows: list[int], b: int, draw: Callable[[], list[int]]
    ) -> tuple[Params, dict[int, float] | None, float]:
        """φ', the scores −∂L_R/∂ω, and L_R; the latter if it is time for them."""
        c = self.c
        names = [name for name in p if (name in self.deep if self.deep else name.startswith("head."))]
        phi = {name: p[name].clone().requires_grad_() for name in names}
        omega = torch.full((len(rows),), 1 / b, dtype=torch.float64, requires_grad=True)
        losses = cross_entropy(self.forward({**p, **phi}, h[rows]) + self.prior, target[rows]) if rows else omega
        gradient = torch.autograd.grad((omega * losses).sum(), list(phi.values()), create_graph=True, allow_unused=True)
        ahead = {
            name: phi[name] if g is None else phi[name] - c.lookahead_lr * g
            for name, g in zip(names, gradient, strict=True)
        }
        after = {name: value.detach() for name, value in ahead.items()}
        if self.selects or not self.active:
            return after, None, 0.0
        if c.reward_every == 1 or self.age % c.reward_every == 0:
            reward_loss = self.reward_loss(p, ahead, draw())
            if c.reward_every == 1 and c.lookahead_lr and rows:  # the definition, by double back-propagation
                scores = -torch.autograd.grad(reward_loss, omega)[0]
                return after, dict(zip(rows, scores.tolist(), strict=True)), reward_loss.item()
            g = torch.autograd.grad(reward_loss, list(ahead.values()), materialize_grads=True, allow_unused=True)
            self.known = dict(zip(names, g, strict=True)), reward_loss.item()
        self.age += 1
        scores_along = {}
        for position, i in enumerate(rows):
            own = torch.autograd.grad(losses[position], list(phi.values()), retain_graph=True, materialize_grads=True)
            product = sum((self.known[0][name] * g).sum().item() for name, g in zip(names, own, strict=True))
            scores_along[i] = (c.lookahead_lr or 1.0) * product
        return after, scores_along, self.known[1]

    def reward_loss(self, p: Params, ahead: Params, drawn: list[int]) -> Tensor:
        """The mean loss of the reward batch at φ'."""
        assert len(drawn) == self.c.reward_batch_size
        entries = [self.members[i] for i in drawn]  # a KeyError: not of the dictionary
        self.drawn.update(entry.label for entry in entries)
        for i in drawn:
            self.gamble(i)
        assert min(self.luck.values()) > math.log(1e-9), "each sample of a class has its chance"
        turns = [self.drawn[label] for label in {entry.label for entry in self.members.values()}]
        assert max(turns) - min(turns) <= 1, "classes take turns"
        h = torch.stack([entry.payload for entry in entries])
        if self.c.reward == "fresh" and not self.deep:
            h = body(p, h)
        target = self.smooth(self.rows(torch.tensor([entry.label for entry in entries])))
        return cross_entropy(self.forward({**p, **ahead}, h) + self.prior, target).mean()

    def gamble(self, drawn: int) -> None:
        """One of a class was drawn; its places count from both ends."""
        alike = [i for i, entry in self.members.items() if entry.label == self.members[drawn].label]
        for rank, i in enumerate(alike):
            for place in (rank, rank - len(alike)):
                self.luck[place] = 0 if i == drawn else self.luck[place] + math.log(1 - 1 / len(alike))

    def weigh(self, scores: dict[int, float] | None, rows: list[int], b: int) -> tuple[Tensor, float]:
        """ω, (b,)."""
        weights, condition = torch.zeros(b, dtype=torch.float64), 1.0
        if scores is None or self.c.weight_rule == "uniform":
            for i in rows:
                weights[i] = 1 / b
        elif rows:
            lowest = min(scores.values())
            for i in rows:
                weights[i] = max(0.0, scores[i]) if self.c.weight_rule == "clip" else scores[i] - lowest + 1 / b
            total, size = weights.sum().item(), sum(abs(score) for score in scores.values())
            margin = total or -max(scores.values())
            condition = 1 + size / margin if margin else math.inf
            if total > 0:
                weights = weights / total
        return weights, condition

    def value(self, logits: Tensor, label: int, loss: float, ahead: Tensor, sample: Sample, right: bool) -> float:
        """P of one sample, on its clean input."""
        ordered = logits.softmax(0).sort(descending=True).values.tolist()
        own, there = (-one.log_softmax(0)[label].item() for one in (logits, ahead))
        forgotten = not right and (sample.last_right or not sample.ever_right)
        values = {
            "meta_margin": own - there,
            "authors_margin": loss - there,
            "negative_loss": -own,
            "area_under_margin": logits[label].item() - max(z for k, z in enumerate(logits.tolist()) if k != label),
            "max_margin": ordered[0] - ordered[1],
            "forgetting_event": -float(forgotten),
        }
        return values[self.c.pusher]

    # --- re-labelling ------------------------------------------------------------------------------------------------

    def relabel(self, batch: Batch, logits: Tensor, rows: list[int], b: int) -> tuple[list[Tensor], list[float]]:
        """The pseudo-label of each sample, and how much it counts in the loss (Eq. 7)."""
        share = [0.0] * b
        pseudo = [torch.zeros(self.classes, dtype=torch.float64)] * b
        if not self.c.relabel_weight:
            return pseudo, share
        new = [i for i in rows if self.samples.get(batch.index[i], Sample()).epoch != self.epoch]
        held = [self.samples.get(index, Sample()) for index in batch.index]
        self.rms = math.sqrt(sum(held[i].square for i in new) / max(1, len(new)) + 1e-8)
        seen, met = [False] * b, set()
        for i in range(b):
            stored = held[i].pseudo
            if stored is None:
                continue
            pseudo[i] = (stored / self.rms).softmax(0)
            seen[i] = i in new and i not in batch.hidden and batch.index[i] not in met
            if i in new:
                met.add(batch.index[i])
        if batch.clean is not None:
            seen = [seen[i] and seen[j] for i, j in enumerate(batch.partner)]
            pseudo = [
                m * pseudo[i] + (1 - m) * pseudo[j]
                for i, (j, m) in enumerate(zip(batch.partner, batch.share, strict=True))
            ]
        if self.active:
            share = [self.c.relabel_weight / b if one else 0.0 for one in seen]
        return pseudo, share

    def renew(self, sample: Sample, logits: Tensor) -> None:
        """ŷ_t = β ŷ_{t−1} / RMS + (1−β) f(x)."""
        old = None if sample.pseudo is None else sample.pseudo / self.rms
        self.store(sample, self.averaged(replace(sample, pseudo=old), logits))

    def averaged(self, sample: Sample, value: Tensor) -> Tensor:
        """β of the old value, 1−β of the new one."""
        new = (1 - self.c.relabel_momentum) * value
        return new if sample.pseudo is None else self.c.relabel_momentum * sample.pseudo + new

    def store(self, sample: Sample, new: Tensor) -> None:
        """As far as the storage keeps it."""
        sample.square = new.square().mean().item()
        number = self.c.relabel_storage
        if isinstance(number, int) and number < self.classes:
            order = new.argsort(descending=True)
            new = new.clone()
            new[order[number:]] = new[order[number:]].mean()
        sample.pseudo = new

    # --- judging given labels ----------------------------------------------------------------------------------------

    def select(self, batch: Batch, target: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """ω; the targets with the weights in them; p̄, which predictions are pulled to."""
        b = len(batch.index)
        codes = [self.codes.get(index, TRAINED) for index in batch.index]
        part = max(1, sum(codes[i] != HELD for i in rows))
        weights = torch.zeros(b, dtype=torch.float64)
        wanted, average = torch.zeros(2, b, self.classes, dtype=torch.float64)
        if batch.clean is not None:  # each part of a mixed image is weighed for itself
            target = self.smooth(self.rows(torch.tensor(batch.label)))
        met: set[int] = set()
        for i in rows:
            sample = self.samples.get(batch.index[i], Sample())
            again = sample.epoch == self.epoch or batch.index[i] in met  # once an epoch
            met.add(batch.index[i])
            p = None if again else sample.pseudo
            right = self.right.get(batch.index[i], 1.0) if self.judging else float(codes[i] == TRAINED)
            weights[i] = right / part
            wanted[i] += target[i] * right / part
            if codes[i] != HELD and p is not None and i not in batch.hidden:
                average[i] = p / p.sum()
                wanted[i] += p**2 / (p**2).sum() * (1 - right) / part
        if batch.clean is not None:
            pairs = list(enumerate(zip(batch.partner, batch.share, strict=True)))
            wanted = torch.stack([m * wanted[i] + (1 - m) * wanted[j] for i, (j, m) in pairs])
            average = torch.stack([m * average[i] + (1 - m) * average[j] for i, (j, m) in pairs])
        return weights, wanted, average

    def hold(self) -> float:
        """The part of the regulariser that there is: none where the network drifts; in a tail, from half of its full
        strength on; else also as far as the learning rate has come down."""
        if self.drifts:
            return 0.0
        down = min(1.0, constants._COMES_DOWN * (self.highest - self.down_to) / self.highest) if self.highest else 0.0
        tail = any(self.margin)
        if not self.judging:
            return down if self.held_early and not tail else 0.0
        pull = max(0.0, 2 * self.pull - 1) if tail else self.pull
        return pull * constants._EARLY if self.early else pull if tail else max(pull, down)

    def judge_all(self) -> None:
        """At the end of an epoch, which is `self.epoch - 1`."""
        self.highest, self.held_early = max(self.highest, self.rate), False
        self.down_to = self.rate if len(self.given) >= constants._TO_TELL else self.highest
        if self.judging:
            self.look_for_drift()
        else:
            self.watch()
            enough = self.epoch >= self.c.warmup_epochs
            self.judging = (self.apart >= 2 or self.knows) and self.estimated and enough
            if self.judging and self.apart >= 2:
                self.look_back()
            self.early = self.judging and self.apart < 2
            self.release()
        if self.judging:
            self.judge(self.against(self.log_ratios()) if self.log_odds else {})

    def release(self) -> None:
        """No class is held out for the greater part."""
        for g in range(self.classes):
            those = [i for i in self.given if self.given[i] == g]
            out = [i for i in those if self.codes.get(i) == HELD]
            if len(out) > constants._OF_CLASS * len(those):
                for i in out:
                    del self.codes[i]

    def look_for_drift(self) -> None:
        right = [
            sample.last_right
            for i, sample in self.samples.items()
            if sample.epoch == self.epoch - 1 and i in self.given and i not in self.codes
        ]
        if right:
            now = statistics.fmean(right)
            chance = constants._BY_CHANCE * math.sqrt(2 * now * (1 - now) / len(right))
            self.drifts = self.drifts or now < self.peak - max(constants._DRIFT, chance)
            self.peak = max(self.peak, now)

    def watch(self) -> None:
        self.knows = False
        seen = [i for i, sample in self.samples.items() if sample.epoch == self.epoch - 1 and i in self.given]
        held = [i for i in seen if self.codes.get(i) == HELD]
        compared = self.epoch >= constants._START
        learns, begun, ahead = self.grows_apart(seen, held) if compared else (False, False, None)
        known = [i for i in seen if self.samples[i].pseudo is not None]
        if self.epoch >= constants.VISITS and known:
            found = self.wrong_shares(known)
            if not self.estimated:
                self.wrong = found
            elif learns and not begun:
                self.wrong, self.readings = [min(pair) for pair in zip(self.wrong, found, strict=True)], []
            self.estimated = True
            wrong = statistics.fmean(found[g] for g in self.given.values())
            if ahead is not None:
                self.readings.append((ahead, wrong))
            self.look_whether_it_knows(wrong, known, idle=not learns and not begun)
            few = statistics.fmean(self.wrong[g] for g in self.given.values()) <= constants._NOISY
            self.held_early = begun and few and self.epoch >= self.c.warmup_epochs

    def look_whether_it_knows(self, wrong: float, those: list[int], *, idle: bool) -> None:
        average, right = self.frequent(), 1 - wrong
        predicted = statistics.fmean(average[i].argmax().item() == self.given[i] for i in those)
        earlier = self.predicted[-2:]
        self.predicted.append(predicted)
        if not earlier:
            return
        learned, of_right = (predicted - earlier[0]) / len(earlier) / right, predicted / right
        few = learned <= constants._LEARNS and learned <= constants._FOR_EACH * wrong
        mostly = wrong >= constants._MOSTLY * (1 - predicted)
        self.knows = of_right >= constants._KNOWS and few and mostly and wrong >= constants._SOME and idle

    def look_back(self) -> None:
        """Halfway from the shares that were read to what the later readings say of a time when nothing was known."""
        x, y = ([pair[k] for pair in self.readings] for k in (0, 1))
        now = statistics.fmean(self.wrong[g] for g in self.given.values())
        if now and len(set(x)) >= constants._LINE:
            off = [one - statistics.fmean(x) for one in x]
            slope = sum(a * b for a, b in zip(off, y, strict=True)) / sum(a * a for a in off)
            before = min(1.0, statistics.fmean(y) - slope * statistics.fmean(x))
            self.wrong = [min(1.0, share * (now + max(now, before)) / (2 * now)) for share in self.wrong]

    def grows_apart(self, seen: list[int], held: list[int]) -> tuple[bool, bool, float | None]:
        """Counts the epochs in which the labels trained on alone became likelier; whether the others still do; whether
        the former are ahead, and by how much."""
        growth = {}
        for i in seen:
            p, label = self.samples[i].pseudo, self.given[i]
            own = 0.0 if p is None else self.own(i, float(p[label] / p.sum()))
            log = math.log(max(own, constants._LEAST_LIKELY))
            growth[i] = log - self.first.setdefault(i, float(torch.tensor(log, dtype=torch.float32)))
        inside, outside = ([growth[i] for i in seen if (i in held) == here] for here in (False, True))
        self.apart, before = 0, self.apart
        if min(len(inside), len(outside)) < constants._FEW:
            return False, False, None
        mean, error = statistics.fmean(outside), statistics.stdev(inside) / math.sqrt(len(outside))
        rise = mean - self.outsides[-2:][0] if self.outsides else 0.0
        self.outsides.append(mean)
        gap = statistics.fmean(inside) - mean
        if gap > max(constants._GAP, constants._JUDGE * error) + max(0, rise):
            self.apart = before + 1
        return rise > constants._GROWTH, gap > constants._READ * error, gap

    def frequent(self) -> dict[int, Tensor]:
        """p̄ of each sample, of classes as frequent as they were given."""
        average = {i: s.pseudo * self.prior.exp() for i, s in self.samples.items() if s.pseudo is not None}
        return {i: mass / mass.sum() for i, mass in average.items()}

    def anchors(self, seen: list[int]) -> list[list[int]]:
        """Of each predicted class, the surest."""
        average = self.frequent()
        anchors: list[list[int]] = []
        for c in range(self.classes):
            those = [i for i in seen if average[i].argmax().item() == c]
            those.sort(key=lambda i: (-self.surest(i, average[i].max().item()), i))
            enough = max(int(len(those) * estimates._ANCHORS), min(len(those), estimates._FEW_ANCHORS))
            anchors.append(those[:enough])
        return anchors

    def wrong_shares(self, seen: list[int]) -> list[float]:
        """By Bayes from the anchors: P(true g | given g), for each g; of classes as frequent as they were given."""
        average = self.frequent()
        size = (sum(average.values()) / len(average)).tolist()
        anchors = self.anchors(seen)
        everybody = range(self.classes)
        given = [sum(self.given[i] == g for i in seen) / len(seen) for g in everybody]

        def joint(c: int, g: int) -> float:
            """P(true c, given g), with one right label more."""
            number = sum(self.given[i] == g for i in anchors[c]) + (c == g)
            return size[c] * number / (len(anchors[c]) + 1)

        def mass(g: int) -> float:
            return max(1e-12, sum(joint(c, g) for c in everybody))

        for _ in range(estimates._STEPS):
            factor = [given[g] / mass(g) for g in everybody]
            size = [sum(joint(c, g) * factor[g] for g in everybody) for c in everybody]
        overall = 1 - sum(joint(c, c) for c in everybody) / sum(joint(c, g) for c in everybody for g in everybody)
        shares = []
        for g in everybody:
            n, alone = len(anchors[g]), 1 - joint(g, g) / mass(g)
            share = (n * alone + estimates._TELL_LITTLE * overall) / (n + estimates._TELL_LITTLE)
            shares.append(torch.tensor(share, dtype=torch.float32).item())
        return shares

    def log_ratios(self) -> dict[int, float]:
        """Of each sample of which p̄ is known: how much likelier its label is if it is wrong than if it is right, by
        the other classes that are likely."""
        average = {i: p for i, p in self.frequent().items() if i in self.given}
        everybody = range(self.classes)
        n, r = ([[0] * self.classes for _ in everybody] for _ in range(2))
        for c, those in enumerate(self.anchors(list(average))):
            for i in those:
                n[self.given[i]][c] += self.given[i] != c
        for i, p in average.items():
            g = self.given[i]
            if p.argmax().item() == g and self.surest(i, p[g].item()) < 1:
                others = [a for a in everybody if a != g]
                r[g][self.rival(i, p, max(others, key=lambda a: (p[a].item(), -a)))] += 1
        pairs = [(g, a) for g in everybody for a in everybody if g != a]
        u, v = [1.0] * self.classes, [1.0] * self.classes
        for _ in range(confusions._STEPS):
            for g in everybody:
                mass = sum(u[a] * (1 + r[g][a]) for a in everybody if a != g)
                v[g] = sum(n[g]) / max(mass, confusions._LEAST)
            for a in everybody:
                mass = sum(v[g] * (1 + r[g][a]) for g in everybody if g != a)
                u[a] = sum(n[g][a] for g in everybody) / max(mass, confusions._LEAST)
        e = {(g, a): v[g] * u[a] * (1 + r[g][a]) for g, a in pairs}
        excess = sum((n[g][a] - e[g, a]) ** 2 - n[g][a] - (v[g] * u[a]) ** 2 * r[g][a] for g, a in pairs)
        squares = sum(x * x for x in e.values())
        if excess <= 0 or squares <= 0:
            return dict.fromkeys(average, 0.0)
        k = squares / excess
        log = {(g, a): math.log((k + n[g][a]) / (k + e[g, a])) for g, a in pairs}
        found = {}
        for i, p in average.items():
            g = self.given[i]
            mass = {a: p[a].item() for a in everybody if a != g}
            found[i] = sum(mass[a] * log[g, a] for a in mass) / max(sum(mass.values()), confusions._LEAST)
        return found

    def judge(self, against: dict[int, float] | None = None) -> None:
        self.codes = {}
        height = {i: self.samples[i].score - (against or {}).get(i, 0.0) for i in self.given}
        for g in range(self.classes):
            those = sorted((i for i in self.given if self.given[i] == g), key=lambda i: (height[i], i))
            self.codes.update(dict.fromkeys(those[: int(len(those) * self.wrong[g])], WRONG))
            self.right.update(self.likely(those, self.wrong[g], height))
        taken = list(self.codes.values()).count(WRONG)
        self.pull = min(1.0, taken / max(1, len(self.given)) / constants._NOISY)

    def likely(self, those: list[int], share: float, height: dict[int, float]) -> dict[int, float]:
        """How likely the labels of one class are right: by how high they are above a score, such that as many are
        wrong as there should be. `those` from the lowest on."""
        height = {i: height[i] if self.log_odds else float(those.index(i)) for i in those}

        def right(bar: float) -> dict[int, float]:
            odds = {i: estimates._SHARPNESS * (height[i] - bar) for i in those}
            return {i: 1 / (1 + math.exp(-max(-700.0, x))) for i, x in odds.items()}

        low, high = (min(height.values(), default=0) - 50, max(height.values(), default=0) + 50)
        for _ in range(60):
            middle = (low + high) / 2
            enough = sum(right(middle).values()) >= (1 - share) * len(those)
            low, high = (middle, high) if enough else (low, middle)
        return right(low)

    def count_classes(self) -> None:
        """τ log π, of how often each class comes with labels that are not taken for wrong; a class has one sample at
        least. Twice where right labels are learned by heart."""
        believed = [g for i, g in self.given.items() if self.codes.get(i) != WRONG]
        everybody, total = list(self.given.values()), max(1.0, sum(self.often))
        part = [believed.count(g) / max(1, everybody.count(g)) for g in range(self.classes)]
        number = [len(everybody) * often / total * p for often, p in zip(self.often, part, strict=True)]
        share = torch.tensor([max(1.0, one) for one in number], dtype=torch.float64)
        more = 1 - self.pull if self.judging else 0.0
        self.prior = (1 + more) * self.c.class_balance * (share / share.sum()).log()
        sizes = {g: believed.count(g) for g in set(believed)} if self.selects else {}
        self.margin = [0.0] * self.classes
        fewest, most = min(sizes.values(), default=1), max(sizes.values(), default=1)
        if most > formulas._ALIKE * fewest:
            rarest = formulas._MARGIN * (1 - math.sqrt(math.sqrt(formulas._ALIKE * fewest / most)))
            for g, size in sizes.items():
                self.margin[g] = (1 + more) * self.c.class_balance * rarest * math.sqrt(math.sqrt(fewest / size))

    # --- the dictionary ----------------------------------------------------------------------------------------------

    def count(self, b: int) -> None:
        """b samples were consumed."""
        self.consumed += b
        if self.per_epoch is not None and self.consumed >= self.per_epoch:
            self.end_epoch()

    def end_epoch(self) -> None:
        """The best of each class become the dictionary (Eq. 4)."""
        if not self.consumed:
            return
        unvisited = {i: entry for i, entry in self.members.items() if self.samples[i].epoch == self.epoch - 1}
        pool = {**unvisited, **self.candidates}
        self.members, self.candidates = {}, {}
        for label in range(self.classes):
            order = sorted((i for i in pool if pool[i].label == label), key=lambda i: (-self.samples[i].score, i))
            self.members.update({i: replace(pool[i], score=self.samples[i].score) for i in order[: self.quota]})
        self.drawn.clear()
        self.epoch += 1
        self.consumed = 0
        if self.came:
            share = collisions._RENEWED if any(self.often) else 1.0
            self.often = [old + share * (self.came[g] - old) for g, old in enumerate(self.often)]
            self.came.clear()
        if self.selects:
            self.judge_all()
        self.count_classes()

    def metrics(self) -> dict[str, float]:
        if not self.samples and not self.steps:
            return {}
        steps, self.steps = self.steps, []
        names = ("loss", "reward_loss", "zero_weight_ratio", "effective_sample_size", "max_weight")
        sums = ("all_zero_batches", "skipped_samples", "skipped_reward_samples")
        out = {f"fsr/{name}": sum(step[name] for step in steps) / max(1, len(steps)) for name in names}
        out |= {f"fsr/{name}": float(sum(step[name] for step in steps)) for name in sums}
        now = {"epoch": self.epoch, "reweighting": float(self.active), "dictionary_size": len(self.members)}
        return out | {f"fsr/{name}": float(value) for name, value in now.items()}
