"""Catches what the user's forwards leave at the head."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from .checks import as_logits

_MEMORY = 8  # forwards whose loss() may still come
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: not torch.compiler.is_dynamo_compiling())  # torch 2.5


@dataclass
class Capture:
    """What one forward left behind: the head's input and output (detached), the model's input, the autocast state.

    `kwargs` are None where the head was called outside of the model's forward. `turn` is the number of the head's call
    in the forward, from 0 on.
    """

    features: Any  # a tensor (b, ...), or the `Call` of the model where Θ^meta is in all of it
    output: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    autocast: torch.dtype | None = None
    turn: int = 0


NOTHING = Capture(torch.empty(0, device="cpu"), torch.empty(0, device="cpu"))


class Tap:
    """Hooks on model and head that keep what the last training forwards left behind.

    Forwards without gradients are not seen. The hooks change nothing in the forward. Of several heads the features are
    joined, (b, Σ d), and the output is their mean.
    """

    def __init__(self, model: nn.Module, *heads: nn.Module):
        self._heads = heads
        self._is_whole = heads == (model,)
        self._reset()
        handles = [model.register_forward_pre_hook(self._on_model, with_kwargs=True)]
        handles += [head.register_forward_hook(self._on_head, with_kwargs=True) for head in heads]
        handles.append(model.register_forward_hook(self._after_model, always_call=True))
        self._ids = [handle.id for handle in handles]
        self._owners = [weakref.ref(module) for module in (model, *heads)]

    def __getstate__(self) -> dict[str, Any]:
        return {"ids": self._ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._ids = state["ids"]
        # Hooks are known by numbers, which a new process would give out once more.
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(number + 1 for number in self._ids))
        self._heads = ()
        self._is_whole = False
        self._owners = []
        self._reset()
        self._muted = True  # the hooks of a copied model have nobody to listen for

    def adopt(self, model: nn.Module, *heads: nn.Module) -> None:
        """Listens again, to copies of the modules that carry copies of the hooks; they may not be complete yet."""
        self._heads = heads
        self._is_whole = heads == (model,)
        self._reset()
        self._owners = [weakref.ref(module) for module in (model, *heads)]

    def _reset(self) -> None:
        # Of one length, whatever waits: a compiled model guards it.
        self._captures: tuple[Capture, ...] = (NOTHING,) * _MEMORY
        self._used: deque[weakref.ref[Tensor]] = deque(maxlen=_MEMORY)
        self._diverted: list[Capture] = []
        self._diverting = self._muted = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any] | None] = ((), None)
        self._turn = 0
        self._problem = ""  # why the head's last call could not be kept
        self._parts = (NOTHING,) * len(self._heads)

    def remove(self) -> None:
        """Takes the hooks off."""
        for module in [module for owner in self._owners if (module := owner()) is not None]:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for number in [number for number, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[number]
                    for kind in ("hooks_with_kwargs", "hooks_always_called", "pre_hooks_with_kwargs"):
                        getattr(module, "_forward_" + kind).pop(number, None)

    def _is_listening(self) -> bool:
        return torch.is_grad_enabled() and not self._diverting and not self._muted

    @property
    def waiting(self) -> int:
        """How many samples the last forward had, 0 if it was discarded."""
        last = self._captures[-1]
        return 0 if last is NOTHING else len(last.output)

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
        self._turn = 0
        if len(self._heads) > 1:
            self._parts = (NOTHING,) * len(self._heads)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inputs = ((), None)

    def _on_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (self._is_listening() or self._diverting):
            return
        values = (*args, *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        self._problem = ""
        if len(tensors) != 1 and not self._is_whole:
            kinds = ", ".join(type(value).__name__ for value in values)
            found = f"{len(tensors)} tensors" if tensors or not values else f"no tensor, but {kinds}"
            self._problem = f"is called with {found}, and FSR needs one, (b, ...)"
            return
        features = tensors[0] if len(tensors) == 1 else NOTHING.features  # see Replay.complete
        try:
            output = as_logits(output)
        except TypeError:
            self._problem = f"puts out no logits, but {type(output).__name__}"
            return
        if _is_symbolic(output) or _is_symbolic(features):
            return
        device = output.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        capture = Capture(features.detach(), output.detach(), *self._inputs, autocast, self._turn)
        if len(self._heads) > 1:
            pairs = zip(self._heads, self._parts, strict=True)
            self._parts = tuple(capture if head is module else part for head, part in pairs)
            if any(part is NOTHING for part in self._parts):
                return
            capture = _joined(self._parts)
            self._parts = (NOTHING,) * len(self._heads)
        if self._diverting or self._inputs[1] is not None:
            self._turn += 1
        if self._diverting:
            self._diverted.append(capture)
        else:
            self._captures = (*self._captures[1:], capture)

    @contextmanager
    def divert(self) -> Iterator[list[Capture]]:
        """Within it, forwards without gradients are caught, into the list, and nothing else is."""
        box: list[Capture] = []
        self._diverting, self._diverted = True, []
        try:
            yield box
            box += self._diverted
        finally:
            self._diverting, self._diverted = False, []

    def find(self, logits: Tensor) -> Capture | None:
        """The capture of the forward that gave these logits, or a copy of which they are; None if there is none.

        Copies are known by the number of samples, and by their values where that leaves a choice.
        """
        if any(used() is logits for used in self._used):
            return None
        waiting = [capture for capture in reversed(self._captures) if capture is not NOTHING]
        for capture in waiting:
            if capture.output.data_ptr() == logits.data_ptr() and capture.output.device == logits.device:
                return None if _is_part(logits, capture.output) else capture
        alike = [capture for capture in waiting if capture.output.shape[:1] == logits.shape[:1]]
        if len(alike) > 1 or len(waiting) == _MEMORY:  # of so many the right one may be forgotten already
            alike = [capture for capture in alike if _is_copy(capture.output, logits)]
        return alike[0] if alike else None

    def explain(self, logits: Tensor, name: str) -> str:
        """Why `find` found nothing, and what to do."""
        waiting = [capture for capture in self._captures if capture is not NOTHING]
        for capture in waiting:
            here, all_of_it = logits.untyped_storage(), capture.output.untyped_storage()
            if here.data_ptr() == all_of_it.data_ptr() and _is_part(logits, capture.output):
                return (
                    f"loss() got the logits of {len(logits)} of the {len(capture.output)} samples of a forward: pass "
                    "all of them, with their targets and indices, and leave samples out before the model is called."
                )
        if self._problem:
            return (
                f"The head {name!r} {self._problem}: pass head= of a module that takes one tensor and whose output are "
                "the logits, the last linear layer for example."
            )
        if any(capture.turn for capture in waiting):
            return (
                f"The head {name!r} was called several times in a forward, and the logits are none of its outputs: "
                "pass the logits of one call as they leave the head, or head= of a module that is called once."
            )
        sizes = [len(capture.output) for capture in waiting]
        if sizes and len(logits) not in sizes:
            return (
                f"loss() got the logits of {len(logits)} samples, but the forwards that wait for it are of "
                f"{', '.join(map(str, sizes))}: call loss() once for each forward, with all of its samples."
            )
        return (
            f"loss() found no forward of this model that passed through the head {name!r}: call model(x) with "
            "gradients before each loss(), and not many other forwards between the two. If the model was compiled, "
            "wrap it before its first call."
        )

    def discard(self, capture: Capture, logits: Tensor) -> None:
        """Forgets a capture whose loss was computed, and those before it."""
        position = [one is capture for one in self._captures].index(True) + 1
        self._captures = (NOTHING,) * position + self._captures[position:]
        self._used.append(weakref.ref(logits))


def _joined(parts: tuple[Capture, ...]) -> Capture:
    """One capture of several heads: their features side by side, (b, Σ d), and the mean of their outputs, (b, C)."""
    features = torch.cat([part.features.flatten(1) for part in parts], 1)
    return replace(parts[0], features=features, output=torch.stack([part.output.flatten(1) for part in parts]).mean(0))


def _is_part(logits: Tensor, output: Tensor) -> bool:
    """Whether the logits can be some of the samples of the output only."""
    return logits.shape[1:] == output.shape[1:] and len(logits) < len(output)


def _is_symbolic(tensor: Tensor) -> bool:
    """Whether the tensor has no values of its own: torch.func's within a transformation, or torch.export's."""
    if torch.compiler.is_compiling():
        return _is_exporting()
    return isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_per_token(output: Tensor, logits: Tensor) -> bool:
    """Whether the output are logits of several tokens, (b, T, C), of which the model may have taken one."""
    return output.ndim == 3 and output.shape[1] > 1 and output.shape[::2] == logits.shape


def _same_rows(output: Tensor, logits: Tensor) -> Tensor:
    """Which tokens' outputs (b, T, C) are the logits (b, C), bit for bit; (b, T) bool."""
    return (output.to(logits.dtype) == logits.detach()[:, None]).all(2)


