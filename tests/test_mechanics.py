"""What goes on behind a step: modules with two names, random streams, heads of every kind, forwards of other kinds."""

from __future__ import annotations

import copy
import gc
import linecache
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import CLIP, assert_close, judge_soon, slow_meta_step
from processes import run
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import TensorDataset

from fsr_wrap import FSRWrapper, functional
from fsr_wrap.heads import Head

N, B, D, H, C = 48, 12, 5, 8, 4
SELECT = {"weight_rule": "select", "class_balance": 1.0, "relabel_weight": 3.0, "relabel_momentum": 0.8}
X, Y = torch.randn(N, D, generator=torch.Generator().manual_seed(1)), torch.arange(N) % C


class Net(nn.Module):
    def __init__(self, head: nn.Module | None = None, norm: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(D, H)
        self.norm = nn.BatchNorm1d(H) if norm else nn.Identity()
        self.fc = nn.Linear(H, C) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.body(x)).tanh())


class Alias(Net):
    """Its parts have two names."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(H, H), nn.BatchNorm1d(H), nn.Tanh(), nn.Linear(H, C)))
        self.again = nn.Sequential(self.body, self.norm, nn.Tanh())
        self.fc.first = self.fc[0]
        self.fc.last = nn.ModuleList([self.fc[3]])
        self.classifier = self.fc

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc.first(self.again(x))
        return self.classifier[3](self.fc[2](self.fc[1](h)))


class One(Alias):
    """The same, with one name each."""

    def __init__(self) -> None:
        super().__init__()
        del self.again, self.classifier, self.fc.first, self.fc.last

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.body(x)).tanh())


def make(build: Callable[[], nn.Module] = Net, head: Any = "fc", **options: Any) -> tuple[Any, FSRWrapper]:
    torch.manual_seed(0)
    model = build()
    recipe = {"num_samples": N, "dictionary_size": 16, "reward_batch_size": 10, **CLIP, **options}
    return model, judge_soon(FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.05), head, **recipe), C)


def batches(first: int = 0) -> list[Tensor]:
    return [(torch.arange(B) * 5 + k * B) % N for k in range(first, first + 6)]


def train(model: nn.Module, fsr: FSRWrapper, mixup: bool = False, x: Tensor = X) -> None:
    for index in batches():
        inputs, target = fsr.mixup(x[index], Y[index]) if mixup else (x[index], Y[index])
        fsr.loss(model(inputs), target, index).backward()
        fsr.step()
        fsr.zero_grad()


# --- modules with two names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reward": "fresh"}, {"pusher": "meta_margin"}, SELECT])
@pytest.mark.parametrize("head", ["all", ["norm", "fc.0"]])
def test_parts_with_two_names_train_like_parts_with_one(head: Any, options: dict[str, Any]) -> None:
    runs = []
    for build in (Alias, One):
        model, fsr = make(build, head, **options)
        params = list(model.parameters())
        train(model, fsr)
        assert fsr.is_reweighting
        assert all(one is other for one, other in zip(params, model.parameters(), strict=True))
        assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
        runs.append([*params, *model.buffers()])
    assert_close(runs[0], runs[1], 0.0)


def in_two_processes(build: type[nn.Module], head: Any) -> tuple[list[Tensor], list[bool]]:
    """Trains under DDP; parameters and statistics, whether the latter stayed in each `loss()`, and the former moved."""
    torch.manual_seed(0)
    core = build()
    start = [parameter.detach().clone() for parameter in core.parameters()]
    model = nn.parallel.DistributedDataParallel(core)
    recipe = {**CLIP, "num_samples": N, "dictionary_size": 16, "reward_batch_size": 10, "reward": "fresh"}
    fsr = FSRWrapper(model, torch.optim.SGD(core.parameters(), lr=0.05), head, **recipe)
    stayed = []
    for index in batches():
        index = index[dist.get_rank() :: 2]
        logits = model(X[index])
        before = [buffer.clone() for buffer in core.buffers()]
        fsr.loss(logits, Y[index], index).backward()
        stayed.append(all(map(torch.equal, before, core.buffers())))
        fsr.step()
        fsr.zero_grad()
    assert fsr.is_reweighting
    pairs = zip(start, core.parameters(), strict=True)
    moved = [not torch.equal(old, new) for old, new in pairs if old.ndim > 1]  # biases before BatchNorm need not
    return [tensor.detach().clone() for tensor in (*core.parameters(), *core.buffers())], [*stayed, *moved]


@pytest.mark.parametrize("head", ["all", ["norm", "fc.0"]])
def test_parts_with_two_names_under_ddp(head: Any) -> None:
    runs = [run(2, in_two_processes, build, head) for build in (Alias, One)]
    for (alias, good), (one, _) in zip(*runs, strict=True):
        assert all(good)
        assert_close(alias, one, 0.0)


def test_a_head_with_two_names_trains_like_one_with_one() -> None:
    class Twice(nn.Module):
        def __init__(self, alias: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(H, H), nn.Linear(H, C)
            if alias:
                self.both = nn.Sequential(self.a, nn.Tanh(), self.b)

        def forward(self, h: Tensor) -> Tensor:
            return self.both(h) if hasattr(self, "both") else self.b(self.a(h).tanh())

    runs = []
    for alias in (True, False):
        model, fsr = make(lambda alias=alias: Net(Twice(alias)))
        before = copy.deepcopy(model.fc.a.weight)
        train(model, fsr)
        assert isinstance(model.fc.a.weight, nn.Parameter)
        assert not torch.equal(model.fc.a.weight, before)
        runs.append(list(model.parameters()))
    assert_close(runs[0], runs[1], 0.0)


@pytest.mark.parametrize(("mixup", "options"), [(False, {"reward": "fresh"}), (True, {}), (False, {}), (True, SELECT)])
@pytest.mark.parametrize("head", ["all", "fc.3"])
def test_statistics_of_a_part_with_two_names_stay(head: str, mixup: bool, options: dict[str, Any]) -> None:
    model, fsr = make(Alias, head, **options)
    train(model, fsr)
    inputs, target = fsr.mixup(X[:B], Y[:B]) if mixup else (X[:B], Y[:B])
    logits = model(inputs)
    before = [buffer.clone() for buffer in model.buffers()]
    held = list(model.buffers())
    fsr.loss(logits, target, torch.arange(B))
    assert_close(list(model.buffers()), before, 0.0)
    assert all(one is other for one, other in zip(held, model.buffers(), strict=True))


class Tied(nn.Module):
    """A bag of words whose head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(C, H)
        self.body = nn.Linear(H, H)
        self.out = nn.Linear(H, C, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.body(self.embedding(words).mean(1)).tanh())


