"""Catches what the user's forwards leave at the head."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import as_logits

_MEMORY = 8  # forwards whose loss() may still come


@dataclass
class Capture:
    """What one forward left behind: the head's input and output (detached), the model's input, the autocast state."""

    features: Tensor
    output: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    autocast: torch.dtype | None = None


NOTHING = Capture(torch.empty(0), torch.empty(0))


class Tap:
    """Hooks on model and head that keep what the last training forwards left behind.

    Forwards without gradients are not seen. The hooks change nothing in the forward.
    """

    def __init__(self, model: nn.Module, head: nn.Module):
        self._reset()
        self._handles = [
            model.register_forward_pre_hook(self._on_model, with_kwargs=True),
            head.register_forward_hook(self._on_head, with_kwargs=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__setstate__(self.__getstate__())
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        self._handles = []
        self._muted = True  # the hooks of a copied model have nobody to listen for

    def _reset(self) -> None:
        # Of one length, whatever waits: a compiled model guards it.
        self._captures: tuple[Capture, ...] = (NOTHING,) * _MEMORY
        self._used: deque[weakref.ref[Tensor]] = deque(maxlen=_MEMORY)
        self._diverted: Capture | None = None
        self._diverting = self._muted = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _is_listening(self) -> bool:
        return torch.is_grad_enabled() and not self._diverting and not self._muted

    @contextmanager
    def mute(self) -> Iterator[None]:
        """Within it, forwards are our own and leave nothing behind."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_listening():
            self._inputs = (args, kwargs)

    def _on_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (self._is_listening() or self._diverting):
            return
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1:
            return
        try:
            output = as_logits(output)
        except TypeError:
            return
        device = output.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        capture = Capture(tensors[0].detach(), output.detach(), *self._inputs, autocast)
        if self._diverting:
            self._diverted = capture
        else:
            self._captures = (*self._captures[1:], capture)

    @contextmanager
    def divert(self) -> Iterator[list[Capture]]:
        """Within it, forwards without gradients are caught, into the list, and nothing else is."""
        box: list[Capture] = []
        self._diverting, self._diverted = True, None
        try:
            yield box
            if self._diverted is not None:
                box.append(self._diverted)
        finally:
            self._diverting, self._diverted = False, None

    def find(self, logits: Tensor) -> Capture | None:
        """The capture of the forward that gave these logits, or a copy of which they are; None if there is none.

        Copies are known by the number of samples, and by their values where that leaves a choice.
        """
        if any(used() is logits for used in self._used):
            return None
        waiting = [capture for capture in reversed(self._captures) if capture is not NOTHING]
        for capture in waiting:
            if capture.output.data_ptr() == logits.data_ptr() and capture.output.device == logits.device:
                return capture
        alike = [capture for capture in waiting if capture.output.shape[:1] == logits.shape[:1]]
        if len(alike) > 1 or len(waiting) == _MEMORY:  # of so many the right one may be forgotten already
            alike = [capture for capture in alike if _is_copy(capture.output, logits)]
        return alike[0] if alike else None

    def discard(self, capture: Capture, logits: Tensor) -> None:
        """Forgets a capture whose loss was computed, and those before it."""
        position = [one is capture for one in self._captures].index(True) + 1
        self._captures = (NOTHING,) * position + self._captures[position:]
        self._used.append(weakref.ref(logits))
        self._inputs = ((), {})


def _is_copy(output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are the output, up to its precision."""
    if output.numel() != logits.numel():
        return False
    copy = logits.detach().reshape(output.shape).to(output)
    return bool(torch.isclose(output, copy, rtol=1e-2, atol=1e-5, equal_nan=True).all())