def take_rows(capture: Capture, logits: Tensor) -> Capture:
    """The capture of one row a sample, where the head ran on every token and the model took the logits of one of them.

    Which one is seen from the values, so it does not matter how the model chose; nothing waits for the device.
    """
    if not _is_per_token(capture.output, logits) or capture.features.shape[:2] != capture.output.shape[:2]:
        return capture
    same = _same_rows(capture.output, logits)
    row = (same * torch.arange(1, same.shape[1] + 1, device=same.device)).argmax(1)  # the last, if several are alike
    here = torch.arange(len(row), device=row.device)
    return replace(capture, features=capture.features[here, row], output=capture.output[here, row])


def check_rows(capture: Capture, logits: Tensor, name: str) -> None:
    """Checks, on the first batch, that `take_rows` finds the right rows. **Raises:** `ValueError` if it cannot."""
    if not _is_per_token(capture.output, logits):
        return
    same = _same_rows(capture.output, logits)
    if not (same.any(1) | ~logits.detach().isfinite().all(1)).all():
        raise ValueError(
            f"The head {name!r} puts out the logits of {same.shape[1]} tokens a sample, and the logits passed to "
            "loss() are of none of them: take one token's logits as they are, or pool the features before the head, "
            "not the logits behind it."
        )
    others = (capture.features != take_rows(capture, logits).features[:, None]).flatten(2).any(2)
    if (same & others).any():
        raise ValueError(
            f"The head {name!r} gives different tokens of a sample the same logits, so the one that the model took "
            "cannot be told: do not start with a head of zeros."
        )


def _is_copy(output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are the output, or of one of its tokens, up to its precision."""
    if _is_per_token(output, logits):
        return bool(_same_rows(output, logits).any(1).all())
    if output.numel() != logits.numel():
        return False
    copy = logits.detach().reshape(output.shape).to(output)
    return bool(torch.isclose(output, copy, rtol=1e-2, atol=1e-5, equal_nan=True).all())