@pytest.mark.parametrize("head", ["out", "all", ["body", "out"], ["embedding", "out"]])
def test_an_embedding_tied_to_the_head(head: Any) -> None:
    """Both take the look-ahead, and both stay one."""
    model, fsr = make(Tied, head, lookahead_lr=0.2, relabel_weight=0.0)
    model.double()
    words = torch.randint(C, (N, 3), generator=torch.Generator().manual_seed(2))
    drawn: list[Any] = []
    train(model, fsr, x=words)
    assert model.out.weight is model.embedding.weight
    assert isinstance(model.out.weight, nn.Parameter)
    memory, index = fsr._memory, batches()[2]
    plain = memory.reward_batch
    memory.reward_batch = lambda: drawn.append(plain()) or drawn[0]  # type: ignore[method-assign,func-returns-value]
    logits = model(words[index])
    params = {n: p for n, p in model.named_parameters() if head == "all" or n.split(".")[0] in head}
    if head == "out":
        params = {"embedding.weight": model.embedding.weight}
        h = model.body(model.embedding(words[index]).mean(1)).tanh().detach()
        fsr.loss(logits, Y[index], index)
        forward, batch, reward = (lambda p, h: h @ p["embedding.weight"].T), h, drawn[0][1][0]
    else:
        fsr.loss(logits, Y[index], index)
        if "body" in head:
            params["embedding.weight"] = model.embedding.weight
        forward, batch, reward = (
            (lambda p, x: functional_call(model, p, x.long())),
            words[index].double(),
            drawn[0][1][0],
        )
    expected = slow_meta_step(forward, params, (batch, Y[index]), (reward, drawn[0][0]), lr=0.2)[0].clamp(min=0)
    assert 0 < (expected > 0).sum() < B
    assert_close(fsr.weights, expected / expected.sum())


