import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CLASSES,
    HEADS,
    LINEAR_HEADS,
    assert_close,
    make_problem,
    slow_cross_entropy,
    slow_meta_step,
    slow_relabel,
)

from fsr_wrap import functional as fsr
from fsr_wrap import rules
from fsr_wrap.heads import Batch, GradientStep, Head, KernelStep, Reward
from fsr_wrap.relabel import PseudoLabels

LR = 0.3
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.1])
targets = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


# --- the meta-gradient -----------------------------------------------------------------------------------------------


@smoothings
@targets
@pytest.mark.parametrize("head", HEADS)
def test_torch_func_path_is_double_backpropagation(head, soft, smoothing):
    _, forward, params, batch, reward = make_problem(head, soft)
    scores, _, ahead = slow_meta_step(forward, params, batch, reward, lr=LR, label_smoothing=smoothing)

    gradient, _ = fsr.head_gradient(forward, params, *batch, label_smoothing=smoothing)
    found = fsr.look_ahead(params, gradient, lr=LR, batch_size=len(batch[0]))
    assert_close(found, ahead, 1e-10)
    total, _ = fsr.head_gradient(forward, found, *reward, label_smoothing=smoothing)
    mean = {name: value / len(reward[0]) for name, value in total.items()}
    assert_close(fsr.meta_gradient(forward, params, *batch, mean, lr=LR, label_smoothing=smoothing), scores, 1e-10)
    assert scores.abs().min() > 1e-6


@smoothings
@targets
@pytest.mark.parametrize("head", LINEAR_HEADS)
def test_closed_form_is_double_backpropagation(head, soft, smoothing):
    _, forward, params, batch, reward = make_problem(head, soft)
    scores, _, ahead = slow_meta_step(forward, params, batch, reward, lr=LR, label_smoothing=smoothing)

    bias = "bias" in params
    h, h_r = batch[0].flatten(1), reward[0].flatten(1)
    e = fsr.residual(forward(params, h), batch[1], smoothing)
    logits = fsr.linear_look_ahead_logits(h_r, forward(params, h_r), h, e, lr=LR, bias=bias)
    assert_close(logits, forward(ahead, h_r), 1e-10)
    q = fsr.residual(logits, reward[1], smoothing) / len(h_r)
    assert_close(fsr.linear_meta_gradient(h, e, h_r, q, lr=LR, bias=bias), scores, 1e-10)


def at_the_head(head, features, target, smoothing=0.0):
    residual = fsr.residual(head.logits(features, torch.float64), target, smoothing)
    return Batch(features, target, residual, smoothing)


def make_step(kind, head, batch):
    params, size = head.params(torch.float64), len(batch.features)
    if kind == "kernel":
        return KernelStep(head, batch, LR, params, size, size)
    return GradientStep(head, batch, LR, params, head.batch_gradient(params, batch), size)


@smoothings
@targets
@pytest.mark.parametrize(
    ("head", "kind"), [(head, "gradient") for head in HEADS] + [(head, "kernel") for head in LINEAR_HEADS]
)
def test_steps_of_a_module_are_double_backpropagation(head, kind, soft, smoothing):
    module, forward, params, batch, reward = make_problem(head, soft)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scores, loss, ahead = slow_meta_step(forward, params, batch, reward, lr=LR, label_smoothing=smoothing)

    wrapped = Head("head", module)
    assert wrapped.is_linear == (head in LINEAR_HEADS)
    features, reward_features = (wrapped.features(part[0], torch.float64) for part in (batch, reward))
    assert_close(wrapped.logits(features, torch.float64), forward(params, batch[0]), 1e-10)
    step = make_step(kind, wrapped, at_the_head(wrapped, features, batch[1], smoothing))
    found_scores, found_loss = step.scores(Reward(reward_features, reward[1], smoothing, len(reward_features)))

    assert_close(found_scores, scores, 1e-10)
    assert_close(found_loss, loss, 1e-10)
    logits = step.logits(reward_features, wrapped.logits(reward_features, torch.float64))
    assert_close(logits, forward(ahead, reward[0]), 1e-10)
    assert_close(module.state_dict(), before, 0.0)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_part_of_the_reward_batch_counts_for_its_share():
    """Two processes' parts, each divided by the whole q, add up to the whole."""
    module, _, _, batch, reward = make_problem("mlp", soft=False, q=10)
    head = Head("head", module)
    step = make_step("gradient", head, at_the_head(head, *batch))
    whole = step.scores(Reward(*reward, 0.0, 10))
    parts = [step.scores(Reward(reward[0][i::2], reward[1][i::2], 0.0, 10)) for i in range(2)]
    assert_close(parts[0][0] + parts[1][0], whole[0], 1e-10)
    assert_close(parts[0][1] + parts[1][1], whole[1], 1e-10)


