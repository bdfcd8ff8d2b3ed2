"""Which given labels are wrong: what is held out, when the network is seen to learn by heart, and who is judged how."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from test_wrapper import frozen
from torch import Tensor, nn

from fsr_wrap import FSRWrapper, functional
from fsr_wrap import selection as constants
from fsr_wrap.memory import Memory
from fsr_wrap.pushers import LAST, ScoreTable
from fsr_wrap.relabel import PseudoLabels
from fsr_wrap.selection import HELD, TRAINED, WRONG, Selection
from fsr_wrap.shares import anchors, rank_within, wrong_shares

# --- the shares of wrong labels --------------------------------------------------------------------------------------


def slow_shares(
    confidence: list[float], predicted: list[int], prior: list[float], given: list[int], seen: list[bool]
) -> list[float]:
    """P(true g | given g) by Bayes, one anchor after another, with the matrix P(given | true) written out."""
    everybody, those_seen = range(len(prior)), [i for i, here in enumerate(seen) if here]
    anchors = []
    for c in everybody:
        those = sorted((i for i in those_seen if predicted[i] == c), key=lambda i: (-confidence[i], i))
        anchors.append(those[: max(len(those) // 5, min(len(those), 20))])
    matrix = [
        [(sum(given[i] == g for i in anchors[c]) + (c == g)) / (len(anchors[c]) + 1) for g in everybody]
        for c in everybody
    ]
    count = [sum(given[i] == g for i in those_seen) / len(those_seen) for g in everybody]
    size = list(prior)
    for _ in range(5):  # who was given g is of class c with the probability size_c P(g | c) / Σ
        mass = [sum(size[c] * matrix[c][g] for c in everybody) for g in everybody]
        size = [sum(count[g] * size[c] * matrix[c][g] / mass[g] for g in everybody if mass[g]) for c in everybody]
    mass = [sum(size[c] * matrix[c][g] for c in everybody) for g in everybody]
    overall = 1 - sum(size[c] * matrix[c][c] for c in everybody) / sum(mass)
    shares = []
    for g in everybody:
        n = len(anchors[g])
        shares.append((n * (1 - size[g] * matrix[g][g] / mass[g] if mass[g] else 1.0) + 10 * overall) / (n + 10))
    return shares


@pytest.mark.parametrize("case", range(8))
def test_the_shares_are_those_of_a_slow_twin(case: int) -> None:
    torch.manual_seed(case)
    classes, number = [2, 3, 5, 30][case % 4], [6, 60, 700, 3000][case // 2]
    confidence = torch.rand(number)
    if case % 2:
        confidence = (8 * confidence).round() / 8  # many are equally sure
    predicted, given = torch.randint(classes, (2, number))
    given = torch.where(torch.rand(number) < 0.6, predicted, given)
    seen, prior = torch.rand(number) < 0.8, torch.rand(classes).softmax(0)
    found = shares(confidence, predicted, prior, given, seen)
    assert found.dtype == torch.float32
    assert ((found >= 0) & (found <= 1)).all()
    columns = [one.tolist() for one in (confidence, predicted, prior, given, seen)]
    assert_close(found.tolist(), slow_shares(*columns), 1e-6)


def shares(confidence: Tensor, predicted: Tensor, prior: Tensor, given: Tensor, seen: Tensor) -> Tensor:
    return wrong_shares(predicted, prior, given, seen, anchors(confidence, predicted, seen))


def network(true: Tensor, classes: int, mistakes: float = 0.15) -> tuple[Tensor, Tensor, Tensor]:
    """What a network that has learned the true classes, and nothing by heart, is sure of: it errs where it is least
    sure."""
    confidence = 0.3 + 0.7 * torch.rand(len(true))
    other = torch.randint(classes, true.shape)
    predicted = torch.where(confidence < 0.3 + 0.7 * mistakes, other, true)
    return confidence, predicted, torch.bincount(true, minlength=classes) / len(true)


def uniform(true: Tensor, classes: int, rate: float) -> Tensor:
    return torch.where(torch.rand(len(true)) < rate, torch.randint(classes, true.shape), true)


def actual(true: Tensor, given: Tensor, classes: int) -> Tensor:
    number = torch.bincount(given, minlength=classes)
    return torch.bincount(given[given != true], minlength=classes) / number.clamp(min=1)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.7])
def test_shares_of_uniform_noise_are_found(rate: float) -> None:
    torch.manual_seed(0)
    true = torch.randint(10, (20_000,))
    given = uniform(true, 10, rate)
    found = shares(*network(true, 10), given, torch.ones(len(true), dtype=torch.bool))
    assert_close(found, actual(true, given, 10), {0.0: 0.005, 0.4: 0.05}.get(rate, 0.03))


def test_shares_of_asymmetric_noise_are_found_class_by_class() -> None:
    """40 % of class 1 are given as 0: of those given as 0 many are wrong, of those given as 1 none."""
    torch.manual_seed(0)
    true = torch.randint(5, (20_000,))
    given = torch.where((true == 1) & (torch.rand(len(true)) < 0.4), 0, true)
    found = shares(*network(true, 5), given, torch.ones(len(true), dtype=torch.bool))
    assert_close(found, actual(true, given, 5), 0.03)
    assert found[0] > 0.25
    assert found[1:].max() < 0.01


def test_shares_of_a_long_tail_are_found() -> None:
    """Uniform noise puts more wrong labels into a small class than it leaves right ones."""
    torch.manual_seed(0)
    true = torch.cat([torch.full((int(5000 * 50 ** (-c / 9)),), c) for c in range(10)])
    given = uniform(true, 10, 0.4)
    expected = actual(true, given, 10)
    assert expected[9] > 0.8
    assert expected[0] < 0.2
    found = shares(*network(true, 10, mistakes=0.05), given, torch.ones(len(true), dtype=torch.bool))
    assert_close(found, expected, 0.1)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_hard_samples_of_frequent_classes_are_not_taken_for_rare_ones(rate: float) -> None:
    """Classes overlap, and the network gives each the same prior, as its loss had it: what it says of the samples of a
    frequent class is then too often a rare one."""
    torch.manual_seed(0)
    size = torch.tensor([4000, 1000, 250, 60])
    true = torch.arange(4).repeat_interleave(size)
    given = uniform(true, 4, rate)
    centre = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    x = centre[true] + torch.randn(len(true), 2)
    average = PseudoLabels(len(true), 4, 0.0)
    average.average(torch.arange(len(true)), -(x[:, None] - centre).square().sum(2) / 2, torch.zeros(1), torch.ones(1))
    everybody, expected = torch.ones(len(true), dtype=torch.bool), actual(true, given, 4)
    log_prior = torch.bincount(given).div(len(true) / 4).log()
    balanced = shares(*average.read(given)[1:4], given, everybody)
    found = shares(*average.read(given, log_prior)[1:4], given, everybody)
    assert (balanced - expected)[0] > 0.09
    assert (found - expected).abs()[0] < 0.04
    assert (found - expected).abs()[given].mean() < (balanced - expected).abs()[given].mean() / 2


def test_a_class_of_no_anchors_takes_the_share_of_all() -> None:
    torch.manual_seed(0)
    true = torch.randint(4, (8000,))
    given = uniform(true, 4, 0.3)
    confidence, predicted, prior = network(true, 4, mistakes=0.0)
    predicted[predicted == 2] = 3
    found = shares(confidence, predicted, prior, given, torch.ones(len(true), dtype=torch.bool))
    assert found.isfinite().all()
    # Half of the anchors of 3 are of class 2.
    assert 0.2 < found[2] < 0.6
    nobody = shares(confidence, predicted, prior, given, torch.zeros(len(true), dtype=torch.bool))
    assert nobody.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("number", [0, 1, 7, 500])
def test_ranks_are_those_of_a_loop(number: int) -> None:
    torch.manual_seed(number)
    value, group = (5 * torch.rand(number)).round(), torch.randint(9, (number,)) ** 2
    value[torch.rand(number) < 0.1] = -torch.inf
    expected = []
    for i in range(number):
        alike = [j for j in range(number) if group[j] == group[i]]
        expected.append(sorted(alike, key=lambda j: (value[j].item(), j)).index(i))
    assert rank_within(value, group).tolist() == expected


# --- who is held out -------------------------------------------------------------------------------------------------


def made(number: int, classes: int = 3, *, known: bool = True, seed: int = 0) -> Selection:
    return Selection(number, classes, samples=number if known else None, seed=seed, device="cpu")


def held(one: Selection) -> Tensor:
    return one.code[:-1] == HELD


@pytest.mark.parametrize(
    ("number", "known", "share"),
    [
        (100_000, False, 0.02),
        (30_000, True, 0.02),
        (5_000, True, 0.04),  # 200 of them
        (1_000, True, 0.05),
        (500_000, True, 0.002),  # 1,000 of them
    ],
)
def test_the_share_that_is_held_out(number: int, known: bool, share: float) -> None:
    for seed in (0, 1, 12_345):
        found = held(made(number, known=known, seed=seed)).sum().item()
        assert abs(found - number * share) < 4 * math.sqrt(number * share)


def test_of_a_part_as_many_are_held_out_as_of_a_data_set_of_its_own() -> None:
    rows, part = 1_000_000, torch.arange(5, 1_000_000, 500)
    found = held(Selection(rows, 3, samples=len(part), seed=0, device="cpu"))[part].sum().item()
    assert abs(found - 100) < 4 * math.sqrt(100)  # one in twenty of 2,000


def test_no_class_is_held_out_whole() -> None:
    """Of classes of one, of four and of many samples."""
    label = torch.cat([torch.arange(40), torch.arange(40, 50).repeat(4), torch.full((2000,), 50)])
    x = nn.functional.one_hot(label).float() + 0.1 * torch.randn(len(label), 51)
    model = nn.Linear(51, 51)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=len(label))
    out = []
    for _ in range(2):
        for index in torch.randperm(len(label)).split(160):
            fsr.loss(model(x[index]), label[index], index).backward()
            assert fsr._memory.selection is not None
            out.append(held(fsr._memory.selection))
    before, after = out[0], out[-1]
    assert before[:40].any()
    assert before[40:80].any()
    assert not after[:80].any()
    assert torch.equal(after[80:], before[80:])
    assert fsr._memory.selection.weight[:80].min() == 1


def test_it_makes_no_difference_when_the_tables_grow() -> None:
    whole, grown = made(5000, known=False, seed=3), made(1, known=False, seed=3)
    for number in (2, 64, 64, 1000, 70, 5000):
        grown.grow(number)
        assert grown.code[-1] == TRAINED  # the spare row is nobody's
        assert torch.equal(grown.weight, (grown.code != HELD).float())
    assert torch.equal(grown.code, whole.code)


def test_seeds_hold_out_others() -> None:
    number = 200_000
    sets = [held(made(number, known=False, seed=seed)) for seed in (0, 1, 2, 1000)]
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert abs((one & other).sum().item() - 0.0004 * number) < 4 * math.sqrt(0.0004 * number)


def test_small_numbers_are_held_out_as_often_as_others() -> None:
    """Of a small data set all are small; each seed holds out its share of them, and each number has its turn."""
    sets = torch.stack([held(made(64, seed=seed)) for seed in range(1000)])
    assert_close(sets.double().mean().item(), 0.05, 0.004)
    often = sets.sum(0)  # of 1,000
    assert often.min() > 20
    assert often.max() < 85
    by_seed = torch.bincount(sets.sum(1), minlength=9) / 1000  # binomial, as if each was drawn for itself
    expected = [math.comb(64, k) * 0.05**k * 0.95 ** (64 - k) for k in range(len(by_seed))]
    assert (by_seed - torch.tensor(expected)).abs().max() < 0.06


@pytest.mark.parametrize("stride", [2, 3, 10, 100, 128])
def test_no_class_is_spared_where_classes_take_turns(stride: int) -> None:
    """Data sets are often sorted, or lie class by class in turn; neighbours are held out independently too."""
    number = 400_000
    one = held(made(number, known=False)).double()
    mean, each = one.mean(), number // stride
    off = (one[: each * stride].view(each, stride).mean(0) - mean) / (mean * (1 - mean) / each).sqrt()
    assert off.abs().max() < 4.5
    assert off.square().mean() < 1 + 6 * math.sqrt(2 / stride)
    both = (one[stride:] * one[:-stride]).mean() * number
    assert abs(both.item() - 0.0004 * number) < 5 * math.sqrt(0.0004 * number)


def test_who_is_held_out_is_not_trained_on() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=400)
    x, y = torch.randn(400, 4), torch.randint(3, (400,))
    logits = model(x)
    loss = fsr.loss(logits, y, torch.arange(400))
    assert fsr._memory.selection is not None
    mine = ~held(fsr._memory.selection)
    assert 300 < mine.sum() < 400
    assert_close(fsr.weights, mine / mine.sum())
    assert_close(loss.detach(), F.cross_entropy(logits[mine], y[mine]).detach())
    assert fsr.scores.isfinite().all()  # P̂ is known of them too


# --- when the network is seen to learn by heart ----------------------------------------------------------------------


class Watched:
    """A selection, and tables as epochs would leave them: p̄ says class 0, 1, 2 in turn, so do the labels.

    Of the share `hard` of the samples it says another class, without being sure: too many to know the right labels.
    """

    def __init__(
        self, number: int = 3000, warmup: int = 0, wrong: float = 0.0, spread: float = 0.5, hard: float = 0.25
    ) -> None:
        torch.manual_seed(0)
        self.number, self.warmup, self.epoch, self.spread, self.rate = number, warmup, 0, spread, 0.0
        self.one = made(number)
        self.table = ScoreTable(number, 0.9, learned=True)
        self.average = PseudoLabels(number, 3, 0.8)
        true = torch.arange(number) % 3
        self.given = torch.where(torch.rand(number) < wrong, (true + 1) % 3, true)
        self.average.columns["logits"][:-1] = (0.1 + 0.7 * F.one_hot(true, 3)).half()
        unsure = torch.arange(number) >= (1 - hard) * number
        self.average.columns["logits"][:-1][unsure] = (0.3 + 0.1 * F.one_hot((true + 2) % 3, 3)[unsure]).half()
        self.table.score[:-1] = torch.randn(number)
        self.hard = torch.rand(number) - 4  # the log-probability of each given label at first

    def ends(self, inside: float, outside: float, seen: Tensor | None = None) -> bool:
        """An epoch after which the labels that were trained on, and those held out, are so much likelier than at first,
        on average: each other one by `spread` more or less. Whether labels are judged."""
        self.table.epoch[:-1] = self.epoch if seen is None else torch.where(seen, self.epoch, self.epoch - 1)
        likelihood = self.hard.clone()
        for those, growth in ((self.one.code[:-1] != HELD, inside), (held(self.one), outside)):
            each = growth + self.spread * growth * (-1) ** torch.arange(int(those.sum()))
            likelihood[those] += each
        reading = PseudoLabels.read(self.average, self.given)._replace(own=likelihood.exp())
        self.average.read = lambda label, log_prior=None: reading  # type: ignore[method-assign]
        self.one.end_epoch(self.epoch, self.warmup, self.table, self.given, self.average, rate=self.rate)
        self.epoch += 1
        return self.one.active


START = [(0.0, 0.0)] * 2  # from the second epoch on, what becomes of p̄ is looked at


def test_labels_are_judged_after_two_epochs_apart() -> None:
    watched = Watched(wrong=0.3)
    assert not any(watched.ends(a, a) for a in (0.0, 0.1, 0.2, 0.2, 0.2))
    assert not watched.ends(0.4, 0.2)
    assert watched.ends(0.5, 0.2)
    code = watched.one.code[:-1]
    assert not (code == HELD).any()
    assert_close((code == WRONG).double().mean().item(), watched.one.share.double().mean().item(), 1e-3)
    assert watched.one.share.mean() > 0.2
    assert watched.ends(0.2, 0.2)  # there is no way back


@pytest.mark.parametrize(
    "epochs",
    [
        [(0.5, 0.5)] * 9,
        [*START, *[(0.4, 0.2), (0.2, 0.2)] * 5],  # never two in a row
        [*START, *[(0.29, 0.2)] * 9],  # too little
        [*START, *[(0.2, 0.5)] * 9],  # what is held out becomes likelier
        [
            *START,
            *[(0.19 + 0.1 * e, 0.1 * e) for e in range(10)],  # both do, the one two epochs ahead
        ],
        [(9.0, 0.0), (0.2, 0.2), *[(0.28, 0.2)] * 9],  # what was before does not count
    ],
)
def test_labels_are_not_judged_where_nothing_is_learned_by_heart(epochs: list[tuple[float, float]]) -> None:
    watched = Watched(wrong=0.3)
    assert not any(watched.ends(*one) for one in epochs)
    assert not (watched.one.code == WRONG).any()


def predict(watched: Watched, share: float) -> None:
    """p̄ predicts so many of the right labels."""
    true = torch.arange(watched.number) % 3
    sure = (torch.arange(watched.number) < share * watched.number)[:, None]
    those, others = 0.1 + 0.7 * F.one_hot(true, 3), 0.3 + 0.1 * F.one_hot((true + 2) % 3, 3)
    watched.average.columns["logits"][:-1] = torch.where(sure, those, others).half()


def test_labels_are_judged_where_the_right_ones_are_known() -> None:
    """The network predicts 97 % of the right labels, then 98; in the next epoch it learns none: 0.5 % in each."""
    watched = Watched(wrong=0.3)
    for share in (0.9, 0.95, 0.97, 0.98):
        predict(watched, share)
        assert not watched.ends(0.0, 0.0)
    read = watched.one.share.clone()
    assert watched.ends(0.0, 0.0)
    assert watched.one.apart == 0
    assert watched.one.early
    assert not watched.one.drifts
    # Little is learned by heart that the regulariser would slow down.
    assert_close(watched.one.hold(tail=False), watched.one.pull / 3, 1e-6)
    assert torch.equal(watched.one.share, read)  # nor was it, so that it had to be made good
    assert_close(read.mean().item(), 0.3, 0.05)
    assert_close((watched.one.code[:-1] == WRONG).double().mean().item(), read.double().mean().item(), 1e-3)
    assert not held(watched.one).any()


@pytest.mark.parametrize(
    ("wrong", "shares"),
    [
        (0.3, [0.78] * 8),  # too few of the right ones are known
        (0.3, [0.82 + 0.01 * e for e in range(8)]),  # it learns a hundredth of the right ones in an epoch
        (0.3, [0.9, 0.92, 0.92, 0.94, 0.94, 0.96, 0.96, 0.98]),  # so it does, though in every other epoch alone
        (0.05, [0.97 + 0.0035 * e for e in range(8)]),  # it learns one for each fourteen wrong ones
        (0.05, [0.9] * 8),  # a third of those that are not predicted is wrong
        (0.0, [1.0] * 8),  # none is
    ],
)
def test_where_right_labels_are_not_known_nothing_is_judged(wrong: float, shares: list[float]) -> None:
    watched = Watched(wrong=wrong)
    for share in shares:
        predict(watched, share)
        assert not watched.ends(0.0, 0.0)
    assert watched.one.estimated


def test_a_network_that_still_learns_is_waited_for() -> None:
    """Labels held out become likelier by 0.03 in two epochs, though no more of them are predicted; then by 0.01."""
    watched = Watched(wrong=0.3, hard=0.0)
    assert not any(watched.ends(0.015 * e, 0.015 * e) for e in range(8))
    assert not watched.ends(0.12, 0.12)
    assert watched.ends(0.115, 0.115)


def test_a_network_that_has_begun_to_learn_by_heart_is_waited_for() -> None:
    """0.06 ahead is more than three standard errors, and less than tells that it does."""
    watched = Watched(wrong=0.3, hard=0.0, spread=0.1)
    for one in START:
        watched.ends(*one)
    assert not any(watched.ends(0.06, 0.0) for _ in range(5))
    watched.ends(0.2, 0.0)
    assert watched.ends(0.2, 0.0)
    assert not watched.one.early


def test_what_is_known_counts_after_the_warm_up() -> None:
    watched = Watched(wrong=0.3, warmup=6, hard=0.0)
    assert [watched.ends(0.0, 0.0) for _ in range(6)] == [False] * 5 + [True]


def test_a_gap_that_chance_explains_does_not_count() -> None:
    """0.35 of 50 samples, where some gain 1.1 and others nothing."""
    watched = Watched(number=1000, spread=1.0)
    assert 30 < held(watched.one).sum() < 70
    assert not any(watched.ends(*one) for one in START)
    assert not any(watched.ends(0.55, 0.2) for _ in range(6))
    watched.ends(1.1, 0.2)
    assert watched.ends(1.1, 0.2)


def test_hard_samples_among_those_held_out_are_no_learning_by_heart() -> None:
    """Nor wrong labels: what counts is what became of each."""
    watched = Watched()
    watched.hard[held(watched.one)] -= 1
    assert not any(watched.ends(a, a) for a in (0.0, 0.1, 0.2, 0.2, 0.2, 0.2))


def test_learning_by_heart_shows_where_held_out_labels_become_hardly_likelier() -> None:
    """0.1 is what counts at least; what is held out becomes likelier by 0.1 in two epochs."""
    watched = Watched(spread=0.3)
    learning = [*START, (0.1, 0.05), (0.2, 0.1), (0.3, 0.15), (0.39, 0.2), (0.44, 0.25)]
    assert not any(watched.ends(*one) for one in learning)
    assert not watched.ends(0.51, 0.3)
    assert watched.ends(0.56, 0.35)
    slower = Watched()
    assert not any(slower.ends(*one) for one in [*START, (0.1, 0.05), (0.15, 0.06)])
    assert not slower.ends(0.2, 0.07)
    assert slower.ends(0.21, 0.08)


def test_labels_that_are_as_unlikely_as_can_be_stay_so() -> None:
    """A probability of 1e-30 that becomes 1e-9 is no growth."""
    watched = Watched()
    watched.hard -= 60
    assert not any(watched.ends(*one) for one in START)
    assert not any(watched.ends(20.0, 0.0) for _ in range(5))
    assert_close(watched.one.growth, [0.0, 0.0])


def test_labels_are_not_judged_in_the_warm_up_nor_before_the_shares_are_found() -> None:
    early = Watched()
    assert [early.ends(0.4 * (e > 1), 0.0) for e in range(6)] == [False] * 3 + [True] * 3
    watched = Watched(warmup=6)
    assert [watched.ends(0.4 * (e > 1), 0.0) for e in range(7)] == [False] * 5 + [True] * 2
    nobody_sure = Watched()
    nobody_sure.average.columns["logits"].zero_()
    assert not any(nobody_sure.ends(0.4 * (e > 1), 0.0) for e in range(7))


def test_labels_are_not_judged_where_nobody_is_held_out_or_nobody_came() -> None:
    watched = Watched()
    mine = ~held(watched.one)
    assert not any(watched.ends(0.4 * (e > 1), 0.0, seen=mine) for e in range(7))
    assert watched.one.growth == watched.one.readings == []
    nobody = Watched()
    assert not any(nobody.ends(0.4 * (e > 1), 0.0, seen=torch.zeros(3000, dtype=torch.bool)) for e in range(7))
    assert not nobody.one.estimated
    assert nobody.one.share.tolist() == [0, 0, 0]


def relabelled(wrong: float, number: int = 3000) -> Tensor:
    true = torch.arange(number) % 3
    return torch.where(torch.rand(number) < wrong, (true + 1) % 3, true)


def test_the_lowest_share_counts_as_long_as_the_network_learns() -> None:
    watched = Watched(wrong=0.3)
    for a in (0.0, 0.0, 0.1):
        watched.ends(a, a)
    first = watched.one.share.clone()
    watched.given = relabelled(0.6)
    watched.ends(0.2, 0.2)
    assert torch.equal(watched.one.share, first)
    watched.given = relabelled(0.1)
    watched.ends(0.21, 0.2)
    lower = watched.one.share.clone()
    assert (lower < first - 0.1).all()
    watched.given = relabelled(0.0)
    watched.ends(0.22, 0.21)  # 0.01 more than two epochs ago
    assert torch.equal(watched.one.share, lower)
    watched.ends(0.11, 0.1)
    assert torch.equal(watched.one.share, lower)
    watched.ends(0.45, 0.3)  # it learns, and by heart too
    assert torch.equal(watched.one.share, lower)
    watched.ends(0.3, 0.3)
    assert (watched.one.share < lower).all()


def test_what_was_learned_by_heart_before_is_made_good() -> None:
    """Half of the way from the shares that were read to where the line through the later readings starts."""
    watched = Watched()
    for a, wrong in ((0.0, 0.3), (0.05, 0.3), (0.1, 0.3)):
        watched.given = relabelled(wrong)
        watched.ends(a, a)
    read = watched.one.share.clone()
    gaps = [watched.one.readings[0][0]]
    for ahead, wrong in ((0.1, 0.25), (0.2, 0.2), (0.3, 0.15)):
        watched.given = relabelled(wrong)
        assert not watched.ends(0.1 + ahead, 0.1)
        assert torch.equal(watched.one.share, read)
        gaps.append(ahead)
        watched.one.apart = 0
    assert_close([ahead for ahead, _ in watched.one.readings], gaps, 1e-5)
    watched.one.apart = 1
    watched.given = relabelled(0.1)
    assert watched.ends(0.5, 0.1)
    x, y = zip(*watched.one.readings, strict=True)
    assert x[-1] == pytest.approx(0.4, abs=1e-5)
    slope = torch.linalg.lstsq(torch.tensor([[1.0, a] for a in x]), torch.tensor(y)[:, None]).solution
    now = read[watched.given].mean().item()
    assert slope[0].item() > now
    assert_close(watched.one.share, read * (now + slope[0].item()) / 2 / now, 1e-5)
    assert_close(watched.one.share.mean().item(), 0.3, 0.05)


def test_later_readings_make_no_share_smaller_nor_larger_than_1() -> None:
    one = made(30)
    label = torch.arange(30) % 3
    for readings, factor in (
        ([(0.0, 0.4), (0.1, 0.5), (0.2, 0.6)], 1.0),  # the line rises
        ([], 1.0),  # none, as in a state of an earlier version
        ([(0.1, 0.4), (0.2, 0.2)], 1.0),  # too few
        ([(0.1, 0.4), (0.1, 0.3), (0.1, 0.2)], 1.0),  # no line
        ([(0.1, 0.8), (0.2, 0.6), (0.3, 0.4)], 1.5),
        ([(0.5, 0.8), (1.0, 0.6), (1.5, 0.4)], 1.5),
        ([(0.50, 0.30), (0.505, 0.27), (0.51, 0.26)], 1.5),  # steep: all would be wrong
    ):
        one.share.copy_(torch.tensor([0.3, 0.5, 0.7]))
        one.readings = readings
        one._look_back(label)
        expected = {1.0: [0.3, 0.5, 0.7], 1.5: [0.45, 0.75, 1.0]}[factor]
        assert_close(one.share.tolist(), expected, 1e-6)
    one.share.zero_()
    one._look_back(label)
    assert one.share.tolist() == [0, 0, 0]


def test_epochs_that_saw_few_held_out_samples_tell_nothing() -> None:
    watched = Watched(wrong=0.3)
    one_held = ~held(watched.one)
    one_held[held(watched.one).nonzero()[0]] = True
    assert not any(watched.ends(0.4 * (e > 1), 0.0, seen=one_held) for e in range(5))
    assert watched.one.growth == []
    before = watched.one.share.clone()
    watched.given = torch.arange(3000) % 3
    for a in (0.0, 0.1):  # of the others held out, growth is counted from now on
        watched.ends(a, a)
    assert (watched.one.share < before).all()


def test_a_state_of_an_earlier_version_starts_to_compare() -> None:
    watched = Watched()
    for _ in range(4):
        watched.ends(0.0, 0.0)
    state = watched.one.state_dict()
    for name in ("first", "growth", "weight", "readings", "predicted", "early", "peak", "drifts"):
        del state[name]
    other = Watched()
    assert not any(other.ends(3.0, 3.0 * e) for e in range(4))
    other.one.load_state_dict(state)
    assert other.one.first.isnan().all()
    assert [other.ends(0.2 + 0.4 * (e > 0), 0.2) for e in range(4)] == [False, False, True, True]


# --- who is judged how -----------------------------------------------------------------------------------------------


def test_of_each_class_the_share_of_lowest_score_is_taken_for_wrong() -> None:
    one = made(60)
    one.share.copy_(torch.tensor([0.5, 0.25, 0.0]))
    torch.manual_seed(0)
    given, score = torch.randint(3, (60,)), (4 * torch.randn(60)).round()
    given[::7], score[::11] = -1, torch.nan  # nobody knows their label; they were never visited
    one._judge(score, given)
    code = one.code[:-1]
    for c, share in enumerate((0.5, 0.25, 0.0)):
        those = [i for i in range(60) if given[i] == c and not score[i].isnan()]
        wrong = sorted(those, key=lambda i: (score[i].item(), i))[: int(len(those) * share)]
        assert [i for i in range(60) if given[i] == c and code[i] == WRONG] == sorted(wrong)
    assert (code[(given < 0) | score.isnan()] == TRAINED).all()


def test_a_label_counts_as_far_as_it_is_likely_right() -> None:
    """σ(4 (P̂ − t)), t of each class such that as much is missing as there are wrong labels."""
    one = made(6000)
    one.share.copy_(torch.tensor([0.5, 0.25, 0.0]))
    torch.manual_seed(0)
    given, score = torch.randint(3, (6000,)), torch.randn(6000)
    given[::7], score[::11] = -1, torch.nan
    one._judge(score, given)
    weight, known = one.weight[:-1].double(), (given >= 0) & score.isfinite()
    assert (weight[~known] == 1).all()
    for c, share in enumerate((0.5, 0.25, 0.0)):
        those = known & (given == c)
        assert_close(weight[those].mean().item(), 1 - share, 1e-6)
        if share:  # the same t for all of them
            inner = those & (weight > 1e-3) & (weight < 1 - 1e-3)
            assert inner.sum() > 300
            bar = score[inner].double() - weight[inner].logit() / 4
            assert_close(bar, bar.mean().expand(len(bar)), 1e-3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_of_scores_that_are_no_log_odds_the_order_counts(share: float) -> None:
    """Of a pusher of any unit: no more and no less weight is taken, from the lowest."""
    torch.manual_seed(0)
    score, given = torch.randn(400).double().float() * 1e-6, torch.arange(400) % 2
    one = Selection(400, 2, samples=400, seed=0, device="cpu", log_odds=False)
    one.share.fill_(share)
    one._judge(score, given)
    weight = one.weight[:-1]
    for c in (0, 1):
        mine = weight[given == c][score[given == c].argsort()]
        number = int(200 * share)
        assert_close(mine[: max(0, number - 1)].sum().item(), 0.0, 0.05)
        assert_close(mine[number + 1 :].mean().item() if number < 199 else 1.0, 1.0, 0.05)
        assert_close(mine.sum().item(), 200.0 - number, 1e-3)


@pytest.mark.parametrize("extreme", [1e30, -1e30])
def test_a_class_that_a_mask_shuts_is_no_matter_to_others(extreme: float) -> None:
    """Then P̂ of one sample is out of all proportion."""
    torch.manual_seed(0)
    score, given = torch.randn(900), torch.arange(900) % 3
    one = made(900)
    one.share.fill_(0.3)
    one._judge(score, given)
    expected = one.weight.clone()
    score[0] = extreme
    one._judge(score, given)
    assert one.weight[0] == (extreme > 0)
    assert_close(one.weight[:-1][given > 0], expected[:-1][given > 0], 1e-5)
    assert_close(one.weight[:-1][given == 0].mean().item(), 0.7, 1e-4)


def test_labels_are_judged_whatever_the_default_device_is() -> None:
    expected, found = made(300), made(300)
    torch.manual_seed(0)
    score, given = torch.randn(300), torch.arange(300) % 3
    for one, device in ((expected, "cpu"), (found, "meta")):
        one.share.fill_(0.3)
        with torch.device(device):
            one._judge(score, given)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.code, expected.code)


def test_labels_that_nobody_can_tell_apart_lose_the_same_weight() -> None:
    one = made(300)
    one.share.fill_(0.3)
    one._judge(torch.full((300,), 5.0), torch.arange(300) % 3)
    assert_close(one.weight[:-1], torch.full((300,), 0.7), 1e-6)
    one._judge(torch.full((300,), torch.nan), torch.arange(300) % 3)
    assert (one.weight == 1).all()


def test_labels_are_judged_afresh_every_epoch() -> None:
    watched = Watched(wrong=0.3)
    watched.table.score[:-1] *= 100
    for a in (0.3, 0.3, 0.3):
        watched.ends(a, a)
    watched.ends(0.9, 0.3)
    watched.ends(0.9, 0.3)
    before = watched.one.code.clone()
    watched.table.score[:-1] *= -1  # so far apart that it matters little which classes are confused
    watched.ends(0.9, 0.3)
    after = watched.one.code
    assert (before == WRONG).sum() == (after == WRONG).sum() > 500
    assert not ((before == WRONG) & (after == WRONG)).any()


def test_samples_that_come_later_are_trained_on() -> None:
    one = made(8, known=False)
    one.active = True
    one.code[:-1] = WRONG
    one.weight[:-1] = 0.25
    one.grow(4000)
    assert (one.code[:8] == WRONG).all()
    assert (one.code[8:] == TRAINED).all()
    assert (one.weight[:8] == 0.25).all()
    assert (one.weight[8:] == 1).all()
    assert len(one.weight) == len(one.code)


# --- runs, from the first batch on -----------------------------------------------------------------------------------


def run(
    number: int, classes: int, epochs: int = 5, *, known: bool = True, judged: bool = True, **options: Any
) -> FSRWrapper:
    """A short run with labels that are judged from the third epoch on, if they are; finite at every step."""
    torch.manual_seed(0)
    x, y = torch.randn(number, 2), torch.randint(classes, (number,))
    y = options.pop("labels", y)
    options = {"warmup_epochs": 0 if judged else 100, **options}  # runs as small may be judged by chance
    model = nn.Linear(2, classes)
    fsr = FSRWrapper(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        num_samples=number if known else None,
        samples_per_epoch=number,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(epochs):
            for index in torch.randperm(number).split(8):
                loss = fsr.loss(model(x[index]), y[index], index)
                fsr.zero_grad()
                loss.backward()
                assert loss.isfinite()
                assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
                fsr.step()
            if judged and epoch == 1:
                judge(fsr, 0.4)
    assert fsr.epoch == epochs
    other = copy.deepcopy(fsr)
    other.load_state_dict(fsr.state_dict())
    assert frozen(other.state_dict()) == frozen(fsr.state_dict())
    return fsr


def judge(fsr: FSRWrapper, share: float) -> None:
    known, memory = fsr._memory.selection, fsr._memory
    assert known is not None
    known.active = known.estimated = True
    known.share.fill_(share)
    known._judge(memory.table.score[:-1], memory.given.known().long())


@pytest.mark.parametrize("number", [2, 5, 19])
@pytest.mark.parametrize("judged", [True, False])
def test_few_samples_train(number: int, judged: bool) -> None:
    fsr = run(number, 3, judged=judged)
    assert fsr._memory.selection is not None
    assert fsr._memory.selection.estimated
    assert fsr.is_reweighting == judged


@pytest.mark.parametrize("storage", ["float16", "int8", 3, 40])
@pytest.mark.parametrize("known", [True, False])
def test_all_storages_and_an_unknown_number_train(storage: Any, known: bool) -> None:
    fsr = run(100, 10, known=known, relabel_storage=storage)
    assert fsr._memory.selection is not None
    assert (fsr._memory.selection.code == WRONG).sum() > 20
    assert len(fsr._memory.selection.code) == (101 if known else 129)


def test_samples_of_one_class_train() -> None:
    fsr = run(40, 4, labels=torch.full((40,), 2))
    assert fsr._memory.selection is not None
    assert (fsr._memory.selection.code == WRONG).sum() == 16


def test_more_classes_than_16_bits_train() -> None:
    labels = torch.randint(40_000, (24,))
    labels[0], labels[1] = 39_999, 33_000
    fsr = run(24, 40_000, 4, labels=labels, relabel_storage=3)
    assert torch.equal(fsr._memory.given.known().long(), labels)
    assert_close(fsr._memory.log_prior.exp().mean(), 1.0, 1e-3)


def test_samples_that_are_never_visited_are_not_judged() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=100, samples_per_epoch=40)
    x, y = torch.randn(100, 2), torch.randint(3, (100,))
    for _ in range(4):
        fsr.loss(model(x[:40]), y[:40], torch.arange(40)).backward()
    judge(fsr, 1.0)
    assert fsr._memory.selection is not None
    code = fsr._memory.selection.code[:-1]
    assert (code[:40] == WRONG).all()
    assert (code[40:] == TRAINED).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_epochs_in_which_nothing_can_be_learned_are_not_counted() -> None:
    """NaN throughout, as after a wrong start: nothing is known then, and the state can still be saved and loaded."""
    model = nn.Linear(2, 3)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=10, nonfinite="skip")
    for _ in range(5):
        fsr.loss(model(torch.full((10, 2), torch.nan)), torch.arange(10) % 3, torch.arange(10))
    assert fsr._memory.selection is not None
    assert not fsr._memory.selection.estimated
    fsr.load_state_dict(fsr.state_dict())


def test_labels_that_come_with_mixed_targets_are_judged() -> None:
    """As timm mixes: the target is soft, the sample's own class is `label`."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=90, warmup_epochs=100)
    x = torch.randn(90, 4)
    y = torch.arange(90) % 3
    y[y == 2] = 0  # 60, 30 and none
    soft = 0.8 * F.one_hot(y, 3) + 0.2 * F.one_hot(y.flip(0), 3)
    for _ in range(3):
        fsr.loss(model(x), soft, torch.arange(90), label=y).backward()
    memory = fsr._memory
    assert torch.equal(memory.given.known().long(), y)
    assert memory.selection is not None
    assert memory.selection.estimated
    assert memory.log_prior is not None
    assert_close((memory.log_prior[0] - memory.log_prior[1]).item(), math.log(2))


