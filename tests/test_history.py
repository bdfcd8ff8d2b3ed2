"""What is told of each epoch: against sums by hand, on several processes, in states old and new."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLIP, assert_close
from processes import run
from test_distributed import build, global_batches
from test_distributed import train as train_shares
from test_wrapper import digits, make, step, train

from fsr_wrap import FSRWrapper, distributed
from fsr_wrap.history import NUMBERS

NAMES = {"epoch", "samples", "reweighting", *NUMBERS}
RULES: list[dict[str, Any]] = [{}, CLIP, {**CLIP, "weight_rule": "shift", "relabel_weight": 0.0}]
Epochs = list[dict[str, Any]]


def by_hand(fsr: FSRWrapper, model: torch.nn.Module, epochs: int) -> Epochs:
    """Trains, and says of each epoch what its batches tell one by one."""
    x, y, _ = digits(0.3)
    told: Epochs = []
    for epoch in range(epochs):
        weights, losses, rewards, active = [], [], [], fsr.is_reweighting
        for index in torch.randperm(400, generator=torch.Generator().manual_seed(epoch)).split(90):  # the last has 40
            fsr.metrics()
            step(model, fsr, x[index], y[index], index)
            found = fsr.metrics()
            weights.append(fsr.weights.double() * len(index))
            losses.append(found["fsr/loss"] * len(index))
            rewards.append(found["fsr/reward_loss"] * len(index))
        units = torch.cat(weights)
        missing = (1 - units).clamp(min=0)
        told.append(
            {
                "epoch": epoch,
                "samples": 400,
                "reweighting": active,
                "loss": sum(losses) / 400,
                "reward_loss": sum(rewards) / 400,
                "zero_weight_ratio": (missing if fsr.config.selects else units == 0).double().mean().item(),
                "effective_share": (units.sum() ** 2 / units.square().sum() / 400).item(),
            }
        )
    return told


@pytest.mark.parametrize("options", RULES)
def test_it_tells_what_the_batches_tell(options: dict[str, Any]) -> None:
    model, fsr = make(**options)
    assert fsr.history == []
    expected = by_hand(fsr, model, 3)
    assert [set(entry) for entry in fsr.history] == [NAMES] * 3
    for entry, told in zip(fsr.history, expected, strict=True):
        assert_close({name: entry[name] for name in told}, told, 1e-5)
    assert fsr.history[1]["reweighting"] is True
    assert 0 < fsr.history[1]["effective_share"] < 1
    if fsr.config.selects:
        assert 0.2 < fsr.history[1]["zero_weight_ratio"] < 0.4


def test_it_counts_more_steps_than_are_added_up_at_once() -> None:
    """Batches of 4 make 100 steps an epoch, and the metrics may be read whenever one likes."""
    stories = []
    for often in (False, True):
        model, fsr = make()
        x, y, _ = digits(0.3)
        for number, index in enumerate(torch.arange(400).repeat(2).split(4)):
            step(model, fsr, x[index], y[index], index)
            if often and number % 7 == 0:
                fsr.metrics()
        stories.append(fsr.history)
        if not often:
            assert fsr.metrics()["fsr/loss"] == pytest.approx(sum(e["loss"] for e in fsr.history) / 2, rel=1e-6)
    assert_close(stories[0], stories[1], 1e-12)


def test_agreement_is_that_of_the_last_visits() -> None:
    x, y, _ = digits(0.3)
    model, fsr = make()
    selection = fsr._memory.selection
    selection.active = False
    held = selection.code[:-1] == 1
    right = torch.zeros(400, dtype=torch.bool)
    for index in torch.arange(400).split(50):
        logits = model(x[index])
        right[index] = logits.argmax(1) == y[index]
        fsr.loss(logits, y[index], index).backward()
        fsr.step()
        fsr.zero_grad()
    told = fsr.history[0]
    assert told["agreement"] == pytest.approx(right[~held].double().mean().item())
    assert told["held_out_agreement"] == pytest.approx(right[held].double().mean().item())
    assert told["wrong_share"] == pytest.approx(0.3, abs=0.02)  # as judge_soon says
    assert told["reweighting"] is False


def test_held_out_labels_are_trained_on_once_labels_are_judged() -> None:
    model, fsr = make()
    train(model, fsr, 3, 0.3)
    assert fsr.history[2]["held_out_agreement"] is None
    assert fsr.history[2]["agreement"] > 0.5


def test_the_dictionarys_purity_shows_in_its_agreement() -> None:
    model, fsr = make(**CLIP)
    train(model, fsr, 3, 0.3)
    members = fsr.dictionary
    told = fsr.history[-1]["dictionary_agreement"]
    logits = fsr._memory.pseudo.columns["logits"][members.index]
    assert told == pytest.approx((logits.argmax(1) == members.label).double().mean().item())
    assert told > 0.8


def test_without_pseudo_labels_nobody_knows_the_dictionarys_agreement() -> None:
    model, fsr = make(**{**CLIP, "relabel_weight": 0.0})
    train(model, fsr, 1)
    assert fsr.history[0]["dictionary_agreement"] is None


def test_what_it_gives_is_a_copy() -> None:
    model, fsr = make()
    train(model, fsr, 1)
    fsr.history[0]["loss"] = -1.0
    fsr.history.clear()
    assert fsr.history[0]["loss"] > 0


# --- the state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", RULES[:2])
@pytest.mark.parametrize("stop", [3, 8, 11])
def test_a_run_that_was_stopped_tells_the_same(options: dict[str, Any], stop: int, tmp_path: Path) -> None:
    x, y, _ = digits(0.3)
    batches = torch.arange(400).repeat(3).split(50)
    model, fsr = make(**options)
    for index in batches[:stop]:
        step(model, fsr, x[index], y[index], index)
    fsr.save(tmp_path)
    again, resumed = make(seed=4, **options)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load(tmp_path)
    assert resumed.history == fsr.history
    for one, wrapper in ((model, fsr), (again, resumed)):
        for index in batches[stop:]:
            step(one, wrapper, x[index], y[index], index)
    assert len(fsr.history) == 3
    assert resumed.history == fsr.history  # bit by bit


def test_a_state_of_before_loads_and_the_history_begins_there() -> None:
    model, fsr = make()
    train(model, fsr, 1)
    x, y, _ = digits()
    step(model, fsr, x[:50], y[:50], torch.arange(50))
    state = fsr.state_dict()
    del state["fsr"]["history"]
    fsr.load_state_dict(state)
    assert fsr.history == []
    for index in torch.arange(50, 400).split(50):
        step(model, fsr, x[index], y[index], index)
    [told] = fsr.history
    assert (told["epoch"], told["samples"]) == (1, 350)
    assert 0 < told["loss"] < 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", -1),
        ("samples", 1.5),
        ("sums", torch.zeros(3, dtype=torch.float64)),
        ("sums", torch.zeros(5)),
        ("epochs", [{"epoch": 0, "samples": 400, "loss": "low"}]),
        ("epochs", [{"loss": 0.5}]),
        ("epochs", [{"epoch": None, "samples": 400}]),
        ("epochs", [3]),
    ],
)
def test_a_history_that_is_none_is_refused(name: str, value: Any) -> None:
    model, fsr = make()
    train(model, fsr, 1)
    state = fsr.state_dict()
    state["fsr"]["history"][name] = value
    with pytest.raises(ValueError, match="none that state_dict"):
        fsr.load_state_dict(state)
    assert len(fsr.history) == 1


# --- several processes -----------------------------------------------------------------------------------------------

STOP = 4  # batches of the second epoch, after which a run is saved


def job(options: dict[str, Any]) -> Epochs:
    batches = global_batches()
    model, _, fsr = build(options, False)
    train_shares(model, fsr, [*batches[0], *batches[1]])
    return fsr.history


def stopped(options: dict[str, Any], folder: str) -> Epochs:
    """As `job`, saved in the second epoch; the run that goes on from there tells the same, bit by bit."""
    batches = global_batches()
    model, core, fsr = build(options, False)
    train_shares(model, fsr, [*batches[0], *batches[1][:STOP]])
    fsr.save(folder)
    torch.save(core.state_dict(), f"{folder}/model.{distributed.rank()}.pt")
    train_shares(model, fsr, batches[1][STOP:])
    assert resumed(options, folder) == fsr.history
    return fsr.history


def resumed(options: dict[str, Any], folder: str) -> Epochs:
    model, core, fsr = build(options, False)
    core.load_state_dict(torch.load(f"{folder}/model.0.pt", weights_only=True))
    fsr.load(folder)
    train_shares(model, fsr, global_batches()[1][STOP:])
    return fsr.history


def all_jobs(folder: str) -> list[Epochs]:
    two = f"{folder}/two"
    Path(two).mkdir(exist_ok=True)
    return [job({}), job(CLIP), stopped({}, two), resumed({}, f"{folder}/one")]


def test_several_processes_tell_what_one_tells(tmp_path: Path) -> None:
    """Also from a state of one process, in mid-epoch: it has steps that are not added up yet, which each of two takes;
    and with batches of which a process gets nothing."""
    (tmp_path / "one").mkdir()
    expected = [job({}), job(CLIP), *[stopped({}, str(tmp_path / "one"))] * 2]
    assert [len(epochs) for epochs in expected] == [2, 2, 2, 2]
    one, other = run(2, all_jobs, str(tmp_path))
    assert one == other
    assert_close(one, expected, 1e-6)
