"""FSRWrapper: the optimizer's face, the step against a slow twin, epochs, bad input, state."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLIP, judge_soon
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fsr_wrap import FSRConfig, FSRWrapper, with_index
from fsr_wrap.pushers import AreaUnderMargin

N, CLASSES = 400, 10


@functools.cache
def digits(noise: float = 0.0, size: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Real digits: images (size, 64), given labels and clean labels."""
    images, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:size]
    clean = torch.tensor(labels)[chosen]
    wrong = torch.rand(size, generator=torch.Generator().manual_seed(1)) < noise
    given = torch.where(wrong, (clean + 1) % CLASSES, clean)
    return torch.tensor(images / 16, dtype=torch.float32)[chosen], given, clean


class Net(nn.Module):
    """A small classifier with BatchNorm and dropout before its head."""

    def __init__(self, width: int = 32, norm: bool = True, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Linear(64, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.norm(self.body(x)))))


def make(seed: int = 0, norm: bool = True, dropout: float = 0.0, **options: Any) -> tuple[Net, FSRWrapper]:
    """A model and its wrapper, which soon judges labels, or re-weights after an epoch under the paper's rules."""
    torch.manual_seed(seed)
    model = Net(norm=norm, dropout=dropout)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"num_samples": N, "dictionary_size": 100, "reward_batch_size": 50, "warmup_epochs": 1, **options}
    return model, judge_soon(FSRWrapper(model, inner, **options), CLASSES)


def step(model: nn.Module, fsr: FSRWrapper, x: Tensor, y: Tensor, index: Tensor) -> float:
    loss = fsr.loss(model(x), y, index)
    loss.backward()
    fsr.step()
    fsr.zero_grad()
    return loss.item()


def train(model: nn.Module, fsr: FSRWrapper, epochs: int = 2, noise: float = 0.0, batch_size: int = 50) -> list[float]:
    x, y, _ = digits(noise)
    order = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(epochs):
        for index in torch.randperm(N, generator=order).split(batch_size):
            losses.append(step(model, fsr, x[index], y[index], index))
    return losses


def frozen(value: Any) -> Any:
    """The value as something that compares bit by bit, also where it holds NaN."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else value


def snapshot(model: nn.Module, fsr: FSRWrapper) -> Any:
    """Everything that bad input must leave alone, bit by bit."""
    return frozen([dict(model.state_dict()), fsr.state_dict(), [p.grad for p in model.parameters()]])


# --- the optimizer's face --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["select", "clip"])
def test_three_lines_of_the_readme_train(rule: str) -> None:
    """The default goes on plainly as long as nothing is learned by heart; the paper's rule re-weights after a while."""
    x, y, _ = digits()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_set = with_index(TensorDataset(x, y))
    if rule == "select":
        optimizer = FSRWrapper(model, optimizer, head="fc", dataset=train_set)
    else:
        with pytest.warns(UserWarning, match="dictionary_size=40"):
            optimizer = FSRWrapper(model, optimizer, "fc", dataset=train_set, config=FSRConfig.preset("cifar_noise"))
    loader = DataLoader(train_set, batch_size=50, shuffle=True)
    losses = []
    for _ in range(8):
        for inputs, labels, index in loader:
            loss = optimizer.loss(model(inputs), labels, index)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert optimizer.epoch == 8
    assert optimizer.is_reweighting == (rule == "clip")
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_is_the_inner_optimizer_to_everybody() -> None:
    _model, fsr = make()
    inner = fsr.optimizer
    assert isinstance(fsr, torch.optim.Optimizer)
    assert fsr.param_groups is inner.param_groups
    assert fsr.state is inner.state
    assert fsr.defaults is inner.defaults
    groups = copy.copy(inner.param_groups)
    fsr.param_groups = groups
    assert inner.param_groups is groups
    fsr.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 3.0})
    assert inner.param_groups[-1]["lr"] == 3.0
    calls = []
    fsr.register_step_pre_hook(lambda *_: calls.append("pre"))
    fsr.register_step_post_hook(lambda *_: calls.append("post"))
    fsr.step()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
            [3],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch 2.5's own SequentialLR
def test_schedulers_set_the_rate_that_is_used(schedule: Any) -> None:
    rates = []
    for wrapped in (True, False):
        _model, fsr = make()
        optimizer = fsr if wrapped else fsr.optimizer
        scheduler = schedule(optimizer)
        seen = []
        for _ in range(8):
            optimizer.step()
            scheduler.step()
            seen.append(fsr.optimizer.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]