def test_a_real_model_whose_parts_have_two_names() -> None:
    """timm's CoaT shares its position encodings between its blocks."""
    model = timm.create_model(
        "coat_lite_tiny",
        num_classes=C,
        embed_dims=(16, 16, 16, 16),
        serial_depths=(1, 1, 1, 1),
        num_heads=8,
        img_size=32,
    )
    fsr = FSRWrapper(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        "all",
        num_samples=4,
        dictionary_size=2,
        reward_batch_size=2,
        **{**CLIP, "warmup_epochs": 0, "weight_rule": "shift"},
    )
    params = list(model.parameters())
    before = [parameter.detach().clone() for parameter in params]
    images = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        fsr.loss(model(images), torch.arange(4), torch.arange(4)).backward()
        assert all(parameter.grad is not None for parameter in params)
        fsr.step()
    assert fsr.is_reweighting
    assert all(one is other for one, other in zip(params, model.parameters(), strict=True))
    moved = [not torch.equal(one, other) for one, other in zip(params, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)  # the keys' biases have no gradient to speak of


# --- random streams --------------------------------------------------------------------------------------------------


class Noise(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        scale = 1e-3 * (1 + random.random() + np.random.rand())  # noqa: NPY002
        return h + scale * torch.randn_like(h) if self.training else h


class Drop(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.2, self.training)


def streams() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), np.random.get_state()[2]]  # noqa: NPY002


@pytest.mark.parametrize("layer", [Noise, Drop])
@pytest.mark.parametrize(
    "options",
    [{}, {"pusher": "meta_margin"}, {"reward": "fresh", "reward_every": 2}, {**SELECT, "pusher": "meta_margin"}],
)
def test_a_random_head_leaves_the_streams_alone_and_resumes(layer: type[nn.Module], options: dict[str, Any]) -> None:
    def build() -> nn.Module:
        return Net(nn.Sequential(nn.Linear(H, H), layer(), nn.Linear(H, C)))

    model, fsr = make(build, **options)
    saved: Any = None
    for number, index in enumerate([*batches(), *batches(6)]):
        if number == 7:
            saved = copy.deepcopy([model.state_dict(), fsr.state_dict(), *streams()[:2], np.random.get_state()])  # noqa: NPY002
        logits, before = model(X[index]), streams()
        fsr.loss(logits, Y[index], index).backward()
        assert_close(streams(), before, 0.0)
        fsr.step()
        fsr.zero_grad()
    other, resumed = make(build, **options)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    random.setstate(saved[3])
    np.random.set_state(saved[4])  # noqa: NPY002
    for index in batches(6)[1:]:
        resumed.loss(other(X[index]), Y[index], index).backward()
        resumed.step()
        resumed.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


# --- derivatives of every kind of head -------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """tanh, as a kernel of one's own often comes: with a backward, and no more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.tanh()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class OnceTanh(nn.Module):
    twice = False

    def forward(self, h: Tensor) -> Tensor:
        return h.tanh() if self.twice else Once.apply(h)


DERIVATIVES = {
    "weight norm": (lambda: weight_norm(nn.Linear(H, C)), functional.meta_gradient_in_reverse),
    "spectral norm": (lambda: spectral_norm(nn.Linear(H, C)), functional.meta_gradient_in_reverse),
    "weight norm inside": (
        lambda: nn.Sequential(
            weight_norm(nn.Linear(H, H)), nn.BatchNorm1d(H), nn.Tanh(), spectral_norm(nn.Linear(H, C))
        ),
        functional.meta_gradient_in_reverse,
    ),
    "once": (lambda: nn.Sequential(nn.Linear(H, H), OnceTanh(), nn.Linear(H, C)), functional.meta_gradient_one_by_one),
    "any": (lambda: nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, C)), functional.meta_gradient),
}


