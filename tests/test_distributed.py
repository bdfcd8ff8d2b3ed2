"""The same training on one, two and three processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_wrapper import CLASSES, digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from fsr_wrap import FSRWrapper

N, BATCH = 360, 60  # both divisible by 1, 2 and 3


def job(options: dict[str, Any], mlp_head: bool, epochs: int = 4) -> dict[str, torch.Tensor]:
    """Trains on this process's share of fixed global batches; returns what must not depend on the processes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(32, CLASSES)
    if mlp_head:
        head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    core = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), head)
    model = DistributedDataParallel(core) if world > 1 else core
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fsr = FSRWrapper(
        model, inner, head, num_samples=N, dictionary_size=40, reward_batch_size=30, warmup_epochs=1, **options
    )
    x, y, _ = digits(0.3)
    order = torch.Generator().manual_seed(7)
    weights = []
    for _ in range(epochs):
        for batch in torch.randperm(N, generator=order).split(BATCH):
            index = batch.chunk(world)[rank]
            loss = fsr.loss(model(x[index]), y[index], index)
            loss.backward()
            fsr.step()
            fsr.zero_grad()
            parts = [torch.zeros_like(fsr.weights) for _ in range(world)]
            if world > 1:
                dist.all_gather(parts, fsr.weights)
            weights.append(torch.cat(parts) if world > 1 else fsr.weights)
    assert fsr.epoch == epochs
    state = fsr.state_dict()["fsr"]
    out = {
        "weights": torch.stack(weights),
        "scores": fsr.scores.clone(),
        "parameters": parameters_to_vector(core.parameters()),
    }
    out |= {
        "members": fsr.dictionary.index,
        "payload": fsr.dictionary.draw(40, torch.Generator().manual_seed(0)).payload[0],
    }
    out |= {"labels": state["table"]["label"], "last_epoch": state["table"]["epoch"]}
    if "pseudo" in state:
        out["pseudo"] = state["pseudo"]["logits"]
    return {name: value.detach() for name, value in out.items()}


def process(rank: int, world: int, folder: str, options: dict[str, Any], mlp_head: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    try:
        torch.save(job(options, mlp_head), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


CASES = [
    ({}, False),
    ({"reward": "fresh", "pusher": "meta_margin"}, False),
    ({"weight_rule": "shift", "label_smoothing": 0.1, "relabel_weight": 0.0}, True),
]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("options", "mlp_head"), CASES)
def test_equal_on_any_number_of_processes(world: int, options: dict[str, Any], mlp_head: bool, tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    expected = job(options, mlp_head)
    mp.start_processes(process, (world, str(tmp_path), options, mlp_head), nprocs=world, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for name, value in expected.items():
        for other in found[1:]:
            assert torch.equal(found[0][name], other[name]), f"{name} differs between the processes"
        tolerance = 5e-3 if name == "pseudo" else 1e-5  # half precision
        torch.testing.assert_close(
            found[0][name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (expected["weights"] == 0).any() or options.get("weight_rule") == "shift"


def test_merging_matters(tmp_path: Path) -> None:
    """Each process saw half of the samples; all of them must know all scores."""
    mp.start_processes(process, (2, str(tmp_path), {}, False), nprocs=2, start_method="spawn")
    assert torch.load(tmp_path / "0.pt", weights_only=True)["scores"].isfinite().all()
