"""The few collectives; every one is a no-op in one process.

No collective here depends on what is in the data: each process calls the same ones in the same order at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")
_KINDS = FileNotFoundError, OSError, TypeError, ValueError, RuntimeError


_current: ContextVar[Any] = ContextVar("_current", default=None)


@contextmanager
def within(group: Any) -> Iterator[None]:
    """Within it, all of this module is about the processes of a group; None is the default group."""
    token = _current.set(group)
    try:
        yield
    finally:
        _current.reset(token)


def world_size() -> int:
    """The number of processes of the current group, 1 without one."""
    return dist.get_world_size(_current.get()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the current group, 0 without one."""
    return dist.get_rank(_current.get()) if dist.is_available() and dist.is_initialized() else 0


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
        dist.all_reduce(tensor, group=_current.get())
    return tensor


def gather(sums: Tensor, columns: tuple[Tensor, ...], length: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A few numbers and a few columns of every process, by one all-gather.

    **Arguments:**

    - `sums`: (k,), becomes float64.
    - `columns`: (b,) each, sent as int32 or float32; b may differ between the processes.
    - `length`: the largest b of them; shorter columns are filled up with -1 (integers) or NaN.

    **Returns:** the sums (W, k), and the columns (W·length,), one process after another. In one process all is as it
    was given, with W = 1 and length = b.
    """
    world = world_size()
    if world == 1:
        return sums[None], columns
    rows = torch.full((len(columns), length), -1, dtype=torch.int32, device=sums.device)  # these bits are NaN, too
    for row, column in zip(rows, columns, strict=True):
        row[: len(column)] = column.float().view(torch.int32) if column.is_floating_point() else column.int()
    header = sums.double().view(torch.int32)
    sent = torch.cat([header, rows.view(-1)])
    received = sent.new_empty(world, len(sent))
    dist.all_gather_into_tensor(received.view(-1), sent, group=_current.get())
    numbers = received[:, : len(header)].flatten().view(torch.float64).view(world, len(sums))
    bits = received[:, len(header) :].reshape(world, len(columns), length).transpose(0, 1).reshape(len(columns), -1)
    gathered = tuple(
        row.view(torch.float32) if column.is_floating_point() else row.to(column.dtype)
        for row, column in zip(bits, columns, strict=True)
    )
    return numbers, gathered


def gather_rows(tensors: tuple[Tensor, ...], length: int) -> tuple[Tensor, ...]:
    """The rows of every process, (n, k) each → (W·length, k), filled up with zeros, by one all-gather.

    In one process they are as they were given.

    **Arguments:** `length`, the largest n of them.
    """
    world = world_size()
    if world == 1:
        return tensors
    widths = [tensor.shape[1] for tensor in tensors]
    sent = tensors[0].new_zeros(length, sum(widths))
    torch.cat(tensors, dim=1, out=sent[: len(tensors[0])])
    received = sent.new_empty(world * length, sum(widths))
    dist.all_gather_into_tensor(received, sent, group=_current.get())
    return received.split(widths, dim=1)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together if it is sharded (a DTensor). All processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor, sharded like a parameter of its shape that is."""
    if not hasattr(parameter, "full_tensor") or hasattr(tensor, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier(group=_current.get())


def gather_number(number: int, device: torch.device) -> list[int]:
    """An int64 of every process, which waits for the device."""
    if world_size() == 1:
        return [number]
    sent = torch.tensor([number], dtype=torch.int64, device=device)
    received = sent.new_empty(world_size())
    dist.all_gather_into_tensor(received, sent, group=_current.get())
    return [int(value) for value in received.tolist()]


def gather_objects(thing: Any) -> list[Any]:
    """What each process has to tell; anything that can be pickled."""
    if world_size() == 1:
        return [thing]
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, thing, group=_current.get())
    return told


def together(work: Callable[[], _T]) -> _T:
    """What the work gives in this process; if it fails in one of the processes, it fails in all of them.

    **Raises:** what the work raises; in the others an error of that kind that says where it was.
    """
    if world_size() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    kind = next((number for number, kind in enumerate(_KINDS) if isinstance(failure, kind)), len(_KINDS) - 1)
    told = gather_objects(None if failure is None else (kind, str(failure)))
    if failure is not None:
        raise failure
    for number, said in enumerate(told):
        if said is not None:
            raise _KINDS[said[0]](f"In process {number} of {len(told)}: {said[1]}")
    return result  # type: ignore[return-value]
