"""FSR inside the loops that people have, each against the loop written out or the run without the feature."""

# ruff: noqa: NPY002  numpy's global stream is one of those that loss() must leave alone

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from helpers import CLIP, judge_soon
from test_wrapper import CLASSES, N, Net, digits, frozen, make, step
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fsr_wrap import FSRWrapper, with_index

OPTIONS = {"num_samples": N, "dictionary_size": 100, "reward_batch_size": 50, "warmup_epochs": 1}
WHEN = pytest.mark.parametrize("when", ["before", "after"])
RULE = pytest.mark.parametrize("rule", [{}, CLIP], ids=["select", "clip"])
REWARD = pytest.mark.parametrize("rule", [{}, CLIP, {**CLIP, "reward": "fresh"}], ids=["select", "cached", "fresh"])
Rule = dict[str, Any]


def batches(epochs: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    x, y, _ = digits(0.3)
    order = torch.Generator().manual_seed(3)
    parts = [part for _ in range(epochs) for part in torch.randperm(N, generator=order).split(50)]
    return [(x[index], y[index], index) for index in parts]


def wrap(model: nn.Module, inner: Any, **options: Any) -> FSRWrapper:
    """As `make` has it."""
    return judge_soon(FSRWrapper(model, inner, **{**OPTIONS, **options}), CLASSES)


def plain_run(epochs: int = 3, **options: Any) -> tuple[Net, FSRWrapper]:
    model, fsr = make(**options)
    for part in batches(epochs):
        step(model, fsr, *part)
    return model, fsr


def trace(model: nn.Module, fsr: FSRWrapper) -> dict[str, int]:
    """The model, and all that FSR knows, bit by bit, by name."""
    found: dict[str, int] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            for key, item in value.items():
                note(f"{name}/{key}", item)
        else:
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:  # numpy has none
                value = value.view(torch.int16)
            found[name] = hash(str(frozen(value)))

    note("model", dict(model.state_dict()))
    note("fsr", fsr.state_dict()["fsr"])
    return found


def parameters_close(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), **tolerance)


def gradients(
    model: nn.Module, fsr: FSRWrapper, x: Tensor, y: Tensor, index: Tensor, lr: float | None = None
) -> list[Tensor]:
    """Of a step whose learning rate is `lr`, if given: FSR looks at it when an epoch ends."""
    for group in fsr.param_groups if lr is not None else []:
        group["lr"] = lr
    return list(torch.autograd.grad(fsr.loss(model(x), y, index), list(model.parameters())))


