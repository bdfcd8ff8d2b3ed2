"""Process groups that are not all processes, and processes that were set up unlike each other."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CLIP, assert_close, judge_soon
from processes import run
from test_distributed import CLASSES, N, State, digits, global_batches, network, outcome
from torch.nn.parallel import DistributedDataParallel

from fsr_wrap import FSRWrapper

RECIPE: State = {"num_samples": N, "samples_per_epoch": N + 63, "dictionary_size": 40, "reward_batch_size": 30}


def job(seed: int, steps: int, group: Any = None, ddp: bool = False, folder: str | None = None) -> State:
    """Trains in a process of its own on whole batches; saves, loads and copies on the way. Of seed 0 labels are judged,
    of others the paper's rule re-weights."""
    batches = [batch for epoch in global_batches(seed=seed) for batch in epoch][:steps]
    core = network()
    model = DistributedDataParallel(core, process_group=group) if ddp else core
    inner = torch.optim.SGD(core.parameters(), lr=0.05, momentum=0.9)
    given = None if ddp else group
    rule = CLIP if seed else {}
    fsr = FSRWrapper(model, inner, core[2], process_group=given, seed=seed, **RECIPE, **rule)
    judge_soon(fsr, CLASSES)
    x, y = digits()
    for number, index in enumerate(batches):
        inputs, target = fsr.mixup(x[index], y[index]) if number % 5 == 4 else (x[index], y[index])
        fsr.loss(model(inputs), target, index).backward()
        fsr.step()
        fsr.zero_grad()
        if number == 11 and folder is not None:
            fsr.save(f"{folder}/{seed}")
            fsr.load(f"{folder}/{seed}")
            if not ddp:
                model, fsr = copy.deepcopy((model, fsr))
                core = model
    assert fsr.is_reweighting
    fsr.metrics()
    return {**outcome(core, fsr), "weights": fsr.weights}


def of_its_own(folder: str) -> State:
    """A model in each process, with other data, seed and number of steps."""
    rank = dist.get_rank()
    group = dist.new_group([rank], use_local_synchronization=True)
    return job(rank, 17 + 2 * rank, group, folder=folder)


def test_a_model_of_its_own_in_each_process(tmp_path: Any) -> None:
    for rank, found in enumerate(run(2, of_its_own, str(tmp_path))):
        assert_close(found, job(rank, 17 + 2 * rank), 0.0)


def ddp_in_the_first(folder: str, seed: int) -> State:
    """DDP in the first process alone; the second does something else."""
    group = dist.new_group([0])
    return job(seed, 17, group, ddp=True, folder=folder) if dist.get_rank() == 0 else {}


@pytest.mark.parametrize("seed", [0, 1])
def test_ddp_on_a_subgroup(seed: int, tmp_path: Any) -> None:
    found = run(2, ddp_in_the_first, str(tmp_path), seed)[0]
    assert_close(found, job(seed, 17), 0.0)


def fully_sharded_alone() -> State:
    from processes import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("models", "shards"))["shards"]
    core = fully_shard(network(), mesh=mesh)
    fsr = FSRWrapper(core, torch.optim.SGD(core.parameters(), lr=0.05), core[2], seed=dist.get_rank(), **RECIPE)
    x, y = digits()
    for index in torch.arange(120 if dist.get_rank() else 60).split(60):
        fsr.loss(core(x[index]), y[index], index).backward()
    return {"consumed": fsr.state_dict()["fsr"]["consumed"]}


def refusals() -> list[str]:
    rank, messages = dist.get_rank(), []
    first, everyone = dist.new_group([0]), dist.new_group([0, 1])
    core = network()
    inner = torch.optim.SGD(core.parameters(), lr=0.05)
    model = DistributedDataParallel(core)
    alone = dist.new_group([rank], use_local_synchronization=True)
    cases: list[tuple[Any, Any]] = [(model, alone), (core, "gloo"), (model, everyone)]
    if rank == 1:
        cases.append((core, first))
    for model, group in cases:
        try:
            FSRWrapper(model, inner, core[2], process_group=group, **RECIPE)
            messages.append("")
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    held = FSRWrapper(core, inner, core[2], process_group=alone, **RECIPE)
    for other, is_same in (
        (copy.copy(held), True),
        (copy.deepcopy(held), True),
        (pickle.loads(pickle.dumps(held)), False),
    ):
        assert (other._group.processes is alone) == is_same
    return messages


def test_groups_that_cannot_be_are_refused() -> None:
    first, second = run(2, refusals)
    for rank, found in enumerate((first, second)):
        assert f"process_group= has the processes [{rank}], DistributedDataParallel those of [0, 1]" in found[0]
        assert found[1].startswith("TypeError: process_group must be a torch.distributed.ProcessGroup, not str")
        assert not found[2]
    assert second[3].startswith("ValueError: Process 1 is not in process_group=")
    with pytest.raises(ValueError, match=r"before dist\.init_process_group"):
        job(0, 1, group="gloo")


def test_fully_shard_on_a_part_of_the_processes() -> None:
    assert [found["consumed"] for found in run(2, fully_sharded_alone)] == [60, 120]


# --- processes that were set up unlike each other --------------------------------------------------------------------


def unlike() -> list[str]:
    """What the first loss says in processes that differ in one thing; it must change nothing where it raises."""
    rank, messages, states = dist.get_rank(), [], []
    x, y = digits()
    index = torch.arange(30) + 30 * rank

    def attempt(load: bool = False, **options: Any) -> None:
        core = network()
        model = DistributedDataParallel(core)
        fsr = FSRWrapper(model, torch.optim.SGD(core.parameters(), lr=0.05), core[2], **{**RECIPE, **options})
        if load:
            fsr.load_state_dict(states[0])
        before = fsr._memory.consumed
        try:
            fsr.loss(model(x[index]), y[index], index)
            assert fsr._memory.consumed == before + 60
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
            assert fsr._memory.consumed == before
        fsr.consolidate()
        states.append(fsr.state_dict())

    attempt()
    attempt(load=True)
    attempt(seed=5 + rank)
    attempt(dictionary_size=40 + 10 * rank, num_samples=N + rank)
    attempt(load=rank == 1)
    return messages


def test_processes_that_were_set_up_unlike_each_other_all_raise() -> None:
    first, second = run(2, unlike)
    assert first == second
    assert first[:2] == ["", ""]
    assert "seed is 5, 6, in process 0 and on" in first[2]
    assert "without + rank" in first[2]
    assert f"num_samples is {N}, {N + 1}; dictionary_size is 40, 50, in" in first[3]
    assert "consumed is 0, 60, in" in first[4]
