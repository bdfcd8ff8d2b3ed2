"""examples/benchmarks: the peers that FSR's cost is compared with are L2R, and a step is few operations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLIP, assert_close
from test_wrapper import digits, make, train
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

from fsr_wrap import FSRWrapper

B, Q, N, C = 12, 16, 48, 4


@pytest.mark.parametrize("peer", ["higher", "torchopt"])
def test_peers_are_l2r(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ω₀ = 0 the score of a sample is the inner product of its gradient and the reward batch's, and the clipped
    scores over their sum are the weights; of FSR with the whole model as Θ^meta too. The losses lead to the model."""
    pytest.importorskip(peer)
    from peers import PEERS

    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8), nn.BatchNorm1d(8), nn.Tanh()
    )
    model = nn.Sequential(model, nn.Linear(8, C)).double()
    options = {"dictionary_size": 20, "reward_batch_size": Q, "relabel_weight": 0.0}
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    fsr = FSRWrapper(model, inner, "all", num_samples=N, lookahead_lr=0.0, **{**CLIP, **options})
    x, y = torch.randn(N, 2, 5, 5, dtype=torch.float64), torch.randint(C, (N,))
    for index in torch.arange(N).split(B):
        fsr.loss(model(x[index]), y[index], index).backward()
        fsr.step()
        fsr.zero_grad()
    drawn: list[Any] = []
    draw = fsr._memory.reward_batch
    monkeypatch.setattr(fsr._memory, "reward_batch", lambda: drawn.append(draw()) or drawn[0])
    index = torch.arange(B)
    fsr.loss(model(x[index]), y[index], index)
    label, (inputs,) = drawn[0]
    batch, reward = (x[index], y[index]), (inputs, label)

    params = list(model.parameters())
    plain = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    direction = torch.autograd.grad(F.cross_entropy(model(reward[0]), reward[1]), params)
    scores = []
    for loss in plain:
        gradient = torch.autograd.grad(loss, params, retain_graph=True)
        scores.append(sum((a * b).sum() for a, b in zip(gradient, direction, strict=True)))
    expected = torch.stack(scores).clamp(min=0)
    assert 0 < (expected > 0).sum() < B

    losses, weights = PEERS[f"L2R by {peer}"](model, 0.01, *batch, *reward)
    assert_close(weights, expected / expected.sum(), 1e-6)
    assert_close(weights, fsr.weights / fsr.weights.sum(), 1e-6)
    assert all(one is other for one, other in zip(model.parameters(), params, strict=True))
    gradients = torch.autograd.grad((weights * losses).sum(), params)
    again = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    assert_close(losses, again, 1e-12)
    assert_close(gradients, torch.autograd.grad((weights * again).sum(), params), 1e-12)


@pytest.mark.parametrize(
    ("options", "judging", "most"),
    [({}, False, 62), ({"class_balance": 0.0}, False, 61), ({}, True, 87), (CLIP, True, 91)],
    ids=["plain", "plain, no balance", "judging", "clip"],
)
def test_a_step_is_few_operations(options: dict[str, Any], judging: bool, most: int) -> None:
    """On an accelerator an operation is about a kernel; what is done for 16 or 64 steps at once is left out here."""
    from cost import Counter

    model, fsr = make(norm=False, **options)
    if fsr.config.selects:
        fsr._memory.selection.active = judging
    train(model, fsr, 2, 0.3)
    assert fsr.is_reweighting == judging
    x, y, _ = digits(0.3)
    counts = []
    for index in torch.arange(len(x)).split(50)[:4]:
        logits = model(x[index])
        with Counter() as counter:
            fsr.loss(logits, y[index], index)
        counts.append(counter.number)
    assert most - 5 < min(counts) <= most, counts


def test_signals_against_which_the_list_is_compared() -> None:
    from find_labels import above_threshold, margins, vote

    logits, y = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, -1.0]]), torch.tensor([0, 2])
    assert_close(margins(logits, y), torch.tensor([0.5, -5.0]))
    # Of the eleven samples -10, -9, ... 0 the 99th percentile lies nine tenths of the way from the last but one.
    margin = torch.cat([torch.arange(11.0) - 10, torch.tensor([-0.2, 0.4])])
    assert_close(above_threshold(margin, torch.arange(11))[-2:], torch.tensor([-0.1, 0.5]), tol=1e-5)
    angle = torch.tensor([0.0, 0.1, 0.3, 2.0, 2.1])
    features = torch.stack([angle.cos(), angle.sin()], 1) * torch.rand(5, 1).add(0.1)
    assert_close(vote(features, torch.tensor([0, 0, 1, 1, 1]), 2), torch.tensor([0.5, 0.5, 0.0, 1.0, 1.0]))


def test_threshold_samples_are_judged_by_the_other_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import find_labels

    given, right = torch.zeros(22, dtype=torch.int64), torch.zeros(22, dtype=torch.int64)
    given[3] = 1
    data = find_labels.Data(*[torch.empty(0)] * 7)
    data = find_labels.replace(data, given=given, right=right)
    told = []

    class Trained:
        def __init__(self, case: Any, data: Any, chosen: Any, epochs: int, seed: int, more_classes: int) -> None:
            assert more_classes == 1
            assert len(chosen) == 22
            told.append((data.given == 10).nonzero()[:, 0])
            # The threshold samples of this training and the wrong label have low margins, the others high ones.
            self.margins = torch.where(data.given == 0, 1.0, -1.0)

    monkeypatch.setattr(find_labels, "Trained", Trained)
    found = find_labels.run_aum(find_labels.CASES["fashion-clean"], data, 1, 0)["threshold_samples"]
    assert [len(one) for one in told] == [2, 2]
    assert not set(told[0].tolist()) & set(told[1].tolist())
    assert found["flagged_to_wrong"] == found["precision"] == found["recall"] == 1
    assert data.given.max() == 1


def test_tables_of_runs() -> None:
    import compare

    def run(case: str, method: str, seed: int, last: float) -> dict[str, Any]:
        told = {"title": method.upper(), "split": 0, "cost": 1.0 + 0.1 * seed, "step": 2.0}
        return {"case": case, "method": method, "seed": seed, "last": last, **told}

    clean, noisy = "fashion-clean", "fashion-uniform40"
    runs = {
        (clean, "ce"): [run(clean, "ce", 0, 0.88), run(clean, "ce", 1, 0.90)],
        (clean, "fsr"): [run(clean, "fsr", 1, 0.92), run(clean, "fsr", 0, 0.89), run(clean, "fsr", 2, 0.5)],
        (noisy, "ce"): [run(noisy, "ce", 0, 0.7)],
    }
    assert compare.table(runs, "last").split("\n") == [
        "| method | mean | cost (CE = 1) | a step | clean | uniform 40 % |",
        "|---|---|---|---|---|---|",
        "| CE | 0.795 | 1.00 | 2.00 | 0.890 ± 0.014 | 0.700 |",
        "| FSR |  | 1.10 | 2.00 | 0.770 ± 0.234 |  |",
    ]
    assert compare.gains(runs).split("\n") == [
        "| case | pairs | FSR − cross-entropy |",
        "|---|---|---|",
        "| Fashion-MNIST, clean | 2 | +1.50 ± 0.50 |",  # the third has no other
    ]