class HandSGD:
    """SGD with momentum, written out."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float = 0.1, momentum: float = 0.9) -> None:
        for parameter, velocity, gradient in zip(self.parameters, self.velocity, gradients, strict=True):
            velocity.mul_(momentum).add_(gradient)
            parameter.add_(velocity, alpha=-lr)


@RULE
def test_the_loop_written_out(rule: Rule) -> None:
    """The oracle of what follows: loss() and torch.autograd.grad, no optimizer."""
    model, fsr = plain_run(**rule)
    twin, twin_fsr = make(**rule)
    sgd = HandSGD(twin)
    for part in batches():
        sgd.step(gradients(twin, twin_fsr, *part))
    assert fsr.is_reweighting
    assert trace(model, fsr) == trace(twin, twin_fsr)


# --- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Iterator[Callable[..., Accelerator]]:
    """Makes an Accelerator on the CPU, and takes what it shares over the process away again."""
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepare(accelerator: Accelerator, when: str, seed: int = 0, **options: Any) -> tuple[Any, Any, FSRWrapper]:
    """Model, the optimizer to step, and the wrapper; prepared before or after wrapping."""
    model, fsr = make(seed, **options)
    if when == "after":
        return *accelerator.prepare(model, fsr), fsr
    prepared, inner = accelerator.prepare(model, fsr.optimizer)
    fsr = wrap(prepared, inner, **options)
    return prepared, fsr, fsr


@WHEN
def test_accelerate_prepared_before_or_after_wrapping(accelerate: Any, when: str) -> None:
    accelerator = accelerate()
    model, optimizer, fsr = prepare(accelerator, when)
    for x, y, index in batches():
        accelerator.backward(fsr.loss(model(x), y, index))
        optimizer.step()
        optimizer.zero_grad()
    assert trace(accelerator.unwrap_model(model), fsr) == trace(*plain_run())


@WHEN
@REWARD
def test_accelerate_mixed_precision(accelerate: Any, when: str, rule: Rule) -> None:
    """Accelerate hands out copies of the logits, in float32; an evaluation before loss() changes nothing."""
    accelerator = accelerate(mixed_precision="bf16")
    model, optimizer, fsr = prepare(accelerator, when, **rule)
    twin, twin_fsr = make(**rule)
    for x, y, index in batches():
        logits = model(x)
        assert logits.dtype == torch.float32
        with torch.no_grad():
            model.eval()(x.flip(0))
            model.train()
        accelerator.backward(fsr.loss(logits, y, index))
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = twin(x)
        twin_fsr.loss(logits.float(), y, index).backward()
        twin_fsr.step()
        twin_fsr.zero_grad()
    assert fsr.is_reweighting
    assert trace(accelerator.unwrap_model(model), fsr) == trace(twin, twin_fsr)


def test_accelerate_loader_carries_the_index(accelerate: Any) -> None:
    x, y, _ = digits(0.3)
    accelerator = accelerate()
    train_set = with_index(TensorDataset(x, y))
    model, fsr = make()
    loader = DataLoader(train_set, 64, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, fsr, loader)
    seen = []
    for inputs, labels, index in loader:
        assert torch.equal(inputs, x[index])
        accelerator.backward(fsr.loss(model(inputs), labels, index))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(index)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(N))
    assert fsr.epoch == 1
    assert fsr.scores.isfinite().all()


@WHEN
def test_accelerate_accumulates(accelerate: Any, when: str) -> None:
    """Two batches a step: gradients, parameters and the rate of the prepared scheduler, by hand."""
    accelerator = accelerate(gradient_accumulation_steps=2)
    model, optimizer, fsr = prepare(accelerator, when)
    scheduler = accelerator.prepare(schedulers.ExponentialLR(optimizer, 0.9))
    found = []
    for x, y, index in batches():
        with accelerator.accumulate(model):
            accelerator.backward(fsr.loss(model(x), y, index))
            if accelerator.sync_gradients:
                found.append([parameter.grad.clone() for parameter in model.parameters()])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    twin, twin_fsr = make()
    sgd, parts = HandSGD(twin), batches()
    assert len(found) == len(parts) // 2
    for number, (one, two) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        pair = gradients(twin, twin_fsr, *one), gradients(twin, twin_fsr, *two)
        expected = [(a + b) / 2 for a, b in zip(*pair, strict=True)]
        torch.testing.assert_close(found[number], expected)
        sgd.step(expected, lr=0.1 * 0.9**number)
    parameters_close(model, twin)
    torch.testing.assert_close(fsr.scores, twin_fsr.scores)
    assert fsr.epoch == 3


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@RULE
def test_no_sync(rule: Rule, one_process_group: None) -> None:
    """Accumulation by the loop's own hand inside DDP's no_sync()."""
    model, fsr = make(**rule)
    parallel = nn.parallel.DistributedDataParallel(model)
    fsr = wrap(parallel, fsr.optimizer, **rule)
    twin, twin_fsr = make(**rule)
    sgd, parts = HandSGD(twin), batches()
    for one, two in zip(parts[::2], parts[1::2], strict=True):
        with parallel.no_sync():
            fsr.loss(parallel(one[0]), *one[1:]).div(2).backward()
        fsr.loss(parallel(two[0]), *two[1:]).div(2).backward()
        fsr.step()
        fsr.zero_grad()
        pair = gradients(twin, twin_fsr, *one), gradients(twin, twin_fsr, *two)
        sgd.step([a / 2 + b / 2 for a, b in zip(*pair, strict=True)])
    parameters_close(model, twin)
    assert fsr.is_reweighting
    assert fsr.epoch == 3


@WHEN
@RULE
def test_accelerate_saves_and_loads(rule: Rule, accelerate: Any, when: str, tmp_path: Path) -> None:
    """save_state and load_state in mid-epoch carry model, optimizer, scheduler and FSR."""
    accelerator = accelerate()
    parts, rates = batches(), []

    def build(seed: int) -> tuple[Any, Any, FSRWrapper, Any]:
        model, optimizer, fsr = prepare(accelerator, when, seed, **rule)
        if when == "before":  # Accelerate knows the inner optimizer only
            accelerator.register_for_checkpointing(fsr)
        return model, optimizer, fsr, accelerator.prepare(schedulers.OneCycleLR(optimizer, 0.3, total_steps=30))

    def run(model: Any, optimizer: Any, fsr: FSRWrapper, scheduler: Any, parts: Any) -> None:
        for x, y, index in parts:
            rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            accelerator.backward(fsr.loss(model(x), y, index))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    run(*build(0), parts[:13])
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    model, optimizer, fsr, scheduler = build(9)
    accelerator.load_state(str(tmp_path))
    run(model, optimizer, fsr, scheduler, parts[13:])

    twin, twin_fsr = make(**rule)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    schedule, sgd = schedulers.OneCycleLR(plain, 0.3, total_steps=30), HandSGD(twin)
    for part, used in zip(parts, rates, strict=True):
        rate = plain.param_groups[0]["lr"], plain.param_groups[0]["momentum"]
        assert used == rate
        sgd.step(gradients(twin, twin_fsr, *part, lr=rate[0]), *rate)
        plain.step()
        schedule.step()
    assert trace(accelerator.unwrap_model(model), fsr) == trace(twin, twin_fsr)


# --- accumulation, mixed precision, clipping -------------------------------------------------------------------------


def test_gradient_accumulation_adds_the_gradients_up() -> None:
    model, fsr = plain_run()
    twin, twin_fsr = copy.deepcopy((model, fsr))
    first, second = batches(1)[:2]
    for x, y, index in (first, second):
        (fsr.loss(model(x), y, index) / 2).backward()
    pair = gradients(twin, twin_fsr, *first), gradients(twin, twin_fsr, *second)
    for p, one, two in zip(model.parameters(), *pair, strict=True):
        torch.testing.assert_close(p.grad, (one + two) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@REWARD
def test_autocast(dtype: torch.dtype, rule: Rule) -> None:
    """The weights are about those of a float32 step; the loss is the weighted one of the logits as they are."""
    model, fsr = plain_run(**{**rule, "relabel_weight": 0.0})
    inside, full = copy.deepcopy((model, fsr)), copy.deepcopy((model, fsr))
    x, y, index = batches(1)[0]
    with torch.autocast("cpu", dtype):
        logits = model(x)
        inner_loss = inside[1].loss(inside[0](x), y, index)
    assert logits.dtype == dtype
    loss = fsr.loss(logits, y, index)
    assert torch.equal(loss, inner_loss)
    assert loss.dtype == fsr.weights.dtype == torch.float32
    if rule:
        torch.testing.assert_close(loss, (fsr.weights * F.cross_entropy(logits.float(), y, reduction="none")).sum())
    full[1].loss(full[0](x), y, index)
    assert full[1].is_reweighting
    assert full[1].weights.min() < 0.8 * full[1].weights.max()
    torch.testing.assert_close(fsr.weights, full[1].weights, rtol=0.1, atol=2e-3)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@REWARD
def test_autocast_trains(dtype: torch.dtype, rule: Rule) -> None:
    model, fsr = make(**rule)
    for x, y, index in batches():
        with torch.autocast("cpu", dtype):
            logits = model(x)
        fsr.loss(logits, y, index).backward()
        fsr.step()
        fsr.zero_grad()
    assert fsr.is_reweighting
    assert fsr.weights.min() < 0.8 * fsr.weights.max()
    x, y, clean = digits(0.3)
    assert (model.eval()(x).argmax(1) == clean).float().mean() > 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@RULE
def test_grad_scaler_skips_an_overflow_and_scales_the_rest(rule: Rule, dtype: torch.dtype, fused: bool) -> None:
    """The batch that overflowed is seen by FSR and not trained on; all else as without a scaler."""

    def inner(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(x)

    (model, _), (twin, _) = make(**rule), make(**rule)
    fsr, twin_fsr = wrap(model, inner(model), **rule), wrap(twin, inner(twin), **rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, (x, y, index) in enumerate(batches()):
        scaler.scale(fsr.loss(forward(model, x), y, index)).backward()
        if number == 12:
            model.body.weight.grad[0, 0] = torch.inf
        if number % 2:  # else step() unscales
            scaler.unscale_(fsr)
        scaler.step(fsr)
        scaler.update()
        fsr.zero_grad()
        twin_fsr.loss(forward(twin, x), y, index).backward()
        if number != 12:
            twin_fsr.step()
        twin_fsr.zero_grad()
        assert scaler.get_scale() == 2.0**10 / (1 if number < 12 else 2)
    assert fsr.is_reweighting
    if fused:
        parameters_close(model, twin)
    else:
        assert trace(model, fsr) == trace(twin, twin_fsr)


def test_grad_scaler_finds_its_scale_in_float16() -> None:
    """A scale at which float16 overflows: steps are skipped until it fits, and FSR goes on counting."""
    model, fsr = make(norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    twin, twin_fsr = make(norm=False)
    sgd, skipped = HandSGD(twin), []
    for x, y, index in batches():
        with torch.autocast("cpu", torch.float16):
            logits, twin_logits = model(x), twin(x)
        scale = scaler.get_scale()
        scaler.scale(fsr.loss(logits, y, index)).backward()
        scaler.step(fsr)
        scaler.update()
        fsr.zero_grad()
        skipped.append(scaler.get_scale() < scale)
        expected = torch.autograd.grad(twin_fsr.loss(twin_logits, y, index), list(twin.parameters()))
        if not skipped[-1]:
            sgd.step(list(expected))
    assert skipped[0]
    assert 1 < sum(skipped) < 12
    assert fsr.epoch == 3
    assert fsr.scores.isfinite().all()
    parameters_close(model, twin, rtol=0.02, atol=0.01)


@WHEN
def test_accelerate_skips_an_overflow(accelerate: Any, when: str) -> None:
    """As Accelerate does it with float16 on a GPU: the scaler is the prepared optimizer's. The rate stays, too."""
    accelerate()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, fsr = make()
    prepared = AcceleratedOptimizer(fsr if when == "after" else fsr.optimizer, scaler=scaler)
    optimizer: Any = prepared
    if when == "before":
        optimizer = fsr = wrap(model, prepared)
    scheduler = AcceleratedScheduler(schedulers.ExponentialLR(optimizer, 0.9), optimizer)
    twin, twin_fsr = make()
    sgd, lr = HandSGD(twin), 0.1
    for number, part in enumerate(batches()):
        x, y, index = part
        scaler.scale(fsr.loss(model(x), y, index)).backward()
        if number == 12:
            model.fc.bias.grad[3] = torch.nan
        optimizer.step()
        assert optimizer.step_was_skipped == (number == 12)
        scheduler.step()
        optimizer.zero_grad()
        expected = gradients(twin, twin_fsr, *part, lr=lr)
        if number != 12:
            sgd.step(expected, lr)
            lr *= 0.9
    assert trace(model, fsr) == trace(twin, twin_fsr)


