"""What the dictionary keeps of a batch, and the model run once more on inputs that were kept, without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import Call, other_streams_kept, swapped, torch_stream_kept
from .heads import Head
from .tap import Capture, Tap, take_rows


class Replay:
    """Where reward features and clean features come from.

    **Arguments:** `core`, the user's own module; `head`, Θ^meta in it; `tap`, the hooks on both; `keeps_features`,
    whether the dictionary holds the head's inputs, not the model's. Where Θ^meta is more than the head, these are the
    same, and nothing is to be run for them.
    """

    def __init__(self, core: nn.Module, head: Head, tap: Tap, keeps_features: bool) -> None:
        self._core, self._head, self._tap = core, head, tap
        self.is_whole = head.module is core and not head.is_linear
        self._keeps_features = keeps_features
        self._first: Call | None = None  # of the model, by which the others are read

    def check(self, capture: Capture) -> None:
        """**Raises:** `RuntimeError` if the model's inputs are needed and not known, `ValueError` if they cannot be
        kept: without a tensor of one row a sample, or with others that change."""
        if self._keeps_features and not self.is_whole:
            return
        if capture.kwargs is None:
            raise RuntimeError(
                f'reward="fresh" keeps the model\'s inputs, but the head {self._head.name!r} was called outside of '
                'model(x): call the model itself, wrap the module that you do call, or pass reward="cached".'
            )
        call, size = self._call(capture), len(capture.output)
        for leaf in call.others:
            if _holds_tensors(leaf):
                raise ValueError(
                    f"The model is called with a {type(leaf).__name__}, and FSR, which keeps the model's inputs, does "
                    f"not see the tensors in it: call model(**batch), or with dict(batch). {self._way_out}"
                )
        if not call.rows:
            raise ValueError(
                f"The model's inputs hold no tensor of one row a sample, here {size}, so there is nothing to keep of "
                f"the samples: pass tensors (b, ...), in dicts or lists if you like. {self._way_out}"
            )
        if self._first is None:
            return
        if call.tree != self._first.tree:
            raise ValueError(
                f"The model is called with other arguments than before: {_shapes(call)}, not {_shapes(self._first)}. "
                f"FSR keeps its inputs, so pass the same ones in the same order every time. {self._way_out}"
            )
        wrong = [tuple(row.shape) for row in call.rows if row.ndim == 0 or len(row) != size]
        if wrong or any(map(_differ, call.others, self._first.others)):
            raise ValueError(
                "The model's inputs hold a tensor that has no row for each sample and is another than before, "
                f"{wrong[0] if wrong else 'of values that change'}: FSR keeps single samples, so packed sequences, "
                f"graphs and their offsets cannot be kept. Pass one row a sample, (b, ...). {self._way_out}"
            )

    @property
    def _way_out(self) -> str:
        if not self._keeps_features:
            return 'Or pass reward="cached", which keeps the input of the head alone.'
        return "Or pass head= of one module, with which the dictionary keeps that module's input alone."

    @property
    def advice(self) -> str:
        """What to do where stored tensors would be of several shapes."""
        if self.is_whole or not self._keeps_features:
            return (
                "Pad the model's inputs to one length, or crop them to one size, in all batches "
                f'(a tokenizer: padding="max_length"). {self._way_out}'
            )
        return (
            f"These are the inputs of the head {self._head.name!r}: pool them to one vector a sample before the head."
        )

    def remember(self, capture: Capture) -> None:
        """By the first batch that was accepted it is told which of the model's inputs have a row for each sample."""
        if self._first is None and capture.kwargs is not None and (self.is_whole or not self._keeps_features):
            self._first = self._call(capture)

    def _call(self, capture: Capture) -> Call:
        known = () if self._first is None else self._first.is_row
        return Call.of(capture.args, capture.kwargs or {}, len(capture.output), known)

    def complete(self, capture: Capture, logits: Tensor) -> Capture:
        """The capture with the features of these logits: of the token that the model took, or all the model's inputs
        where Θ^meta is in all of it."""
        if self.is_whole:
            return replace(capture, features=self._call(capture))
        return take_rows(capture, logits)

    def payload(self, capture: Capture) -> tuple[Tensor, ...]:
        """What the dictionary stores of a batch: the head's input, or the model's."""
        if self.is_whole:
            return capture.features.rows  # type: ignore[no-any-return]
        return (capture.features,) if self._keeps_features else self._call(capture).rows

    def features(self, payload: tuple[Tensor, ...], like: Capture) -> Any:
        """The head's input of stored samples, in a forward as that of the capture was."""
        if self._keeps_features and not self.is_whole:
            return payload[0]
        call = like.features if self.is_whole else self._call(like)
        rows = tuple(stored.to(row.dtype) for stored, row in zip(payload, call.rows, strict=True))
        call = replace(call, rows=rows)
        if self.is_whole:
            return call
        args, kwargs = call.inputs()
        return self._run(args, kwargs, like).features

    def clean(self, capture: Capture, mixed: Tensor, inputs: Tensor) -> Capture:
        """The capture of a forward in which the inputs take the mixed ones' place."""
        leaves, tree = pytree.tree_flatten((capture.args, capture.kwargs))
        args, kwargs = pytree.tree_unflatten([inputs if _same(leaf, mixed) else leaf for leaf in leaves], tree)
        return self._run(args, kwargs, capture)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], like: Capture) -> Capture:
        """One more forward as the user's was, without gradients and without a trace."""
        device = like.output.device
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
        capture = replace(box[like.turn], args=args, kwargs=kwargs)
        for leaf in [capture.output] if self.is_whole else pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                capture = self.complete(capture, leaf)
        return capture


def takes(capture: Capture, tensor: Tensor) -> bool:
    """Whether the tensor was among the model's inputs."""
    return any(_same(leaf, tensor) for leaf in _leaves(capture))


def _leaves(capture: Capture) -> list[Any]:
    """The model's inputs, in their order."""
    return pytree.tree_leaves((capture.args, capture.kwargs))


def _holds_tensors(leaf: Any) -> bool:
    """Whether tensors are in an argument that is no container to PyTorch."""
    if isinstance(leaf, (Tensor, nn.Module)):
        return False
    inside = list(leaf.values()) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None)
    known = isinstance(leaf, Mapping) or is_dataclass(leaf) or inside is not None
    return known and any(isinstance(one, Tensor) for one in pytree.tree_leaves(inside))


def _differ(one: Any, other: Any) -> bool:
    """Whether two arguments without rows are other tensors; values are looked at where that waits for no device."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one is other:
        return isinstance(one, Tensor) != isinstance(other, Tensor)
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    return one.device.type == "cpu" and other.device.type == "cpu" and not torch.equal(one, other)


def _shapes(call: Call) -> Any:
    """The arguments, with shapes in place of tensors."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: list(leaf.shape), call.inputs())
    return [*args, *(f"{name}={value}" for name, value in kwargs.items())]


def _same(leaf: Any, tensor: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == tensor.shape and leaf.data_ptr() == tensor.data_ptr()
