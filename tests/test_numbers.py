"""Numbers: the dtypes and devices of what FSR makes, what is not finite, seeds, indices; and what is said once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLIP, judge_soon
from test_wrapper import CLASSES, N, Net, digits, make, snapshot, step, train
from torch import Tensor, nn

from fsr_wrap import FSRWrapper
from fsr_wrap.dictionary import RewardDictionary
from fsr_wrap.pushers import ScoreTable
from fsr_wrap.step import Reweighting

# --- dtypes and devices ----------------------------------------------------------------------------------------------


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"nonfinite": "skip", "relabel_storage": "int8", "label_smoothing": 0.1},
    {"num_samples": None, "samples_per_epoch": N, "relabel_storage": 3, "pusher": "negative_loss"},
    CLIP,
    {**CLIP, "reward": "fresh", "weight_rule": "shift", "label_smoothing": 0.1},
    {**CLIP, "nonfinite": "skip", "relabel_storage": "int8", "reward_every": 3, "pusher": "meta_margin"},
    {**CLIP, "num_samples": None, "samples_per_epoch": N, "relabel_storage": 3, "pusher": "authors_margin"},
]


def one_run(**options: Any) -> tuple[nn.Module, FSRWrapper]:
    """An epoch and a half, with MixUp now and then, and with a copy through a state dict in between."""
    model, fsr = make(**options)
    x, y, _ = digits(0.3)
    x, y = x.to("cpu"), y.to("cpu")
    for number in range(12):
        index = (torch.arange(50, device="cpu") + 50 * number) % N
        given = (x[index], y[index]) if number % 3 else fsr.mixup(x[index], y[index])
        step(model, fsr, *given, index.tolist() if number % 2 else index)  # type: ignore[arg-type]
        if number == 9:
            state = copy.deepcopy(fsr.state_dict())
            fsr = FSRWrapper(model, fsr.optimizer, config=fsr.config, **sizes(options))
            fsr.load_state_dict(state)
    fsr.metrics()
    return model, fsr


def sizes(options: dict[str, Any]) -> dict[str, Any]:
    names = ("num_samples", "samples_per_epoch")
    return {"num_samples": N, **{name: options[name] for name in names if name in options}}


@pytest.mark.parametrize("options", OPTIONS)
def test_tables_do_not_follow_the_defaults_of_torch(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same float32 model under another default dtype or device: equal bit by bit."""
    digits(0.3)

    def build(*args: Any, **kwargs: Any) -> Any:
        with defaults():
            return Net(*args, **kwargs)

    monkeypatch.setattr("test_wrapper.Net", build)
    expected = snapshot(*one_run(**options))
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "cpu"), (None, "meta")):
        with defaults(dtype or torch.float32, device):
            found = snapshot(*one_run(**options))
        assert found == expected, (dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, CLIP, {**CLIP, "reward": "fresh"}], ids=["select", "cached", "fresh"])