@pytest.mark.parametrize("how", ["norm", "value", "accelerate before", "accelerate after"])
def test_clipping(accelerate: Any, how: str) -> None:
    accelerator = accelerate()
    if how.startswith("accelerate"):
        model, optimizer, fsr = prepare(accelerator, how.split()[1])
    else:
        model, fsr = make()
        optimizer = fsr
    twin, twin_fsr = make()
    sgd, bitten = HandSGD(twin), 0
    for part in batches():
        x, y, index = part
        fsr.loss(model(x), y, index).backward()
        expected = gradients(twin, twin_fsr, *part)
        if how == "value":
            torch.nn.utils.clip_grad_value_(fsr.param_groups[0]["params"], 0.01)
            bitten += any((gradient.abs() > 0.01).any() for gradient in expected)
            expected = [gradient.clamp(-0.01, 0.01) for gradient in expected]
        else:
            clip = torch.nn.utils.clip_grad_norm_ if how == "norm" else accelerator.clip_grad_norm_
            found = clip(model.parameters(), 0.2)
            norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
            torch.testing.assert_close(found, norm)
            bitten += bool(norm > 0.2)
            expected = [gradient * (0.2 / norm).clamp(max=1) for gradient in expected]
        optimizer.step()
        optimizer.zero_grad()
        sgd.step(expected)
    assert bitten > 10
    parameters_close(model, twin, rtol=1e-4, atol=1e-5)


# --- optimizers ------------------------------------------------------------------------------------------------------


BUILD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, **o: torch.optim.SGD(p, 0.1, momentum=0.9, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, 0.01, **o),
}


