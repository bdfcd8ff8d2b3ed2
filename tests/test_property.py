"""Random sequences of everything a user may call, each compared with the plain twin in `oracle.py`.

`FSR_PROPERTY_EXAMPLES=5000 pytest tests/test_property.py` runs so many sequences, other ones each time.
"""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, read_log_ratio
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracle import Batch, Oracle, Result
from test_wrapper import frozen
from torch import Tensor, nn

from fsr_wrap import FSRWrapper, functional, selection, shares
from fsr_wrap.relabel import Reading

EXAMPLES = int(os.environ.get("FSR_PROPERTY_EXAMPLES", 0))
INPUTS, WIDTH = 3, 4
DONE: Counter[str] = Counter()


class Net(nn.Module):
    def __init__(self, kind: str, norm: bool, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        heads: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(WIDTH, classes),
            "no bias": lambda: nn.Linear(WIDTH, classes, bias=False),
            "conv": lambda: nn.Conv2d(WIDTH, classes, 1),
            "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, classes)),
        }
        self.head = heads[kind]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.body(x)).tanh()
        if isinstance(self.head, nn.Conv2d):
            h = h[:, :, None, None]
        return self.head(h).flatten(1)


@dataclass
class Setup:
    """A run as it was drawn."""

    kind: str
    norm: bool
    part: str | list[str]  # Θ^meta
    classes: int
    shown: int  # classes that have samples
    samples: int
    known: bool  # whether N is
    per_epoch: int | None
    momentum: float
    double: bool
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)  # of two modules, so small that little data tells much

    def build(self) -> tuple[Net, FSRWrapper]:
        torch.manual_seed(self.seed)
        model = Net(self.kind, self.norm, self.classes)
        model = model.double() if self.double else model
        inner = torch.optim.SGD(model.parameters(), lr=0.3, momentum=self.momentum)
        return model, self.wrap(model, inner)

    def wrap(self, model: Net, inner: torch.optim.Optimizer, **others: Any) -> FSRWrapper:
        numbers = {"num_samples": self.samples if self.known else None, "samples_per_epoch": self.per_epoch}
        return FSRWrapper(model, inner, self.part, **{**numbers, **self.options, **others})


@st.composite
def setups(draw: st.DrawFn, case: int, selects: bool) -> Setup:
    """Hypothesis chooses some values seldom; with `case` each of those that matter most has its turn."""
    one = st.sampled_from
    kind, norm = draw(one(["linear", "linear", "no bias", "conv", "mlp"])), draw(st.booleans())
    part = draw(one(["head", "head", "auto", ["body", "head"], "all"])) if kind != "mlp" else draw(one(["head", "all"]))
    classes, samples = draw(st.integers(2, 6)), draw(st.integers(3, 40))
    return Setup(
        kind=kind,
        norm=norm,
        part=part,
        classes=classes,
        shown=draw(st.integers(1, classes)),
        samples=samples,
        known=draw(st.booleans()),
        per_epoch=draw(one([None, samples, 2 * samples, 150])),
        momentum=draw(one([0.0, 0.9])),
        double=draw(one([True, True, True, False])),
        seed=draw(st.integers(0, 2**16)),
        options={
            "dictionary_size": draw(st.integers(1, 24)),
            "reward_batch_size": draw(st.integers(2, 14)),
            "score_momentum": draw(one([0.0, 0.3, 0.9])),
            "lookahead_lr": draw(one([0.1, 0.1, 1.0, 0.0])),
            "class_balance": draw(one([0.0, 1.0, 0.5])),
            "warmup_epochs": draw(one([0, 0, 1, 2])),
            "weight_rule": "select" if selects else draw(one(["clip", "clip", "shift", "shift", "uniform"])),
            "pusher": PUSHERS[case],
            "reward": ["cached", "fresh"][case // 2 % 2],
            "reward_every": [1, 3][case % 2],
            "relabel_weight": draw(one([2.0, 1.0, 0.0])),
            "relabel_momentum": draw(one([0.1, 0.6])),
            "relabel_storage": ["float16", "int8", 2][case % 3],
            "label_smoothing": draw(one([0.0, 0.1])),
            "nonfinite": draw(one(["raise", "skip"])),
            "seed": draw(st.integers(0, 9)),
        },
        constants=draw(one([{}, SMALL, SMALL])) if selects else {},
    )


PAPER = {"weight_rule": "clip", "class_balance": 0.0, "relabel_weight": 2.0, "relabel_momentum": 0.1}
SMALL = {
    "_HELD": 0.3,
    "_LARGEST_SHARE": 0.4,
    "_OF_CLASS": 0.5,
    "VISITS": 1,
    "_START": 1,
    "_GAP": 0.0,
    "_READ": 0.5,
    "_JUDGE": 0.1,
    "_GROWTH": 0.0,
    "_TO_TELL": 3,
}
SMALL |= {"_ANCHORS": 0.5, "_FEW_ANCHORS": 3, "_FEW": 2, "_TELL_LITTLE": 2, "_ALIKE": 1.0}


WAYS = ["state_dict", "file", "save", "deepcopy", "pickle"]
PUSHERS = ["meta_margin", "authors_margin", "negative_loss", "area_under_margin", "max_margin", "forgetting_event"]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- what is refused -------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any], int, int], None]  # of the arguments of loss(); b, C
REFUSED: dict[str, Change] = {}


