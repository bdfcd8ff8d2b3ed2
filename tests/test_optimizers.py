"""FSRWrapper around each of torch's optimizers, with the settings of torch's own test database: what a wrapper must
keep, it keeps bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db
from torch.utils import _pytree as pytree

from fsr_wrap import FSRWrapper

EACH = pytest.mark.parametrize("info", optim_db, ids=lambda info: info.name)
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate"),
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),
]


class Model(nn.Module):
    """A classifier, and beside it what only some optimizers take: complex parameters, and sparse gradients."""

    def __init__(self, info: OptimizerInfo) -> None:
        super().__init__()
        torch.manual_seed(0)
        bias = info.name != "Muon"  # which takes matrices only
        self.body, self.fc = nn.Linear(4, 5, bias=bias), nn.Linear(5, 3, bias=bias)
        if info.supports_complex and bias:
            self.wave = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        if info.supports_sparse or info.only_supports_sparse_grads:
            self.table = nn.Embedding(6, 5, sparse=True)
        if info.only_supports_sparse_grads:
            self.body.requires_grad_(False), self.fc.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        if hasattr(self, "table"):
            hidden = hidden + self.table(torch.arange(len(x)) % 6)
        if hasattr(self, "wave"):
            hidden = hidden + self.wave.abs().sum()
        return self.fc(hidden)


def settings(info: OptimizerInfo) -> list[dict[str, Any]]:
    """The database's own, and each implementation that runs here."""
    inputs = [one.kwargs for one in info.optim_inputs_func(device=CPU) if not one.kwargs.get("capturable")]
    inputs = [kwargs for kwargs in inputs if not kwargs.get("differentiable")]
    found = [{**kwargs, "foreach": True} for kwargs in inputs if "foreach" in info.supported_impls]
    if "fused" in info.supported_impls and "cpu" in info.supports_fused_on:
        found += [{**kwargs, "fused": True} for kwargs in inputs]
    plain = [{**kwargs, "foreach": False} if "foreach" in info.supported_impls else kwargs for kwargs in inputs]
    return (plain + found)[: 3 if info.step_requires_closure else None]  # LBFGS takes long


def is_plain(kwargs: dict[str, Any]) -> bool:
    """Sparse gradients go with few settings."""
    return all(name == "lr" or not value for name, value in kwargs.items())


def build(info: OptimizerInfo, kwargs: dict[str, Any]) -> tuple[nn.Module, Optimizer]:
    model = Model(info)
    if hasattr(model, "table") and not info.only_supports_sparse_grads and not is_plain(kwargs):
        del model.table
    if kwargs.get("fused") and hasattr(model, "wave"):
        del model.wave
    params: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if info.supports_param_groups and len(params) > 2:
        params = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    return model, info.optim_cls(params, **kwargs)