@pytest.mark.parametrize(
    ("active", "pull", "times"), [(False, 0.0, 1.0), (True, 0.0, 2.0), (True, 0.4, 1.6), (True, 1.0, 1.0)]
)
def test_right_labels_that_are_learned_by_heart_take_more_of_the_log_prior_and_of_margins(
    active: bool, pull: float, times: float
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=90, class_balance=0.8)
    fsr.loss(model(torch.randn(90, 4)), (torch.arange(90) < 9).long(), torch.arange(90)).backward()
    memory = fsr._memory
    assert memory.selection is not None
    memory.selection.active, memory.selection.pull = active, pull
    memory._count_classes(memory.given.known())
    assert memory.log_prior is not None
    assert_close((memory.log_prior[0] - memory.log_prior[1]).item(), times * 0.8 * math.log(9))
    rarest = times * 0.8 * functional._MARGIN * (1 - (functional._ALIKE / 9) ** 0.25)
    assert memory.margin is not None
    assert_close(memory.margin.tolist(), [rarest * 9**-0.25, rarest])


@pytest.mark.parametrize(("pull", "held"), [(0.3, 0.0), (0.5, 0.0), (0.75, 0.5), (1.0, 1.0)])
def test_in_a_long_tail_the_regulariser_needs_more_wrong_labels(pull: float, held: float) -> None:
    one = Selection(10, 2, samples=10, seed=0, device="cpu")
    one.active, one.pull = True, pull
    assert (one.hold(tail=False), one.hold(tail=True)) == (pull, held)