@pytest.mark.parametrize("name", BUILD)
@RULE
def test_closure_trains_as_the_loop_does(rule: Rule, name: str) -> None:
    finals = []
    for closing in (True, False):
        model, _ = make(**rule)
        fsr = wrap(model, BUILD[name](model.parameters()))
        for x, y, index in batches():
            fsr.zero_grad()

            def closure(x: Tensor = x, y: Tensor = y, index: Tensor = index) -> Tensor:
                loss = fsr.loss(model(x), y, index)  # noqa: B023
                loss.backward()
                return loss

            if closing:
                assert isinstance(fsr.step(closure), Tensor)
            else:
                closure()
                fsr.step()
        assert fsr.is_reweighting
        finals.append(trace(model, fsr))
    assert finals[0] == finals[1]


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@RULE
def test_lbfgs(rule: Rule, line_search: str | None) -> None:
    """At first it is LBFGS on cross-entropy, without what is held out; of several evaluations a step the first one
    counts."""
    options = {"max_iter": 4, "line_search_fn": line_search, "lr": 0.1}
    parts = [(x.double(), y, index) for x, y, index in batches(2)]
    twin = make(norm=False, **rule)[0].double()
    plain = torch.optim.LBFGS(twin.parameters(), **options)
    model = make(norm=False, **rule)[0].double()
    inner = torch.optim.LBFGS(model.parameters(), **options)
    fsr = wrap(model, inner, **{**rule, "relabel_weight": 0.0})
    evaluations = 0

    def closures(x: Tensor, y: Tensor, index: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        def ours() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            fsr.zero_grad()
            loss = fsr.loss(model(x), y, index)
            loss.backward()
            return loss

        def theirs() -> Tensor:
            plain.zero_grad()
            kept = slice(None) if fsr.config.weight_rule == "clip" else fsr.weights > 0
            loss = F.cross_entropy(twin(x)[kept], y[kept])
            loss.backward()
            return loss

        return ours, theirs

    for part in parts[: len(parts) // 2]:
        ours, theirs = closures(*part)
        torch.testing.assert_close(fsr.step(ours), plain.step(theirs))
    parameters_close(model, twin)
    assert (fsr.epoch, fsr.is_reweighting) == (1, True)
    assert evaluations > len(parts) // 2
    for part in parts[len(parts) // 2 :]:
        before = model.fc.weight.detach().clone()
        assert fsr.step(closures(*part)[0]).isfinite()
        assert not torch.equal(before, model.fc.weight)
    assert fsr.is_reweighting
    assert fsr.weights.min() < 0.8 * fsr.weights.max()
    assert fsr.metrics()["fsr/epoch"] == 2


@RULE
def test_evaluations_of_one_step_share_their_weights(rule: Rule) -> None:
    """As LBFGS's line search and SAM need it: the second evaluation is the same function, and leaves no trace."""

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            losses = [closure(), closure()]
            super().step()
            return losses

    model, fsr = make(norm=False, **rule)
    fsr.optimizer = Twice(model.parameters(), lr=0.1)
    twin, twin_fsr = make(norm=False, **rule)
    twin_fsr.optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x, y, index in batches(2):

        def closure(x: Tensor = x, y: Tensor = y, index: Tensor = index) -> float:
            fsr.zero_grad()
            loss = fsr.loss(model(x), y, index)
            loss.backward()
            return loss.item()

        first, second = fsr.step(closure)
        assert first == second == step(twin, twin_fsr, x, y, index)
    assert fsr.is_reweighting
    assert trace(model, fsr) == trace(twin, twin_fsr)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@RULE
def test_foreach_and_fused(rule: Rule, name: str, flag: str) -> None:
    finals = []
    for flags in ({"foreach": False}, {flag: True}):
        model, _ = make(norm=False, **rule)
        fsr = wrap(model, BUILD[name](model.parameters(), **flags))
        for part in batches():
            step(model, fsr, *part)
        assert fsr.is_reweighting
        finals.append((list(model.parameters()), fsr.scores))
    torch.testing.assert_close(*finals, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["wrapper", "inner"])
def test_group_added_later(where: str) -> None:
    """A backbone that is thawed after an epoch, at a rate of its own; a scheduler made then turns both rates."""
    model, fsr = make(norm=False)
    model.body.requires_grad_(False)
    fsr = wrap(model, torch.optim.SGD(model.fc.parameters(), 0.1))
    twin, twin_fsr = make(norm=False)
    head, body = list(twin.fc.parameters()), list(twin.body.parameters())
    added, scheduler = 0, None
    for number, part in enumerate(batches()):
        if number == 8:
            model.body.requires_grad_(True)
            optimizer = fsr if where == "wrapper" else fsr.optimizer
            optimizer.add_param_group({"params": list(model.body.parameters()), "lr": 0.02})
            scheduler, added = schedulers.ExponentialLR(fsr, 0.8), number
        step(model, fsr, *part)
        parameters = head + body if scheduler else head
        slopes = torch.autograd.grad(twin_fsr.loss(twin(part[0]), *part[1:]), parameters)
        decay = 0.8 ** (number - added) if scheduler else 1.0
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter -= (0.1 if any(parameter is p for p in head) else 0.02) * decay * slope
        if scheduler:
            scheduler.step()
    assert len(fsr.optimizer.param_groups) == len(fsr.state_dict()["param_groups"]) == 2
    parameters_close(model, twin, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.body.weight, make(norm=False)[0].body.weight)


@RULE
def test_two_wrappers_in_turn_on_one_model(rule: Rule) -> None:
    """The first one's run is the same whether or not a second one, at rate 0, takes every other batch."""
    finals = []
    for shared in (True, False):
        model, first = make(norm=False, **rule)
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        second = wrap(model, inner, pusher="negative_loss", **rule) if shared else None
        for number, part in enumerate(batches(6)):
            if number % 2 == 0:
                step(model, first, *part)
            elif second is not None:
                step(model, second, *part)
        assert first.epoch == 3
        assert first.is_reweighting
        assert second is None or (second.epoch == 3 and second.is_reweighting)
        finals.append(trace(model, first))
    assert finals[0] == finals[1]


def test_plain_optimizer_beside_the_wrapper() -> None:
    """SGD for the head in the wrapper and SGD for the body outside of it: as one SGD for both."""
    model, _ = make()
    fsr = wrap(model, BUILD["sgd"](model.fc.parameters()))
    beside = BUILD["sgd"]([*model.body.parameters(), *model.norm.parameters()])
    for x, y, index in batches():
        fsr.loss(model(x), y, index).backward()
        for optimizer in (beside, fsr):
            optimizer.step()
            optimizer.zero_grad()
    assert trace(model, fsr) == trace(*plain_run())


def test_gan_like_loop() -> None:
    """A generator with Adam trains through the wrapped classifier, which trains as it does alone."""
    model, fsr = make(norm=False)
    torch.manual_seed(4)
    generator = nn.Linear(8, 64)
    adam = torch.optim.Adam(generator.parameters(), 0.05)
    before, losses = generator.weight.detach().clone(), []
    for x, y, index in batches():
        step(model, fsr, x, y, index)
        loss = F.cross_entropy(model(generator(torch.randn(50, 8))), torch.full((50,), 3))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        fsr.zero_grad()
    assert not torch.equal(before, generator.weight)
    assert losses[-1] < losses[0]
    assert trace(model, fsr) == trace(*plain_run(norm=False))


# --- schedulers ------------------------------------------------------------------------------------------------------


def timm_cosine(optimizer: torch.optim.Optimizer) -> Any:
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(optimizer, t_initial=16, lr_min=1e-3, warmup_t=4, warmup_lr_init=0.01)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=17),
    "cosine annealing": lambda o: schedulers.CosineAnnealingLR(o, 16),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=4), schedulers.CosineAnnealingLR(o, 12)], [4]
    ),
    "swa": lambda o: SWALR(o, 0.02, anneal_epochs=6),
    "timm cosine": timm_cosine,
}