def test_reduce_on_plateau() -> None:
    _, fsr = make()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(fsr, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert fsr.optimizer.param_groups[0]["lr"] < 0.1


def test_stepping_the_inner_optimizer_trains_the_same() -> None:
    finals = []
    for inner in (True, False):
        model, fsr = make()
        x, y, _ = digits(0.3)
        for index in torch.arange(N).split(50) * 2:
            fsr.loss(model(x[index]), y[index], index).backward()
            (fsr.optimizer if inner else fsr).step()
            (fsr.optimizer if inner else fsr).zero_grad()
        finals.append(model.fc.weight.detach().clone())
    assert torch.equal(*finals)


def test_closure() -> None:
    model, fsr = make()
    x, y, _ = digits()

    def closure() -> Tensor:
        fsr.zero_grad()
        loss = fsr.loss(model(x[:50]), y[:50], torch.arange(50))
        loss.backward()
        return loss

    before = model.fc.weight.detach().clone()
    assert fsr.step(closure) > 0
    assert not torch.equal(before, model.fc.weight)


def test_fused_scaler_attributes_reach_the_inner_optimizer() -> None:
    _, fsr = make()
    fsr.grad_scale, fsr.found_inf = 2.0, 0.0
    assert fsr.optimizer.grad_scale == 2.0
    del fsr.grad_scale, fsr.found_inf
    assert not hasattr(fsr.optimizer, "grad_scale")
    assert getattr(fsr, "grad_scale", None) is None


# --- the step --------------------------------------------------------------------------------------------------------


def test_warmup_is_plain_cross_entropy() -> None:
    model, fsr = make(**{**CLIP, "relabel_weight": 0.0, "warmup_epochs": 5})
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    x, y, _ = digits(0.3)
    for index in torch.arange(N).split(50) * 2:
        step(model, fsr, x[index], y[index], index)
        F.cross_entropy(twin(x[index]), y[index]).backward()
        plain.step()
        plain.zero_grad()
    for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_as_long_as_nothing_is_learned_by_heart_training_is_plain(balance: float) -> None:
    """Cross-entropy without the samples that are held out, of the logits plus the log-share of the classes so far."""
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fsr = FSRWrapper(model, inner, num_samples=N, class_balance=balance)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    x, y, _ = digits(0.3)
    share = torch.bincount(y).double() / N
    for number, index in enumerate(torch.arange(N).split(50) * 3):
        step(model, fsr, x[index], y[index], index)
        held = fsr._memory.selection.code[index] == 1  # type: ignore[union-attr]
        logits = twin(x[index]) + (balance * share.log().float() if number >= 8 else 0)
        F.cross_entropy(logits[~held], y[index[~held]]).backward()
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(fsr.weights, (~held) / (~held).sum())
    assert not fsr.is_reweighting
    for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_a_label_lacks_goes_to_what_was_thought() -> None:
    """The loss of a step after labels were judged, written out."""
    model, fsr = make(norm=False)
    train(model, fsr, 3, 0.3)
    x, y, _ = digits(0.3)
    index = torch.arange(50)
    state = fsr.state_dict()["fsr"]
    right = state["selection"]["weight"][index]
    assert right.min() < 0.6
    assert right.max() > 0.8
    average = state["pseudo"]["logits"][index].float()
    average = average / average.sum(1, keepdim=True)
    logits = model(x[index])
    loss = fsr.loss(logits, y[index], index)
    log_p = F.log_softmax(logits + state["log_prior"], dim=1)
    sharp = average.square() / average.square().sum(1, keepdim=True)
    target = right[:, None] * F.one_hot(y[index], CLASSES) + (1 - right)[:, None] * sharp
    pull = torch.log(1 - (average * logits.softmax(1)).sum(1).clamp(max=1 - 1e-4))
    torch.testing.assert_close(loss, (3 * pull - (target * log_p).sum(1)).mean())
    torch.testing.assert_close(fsr.weights, right / 50)
    new = fsr.state_dict()["fsr"]["pseudo"]["logits"][index].float()
    old = state["pseudo"]["logits"][index].float()
    torch.testing.assert_close(new, 0.8 * old + 0.2 * logits.softmax(1), rtol=2e-3, atol=2e-3)
    kept = y[state["selection"]["code"] != 2]
    share = torch.bincount(kept, minlength=CLASSES) / len(kept) * CLASSES
    torch.testing.assert_close(state["log_prior"], share.log())


@pytest.mark.parametrize("rule", ["clip", "shift"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [10, 40])  # of few reward samples the inner products are the cheaper form
def test_weights_equal_double_backward(rule: str, smoothing: float, size: int) -> None:
    """One step of the wrapper against the look-ahead written out with second-order gradients, in float64."""
    options = {"weight_rule": rule, "label_smoothing": smoothing, "reward_batch_size": size, "relabel_weight": 0.0}
    model, fsr = make(**{**CLIP, "warmup_epochs": 0, **options})
    model.double()
    x, y, _ = digits(0.4)
    x = x.double()
    for index in torch.arange(N).split(50):
        step(model, fsr, x[index], y[index], index)
    drawn: list[Any] = []
    draw = fsr._memory.reward_batch
    fsr._memory.reward_batch = lambda: drawn.append(draw()) or drawn[-1]  # type: ignore[method-assign]
    index = torch.arange(50)
    logits = model(x[index])
    features = F.relu(model.norm(model.body(x[index]))).detach()
    fsr.loss(logits, y[index], index)

    omega = torch.full((50,), 1 / 50, dtype=torch.float64, requires_grad=True)
    losses = F.cross_entropy(
        F.linear(features, model.fc.weight, model.fc.bias), y[index], reduction="none", label_smoothing=smoothing
    )
    weight, bias = model.fc.weight, model.fc.bias
    gw, gb = torch.autograd.grad((omega * losses).sum(), (weight, bias), create_graph=True)
    label, payload = drawn[0]
    ahead = F.linear(payload[0], weight - 0.1 * gw, bias - 0.1 * gb)
    reward_loss = F.cross_entropy(ahead, label, label_smoothing=smoothing)
    score = -torch.autograd.grad(reward_loss, omega)[0]
    u = score.clamp(min=0) if rule == "clip" else score - score.min() + 1 / 50
    torch.testing.assert_close(fsr.weights, u / u.sum(), rtol=1e-10, atol=1e-12)


def test_loss_is_weighted_loss_plus_relabelling() -> None:
    model, fsr = make(**CLIP)
    train(model, fsr, 2, 0.4)
    x, y, _ = digits(0.4)
    index = torch.arange(50)
    stored = fsr.state_dict()["fsr"]["pseudo"]["logits"][index].float()
    logits = model(x[index])
    loss = fsr.loss(logits, y[index], index)
    pseudo = (stored * (stored.square().mean() + 1e-8).rsqrt()).softmax(1)
    expected = (fsr.weights * F.cross_entropy(logits, y[index], reduction="none")).sum()
    expected = expected + 2 * F.cross_entropy(logits, pseudo)
    torch.testing.assert_close(loss, expected)
    new = fsr.state_dict()["fsr"]["pseudo"]["logits"][index].float()
    normalized = stored * (stored.square().mean() + 1e-8).rsqrt()
    torch.testing.assert_close(new, 0.1 * normalized + 0.9 * logits.detach(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("options", [{}, CLIP, {**CLIP, "reward": "fresh"}])
def test_leaves_the_users_world_alone(options: dict[str, Any]) -> None:
    """Gradients, RNG, BatchNorm statistics and train/eval flags are those of a plain step."""
    model, fsr = make(**options, dropout=0.3)
    train(model, fsr, 2, 0.3)
    assert fsr.is_reweighting
    x, y, _ = digits(0.3)
    model.zero_grad()
    logits = model(x[:50])
    rng, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    model.drop.eval()
    fsr.loss(logits, y[:50], torch.arange(50))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m is not model.drop for m in model.modules()]


def test_fresh_uses_the_model_as_it_is_now() -> None:
    """With a frozen body without BatchNorm, features never age: cached and fresh give the same weights."""
    weights = []
    for reward in ("cached", "fresh"):
        model, fsr = make(norm=False, **CLIP, reward=reward)
        model.body.requires_grad_(False)
        train(model, fsr, 2, 0.3)
        weights.append(fsr.weights)
    torch.testing.assert_close(*weights)
    model, fsr = make(norm=False, **CLIP, reward="fresh")
    train(model, fsr, 2, 0.3)
    assert not torch.allclose(fsr.weights, weights[0])


@pytest.mark.parametrize("options", [{}, CLIP])
def test_evaluation_leaves_no_trace(options: dict[str, Any]) -> None:
    finals = []
    for evaluating in (True, False):
        model, fsr = make(**options)
        x, y, _ = digits(0.3)
        for index in torch.arange(N).split(50) * 2:
            logits = model(x[index])
            if evaluating:
                model.eval()
                with torch.no_grad():
                    fsr.loss(model(x), y, torch.arange(N))
                model(x[:50])  # even with gradients
                model.train()
            fsr.loss(logits, y[index], index).backward()
            fsr.step()
            fsr.zero_grad()
        finals.append(fsr.scores.clone())
    assert torch.equal(*finals)


def test_two_forwards_then_two_losses() -> None:
    model, fsr = make(norm=False)
    x, y, _ = digits()
    first, second = model(x[:50]), model(x[50:100])
    fsr.loss(first, y[:50], torch.arange(50))
    fsr.loss(second, y[50:100], torch.arange(50, 100))
    scores = AreaUnderMargin()
    for logits, index in ((first, torch.arange(50)), (second, torch.arange(50, 100))):
        from fsr_wrap.pushers import Visit

        expected = scores(Visit(logits.detach(), y[index], torch.zeros(50)))
        torch.testing.assert_close(fsr.scores[index], expected)


def test_a_batch_of_zero_weights_has_zero_loss_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fsr = make(**{**CLIP, "relabel_weight": 0.0})
    train(model, fsr, 2)
    monkeypatch.setattr("fsr_wrap.heads.fsr.linear_meta_gradient_along", lambda h, *_, **__: -torch.ones(len(h)))
    x, y, _ = digits()
    fsr.metrics()
    loss = fsr.loss(model(x[:50]), y[:50], torch.arange(50))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())
    assert fsr.metrics()["fsr/all_zero_batches"] == 1


@pytest.mark.parametrize("options", [{}, CLIP])
def test_wrong_labels_lose_weight(options: dict[str, Any]) -> None:
    model, fsr = make(**options)
    train(model, fsr, 6, 0.3)
    x, given, clean = digits(0.3)
    index = torch.arange(N)
    fsr.loss(model(x), given, index)
    wrong = given != clean
    assert fsr.weights[wrong].sum() < 0.5 * wrong.float().mean()
    purity = (given == clean)[fsr.dictionary.index].float().mean()
    assert purity > (given == clean).float().mean() + 0.1


@pytest.mark.parametrize("options", [{}, CLIP])
def test_soft_targets(options: dict[str, Any]) -> None:
    hard_model, hard = make(**options)
    soft_model, soft = make(**options)
    x, y, _ = digits(0.3)
    for index in torch.arange(N).split(50) * 2:
        a = step(hard_model, hard, x[index], y[index], index)
        logits, target = soft_model(x[index]), F.one_hot(y[index], CLASSES).float()
        loss = soft.loss(logits, target, index, label=y[index])
        loss.backward()
        soft.step()
        soft.zero_grad()
        b = loss.item()
        assert a == pytest.approx(b, rel=1e-4)
    assert hard.is_reweighting
    assert torch.equal(hard.weights, soft.weights) or options
    assert torch.equal(hard._memory.given.known(), soft._memory.given.known())


def test_mlp_head_and_linear_head_of_one_layer_agree() -> None:
    """A Sequential around the head takes the torch.func path; the weights must be those of the closed form."""
    weights = []
    for nested in (False, True):
        torch.manual_seed(0)
        model = Net()
        head: nn.Module = model.fc
        if nested:
            model.fc = head = nn.Sequential(model.fc)  # type: ignore[assignment]
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"num_samples": N, "dictionary_size": 100, **CLIP, "pusher": "meta_margin"}
        fsr = FSRWrapper(model, inner, head, **options)
        train(model, fsr, 2, 0.3)
        weights.append(fsr.weights)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


# --- MixUp -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["cached", "fresh", None])
def test_mixup_keeps_clean_inputs_for_what_is_remembered(reward: str | None) -> None:
    """Where no reward data are kept, too: scores and averages are of the clean inputs."""
    options = {} if reward is None else {**CLIP, "reward": reward}
    model, fsr = make(norm=False, **options, pusher="negative_loss", score_momentum=0.0)
    x, y, _ = digits()
    index = torch.arange(50)
    mixed, target = fsr.mixup(x[:50], y[:50])
    assert not torch.equal(mixed, x[:50])
    torch.testing.assert_close(target.sum(1), torch.ones(50))
    assert target.gather(1, y[:50, None]).min() >= 0.5
    fsr.loss(model(mixed), target, index)
    torch.testing.assert_close(fsr.scores[:50], -F.cross_entropy(model(x[:50]), y[:50], reduction="none").detach())
    fsr.end_epoch()
    if reward is None:
        average = fsr.state_dict()["fsr"]["pseudo"]["logits"][:50].float()
        torch.testing.assert_close(average, 0.2 * model(x[:50]).softmax(1), rtol=2e-3, atol=2e-3)
        return
    batch = fsr.dictionary.draw(20)
    clean = x[batch.index] if reward == "fresh" else F.relu(model.body(x[batch.index]))
    torch.testing.assert_close(batch.payload[0], clean)


def test_authors_margin_is_mixed_loss_minus_clean_lookahead_loss() -> None:
    model, fsr = make(norm=False, **CLIP, pusher="authors_margin", score_momentum=0.0)
    x, y, _ = digits()
    mixed, target = fsr.mixup(x[:50], y[:50])
    logits = model(mixed)
    weight, bias = model.fc.weight, model.fc.bias
    mixed_loss = F.cross_entropy(logits, target, reduction="none")
    gw, gb = torch.autograd.grad(mixed_loss.mean(), (weight, bias), retain_graph=True)
    ahead = F.linear(F.relu(model.body(x[:50])), weight - 0.1 * gw, bias - 0.1 * gb)
    fsr.loss(logits, target, torch.arange(50))
    expected = mixed_loss - F.cross_entropy(ahead, y[:50], reduction="none")
    torch.testing.assert_close(fsr.scores[:50], expected.detach(), rtol=1e-4, atol=1e-5)


def test_mixup_misuse() -> None:
    model, fsr = make()
    x, y, _ = digits()
    with pytest.raises(TypeError, match="floating-point"):
        fsr.mixup(x[:50].byte(), y[:50])
    with pytest.raises(ValueError, match="int64"):
        fsr.mixup(x[:50], y[:49])
    mixed, target = fsr.mixup(x[:50], y[:50])
    with pytest.raises(ValueError, match="as mixup"):
        fsr.loss(model(mixed), target.clone(), torch.arange(50))
    with pytest.raises(ValueError, match="mix last"):
        fsr.loss(model(mixed + 0), target, torch.arange(50))


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_epochs_are_counted_with_a_short_last_batch() -> None:
    model, fsr = make(num_samples=N)
    train(model, fsr, 3, batch_size=64)
    assert fsr.epoch == 3


def test_samples_per_epoch_for_drop_last() -> None:
    model, fsr = make(samples_per_epoch=384)
    x, y, _ = digits()
    for _ in range(3):
        for index in torch.randperm(N)[:384].split(64):
            step(model, fsr, x[index], y[index], index)
    assert fsr.epoch == 3


def test_end_epoch_by_hand_and_the_reminder() -> None:
    model, fsr = make(num_samples=None)
    with pytest.warns(UserWarning, match="end_epoch"):
        train(model, fsr, 3)
    assert fsr.epoch == 0
    model, fsr = make(num_samples=None)
    for _ in range(3):
        train(model, fsr, 1)
        fsr.end_epoch()
        fsr.end_epoch()  # nothing came in between: nothing happens
    assert fsr.epoch == 3
    assert fsr.is_reweighting
    assert len(fsr.scores) >= N


def test_the_wrapper_alone_needs_no_data_set() -> None:
    torch.manual_seed(0)
    model = Net()
    fsr = FSRWrapper(model, torch.optim.AdamW(model.parameters()), head="fc")
    x, y, _ = digits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, fsr, x[:50], y[:50], torch.arange(50) + 7)
    assert fsr.scores.isfinite().sum() == 50