@pytest.mark.parametrize("rule", [{}, {"weight_rule": "clip", "dictionary_size": 50}])
def test_classes_are_as_frequent_as_the_sampler_draws_them(rule: dict[str, Any]) -> None:
    """A sampler that draws all classes as often has balanced them already; when it is left, it is forgotten."""
    size = torch.tensor([400, 100, 20])
    label = torch.arange(3).repeat_interleave(size)
    x, model = nn.functional.one_hot(label).float(), nn.Linear(3, 3)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=len(label), **rule)

    def epochs(number: int, weight: Tensor | None) -> Tensor:
        for _ in range(number):
            order = torch.randperm(len(label)) if weight is None else weight[label].multinomial(len(label), True)
            for index in order.split(130):
                fsr.loss(model(x[index]), label[index], index).backward()
                fsr.step()
                fsr.zero_grad()
        assert fsr._memory.log_prior is not None
        return fsr._memory.log_prior

    torch.manual_seed(0)
    natural = (size.double() / size.double().mean()).log().float()
    assert torch.equal(epochs(3, None), natural)
    assert epochs(20, 1 / size).abs().max() < 0.2
    assert_close(epochs(20, None), natural, 0.05)


def test_once_labels_are_judged_those_of_rare_classes_are_held_back() -> None:
    """The loss is that of the logits less the margins; no classes of one size have any."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(60, 4, dtype=torch.float64)
    for rare, there in ((10, True), (18, False)):
        fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.0), num_samples=60, relabel_weight=0.0)
        y = torch.zeros(60, dtype=torch.long)
        y[:rare], y[rare : 2 * rare - 4] = 2, 1
        for _ in range(2):
            fsr.loss(model(x), y, torch.arange(60)).backward()
            memory = fsr._memory
            assert memory.selection is not None
            memory.selection.weight.fill_(1)
            memory.selection.code.fill_(TRAINED)
            if not memory.selection.active:
                assert memory.log_prior is not None
                before = F.cross_entropy(model(x) + memory.log_prior, y)
                assert_close(fsr.loss(model(x), y, torch.arange(60)), before, 1e-6)  # no margins yet
                memory.selection.active = True
        memory._count_classes(memory.given.known())
        assert (memory.margin is not None) == there
        margin = torch.zeros(3) if memory.margin is None else memory.margin
        assert memory.log_prior is not None
        logits = model(x) + memory.log_prior - F.one_hot(y, 3) * margin
        assert_close(fsr.loss(model(x), y, torch.arange(60)), F.cross_entropy(logits, y), 1e-6)


def test_a_sample_whose_target_shows_another_class_takes_no_pseudo_label() -> None:
    """Its averaged probabilities are those of its own image: neither are predictions pulled to them."""
    fsr = run(50, 4)
    model, memory = fsr._reweighting.intake.core, fsr._memory
    prior, x = memory.log_prior, torch.randn(6, 2)
    assert memory.selection is not None
    assert prior is not None
    for hidden, index in ((True, torch.arange(6)), (False, torch.arange(6, 12))):  # each sample once an epoch
        codes = torch.tensor([TRAINED, WRONG, WRONG, TRAINED, WRONG, TRAINED], dtype=torch.uint8)
        memory.selection.weight[index], y = (codes == TRAINED).float(), memory.given.known()[index].long()
        target = F.one_hot((y + hidden) % 4, 4).float()
        logits = model(x)
        loss = fsr.loss(logits, target, index, label=y)
        believed = (F.cross_entropy(logits + prior, target, reduction="none") * fsr.weights).sum()
        assert torch.isclose(loss, believed, rtol=1e-5) == hidden


def test_a_closure_is_one_function_also_where_it_ends_an_epoch() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.0), num_samples=90)
    x, y = torch.randn(90, 4), torch.randint(2, (90,)) * torch.randint(2, (90,))
    losses: list[float] = []

    def closure() -> Tensor:
        loss = fsr.loss(model(x), y, torch.arange(90))
        losses.append(loss.item())
        return loss

    class Twice(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
            assert closure is not None
            closure(), closure()

    fsr.optimizer = Twice(model.parameters(), lr=0.0)
    for _ in range(2):
        fsr.step(closure)
    assert losses[0] == losses[1]
    assert losses[2] == losses[3] != losses[0]


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_selection_comes_back_as_it_was() -> None:
    watched = Watched(wrong=0.3)
    for epoch in range(6):
        state = copy.deepcopy(watched.one.state_dict())
        other = made(3000, seed=7)
        other.load_state_dict(state)
        assert frozen(other.state_dict()) == frozen(state)
        watched.ends(0.1 * epoch, 0.0)
        assert frozen(state) == frozen(other.state_dict())
        assert epoch not in (1, 2, 3) or frozen(state) != frozen(watched.one.state_dict())


@pytest.mark.parametrize("judged", [True, False])
def test_a_run_goes_on_from_a_file(tmp_path: Path, judged: bool) -> None:
    fsr = run(100, 4, judged=judged)
    fsr.save(tmp_path)
    model = nn.Linear(2, 4)
    other = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=100, config=fsr.config)
    other.load(tmp_path)
    assert frozen(other.state_dict()) == frozen(fsr.state_dict())
    assert other.is_reweighting == judged


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no selection": lambda s: s.pop("selection"),
    "none": lambda s: s.update(selection=None),
    "active is a word": lambda s: s["selection"].update(active="yes"),
    "estimated is a number": lambda s: s["selection"].update(estimated=1),
    "predicted above 1": lambda s: s["selection"].update(predicted=[1.5]),
    "predicted NaN": lambda s: s["selection"].update(predicted=[math.nan]),
    "three predicted": lambda s: s["selection"].update(predicted=[0.5] * 3),
    "predicted alone": lambda s: s["selection"].update(predicted=0.5),
    "peak above 1": lambda s: s["selection"].update(peak=1.5),
    "peak NaN": lambda s: s["selection"].update(peak=math.nan),
    "early is a number": lambda s: s["selection"].update(early=1),
    "begun is a number": lambda s: s["selection"].update(begun=1),
    "down above 1": lambda s: s["selection"].update(down=1.5),
    "down NaN": lambda s: s["selection"].update(down=math.nan),
    "a rate below 0": lambda s: s["selection"].update(highest_rate=-0.1),
    "an infinite rate": lambda s: s["selection"].update(highest_rate=math.inf),
    "drifts is a number": lambda s: s["selection"].update(drifts=1),
    "apart below 0": lambda s: s["selection"].update(apart=-1),
    "apart is half": lambda s: s["selection"].update(apart=0.5),
    "agreement above 1": lambda s: s["selection"].update(agreement=[(1.5, 0.5)]),
    "agreement NaN": lambda s: s["selection"].update(agreement=[(0.5, math.nan)]),
    "three agreements": lambda s: s["selection"].update(agreement=[(0.1, 0.1)] * 3),
    "no pairs": lambda s: s["selection"].update(agreement=[0.5]),
    "single": lambda s: s["selection"].update(agreement=[(0.5,)]),
    "no agreement": lambda s: s["selection"].update(agreement=None),
    "growth NaN": lambda s: s["selection"].update(growth=[0.5, math.nan]),
    "growth in pairs": lambda s: s["selection"].update(growth=[(0.1, 0.1)]),
    "three growths": lambda s: s["selection"].update(growth=[0.1] * 3),
    "no growth": lambda s: s["selection"].update(growth=None),
    "growth gone": lambda s: s["selection"].pop("growth"),
    "growth alone": lambda s: [s["selection"].pop(name) for name in ("first", "readings")],
    "no readings": lambda s: s["selection"].pop("readings"),
    "a reading of three": lambda s: s["selection"].update(readings=[(0.1, 0.1, 0.1)]),
    "a reading NaN": lambda s: s["selection"].update(readings=[(0.1, math.nan)]),
    "a reading alone": lambda s: s["selection"].update(readings=[0.1]),
    "weight above 1": lambda s: s["selection"]["weight"].fill_(1.5),
    "weight below 0": lambda s: s["selection"]["weight"].fill_(-0.5),
    "weight NaN": lambda s: s["selection"]["weight"].fill_(math.nan),
    "weights too few": lambda s: s["selection"].update(weight=s["selection"]["weight"][1:]),
    "weights in float16": lambda s: s["selection"].update(weight=s["selection"]["weight"].half()),
    "first above 0": lambda s: s["selection"]["first"].fill_(0.1),
    "first infinite": lambda s: s["selection"]["first"].fill_(-math.inf),
    "first too few": lambda s: s["selection"].update(first=s["selection"]["first"][1:]),
    "first in float16": lambda s: s["selection"].update(first=s["selection"]["first"].half()),
    "first gone": lambda s: s["selection"].update(first=None),
    "share NaN": lambda s: s["selection"]["share"].fill_(math.nan),
    "share above 1": lambda s: s["selection"]["share"].fill_(1.5),
    "share below 0": lambda s: s["selection"]["share"].fill_(-0.5),
    "share of other classes": lambda s: s["selection"].update(share=torch.zeros(3)),
    "share in float64": lambda s: s["selection"].update(share=s["selection"]["share"].double()),
    "no such code": lambda s: s["selection"]["code"].fill_(3),
    "codes too few": lambda s: s["selection"].update(code=s["selection"]["code"][1:]),
    "codes in int64": lambda s: s["selection"].update(code=s["selection"]["code"].long()),
    "prior NaN": lambda s: s["log_prior"].fill_(math.nan),
    "prior of other classes": lambda s: s.update(log_prior=s["log_prior"][1:]),
    "margin NaN": lambda s: s.update(margin=torch.full((4,), math.nan)),
    "margin below 0": lambda s: s.update(margin=torch.tensor([0.0, 1.0, -1.0, 0.0])),
    "margins of other classes": lambda s: s.update(margin=torch.ones(3)),
    "margins in float64": lambda s: s.update(margin=torch.ones(4).double()),
    "no averages": lambda s: s.pop("pseudo"),
    "no given labels": lambda s: s.pop("given"),
    "not learned": lambda s: s["table"].pop("learned"),
}


@pytest.fixture(scope="module")
def trained() -> FSRWrapper:
    return run(50, 4)


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_damaged_states_are_refused(trained: FSRWrapper, damage: str) -> None:
    state = copy.deepcopy(trained.state_dict())
    DAMAGES[damage](state["fsr"])
    before = frozen(trained.state_dict())
    with pytest.raises(ValueError, match="none that state_dict"):
        trained.load_state_dict(state)
    assert frozen(trained.state_dict()) == before


def test_states_of_other_rules_are_refused(trained: FSRWrapper) -> None:
    model = nn.Linear(2, 4)
    paper = FSRWrapper(
        model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=50, weight_rule="clip", dictionary_size=8
    )
    x, y = torch.randn(50, 2), torch.randint(4, (50,))
    for _ in range(2):
        paper.loss(model(x), y, torch.arange(50))
    for one, other, rule in ((trained, paper, "clip"), (paper, trained, "select")):
        before = frozen(one.state_dict())
        with pytest.raises(ValueError, match=f"made with weight_rule='{rule}', this run has .*: pass '{rule}'"):
            one.load_state_dict(other.state_dict())
        assert frozen(one.state_dict()) == before


def test_states_of_another_storage_are_refused(trained: FSRWrapper) -> None:
    """Also where nothing is pulled to the averages: they are kept all the same."""
    model = nn.Linear(2, 4)
    options: dict[str, Any] = {"num_samples": 50, "relabel_storage": "int8", "relabel_weight": 0.0}
    other = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    with pytest.raises(ValueError, match="made with relabel_storage='float16', this run has 'int8': pass 'float16'"):
        other.load_state_dict(trained.state_dict())


def test_a_state_from_before_the_first_batch_loads() -> None:
    memory = Memory(run(4, 2).config, 4)
    assert frozen(Memory.from_state_dict(memory.state_dict(), memory.config, 4).state_dict()) == frozen(
        memory.state_dict()
    )


# --- what it is for --------------------------------------------------------------------------------------------------


def clusters(rate: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ten classes of two clusters each: inputs, given and true labels for training; inputs and labels to test with."""
    generator = torch.Generator().manual_seed(seed)
    centers, y = 0.9 * torch.randn(10, 2, 24, generator=generator), torch.randint(10, (6000,), generator=generator)
    x = centers[y, torch.randint(2, y.shape, generator=generator)] + torch.randn(6000, 24, generator=generator)
    other = torch.randint(10, y.shape, generator=generator)
    given = torch.where(torch.rand(6000, generator=generator) < rate, other, y)
    return x[:4000], given[:4000], y[:4000], x[4000:], y[4000:]


