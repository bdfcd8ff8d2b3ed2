"""What the dictionary keeps of a batch, and the model run once more on inputs that were kept, without a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .heads import Head
from .tap import Capture, Tap, take_rows


class Replay:
    """Where reward features and clean features come from.

    **Arguments:** `core`, the user's own module; `head`, Θ^meta in it; `tap`, the hooks on both; `keeps_features`,
    whether the dictionary holds the head's inputs, not the model's.
    """

    def __init__(self, core: nn.Module, head: Head, tap: Tap, keeps_features: bool) -> None:
        self._core, self._head, self._tap = core, head, tap
        self._keeps_features = keeps_features

    def payload(self, capture: Capture) -> tuple[Tensor, ...]:
        """What the dictionary stores of a batch: the head's input, or the model's."""
        if self._keeps_features:
            return (capture.features,)
        return tuple(leaf.detach() for leaf in _leaves(capture) if _is_batched(leaf, len(capture.features)))

    def features(self, payload: tuple[Tensor, ...], like: Capture) -> Tensor:
        """The head's input of stored samples, in a forward as that of the capture was."""
        if self._keeps_features:
            return payload[0]
        leaves, tree = pytree.tree_flatten((like.args, like.kwargs))
        rows = iter(payload)
        leaves = [next(rows) if _is_batched(leaf, len(like.features)) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return self._run(args, kwargs, like).features

    def clean(self, capture: Capture, mixed: Tensor, inputs: Tensor) -> Capture:
        """The capture of a forward in which the inputs take the mixed ones' place."""
        leaves, tree = pytree.tree_flatten((capture.args, capture.kwargs))
        args, kwargs = pytree.tree_unflatten([inputs if _same(leaf, mixed) else leaf for leaf in leaves], tree)
        return self._run(args, kwargs, capture)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], like: Capture) -> Capture:
        """One more forward as the user's was, without gradients and without a trace."""
        device = like.features.device
        devices = [] if device.type == "cpu" else [device]
        buffers = {name: buffer.clone() for name, buffer in self._core.named_buffers()}
        with (
            _other_streams_kept(),
            torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type),
            torch.autocast(device.type, like.autocast, enabled=like.autocast is not None),
            self._tap.divert() as box,
        ):
            output = functional_call(self._core, buffers, args, kwargs)
        if not box:
            raise RuntimeError(f"The extra forward did not pass through the head {self._head.name!r}.")
        capture = box[0]
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                capture = take_rows(capture, leaf)
        return replace(capture, args=args, kwargs=kwargs)


def takes(capture: Capture, tensor: Tensor) -> bool:
    """Whether the tensor was among the model's inputs."""
    return any(_same(leaf, tensor) for leaf in _leaves(capture))


def _leaves(capture: Capture) -> list[Any]:
    """The model's inputs, in their order."""
    return pytree.tree_leaves((capture.args, capture.kwargs))


@contextmanager
def _other_streams_kept() -> Iterator[None]:
    """Python's and numpy's random streams go on as if nothing had been drawn within."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _is_batched(leaf: Any, batch_size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch_size


def _same(leaf: Any, tensor: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == tensor.shape and leaf.data_ptr() == tensor.data_ptr()
