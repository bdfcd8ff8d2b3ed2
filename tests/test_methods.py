"""examples/methods: each against its formula, by hand or by a slow twin; its state; a tiny training; `compare.py`."""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from helpers import assert_close
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import cases
import compare
import noisy_fashion_mnist
from cases import CASES, FASHION_CONFUSIONS, make_case_network, make_data, make_given
from cifar import CIFAR10_CONFUSIONS
from methods import METHODS, Method, Task, incv, make_method
from methods.base import frozen_statistics
from methods.class_balanced import class_weights
from methods.co_teaching import exchange
from methods.crust import most_central
from methods.d2l import lid
from methods.features import last_linear, record, stages
from methods.forward_correction import estimate
from methods.gce import gce
from methods.incv import noise_rate
from methods.l2r import inner_products
from methods.mentornet import curriculum
from methods.mixup import draw
from methods.rog import RoG, covariance, linear_classifier, robust_gaussians

N, D, C, B = 60, 5, 3, 6
FSR_FIELDS = {"dictionary_size": 12, "reward_batch_size": 6, "warmup_epochs": 1}


def make_network(classes: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def make_task(epochs: int = 4, labels: Tensor | None = None, classes: int = C, **known: Any) -> Task:
    """Blobs in D dimensions; labels are right unless given."""
    generator = torch.Generator().manual_seed(1)
    right = torch.arange(N) % C
    x = torch.randn(N, D, generator=generator) + 2 * F.one_hot(right, D)
    clean = torch.randn(30, D, generator=generator) + 2 * F.one_hot(torch.arange(30) % C, D), torch.arange(30) % C

    def recipe(parameters: Iterable[nn.Parameter], steps: int) -> Any:
        sgd = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        return sgd, OneCycleLR(sgd, 0.05, total_steps=max(2, steps))

    return Task(
        model=make_network(classes),
        labels=right if labels is None else labels,
        num_classes=classes,
        epochs=epochs,
        batch_size=10,
        inputs=x.__getitem__,
        augmented=x.__getitem__,
        make_model=lambda: make_network(classes),
        recipe=recipe,
        **{"clean": clean, "noise_rate": 0.2, **known},
    )


def make(name: str, task: Task | None = None, **options: Any) -> Method:
    options = {**FSR_FIELDS, **options} if name.startswith("fsr") else options
    return make_method(name, task or make_task(), **options)


class Fixed(nn.Module):
    """A network whose logits are given; the input is passed over."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


P = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]])
Y = torch.tensor([0, 0, 2, 1])  # p_y is 0.7, 0.25, 0.8, 0.3
P_Y = (0.7, 0.25, 0.8, 0.3)


def loss_of(method: Method, index: Tensor | None = None, p: Tensor = P, y: Tensor = Y) -> tuple[float, Tensor]:
    """The loss where the network says p of the batch, and its gradient by the logits."""
    model = Fixed(p.log())
    loss = method.loss(model, torch.zeros(len(p), D), y, torch.arange(len(p)) if index is None else index)
    loss.backward()
    return loss.item(), model.logits.grad


def labelled() -> Tensor:
    """Labels of the training set, of which the first four are Y."""
    return torch.cat([Y, torch.arange(N - len(Y)) % C])


def one_hot(y: Tensor = Y) -> np.ndarray:
    return np.eye(C)[y.numpy()]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# --- losses without state --------------------------------------------------------------------------------------------


def test_cross_entropy_and_label_smoothing() -> None:
    assert_close(loss_of(make("ce"))[0], -mean(map(math.log, P_Y)))
    smooth = 0.9 * one_hot() + 0.1 / C
    assert_close(loss_of(make("label-smoothing"))[0], float(-(smooth * np.log(P.numpy())).sum(1).mean()))


def test_gce() -> None:
    assert_close(loss_of(make("gce"))[0], mean((1 - p**0.7) / 0.7 for p in P_Y))
    zero = torch.tensor([[-500.0, 0.0]], requires_grad=True)  # p_y underflows
    gce(zero, torch.tensor([0]), 0.7).sum().backward()
    assert zero.grad.isfinite().all()


def test_truncated_gce_prunes_what_is_not_believed() -> None:
    task = make_task(epochs=12, labels=labelled())
    method = make("gce-truncated", task)
    assert (method.start, method.every) == (4, 1)
    at_k = (1 - 0.5**0.7) / 0.7
    assert_close(loss_of(method)[0], mean((1 - p**0.7) / 0.7 - at_k for p in P_Y))
    method.start_epoch(3)
    assert method.kept.all()
    method.start_epoch(4)
    task.model.eval()
    believed = task.model(task.inputs(torch.arange(N))).softmax(1)[torch.arange(N), task.labels] > 0.5
    assert_close(method.kept, believed.float())
    method.kept[:4] = torch.tensor([1.0, 0, 1, 0])
    assert_close(loss_of(method)[0], sum((1 - p**0.7) / 0.7 - at_k for p in (0.7, 0.8)) / 4)


def test_sce() -> None:
    reverse = mean(-math.log(1e-4) * (1 - p) for p in P_Y)
    plain = -mean(map(math.log, P_Y))
    assert_close(loss_of(make("sce"))[0], 0.1 * plain + reverse)
    task = make_task(classes=20)
    p = torch.full((1, 20), 0.05)
    expected = -6 * math.log(0.05) - 0.1 * math.log(1e-4) * 0.95
    assert_close(loss_of(make("sce", task), p=p, y=torch.tensor([3]))[0], expected, 1e-5)


def test_focal() -> None:
    assert_close(loss_of(make("focal"))[0], mean(-((1 - p) ** 2) * math.log(p) for p in P_Y))


def test_forward_correction() -> None:
    method = make("f-correction")
    method.matrix.copy_(torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.0, 0.3, 0.7]]))
    mixed = P.numpy() @ method.matrix.numpy()
    assert_close(loss_of(method)[0], mean(-math.log(mixed[i, y]) for i, y in enumerate(Y.tolist())))


@pytest.mark.parametrize(("rarest", "percentile"), [(4, 0.97), (1, None)])
def test_no_class_is_an_outlier_as_a_whole(
    rarest: int, percentile: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor([0] * 40 + [1] * (20 - rarest) + [2] * rarest)
    method = make("f-correction", make_task(labels=labels))
    asked: list[float | None] = []

    def note(p: Tensor, percentile: float | None) -> Tensor:
        asked.append(percentile)
        return torch.eye(C)

    monkeypatch.setattr("methods.forward_correction.estimate", note)
    method.prepare()
    assert asked == [percentile]


@pytest.mark.parametrize(
    ("noise", "alpha", "rates"),
    [
        (None, 1.0, (10.0, 10.0)),
        ("none", 1.0, (10.0, 10.0)),
        ("column", 8.0, (10.0, 10.0)),
        ("asymmetric", 8.0, (1, 100)),
    ],
)
def test_settings_published_for_a_kind_of_noise(noise: str | None, alpha: float, rates: tuple[float, float]) -> None:
    task = make_task(noise=noise)
    assert make("mixup", task).alpha == alpha
    assert make("remix", task).alpha == 1.0
    sop = make("sop", task, scale=False)
    assert (sop.lr_u, sop.lr_v) == rates


def test_the_noise_matrix_is_of_the_surest_sample_below_the_97th_percentile() -> None:
    p = torch.rand(100, C).softmax(1)
    for percentile in (None, 0.97):
        found = estimate(p, percentile)
        for cls in range(C):
            order = p[:, cls].argsort(descending=True)
            row = p[order[0 if percentile is None else 3]]  # the three largest are outliers
            assert_close(found[cls], row / row.sum())


def test_balanced_softmax() -> None:
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    method = make("balanced-softmax", make_task(labels=labels))
    counts = np.array([40, 15, 5])
    adjusted = P.numpy() * counts / (P.numpy() * counts).sum(1, keepdims=True)
    assert_close(loss_of(method)[0], mean(-math.log(adjusted[i, y]) for i, y in enumerate(Y.tolist())))


def effective(counts: Iterable[int]) -> np.ndarray:
    weights = np.array([(1 - 0.9999) / (1 - 0.9999**n) for n in counts])
    return weights / weights.sum() * len(weights)


def test_class_balanced_losses() -> None:
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    weights = effective((40, 15, 5))
    assert_close(class_weights(torch.tensor([40.0, 15, 5])), weights)
    plain = make("cb-softmax", make_task(labels=labels))
    assert_close(loss_of(plain)[0], mean(-weights[y] * math.log(p) for y, p in zip(Y.tolist(), P_Y, strict=True)))
    task = make_task(labels=labels)
    focal = make("cb-focal", task)
    assert_close(last_linear(task.model)[1].bias.detach(), np.full(C, -math.log(2)))
    expected = 0.0
    for row, y in zip(P.log().tolist(), Y.tolist(), strict=True):
        for cls, z in enumerate(row):
            s = 1 / (1 + math.exp(-z if cls == y else z))
            expected += weights[y] * (1 - s) * -math.log(s) / len(Y)
    assert_close(loss_of(focal)[0], expected)


def test_ldam() -> None:
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    task = make_task(epochs=10, labels=labels)
    method = make("ldam-drw", task)
    head = task.model[3]
    h = torch.randn(4, 8)
    w = head.weight.detach().numpy()
    cosines = h.numpy() @ w.T / np.linalg.norm(h, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    assert_close(head(h), cosines)
    margins = np.array([n**-0.25 for n in (40, 15, 5)])
    margins *= 0.5 / margins.max()
    z = P.log().numpy().copy()
    z[range(4), Y] -= margins[Y]
    losses = np.log(np.exp(30 * z).sum(1)) - 30 * z[range(4), Y]
    assert_close(loss_of(method)[0], float(losses.mean()), 1e-5)
    method.start_epoch(7)
    assert_close(loss_of(method)[0], float(losses.mean()), 1e-5)
    method.start_epoch(8)
    weights = effective((40, 15, 5))[Y]
    assert_close(loss_of(method)[0], float((weights * losses).sum() / weights.sum()), 1e-5)


# --- mixing ----------------------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """A network whose logits are its input's first C entries."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x[:, :C]


@pytest.mark.parametrize("name", ["mixup", "remix"])
def test_mixing(name: str) -> None:
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    method = make(name, make_task(labels=labels))
    counts, seen = (40, 15, 5), set()
    x, y = torch.randn(B, D), torch.tensor([0, 0, 1, 1, 2, 2])
    for seed in range(8):
        torch.manual_seed(seed)
        share, partner = draw(x, 1.0, 1.0)
        torch.manual_seed(seed)
        loss = method.loss(Echo(), x, y, torch.arange(B))
        lam, expected = share.item(), 0.0
        for i, j in enumerate(partner.tolist()):
            log_p = (lam * x[i] + (1 - lam) * x[j])[:C].log_softmax(0)
            ratio, own = counts[y[i]] / counts[y[j]], lam
            if name == "remix" and ratio >= 3 and lam < 0.5:
                own = 0.0
            if name == "remix" and ratio <= 1 / 3 and 1 - lam < 0.5:
                own = 1.0
            seen.add((own == 0.0, own == 1.0))
            expected -= (own * log_p[y[i]] + (1 - own) * log_p[y[j]]).item() / B
        assert_close(loss.item(), expected, 1e-5)
    assert len(seen) == (3 if name == "remix" else 1)


# --- losses with a memory of each sample -----------------------------------------------------------------------------


def test_elr() -> None:
    method = make("elr", make_task(labels=labelled()))
    target = np.zeros((4, C))
    for p in (P, P.flip(1)):
        loss, gradient = loss_of(method, p=p)
        q = p.numpy().astype(float)
        target = 0.7 * target + 0.3 * q
        inner = (target * q).sum(1)
        plain = -np.log(q[range(4), Y]).mean()
        assert_close(loss, float(plain + 3 * np.log(1 - inner).mean()), 1e-5)
        slope = -3 * (q * (target - inner[:, None])) / (1 - inner[:, None])  # Eq. 8 of the paper's appendix
        assert_close(gradient, (q - one_hot() + slope) / 4, 1e-5)
        assert_close(method.target[:4], target)
    assert (method.target[4:] == 0).all()


def test_selc() -> None:
    method = make("selc", make_task(epochs=20, labels=labelled()))
    method.start_epoch(2)
    assert_close(loss_of(method)[0], -mean(map(math.log, P_Y)))
    target = one_hot()
    for epoch, p in ((3, P), (4, P.flip(1))):
        method.start_epoch(epoch)
        loss, gradient = loss_of(method, p=p)
        target = 0.9 * target + 0.1 * p.numpy()
        assert_close(loss, float(-(target * np.log(p.numpy())).sum(1).mean()), 1e-5)
        assert_close(gradient, (p.numpy() - target) / 4, 1e-5)
        assert_close(method.target[:4], target)


def test_sop() -> None:
    method = make("sop", make_task(labels=labelled()), lr_u=2.0, lr_v=3.0, scale=False)
    u, v = (torch.rand(4, n, dtype=torch.float64).requires_grad_() for n in (1, C))
    method.u[:4], method.v[:4] = u.detach(), v.detach()
    y, z = F.one_hot(Y, C).double(), P.double().log().requires_grad_()
    more, less = (u**2 * y).clamp(0, 1), (v**2 * (1 - y)).clamp(0, 1)
    q = (z.softmax(1) + more - less.detach()).clamp(min=1e-4)
    plain = -(y * (q / q.sum(1, keepdim=True)).log()).sum(1).mean()
    predicted = F.one_hot(P.argmax(1), C)
    expected = plain + ((predicted + more - less - y) ** 2).sum() / 4
    expected.backward()
    loss, gradient = loss_of(method)
    assert_close(loss, expected.item())
    assert_close(gradient, z.grad.float())
    assert_close(method.u[:4], (u - 2 * u.grad).detach())
    assert_close(method.v[:4], (v - 3 * v.grad).detach())


def test_the_rates_of_sop_follow_the_runs_length() -> None:
    method = make("sop", make_task(epochs=30))
    assert_close((1 + 4 * method.lr_v / 10) ** 30, (1 + 40 / 128) ** 120, 1e-4)


def test_pencil() -> None:
    task = make_task(epochs=16, labels=labelled())
    method = make("pencil", task)
    assert (method.first, method.second) == (4, 10)  # 3.5 and 10
    method.start_epoch(3)
    assert_close(loss_of(method)[0], -mean(map(math.log, P_Y)))
    assert_close(method.label_logits[:4], 10 * one_hot())
    method.start_epoch(4)
    own = torch.tensor(10 * one_hot()).requires_grad_()
    z = P.double().log().requires_grad_()
    p, given = z.softmax(1), own.softmax(1)
    divergence = (p * (p / given).log()).sum() / (4 * C)
    compatible = -mean(given.log_softmax(1)[i, y] for i, y in enumerate(Y.tolist()))
    expected = divergence + 0.4 * compatible - 0.1 * (p * p.log()).sum() / (4 * C)
    expected.backward()
    loss, gradient = loss_of(method)
    assert_close(loss, C * expected.item(), 1e-5)
    assert_close(gradient, C * z.grad, 1e-5)
    moved = own.detach() - 600 * own.grad
    assert_close(method.label_logits[:4], moved, 1e-4)
    method.start_epoch(10)
    loss, _ = loss_of(method)
    given = moved.softmax(1)
    assert_close(loss, float((P * (P / given).log()).sum() / 4), 1e-4)
    assert_close(method.label_logits[:4], moved, 1e-4)


# --- networks and weights --------------------------------------------------------------------------------------------


def test_co_teaching() -> None:
    first, second = torch.randn(B, C, requires_grad=True), torch.randn(B, C, requires_grad=True)
    y = torch.randint(C, (B,))
    losses = [[-z[i].log_softmax(0)[y[i]] for i in range(B)] for z in (first, second)]
    easy = [sorted(range(B), key=lambda i, own=own: own[i].item())[:4] for own in losses]
    expected = mean(losses[0][i] for i in easy[1]) + mean(losses[1][i] for i in easy[0])
    assert_close(exchange(first, second, y, 4), expected)
    method = make("co-teaching", make_task(epochs=60, noise_rate=0.4))
    found = []
    for epoch in (0, 1, 3, 9):
        method.start_epoch(epoch)
        found.append(method.dropped(0.4))
    assert_close(found, [0.0, 0.4 / 3, 0.4, 0.4])


def test_mentornet() -> None:
    losses = torch.tensor([0.1, 0.5, 1.2, 3.0])
    average = torch.tensor(0.5)
    assert_close(curriculum(losses, average, 18), np.ones(4))
    assert_close(curriculum(losses, average, 50), np.array([1.0, 1, 0, 0]))
    assert_close(curriculum(losses, average, 90), np.array([1.0, 1, 0.3, 0]))
    method = make("mentornet-pd", make_task(epochs=100))
    assert method.percentile == 0.75
    assert make("mentornet-pd", make_task(noise_rate=0.72)).percentile == 0.5
    method.step = 300  # of 600
    own = [-math.log(p) for p in P_Y]
    torch.manual_seed(3)
    left = torch.randperm(4)[:3].tolist()  # 5 % of 4 leaves int(3.8)
    torch.manual_seed(3)
    loss, _ = loss_of(method)
    average = 0.5 * float(np.quantile(own, 0.75))
    assert_close(method.average, torch.tensor(average))
    assert_close(loss, sum(own[i] for i in left if own[i] <= average) / 4)


def per_sample_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    losses = F.cross_entropy(model(x), y, reduction="none")
    gradients = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    return [torch.cat([g.flatten() for g in own]) for own in gradients]


def test_inner_products_and_l2r() -> None:
    task = make_task(clean=(torch.randn(1, D).expand(8, D) + torch.randn(8, D), torch.arange(8) % C))
    method, model = make("l2r", task), task.model
    x, y = torch.randn(B, D), torch.randint(C, (B,))
    before = {name: value.clone() for name, value in model.named_buffers()}
    torch.manual_seed(5)
    rows = torch.randint(8, (8,))
    clean_x, clean_y = task.clean[0][rows], task.clean[1][rows]
    direction = torch.autograd.grad(F.cross_entropy(model(clean_x), clean_y), list(model.parameters()))
    flat = torch.cat([g.flatten() for g in direction])
    scores = torch.stack([own @ flat for own in per_sample_gradients(model, x, y)])
    losses = F.cross_entropy(model(x), y, reduction="none")
    assert_close(inner_products(losses, list(model.parameters()), direction), scores, 1e-5)
    useful = scores.clamp(min=0)
    assert 0 < (useful > 0).sum() < B
    model.load_state_dict(before, strict=False)
    torch.manual_seed(5)
    loss = method.loss(model, x, y, torch.arange(B))
    assert_close(model[1].running_mean, 0.9 * before["1.running_mean"] + 0.1 * model[0](x).mean(0), 1e-5)
    params, weights = list(model.parameters()), useful / useful.sum()
    gradients = torch.autograd.grad(loss, params)
    expected = (weights * F.cross_entropy(model(x), y, reduction="none")).sum()
    assert_close(loss, expected, 1e-5)
    assert_close(gradients, torch.autograd.grad(expected, params), 1e-5)


def test_meta_weight_net() -> None:
    """Against a virtual step written out, differentiated through by autograd."""
    task = make_task(clean=(torch.randn(8, D), torch.arange(8) % C))
    method, model = make("mwn", task), task.model
    method.attach(torch.optim.SGD(model.parameters(), lr=0.3))
    net, x, y = method.net, torch.randn(B, D), torch.randint(C, (B,))
    torch.manual_seed(5)
    rows = torch.randint(8, (8,))
    params = dict(model.named_parameters())
    losses = F.cross_entropy(model(x), y, reduction="none")
    weighted = (net(losses.detach()[:, None])[:, 0] * losses).mean()
    virtual = torch.autograd.grad(weighted, list(params.values()), create_graph=True)
    ahead = {name: p - 0.3 * g for (name, p), g in zip(params.items(), virtual, strict=True)}
    logits = torch.func.functional_call(model, ahead, (task.clean[0][rows],))
    expected = torch.autograd.grad(F.cross_entropy(logits, task.clean[1][rows]), list(net.parameters()))
    torch.manual_seed(5)
    loss = method.loss(model, x, y, torch.arange(B))
    assert_close([p.grad for p in net.parameters()], expected, 1e-6)
    assert any(g.abs().max() > 1e-5 for g in expected)
    assert_close(loss, (net(losses.detach()[:, None])[:, 0] * losses).mean(), 1e-5)  # with the new net
    assert model[0].weight.grad is None


def test_frozen_statistics() -> None:
    model = make_network()
    before = model[1].running_mean.clone()
    with frozen_statistics(model):
        model(torch.randn(8, D) + 3)
    assert_close(model[1].running_mean, before)
    assert model[1].momentum == 0.1


# --- selection, features ---------------------------------------------------------------------------------------------


def test_the_released_lazy_greedy_takes_the_most_central() -> None:
    """It pops the sample of largest known value, looks up the set's value with it, and takes it if that is at least the
    next one's known value, which it always is."""
    points = torch.randn(25, 2)
    distance = torch.cdist(points, points)
    similarity = (distance.max() - distance).numpy()
    known, nearest, chosen = similarity.sum(0), np.zeros(25), []
    while len(chosen) < 12:
        j = int(known.argmax())
        value = np.maximum(nearest, similarity[j]).sum()
        known[j] = -1
        if value < known.max():
            known[j] = value
            continue
        chosen.append(j)
        nearest = np.maximum(nearest, similarity[j])
    assert most_central(points, 12).tolist() == chosen


def test_crust_halves_the_classes_and_mixes_within_them() -> None:
    method = make("crust", make_task(epochs=24))
    method.start_epoch(0)
    assert method.kept.all()
    method.start_epoch(1)
    kept = method.kept.nonzero()[:, 0]
    assert torch.bincount(method.task.labels[kept]).tolist() == [10, 10, 10]
    y = torch.tensor([0, 1, 2, 2, 1])
    partners = method.partners(y)
    assert (method.task.labels[partners] == y).all()
    assert method.kept[partners].all()
    drawn = torch.cat([method.partners(torch.zeros(50, dtype=torch.long)) for _ in range(4)])
    assert len(drawn.unique()) == 10
    index = torch.arange(12)
    x, given = method.task.inputs(index), method.task.labels[index]
    torch.manual_seed(2)
    own, labels = x[method.kept[index]], given[method.kept[index]]
    share, _ = draw(own, 1.0, 0.1)
    mixed = share * own + (1 - share) * method.task.inputs(method.partners(labels))
    torch.manual_seed(2)
    loss = method.loss(method.task.model, x, given, index)
    assert_close(loss, F.cross_entropy(method.task.model(mixed), labels), 1e-5)  # classes are of one size


def test_the_noise_rate_of_incv() -> None:
    for rate in (0.1, 0.4, 0.7):
        assert noise_rate((1 - rate) ** 2 + rate**2 / 9, 10) == pytest.approx(rate, abs=1e-3)
    assert noise_rate(1.0, 10) == 0.001


def test_incv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the selecting networks are replaced by one that knows more or less."""
    fitted: list[tuple[Tensor, int]] = []

    def fit(task: Task, subset: Tensor, epochs: int, score: Any, best_only: bool) -> nn.Module:
        fitted.append((subset, epochs))
        assert 0 <= score(Echo()) <= 1
        return Echo()

    monkeypatch.setattr(incv, "fit", fit)
    right = torch.arange(N) % C
    hit = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.3
    given = torch.where(hit, (right + 1) % C, right)
    method = make("incv", make_task(epochs=16, labels=given))
    method.prepare()
    agree = Echo()(method.task.inputs(torch.arange(N))).argmax(1) == given
    assert_close(method.selected, agree)
    assert not (method.selected & method.candidate).any()
    first, second = (subset for subset, _ in fitted[:2])
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(N))
    assert {epochs for _, epochs in fitted} == {4}
    share = agree[second].float().mean().item()  # the half that is judged first
    assert method.rate == noise_rate(share, C)

    method.start_epoch(15)
    index = torch.arange(20)
    model, x = method.task.model, method.task.inputs(index)
    method.candidate[:4] = ~method.selected[:4]
    own = index[method.selected[index]]
    rows = torch.cat([own, index[method.candidate[index]][: len(own) // 2]])
    wrong, good = method.rate**2, (C - 1) * (1 - method.rate) ** 2
    keep = round(len(own) * (1 - wrong / (wrong + good)))
    expected = exchange(model(x[rows]), method.second(x[rows]), given[rows], keep)
    assert_close(method.loss(model, x, given[index], index), expected, 1e-5)


def test_lid() -> None:
    x = torch.rand(30, 4)
    found = lid(x, 5)
    for i in range(30):
        r = sorted((x - x[i]).norm(dim=1).tolist())[1:6]
        assert_close(found[i].item(), -5 / sum(math.log(one / r[-1]) for one in r), 1e-3)
    plane = torch.rand(600, 2) @ torch.randn(2, 10)
    assert lid(plane).mean().item() == pytest.approx(2, abs=0.4)


def test_d2l_turns_goes_back_and_trusts_its_predictions() -> None:
    task = make_task(epochs=12, labels=labelled())
    method = make("d2l", task)
    assert (method.first, method.window) == (4, 2)
    for epoch in range(7):
        method.lids = [5.0, 5.1, 4.9, 5.0, 5.1, 5.0, 5.05][:epoch]
        method.start_epoch(epoch)
        method.turned, method.alpha = False, 1.0
        kept = {name: value.clone() for name, value in method.before.items()}
        nn.init.normal_(task.model[0].weight)
    method.lids = [1e-6] * 6 + [2e-6]  # far below what is found
    method.before = kept
    method.start_epoch(7)
    assert method.turned
    assert_close(task.model.state_dict(), kept)
    assert_close(method.alpha, math.exp(-7 / 12 * method.lids[-1] / 1e-6))
    method.alpha = 0.3
    target = 0.3 * one_hot() + 0.7 * np.eye(C)[P.argmax(1)]
    loss, gradient = loss_of(method)
    assert_close(loss, float(-(target * np.log(P.numpy())).sum(1).mean()), 1e-5)
    assert_close(gradient, (P.numpy() - target) / 4, 1e-5)


def test_features_are_taken_where_they_should_be() -> None:
    model = make_network()
    x = torch.randn(4, D)
    model.eval()
    logits, (relu, head_input) = record(model, x, [*stages(model), last_linear(model)[1]])
    assert_close(relu, model[:3](x))
    assert_close(head_input, model[:3](x))
    assert_close(logits, model(x))
    conv = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 1, 4, 4)
    assert_close(record(conv, x, stages(conv))[1][0], conv[0](x).mean((2, 3)))


def test_rog_fits_gaussians_that_outliers_do_not_move() -> None:
    labels = torch.arange(900) % 3
    centres = torch.tensor([[0.0, 0], [4, 0], [0, 4]])
    x = centres[labels] + 0.5 * torch.randn(900, 2)
    x[:180] = centres[(labels[:180] + 1) % 3] + 0.5 * torch.randn(180, 2)  # 20 % wrong
    means, precision = robust_gaussians(x, labels, 3)
    assert (means - centres).norm(dim=1).max() < 0.15
    plain = torch.stack([x[labels == c].mean(0) for c in range(3)])
    assert (plain - centres).norm(dim=1).min() > 0.5
    weight, bias = linear_classifier(means, precision)
    off = x[:, None].double() - means
    gaussian = -0.5 * torch.einsum("ncd,de,nce->nc", off, precision, off)
    assert_close((x @ weight.T + bias).softmax(1), gaussian.softmax(1), 1e-4)
    assert_close(covariance(x), np.cov(x.numpy().T, bias=True), 1e-5)


def test_rog_learns_which_depth_to_trust() -> None:
    labels = torch.randint(C, (100,))
    good = 0.8 * F.one_hot(labels, C) + 0.2 / C
    shares = RoG.learn_shares(torch.stack([torch.full((100, C), 1 / C), good]), labels)
    assert shares[1] > 0.6
    assert sum(shares) == pytest.approx(1)


# --- all of them -----------------------------------------------------------------------------------------------------


def run(method: Method, epochs: Iterable[int], parts: tuple[Any, Any]) -> None:
    """Trains for some epochs, each from a seed of its own."""
    task, (optimizer, schedule) = method.task, parts
    for epoch in epochs:
        torch.manual_seed(100 + epoch)
        method.start_epoch(epoch)
        for index in torch.randperm(N).split(10):
            method.loss(task.model, task.augmented(index), task.labels[index], index).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        method.end_epoch(epoch)


def start(name: str, seed: int = 0) -> tuple[Method, tuple[Any, Any]]:
    torch.manual_seed(seed)
    method = make(name, make_task())
    inner, schedule = method.task.recipe([*method.task.model.parameters(), *method.parameters()], 24)
    return method, (method.attach(inner), schedule)


def answers(method: Method) -> Tensor:
    method.task.model.eval()
    out = method.predict(method.task.model, method.task.inputs(torch.arange(N)))
    method.task.model.train()
    return out.detach()


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_training_ends_where_the_other_does(name: str) -> None:
    whole, parts = start(name)
    whole.prepare()
    run(whole, range(4), parts)
    assert (answers(whole).argmax(1) == whole.task.labels).float().mean() > 0.6

    stopped, parts = start(name)
    stopped.prepare()
    run(stopped, range(2), parts)
    saved = stopped.task.model.state_dict(), stopped.state_dict(), [part.state_dict() for part in parts]
    resumed, again = start(name, seed=9)
    resumed.task.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for part, state in zip(again, saved[2], strict=True):
        part.load_state_dict(state)
    run(resumed, range(2, 4), again)
    assert_close(answers(resumed), answers(whole), 0)
    assert_close(resumed.state_dict(), whole.state_dict(), 0)


def test_every_method_says_what_it_is() -> None:
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    for method in METHODS.values():
        text = sys.modules[method.__module__].__doc__
        assert "Cost: " in text
        assert "State: " in text


def test_what_a_method_needs_is_said() -> None:
    for name, method in METHODS.items():
        if method.needs_clean:
            with pytest.raises(ValueError, match="needs clean images"):
                make(name, make_task(clean=None))
        if method.needs_rate:
            with pytest.raises(ValueError, match="needs the share of wrong labels"):
                make(name, make_task(noise_rate=None))
    with pytest.raises(ValueError, match="no method 'fsl'"):
        make("fsl")


def test_a_foreign_state_is_refused() -> None:
    method = make("elr")
    with pytest.raises(ValueError, match=r"has the state \['target'\], not \['epoch', 'target'\]"):
        method.load_state_dict(make("selc").state_dict())
    with pytest.raises(ValueError, match="has the shape"):
        method.load_state_dict({"target": torch.zeros(N + 1, C)})


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder of 1,700 training and 200 test images in Fashion-MNIST's format."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, number in (("train", 1700), ("t10k", 200)):
        labels = (np.arange(number) % 10).astype(np.uint8)
        images = (rng.integers(0, 120, (number, 28, 28)) + 10 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            with gzip.open(folder / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
    return folder


def test_cases_have_the_noise_and_the_tail_that_they_name(fashion: Path) -> None:
    def data(key: str, split: int = 0, seed: int = 0) -> Any:
        return make_data(replace(CASES[key], limit=600), fashion, split, seed)

    clean, noisy, tail = (data(f"fashion-{key}") for key in ("clean", "uniform40", "tail50-uniform20"))
    assert clean.wrong == 0
    assert noisy.wrong == pytest.approx(0.36, abs=0.06)
    assert_close(noisy.images, clean.images)
    counts = torch.bincount(tail.right, minlength=10)
    assert counts.max() / counts.min() > 25
    assert tail.wrong == pytest.approx(0.18, abs=0.09)
    flipped = data("fashion-asymmetric40")
    pairs = {(a, b) for a, b in zip(flipped.right.tolist(), flipped.given.tolist(), strict=True) if a != b}
    assert pairs == set(enumerate(FASHION_CONFUSIONS))
    assert flipped.wrong == pytest.approx(0.4, abs=0.07)
    alike = make_given(CASES["cifar-resnet-asymmetric40"], torch.arange(10).repeat(40), 0)
    assert {(a % 10, b) for a, b in enumerate(alike.tolist()) if a % 10 != b} == set(CIFAR10_CONFUSIONS.items())
    assert not torch.equal(data("fashion-clean", split=1).images, clean.images)
    assert not torch.equal(data("fashion-uniform40", seed=1).given, noisy.given)
    everything = torch.cat([clean.images, clean.clean_images])
    assert len(clean.clean_images) == 1000
    assert len(everything.unique(dim=0)) == 1600


def test_images_side_by_side_are_of_many_classes(fashion: Path) -> None:
    single = make_data(replace(CASES["fashion-clean"], limit=600), fashion, 0, 0)
    case = replace(CASES["many100-asymmetric40"], limit=600)
    data = make_data(case, fashion, 0, 0)
    assert case.classes == 100
    assert data.images.shape == (600, 2 * single.images.shape[1])
    everything = torch.cat([data.images, data.clean_images])
    labels = torch.cat([data.right, data.clean_labels])
    sides = everything.view(1600, 2, -1)
    # The images of the file are the brighter, the higher their class: each side shows its own digit of the label.
    for side, digit in enumerate((labels // 10, labels % 10)):
        brightness = torch.stack([sides[digit == k, side].mean() for k in range(10)])
        assert (brightness.diff() > 0).all()
        assert len(sides[:, side].unique(dim=0)) == 1600
    wrong = data.given != data.right
    assert data.wrong == pytest.approx(0.4, abs=0.07)
    assert torch.equal(data.given // 10, data.right // 10)  # the last image's class is mistaken for another
    assert torch.equal(data.given[wrong] % 10, torch.tensor(FASHION_CONFUSIONS)[data.right[wrong] % 10])
    noisy = make_data(replace(CASES["many1000-uniform40"], limit=600), fashion, 0, 0)
    assert noisy.wrong == pytest.approx(0.4, abs=0.06)
    assert noisy.given.max() > 900
    run = compare.train("fsr", replace(CASES["many1000-tail50"], limit=600), noisy, 0, 1)
    assert run["samples"] == 600


def test_a_network_to_fine_tune_starts_from_images_that_nothing_else_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Features({"image": ImageFeature(), "label": Value("int64"), "worse_label": Value("int64")})
    for name, number in (("train", 300), ("test", 20)):
        images = [Image.new("RGB", (32, 32), (row % 256, row // 256, 9)) for row in range(number)]
        labels = [row % 10 for row in range(number)]
        content = {"image": images, "label": labels, "worse_label": labels[::-1]}
        Dataset.from_dict(content, features=features).to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.setattr(cases, "CLEAN", 20)
    monkeypatch.setattr(cases, "PRETRAINING", replace(cases.PRETRAINING, limit=100, epochs=1))
    used: list[tuple[Tensor, Tensor]] = []
    pretrain = cases.pretrain

    def noted(case: cases.Case, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
        used.append((images, labels))
        return pretrain(case, images, labels, seed)

    monkeypatch.setattr(cases, "pretrain", noted)
    case = replace(CASES["cifar-finetune-worse"], limit=150)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = make_data(case, tmp_path, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    (images, labels), start = used[0], data.start
    assert start is not None
    assert data.wrong > 0.9
    corner = torch.cat([images, data.images, data.clean_images])[:, :2, 0, 0].long()
    rows = corner[:, 0] + 256 * corner[:, 1]
    assert len(rows.unique()) == 270
    assert torch.equal(rows[:100] % 10, labels)
    network, fresh = make_case_network(case, start=start), make_case_network(case)
    assert {name for name in fresh.state_dict() if name not in start} == {"fc.weight", "fc.bias"}
    assert torch.equal(network.state_dict()["conv1.0.weight"], start["conv1.0.weight"])
    assert not torch.equal(network.state_dict()["conv1.0.weight"], fresh.state_dict()["conv1.0.weight"])
    assert compare.train("fsr", replace(case, epochs=1), data, 0, 1)["samples"] == 150
    make_data(replace(CASES["cifar-finetune-clean"], limit=150), tmp_path, 0, 0)
    assert len(used) == 1  # other labels, the same start


def test_the_small_network_is_the_size_it_says() -> None:
    network = make_case_network(CASES["cifar-small-worse"])
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(80_000, rel=0.1)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert [f.shape[1] for f in record(network, torch.zeros(2, 3, 32, 32), stages(network))[1]] == [16, 32, 64]


def test_runs_are_written_skipped_and_shown(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "fashion-uniform40"
    monkeypatch.setitem(compare.CASES, key, replace(CASES[key], limit=600))
    monkeypatch.setitem(METHODS, "mine", METHODS["fsr"])  # so that what `--variant` adds goes away again
    flags = ["--out", str(tmp_path / "runs"), "--fashion", str(fashion), "--cases", key, "--epochs", "2"]
    flags += ["--methods", "ce", "l2r", "mine", "--variant", "mine", '{"dictionary_size": 60, "warmup_epochs": 1}']
    flags += ["--seeds", "0", "1"]
    compare.run_all(compare.parse(flags))
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert [file.name for file in files][:2] == [f"{key}_ce_split0_seed{seed}_epochs2.json" for seed in (0, 1)]
    assert len(files) == 6
    one = json.loads(files[0].read_text())
    assert one["last"] == one["curve"][-1]
    assert 0.5 < one["step"] < 2
    assert one["seconds"] > 0
    assert json.loads(files[4].read_text())["purity"] > 0

    monkeypatch.setattr(compare, "train", None)  # nothing is run again
    compare.run_all(compare.parse(flags))
    files[0].unlink()
    with compare.claim(files[0]) as mine:
        assert mine
        compare.run_all(compare.parse(flags))  # another process is at it
        assert not files[0].exists()

    shown = compare.table(compare.read_runs(compare.parse([*flags, "--table"])), "last").splitlines()
    assert [line.split(" |")[0] for line in shown[2:]] == ["| cross-entropy", "| L2R (clean images)", "| mine"]
    assert "±" in shown[3]
    compare.plot(compare.read_runs(compare.parse(flags)), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000

    packed = tmp_path / "packed.json"
    monkeypatch.setattr("sys.argv", ["compare.py", *flags, "--pack", str(packed)])
    compare.main()
    assert len(json.loads(packed.read_text())) == 5
    again = ["--out", str(packed), *flags[2:]]
    assert compare.table(compare.read_runs(compare.parse(again)), "last").splitlines()[2:] == shown[2:]
    monkeypatch.setitem(METHODS, "fsr", METHODS["mine"])
    runs = compare.read_runs(compare.parse(again))
    compare.plot_curves({**runs, (key, "fsr"): runs[key, "mine"]}, tmp_path / "curves.svg")
    assert "FSR" in (tmp_path / "curves.svg").read_text()
    named = compare.parse([*flags, "--cases", "fashion-tail50", "cifar-small-ag"]).cases
    assert named == ["fashion-tail50", "cifar-small-aggre"]
    with pytest.raises(SystemExit):
        compare.parse([*flags, "--cases", "imagenet"])
    assert "beginnings of names" in capsys.readouterr().err


def test_a_run_of_cross_entropy_is_that_of_the_one_minute_experiment(fashion: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(noisy_fashion_mnist, "TRAIN_SIZE", 600)
    case = replace(CASES["fashion-uniform40"], limit=600)
    data = make_data(case, fashion, 0, 0)
    other = noisy_fashion_mnist.make_data(noisy_fashion_mnist.read_images(fashion), 0.4, 0)
    assert_close(data.given, other.given, 0)
    expected = noisy_fashion_mnist.train(noisy_fashion_mnist.METHODS["ce"], other, 0, 2)
    assert compare.train("ce", case, data, 0, 2)["curve"] == pytest.approx(expected.curve, abs=0.011)