def test_a_sample_like_the_reward_data_scores_and_its_wrong_twin_does_not():
    head = torch.nn.Linear(3, 2).double()
    torch.nn.init.zeros_(head.weight)
    features = torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    wrapped = Head("head", head)
    step = make_step("kernel", wrapped, at_the_head(wrapped, features, torch.tensor([0, 1])))
    scores, _ = step.scores(Reward(features[:1], torch.tensor([0]), 0.0, 1))
    assert scores[0] > 0 > scores[1]


# --- losses ----------------------------------------------------------------------------------------------------------


@smoothings
@targets
def test_cross_entropy_and_its_residual(soft, smoothing):
    logits = torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True)
    target = torch.rand(6, CLASSES, dtype=torch.float64) * 3 if soft else torch.randint(CLASSES, (6,))
    loss = fsr.cross_entropy(logits, target, smoothing)
    assert_close(loss, slow_cross_entropy(logits, target, smoothing), 1e-12)
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    assert_close(fsr.residual(logits.detach(), target, smoothing), gradient, 1e-12)
    assert_close(fsr.losses_and_residual(logits.detach(), target, smoothing), (loss.detach(), gradient), 1e-12)
    assert_close(fsr.cross_entropy(logits, target, smoothing, reduction="sum"), loss.sum(), 1e-12)


def test_dense_target():
    logits = torch.zeros(2, 4)
    assert_close(fsr.dense_target(torch.tensor([1, 3]), logits), F.one_hot(torch.tensor([1, 3]), 4).float())
    smooth = fsr.dense_target(torch.tensor([1, 3]), logits, 0.2)
    assert_close(smooth[0], torch.tensor([0.05, 0.85, 0.05, 0.05]))
    soft = torch.rand(2, 4)
    assert fsr.dense_target(soft, logits) is soft


# --- weights ---------------------------------------------------------------------------------------------------------


def test_clip_weights():
    assert_close(fsr.clip_weights(torch.tensor([-2.0, 0.0, 3.0])), torch.tensor([0.0, 0.0, 3.0]))


@pytest.mark.parametrize("batch_size", [4, torch.tensor(4.0)])
def test_shift_weights_leave_no_sample_out(batch_size):
    scores = torch.tensor([-2.0, 0.0, 3.0, -2.0])
    weights = fsr.shift_weights(scores, scores.amin(), batch_size)
    assert_close(weights, torch.tensor([0.25, 2.25, 5.25, 0.25]))


def test_shift_weights_of_equal_scores_are_uniform():
    scores = torch.full((8,), -0.7)
    weights = fsr.shift_weights(scores, scores.amin(), 8)
    assert_close(fsr.normalize_weights(weights, weights.sum()), torch.full((8,), 1 / 8), 2e-5)


def test_normalize_weights():
    weights = torch.tensor([1.0, 0.0, 3.0])
    assert_close(fsr.normalize_weights(weights, weights.sum()), weights / 4, 0.0)
    assert_close(fsr.normalize_weights(1e-9 * weights, 1e-9 * weights.sum()), weights / 4)
    zeros = torch.zeros(3)
    assert_close(fsr.normalize_weights(zeros, zeros.sum()), zeros, 0.0)


SCORES = torch.tensor([-2.0, 0.0, 3.0, 1.0])
VALID = torch.tensor([True, True, True, False])


def weigh(rule, scores, valid=None, parts=1):
    """ω of scores that lie in so many processes, which each know their own and the sums of all."""
    size = len(scores)
    scores = scores.chunk(parts)
    valid = (None,) * parts if valid is None else valid.chunk(parts)
    scores = [s if v is None else torch.where(v, s, 0) for s, v in zip(scores, valid, strict=True)]
    found = [rules.unnormalized(rule, s, v) for s, v in zip(scores, valid, strict=True)]
    sums = torch.stack([sums for _, sums in found])
    return torch.cat([rules.normalize(rule, u, v, size, sums) for (u, _), v in zip(found, valid, strict=True)])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_weights_by_each_rule(parts):
    assert_close(weigh("clip", SCORES, None, parts), torch.tensor([0, 0, 3.0, 1.0]) / 4)
    assert_close(weigh("shift", SCORES, None, parts), torch.tensor([0.25, 2.25, 5.25, 3.25]) / 11)
    assert_close(weigh("uniform", SCORES, None, parts), torch.full((4,), 0.25), 0.0)
    assert_close(weigh("clip", SCORES, VALID, parts), torch.tensor([0, 0, 1.0, 0]))
    assert_close(weigh("shift", SCORES, VALID, parts), torch.tensor([0.25, 2.25, 5.25, 0]) / 7.75)
    assert_close(weigh("uniform", SCORES, VALID, parts), 0.25 * VALID.float(), 0.0)