def run(model: nn.Module, optimizer: Any, info: OptimizerInfo, steps: range) -> None:
    """Steps on cross-entropy, with a closure for those that must have one."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if info.step_requires_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def same(one: Any, other: Any) -> bool:
    left, right = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if isinstance(a, Tensor) else repr(a) == repr(b)
        for a, b in zip(left, right, strict=True)
    )


def plain_state(optimizer: Any) -> dict[str, Any]:
    return {name: value for name, value in optimizer.state_dict().items() if name != "fsr"}


@EACH
def test_trains_as_the_optimizer_inside(info: OptimizerInfo) -> None:
    """Parameters, state, groups and defaults, with each of its settings."""
    for kwargs in settings(info):
        (model, inner), (twin, plain) = build(info, kwargs), build(info, kwargs)
        fsr = FSRWrapper(model, inner, head="fc", num_samples=10_000)
        run(model, fsr, info, range(4))
        run(twin, plain, info, range(4))
        assert same(dict(model.state_dict()), dict(twin.state_dict())), kwargs
        assert same(plain_state(fsr), plain.state_dict()), kwargs
        assert fsr.param_groups is inner.param_groups
        assert fsr.state is inner.state
        assert fsr.defaults is inner.defaults


@EACH
def test_states_go_both_ways(info: OptimizerInfo) -> None:
    """Into a new wrapper, into a plain optimizer, and from one; the run goes on bit for bit."""
    for kwargs in settings(info):
        model, inner = build(info, kwargs)
        fsr = FSRWrapper(model, inner, head="fc", num_samples=10_000)
        run(model, fsr, info, range(3))
        saved = copy.deepcopy((model.state_dict(), fsr.state_dict()))
        run(model, fsr, info, range(3, 6))
        for kind in ("wrapped", "plain", "from plain"):
            twin, other = build(info, kwargs)
            optimizer: Any = other if kind == "plain" else FSRWrapper(twin, other, head="fc", num_samples=10_000)
            twin.load_state_dict(saved[0])
            state = saved[1] if kind != "from plain" else {k: v for k, v in saved[1].items() if k != "fsr"}
            optimizer.load_state_dict(copy.deepcopy(state))
            run(twin, optimizer, info, range(3, 6))
            assert same(dict(model.state_dict()), dict(twin.state_dict())), (kind, kwargs)
            assert same(plain_state(fsr), plain_state(optimizer)), (kind, kwargs)


@EACH
def test_copies_go_on_by_themselves(info: OptimizerInfo) -> None:
    if info.name == "LBFGS":
        pytest.skip("torch's own copies of it cannot step")
    for again in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        kwargs = settings(info)[0]
        model, inner = build(info, kwargs)
        fsr = FSRWrapper(model, inner, head="fc", num_samples=10_000)
        run(model, fsr, info, range(3))
        twin, twin_fsr = again((model, fsr))
        run(twin, twin_fsr, info, range(3, 5))
        assert not same(dict(model.state_dict()), dict(twin.state_dict()))
        run(model, fsr, info, range(3, 5))
        assert same(dict(model.state_dict()), dict(twin.state_dict()))
        assert same(plain_state(fsr), plain_state(twin_fsr))


@EACH
def test_schedules(info: OptimizerInfo) -> None:
    """Those of the database, on the wrapper: the rates are those of the same on a plain optimizer."""
    for makers in info.scheduler_inputs:
        kwargs, rates = settings(info)[0], []
        for wrap in (True, False):
            model, optimizer = build(info, kwargs)
            used: Any = FSRWrapper(model, optimizer, head="fc", num_samples=10_000) if wrap else optimizer
            schedules = [make(used) for make in makers]
            found = []
            for number in range(3 if info.step_requires_closure else 12):
                run(model, used, info, range(number, number + 1))
                for schedule in schedules:
                    plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    schedule.step(*([1.0] if plateau else []))
                found.append([float(group["lr"]) for group in optimizer.param_groups])
            rates.append((found, dict(model.state_dict())))
        assert same(rates[0], rates[1])


@EACH
def test_hooks_and_groups(info: OptimizerInfo) -> None:
    kwargs = settings(info)[0]
    model, inner = build(info, kwargs)
    fsr = FSRWrapper(model, inner, head="fc", num_samples=10_000)
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    handles = [
        fsr.register_step_pre_hook(note("step")),
        fsr.register_step_post_hook(note("stepped")),
        fsr.register_state_dict_pre_hook(note("saves")),
        fsr.register_state_dict_post_hook(note("saved")),
        fsr.register_load_state_dict_pre_hook(note("loads")),
        fsr.register_load_state_dict_post_hook(note("loaded")),
    ]
    run(model, fsr, info, range(1))
    fsr.load_state_dict(fsr.state_dict())
    assert seen == ["step", "stepped", "saves", "saved", "loads", "loaded"]
    for handle in handles:
        handle.remove()
    run(model, fsr, info, range(1))
    assert len(seen) == 6
    fsr.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    if info.supports_param_groups:
        fsr.add_param_group({"params": [nn.Parameter(torch.randn(2, 2))], "lr": 0.5})
        assert inner.param_groups[-1]["lr"] == 0.5