def accuracy(rate: float, seed: int, *, plain: bool, epochs: int = 12) -> tuple[float, FSRWrapper | None]:
    x, y, _, test_x, test_y = clusters(rate, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fsr = None if plain else FSRWrapper(model, optimizer, num_samples=len(x))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(100):
            logits = model(x[index])
            loss = F.cross_entropy(logits, y[index]) if fsr is None else fsr.loss(logits, y[index], index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).double().mean().item(), fsr


def test_a_network_that_learns_wrong_labels_by_heart_is_kept_from_it() -> None:
    theirs, _ = accuracy(0.4, 0, plain=True)
    ours, fsr = accuracy(0.4, 0, plain=False)
    assert fsr is not None
    assert fsr.is_reweighting
    assert ours > theirs + 0.04
    _, given, true, _, _ = clusters(0.4, 0)
    assert fsr._memory.selection is not None
    taken = fsr._memory.selection.code[:-1] == WRONG
    assert (given != true)[taken].double().mean() > 0.9
    assert taken[given != true].double().mean() > 0.6


def test_right_labels_are_left_alone() -> None:
    theirs, _ = accuracy(0.0, 0, plain=True)
    ours, fsr = accuracy(0.0, 0, plain=False)
    assert ours > theirs - 0.015
    assert fsr is not None
    assert fsr._memory.selection is not None
    assert (fsr._memory.selection.code == WRONG).double().mean() < 0.02


def train_linear(apart: float, wrong: float, wrap: bool) -> tuple[float, Selection | None]:
    """The accuracy of a linear model, which learns nothing by heart, on right labels; what is known of those given."""
    torch.manual_seed(0)
    true, model = torch.randint(4, (24000,)), nn.Linear(6, 4)
    x = torch.randn(24000, 6) + apart * F.one_hot(true, 6)
    y = torch.where(torch.rand(4000) < wrong, torch.randint(4, (4000,)), true[:4000])
    sgd = torch.optim.SGD(model.parameters(), lr=0.2)
    fsr = FSRWrapper(model, sgd, num_samples=4000) if wrap else None
    for _ in range(12):
        for index in torch.randperm(4000).split(100):
            sgd.zero_grad()
            logits = model(x[index])
            loss = F.cross_entropy(logits, y[index]) if fsr is None else fsr.loss(logits, y[index], index)
            loss.backward()
            (fsr or sgd).step()
    with torch.no_grad():
        accuracy = (model(x[4000:]).argmax(1) == true[4000:]).double().mean().item()
    return accuracy, None if fsr is None else fsr._memory.selection


def test_a_model_that_learns_nothing_by_heart_trains_plainly_on_right_labels_that_are_hard() -> None:
    accuracy, known = train_linear(1.0, 0.0, wrap=True)
    assert known is not None
    assert not known.active
    assert TRAINED in known.code
    assert 0.5 < accuracy < 0.6


def test_a_model_that_learns_nothing_by_heart_judges_labels_of_classes_that_it_knows() -> None:
    accuracy, known = train_linear(3.0, 0.6, wrap=True)
    assert known is not None
    assert known.active
    assert known.estimated
    assert_close(known.share, torch.full((4,), 0.45), 0.12)
    assert accuracy > train_linear(3.0, 0.6, wrap=False)[0] + 0.005


# --- drift -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agreement", "number", "drifts"),
    [
        ([0.8, 0.85, 0.9, 0.95], 2000, False),
        ([0.8, 0.9, 0.88, 0.9], 2000, True),
        ([0.8, 0.9, 0.89, 0.888], 2000, False),  # no 1.5 points
        ([0.9, 0.84, 0.9], 100, False),  # within one and a half standard errors
        ([0.9, 0.8, 0.9], 100, True),
        ([0.99, 0.5, 0.99], 1, False),
    ],
)
def test_a_network_drifts_where_it_agrees_less_with_the_labels_it_trains_on(
    agreement: list[float], number: int, drifts: bool
) -> None:
    one = made(30)
    for share in agreement:
        one._look_for_drift(share, number)
    assert one.drifts == drifts
    one._look_for_drift(0.0, 0)  # an epoch that saw nobody
    one._look_for_drift(1.0, number)
    assert one.drifts == drifts  # there is no way back
    assert one.peak == 1