def test_weights_of_selected_samples_are_shares_of_them():
    chosen = torch.tensor([1.0, 0.0, 1.0])
    sums = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    assert_close(rules.normalize("select", chosen, None, 6, sums), chosen / 5)
    assert_close(rules.normalize("select", 0 * chosen, None, 6, 0 * sums), 0 * chosen, 0.0)


@pytest.mark.parametrize("rule", ["clip", "shift"])
def test_weights_of_infinite_scores_are_uniform(rule):
    scores = torch.tensor([torch.inf, 0.0, 1.0, 2.0])
    assert_close(weigh(rule, scores), torch.full((4,), 0.25), 0.0)
    assert_close(weigh(rule, scores, VALID), 0.25 * VALID.float(), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effective_sample_size(dtype):
    assert_close(fsr.effective_sample_size(torch.full((5,), 0.2, dtype=dtype)), 5.0)
    assert_close(fsr.effective_sample_size(torch.tensor([0.0, 0.4, 0.0], dtype=dtype)), 1.0)
    assert_close(fsr.effective_sample_size(torch.tensor([1.0, 2.0], dtype=dtype)), 9 / 5)
    assert_close(fsr.effective_sample_size(torch.zeros(3, dtype=dtype)), 0.0)


# --- re-labelling and MixUp ------------------------------------------------------------------------------------------


def test_relabel():
    stored, logits = 4 * torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    stored[2] = 0
    found = fsr.relabel(stored, logits, momentum=0.1)
    assert_close(found, slow_relabel(stored, logits, 0.1), 1e-12)
    halves = [
        fsr.relabel(stored[part], logits[part], momentum=0.1, mean_square=stored.square().mean())
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert_close([torch.cat(parts) for parts in zip(*halves, strict=True)], found, 1e-12)


def test_relabel_of_samples_never_seen():
    target, new = fsr.relabel(torch.zeros(2, 4), torch.ones(2, 4), momentum=0.1)
    assert_close(target, torch.full((2, 4), 0.25))
    assert_close(new, torch.full((2, 4), 0.9))


STORAGES = pytest.mark.parametrize("storage", ["float16", "int8", 1, 2, 3, 7])


@STORAGES
def test_pseudo_labels_follow_the_twin(storage):
    """The store against Eq. 7 written out in numpy, over several visits; what is left out is the only difference."""
    store, twin, squares_of = PseudoLabels(6, 3, 0.1, storage), np.zeros((6, 3)), np.zeros(6)
    for step in range(5):
        index = torch.randperm(6)[:4]
        logits = torch.randn(4, 3)
        stored, squares = store.stored(index, torch.float32)
        assert_close(stored, twin[index], 1e-1)
        assert_close(squares, squares_of[index], 2e-2)
        assert_close(squares > 0, torch.as_tensor(twin[index] != 0).any(1))
        target = store.update(index, logits, stored, squares.mean())
        normalized = twin[index] / np.sqrt(squares_of[index].mean() + 1e-8)
        assert_close(target, torch.as_tensor(normalized).softmax(1), 1e-2)
        new = 0.1 * normalized + 0.9 * logits.numpy()
        squares_of[index] = np.square(new).mean(1)
        if isinstance(storage, int) and storage < 3:
            ordered = np.sort(new, axis=1)[:, ::-1]
            order = np.argsort(-new, axis=1)
            ordered[:, storage:] = ordered[:, storage:].mean(1, keepdims=True)
            np.put_along_axis(new, order, ordered, axis=1)
        twin[index] = new
        tolerance = 1e-2 if storage != "int8" else 2e-2
        assert_close(store.stored(torch.arange(6), torch.float64)[0], twin, tolerance)
        assert step == 0 or (squares > 0).any()


@pytest.mark.parametrize(("storage", "expected"), [("float16", 20), ("int8", 12), (3, 18), (10, 46), (99, 46)])
def test_bytes_a_sample(storage, expected):
    store = PseudoLabels(50, 10, 0.1, storage)
    assert sum(column[:-1].nbytes for column in store.columns.values()) == 50 * expected


def test_the_largest_of_very_many_classes():
    store = PseudoLabels(2, 40_000, 0.0, 2)
    logits = torch.zeros(1, 40_000)
    logits[0, [39_999, 35_000]] = torch.tensor([7.0, 5.0])
    stored, _ = store.stored(torch.tensor([1]), torch.float32)
    store.update(torch.tensor([1]), logits, stored, torch.tensor(0.0))
    found, square = store.stored(torch.tensor([0, 1]), torch.float32)
    assert_close(found[1:], logits, 1e-3)
    assert_close(square, torch.tensor([0.0, (49 + 25) / 40_000]), 1e-6)


@STORAGES
def test_pseudo_labels_keep_grow_clamp_and_round_trip(storage):
    store = PseudoLabels(3, 2, 0.0, storage)
    logits = torch.tensor([[1.0, 2.0], [1e9, -1e9]])  # the last of a class that is shut
    store.update(torch.tensor([-1, 2]), logits, torch.zeros(2, 2), torch.tensor(0.0))
    held, _ = store.stored(torch.arange(3), torch.float32)
    assert held[:2].eq(0).all()
    assert held.isfinite().all()
    assert held[2, 0] == 65504 or storage == "int8"
    assert held[2, 1] == 0

    state = store.state_dict()
    assert len(state["logits"]) == 3
    store.grow(2)
    assert len(store) == 3
    store.grow(6)
    assert len(store) == 6
    grown, squares = store.stored(torch.arange(6), torch.float32)
    assert_close(grown[:3], held, 0.0)
    assert grown[3:].eq(0).all()
    assert squares[3:].eq(0).all()

    copy = PseudoLabels(6, 2, 0.0, storage)
    copy.load_state_dict(store.state_dict())
    assert_close(copy.state_dict(), store.state_dict(), 0.0)


def test_pseudo_labels_that_do_not_fit_say_so():
    with pytest.raises(MemoryError, match=r"200000000 bytes of each of 100000000 samples.*relabel_storage=10"):
        PseudoLabels(10**8, 10**8, 0.1)


def test_distribution_and_sharpen():
    mass = torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.0, 0.0], [0.2, 0.2, 0.4]])
    probability = fsr.distribution(mass)
    assert_close(probability, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [0.25, 0.25, 0.5]]))
    assert_close(fsr.sharpen(probability), torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 0.0], [1 / 6, 1 / 6, 2 / 3]]))


