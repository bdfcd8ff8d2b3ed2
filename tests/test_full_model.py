"""Θ^meta deeper than the head: a list of modules, or the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLIP, assert_close, slow_cross_entropy
from torch import Tensor, nn
from torch.func import functional_call

from fsr_wrap import FSRWrapper

B, Q, N, C = 12, 16, 60, 4


class ConvNet(nn.Module):
    """Convolutions with BatchNorm in train mode, ReLU in place, dropout, attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Tanh())
        self.mix = nn.Linear(8, 24)
        self.fc = nn.Linear(8, C)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(self.stem(x)).flatten(2).transpose(1, 2)
        query, key, value = self.mix(h).chunk(3, dim=2)
        return {"logits": self.fc(F.scaled_dot_product_attention(query, key, value).mean(1))}


def make(head: Any, **options: Any) -> tuple[ConvNet, FSRWrapper, Tensor, Tensor]:
    torch.manual_seed(3)
    model = ConvNet().double()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recipe = {**CLIP, "dictionary_size": 20, "reward_batch_size": Q, "relabel_weight": 0.0, **options}
    fsr = FSRWrapper(model, inner, head, num_samples=N, **recipe)
    x, y = torch.randn(N, 2, 7, 7, dtype=torch.float64), torch.randint(C, (N,))
    for index in torch.arange(N).split(B):
        step(model, fsr, x, y, index)
    return model, fsr, x, y


def step(model: nn.Module, fsr: FSRWrapper, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    fsr.loss(model(x[index]), y[index], index).backward()
    weights = fsr.weights
    fsr.step()
    fsr.zero_grad()
    return weights


def double_backward(
    model: nn.Module,
    names: list[str],
    batch: tuple[Tensor, Tensor],
    reward: tuple[Tensor, Tensor],
    lr: float,
    at: float,
) -> Tensor:
    """−∂L_R/∂ω at ω = `at`, through one virtual SGD step on the named parameters, as L2R does it (at ω = 0)."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rest = {name: p.detach() for name, p in model.named_parameters() if name not in names}
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n in names}

    def losses(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return slow_cross_entropy(functional_call(model, {**rest, **params, **copies}, (x,))["logits"], y)

    omega = torch.full((len(batch[0]),), at, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad((omega * losses(params, *batch)).sum(), list(params.values()), create_graph=True)
    ahead = {name: p - lr * g for (name, p), g in zip(params.items(), gradient, strict=True)}
    return -torch.autograd.grad(losses(ahead, *reward).mean(), omega)[0]


HEADS = {
    "all": ("all", lambda name: True),
    "two modules": (["body", "fc"], lambda name: name.startswith(("body", "fc"))),
    "names and modules": (["stem.1", "mix"], lambda name: name.startswith(("stem.1", "mix"))),
}


@pytest.mark.parametrize("lookahead", [0.0, 0.3])
@pytest.mark.parametrize("which", HEADS)
def test_equals_double_backward(which: str, lookahead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `lookahead_lr=0` these are L2R's weights; BatchNorm is in train mode, and its statistics stay."""
    head, chosen = HEADS[which]
    model, fsr, x, y = make(head, lookahead_lr=lookahead)
    names = [name for name, _ in model.named_parameters() if chosen(name)]
    drawn: list[Any] = []
    draw = fsr._memory.reward_batch
    monkeypatch.setattr(fsr._memory, "reward_batch", lambda: drawn.append(draw()) or drawn[0])
    index = torch.arange(5, 5 + B)
    before = [buffer.clone() for buffer in model.buffers()]
    logits = model(x[index])
    after_forward = [buffer.clone() for buffer in model.buffers()]
    fsr.loss(logits, y[index], index)
    label, (inputs,) = drawn[0]
    reward, plan = (inputs, label), fsr._memory.plan
    assert plan is not None
    assert_close(inputs, x[fsr.dictionary.slots[plan[0, 0]]], 0.0)  # the inputs themselves
    eta, at = (lookahead, 1 / B) if lookahead else (1.0, 0.0)
    scores = double_backward(model, names, (x[index], y[index]), reward, eta, at)
    expected = scores.clamp(min=0)
    assert 0 < (expected > 0).sum() < B
    assert_close(fsr.weights, expected / expected.sum(), 1e-6)
    for buffer, old, new in zip(model.buffers(), before, after_forward, strict=True):
        assert_close(buffer, new, 0.0)
        assert not torch.equal(buffer, old)


@pytest.mark.parametrize("pusher", ["area_under_margin", "meta_margin"])
@pytest.mark.parametrize("reward", ["cached", "fresh"])
def test_trains_and_resumes(pusher: str, reward: str) -> None:
    runs = []
    for _ in range(2):
        model, fsr, x, y = make("all", pusher=pusher, reward=reward, relabel_weight=1.0)
        runs.append((model, fsr))
    (model, fsr), (other, resumed) = runs
    for index in torch.arange(N).roll(7).split(B)[:3]:
        step(model, fsr, x, y, index)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(fsr.state_dict()))  # torch optimizers share what they are given
    for index in torch.arange(N).roll(7).split(B)[3:]:
        assert torch.equal(step(model, fsr, x, y, index), step(other, resumed, x, y, index))
    assert fsr.epoch == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("head", ["all", "fc"])
def test_the_reward_gradient_serves_for_several_steps(head: str) -> None:
    """G is drawn at every third step; in between the weights follow from it and the batch, also after resuming."""
    model, fsr, x, y = make(head, reward_every=3, lookahead_lr=0.0)
    other, resumed, _, _ = make(head, reward_every=3, lookahead_lr=0.0)
    drawn = []
    for number, index in enumerate(torch.randint(N, (8, B))):
        if number == 4:
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(copy.deepcopy(fsr.state_dict()))
        before = copy.deepcopy(fsr._memory.gradient)
        names = [f"fc.{name}" if head == "fc" else name for name in before if name != "/loss"]
        params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n in names}
        rest = {n: p.detach().clone() for n, p in model.named_parameters() if n not in names}
        copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
        weights = step(model, fsr, x, y, index)
        gradient = fsr._memory.gradient
        drawn.append(not before or not torch.equal(before["/loss"], gradient["/loss"]))
        if number >= 4:
            assert torch.equal(weights, step(other, resumed, x, y, index))
        if drawn[-1]:
            continue
        logits = functional_call(model, {**rest, **params, **copies}, (x[index],))["logits"]
        scores = []
        for loss in slow_cross_entropy(logits, y[index]):
            one = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
            known = [gradient[name.removeprefix("fc.") if head == "fc" else name] for name in params]
            scores.append(sum((g * k).sum() for g, k in zip(one, known, strict=True)))
        expected = torch.stack(scores).clamp(min=0)
        assert_close(weights, expected / expected.sum(), 1e-6)
    assert drawn == [number % 3 == 0 for number in range(8)]


def test_one_module_in_a_list_is_the_head() -> None:
    (one, fsr, x, y), (two, listed, _, _) = make("fc"), make(["fc"])
    index = torch.arange(B)
    assert torch.equal(step(one, fsr, x, y, index), step(two, listed, x, y, index))
    assert fsr.head == listed.head == "fc"


def test_wrong_parts_are_refused() -> None:
    model = ConvNet()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no module named 'boddy'"):
        FSRWrapper(model, inner, ["boddy", "fc"])
    with pytest.raises(TypeError, match="a list of them"):
        FSRWrapper(model, inner, 3)  # type: ignore[arg-type]
    for parameter in model.body.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that are trained"):
        FSRWrapper(model, inner, ["body.0", "body.1"])
    assert not model._forward_hooks