def test_deferred_schedule() -> None:
    model, fsr = make(**{**CLIP, "warmup_epochs": 3})
    for epoch in range(5):
        assert fsr.is_reweighting == (epoch >= 3)
        train(model, fsr, 1)


def test_sampling_with_replacement_and_repeats_in_a_batch() -> None:
    model, fsr = make()
    x, y, _ = digits()
    for _ in range(30):
        index = torch.randint(N, (50,))
        index[:5] = index[5]
        step(model, fsr, x[index], y[index], index)
    members = fsr.dictionary.index
    assert len(members) == len(members.unique())


# --- bad input -------------------------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    x, y, _ = digits()
    return {"x": x[:50], "target": y[:50], "index": torch.arange(50)}


BAD_INPUT = {
    "index too large": ({"index": torch.arange(50) + N - 10}, ValueError, "index outside"),
    "index negative": ({"index": torch.arange(50) - 1}, ValueError, "index outside"),
    "index of another length": ({"index": torch.arange(49)}, ValueError, "one index a sample"),
    "index of two dimensions": ({"index": torch.arange(50)[:, None]}, ValueError, "one index a sample"),
    "index of floats": ({"index": torch.arange(50.0)}, TypeError, "with_index"),
    "index of bools": ({"index": torch.ones(50, dtype=torch.bool)}, TypeError, "with_index"),
    "label too large": ({"target": torch.full((50,), 10)}, ValueError, "label outside"),
    "label negative": ({"target": torch.full((50,), -100)}, ValueError, "label outside"),
    "labels of int32": ({"target": torch.zeros(50, dtype=torch.int32)}, ValueError, "int64 class numbers"),
    "soft targets of other classes": ({"target": torch.rand(50, 9)}, ValueError, "Soft targets must be"),
    "soft targets with NaN": ({"target": torch.full((50, 10), torch.nan)}, ValueError, "soft targets that are"),
    "soft targets below zero": ({"target": torch.full((50, 10), -0.1)}, ValueError, "soft targets that are"),
    "no tensor as target": ({"target": [0] * 50}, TypeError, "target must be a tensor"),
    "other classes than before": ({"logits": torch.zeros(50, 9)}, ValueError, "9 classes, but 10 before"),
    "logits of three dimensions": ({"logits": torch.zeros(50, 10, 1)}, ValueError, r"logits must be \(b, C\)"),
    "logits of integers": ({"logits": torch.zeros(50, 10).long()}, TypeError, "floating point"),
    "no logits": ({"logits": "nothing"}, TypeError, "takes the logits"),
    "NaN in the input": ({"x": torch.full((50, 64), torch.nan)}, ValueError, "NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("options", [{}, CLIP])
def test_bad_input_is_refused_and_changes_nothing(case: str, epochs: int, options: dict[str, Any]) -> None:
    change, error, message = BAD_INPUT[case]
    if epochs == 0 and case == "other classes than before":
        pytest.skip("there is no before")
    model, fsr = make(norm=False, **options)
    train(model, fsr, epochs)
    arguments = {**good(), **change}
    logits = model(arguments["x"])
    before = snapshot(model, fsr)
    with pytest.raises(error, match=message):
        fsr.loss(arguments.get("logits", logits), arguments["target"], arguments["index"])
    assert snapshot(model, fsr) == before
    train(model, fsr, 1)  # and it goes on
    assert fsr.epoch == epochs + 1


def test_infinite_logit_of_one_sample_is_refused() -> None:
    model, fsr = make()
    train(model, fsr, 2)
    logits = model(good()["x"])
    logits = logits + torch.zeros_like(logits).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.inf))
    with pytest.raises(ValueError, match="1 samples of the batch have NaN or infinite"):
        fsr.loss(logits, good()["target"], good()["index"])