def test_true_precision_as_lightning_has_it(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """`bf16-true` and `64-true`: the model converted, and torch's default dtype set around each training step."""
    model, fsr = make(**options)
    model.to(dtype)
    x, y, _ = digits(0.3)
    for number in range(24):
        index = torch.arange(50) + 50 * (number % 8)
        with defaults(dtype):
            loss = fsr.loss(model(x[index].to(dtype)), y[index], index)
            loss.backward()
        fsr.step()
        fsr.zero_grad()
    assert fsr.is_reweighting
    assert fsr.scores.dtype == torch.float32
    assert fsr.scores.isfinite().all()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == fsr.weights.dtype == wide
    assert not options or fsr.dictionary.draw(5).payload[0].dtype == dtype


def test_a_gradient_that_serves_several_steps_follows_the_dtype() -> None:
    model, fsr = make(**CLIP, reward_every=3)
    train(model, fsr, 1)
    x, y, _ = digits()
    step(model, fsr, x[:50], y[:50], torch.arange(50))
    model.double()
    step(model, fsr, x[50:100].double(), y[50:100], torch.arange(50, 100))
    assert fsr.weights.dtype == torch.float64


# --- numbers that are not finite -------------------------------------------------------------------------------------


def everything_finite(fsr: FSRWrapper) -> bool:
    """P̂ of what was visited, ŷ, and the score and payload of every candidate and member."""
    state = fsr.state_dict()["fsr"]
    tables = [state["table"]["score"][state["table"]["epoch"] >= 0]]
    if "pseudo" in state:
        tables += [column.float() for column in state["pseudo"].values()]
    for name in ("members", "best", "buffer"):
        entries = state["dictionary"][name]
        used = entries["index"] >= 0
        tables += [entries["score"][used], *(arena[entries["row"][used]] for arena in state["dictionary"]["arena"])]
    return all(bool(table.isfinite().all()) for table in tables)


@pytest.mark.parametrize("options", [{}, CLIP])
@pytest.mark.parametrize("pusher", ["area_under_margin", "negative_loss", "meta_margin"])
def test_logits_that_float32_does_not_hold(pusher: str, options: dict[str, Any]) -> None:
    model, fsr = make(norm=False, **options, pusher=pusher)
    model.double()
    with torch.no_grad():
        model.fc.weight.mul_(1e40)
    x, y, _ = digits()
    for index in torch.arange(N).split(50):
        logits = model(x[index].double())
        assert logits.isfinite().all()
        fsr.loss(logits, y[index], index)
    assert everything_finite(fsr)
    assert fsr.dictionary.score.isfinite().all()


def test_a_moving_average_does_not_overflow() -> None:
    table = ScoreTable(3, 0.1)
    index = torch.arange(3)
    for epoch, sign in enumerate((1, -1, 1, -1)):
        table.update(index, sign * torch.tensor([1.6e38, 2.5e38, 1e3]), epoch)
        assert table.score[[0, 2]].isfinite().all()
    assert table.score[1].isnan()


def test_scores_that_are_not_finite_stay_out_of_the_dictionary() -> None:
    dictionary = RewardDictionary(2, 4)
    scores = torch.tensor([1.0, torch.inf, torch.nan, 1e40, -torch.inf, 0.5], dtype=torch.float64)
    dictionary.push(torch.arange(6), torch.zeros(6, dtype=torch.int64), scores, (torch.randn(6, 3),))
    dictionary.update()
    assert dictionary.index.tolist() == [0, 5]


def test_a_first_batch_in_half_precision_does_not_bound_the_others() -> None:
    model, fsr = make(norm=False, **CLIP)
    x, y, _ = digits()
    with torch.autocast("cpu", torch.float16):
        logits = model(x[:50])
    fsr.loss(logits, y[:50], torch.arange(50))
    with torch.no_grad():
        model.body.weight.mul_(1e6)
    for index in torch.arange(50, N).split(50):
        fsr.loss(model(x[index]), y[index], index)
    with torch.autocast("cpu", torch.bfloat16):
        fsr.loss(model(x[:50] * 1e-6), y[:50], torch.arange(50))
    payload = fsr.dictionary.draw(200).payload[0]
    assert payload.isfinite().all()
    assert payload.max() > torch.finfo(torch.float16).max
    assert everything_finite(fsr)


class Masked(Net):
    """Two classes are masked, by the smallest number there is."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.fc = nn.Sequential(nn.Linear(32, CLASSES), Mask())  # type: ignore[assignment]


class Mask(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.masked_fill(torch.arange(CLASSES) > CLASSES - 3, torch.finfo(z.dtype).min)


@pytest.mark.parametrize("rule", [{}, CLIP])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_logits_whose_sum_overflows_are_finite(nonfinite: str, rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Masked()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    options = {**rule, "dictionary_size": 100, "relabel_weight": 0.0, "nonfinite": nonfinite}
    fsr = judge_soon(FSRWrapper(model, inner, "fc", num_samples=N, **options), CLASSES)
    x, y, _ = digits()
    for index in (torch.arange(N).split(50)) * 2:
        logits, target = model(x[index]), y[index] % (CLASSES - 2)
        loss = fsr.loss(logits, target, index)
        if fsr.epoch == 0 and rule:
            torch.testing.assert_close(loss, F.cross_entropy(logits, target))
        loss.backward()
        fsr.step()
        fsr.zero_grad()
    assert fsr.metrics()["fsr/skipped_samples"] == 0
    assert fsr.scores.isfinite().all()
    assert everything_finite(fsr)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not rule or fsr.weights.sum() == pytest.approx(1, abs=1e-5)


def test_weights_sum_to_one_however_small_the_scores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, scores = [], Reweighting._scores
    for rate in (1.0, 1e-9):
        monkeypatch.setattr(Reweighting, "_scores", lambda *a, r=rate: (r * scores(*a)[0], *scores(*a)[1:]))
        model, fsr = make(**CLIP)
        train(model, fsr, 2, 0.3)
        sums.append(fsr.weights.sum().item())
    assert sums == pytest.approx([1, 1], abs=1e-5)


# --- seeds and indices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{}, CLIP])
@pytest.mark.parametrize("seed", [4_500_000_000, 2**63, 10**40])
def test_seeds_may_be_large(seed: int, rule: dict[str, Any]) -> None:
    model = Net()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    fsr = FSRWrapper(model, inner, num_samples=N, seed=seed, dictionary_size=100, **rule)
    train(model, fsr, 2)
    x, y, _ = digits()
    step(model, fsr, *fsr.mixup(x[:50], y[:50]), torch.arange(50))
    assert fsr.epoch == 2


def test_a_huge_index_leaves_the_wrapper_as_it_was() -> None:
    model, fsr = make(num_samples=None, norm=False)
    x, y, _ = digits()
    huge = torch.arange(50)
    huge[3] = 2_000_000_000
    for start in (0, 50):
        before = snapshot(model, fsr)
        with pytest.raises(ValueError, match=r"with_index\(dataset\) does; pass dataset= or num_samples="):
            fsr.loss(model(x[:50]), y[:50], huge)
        model.zero_grad()
        assert snapshot(model, fsr) == before
        index = torch.arange(50) + start
        step(model, fsr, x[index], y[index], index)
    assert len(fsr.scores) == 128


@pytest.mark.parametrize("first", [True, False])
def test_tables_that_do_not_fit_leave_the_wrapper_as_it_was(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fsr = make(num_samples=None, norm=False)
    x, y, _ = digits()
    zeros = torch.zeros

    def full(*size: Any, **kwargs: Any) -> Tensor:
        if size and size[0] == 2**20 + 1:
            raise RuntimeError("out of memory")
        return zeros(*size, **kwargs)

    if not first:
        step(model, fsr, x[:50], y[:50], torch.arange(50))
    large = torch.arange(50)
    large[3] = 2**20 - 1
    before, logits = snapshot(model, fsr), model(x[:50])
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(MemoryError, match="do not count them from 0"):
        fsr.loss(logits, y[:50], large)
    assert snapshot(model, fsr) == before
    fsr.loss(logits, y[:50], torch.arange(50, 100))  # the same forward serves
    assert len(fsr.scores) == 128


def test_skipped_samples_make_no_tables_grow() -> None:
    model, fsr = make(num_samples=None, norm=False, nonfinite="skip")
    x, y, _ = digits()
    x = x.clone()
    x[3] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, fsr, x[:50], y[:50], torch.arange(50))
    assert len(fsr.scores) == 64
    assert fsr.scores[3].isnan()
    assert everything_finite(fsr)


# --- reminders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_steps_without_loss_are_said_once(known: bool) -> None:
    model, fsr = make(num_samples=N if known else None)
    x, y, _ = digits()

    def plain(batches: int) -> None:
        for number in range(batches):
            if known:
                index = torch.arange(50) + 50 * (number % 8)
                F.cross_entropy(model(x[index]), y[index]).backward()
            fsr.step()
            fsr.zero_grad()

    enough = 8 if known else 1000
    step(model, fsr, x[:50], y[:50], torch.arange(50))
    plain(enough - 1)
    step(model, fsr, x[50:100], y[50:100], torch.arange(50, 100))  # starts the count anew
    plain(enough - 1)
    with pytest.warns(UserWarning, match=f"{enough} steps, about an epoch, without loss"):
        plain(1)
    plain(2 * enough)


@pytest.mark.parametrize("batch_size", [64, 150])
def test_epochs_that_drift_from_the_loaders_are_said_once(batch_size: int) -> None:
    model, fsr = make()
    x, y, _ = digits()
    length = N // batch_size * batch_size

    def epochs(number: int) -> None:
        for _ in range(number):
            for index in torch.randperm(N)[:length].split(batch_size):
                step(model, fsr, x[index], y[index], index)

    with pytest.warns(UserWarning, match=f"samples_per_epoch={length} "):
        epochs(2)
    epochs(2)


@pytest.mark.parametrize("length", [50, 100, 200, 320])
def test_a_sampler_of_a_part_is_said_once(length: int) -> None:
    model, fsr = make()
    x, y, _ = digits()
    part = torch.randperm(N)[:length]

    def epochs(number: int) -> None:
        for _ in range(number):
            for index in part[torch.randperm(length)].split(64):
                step(model, fsr, x[index], y[index], index)

    with pytest.warns(UserWarning, match=f"came again after {length}, .* samples_per_epoch={length} "):
        epochs(9)
    epochs(9)


def test_padding_and_replacement_are_no_drift() -> None:
    x, y, _ = digits()
    order = torch.randperm(N)
    balanced = (1.0 / torch.bincount(y))[y].multinomial(448, True)
    for indices in (torch.cat([order, order[:48]]), torch.randint(N, (448,)), balanced, order.repeat_interleave(3)):
        model, fsr = make()
        for index in indices.split(64):
            step(model, fsr, x[index], y[index], index)
        assert fsr.epoch >= 1
