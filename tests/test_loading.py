"""What is not a run of this kind does not load, and savers do not disturb each other."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, worker_warnings
from processes import run
from test_state import FILES, names

import fsr_wrap.state
from fsr_wrap import RewardDictionary, distributed
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