def test_early_learning_pulls_to_the_average():
    """Its value written out; a step down its slope brings the prediction nearer, and zeros pull nowhere."""
    logits = torch.randn(5, CLASSES, dtype=torch.float64, requires_grad=True)
    average = torch.rand(5, CLASSES, dtype=torch.float64)
    average = average / average.sum(1, keepdim=True)
    average[3] = 0
    loss = fsr.early_learning(logits, average)
    for i in range(5):
        assert_close(loss[i], (1 - average[i] @ logits[i].exp() / logits[i].exp().sum()).log(), 1e-12)
    slope = torch.autograd.grad(loss.sum(), logits)[0]
    assert slope[3].eq(0).all()
    assert slope[[0, 1, 2, 4]].abs().amin(0).gt(0).all()
    near = [(average * (logits - step * slope).softmax(1)).sum(1) for step in (0.0, 0.1)]
    assert (near[1] > near[0])[[0, 1, 2, 4]].all()
    sure = torch.tensor([[1e3, 0.0]], requires_grad=True)
    fsr.early_learning(sure, torch.tensor([[1.0, 0.0]])).sum().backward()
    assert sure.grad.isfinite().all()


@STORAGES
def test_averages_follow_the_twin(storage):
    """Over several visits, in numpy; a class that is shut has no part."""
    store, twin = PseudoLabels(6, 3, 0.8, storage), np.zeros((6, 3))
    everything = isinstance(storage, str) or storage >= 2
    shut = torch.tensor([False, False, True])
    for _ in range(6):
        index = torch.randperm(6)[:4]
        logits = torch.randn(4, 3).masked_fill(shut, -1e9)
        stored, _ = store.stored(index, torch.float32)
        if everything:
            mass = torch.as_tensor(twin[index])
            found = fsr.distribution(stored * ~shut)
            assert_close(found, mass / mass.sum(1, keepdim=True).clamp(min=1e-6), 2e-2)
        store.average(index, logits, stored, logits > fsr.SHUT)
        twin[index] = 0.8 * twin[index] + 0.2 * logits.softmax(1).numpy()
    if everything:
        assert_close(store.stored(torch.arange(6), torch.float64)[0] * ~shut, twin, 2e-2)