@pytest.mark.filterwarnings("ignore:The head 'fc' can be differentiated once only")
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_a_head_is_differentiated_as_it_can_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way is known after the first batch, and the scores are those of the slow oracle."""
    build, way = DERIVATIVES[kind]
    model, fsr = make(lambda: Net(build(), norm=False).double(), lookahead_lr=0.3, relabel_weight=0.0)
    x = X.double()
    before = copy.deepcopy(model.fc.state_dict())
    logits = model(x[:B])
    after_forward = copy.deepcopy(model.fc.state_dict())
    fsr.loss(logits, Y[:B], torch.arange(B))
    assert fsr._reweighting.head.meta_gradient is way
    assert_close(model.fc.state_dict(), after_forward, 0.0)
    assert before.keys() == after_forward.keys()
    train(model, fsr, x=x)
    assert fsr.is_reweighting
    drawn: list[Any] = []
    memory, index = fsr._memory, torch.arange(B)
    plain = memory.reward_batch
    monkeypatch.setattr(memory, "reward_batch", lambda: drawn.append(plain()) or drawn[0])
    logits = model(x[index])
    state = {name: buffer.clone() for name, buffer in model.fc.named_buffers()}
    fsr.loss(logits, Y[index], index)
    monkeypatch.setattr(OnceTanh, "twice", True)

    def forward(params: dict[str, Tensor], h: Tensor) -> Tensor:
        return functional_call(model.fc, {**params, **{name: value.clone() for name, value in state.items()}}, h)

    h = model.norm(model.body(x[index])).tanh().detach()
    params = dict(model.fc.named_parameters())
    expected = slow_meta_step(forward, params, (h, Y[index]), (drawn[0][1][0], drawn[0][0]), lr=0.3)[0].clamp(min=0)
    assert 0 < (expected > 0).sum() < B
    assert_close(fsr.weights, expected / expected.sum())


def test_a_head_that_can_be_differentiated_once_only_says_so() -> None:
    model, fsr = make(lambda: Net(DERIVATIVES["once"][0]()))
    with pytest.warns(UserWarning, match="'fc' can be differentiated once only, so a step takes a") as told:
        fsr.loss(model(X[:B]), Y[:B], torch.arange(B))
    assert told[0].filename == __file__  # it points at the user's line
    train(model, fsr)


@pytest.mark.parametrize(
    ("case", "match", "line"),
    [
        ("collisions", "came with another label", "fsr.loss("),
        ("no loss", "without loss", "fsr.step()"),
        ("too early", "cannot tell yet", "provoke()"),
        ("cleaned", "cannot tell yet", "fsr.cleaned("),
        ("made", "dictionary_size", "FSRWrapper(model, "),
    ],
)
def test_warnings_point_at_the_users_line(case: str, match: str, line: str) -> None:
    """However deep in the library they come from, and whoever else's code is between."""
    model, data = Net(), TensorDataset(X, Y)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=N)

    def epoch(y: Tensor) -> None:
        for index in torch.arange(N).split(B):
            fsr.loss(model(X[index]), y[index], index)

    def no_loss() -> None:
        for _ in range(2 * N // B):
            model(X[:B])
            fsr.step()

    def made() -> None:
        FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=30, weight_rule="clip")

    epoch(Y)
    provoke = {
        "collisions": lambda: epoch((Y + 1) % C),
        "no loss": no_loss,
        "too early": fsr.label_issues,
        "cleaned": lambda: fsr.cleaned(data, drop=True),
        "made": made,
    }[case]
    with pytest.warns(UserWarning, match=match) as told:
        provoke()
    for one in told:
        assert one.filename == __file__
        assert line in linecache.getline(one.filename, one.lineno)


def test_a_head_that_cannot_be_differentiated_is_refused_at_once() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(H, C)

        def forward(self, h: Tensor) -> Tensor:
            return torch.from_numpy(self.fc(h).detach().numpy())

    model, fsr = make(lambda: Net(Detached(), norm=False))
    logits = model(X[:B])
    with pytest.raises(TypeError, match="The head 'fc' cannot be differentiated apart from the model"):
        fsr.loss(logits, Y[:B], torch.arange(B))
    assert fsr._memory.consumed == 0


# --- the check of the head -------------------------------------------------------------------------------------------


class Scaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return 30.0 * super().forward(x)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_zeros_is_looked_at_again(bias: bool) -> None:
    """As long as it says the same of every sample nothing can be seen; with the second batch it can."""
    model, fsr = make(Scaled)
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    if bias:
        model.forward = lambda x: Net.forward(model, x) + 29 * model.fc.weight.abs().sum() * model.body(x)[:, :1]
        nn.init.constant_(model.fc.bias, 0.5)
    with pytest.raises(ValueError, match="gives other logits than those passed to loss"):
        train(model, fsr)
    assert fsr._memory.consumed == B


