"""Which processes train a model together, and whether they were set up alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import distributed

ALONE = "process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True)"


@dataclass(frozen=True)
class Group:
    """A process group that copies share; None is the default group, and what is left of another one in a pickle."""

    processes: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, ()


def find_group(model: nn.Module, given: Any = None) -> Group:
    """The processes that train a model together: those given, else those of DDP, else of FSDP2's mesh, else all.

    **Raises:** `TypeError` for what is no process group; `ValueError` for one that this process is not in, or that
    differs from the model's own.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if given is not None:
            raise ValueError("process_group= was given before dist.init_process_group(): call that first.")
        return Group()
    if given is not None:
        _check_member(given)
    group, name = given, "process_group="
    for other, owner, ranks in _owned(model):
        if group is None and other is None:
            raise ValueError(
                f"{owner}'s mesh has several dimensions and not all processes: pass "
                f"process_group=dist.new_group({ranks}), made in all processes, to FSRWrapper."
            )
        if group is None:
            group, name = other, owner
        elif _ranks(group) != ranks:
            raise ValueError(
                f"{name} has the processes {_ranks(group)}, {owner} those of {ranks}: pass the model's own group, or "
                "leave process_group= out."
            )
    if group is None or (_ranks(group) == _ranks(dist.group.WORLD) and dist.get_backend(group) == dist.get_backend()):
        return Group()
    return Group(group)


def _check_member(group: Any) -> None:
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"Process {dist.get_rank()} is not in process_group=: make the FSRWrapper in the group's processes alone, "
            f"and others with groups of their own. For a model that this process trains alone, pass {ALONE}."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, not {type(group).__name__}.")
    if dist.get_rank(group) < 0:
        raise ValueError(f"Process {dist.get_rank()} is not in process_group=, which has {_ranks(group)}.")


def _ranks(group: Any) -> list[int]:
    return sorted(dist.get_process_group_ranks(group))


def _owned(model: nn.Module) -> Iterator[tuple[Any, str, list[int]]]:
    """The groups that the model itself is spread over: the group, of whom, its processes."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            yield module.process_group, "DistributedDataParallel", _ranks(module.process_group)
    for mesh in dict.fromkeys(getattr(parameter, "device_mesh", None) for parameter in model.parameters()):
        if mesh is not None:
            ranks = sorted(mesh.mesh.flatten().tolist())
            yield _group_of(mesh, ranks), "fully_shard", ranks


def _group_of(mesh: Any, ranks: list[int]) -> Any:
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    return mesh.get_group() if mesh.ndim == 1 else None


def check_alike(facts: dict[str, Any], device: torch.device) -> None:
    """Whether the facts have the same values in all processes of the current group, by one all-gather of one number.

    **Raises:** `ValueError` in all processes if they do not.
    """
    digest = int.from_bytes(blake2b(repr(facts).encode(), digest_size=8).digest(), "little", signed=True)
    if set(distributed.gather_number(digest, device)) == {digest}:
        return
    told = distributed.gather_objects({name: repr(value) for name, value in facts.items()})
    names = [name for name, value in told[0].items() if any(other[name] != value for other in told)]
    each = "; ".join(f"{name} is {', '.join(other[name] for other in told)}" for name in names)
    raise ValueError(
        f"The processes were set up unlike each other: {each}, in process 0 and on. FSR must be given the same in all "
        "of them, also the same seed, without + rank, and the same checkpoint. If each process trains a model of its "
        f"own, pass {ALONE}."
    )