def refused(change: Change) -> Change:
    REFUSED[change.__name__.replace("_", " ")] = change
    return change


def _set(key: str, make: Callable[[dict[str, Any], int, int], Any]) -> Change:
    def change(a: dict[str, Any], b: int, c: int) -> None:
        a[key] = make(a, b, c)

    return change


def _put(key: str, value: int) -> Change:
    """One wrong number among right ones."""

    def change(a: dict[str, Any], b: int, c: int) -> None:
        a[key] = a[key].clone()
        a[key][b // 2] = value if value < 0 else value + c

    return change


def _soft(b: int, c: int) -> Tensor:
    return torch.full((b, c), 1 / c, dtype=torch.float64)


def _spoil(value: float) -> Change:
    def change(a: dict[str, Any], b: int, c: int) -> None:
        a["target"] = _soft(b, c)
        a["target"][b // 2, 0] = value

    return change


REFUSED |= {
    "index too large": _put("index", 2**40),
    "index below 0": _put("index", -1),
    "index too short": _set("index", lambda a, b, c: a["index"][1:]),
    "index of two dimensions": _set("index", lambda a, b, c: a["index"][:, None]),
    "index of floats": _set("index", lambda a, b, c: a["index"].double()),
    "index of bools": _set("index", lambda a, b, c: torch.ones(b, dtype=torch.bool)),
    "label too large": _put("target", 0),
    "label below 0": _put("target", -1),
    "labels of int32": _set("target", lambda a, b, c: a["target"].int()),
    "labels too many": _set("target", lambda a, b, c: torch.zeros(b + 1, dtype=torch.int64)),
    "a list of labels": _set("target", lambda a, b, c: [0] * b),
    "soft targets of other classes": _set("target", lambda a, b, c: _soft(b, c + 1)),
    "soft targets with NaN": _spoil(torch.nan),
    "soft targets with inf": _spoil(torch.inf),
    "soft targets below 0": _spoil(-0.5),
    "soft targets of large sums": _spoil(1.5),
    "multi-hot targets": _set("target", lambda a, b, c: torch.ones(b, c)),
    "own labels too few": _set("label", lambda a, b, c: torch.zeros(b - 1, dtype=torch.int64)),
    "own labels of floats": _set("label", lambda a, b, c: torch.zeros(b)),
    "own labels too large": _set("label", lambda a, b, c: torch.full((b,), c)),
    "own labels below 0": _set("label", lambda a, b, c: torch.full((b,), -1)),
    "logits of three dimensions": _set("logits", lambda a, b, c: a["logits"][:, :, None]),
    "logits of one dimension": _set("logits", lambda a, b, c: a["logits"][:, 0]),
    "logits of integers": _set("logits", lambda a, b, c: a["logits"].long()),
    "one class": _set("logits", lambda a, b, c: a["logits"][:, :1]),
    "no logits": _set("logits", lambda a, b, c: "nothing"),
    "other classes": _set("logits", lambda a, b, c: torch.zeros(b, c + 1)),
    "logits of no forward": _set("logits", lambda a, b, c: torch.zeros(b + 77, c)),
    "an empty batch": _set("logits", lambda a, b, c: a["logits"][:0]),
}


# --- the machine -----------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**20)
sizes = st.integers(1, 9)


class Training(RuleBasedStateMachine):
    """A run, the library's and the twin's."""

    case, selects = 0, False

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.setup = setup = data.draw(setups(self.case, self.selects))
        self.patch = pytest.MonkeyPatch()
        for name, value in setup.constants.items():
            [module] = (module for module in (selection, shares, functional) if hasattr(module, name))
            self.patch.setattr(module, name, value)
        self.model, self.fsr = setup.build()
        self.config = self.fsr.config
        self.tol, self.lr = 1e-9 if setup.double else 2e-4, 0.3
        self.new_oracle()
        generator = torch.Generator().manual_seed(setup.seed)
        self.inputs = torch.randn(200, INPUTS, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(setup.shown, (200,), generator=generator)
        self.order: list[int] = []
        self.sums: dict[str, Tensor] = {}  # what p.grad must be
        self.moving: dict[str, Tensor] = {}  # the optimizer's momentum
        self.twin, self.waiting = None, 0

    def teardown(self) -> None:
        self.patch.undo()

    @property
    def keeps(self) -> bool:
        return self.config.selects or self.config.relabel_weight > 0

    def new_oracle(self) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        kept = {"head": (), "auto": (), "all": names}.get(str(self.setup.part))
        deep = [name for name in names if not name.startswith("norm")] if kept is None else kept
        per_epoch = self.setup.per_epoch or (self.setup.samples if self.setup.known else None)
        self.oracle = Oracle(self.config, self.setup.classes, per_epoch, tuple(deep), self.held())
        self.oracle.rate = self.lr
        self.oracle.surest, self.oracle.own, self.oracle.told = self.surest, self.own, False
        self.oracle.rival, self.oracle.against = self.rival, self.against

    def held(self) -> tuple[int, ...]:
        """Who is held out, as the library's hash has it; room is made for as many samples as may come."""
        known = self.setup.known
        number = self.setup.samples if known else 200
        samples = number if known else None
        made = selection.Selection(number, 2, samples=samples, seed=self.config.seed, device="cpu")
        return tuple((made.code[:-1] == selection.HELD).nonzero()[:, 0].tolist())

    def read(self) -> Reading:
        memory = self.fsr._memory
        assert memory.pseudo is not None
        return memory.pseudo.read(memory.given.known().long(), self.oracle.prior.float())

    def surest(self, index: int, confidence: float) -> float:
        found = self.read().confidence[index].item()
        assert_close(number(found), number(confidence))
        return found

    def own(self, index: int, probability: float) -> float:
        found = self.read().own[index].item()
        assert_close(number(found), number(probability))
        return found

    def rival(self, index: int, probability: Tensor, best: int) -> int:
        found = int(self.read().rival[index])
        assert_close(probability[found], probability[best], 1e-2)
        return found

    def against(self, expected: dict[int, float]) -> dict[int, float]:
        memory = self.fsr._memory
        assert memory.pseudo is not None
        found = read_log_ratio(memory.pseudo, memory.given.known().long(), self.oracle.prior.float())
        values = {i: found[i].item() for i in expected}
        for i, value in expected.items():
            assert_close(number(values[i]), number(value), 1e-2)
        return values

    # --- batches

    def batch(self, seed: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and indices: the next ones of a pass through the samples, or any, also one several times."""
        generator = torch.Generator().manual_seed(seed)
        size = max(size, 2) if self.setup.norm else size
        reach = self.setup.samples if self.setup.known else max(2, self.setup.samples * (1 + seed % 3))
        if seed % 4:
            while len(self.order) < size:
                self.order += torch.randperm(self.setup.samples, generator=generator).tolist()
            index, self.order = torch.tensor(self.order[:size]), self.order[size:]
        else:
            index = torch.randint(reach, (size,), generator=generator)
        x = self.inputs[index] + 0.3 * torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)
        y = self.labels[index].clone()
        if seed % 3 == 0:
            y[0] = int(seed) % self.setup.shown
        return x if self.setup.double else x.float(), y, index

    def soft(self, y: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        other = torch.rand(len(y), self.setup.classes, generator=generator, dtype=torch.float64).softmax(1)
        mixed = 0.5 * other + 0.5 * nn.functional.one_hot(y, self.setup.classes)
        if seed % 3:  # some are not mixed, but smoothed
            mixed[::2] = 0.95 * nn.functional.one_hot(y, self.setup.classes)[::2] + 0.05 / self.setup.classes
        return mixed if self.setup.double else mixed.float()

    def draw(self) -> list[int]:
        """The samples of the next reward batch: the library's draw, seen on a copy of what it remembers."""
        memory = copy.deepcopy(self.fsr._memory)
        memory.reward_batch()
        assert memory.plan is not None
        slot, _, label = memory.plan[:, memory.planned - 1]
        index = self.fsr.dictionary.slots[slot].tolist()
        assert label.tolist() == [self.oracle.members[i].label for i in index]
        return index

    # --- one step, both ways

    def loss(self, batch: Batch, logits: Tensor, target: Tensor, *, backward: bool = True, label: Any = None) -> None:
        index = torch.tensor(batch.index)
        params = {name: value for name, value in self.model.named_parameters() if name != "extra"}
        expected = self.oracle.loss(params, batch, self.draw)
        extra = {} if label is None else {"label": label}
        world = self.world()
        loss = self.fsr.loss(logits, target, index, **extra)
        assert self.world() == world
        self.waiting = 0
        DONE["steps"] += 1
        DONE["re-weighted"] += self.oracle.steps[-1]["reward_loss"] > 0
        self.compare(batch, expected, loss)
        DONE["judged"] += self.oracle.selects and self.oracle.judging
        epoch = self.oracle.epoch
        self.oracle.count(len(batch.index))
        if self.oracle.epoch > epoch:
            self.compare_epoch()
        if backward:
            for name, value in expected.gradient.items():
                if value.isfinite().all():
                    self.sums[name] = self.sums.get(name, 0) + value
            loss.backward()
            self.compare_gradients(self.tol * expected.condition)

    def world(self) -> Any:
        """What `loss` leaves alone, bit by bit."""
        values = [dict(self.model.state_dict()), [p.grad for p in self.model.parameters()], torch.get_rng_state()]
        return frozen(values), [module.training for module in self.model.modules()]

    def compare(self, batch: Batch, expected: Result, loss: Tensor) -> None:
        tol = self.tol * expected.condition
        if tol < 0.01:
            assert_close(self.fsr.weights, expected.weights, tol)
            assert_close(loss.detach(), number(expected.loss), 10 * tol)
        total = self.fsr.weights.sum().item()
        assert total <= 1 + 1e-5
        for i in set(batch.index):
            sample = self.oracle.samples.get(i)
            if sample is None:
                continue
            found = self.fsr.scores[i].item()
            assert_close(number(found), number(sample.score), max(self.tol, 1e-6))
            sample.score = found  # rounded as it is stored
        if self.keeps:
            self.compare_pseudo_labels(set(batch.index))

    def compare_epoch(self) -> None:
        """What the end of an epoch makes of it all."""
        memory, oracle = self.fsr._memory, self.oracle
        found = torch.zeros(self.setup.classes) if memory.log_prior is None else memory.log_prior
        gap = found - oracle.prior
        assert_close(gap, gap.mean().expand(len(gap)))
        oracle.prior = found.double()
        margin = torch.zeros(self.setup.classes) if memory.margin is None else memory.margin
        assert_close(margin.tolist(), oracle.margin)
        oracle.margin = margin.tolist()
        DONE["margins"] += memory.margin is not None and oracle.judging
        if memory.selection is None:
            assert not oracle.selects
            return
        known = memory.selection
        assert (known.active, known.estimated, known.apart) == (oracle.judging, oracle.estimated, oracle.apart)
        assert known.drifts == oracle.drifts
        assert_close(known.predicted, oracle.predicted[-2:])
        DONE["knew"] += known.active and not oracle.told and oracle.apart < 2
        assert_close(known.peak, oracle.peak)
        DONE["drifted"] += known.drifts
        assert_close(known.growth, oracle.outsides[-2:])
        assert_close(known.share.tolist(), oracle.wrong, 1e-5)
        oracle.wrong = known.share.tolist()
        names = {selection.HELD: "held out", selection.WRONG: "taken for wrong"}
        codes = {i: names[code] for i, code in enumerate(known.code[:-1].tolist()) if code in names}
        assert codes == {i: code for i, code in oracle.codes.items() if i < len(known.code) - 1}
        self.compare_weights()
        DONE["found out"] += known.active and not oracle.told
        DONE["taken for wrong"] += "taken for wrong" in codes.values()

    def compare_weights(self) -> None:
        """Of labels that are judged, how likely each is right."""
        known, oracle = self.fsr._memory.selection, self.oracle
        assert known is not None
        for i, right in oracle.right.items():
            assert_close(known.weight[i].item(), right, 1e-5)
            oracle.right[i] = known.weight[i].item()  # rounded as it is stored

    def compare_pseudo_labels(self, visited: set[int]) -> None:
        stored = self.fsr.state_dict()["fsr"]["pseudo"]
        for i in visited:
            sample = self.oracle.samples.get(i)
            if sample is None or sample.pseudo is None:
                continue
            found, rough = stored["logits"][i].double(), 2e-3
            if self.config.relabel_storage == "int8":
                found, rough = found * stored["scale"][i].double(), 6e-3
            if isinstance(self.config.relabel_storage, int):
                rest = stored["rest"][i].double().expand(self.setup.classes)
                found = rest.scatter(0, stored["classes"][i].long(), found)
                square = stored["square"][i].item()
                assert_close(number(square), number(sample.square), max(10 * self.tol, 1e-6))
                sample.square = square
            else:
                sample.square = found.square().mean().item()
            error = (found - sample.pseudo).abs().max().item()
            assert error <= rough * sample.pseudo.abs().max().item() + 10 * self.tol, (found, sample.pseudo)
            sample.pseudo = found

    def compare_gradients(self, tol: float) -> None:
        if tol > 0.01:  # weights of scores that cancel to nothing: take it as it is
            self.sums = {n: p.grad.double().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        for name, parameter in self.model.named_parameters():
            if name in self.sums:
                rough = 50 if self.setup.norm else 10  # a batch that is nearly alike, which BatchNorm magnifies
                assert_close(parameter.grad, self.sums[name].view_as(parameter), rough * tol)
            else:
                assert parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()

    def finish(self, how: str = "step") -> None:
        """The optimizer's step, by SGD's formula, and `zero_grad`."""
        before = {name: value.detach().double().clone() for name, value in self.model.named_parameters()}
        gradients = {n: p.grad.double().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        (self.fsr.step if how == "step" else self.fsr.optimizer.step)()
        for name, parameter in self.model.named_parameters():
            if name not in gradients:
                assert torch.equal(parameter.double(), before[name])
                continue
            old = self.moving.get(name)
            move = gradients[name] if old is None else self.setup.momentum * old + gradients[name]
            self.moving[name] = move
            assert_close(parameter, before[name] - self.lr * move, self.tol)
        self.fsr.zero_grad()
        self.sums = {}
        with torch.no_grad():  # no run of this size needs more, and logits of thousands compare badly
            for parameter in self.model.parameters():
                parameter.clamp_(-4, 4)

    def step(self, seed: int, size: int) -> None:
        x, y, index = self.batch(seed, size)
        self.loss(Batch(x, y, index.tolist(), y.tolist()), self.model(x), y)
        self.finish()

    # --- what a user may call

    @rule(seed=seeds, size=sizes, number=st.integers(1, 14))
    def train(self, seed: int, size: int, number: int) -> None:
        for i in range(number):
            self.step(seed + i, size)
        self.go_on_elsewhere(how=WAYS[seed % len(WAYS)], seed=seed, size=size)

    @rule(seed=seeds, size=sizes, number=st.integers(1, 6))
    def train_with_other_sizes(self, seed: int, size: int, number: int) -> None:
        for i in range(number):
            self.step(seed + i, 1 + (size + 5 * i) % 9)
        self.mixup(seed=seed, size=max(2, size), used=True)

    @rule(seed=seeds, size=sizes, own=st.booleans())
    def soft_targets(self, seed: int, size: int, own: bool) -> None:
        x, y, index = self.batch(seed, size)
        target = self.soft(y, seed)
        label = y.roll(1) if own else target.argmax(1)
        hidden = [i for i, row in enumerate(target.tolist()) if own and row[label[i]] < max(row)]
        batch = Batch(x, target, index.tolist(), label.tolist(), hidden=tuple(hidden), own_label=own)
        self.loss(batch, self.model(x), target, label=label if own else None)
        self.finish("inner")

    @rule(seed=seeds, size=st.integers(2, 9), used=st.booleans())
    def mixup(self, seed: int, size: int, used: bool) -> None:
        if self.setup.kind == "mlp" and not self.oracle.samples:
            return  # the number of classes is not known
        if self.setup.part in ("all", ["body", "head"]) and not self.oracle.samples:
            return
        x, y, index = self.batch(seed, size)
        before = self.snapshot()
        mixed, target = self.fsr.mixup(x, y)
        assert self.snapshot() == before
        if not used:
            return
        partner, share = self.unmix(x, y, mixed, target)
        batch = Batch(mixed, target, index.tolist(), y.tolist(), x, partner, share)
        self.loss(batch, self.model(mixed), target)
        self.finish()

    def unmix(self, x: Tensor, y: Tensor, mixed: Tensor, target: Tensor) -> tuple[list[int], list[float]]:
        """Who was mixed with whom, and how: seen from the inputs, each of which differs from all others."""
        partner, share = [], []
        for i in range(len(x)):
            errors, shares = [], []
            for j in range(len(x)):
                way = (x[i] - x[j]).double()
                m = 1.0 if i == j else ((mixed[i] - x[j]).double() @ way / (way @ way)).item()
                shares.append(m)
                errors.append((m * x[i] + (1 - m) * x[j] - mixed[i]).abs().max().item())
            j = min(range(len(x)), key=lambda j: (round(errors[j], 12 if self.setup.double else 6), j != i))
            partner.append(j)
            share.append(shares[j])
            assert errors[j] < 1e-5
            assert 0.5 - 1e-3 <= share[i] <= 1 + 1e-3
            row = torch.zeros(self.setup.classes, dtype=torch.float64)
            row[y[i]] += share[i]
            row[y[j]] += 1 - share[i]
            assert_close(target[i], row, 1e-5 if self.setup.double else 1e-3)
        for missing in set(range(len(x))) - set(partner):  # of so small a part that it is not seen
            alone = [i for i in range(len(x)) if partner[i] == i and partner.count(i) > 1]
            partner[alone[0]] = missing
        assert sorted(partner) == list(range(len(x)))
        return partner, share

    @precondition(lambda self: self.config.nonfinite == "skip" and not self.setup.norm)
    @rule(seed=seeds, size=sizes, bad=st.sampled_from([torch.nan, torch.inf]), where=st.integers(0, 8))
    def a_spoiled_input(self, seed: int, size: int, bad: float, where: int) -> None:
        x, y, index = self.batch(seed, size)
        x[where % len(x)] = bad
        x[seed % len(x)] = bad
        self.loss(Batch(x, y, index.tolist(), y.tolist()), self.model(x), y, backward=False)

    @precondition(lambda self: self.config.nonfinite == "skip" and not self.waiting and not self.setup.norm)
    @rule(seed=seeds, size=sizes, where=st.integers(0, 8), soft=st.booleans())
    def a_spoiled_logit(self, seed: int, size: int, where: int, soft: bool) -> None:
        x, y, index = self.batch(seed, size)
        where %= len(x)
        target = self.soft(y, seed) if soft else y
        logits = self.model(x)
        overflow = torch.zeros_like(logits)
        overflow[where, 0] = torch.inf
        spoiled = logits + overflow
        batch = Batch(x, target, index.tolist(), y.tolist(), spoiled=(where,))
        self.loss(batch, spoiled, target, label=y)
        self.finish()

    @rule(seed=seeds, size=sizes, number=st.integers(2, 3), step=st.booleans())
    def several_forwards(self, seed: int, size: int, number: int, step: bool) -> None:
        """Then their losses, in their order; with and without a step between loss and loss."""
        batches = [self.batch(seed + i, size + i % 2) for i in range(number)]
        outputs = [self.model(x) for x, _, _ in batches]
        for (x, y, index), logits in zip(batches, outputs, strict=True):
            self.loss(Batch(x, y, index.tolist(), y.tolist()), logits, y)
        if step:
            self.finish()

    @rule(seed=seeds, size=sizes)
    def by_closure(self, seed: int, size: int) -> None:
        x, y, index = self.batch(seed, size)

        def closure() -> Tensor:
            self.loss(Batch(x, y, index.tolist(), y.tolist()), self.model(x), y)
            return torch.zeros(())

        before = {name: value.detach().double().clone() for name, value in self.model.named_parameters()}
        self.fsr.step(closure)
        self.take_over(before)

    def take_over(self, before: dict[str, Tensor]) -> None:
        """What the optimizer did since, by SGD's formula."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            old = self.moving.get(name)
            gradient = parameter.grad.double()
            self.moving[name] = gradient.clone() if old is None else self.setup.momentum * old + gradient
            assert_close(parameter, before[name] - self.lr * self.moving[name], self.tol)
        self.fsr.zero_grad()
        self.sums = {}

    @rule(seed=seeds, size=sizes, how=st.sampled_from(["forward", "no_grad", "eval"]))
    def leaves_no_trace(self, seed: int, size: int, how: str) -> None:
        x, y, index = self.batch(seed, size)
        if how == "forward":
            self.model(x)
            self.waiting += 1
            return
        before = self.snapshot()
        self.model.train(how != "eval")
        statistics = copy.deepcopy(self.model.norm.state_dict())
        with torch.no_grad():
            logits = self.model(x)
            loss = self.fsr.loss(logits, y, index)
        self.model.norm.load_state_dict(statistics)
        self.model.train()
        assert_close(loss, nn.functional.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing), 1e-6)
        assert self.snapshot() == before

    @rule()
    def step_alone(self) -> None:
        self.finish()

    @rule()
    def zero_grad(self) -> None:
        self.fsr.zero_grad()
        assert all(parameter.grad is None for parameter in self.model.parameters())
        self.sums = {}

    @rule(rate=st.sampled_from([0.05, 0.3, 0.8]))
    def another_rate(self, rate: float) -> None:
        for group in self.fsr.param_groups:
            group["lr"] = rate
        self.lr = self.oracle.rate = rate

    @precondition(lambda self: not hasattr(self.model, "extra"))
    @rule()
    def add_param_group(self) -> None:
        self.model.extra = nn.Parameter(torch.zeros(2, dtype=torch.float64 if self.setup.double else torch.float32))
        self.fsr.add_param_group({"params": [self.model.extra], "lr": self.lr})
        assert self.fsr.optimizer.param_groups[-1]["params"][0] is self.model.extra

    @rule()
    def end_epoch(self) -> None:
        epoch = self.oracle.epoch
        self.fsr.end_epoch()
        self.oracle.end_epoch()
        if self.oracle.epoch > epoch:
            self.compare_epoch()

    @precondition(lambda self: self.config.selects and self.oracle.epoch > 0 and not self.oracle.judging)
    @rule(wrong=st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0]), min_size=6, max_size=6))
    def judge_at_once(self, wrong: list[float]) -> None:
        """As if the network had begun to learn by heart: in runs this small it seldom does."""
        memory, oracle = self.fsr._memory, self.oracle
        known = memory.selection
        assert known is not None
        known.active = known.estimated = oracle.judging = oracle.estimated = oracle.told = True
        known.share.copy_(torch.tensor(wrong[: self.setup.classes]))
        known._judge(memory.table.score[:-1], memory.given.known().long())
        oracle.wrong = known.share.tolist()
        oracle.judge()
        self.compare_weights()

    @precondition(lambda self: self.config.selects and self.oracle.epoch > 0 and not self.oracle.judging)
    @rule(seed=seeds, size=sizes)
    def learn_by_heart(self, seed: int, size: int) -> None:
        """A step as if it had been seen that the network does, where few labels are wrong: in runs this small it seldom
        is."""
        memory, oracle = self.fsr._memory, self.oracle
        assert memory.selection is not None
        memory.selection.begun = oracle.held_early = True
        memory.selection.down, oracle.highest, oracle.down_to = 0.75, 1.6, 1.3
        memory.selection.highest_rate = 1.6
        DONE["held"] += memory.margin is None
        self.step(seed, size)

    @rule()
    def metrics(self) -> None:
        if not self.fsr._memory.ready:
            assert self.fsr.metrics() == {}
            return
        found, expected = self.fsr.metrics(), self.oracle.metrics()
        assert found.keys() == expected.keys()
        for name in expected:
            if self.setup.double or name not in ("fsr/zero_weight_ratio", "fsr/all_zero_batches"):  # of a score near 0
                assert_close(number(found[name]), number(expected[name]), 1e-6 if self.setup.double else 0.02)

    # --- state

    def snapshot(self) -> Any:
        """All that must stay as it was, bit by bit."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return frozen([dict(self.model.state_dict()), self.fsr.state_dict(), gradients])

    @rule(how=st.sampled_from(WAYS), seed=seeds, size=sizes)
    def go_on_elsewhere(self, how: str, seed: int, size: int) -> None:
        """A run that is stopped and goes on elsewhere stays equal, bit by bit, to the one that was not stopped."""
        self.zero_grad()
        before, old = self.snapshot(), (self.model, self.fsr)
        if how == "deepcopy":
            self.model, self.fsr = copy.deepcopy(old)
        elif how == "pickle":
            self.model, self.fsr = pickle.loads(pickle.dumps(old))
        else:
            self.model, self.fsr = self.setup.build()
            if hasattr(old[0], "extra"):
                self.add_param_group()
            self.model.load_state_dict(old[0].state_dict())
            with tempfile.TemporaryDirectory() as folder:
                self.carry_over(old[1], how, Path(folder))
        assert self.snapshot() == before
        self.waiting = 0
        x, y, index = self.batch(seed, size)
        old[1].loss(old[0](x), y, index).backward()
        self.loss(Batch(x, y, index.tolist(), y.tolist()), self.model(x), y)
        new = self.model, self.fsr
        (self.model, self.fsr), after = old, self.snapshot()
        self.model, self.fsr = new
        assert self.snapshot() == after
        self.finish()

    def carry_over(self, old: FSRWrapper, how: str, folder: Path) -> None:
        state = old.state_dict()
        if how == "save":
            old.save(folder)
            self.fsr.load(folder)
            return
        if how == "file":
            torch.save(state, folder / "state.pt")
            state = torch.load(folder / "state.pt", weights_only=True)
        self.fsr.load_state_dict(state)

    @rule()
    def a_plain_checkpoint(self) -> None:
        """FSR starts afresh, the optimizer goes on."""
        self.fsr.load_state_dict(self.fsr.optimizer.state_dict())
        self.new_oracle()

    # --- what is refused

    @rule(case=st.sampled_from(sorted(REFUSED)), seed=seeds, size=st.integers(2, 9), then=st.booleans())
    def refused(self, case: str, seed: int, size: int, then: bool) -> None:
        x, y, index = self.batch(seed, size)
        logits = self.model(x)
        arguments = {"logits": logits, "target": y, "index": index}
        REFUSED[case](arguments, len(y), self.setup.classes)
        before = self.snapshot()
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            self.fsr.loss(**arguments)
        assert self.snapshot() == before
        self.waiting += 1
        if then:
            self.loss(Batch(x, y, index.tolist(), y.tolist()), logits, y)
            self.finish()

    @rule(seed=seeds, size=st.integers(2, 9))
    def refused_the_second_time(self, seed: int, size: int) -> None:
        x, y, index = self.batch(seed, size)
        logits = self.model(x)
        self.loss(Batch(x, y, index.tolist(), y.tolist()), logits, y)
        before = self.snapshot()
        with pytest.raises(RuntimeError, match="no forward"):
            self.fsr.loss(logits, y, index)
        assert self.snapshot() == before
        self.finish()

    @precondition(lambda self: self.config.nonfinite == "raise" and not self.setup.norm)
    @rule(seed=seeds, size=sizes, bad=st.sampled_from([torch.nan, torch.inf]), where=st.integers(0, 8))
    def refused_input(self, seed: int, size: int, bad: float, where: int) -> None:
        x, y, index = self.batch(seed, size)
        x[where % len(x)] = bad
        logits, before = self.model(x), self.snapshot()
        with pytest.raises(ValueError, match="NaN or infinite"):
            self.fsr.loss(logits, y, index)
        assert self.snapshot() == before
        self.waiting += 1

    @rule(seed=seeds, size=st.integers(2, 9))
    def refused_mixing(self, seed: int, size: int) -> None:
        x, y, _ = self.batch(seed, size)
        before = self.snapshot()
        for inputs, labels in ((x.long(), y), (x, y[1:]), (x, y.double()), ([0.0], y)):
            with pytest.raises((ValueError, TypeError)):
                self.fsr.mixup(inputs, labels)
        assert self.snapshot() == before

    @rule(case=st.sampled_from(["no file", "no file of ours", "newer", "dictionary", "reward", "N", "rule"]))
    def refused_state(self, case: str) -> None:
        before, state = self.snapshot(), self.fsr.state_dict()
        own = state["fsr"]
        if case == "newer":
            own["version"] += 1
        elif case == "dictionary":
            own["config"]["dictionary_size"] += 1
        elif case == "reward":
            own["config"]["reward"] = {"cached": "fresh", "fresh": "cached"}[self.config.reward]
        elif case == "rule":
            own["config"]["weight_rule"] = "clip" if self.config.selects else "select"
        elif case == "N" and self.setup.known:
            own["num_samples"] += 1
        with tempfile.TemporaryDirectory() as folder:
            if case == "no file of ours":
                (Path(folder) / "fsr.safetensors").write_bytes(b"nothing of the kind")
            by_file = "file" in case or (case == "N" and not self.setup.known)
            load, of = (self.fsr.load, folder) if by_file else (self.fsr.load_state_dict, state)
            with pytest.raises((ValueError, FileNotFoundError)):
                load(of)
        assert self.snapshot() == before

    # --- after each of these

    @invariant()
    def the_same_is_known(self) -> None:
        DONE["operations"] += 1
        fsr, oracle = self.fsr, self.oracle
        assert fsr.epoch == oracle.epoch
        assert fsr.is_reweighting == oracle.active
        if not fsr._memory.ready:
            assert not oracle.samples
            return
        visited = {i: sample for i, sample in oracle.samples.items() if sample.epoch >= 0}
        expected = torch.full((len(fsr.scores),), torch.nan)
        for i, sample in visited.items():
            expected[i] = sample.score
        assert_close(fsr.scores, expected, 1e-6)
        assert fsr.dictionary.index.tolist() == list(oracle.members)
        assert fsr.dictionary.label.tolist() == [entry.label for entry in oracle.members.values()]
        assert fsr.dictionary.score.tolist() == [entry.score for entry in oracle.members.values()]


@pytest.mark.filterwarnings("ignore::UserWarning")  # FSR rightly has its doubts about such runs
@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize("case", range(len(PUSHERS)))
def test_the_library_and_its_plain_twin_agree_on_whatever_is_called(case: int, selects: bool) -> None:
    DONE.clear()
    machine = type("Training", (Training,), {"case": case, "selects": selects})
    run_state_machine_as_test(
        machine if EXAMPLES else seed(case + 10)(machine),
        settings=settings(
            max_examples=EXAMPLES or 10,
            stateful_step_count=30,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(DONE))
    assert DONE["steps"] > 80
    assert DONE["judged" if selects else "re-weighted"] > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_repeat_in_a_batch_takes_no_pseudo_label() -> None:
    """Nor does it from one batch to the next of an epoch: what sampling repeats is not re-labelled twice."""
    setup = Setup(
        "linear", False, "head", 4, 4, 10, True, None, 0.0, True, 0, {"dictionary_size": 4, "warmup_epochs": 1, **PAPER}
    )
    model, fsr = setup.build()
    x, y = torch.randn(10, INPUTS, dtype=torch.float64), torch.arange(10) % 4
    fsr.loss(model(x), y, torch.arange(10))
    index = torch.tensor([3, 3, 5])
    logits = model(x[index])
    loss = fsr.loss(logits, y[index], index)
    stored = (
        torch.stack([logits.new_tensor(model(x[i : i + 1]).tolist()[0]) * 0.9 for i in index.tolist()]).half().double()
    )
    pseudo = (stored / (stored.square().mean() + 1e-8).sqrt()).softmax(1)
    terms = -(pseudo * logits.log_softmax(1)).sum(1) * 2 / 3
    weighted = (fsr.weights * nn.functional.cross_entropy(logits, y[index], reduction="none")).sum()
    assert_close(loss, weighted + terms[0] + terms[2])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_logits_of_other_classes_are_refused_after_a_plain_checkpoint_too() -> None:
    setup = Setup("linear", False, "head", 4, 4, 10, True, None, 0.0, True, 0, {"dictionary_size": 4})
    model, fsr = setup.build()
    x, y = torch.randn(10, INPUTS, dtype=torch.float64), torch.arange(10) % 4
    fsr.loss(model(x), y, torch.arange(10))
    fsr.load_state_dict(fsr.optimizer.state_dict())
    logits, before = model(x), frozen(fsr.state_dict())
    with pytest.raises(ValueError, match="but the logits are"):
        fsr.loss(torch.zeros(10, 5, dtype=torch.float64), y, torch.arange(10))
    assert frozen(fsr.state_dict()) == before
    fsr.loss(logits, y, torch.arange(10))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_state_after_a_batch_that_shows_the_partners_loads() -> None:
    setup = Setup("linear", False, "head", 4, 4, 10, True, None, 0.0, True, 0, {"dictionary_size": 4})
    model, fsr = setup.build()
    x, y = torch.randn(6, INPUTS, dtype=torch.float64), torch.arange(6) % 4
    target = nn.functional.one_hot((y + 1) % 4, 4).double()
    fsr.loss(model(x), target, torch.arange(6), label=y)
    _, other = setup.build()
    other.load_state_dict(fsr.state_dict())
    assert frozen(other.state_dict()) == frozen(fsr.state_dict())
    other.end_epoch()
    assert len(other.dictionary) == 0
