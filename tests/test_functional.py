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
from fsr_wrap.heads import Batch, FunctionalStep, Head, LinearStep, Reward
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


def total_gradient(head, batch):
    """Σ_i ∇_φ ℓ_i of the batch at the head as it is."""
    params = head.params(batch.logits.dtype)
    return head.gradient(params, batch.features, batch.target, label_smoothing=batch.label_smoothing)[0]


@smoothings
@targets
@pytest.mark.parametrize(
    ("head", "kind"), [(head, "functional") for head in HEADS] + [(head, "linear") for head in LINEAR_HEADS]
)
def test_steps_of_a_module_are_double_backpropagation(head, kind, soft, smoothing):
    module, forward, params, batch, reward = make_problem(head, soft)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scores, loss, ahead = slow_meta_step(forward, params, batch, reward, lr=LR, label_smoothing=smoothing)

    wrapped = Head("head", module)
    assert wrapped.is_linear == (head in LINEAR_HEADS)
    features, reward_features = (wrapped.features(part[0], torch.float64) for part in (batch, reward))
    at_head = Batch(features, wrapped.logits(features, torch.float64), batch[1], smoothing)
    assert_close(at_head.logits, forward(params, batch[0]), 1e-10)
    if kind == "linear":
        step = LinearStep(wrapped, at_head, LR)
    else:
        step = FunctionalStep(
            wrapped, at_head, LR, total_gradient(wrapped, at_head), len(features), lambda tensors: tensors
        )
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
    at_head = Batch(batch[0], head.logits(batch[0], torch.float64), batch[1])
    step = FunctionalStep(head, at_head, LR, total_gradient(head, at_head), len(batch[0]), lambda tensors: tensors)
    whole = step.scores(Reward(*reward, 0.0, 10))
    parts = [step.scores(Reward(reward[0][i::2], reward[1][i::2], 0.0, 10)) for i in range(2)]
    assert_close(parts[0][0] + parts[1][0], whole[0], 1e-10)
    assert_close(parts[0][1] + parts[1][1], whole[1], 1e-10)


def test_a_sample_like_the_reward_data_scores_and_its_wrong_twin_does_not():
    head = torch.nn.Linear(3, 2).double()
    torch.nn.init.zeros_(head.weight)
    features = torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    wrapped = Head("head", head)
    step = LinearStep(wrapped, Batch(features, wrapped.logits(features, torch.float64), torch.tensor([0, 1])), LR)
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
    assert_close(fsr.normalize_weights(weights, weights.sum()), weights / 4.00001)
    zeros = torch.zeros(3)
    assert_close(fsr.normalize_weights(zeros, zeros.sum()), zeros, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effective_sample_size(dtype):
    assert_close(fsr.effective_sample_size(torch.full((5,), 0.2, dtype=dtype)), 5.0)
    assert_close(fsr.effective_sample_size(torch.tensor([0.0, 0.4, 0.0], dtype=dtype)), 1.0)
    assert_close(fsr.effective_sample_size(torch.tensor([1.0, 2.0], dtype=dtype)), 9 / 5)
    assert_close(fsr.effective_sample_size(torch.zeros(3, dtype=dtype)), 0.0)


# --- re-labelling and MixUp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_relabel(temperature):
    stored, logits = 4 * torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    stored[2] = 0
    found = fsr.relabel(stored, logits, momentum=0.1, temperature=temperature)
    assert_close(found, slow_relabel(stored, logits, 0.1, temperature), 1e-12)
    halves = [
        fsr.relabel(
            stored[part], logits[part], momentum=0.1, temperature=temperature, mean_square=stored.square().mean()
        )
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert_close([torch.cat(parts) for parts in zip(*halves, strict=True)], found, 1e-12)


def test_relabel_of_samples_never_seen():
    target, new = fsr.relabel(torch.zeros(2, 4), torch.ones(2, 4), momentum=0.1)
    assert_close(target, torch.full((2, 4), 0.25))
    assert_close(new, torch.full((2, 4), 0.9))


def test_pseudo_labels_follow_the_twin():
    """The store against Eq. 7 written out in numpy, over several visits."""
    store, twin = PseudoLabels(6, 3, 0.1, 1.0), np.zeros((6, 3))
    for step in range(5):
        index = torch.randperm(6)[:4]
        logits = torch.randn(4, 3)
        stored = store.stored(index, torch.float32)
        target, seen = store.update(index, logits, stored, torch.ones(4, dtype=torch.bool), stored.square().mean())
        expected, new = slow_relabel(twin[index], logits, 0.1)
        assert_close(target, expected, 1e-2)  # half precision
        assert_close(seen, torch.as_tensor(twin[index] != 0).any(1))
        twin[index] = new
        assert_close(store.logits[:-1], twin, 1e-2)
        assert step == 0 or seen.any()


def test_pseudo_labels_keep_grow_clamp_and_round_trip():
    store = PseudoLabels(3, 2, 0.0, 1.0)
    logits = torch.tensor([[1.0, 2.0], [1e9, -1e9]])
    store.update(torch.tensor([0, 2]), logits, torch.zeros(2, 2), torch.tensor([False, True]), torch.tensor(0.0))
    assert store.logits[:2].eq(0).all()
    assert store.logits.isfinite().all()
    assert store.logits[2].tolist() == [65504.0, -65504.0]

    held = store.state_dict()["logits"]
    assert held.shape == (3, 2)
    store.grow(2)
    assert store.logits.shape == (4, 2)
    store.grow(6)
    assert store.logits.shape == (7, 2)
    assert_close(store.logits[:3], held, 0.0)
    assert store.logits[3:6].eq(0).all()

    copy = PseudoLabels(6, 2, 0.0, 1.0)
    copy.load_state_dict(store.state_dict())
    assert_close(copy.state_dict(), store.state_dict(), 0.0)


def test_pseudo_labels_that_do_not_fit_say_so():
    with pytest.raises(MemoryError, match=r"100000000 x 100000000 .*relabel_weight=0"):
        PseudoLabels(10**8, 10**8, 0.1, 1.0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 0.2])
def test_mixup_coefficients(beta):
    share = fsr.mixup_coefficients(torch.rand(200_000), beta)
    assert share.min() >= 0.5
    assert share.max() <= 1
    assert_close(share.mean(), 1 - 1 / (2 * (1 / beta + 1)), 2e-3)  # 1 − E[U^(1/β)]/2
    assert_close(fsr.mixup_coefficients(torch.tensor([0.0, 0.5]), 0.5), torch.tensor([1.0, 0.875]))