def test_drift_is_looked_for_once_labels_are_judged_among_those_trained_on() -> None:
    watched = Watched(wrong=0.3)
    watched.table.learned[:-1] = LAST
    for one in (*START, (0.4, 0.0)):
        watched.ends(*one)
    assert watched.one.peak == 0
    watched.table.learned[:-1] = 0
    assert watched.ends(0.4, 0.0)
    assert watched.one.peak == 0  # what came before the first judgement does not count
    trained = watched.one.code[:-1] == TRAINED
    watched.table.learned[:-1] = torch.where(trained, LAST, 0).to(torch.uint8)
    watched.ends(0.4, 0.0)
    assert watched.one.peak == 1
    assert not watched.one.drifts
    watched.table.learned[:-1][trained.nonzero()[:200, 0]] = 0
    watched.ends(0.4, 0.0)
    assert watched.one.drifts
    assert not watched.one.early
    assert watched.one.hold(tail=False) == 0


def test_a_network_that_drifts_is_held_to_its_averages_no_more() -> None:
    """The loss is then that of the targets alone."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 3), torch.randn(40, 2), torch.arange(40) % 3
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=40, class_balance=0.0)
    for _ in range(2):
        fsr.loss(model(x), y, torch.arange(40))
    judge(fsr, 0.5)
    state = copy.deepcopy(fsr.state_dict())

    def loss(**changes: Any) -> float:
        fsr.load_state_dict(copy.deepcopy(state))
        known = fsr._memory.selection
        assert known is not None
        assert known.pull == 1
        vars(known).update(changes)
        return fsr.loss(model(x), y, torch.arange(40)).item()

    held, drifting, without = loss(), loss(drifts=True), loss(pull=0.0)
    assert drifting == pytest.approx(without)
    assert held < drifting - 0.1


# --- the regulariser before labels are judged ------------------------------------------------------------------------


def test_it_begins_when_something_is_learned_by_heart_and_the_learning_rate_comes_down() -> None:
    """And holds as long as both are so; once labels are judged it is the learning rate that decides."""
    watched = Watched()
    learned = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.5, 0.5), (0.66, 0.55), (0.66, 0.55), (0.6, 0.6), (0.7, 0.59))
    holds = []
    for watched.rate, one in zip((0.1, 0.4, 0.4, 0.3, 0.4, 0.35, 0.3, 0.2), learned, strict=True):
        assert not watched.ends(*one)
        holds.append(watched.one.hold(tail=False))
        assert watched.one.hold(tail=True) == 0
    assert holds == pytest.approx([0, 0, 0, 0, 0, 0.5, 0, 1])
    watched.rate = 0.35
    assert [watched.ends(1.0, 0.6) for _ in range(2)] == [False, True]
    assert watched.one.pull < 0.5
    assert watched.one.hold(tail=False) == pytest.approx(0.5)
    watched.rate = 0.1
    watched.ends(1.0, 0.6)
    assert watched.one.hold(tail=False) == 1
    watched.one.early = True
    assert watched.one.hold(tail=False) == watched.one.pull * constants._EARLY


@pytest.mark.parametrize(
    ("wrong", "warmup", "rates", "held"),
    [
        (0.0, 0, (0.4, 0.1), 1.0),
        (0.07, 0, (0.4, 0.1), 1.0),
        (0.2, 0, (0.4, 0.1), 0.0),  # too many are wrong
        (0.0, 7, (0.4, 0.1), 0.0),
        (0.0, 0, (0.4, 0.4), 0.0),  # the rate stays
        (0.0, 0, (0.0, 0.0), 0.0),  # nobody knows it
    ],
)
def test_it_does_not_begin_where_many_labels_are_wrong_nor_in_the_warm_up(
    wrong: float, warmup: int, rates: tuple[float, float], held: float
) -> None:
    watched = Watched(warmup=warmup, wrong=wrong)
    for watched.rate, one in zip(
        (rates[0],) * 4 + (rates[1],) * 2, [*[(0.0, 0.0)] * 3, *[(0.66, 0.55)] * 3], strict=True
    ):
        assert not watched.ends(*one)
    assert watched.one.hold(tail=False) == held


@pytest.mark.parametrize("optimizer", ["sgd", "two groups", "tensor", "no rate", "rate None", "few samples"])
def test_the_learning_rate_is_that_of_the_fastest_group(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 0 where an optimizer has none, and not looked at where there are few samples."""
    monkeypatch.setattr(constants, "_TO_TELL", 41 if optimizer == "few samples" else 40)
    model = nn.Linear(2, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.4)
    if optimizer == "two groups":
        sgd = torch.optim.SGD([{"params": [model.weight], "lr": 0.4}, {"params": [model.bias], "lr": 0.1}], lr=0.1)
    elif optimizer == "tensor":
        sgd = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.4))
    fsr = FSRWrapper(model, sgd, num_samples=40)
    for group in sgd.param_groups:
        if optimizer == "no rate":
            del group["lr"]
        elif optimizer == "rate None":  # as transformers' Adafactor has it
            group["lr"] = None
    x, y = torch.randn(40, 2), torch.arange(40) % 3
    known = None
    for factor in (0.5, 2.0, 0.9):
        for group in sgd.param_groups:
            if group.get("lr") is not None:
                group["lr"] = group["lr"] * factor
        fsr.loss(model(x), y, torch.arange(40))
        known = fsr._memory.selection
        assert known is not None
        down = 0.4 if factor == 0.9 and optimizer not in ("no rate", "rate None", "few samples") else 0.0
        assert known.down == pytest.approx(down, abs=1e-5)


