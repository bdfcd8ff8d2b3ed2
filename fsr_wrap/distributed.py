"""The few collectives; every one is a no-op in one process.

No collective here depends on the data: each process calls the same ones in the same order at every step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor summed over the processes, by one all-reduce of all of them."""
    if world_size() == 1:
        return tensors
    flat = sum_in_place(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]))
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def sum_in_place(tensor: Tensor) -> Tensor:
    """The tensor, summed over the processes where it stands."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest_in_place(tensor: Tensor) -> Tensor:
    """The tensor, its largest values over the processes where it stands."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_all(tensor: Tensor) -> Tensor:
    """Tensors of one shape (n, ...), stacked over the processes: (W, n, ...)."""
    if world_size() == 1:
        return tensor[None]
    out = tensor.new_empty(world_size() * tensor.numel())
    dist.all_gather_into_tensor(out, tensor.reshape(-1))
    return out.view(-1, *tensor.shape)