def test_looking_at_a_head_of_zeros_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fsr = make(samples_per_epoch=N)
    nn.init.zeros_(model.fc.weight)
    looked, check = [], Head.check
    monkeypatch.setattr(Head, "check", lambda self, *args: looked.append(number) or check(self, *args))
    for number in range(20):  # noqa: B007
        fsr.loss(model(X[:B]), Y[:B], torch.arange(B))
    assert looked == [0, 1, 3, 7, 15]


# --- forwards of other kinds, copies, parts called alone -------------------------------------------------------------


def vmapped(model: nn.Module) -> None:
    for _ in range(9):
        torch.func.vmap(lambda x: model(x[None]))(X[:B])


def differentiated(model: nn.Module) -> None:
    torch.func.grad(lambda x: model(x[None]).sum())(X[0])
    torch.func.jvp(model, (X[:B],), (X[:B],))
    torch.func.jacrev(model)(X[:B])


def exported(model: nn.Module) -> None:
    torch.export.export(model, (X[:B],), strict=False)


def exported_strictly(model: nn.Module) -> None:
    torch.export.export(model, (X[:B],), strict=True)


SINCE_EXPORTING = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="this torch exports no hooks but the simplest"
)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "other", [vmapped, differentiated, exported, pytest.param(exported_strictly, marks=SINCE_EXPORTING)]
)
@pytest.mark.parametrize("head", ["fc", "all"])
def test_forwards_of_other_kinds_do_not_disturb(head: str, other: Callable[[nn.Module], None]) -> None:
    """Between the user's forward and loss() comes one under torch.func or torch.export."""
    runs = []
    for disturbed in (True, False):
        model, fsr = make(lambda: Net(norm=False), head, reward="fresh")
        train(model, fsr)
        logits = model(X[:B])
        if disturbed:
            other(model)
        runs.append((fsr.loss(logits, Y[:B], torch.arange(B)).detach(), fsr.weights))
    assert_close(runs[0], runs[1], 0.0)


class Holder(Net):
    """A module that holds its own wrapper, as a LightningModule does."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        inner = torch.optim.Adam(self.parameters())
        self.fsr = judge_soon(FSRWrapper(self, inner, "fc", num_samples=N, dictionary_size=16, **options), C)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("options", [{}, CLIP], ids=["select", "clip"])
def test_a_module_that_holds_its_own_wrapper_is_copied(
    options: dict[str, Any], whole: bool, duplicate: Callable[[Any], Any]
) -> None:
    model = Holder(**options)
    assert "fsr" in vars(model)
    assert len(repr(model)) < 1000
    assert len(list(model.parameters())) == 6
    assert not any(name.startswith("fsr") for name in model.state_dict())
    train(model, model.fsr)
    twin = duplicate(model) if whole else duplicate(model.fsr)._reweighting.intake.core
    assert twin.fsr._reweighting.intake.core is twin
    assert len(twin._forward_hooks) == len(model._forward_hooks)
    handle = twin.fc.register_forward_hook(lambda *_: None)  # does not take a number that is in use
    for one in (model, twin):
        train(one, one.fsr)
    handle.remove()
    assert_close(list(twin.parameters()), list(model.parameters()), 0.0)
    assert twin.fsr.is_reweighting
    assert twin.fsr.epoch == model.fsr.epoch == 3


def test_a_wrapper_that_goes_takes_its_hooks_along() -> None:
    model, fsr = make()
    twin = copy.deepcopy(fsr)
    other = twin._reweighting.intake.core
    for one in (model, other):
        assert one._forward_hooks
    del fsr, twin
    gc.collect()
    for one in (model, other):
        assert not any((one._forward_hooks, one._forward_pre_hooks, one.fc._forward_hooks))
        assert not any((one._forward_hooks_always_called, one._forward_pre_hooks_with_kwargs))


def in_parts(model: Net, x: Tensor) -> Tensor:
    return model.fc(model.norm(model.body(x)).tanh())


@pytest.mark.parametrize("before", ["nothing", "another forward", "a forward that fails", "evaluation"])
def test_parts_called_one_by_one_leave_no_stale_inputs(before: str) -> None:
    model, fsr = make(reward="fresh")
    if before == "another forward":
        model(X[B : 2 * B])
    elif before == "a forward that fails":
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(X[:B, :2])
    elif before == "evaluation":
        with torch.no_grad():
            model(X[B : 2 * B])
    logits = in_parts(model, X[:B])
    with pytest.raises(RuntimeError, match=r"reward=\"fresh\" keeps the model's inputs, but the head 'fc' was called"):
        fsr.loss(logits, Y[:B], torch.arange(B))
    assert fsr._memory.consumed == 0


@pytest.mark.parametrize("options", [{}, {**SELECT, "reward": "fresh"}], ids=["clip", "select"])
def test_parts_called_one_by_one_train_where_features_are_kept(options: dict[str, Any]) -> None:
    (model, fsr), (other, whole) = make(**options), make(**options)
    for index in batches():
        for one, optimizer, logits in ((model, fsr, in_parts(model, X[index])), (other, whole, other(X[index]))):
            optimizer.loss(logits, Y[index], index).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert one.training
    assert_close(list(model.parameters()), list(other.parameters()), 0.0)


class Twice(Net):
    """Its head runs on two views of a sample; the logits are those of the one or the other, or of both."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        first, second = super().forward(x), super().forward(x.flip(1))
        return {"first": first, "second": second, "both": first + second}[self.which]