def test_predictions_of_those_trained_on_are_pulled_before_labels_are_judged() -> None:
    """Log(1 − ⟨p̄, p⟩) is added, not of those held out; targets and weights stay."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 3), torch.randn(400, 2), torch.arange(400) % 3
    fsr = FSRWrapper(
        model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=400, relabel_weight=2.0, class_balance=0.0
    )
    for _ in range(3):
        fsr.loss(model(x), y, torch.arange(400))
    memory = fsr._memory
    assert memory.selection is not None
    assert memory.pseudo is not None
    memory.selection.begun, memory.selection.down = True, 0.5
    stored = memory.pseudo.stored(torch.arange(400), torch.float32)[0]
    average, mine = stored / stored.sum(1, keepdim=True), ~held(memory.selection)
    assert 300 < mine.sum() < 400
    logits = model(x)
    pull = (1 - (average * logits.softmax(1)).sum(1)).log()
    expected = F.cross_entropy(logits[mine], y[mine]) + 0.5 * 2.0 * pull[mine].sum() / 400
    found = fsr.loss(logits, y, torch.arange(400))
    assert_close(found.detach(), expected.detach(), 1e-5)
    assert_close(torch.autograd.grad(found, logits)[0][~mine], torch.zeros(int((~mine).sum()), 3))
    assert_close(fsr.weights, mine / mine.sum())


def test_the_regulariser_is_as_strong_as_labels_are_wrong() -> None:
    """Where none are, averages of an unsteady network do harm."""
    score, given = torch.arange(40.0), torch.arange(40) % 4
    for share, pull in ((0.0, 0.0), (0.05, 0.0), (0.5, 1.0), (1.0, 1.0)):  # of ten samples, 5 % are none
        selection = Selection(40, 4, samples=40, seed=0, device="cpu")
        selection.share.fill_(share)
        selection._judge(score, given)
        code = selection.code[:-1]
        assert selection.pull == pull
        assert (code == WRONG).sum() == 40 * share * (share > 0.05)
    selection.share[:] = torch.tensor([0.2, 0.0, 0.0, 0.0])
    selection._judge(score, given)
    assert selection.pull == pytest.approx(2 / 40 / 0.1)