def test_loss_before_any_forward() -> None:
    model, fsr = make()
    with pytest.raises(RuntimeError, match="no forward"):
        fsr.loss(torch.zeros(50, 10), good()["target"], good()["index"])
    with torch.no_grad():
        logits = model(good()["x"])
    with pytest.raises(RuntimeError, match="no forward"):
        fsr.loss(logits, good()["target"], good()["index"])


def test_a_head_that_is_not_the_last_layer() -> None:
    model = Net()
    options = {"num_samples": N, "dictionary_size": 100}
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters()), head="body", **options)
    with pytest.raises(ValueError, match=r"'body' \(Linear\) puts out \(50, 32\)"):
        fsr.loss(model(good()["x"]), good()["target"], good()["index"])
    model.scale = nn.Parameter(torch.tensor(3.0))  # type: ignore[assignment]
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters()), head="fc", **options)
    with pytest.raises(ValueError, match="other logits than those passed"):
        fsr.loss(model(good()["x"]) * model.scale, good()["target"], good()["index"])


def test_wrong_construction_changes_nothing() -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters())
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "no module named 'head'", {"head": "head"}),
        (ValueError, "score_momentum=1.0 is not allowed", {"score_momentum": 1.0}),
        (TypeError, "no field 'momentum'", {"momentum": 0.9}),
        (TypeError, "config must be an FSRConfig", {"config": {"seed": 1}}),
        (ValueError, "num_samples=0", {"num_samples": 0}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            FSRWrapper(model, inner, **options)
    with pytest.raises(TypeError, match=r"already: use it as it is, or wrap its \.optimizer anew"):
        FSRWrapper(model, FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=N), num_samples=N)
    with pytest.raises(TypeError, match=r"must be a torch\.optim"):
        FSRWrapper(model, "adam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        FSRWrapper(inner, inner)  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_head_found() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64, 10))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = Bare()
    with pytest.raises(ValueError, match="No head was found in Bare"):
        FSRWrapper(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("rule", ["clip", "shift", "select"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_skip_leaves_the_sample_out(linear: bool, rule: str, bad: float) -> None:
    options = {} if rule == "select" else {**CLIP, "weight_rule": rule}
    model, fsr = make(norm=False, nonfinite="skip", **options, label_smoothing=0.1)
    if not linear:
        model.fc = nn.Sequential(model.fc)  # type: ignore[assignment]
        fsr = judge_soon(FSRWrapper(model, fsr.optimizer, "fc", num_samples=N, config=fsr.config), CLASSES)
    train(model, fsr, 2)
    batch = good()
    x = batch["x"].clone()
    x[3] = bad
    before = fsr.scores.clone()
    fsr.metrics()
    loss = fsr.loss(model(x), batch["target"], batch["index"])
    loss.backward()
    assert loss.isfinite()
    assert fsr.weights[3] == 0
    if rule != "select":
        assert fsr.weights.sum() == pytest.approx(1, abs=1e-2)
    assert torch.equal(fsr.scores[3], before[3])
    assert not torch.equal(fsr.scores[:3], before[:3])
    assert fsr.metrics()["fsr/skipped_samples"] == 1
    assert fsr.scores.isfinite().all()
    assert all(3 not in entries.index for entries in fsr.dictionary._buffer)


@pytest.mark.parametrize("options", [{}, CLIP])
def test_nonfinite_skip_keeps_the_gradients_of_an_overflowing_logit_out(options: dict[str, Any]) -> None:
    model, fsr = make(**options, nonfinite="skip")
    train(model, fsr, 2)
    logits = model(good()["x"])
    overflow = torch.zeros_like(logits).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.inf))
    fsr.loss(logits + overflow, good()["target"], good()["index"]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("rule", ["clip", "shift"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_reward_samples_are_left_out_and_counted(linear: bool, rule: str, bad: float) -> None:
    """Reward samples whose features are not finite any more steer nothing; the others say about the same."""
    weights, skipped = [], []
    for value in (None, bad):
        model, fsr = make(**{**CLIP, "weight_rule": rule}, reward_batch_size=100)
        if not linear:
            model.fc = nn.Sequential(model.fc)  # type: ignore[assignment]
            fsr = FSRWrapper(model, fsr.optimizer, "fc", num_samples=N, config=fsr.config)
        train(model, fsr, 2, 0.3)
        fsr.metrics()
        if value is not None:
            dictionary = fsr._memory.dictionary
            dictionary._arena[0][dictionary._members.row[::10]] = value
        x, y, _ = digits(0.3)
        step(model, fsr, x[:60], y[:60], torch.arange(60))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        weights.append(fsr.weights)
        skipped.append(fsr.metrics()["fsr/skipped_reward_samples"])
    assert skipped[0] == 0 < skipped[1] < 50
    assert weights[1].isfinite().all()
    assert not torch.equal(*weights)
    assert torch.corrcoef(torch.stack(weights))[0, 1] > 0.9


@pytest.mark.parametrize("options", [{}, CLIP])
def test_what_is_remembered_is_finite(options: dict[str, Any]) -> None:
    """With samples that are NaN or huge in the input, whatever else happens."""
    model, fsr = make(norm=False, **options, nonfinite="skip")
    x, y, _ = digits(0.3)
    x = x.clone()
    x[::9] = torch.nan
    x[4::9] = 3e38
    for _ in range(3):
        for index in torch.arange(N).split(60):
            fsr.loss(model(x[index]), y[index], index)
    assert fsr.metrics()["fsr/skipped_samples"] > 0
    state = fsr.state_dict()["fsr"]
    visited = state["table"]["epoch"] >= 0
    assert 0 < visited.sum() < N
    assert state["table"]["score"][visited].isfinite().all()
    assert state["pseudo"]["logits"].isfinite().all()
    assert fsr.dictionary.score.isfinite().all()
    if options:
        assert fsr.dictionary.draw(100).payload[0].isfinite().all()
    else:
        assert state["log_prior"].isfinite().all()
    assert 0 not in fsr.dictionary.index % 9


def test_fresh_refuses_another_input_shape_before_anything_changes() -> None:
    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :64])

    model = Pooled(norm=False)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    fsr = FSRWrapper(model, inner, num_samples=N, **CLIP, reward="fresh", dictionary_size=100)
    x, y, _ = digits()
    step(model, fsr, x[:50], y[:50], torch.arange(50))
    logits = model(F.pad(x[:50], (0, 3)))
    before = snapshot(model, fsr)
    with pytest.raises(ValueError, match='reward="cached"'):
        fsr.loss(logits, y[:50], torch.arange(50))
    assert snapshot(model, fsr) == before


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_samples": None, "samples_per_epoch": N, "relabel_storage": 3},
        CLIP,
        {**CLIP, "reward": "fresh"},
        {**CLIP, "num_samples": None, "samples_per_epoch": N},
    ],
)
def test_resume_in_mid_epoch_is_bit_identical(options: dict[str, Any]) -> None:
    x, y, _ = digits(0.3)
    batches = list(torch.randperm(N, generator=torch.Generator().manual_seed(2)).split(48)) * 3
    model, fsr = make(**options)
    for index in batches[:14]:
        step(model, fsr, x[index], y[index], index)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": fsr.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_model, other = make(seed=9, **options)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for index in batches[14:]:
        assert step(model, fsr, x[index], y[index], index) == step(other_model, other, x[index], y[index], index)
    assert snapshot(model, fsr) == snapshot(other_model, other)


def test_plain_checkpoints_load_and_ours_load_plainly() -> None:
    model, fsr = make(**CLIP)
    train(model, fsr, 2)
    plain = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.9)
    plain.load_state_dict(fsr.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1
    with pytest.warns(UserWarning, match="FSR starts afresh"):
        fsr.load_state_dict(plain.state_dict())
    assert fsr.epoch == 0
    assert not fsr.is_reweighting
    train(model, fsr, 2)
    assert fsr.is_reweighting


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    model, fsr = make(**CLIP)
    train(model, fsr, 2)
    state = fsr.state_dict()
    before = snapshot(model, fsr)
    newer = {**state, "fsr": {**state["fsr"], "version": 99}}
    with pytest.raises(ValueError, match="format 99"):
        fsr.load_state_dict(newer)
    for options, message in (
        ({"num_samples": N + 1}, "samples"),
        ({"dictionary_size": 77}, "dictionary_size=100"),
        ({"reward": "fresh"}, "reward='cached'"),
        ({"weight_rule": "select"}, "weight_rule='clip', this run has 'select'.*pass 'clip'"),
    ):
        _, other = make(**{**CLIP, **options})
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    assert snapshot(model, fsr) == before
    model, fsr = make()
    train(model, fsr, 1)
    state = fsr.state_dict()
    for options, message in (
        (CLIP, "weight_rule='select', this run has 'clip'"),
        ({"relabel_storage": "int8"}, "int8"),
    ):
        _, other = make(**options)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_state_dict_is_a_copy() -> None:
    model, fsr = make()
    train(model, fsr, 2)
    state = fsr.state_dict()["fsr"]
    kept = copy.deepcopy(state["table"]["score"])
    train(model, fsr, 1)
    assert torch.equal(state["table"]["score"], kept)


@pytest.mark.parametrize("options", [{}, CLIP])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_by_themselves(how: str, options: dict[str, Any]) -> None:
    model, fsr = make(**options)
    train(model, fsr, 2, 0.3)
    pair = (model, fsr)
    twin_model, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert twin.param_groups[0]["params"][0] is next(twin_model.parameters())
    assert train(model, fsr, 1, 0.3) == train(twin_model, twin, 1, 0.3)
    assert len(twin_model.fc._forward_hooks) == 1
    again = copy.deepcopy(model)  # what an EMA of the weights does
    again(digits()[0][:3]).sum().backward()


def test_hooks_go_with_the_wrapper() -> None:
    import gc

    model, fsr = make()
    assert model.fc._forward_hooks
    del fsr
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_metrics() -> None:
    model, fsr = make(**CLIP)
    assert fsr.metrics() == {}
    train(model, fsr, 1, 0.4)
    warm = fsr.metrics()
    assert warm["fsr/zero_weight_ratio"] == 0
    assert warm["fsr/effective_sample_size"] == pytest.approx(50)
    assert warm["fsr/max_weight"] == pytest.approx(1)
    assert warm["fsr/dictionary_size"] == 100
    train(model, fsr, 4, 0.4)
    assert fsr.metrics()["fsr/zero_weight_ratio"] > 0.2
    assert all(isinstance(value, (int, float)) for value in warm.values())


def test_metrics_where_labels_are_judged() -> None:
    model, fsr = make()
    train(model, fsr, 1, 0.4)
    warm = fsr.metrics()
    assert warm["fsr/zero_weight_ratio"] == pytest.approx(0.05, abs=0.03)  # what is held out
    train(model, fsr, 1, 0.4)
    judged = fsr.metrics()
    assert judged["fsr/zero_weight_ratio"] == pytest.approx(0.3, abs=0.02)  # the share that is taken for wrong
    assert judged["fsr/reward_loss"] == 0
    assert judged["fsr/reweighting"] == 1


def test_config_and_overrides() -> None:
    model = Net()
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters()), config=FSRConfig(seed=4), warmup_epochs=2)
    assert (fsr.config.seed, fsr.config.warmup_epochs) == (4, 2)
