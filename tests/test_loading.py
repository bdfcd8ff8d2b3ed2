"""What is not a run of this kind does not load, and savers do not disturb each other."""

from __future__ import annotations

import copy
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLIP, assert_close, worker_warnings
from processes import run
from test_state import FILES, names
from test_wrapper import make, snapshot, train
from torch import nn

import fsr_wrap.state
from fsr_wrap import FSRWrapper, RewardDictionary, distributed
from fsr_wrap.state import read_state, write_state

# --- several savers --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@worker_warnings
def test_savers_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two runs that save to one folder at a time: each save succeeds, and every file is one of theirs, whole."""
    states = [{"number": n, "a": torch.full((60_000,), float(n))} for n in (1, 2)]
    write_state(tmp_path, states[0])
    children = []
    for state in states:
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                torch.set_num_threads(1)
                end = time.monotonic() + 2
                while time.monotonic() < end:
                    write_state(tmp_path, state)
                    time.sleep(0.01)
                failed = 0
            finally:
                os._exit(failed)
        children.append(child)
    found = Counter[int]()
    while children:
        state = read_state(tmp_path)
        assert torch.equal(state["a"], states[state["number"] - 1]["a"])
        found[state["number"]] += 1
        children = [child for child in children if not ended_well(child)]
    assert found.total() > 1
    assert names(tmp_path) == FILES


def ended_well(child: int) -> bool:
    number, status = os.waitpid(child, os.WNOHANG)
    assert status == 0, "a save failed"
    return number == child


def test_savers_in_threads_do_not_either(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def save(number: int) -> None:
        try:
            for _ in range(15):
                write_state(tmp_path, {"number": number, "a": torch.full((5_000,), float(number))})
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == FILES


@pytest.mark.parametrize("locks", [True, False])
def test_what_the_dead_left_goes_and_what_the_living_have_stays(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        monkeypatch.setattr(fsr_wrap.state, "fcntl", None)
    dead, old = tmp_path / ".fsr.0", tmp_path / ".fsr.old"
    for folder in (dead, old):
        folder.mkdir()
        (folder / "fsr.safetensors").write_bytes(b"partial")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    with fsr_wrap.state._own_folder(tmp_path) as alive:
        write_state(tmp_path, {"a": torch.zeros(2)})
        assert alive.is_dir()
        assert not old.exists()
        assert dead.exists() == (not locks)  # without locks, not before it is old
    assert not alive.exists()
    shutil.rmtree(dead, ignore_errors=True)
    assert names(tmp_path) == FILES


# --- several processes -----------------------------------------------------------------------------------------------

DTYPES = [torch.int16, torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16]
DTYPES += [torch.float32, torch.float64, torch.complex64]


def payloads(index: torch.Tensor) -> list[torch.Tensor]:
    """Of each dtype, as one number a sample and as images, in both memory formats; -0.0 among them."""
    bits = (index.view(-1, 1, 1, 1, 1) * 7919 + torch.arange(2 * 3 * 3 * 16).view(2, 3, 3, 16)) % 251
    every = []
    for dtype in DTYPES:
        if dtype == torch.bool:
            images = bits[..., 0] > 125
        else:
            images = bits.to(torch.uint8)[..., : dtype.itemsize].contiguous().view(dtype)[..., 0]
        last = images.contiguous(memory_format=torch.channels_last)
        every += [images.contiguous(), last, images[:, 0, 0, 0]]
    minus = torch.zeros(len(index), 4).neg()
    return [*every, minus]


def consolidated() -> list[Any]:
    dictionary = RewardDictionary(2, 8, buffer=8)
    rank, world = distributed.rank(), distributed.world_size()
    for index in torch.arange(12).split(6):
        mine = index.tensor_split(world)[rank]
        offset = int(mine[0] - index[0])
        dictionary.push(index, index % 2, index.float(), tuple(payloads(mine)), offset=offset)
    dictionary.consolidate()
    dictionary.update(generator=torch.Generator().manual_seed(0))
    drawn = dictionary.draw(20, torch.Generator().manual_seed(0))
    return [drawn.index, [tensor.contiguous().view(torch.uint8) for tensor in drawn.payload if tensor.ndim > 1]]


def test_payloads_of_every_dtype_come_to_every_process() -> None:
    index, expected = consolidated()
    assert_close(expected, [t.contiguous().view(torch.uint8) for t in payloads(index) if t.ndim > 1], 0.0)
    for found in run(2, consolidated):
        assert_close(found, [index, expected], 0.0)


# --- strange content ----------------------------------------------------------------------------------------------


def leaves(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of a tree of dicts and lists, those of its inner nodes too."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [(*path, key) for key, _ in items] + [at for key, value in items for at in leaves(value, (*path, key))]


def strange(value: Any, chance: random.Random) -> Any:
    """Another value in its place: of another kind, dtype, shape or range."""
    if not isinstance(value, torch.Tensor):
        return chance.choice([None, -7, 10**6, "x", 1.5, [], {}, True, torch.zeros(3)])
    kinds: list[Callable[[], Any]] = [
        lambda: value[..., :-1] if value.ndim else value[None],
        lambda: value[None],
        lambda: torch.cat([value, value]) if value.ndim else value.double(),
        lambda: value.to(torch.float64 if value.dtype == torch.float32 else torch.float32),
        lambda: 3,
        lambda: None,
    ]
    if value.dtype == torch.int64 and value.numel():
        kinds += [partial(spoilt, value, chance, number) for number in (-5, 10**7, int(value.flatten()[0]))] * 2
    if value.is_floating_point() and value.numel():
        kinds += [partial(spoilt, value, chance, torch.inf)] * 2
    return chance.choice(kinds)()


def spoilt(value: torch.Tensor, chance: random.Random, number: float) -> torch.Tensor:
    copy = value.clone()
    copy.view(-1)[chance.randrange(copy.numel())] = number
    return copy


def goes_on(model: nn.Module, fsr: FSRWrapper) -> None:
    """Steps over the end of an epoch: whatever loaded must not fail later, nor hold what is not finite."""
    train(model, fsr, 2, 0.3, batch_size=300)
    assert not fsr.scores.isinf().any()
    assert fsr.dictionary.score.isfinite().all()
    assert all(part.isfinite().all() for part in fsr.dictionary.draw(20).payload)
    assert fsr.weights.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relabel_storage": 3, "class_balance": 0.0},
        CLIP,
        {**CLIP, "pusher": "forgetting_event", "relabel_storage": 3},
        {**CLIP, "reward": "fresh", "relabel_weight": 0.0},
    ],
    ids=["default", "K", "clip", "clip, forgetting, K", "clip, fresh"],
)
def test_strange_content_is_refused_or_harmless(options: dict[str, Any]) -> None:
    """States with one value of FSR's part exchanged: refused by a ValueError that leaves the wrapper as it was, or what
    loaded trains on."""
    model, fsr = make(**options)
    train(model, fsr, 3, 0.3, batch_size=300)
    weights = copy.deepcopy(model.state_dict())
    good, before, outcome, chance = fsr.state_dict(), snapshot(model, fsr), Counter[str](), random.Random(3)
    places = [place for place in leaves(good["fsr"]) if place[0] not in ("config", "world_size")]
    assert len(places) > 30
    for place in places:
        for _ in range(2):
            bad = copy.deepcopy(good)
            *way, last = place
            node = bad["fsr"]
            for key in way:
                node = node[key]
            if chance.random() < 0.1 and isinstance(node, dict):
                del node[last]
            else:
                node[last] = strange(node[last], chance)
            try:
                fsr.load_state_dict(bad)
            except ValueError:
                outcome["refused"] += 1
                assert_close(snapshot(model, fsr), before, 0)
                continue
            outcome["loaded"] += 1
            goes_on(model, fsr)
            model.load_state_dict(weights)
            fsr.load_state_dict(good)
            fsr.zero_grad()
    assert outcome["refused"] > 0.75 * outcome.total(), outcome  # counters and labels of class 0 may be others as well