def test_the_surest_their_own_and_the_mean_of_averages(monkeypatch):
    monkeypatch.setattr("fsr_wrap.relabel._CHUNK", 6)  # two samples at once
    store = PseudoLabels(5, 3, 0.8)
    logits = torch.randn(4, 3)
    for part, times in (([0, 1, 3], 1), ([3, 4], 2)):
        for _ in range(times):
            index = torch.tensor(part)
            rows = logits[index.clamp(max=3)]
            store.average(index, rows, store.stored(index, torch.float32)[0], torch.ones(len(part), 3) > 0)
    label = torch.tensor([2, 0, 1, 1, -1])
    own, confidence, predicted, mean, rival = store.read(label)
    expected = logits[[0, 1, 2, 3, 3]].softmax(1)
    expected[2] = 0
    assert_close(own[:4], expected[torch.arange(4), label[:4]], 2e-3)
    assert_close(confidence, expected.amax(1), 2e-3)
    assert torch.equal(predicted[[0, 1, 3, 4]], expected.argmax(1)[[0, 1, 3, 4]])
    assert_close(mean, expected.sum(0) / 4, 2e-3)
    others = expected.scatter(1, label.clamp(min=0)[:, None], -1).argmax(1)
    assert torch.equal(rival[[0, 1, 3, 4]], others[[0, 1, 3, 4]])

    prior = torch.tensor([3.0, 0.5, 1.0]).log()
    same, confidence, predicted, mean, rival = store.read(label, prior)
    assert torch.equal(same, own)
    expected = (logits[[0, 1, 2, 3, 3]] + prior).softmax(1)
    expected[2] = 0
    assert_close(confidence, expected.amax(1), 2e-3)
    assert torch.equal(predicted[[0, 1, 3, 4]], expected.argmax(1)[[0, 1, 3, 4]])
    assert_close(mean, expected.sum(0) / 4, 2e-3)
    others = expected.scatter(1, label.clamp(min=0)[:, None], -1).argmax(1)
    assert torch.equal(rival[[0, 1, 3, 4]], others[[0, 1, 3, 4]])


def test_margins_of_rare_classes(monkeypatch):
    """Sixteen times as few samples as in the largest class, twice the margin; classes of no samples have none."""
    monkeypatch.setattr(fsr, "_MARGIN", 8.0)
    monkeypatch.setattr(fsr, "_ALIKE", 1.0)
    found = fsr.class_margins(torch.tensor([256, 16, 0, 1]))
    assert_close(found, torch.tensor([1.5, 3.0, 0.0, 6.0]).double())  # 8 · (1 − 1/4) for the rarest
    monkeypatch.setattr(fsr, "_ALIKE", 16.0)
    assert_close(fsr.class_margins(torch.tensor([256, 16, 0, 1])), torch.tensor([1.0, 2.0, 0.0, 4.0]).double())
    for alike in ([16, 1, 7], [5, 5, 0], [3, 0, 0], [0, 0, 0]):
        assert not fsr.class_margins(torch.tensor(alike)).any()


def test_logits_held_back_by_a_margin():
    """The loss of LDAM for one class; a soft target's margin is that of its classes on average, whatever its weight."""
    logits, margin = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0.5, 1.0, 0.0, 2.0])
    target = torch.tensor([[0.0, 0.2, 0, 0], [0.3, 0, 0, 0.1], [0, 0, 0, 0]]).double()
    behind = logits - torch.tensor([[0, 1.0, 0, 0], [0.375, 0, 0, 0.5], [0, 0, 0, 0]]).double()
    assert_close(fsr.held_back(logits, target, margin), behind)


@pytest.mark.parametrize("beta", [0.5, 1.0, 0.2])
def test_mixup_coefficients(beta):
    share = fsr.mixup_coefficients(torch.rand(200_000), beta)
    assert share.min() >= 0.5
    assert share.max() <= 1
    assert_close(share.mean(), 1 - 1 / (2 * (1 / beta + 1)), 2e-3)  # 1 − E[U^(1/β)]/2
    assert_close(fsr.mixup_coefficients(torch.tensor([0.0, 0.5]), 0.5), torch.tensor([1.0, 0.875]))