@pytest.mark.parametrize("where", ["wrapper", "inner"])
@pytest.mark.parametrize("name", SCHEDULES)
@RULE
def test_scheduler_sets_the_rate_that_trains_and_resumes(rule: Rule, name: str, where: str, tmp_path: Path) -> None:
    """A run that is saved, made anew and loaded half-way, against SGD by hand at the rates of a plain optimizer."""
    plain = BUILD["sgd"]([nn.Parameter(torch.zeros(1))])
    schedule = SCHEDULES[name](plain)
    twin, twin_fsr = make(**rule)
    sgd, used = HandSGD(twin), set()
    model, fsr = make(**rule)
    scheduler = SCHEDULES[name](fsr if where == "wrapper" else fsr.optimizer)
    for number, part in enumerate(batches(2), 1):
        if number == 8:
            torch.save([model.state_dict(), scheduler.state_dict(), fsr.state_dict()], tmp_path / "run.pt")
            fsr.save(tmp_path)
            model, fsr = make(seed=9, **rule)
            scheduler = SCHEDULES[name](fsr if where == "wrapper" else fsr.optimizer)
            model_state, scheduler_state, fsr_state = torch.load(tmp_path / "run.pt", weights_only=True)
            model.load_state_dict(model_state)
            scheduler.load_state_dict(scheduler_state)
            if where == "wrapper":
                fsr.load_state_dict(fsr_state)
            else:
                fsr.load(tmp_path)
        rate = plain.param_groups[0]["lr"], plain.param_groups[0]["momentum"]
        used.add(rate)
        sgd.step(gradients(twin, twin_fsr, *part, lr=rate[0]), *rate)
        step(model, fsr, *part)
        plain.step()
        for each in (schedule, scheduler):
            each.step(*{"plateau": [1.0], "timm cosine": [number]}.get(name, []))
    assert len(used) > 5
    if name == "one cycle":
        assert len({momentum for _, momentum in used}) > 5
    assert fsr.optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert trace(model, fsr) == trace(twin, twin_fsr)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_made_under_a_scheduler_train_on_by_themselves(how: str) -> None:
    model, fsr = make()
    schedulers.StepLR(fsr, 1)
    first, second = batches(1)[:2]
    step(model, fsr, *first)
    pair = (model, fsr)
    twin_model, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = frozen(dict(model.state_dict()))
    step(twin_model, twin, *second)
    assert frozen(dict(model.state_dict())) == before
    step(model, fsr, *second)
    assert trace(model, fsr) == trace(twin_model, twin)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_compiled_before_or_after_wrapping(when: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    model, fsr = make()
    compiled: Any = model
    if when == "in place":
        model.compile(backend="eager", fullgraph=fullgraph)
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    if when == "before":
        fsr = wrap(compiled, fsr.optimizer)
    for part in batches():
        step(compiled, fsr, *part)
        with torch.no_grad():
            compiled.eval()(part[0])
        compiled.train()
    assert trace(model, fsr) == trace(*plain_run())


def test_skipped_batches_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    compilations = 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    model, fsr = make()
    compiled = torch.compile(model, backend=backend)
    parts = batches(1)
    step(compiled, fsr, *parts[0])
    for skipped in range(4):
        for x, *_ in parts[: skipped + 1]:
            compiled(x)
        step(compiled, fsr, *parts[skipped])
    assert compilations <= 2


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


@REWARD
def test_channels_last_trains_as_contiguous_does(rule: Rule) -> None:
    finals = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = ConvNet().double().to(memory_format=memory_format)
        fsr = wrap(model, BUILD["sgd"](model.parameters()), **rule)
        for x, y, index in batches():
            images = x.view(-1, 1, 8, 8).expand(-1, 1, 8, 8).double().contiguous(memory_format=memory_format)
            step(model, fsr, images, y, index)
        assert fsr.is_reweighting
        finals.append((list(model.parameters()), fsr.scores, fsr.weights))
    torch.testing.assert_close(*finals)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@REWARD
def test_timm_models_in_channels_last(name: str, rule: Rule) -> None:
    import timm

    options = {"img_size": 32} if name == "test_vit" else {}
    finals = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10, drop_rate=0.1, **options)
        model = model.double().to(memory_format=memory_format)
        inner = torch.optim.SGD(model.parameters(), 0.01)
        sizes = {"num_samples": 64, "dictionary_size": 30, "reward_batch_size": 20}
        fsr = wrap(model, inner, **sizes, **rule)
        x = torch.rand(64, 3, 32, 32).double().contiguous(memory_format=memory_format)
        y = torch.arange(64) % 10
        for index in torch.arange(64).split(32) * 2:
            fsr.loss(model(x[index]), y[index], index).backward()
            fsr.step()
            fsr.zero_grad()
        assert fsr.epoch == 2
        assert fsr.is_reweighting
        assert fsr.weights.sum() == pytest.approx(1, abs=0.05 if rule else 0.4)  # what is missing is taken away
        finals.append((fsr.weights, fsr.scores))
    torch.testing.assert_close(*finals)


