"""Which classes are mistaken for which: numbers by hand, a slow twin, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close, read_log_ratio
from oracle import Oracle, Sample
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from fsr_wrap import FSRConfig, FSRWrapper, relabel
from fsr_wrap.confusions import Confusions
from fsr_wrap.issues import find_issues
from fsr_wrap.memory import Memory
from fsr_wrap.relabel import PseudoLabels

Pairs = tuple[Tensor, Tensor]


def pairs(*counts: tuple[int, int, int]) -> Pairs:
    """Label, other class and how many samples of them."""
    label, other, number = torch.tensor(counts).T.contiguous()
    return label.repeat_interleave(number), other.repeat_interleave(number)


def averages(probability: Tensor, storage: str | int = "float16") -> PseudoLabels:
    """p̄ as it is kept; zeros of samples that were never seen."""
    store = PseudoLabels(len(probability), probability.shape[1], 0.8, storage)
    row = torch.arange(len(probability))
    store._write(row, probability, torch.ones_like(probability, dtype=torch.bool))
    return store


def alike(
    number: int, classes: int, flips: Callable[[int], list[float]], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages of a network that often takes class c for c + 1, and sometimes for c − 1, given labels, and true ones.
    `flips(c)`: how likely class c is given each label."""
    torch.manual_seed(0)
    true = torch.randint(classes, (number,))
    change = torch.tensor([flips(c) for c in range(classes)])
    given = torch.multinomial(change[true], 1)[:, 0]
    mean = torch.eye(classes) * 3 + torch.eye(classes).roll(1, 1) * 1.5 + torch.eye(classes).roll(-1, 1)
    return (mean[true] + torch.randn(number, classes)).softmax(1), given, true


