"""Functions run in several processes over gloo, as torchrun would, without starting Python anew for each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

try:
    from torch.distributed.fsdp import fully_shard as fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard as fully_shard

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
# What each process would import by itself, torch._dynamo at its first optimizer: three seconds of it.
multiprocessing.set_forkserver_preload(["test_distributed", "torch._dynamo", "accelerate"])


def _process(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in ranks.items()})  # as torchrun sets them
    os.environ.update({"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=60))
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function returns in each of `world` processes of one group. **Raises** what one of them raises."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (world, folder, function, args), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