@REWARD
def test_frozen_backbone_is_a_linear_model_on_its_features(rule: Rule) -> None:
    model, fsr = make(norm=False, **rule)
    body = copy.deepcopy(model.body).requires_grad_(False)
    model.body.requires_grad_(False)
    linear = copy.deepcopy(model.fc)
    linear_fsr = wrap(linear, BUILD["sgd"](linear.parameters()), **rule)
    for x, y, index in batches():
        step(model, fsr, x, y, index)
        step(linear, linear_fsr, F.relu(body(x)), y, index)
    assert torch.equal(model.body.weight, body.weight)
    assert fsr.is_reweighting
    torch.testing.assert_close(list(model.fc.parameters()), list(linear.parameters()))
    torch.testing.assert_close(fsr.scores, linear_fsr.scores)


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: an ordered dict that leaves the fields out that are None."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Pair(NamedTuple):
    hidden: None
    logits: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda logits: {"logits": logits, "loss": None},
    "model output": lambda logits: ModelOutput(logits=logits),
    "named tuple": lambda logits: Pair(None, logits),
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("output", OUTPUTS)
@REWARD
def test_keyword_inputs_and_outputs_with_logits(output: str, rule: Rule) -> None:
    class Classifier(Net):
        def forward(self, *, pixel_values: Tensor, scale: float = 2.0) -> Any:  # type: ignore[override]
            return OUTPUTS[output](super().forward(pixel_values * scale))

    torch.manual_seed(0)
    model = Classifier()
    fsr = wrap(model, BUILD["sgd"](model.parameters()), **rule)
    assert fsr.head == "fc"
    for x, y, index in batches():
        fsr.loss(model(pixel_values=x, scale=1.0), y, index).backward()
        fsr.step()
        fsr.zero_grad()
    assert trace(model, fsr) == trace(*plain_run(**rule))


class Checkpointed(Net):
    """A Net that computes a part of its forward twice."""

    part, reentrant = "body", False

    def forward(self, x: Tensor) -> Tensor:
        def hidden(x: Tensor) -> Tensor:
            return self.drop(F.relu(self.body(x)))

        if self.part == "body":
            return self.fc(checkpoint(hidden, x, use_reentrant=self.reentrant))
        return checkpoint(lambda x: self.fc(hidden(x)), x, use_reentrant=self.reentrant)


# What torch says of the reentrant kind without gradients: here of "fresh"'s extra forward.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@REWARD
@pytest.mark.parametrize(
    ("part", "reentrant"), [("body", True), ("body", False), ("body and head", False), ("model", False)]
)
def test_gradient_checkpointing(part: str, reentrant: bool, rule: Rule) -> None:
    torch.manual_seed(0)
    model = (Net if part == "model" else Checkpointed)(norm=False, dropout=0.3)
    model.part, model.reentrant = part, reentrant  # type: ignore[assignment]
    fsr = wrap(model, BUILD["sgd"](model.parameters()), **rule)
    torch.manual_seed(1)
    for x, y, index in batches():
        x = x.clone().requires_grad_(reentrant)  # the reentrant kind needs an input with gradients
        logits = checkpoint(model, x, use_reentrant=False) if part == "model" else model(x)
        fsr.loss(logits, y, index).backward()
        fsr.step()
        fsr.zero_grad()
    assert fsr.is_reweighting
    twin, twin_fsr = make(norm=False, dropout=0.3, **rule)
    torch.manual_seed(1)
    for part_ in batches():
        step(twin, twin_fsr, *part_)
    assert trace(model, fsr) == trace(twin, twin_fsr)


def test_reentrant_checkpoint_around_the_head_is_refused() -> None:
    """Its forward runs without gradients, so there is nothing that FSR could see."""
    model, fsr = make(norm=False)
    x, y, index = batches(1)[0]
    logits = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
    before = trace(model, fsr)
    with pytest.raises(RuntimeError, match="no forward of this model"):
        fsr.loss(logits, y, index)
    assert trace(model, fsr) == before


@REWARD
def test_float64(rule: Rule) -> None:
    """The same run as in float32 up to rounding, and float64 throughout."""
    single, single_fsr = plain_run(epochs=2, norm=False, **rule)
    model, fsr = make(norm=False, **rule)
    model.double()
    for x, y, index in batches(2):
        loss = fsr.loss(model(x.double()), y, index)
        loss.backward()
        fsr.step()
        fsr.zero_grad()
    assert loss.dtype == fsr.weights.dtype == model.fc.weight.dtype == torch.float64
    assert fsr.is_reweighting
    torch.testing.assert_close(fsr.weights.float(), single_fsr.weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fsr.scores, single_fsr.scores, rtol=1e-3, atol=1e-4)
    parameters_close(model.float(), single, rtol=1e-3, atol=1e-4)