def one_way(number: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    """Class c is given as c + 1, and never the other way round, though both look alike to the network."""
    return alike(number, 6, lambda c: [0.65 * (a == c) + 0.35 * (a == (c + 1) % 6) for a in range(6)])


def auroc(average: PseudoLabels, given: Tensor, true: Tensor) -> tuple[float, float]:
    """Of the margin of each label, and of it less the log ratio."""
    p = average.columns["logits"][:-1].float()
    others = p.scatter(1, given[:, None], 0).amax(1)
    margin = p.gather(1, given[:, None])[:, 0].log() - others.log()
    ratio = read_log_ratio(average, given)
    wrong = given != true
    return roc_auc_score(wrong, -margin), roc_auc_score(wrong, ratio - margin)


def test_expected_numbers_have_the_sums_of_the_found_ones_and_go_as_classes_look_alike() -> None:
    torch.manual_seed(0)
    off = 1 - torch.eye(4, dtype=torch.int64)
    n, r = torch.randint(40, (4, 4)) * off, torch.randint(9, (4, 4)) * off
    fit = Confusions.fit(*(pairs(*[(g, a, int(x[g, a])) for g in range(4) for a in range(4)]) for x in (n, r)), 4)
    assert fit is not None
    expected = fit.label_effect[:, None] * fit.class_effect * (1 + r) * off
    assert_close(expected.sum(0), n.sum(0).double(), 1e-3)
    assert_close(expected.sum(1), n.sum(1).double(), 1e-3)
    # The method of moments: what squares are expected if the ratios have a variance of 1/k.
    k = fit.concentration
    base = fit.label_effect[:, None] * fit.class_effect
    chance = n.sum() + (base.square() * r).sum()
    assert_close((n - expected).square().sum().item(), (chance + expected.square().sum() / k).item(), 1e-4)
    ratio = ((k + n) / (k + expected)).log()
    found = torch.stack([fit.log_ratio(torch.tensor([2, 0]))[1], fit.log_ratio(torch.tensor([0, 2]))[1]])
    for row, g in zip(found, (0, 2), strict=True):
        assert_close(row[off[g] > 0].double(), ratio[g][off[g] > 0], 1e-5)


@pytest.mark.parametrize(
    ("found", "same"),
    [
        ([(0, 1, 0)], [(0, 1, 5)]),  # nobody disagrees
        ([(0, 1, 7), (1, 0, 3)], [(0, 1, 5), (1, 0, 2)]),  # two classes: nothing to compare
        ([(0, 1, 2), (1, 2, 1), (2, 0, 2)], [(0, 1, 0)]),  # so few that it may be chance
        ([(g, a, 20) for g in range(4) for a in range(4) if g != a], [(0, 1, 0)]),  # all alike
        ([(g, a, 10 * (g + a)) for g in range(4) for a in range(4) if g != a],
         [(g, a, 1000 * (g + a)) for g in range(4) for a in range(4) if g != a]),  # as classes look alike
    ],
)  # fmt: skip
def test_nothing_is_told_where_labels_are_wrong_by_chance_or_as_classes_look_alike(
    found: list[tuple[int, int, int]], same: list[tuple[int, int, int]]
) -> None:
    assert Confusions.fit(pairs(*found), pairs(*same), 4) is None


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
@pytest.mark.parametrize("tail", [False, True])
def test_the_slow_twin(chunk: int, tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relabel, "_CHUNK", chunk)
    classes = 4
    p, given, _ = alike(
        120, classes, lambda c: [0.6 * (a == c) + 0.4 * (a == (c + 2) % classes) for a in range(classes)]
    )
    p[3], p[4] = 0, torch.eye(classes)[given[4]]  # never seen; sure of its label
    given[5] = -1
    average = averages(p)
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log() if tail else torch.zeros(classes).double()
    twin = Oracle(FSRConfig(), classes, None)
    twin.prior = prior
    stored = average.columns["logits"].double()
    for i in range(120):
        twin.samples[i] = Sample(pseudo=None if i == 3 else stored[i])
        if given[i] >= 0:
            twin.given[i] = int(given[i])
    confidence = average.read(given, prior.float()).confidence
    twin.surest = lambda i, value: confidence[i].item()
    expected = twin.log_ratios()
    found = read_log_ratio(average, given, prior.float() if tail else None)
    assert max(expected.values()) > 0.3
    assert min(expected.values()) < -0.3
    for i, value in expected.items():
        assert_close(found[i].item(), value, 1e-4)
    assert found[3] == 0


def test_labels_that_are_given_one_way_only_are_told_by_it() -> None:
    p, given, true = one_way()
    alone, both = auroc(averages(p), given, true)
    assert both > alone + 0.03


def test_many_classes_of_few_samples() -> None:
    """Where most pairs of classes occur once or never, chance is not taken for a rule."""
    uniform = alike(3000, 60, lambda c: [0.7 * (a == c) + 0.3 / 60 for a in range(60)])
    alone, both = auroc(averages(uniform[0]), *uniform[1:])
    assert both > alone - 0.001
    one_way = alike(3000, 60, lambda c: [0.65 * (a == c) + 0.35 * (a == (c + 1) % 60) for a in range(60)])
    alone, both = auroc(averages(one_way[0]), *one_way[1:])
    assert both > alone + 0.01


@pytest.mark.parametrize("kind", ["uniform", "as they look", "none"])
def test_other_wrong_labels_are_told_as_well_as_without(kind: str) -> None:
    def flips(c: int) -> list[float]:
        if kind == "uniform":
            return [0.7 * (a == c) + 0.3 / 6 for a in range(6)]
        share = {"as they look": 0.3, "none": 0.005}[kind]
        near = {0: 1 - share, 1: share * 0.7, 5: share * 0.3}
        return [near.get((a - c) % 6, 0.0) for a in range(6)]

    p, given, true = alike(4000, 6, flips)
    alone, both = auroc(averages(p), given, true)
    assert both > alone - 0.005


def test_storage_of_few_values_tells_the_same() -> None:
    p, given, _ = one_way()
    full, few = (read_log_ratio(averages(p, storage), given) for storage in ("float16", 4))
    assert torch.corrcoef(torch.stack([full, few]))[0, 1] > 0.97


@pytest.mark.parametrize("given", [[-1, -1, -1], [0, 1, 2]])
def test_nothing_is_told_of_nothing(given: list[int]) -> None:
    assert read_log_ratio(averages(torch.zeros(3, 3)), torch.tensor(given)).tolist() == [0, 0, 0]
    assert read_log_ratio(averages(torch.full((3, 3), 1 / 3)), torch.tensor([-1, -1, -1])).tolist() == [0, 0, 0]


# --- where it is used ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pusher", ["area_under_margin", "negative_loss", "max_margin"])
def test_labels_are_judged_by_it_if_the_score_is_in_log_odds(pusher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, given, _ = one_way()
    memory = knowing(p, given, pusher=pusher)
    assert memory.selection is not None
    assert memory.pseudo is not None
    memory.selection.active, judged = True, []
    monkeypatch.setattr(memory.selection, "_judge", lambda score, given: judged.append(score))
    memory.end_epoch()
    ratio = read_log_ratio(memory.pseudo, given)
    expected = memory.table.score[:-1] - (ratio if pusher != "max_margin" else 0)
    assert_close(judged[0], expected)


def test_the_list_takes_it_into_account() -> None:
    p, given, true = one_way()
    memory = knowing(p, given)
    ratio = read_log_ratio(averages(p), given)
    assert memory.selection is not None
    own = p.gather(1, given[:, None])[:, 0]
    without = (own + memory.table.score[:-1].sigmoid()) / 2
    assert_close(find_issues(memory, share=0.35).quality, without, 2e-3)  # as long as labels are not judged
    memory.selection.active = True
    found, wrong = find_issues(memory, share=0.35), given != true
    right = own / (own + (1 - own) * ratio.exp())
    assert_close(found.quality, (right + (memory.table.score[:-1] - ratio).sigmoid()) / 2, 2e-3)
    assert roc_auc_score(wrong, -found.quality) > roc_auc_score(wrong, -without) + 0.01
    # Whoever is doubted is suggested another class, though the network prefers the given one.
    rival = p.scatter(1, given[:, None], 0).argmax(1)
    against = (ratio.exp() * p.gather(1, rival[:, None])[:, 0] > own) & (p.argmax(1) == given)
    assert against.sum() > 20
    assert torch.equal(found.predicted[against], rival[against])


def knowing(p: Tensor, given: Tensor, **options: Any) -> Memory:
    """The memory of a run that has these averages, and P̂ from them."""
    number, classes = p.shape
    model = nn.Linear(2, classes)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), model, num_samples=number, **options)
    memory = fsr._memory
    memory.prepare(torch.arange(number), classes, torch.device("cpu"))
    assert memory.pseudo is not None
    memory.pseudo.columns["logits"][:-1] = p.half()
    memory.given.label[:-1] = given.to(memory.given.label.dtype)
    memory.table.score[:-1] = p.gather(1, given[:, None])[:, 0].logit()
    memory.table.epoch[:-1] = 0
    return memory
