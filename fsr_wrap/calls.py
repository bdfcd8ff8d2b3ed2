"""A module called apart from the user's forward: on other samples, with other tensors in it, without a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Call:
    """How a model is called: `rows`, the tensors with one row a sample; `others`, whatever else its arguments hold;
    `is_row`, which of all these leaves are rows, in their order; and the `tree` that they are put into."""

    rows: tuple[Tensor, ...]
    others: tuple[Any, ...]
    is_row: tuple[bool, ...]
    tree: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, is_row: tuple[bool, ...] = ()) -> Call:
        """The call with `size` samples, detached. `is_row`: known of an earlier call, else by the tensors' length."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if len(is_row) != len(leaves):
            is_row = tuple(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size for leaf in leaves)
        rows = tuple(leaf for leaf, row in zip(leaves, is_row, strict=True) if row)
        return cls(rows, tuple(leaf for leaf, row in zip(leaves, is_row, strict=True) if not row), is_row, tree)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs."""
        rows, others = iter(self.rows), iter(self.others)
        args, kwargs = pytree.tree_unflatten([next(rows if row else others) for row in self.is_row], self.tree)
        return args, kwargs

    def to(self, dtype: torch.dtype) -> Call:
        """The call with floating-point tensors in this dtype, and integers as they are."""
        rows, others = (tuple(_to(leaf, dtype) for leaf in leaves) for leaves in (self.rows, self.others))
        return replace(self, rows=rows, others=others)

    def where(self, valid: Tensor) -> Call:
        """The call with the first valid sample in place of each that is not, (b,) bool; with zeros if there is none."""
        here = torch.arange(len(valid), device=valid.device)
        place = torch.where(valid, here, valid.to(torch.uint8).argmax())
        return replace(self, rows=tuple(torch.where(valid.any(), row[place], 0).to(row.dtype) for row in self.rows))


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, parameters and buffers of these names are others.

    A tensor is swapped wherever it is, whatever the names of it and of the modules that hold it. torch's
    `functional_call` puts a wrong tensor back where a module has two names.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    others = {id(named[name]): other for name, other in tensors.items()}
    kept: list[tuple[Any, str, Tensor]] = []
    try:
        for part in module.modules():  # each once
            slots: Any
            for slots in (part._parameters, part._buffers):
                for name, tensor in slots.items():
                    if tensor is not None and id(tensor) in others:
                        kept.append((slots, name, tensor))
                        slots[name] = others[id(tensor)]
        yield
    finally:
        for slots, name, tensor in kept:
            slots[name] = tensor


def torch_stream_kept(device: torch.device) -> AbstractContextManager[None]:
    """Torch's random stream, on the host and on the device, goes on as if nothing had been drawn within."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type)


@contextmanager
def other_streams_kept() -> Iterator[None]:
    """Python's and numpy's random streams go on as if nothing had been drawn within. It takes longer than torch's."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
