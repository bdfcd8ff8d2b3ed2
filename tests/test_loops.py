"""FSR inside the loops that people have: Accelerate, AMP, torch.compile, accumulation, closures, timm models."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from test_wrapper import N, Net, digits, make, step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fsr_wrap import FSRWrapper, with_index

OPTIONS = {"dictionary_size": 100, "reward_batch_size": 50, "warmup_epochs": 1}


def batches(epochs: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    x, y, _ = digits(0.3)
    order = torch.Generator().manual_seed(3)
    parts = [part for _ in range(epochs) for part in torch.randperm(N, generator=order).split(50)]
    return [(x[index], y[index], index) for index in parts]


def plain_run(**options: Any) -> tuple[Net, FSRWrapper]:
    model, fsr = make(**options)
    for x, y, index in batches():
        step(model, fsr, x, y, index)
    return model, fsr


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_prepared_before_or_after_wrapping(when: str) -> None:
    expected, _ = plain_run()
    accelerator = Accelerator(cpu=True)
    model, fsr = make()
    inner = fsr.optimizer
    scheduled: Any
    if when == "before":
        model, inner = accelerator.prepare(model, inner)
        fsr = FSRWrapper(model, inner, num_samples=N, **OPTIONS)
        optimizer: Any = fsr
    else:
        model, optimizer = accelerator.prepare(model, fsr)
    scheduled = accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))
    for x, y, index in batches():
        with accelerator.accumulate(model):
            loss = fsr.loss(model(x), y, index)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            scheduled.step()
            optimizer.zero_grad()
    assert fsr.epoch == 3
    for mine, theirs in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_accelerate_loader_carries_the_index() -> None:
    x, y, _ = digits(0.3)
    accelerator = Accelerator(cpu=True)
    train_set = with_index(TensorDataset(x, y))
    model, fsr = make()
    loader = DataLoader(train_set, 64, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, fsr, loader)
    for inputs, labels, index in loader:
        accelerator.backward(fsr.loss(model(inputs), labels, index))
        optimizer.step()
        optimizer.zero_grad()
    assert fsr.epoch == 1
    assert fsr.scores.isfinite().all()


def test_gradient_accumulation_adds_the_gradients_up() -> None:
    model, fsr = plain_run()
    twin, twin_fsr = copy.deepcopy((model, fsr))
    first, second = batches(1)[:2]
    for x, y, index in (first, second):
        (fsr.loss(model(x), y, index) / 2).backward()
    gradients = []
    for x, y, index in (first, second):
        twin_fsr.loss(twin(x), y, index).backward()
        gradients.append([p.grad.clone() for p in twin.parameters()])
        twin.zero_grad()
    for p, one, two in zip(model.parameters(), *gradients, strict=True):
        torch.testing.assert_close(p.grad, (one + two) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reward", ["cached", "fresh"])
def test_autocast(dtype: torch.dtype, reward: str) -> None:
    model, fsr = make(reward=reward)
    for x, y, index in batches():
        with torch.autocast("cpu", dtype):
            logits = model(x)
        assert logits.dtype == dtype
        fsr.loss(logits, y, index).backward()
        fsr.step()
        fsr.zero_grad()
    assert fsr.weights.dtype == torch.float32
    assert 0 < (fsr.weights > 0).float().mean() < 1
    x, y, _ = digits()
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.5


def test_grad_scaler_skips_a_step_and_scales_the_others() -> None:
    expected, _ = plain_run()
    model, fsr = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, (x, y, index) in enumerate(batches()):
        if number == 0:  # an overflow before the run proper
            scaler.scale(model(x).sum() * torch.inf).backward()
            before = model.fc.weight.detach().clone()
            scaler.step(fsr)
            scaler.update()
            fsr.zero_grad()
            assert torch.equal(before, model.fc.weight)
            model.load_state_dict(make()[0].state_dict())
        scaler.scale(fsr.loss(model(x), y, index)).backward()
        scaler.unscale_(fsr)
        scaler.step(fsr)
        scaler.update()
        fsr.zero_grad()
    for mine, theirs in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_before_or_after_wrapping(when: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    expected, _ = plain_run()
    model, fsr = make()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    if when == "before":
        fsr = FSRWrapper(compiled, fsr.optimizer, num_samples=N, **OPTIONS)
    for x, y, index in batches():
        step(compiled, fsr, x, y, index)
    for mine, theirs in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frozen_backbone_and_added_group() -> None:
    model, fsr = make()
    model.body.requires_grad_(False)
    before = model.body.weight.detach().clone()
    for x, y, index in batches():
        step(model, fsr, x, y, index)
    assert torch.equal(before, model.body.weight)
    model.body.requires_grad_(True)
    assert fsr.is_reweighting
    x, y, index = batches()[0]
    step(model, fsr, x, y, index)
    assert not torch.equal(before, model.body.weight)


def closure(model: nn.Module, fsr: FSRWrapper, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    fsr.zero_grad()
    loss = fsr.loss(model(x), y, index)
    loss.backward()
    return loss


def test_adam_and_lbfgs_inside() -> None:
    for build in (
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    ):
        model, _ = make()
        fsr = FSRWrapper(model, build(model.parameters()), num_samples=N, **OPTIONS)
        for x, y, index in batches():
            fsr.step(functools.partial(closure, model, fsr, x, y, index))
        assert all(p.isfinite().all() for p in model.parameters())
        assert fsr.is_reweighting


def test_dict_output_and_keyword_inputs() -> None:
    class Output(dict[str, Tensor]):
        """Like a Hugging Face model output."""

        __getattr__ = dict.__getitem__

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
            self.classifier = nn.Linear(32, 10)

        def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> Output:
            return Output(logits=self.classifier(self.encoder(pixel_values * scale)))

    for reward in ("cached", "fresh"):
        torch.manual_seed(0)
        model = Classifier()
        fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=N, reward=reward, **OPTIONS)
        assert fsr.head == "classifier"
        for x, y, index in batches():
            fsr.loss(model(pixel_values=x, scale=1.0), y, index).backward()
            fsr.step()
            fsr.zero_grad()
        assert fsr.is_reweighting


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("reward", ["cached", "fresh"])
def test_timm_models_in_channels_last(name: str, reward: str) -> None:
    import timm

    options = {"img_size": 32} if name == "test_vit" else {}
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, drop_rate=0.1, **options)
    model = model.to(memory_format=torch.channels_last)
    inner = torch.optim.SGD(model.parameters(), 0.01)
    fsr = FSRWrapper(
        model, inner, num_samples=64, dictionary_size=30, reward_batch_size=20, warmup_epochs=1, reward=reward
    )
    x = torch.rand(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.arange(64) % 10
    for index in torch.arange(64).split(32) * 2:
        fsr.loss(model(x[index]), y[index], index).backward()
        fsr.step()
        fsr.zero_grad()
    assert fsr.epoch == 2
    assert fsr.is_reweighting
    assert fsr.weights.sum() == pytest.approx(1, abs=0.05)


def test_two_wrappers_in_turn_on_one_model() -> None:
    model, first = make()
    second = FSRWrapper(model, torch.optim.AdamW(model.parameters()), num_samples=N, pusher="negative_loss", **OPTIONS)
    for number, (x, y, index) in enumerate(batches(4)):
        step(model, (first, second)[number % 2], x, y, index)
    assert first.is_reweighting
    assert second.is_reweighting


def test_gradient_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda v: self.fc(F.relu(self.body(v))), x, use_reentrant=False)

    finals = []
    for kind in (Checkpointed, Net):
        torch.manual_seed(0)
        model = kind(norm=False)
        fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=N, **OPTIONS)
        for x, y, index in batches():
            step(model, fsr, x, y, index)
        finals.append(model.fc.weight.detach())
    torch.testing.assert_close(*finals)