# --- averages of the weights -----------------------------------------------------------------------------------------


def timm_ema(model: nn.Module) -> Any:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=0.9)


EMA: dict[str, Callable[[nn.Module], Any]] = {
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "timm": timm_ema,
}


@pytest.mark.parametrize("kind", EMA)
@REWARD
def test_ema_leaves_no_trace(kind: str, rule: Rule) -> None:
    """Its forwards in train mode, with gradients, between forward and loss() and after, are nobody's business."""
    model, fsr = make(norm=False, **rule)
    ema = EMA[kind](model)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    for number, (x, y, index) in enumerate(batches()):
        logits = model(x)
        ema.train()
        ema(x.flip(0)).sum().backward()
        # `+ 0` makes a copy: its forward is told from others by the number of samples alone
        fsr.loss(logits + 0, y, index).backward()
        ema(x.flip(0))
        fsr.step()
        fsr.zero_grad()
        if kind == "torch":
            ema.update_parameters(model)
        else:
            ema.update(model)
        first = kind == "torch" and number == 0  # the first update copies
        for mean, parameter in zip(average, model.parameters(), strict=True):
            mean.copy_(parameter.detach() if first else 0.9 * mean + 0.1 * parameter.detach())
    torch.testing.assert_close([parameter.detach() for parameter in ema.module.parameters()], average)
    assert trace(model, fsr) == trace(*plain_run(norm=False, **rule))


@pytest.mark.parametrize("kind", EMA)
def test_ema_outlives_the_wrapper(kind: str) -> None:
    model, fsr = plain_run(epochs=1)
    ema = EMA[kind](model)
    alive = weakref.ref(fsr), weakref.ref(fsr._reweighting)
    x = digits()[0]
    ema.train()
    expected = ema(x[:50]).detach()
    assert set(ema.module.state_dict()) == set(model.state_dict())
    del fsr
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    for twin in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema.module)), ema):
        torch.testing.assert_close(twin.train()(x[:50]).detach(), expected)
    again = Net()
    again.load_state_dict(ema.module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ema.module.parameters(), strict=True))


def test_ema_keeps_no_batches() -> None:
    model, _fsr = make()
    ema = AveragedModel(model)
    x = torch.rand(50, 64)
    alive = weakref.ref(x)
    ema(x)
    del x
    gc.collect()
    assert alive() is None


def test_swa() -> None:
    """The average is the mean of the weights; update_bn, of the average and of the model, leaves no trace."""
    model, fsr = make()
    swa, kept = AveragedModel(model), []
    x = digits(0.3)[0]
    loader = DataLoader(with_index(TensorDataset(*digits(0.3)[:2])), 100)
    for number, part in enumerate(batches()):
        logits = model(part[0])
        update_bn(loader, swa)
        fsr.loss(logits, *part[1:]).backward()
        fsr.step()
        fsr.zero_grad()
        if number >= 16:
            swa.update_parameters(model)
            kept.append([parameter.detach().clone() for parameter in model.parameters()])
    assert trace(model, fsr) == trace(*plain_run())
    means = [torch.stack(values).mean(0) for values in zip(*kept, strict=True)]
    torch.testing.assert_close([parameter.detach() for parameter in swa.module.parameters()], means)
    update_bn(loader, swa)
    hidden = swa.module.body(x)
    expected = torch.stack([part.mean(0) for part in hidden.split(100)]).mean(0)
    torch.testing.assert_close(swa.module.norm.running_mean, expected)

    before = frozen(fsr.state_dict())
    update_bn(loader, model)
    assert frozen(fsr.state_dict()) == before
    hidden = model.body(x)
    expected = torch.stack([part.mean(0) for part in hidden.split(100)]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, expected)
    step(model, fsr, *batches(1)[0])


# --- what comes between ----------------------------------------------------------------------------------------------


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "with gradients": torch.enable_grad,
}


def evaluate(model: nn.Module, fsr: FSRWrapper, mode: str) -> None:
    """Six batches of the training's size, as people write it; the loss from `loss()` where that is the plain one."""
    x, y, _ = digits()
    model.eval()
    with MODES[mode]():
        for index in torch.arange(300).split(50):
            logits = model(x[index])
            if mode != "with gradients":
                torch.testing.assert_close(fsr.loss(logits, y[index], index), F.cross_entropy(logits, y[index]))
    model.train()


@REWARD
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["between steps", "before loss", "after loss", "before the first step"])
def test_evaluation_leaves_no_trace(place: str, mode: str, rule: Rule) -> None:
    model, fsr = make(**rule, dropout=0.2)
    torch.manual_seed(7)
    if place == "before the first step":
        evaluate(model, fsr, mode)
    for number, (x, y, index) in enumerate(batches()):
        if place == "between steps" and number % 2:
            evaluate(model, fsr, mode)
        logits = model(x)
        if place == "before loss":
            evaluate(model, fsr, mode)
        loss = fsr.loss(logits, y, index)
        if place == "after loss":
            evaluate(model, fsr, mode)
        loss.backward()
        fsr.step()
        fsr.zero_grad()
    twin, twin_fsr = make(**rule, dropout=0.2)
    torch.manual_seed(7)
    for part in batches():
        step(twin, twin_fsr, *part)
    assert fsr.is_reweighting
    assert trace(model, fsr) == trace(twin, twin_fsr)