@pytest.mark.parametrize("reward", ["cached", "fresh"])
@pytest.mark.parametrize("which", ["first", "second"])
def test_the_right_call_of_a_head_is_taken(which: str, reward: str) -> None:
    model, fsr = make(lambda: Twice(which), reward=reward, relabel_weight=0.0, lookahead_lr=0.3)
    model.double().eval()
    x = X.double()
    train(model, fsr, x=x)
    drawn: list[Any] = []
    memory, index = fsr._memory, batches()[1]
    plain = memory.reward_batch
    memory.reward_batch = lambda: drawn.append(plain()) or drawn[0]  # type: ignore[method-assign,func-returns-value]
    fsr.loss(model(x[index]), Y[index], index)

    def features(x: Tensor) -> Tensor:
        return model.norm(model.body(x if which == "first" else x.flip(1))).tanh().detach()

    h = drawn[0][1][0] if reward == "cached" else features(drawn[0][1][0])
    params = dict(model.fc.named_parameters())
    forward = lambda p, h: functional_call(model.fc, p, h)  # noqa: E731
    batch = features(x[index]), Y[index]
    expected = slow_meta_step(forward, params, batch, (h, drawn[0][0]), lr=0.3)[0].clamp(min=0)
    assert_close(fsr.weights, expected / expected.sum())


def test_what_cannot_be_found_is_told_apart() -> None:
    """Each cause has a message of its own, and nothing changes."""

    class Masked(nn.Module):
        def forward(self, h: Tensor, mask: Tensor) -> Tensor:
            return h[:, :C] * mask

    class TwoInputs(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x), torch.ones(C))

    model, fsr = make()
    logits = model(X[:B])
    for part in (logits[:4], logits[4:8], logits[::2]):
        with pytest.raises(RuntimeError, match=rf"logits of {len(part)} of the {B} samples of a forward: pass all"):
            fsr.loss(part, Y[: len(part)], torch.arange(len(part)))
    joined = torch.cat([logits, logits])
    with pytest.raises(RuntimeError, match=r"of 24 samples, but the forwards that wait for it are of 12: call loss"):
        fsr.loss(joined, Y[: 2 * B], torch.arange(2 * B))
    assert fsr._memory.consumed == 0
    fsr.loss(logits, Y[:B], torch.arange(B))
    model, fsr = make(lambda: Twice("both"))
    with pytest.raises(RuntimeError, match="'fc' was called several times in a forward, and the logits are none of"):
        fsr.loss(model(X[:B]), Y[:B], torch.arange(B))
    model, fsr = make(lambda: TwoInputs(Masked()))
    with pytest.raises(RuntimeError, match="'fc' is called with 2 tensors, and FSR needs one"):
        fsr.loss(model(X[:B]), Y[:B], torch.arange(B))
