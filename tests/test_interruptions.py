"""Runs that are killed, in one process and in two, and what is left of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import CLIP, assert_close
from test_distributed import State, build, global_batches, outcome, train

from fsr_wrap import FSRWrapper, distributed

EVERY = 3  # steps between two checkpoints
POINTS = ("before the step", "after the step", "in save", "after save")


def newest(folder: Path) -> Path | None:
    return max(folder.glob("step_*"), default=None)


def save(folder: Path, step: int, model: torch.nn.Module, fsr: FSRWrapper) -> None:
    """A checkpoint is a folder that gets its name when all is in it."""
    partial = folder / "partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    distributed.barrier()
    fsr.save(partial)
    if distributed.rank() == 0:
        torch.save(model.state_dict(), partial / "model.pt")
        partial.rename(folder / f"step_{step:04d}")
    distributed.barrier()


def run_on(folder: Path, options: State, kill: tuple[int, str] | None) -> State:
    """Goes on from the newest checkpoint to the end; kills itself at a step, at one of the points in it."""
    model, core, fsr = build(options)
    batches = [batch for epoch in global_batches() for batch in epoch]
    start = 0
    if (found := newest(folder)) is not None:
        core.load_state_dict(torch.load(found / "model.pt", weights_only=True))
        fsr.load(found)
        start = int(found.name.removeprefix("step_"))

    def maybe_die(step: int, point: str) -> None:
        if kill == (step, point):
            os.kill(os.getpid(), signal.SIGKILL)

    write, now = os.replace, 0

    def dying_replace(source: Any, target: Any) -> None:
        maybe_die(now, "in save")
        write(source, target)

    os.replace = dying_replace  # type: ignore[assignment]
    for now, batch in enumerate(batches[start:], start):
        maybe_die(now, "before the step")
        train(model, fsr, [batch])
        maybe_die(now, "after the step")
        if (now + 1) % EVERY == 0:
            save(folder, now + 1, core, fsr)
            maybe_die(now, "after save")
    return outcome(core, fsr)


def _process(rank: int, world: int, folder: str, options: State, kill: tuple[int, str, int] | None) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    if world > 1:
        store = dist.FileStore(str(root / "store"), world)
        dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=20))
    try:
        mine = kill[:2] if kill is not None and kill[2] == rank else None
        torch.save(run_on(root, options, mine), root / f"outcome_{rank}.pt")
        distributed.barrier()
    except RuntimeError as error:
        (root / f"error_{rank}.txt").write_text(str(error))
        raise


def launch(world: int, folder: Path, options: State, kill: tuple[int, str, int] | None) -> list[int | None]:
    """Starts the processes and waits for them; their exit codes."""
    (folder / "store").unlink(missing_ok=True)
    context = mp.get_context("forkserver")
    processes = [context.Process(target=_process, args=(r, world, str(folder), options, kill)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.parametrize(("world", "options"), [(1, {}), (1, {**CLIP, "reward": "fresh"}), (2, {}), (2, CLIP)])
def test_killed_twenty_times_and_resumed(world: int, options: State, tmp_path: Path) -> None:
    """Parameters and FSR's state end bit for bit as in the run that nobody killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert launch(world, whole, options, None) == [0] * world
    dice = random.Random(world)
    last = sum(len(epoch) for epoch in global_batches()) - 1
    kills = 4 if options else 20
    for number in range(kills):
        found = newest(killed)
        done = int(found.name.removeprefix("step_")) if found else 0
        step = min(done + dice.randint(0, 2), last)
        point = POINTS[number % len(POINTS)]
        if "save" in point:
            step = min(done + EVERY - 1, last)
        victim = dice.randrange(world) if "in save" not in point else 0
        codes = launch(world, killed, options, (step, point, victim))
        assert codes[victim] == -signal.SIGKILL
        assert all(code not in (0, None) for code in codes)  # nobody finished, nobody hung
    assert launch(world, killed, options, None) == [0] * world
    for rank in range(world):
        found, expected = (torch.load(f / f"outcome_{rank}.pt", weights_only=True) for f in (killed, whole))
        assert_close(found, expected, 0.0)


def test_the_other_process_ends_with_an_error(tmp_path: Path) -> None:
    """It does not hang: the group notices that the peer is gone, at the latest after the group's timeout."""
    start = time.monotonic()
    codes = launch(2, tmp_path, {}, (10, "before the step", 1))
    assert codes == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 60
    assert (tmp_path / "error_0.txt").read_text()
    assert launch(2, tmp_path, {}, None) == [0, 0]