def differs_silently(model: Net, fsr: FSRWrapper, logits: Tensor, y: Tensor, index: Tensor, expected: Tensor) -> bool:
    """Whether loss() gave other weights than expected without a word; refusing is as good as being right."""
    try:
        fsr.loss(logits, y, index)
    except RuntimeError:
        return False
    return not torch.equal(fsr.weights, expected)


def test_many_forwards_with_gradients_before_loss() -> None:
    model, fsr = plain_run(norm=False)
    twin, twin_fsr = copy.deepcopy((model, fsr))
    x, y, index = batches(1)[0]
    twin_fsr.loss(twin(x), y, index)
    logits = model(x)
    for other, *_ in batches(2)[1:11]:
        model(other)
    assert not differs_silently(model, fsr, logits, y, index, twin_fsr.weights)


def test_copied_logits_of_the_first_of_two_forwards() -> None:
    model, fsr = plain_run(norm=False)
    twin, twin_fsr = copy.deepcopy((model, fsr))
    (x, y, index), (other, *_) = batches(1)[:2]
    twin_fsr.loss(twin(x), y, index)
    first, _second = model(x), model(other)
    assert not differs_silently(model, fsr, first * 1.0, y, index, twin_fsr.weights)


def test_loss_twice_on_one_forward_is_refused() -> None:
    """The second call changes nothing, and the run goes on as if it had not been."""
    model, fsr = make()
    for x, y, index in batches():
        logits = model(x)
        loss = fsr.loss(logits, y, index)
        before = trace(model, fsr)
        with pytest.raises(RuntimeError, match="no forward of this model"):
            fsr.loss(logits, y, index)
        assert trace(model, fsr) == before
        loss.backward()
        fsr.step()
        fsr.zero_grad()
    assert trace(model, fsr) == trace(*plain_run())


def test_loss_twice_on_one_of_two_forwards_is_refused() -> None:
    model, fsr = plain_run(norm=False)
    (x, y, index), (other, *_) = batches(1)[:2]
    first, _second = model(x), model(other)
    fsr.loss(first, y, index)
    with pytest.raises(RuntimeError):
        fsr.loss(first, y, index)


@REWARD
@pytest.mark.parametrize("when", ["before the forward", "before loss"])
def test_skipped_batches(when: str, rule: Rule) -> None:
    """As if they had never been; the epoch is then as long as `samples_per_epoch` says."""
    options = {"norm": False, "samples_per_epoch": N // 2, **rule}
    model, fsr = make(**options)
    twin, twin_fsr = make(**options)
    for number, part in enumerate(batches(6)):
        if number % 2 == 0:
            step(model, fsr, *part)
            step(twin, twin_fsr, *part)
        elif when == "before loss":
            model(part[0])
    assert fsr.epoch == 6
    assert trace(model, fsr) == trace(twin, twin_fsr)


@REWARD
def test_switches_to_eval_and_back_in_mid_epoch(rule: Rule) -> None:
    """Training for a while with the whole model in eval mode, against BatchNorm and dropout alone being so."""
    model, fsr = make(dropout=0.2, **rule)
    twin, twin_fsr = make(dropout=0.2, **rule)
    for part in batches(1):
        step(model, fsr, *part)
    torch.manual_seed(2)
    for number, part in enumerate(batches()):
        model.train(number % 8 < 4)
        flags, buffers = [m.training for m in model.modules()], frozen(list(model.buffers()))
        step(model, fsr, *part)
        assert [m.training for m in model.modules()] == flags
        assert (frozen(list(model.buffers())) == buffers) == (number % 8 >= 4)
    torch.manual_seed(0)
    twin, twin_fsr = make(dropout=0.2, **rule)
    for part in batches(1):
        step(twin, twin_fsr, *part)
    torch.manual_seed(2)
    for number, part in enumerate(batches()):
        twin.norm.train(number % 8 < 4)
        twin.drop.p = 0.2 if number % 8 < 4 else 0.0
        step(twin, twin_fsr, *part)
    assert fsr.is_reweighting
    assert trace(model, fsr) == trace(twin, twin_fsr)


def streams() -> dict[str, int]:
    """The random streams of the process, as short names of their states."""
    states = {"torch": torch.get_rng_state().tolist(), "numpy": np.random.get_state(), "python": random.getstate()}
    return {name: hash(str(state)) for name, state in states.items()}


@REWARD
@pytest.mark.parametrize("mixup", [True, False])
def test_loss_leaves_random_streams_alone(rule: Rule, mixup: bool) -> None:
    """A whole run draws what a plain run with cross-entropy draws, from all three streams."""

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    model, fsr = make(dropout=0.3, **rule)
    seed()
    for x, y, index in batches():
        inputs, target = fsr.mixup(x, y) if mixup else (x, y)
        logits = model(inputs + 0.01 * random.random() if not mixup else inputs)
        before = streams()
        loss = fsr.loss(logits, target, index)
        assert streams() == before
        loss.backward()
        fsr.step()
        fsr.zero_grad()
        np.random.rand()
    assert fsr.is_reweighting
    after = streams()
    plain = Net(dropout=0.3)
    seed()
    for x, *_ in batches():
        plain(x if mixup else x + 0.01 * random.random())
        np.random.rand()
    assert streams() == after


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_the_extra_forward_draws_nothing_from_python_and_numpy(draw: Callable[[], float]) -> None:
    """A model that draws from them in its forward, as LayerDrop and masks of some models do."""

    class Jittered(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (1 + 0.01 * draw()))

    torch.manual_seed(0)
    model = Jittered()
    fsr = wrap(model, BUILD["sgd"](model.parameters()), **CLIP, reward="fresh")
    for x, y, index in batches():
        logits = model(x)
        before = streams()
        loss = fsr.loss(logits, y, index)
        assert streams() == before
        loss.backward()
        fsr.step()
        fsr.zero_grad()
