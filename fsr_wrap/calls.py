"""A module called apart from the user's forward: with other tensors in it, and without a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
