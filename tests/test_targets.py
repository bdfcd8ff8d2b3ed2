"""Targets: what is no class distribution, who mixed it, and which class a sample has."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLIP
from pandas.testing import assert_frame_equal
from test_numbers import everything_finite
from test_wrapper import CLASSES, N, Net, digits, frozen, make, snapshot, step
from torch import Tensor, nn

from fsr_wrap import FSRWrapper
from fsr_wrap.checks import Watch, describe_targets, find_problems
from fsr_wrap.mixing import is_pure

# --- class distributions ---------------------------------------------------------------------------------------------


def hot(*rows: list[int]) -> Tensor:
    return torch.stack([sum(F.one_hot(torch.tensor(c), CLASSES) for c in row) for row in rows]).float()


REFUSED: dict[str, tuple[Tensor, str]] = {
    "multi-hot": (hot([1, 2], [3], [4, 5, 6]), "rows of 1 to 3 ones, as where a sample may have several labels"),
    "no label": (hot([1], [1, 2]) * torch.tensor([[0.0], [1.0]]), "rows of 0 to 2 ones"),
    "regression": (torch.tensor([[3.5, -1.2, *[0.0] * 8], [1.0] * 10]), r"values in \[-1.2, 3.5\], as of regression"),
    "scaled": (0.5 * hot([1], [2]), "rows that sum to 0.5[.]"),
    "off": (torch.full((2, 10), 0.11), "rows that sum to 1.1[.]"),
    "sigmoid": (torch.tensor([[0.9, 0.6, *[0.0] * 8], [0.4, *[0.0] * 9]]), "rows that sum to 0.4 to 1.5"),
    "NaN": (torch.full((2, 10), torch.nan), r"values in \[nan, nan\]"),
    "infinite": (torch.full((2, 10), torch.inf), "values in"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_targets_that_are_no_class_distribution_are_refused(case: str, nonfinite: str) -> None:
    rows, message = REFUSED[case]
    model, fsr = make(norm=False, nonfinite=nonfinite)
    x, y, _ = digits()
    logits = model(x[: len(rows)])
    before = snapshot(model, fsr)
    with pytest.raises(ValueError, match=f"no class distribution: .*{message}.* int64 class numbers"):
        fsr.loss(logits, rows, torch.arange(len(rows)), label=y[: len(rows)])
    assert snapshot(model, fsr) == before
    fsr.loss(logits, y[: len(rows)], torch.arange(len(rows)))  # the forward serves on


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [10, 1000, 20_000])
def test_class_distributions_of_any_precision_are_taken(dtype: torch.dtype, classes: int) -> None:
    """Smoothed and mixed in their own precision, and softmax outputs."""
    y, share = torch.randint(classes, (64,)), torch.rand(64, 1).to(dtype)
    smooth = F.one_hot(y, classes).to(dtype) * 0.9 + 0.1 / classes
    for target in (
        smooth,
        share * smooth + (1 - share) * smooth.flip(0),
        torch.randn(64, classes).softmax(1).to(dtype),
    ):
        logits = torch.zeros(64, classes)
        problems, _, valid = find_problems(logits, (), target, y, torch.arange(64), 64)
        assert valid.all(), problems


def test_the_watch_tells_of_targets_later_what_it_tells_at_once() -> None:
    """As on an accelerator: numbers alone arrive, in a later batch."""
    target = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    empty = torch.zeros(2, dtype=torch.int64)
    problems, details, valid = find_problems(torch.zeros(2, 2), (), target, empty, empty, 4)
    assert valid.tolist() == [False, True]
    messages: dict[str, Any] = {"label": "a", "index": "b", "target": describe_targets, "non-finite": "c"}
    counts = torch.stack([value.float() for value in (*problems.values(), *details.values())])
    with pytest.raises(ValueError, match=r"1 samples of the batch have soft .* rows of 1 to 2 ones.* earlier"):
        Watch._raise(counts, {name: messages[name] for name in problems}, list(details), " (in an earlier batch)")


# --- mixed by somebody else ------------------------------------------------------------------------------------------


def mixers() -> dict[str, Any]:
    """Mixed inputs and targets of timm's Mixup and CutMix, torchvision's MixUp, and by hand."""
    timm = pytest.importorskip("timm.data")
    v2 = pytest.importorskip("torchvision.transforms.v2")
    options = {"num_classes": CLASSES, "label_smoothing": 0.1}

    def by_hand(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hard = F.one_hot(y, CLASSES).float()
        return 0.3 * x + 0.7 * x.flip(0), 0.3 * hard + 0.7 * hard.flip(0)

    return {
        "timm mixup": timm.Mixup(mixup_alpha=0.8, mode="batch", **options),
        "timm cutmix": timm.Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem", **options),
        "torchvision": v2.MixUp(alpha=0.8, num_classes=CLASSES),
        "by hand": by_hand,
    }


@pytest.mark.parametrize("options", [{}, CLIP], ids=["select", "clip"])
@pytest.mark.parametrize("how", ["timm mixup", "timm cutmix", "torchvision", "by hand"])
def test_the_dictionary_has_the_samples_own_labels(how: str, options: dict[str, Any]) -> None:
    """And so has what judges them."""
    mix = mixers()[how]
    model, fsr = make(norm=False, **options)
    x, y, _ = digits(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for index in torch.randperm(N).split(50):
                mixed, target = mix(x[index].view(-1, 1, 8, 8).clone(), y[index])
                loss = fsr.loss(model(mixed.reshape(-1, 64)), target, index, label=y[index])
                loss.backward()
                fsr.step()
                fsr.zero_grad()
                assert loss.isfinite()
    assert fsr.epoch == 3
    assert torch.equal(fsr.dictionary.label, y[fsr.dictionary.index])
    assert len(fsr.dictionary) > 40 or how == "by hand"
    known = fsr._memory.given.known()
    assert torch.equal(known[known >= 0].long(), y[known >= 0])
    assert (known >= 0).any()


def test_a_sample_stands_for_its_class_only_where_its_target_says_so() -> None:
    """λ = 0.3: the image is mostly the partner's, so nothing of it may stand in the dictionary as the sample's own."""
    model, fsr = make(norm=False)
    x, y, _ = digits()
    index, partner = torch.arange(50), torch.arange(50).flip(0)
    hard = F.one_hot(y[:50], CLASSES).float()
    for share, expected in ((0.3, y[index] == y[partner]), (0.7, torch.ones(50, dtype=torch.bool))):
        mixed, target = share * x[index] + (1 - share) * x[partner], share * hard + (1 - share) * hard[partner]
        fsr.loss(model(mixed), target, index, label=y[index])
        fsr.end_epoch()
        assert sorted(fsr.dictionary.index.tolist()) == index[expected].tolist()


def test_mixed_targets_without_labels_are_said_once() -> None:
    model, fsr = make()
    x, y, _ = digits()
    soft = F.one_hot(y, CLASSES).float()
    soft[130:] = 0.6 * soft[130:] + 0.4 * soft[130:].flip(0)
    first, *others = torch.arange(N).split(50)
    step(model, fsr, x[first], soft[first], first)
    step(model, fsr, x[others[0]], soft[others[0]], others[0])

    def train() -> None:
        for index in others[1:] * 3:
            step(model, fsr, x[index], soft[index], index)

    with pytest.warns(UserWarning, match=r"judges none of them.*loss\(logits, target, index, label=y\)") as told:
        train()
    assert len(told) == 1
    known = fsr._memory.given.known()
    mixed = soft.amax(1) < 1
    assert torch.equal(known >= 0, ~mixed)
    assert torch.equal(known[~mixed].long(), y[~mixed])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_targets_of_one_class_alone(classes: int, smoothing: float) -> None:
    """Two classes that are mixed look like one that is smoothed much."""
    hard = torch.eye(classes)
    smooth = (1 - smoothing) * hard + smoothing / classes
    pure = smoothing == 0 or smoothing / classes <= 0.1
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert is_pure(smooth.to(dtype)).tolist() == [pure] * classes
        assert not is_pure((0.7 * smooth + 0.3 * smooth.roll(1, 0)).to(dtype)).any()
    assert not is_pure(torch.full((1, classes), 1 / classes)).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_targets_are_class_numbers(smoothing: float) -> None:
    x, y, _ = digits(0.3)
    runs = []
    for soft in (False, True):
        model, fsr = make(**({} if soft else {"label_smoothing": smoothing}))
        for index in torch.arange(N).split(50) * 3:
            smooth = (1 - smoothing) * F.one_hot(y[index], CLASSES).float() + smoothing / CLASSES
            step(model, fsr, x[index], smooth if soft else y[index], index)
        runs.append(fsr)
    assert runs[1].is_reweighting
    assert_frame_equal(*(fsr.label_issues() for fsr in runs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, CLIP], ids=["select", "clip"])
def test_labels_and_own_mixup_agree_or_are_refused(options: dict[str, Any]) -> None:
    runs = []
    for given in (False, True):
        model, fsr = make(**options)
        x, y, _ = digits(0.3)
        for index in torch.arange(N).split(50) * 2:
            mixed, target = fsr.mixup(x[index], y[index])
            fsr.loss(model(mixed), target, index, label=y[index].clone() if given else None).backward()
            fsr.step()
            fsr.zero_grad()
        runs.append(snapshot(model, fsr))
    assert runs[0] == runs[1]
    mixed, target = fsr.mixup(x[:50], y[:50])
    with pytest.raises(ValueError, match="another than mixup"):
        fsr.loss(model(mixed), target, torch.arange(50), label=(y[:50] + 1) % CLASSES)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.zeros(49, dtype=torch.int64), "label must be int64 class numbers of shape"),
        (torch.zeros(50), "float32 of shape"),
        ([0] * 50, "each sample's own, not list"),
        (torch.full((50,), CLASSES), "label outside"),
    ],
)
def test_bad_labels_are_refused(label: Any, message: str) -> None:
    model, fsr = make(norm=False)
    x, y, _ = digits()
    logits, target = model(x[:50]), F.one_hot(y[:50], CLASSES).float()
    before = snapshot(model, fsr)
    with pytest.raises(ValueError, match=message):
        fsr.loss(logits, target, torch.arange(50), label=label)
    assert snapshot(model, fsr) == before


# --- FSR's own mixup -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CLIP], ids=["select", "clip"])
def test_mixup_that_raises_or_is_not_used_leaves_no_trace(options: dict[str, Any]) -> None:
    runs = []
    for disturbed in (False, True):
        model, fsr = make(norm=False, **options)
        model.fc = nn.Sequential(model.fc)  # type: ignore[assignment]
        fsr = FSRWrapper(model, fsr.optimizer, "fc", num_samples=N, config=fsr.config)
        x, y, _ = digits(0.3)
        before = snapshot(model, fsr)
        if disturbed:
            with pytest.raises(RuntimeError, match="number of classes"):
                fsr.mixup(x[:50], y[:50])
            assert snapshot(model, fsr) == before
        for number, index in enumerate(torch.arange(N).split(50) * 2):
            if disturbed and number:
                before = frozen(fsr.state_dict())
                fsr.mixup(x[:50], y[:50])
                assert frozen(fsr.state_dict()) == before
            if number % 3:
                step(model, fsr, x[index], y[index], index)
            else:
                soft = F.one_hot(y[index], CLASSES).float()
                fsr.loss(model(x[index]), soft, index, label=y[index]).backward()
                fsr.step()
                fsr.zero_grad()
        step(model, fsr, *fsr.mixup(x[:50], y[:50]), torch.arange(50)) if not disturbed else None
        runs.append(snapshot(model, fsr) if not disturbed else None)
        if disturbed:
            fresh = [mix for mix in fsr._reweighting.intake._mixer._waiting if mix.position == (fsr.epoch, 0)]
            assert not fresh
            step(model, fsr, *fsr.mixup(x[:50], y[:50]), torch.arange(50))
            runs[-1] = snapshot(model, fsr)
    assert runs[0] == runs[1]


def test_mixup_draws_anew_at_every_call_and_step() -> None:
    model, fsr = make()
    x, y, _ = digits()
    drawn = [fsr.mixup(x[:50], y[:50])[0] for _ in range(3)]
    for number in range(3):
        step(model, fsr, *fsr.mixup(x[:50], y[:50]), torch.arange(50) + 50 * number)
        drawn.append(fsr.mixup(x[:50], y[:50])[0])
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


def test_mixed_inputs_with_class_numbers_are_refused() -> None:
    model, fsr = make()
    x, y, _ = digits()
    mixed, _ = fsr.mixup(x[:50], y[:50])
    with pytest.raises(ValueError, match="as mixup"):
        fsr.loss(model(mixed), y[:50], torch.arange(50))


class Squares(Net):
    """Finite on average: x and −x of a mixed pair may be small where their squares are not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(
            torch.tanh(self.body(x) * self.body(x).square().sum(1, keepdim=True)).nan_to_num(0.0) + x[:, :32]
        )


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_clean_features_that_are_not_finite_reach_no_table(nonfinite: str) -> None:
    class Model(nn.Module):
        """The head bounds its input, so that nothing shows in the logits."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Sequential(nn.Tanh(), nn.Linear(64, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * x)

    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    options = {**CLIP, "dictionary_size": 100, "nonfinite": nonfinite, "seed": 3}
    fsr = FSRWrapper(model, inner, "fc", num_samples=N, **options)
    x, y, _ = digits()
    x = x.clone()
    step(model, fsr, x[:50], y[:50], torch.arange(50))
    x[50:100] = -1.8e19  # squares overflow where a sample is not mixed with another of the other sign
    x[50:100:2] = 1.9e19
    mixed, target = fsr.mixup(x[50:100], y[50:100])
    x_small = torch.where(mixed.abs() < 1.8e19, mixed, 0)
    mixed.copy_(x_small)  # those of one sign
    logits, before = model(mixed), snapshot(model, fsr)
    assert logits.isfinite().all()
    if nonfinite == "raise":
        with pytest.raises(ValueError, match="NaN or infinite"):
            fsr.loss(logits, target, torch.arange(50, 100))
        assert snapshot(model, fsr) == before
    else:
        fsr.loss(logits, target, torch.arange(50, 100))
        assert fsr.metrics()["fsr/skipped_samples"] == 25
    assert everything_finite(fsr)
    fsr.end_epoch()
    assert everything_finite(fsr)
    train_again = torch.arange(100, 150)
    step(model, fsr, x[train_again], y[train_again], train_again)
