"""What the dictionary keeps of a batch, and the model run once more on inputs that were kept, without a trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import other_streams_kept, swapped, torch_stream_kept
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

    def check(self, capture: Capture) -> None:
        """**Raises:** `RuntimeError` if the model's inputs are needed and not known."""
        if not self._keeps_features and capture.kwargs is None:
            raise RuntimeError(
                f'reward="fresh" keeps the model\'s inputs, but the head {self._head.name!r} was called outside of '
                'model(x): call the model itself, wrap the module that you do call, or pass reward="cached".'
            )

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
        buffers = {name: buffer.clone() for name, buffer in self._core.named_buffers()}
        with (
            other_streams_kept(),
            torch_stream_kept(device),
            torch.autocast(device.type, like.autocast, enabled=like.autocast is not None),
            swapped(self._core, buffers),
            self._tap.divert() as box,
        ):
            output = self._core(*args, **kwargs)
        if not box:
            raise RuntimeError(f"The extra forward did not pass through the head {self._head.name!r}.")
        if len(box) <= like.turn:
            raise RuntimeError(f"The head {self._head.name!r} was called fewer times in the extra forward.")
        capture = box[like.turn]
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


def _is_batched(leaf: Any, batch_size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch_size


def _same(leaf: Any, tensor: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == tensor.shape and leaf.data_ptr() == tensor.data_ptr()
