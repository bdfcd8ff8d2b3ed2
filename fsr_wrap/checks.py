"""Looks at what the user passes, before anything is changed."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from .distributed import world_size

INDEX_LIMIT = 2**27  # where N is not known: larger numbers are hardly those of samples counted from 0


def as_logits(output: Any) -> Tensor:
    """The logits in a model's output. **Raises:** `TypeError` if there are none."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"loss() takes the logits, a tensor, or an output that has `.logits`; it got {type(output).__name__}. "
        "Pick the logits out of it."
    )


def check_batch(logits: Tensor, target: Tensor, index: Any, *, num_classes: int | None) -> Tensor:
    """Shapes, dtypes and devices, which cost no look at the values.

    **Returns:** the index as int64, (b,), on the device of the logits.

    **Raises:** `TypeError` or `ValueError` saying what was found and what is expected.
    """
    if logits.ndim > 2:
        raise ValueError(
            f"logits must be (b, C), one row a sample, not {tuple(logits.shape)}: FSR weighs whole samples, each of "
            "one class. For one class an image or a text, let the model pool its features before the head; train "
            "outputs for each pixel or token with their own cross-entropy, beside this loss or in its place."
        )
    if logits.ndim != 2 or (logits.shape[0] == 0 and world_size() == 1):
        raise ValueError(f"logits must be (b, C) with b >= 1, not {tuple(logits.shape)}.")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, not {logits.dtype}.")
    samples, classes = logits.shape
    if classes < 2:
        raise ValueError("FSR needs at least 2 classes; for one logit use two classes with cross-entropy.")
    if num_classes is not None and classes != num_classes:
        raise ValueError(
            f"The logits have {classes} classes, but {num_classes} before: one FSRWrapper belongs to one classifier. "
            "Make a new one if the classifier changed."
        )
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, not {type(target).__name__}.")
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(f"Soft targets must be {tuple(logits.shape)} like the logits, not {tuple(target.shape)}.")
    elif target.dtype != torch.int64 or target.shape != (samples,):
        raise ValueError(
            f"target must be int64 class numbers of shape ({samples},) or floating-point soft targets of shape "
            f"({samples}, {classes}), not {target.dtype} of shape {tuple(target.shape)}."
        )
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, the logits on {logits.device}: move it there.")
    if not isinstance(index, Tensor):
        index = torch.as_tensor(index, device="cpu")
    if index.shape != (samples,):
        raise ValueError(f"index must have the shape ({samples},), one index a sample, not {tuple(index.shape)}.")
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(
            f"index must be integers, not {index.dtype}. with_index(dataset) adds the index of each sample."
        )
    return index.to(logits.device, torch.int64, non_blocking=True)


def all_good(logits: Tensor, features: Tensor | None, target: Tensor, label: Tensor, index: Tensor, rows: int) -> bool:
    """Whether all is certainly in range, by few looks at the batch as a whole; on the host only, where looking is free.

    `features` are None where they cannot be other than finite if the logits are, as at a linear head. False says that
    `find_problems` must look closer.
    """
    if logits.device.type != "cpu" or len(label) == 0:
        return False
    if not math.isfinite(logits.detach().sum().item()):
        return False
    if features is not None and not math.isfinite(features.sum().item()):
        return False
    if target.ndim == 2 and not (math.isfinite(target.sum().item()) and target.min().item() >= 0):
        return False
    for values, limit in ((label.tolist(), logits.shape[1]), (index.tolist(), rows)):
        if min(values) < 0 or max(values) >= limit:
            return False
    return True


def finite_rows(tensor: Tensor) -> Tensor:
    """Whether all numbers of a sample are finite, (n, ...) → (n,) bool; a sum of large ones may overflow, and is not
    asked."""
    if not tensor.is_floating_point():
        return torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
    return (tensor - tensor).flatten(1).sum(1) == 0


def find_problems(
    logits: Tensor, features: Tensor, target: Tensor, label: Tensor, index: Tensor, rows: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Which samples have values out of range.

    **Returns:** for each kind of problem how many samples have it, (), and (b,) bool, the samples that have none.
    """
    finite = finite_rows(logits.detach()) & finite_rows(features)
    good_label = (label >= 0) & (label < logits.shape[1])
    if target.ndim == 2:
        good_label &= (target >= 0).all(1) & target.sum(1).isfinite()
    good_index = (index >= 0) & (index < rows)
    problems = {"label": ~good_label, "index": ~good_index, "non-finite": ~finite}
    return {name: bad.sum() for name, bad in problems.items()}, finite & good_label & good_index


class Watch:
    """Raises for problems: on the host at once, on an accelerator when their count has arrived, without waiting."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, Any, dict[str, str]]] = deque()

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return Watch()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pending = deque()

    def __call__(self, problems: dict[str, Tensor], messages: dict[str, str]) -> None:
        """Looks at the counts of one batch, and at those that came in since. **Raises:** `ValueError`."""
        counts = torch.stack(list(problems.values()))
        messages = {name: messages[name] for name in problems}
        if counts.device.type == "cpu":
            self._raise(counts, messages)
            return
        while self._pending and self._pending[0][1].query():
            counted, _, said = self._pending.popleft()
            self._raise(counted, said, " (in an earlier batch; the samples were left out of it)")
        copied = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
        copied.copy_(counts, non_blocking=True)
        event = torch.get_device_module(counts.device).Event()
        event.record()
        self._pending.append((copied, event, messages))

    @staticmethod
    def _raise(counts: Tensor, messages: dict[str, str], where: str = "") -> None:
        for count, message in zip(counts.tolist(), messages.values(), strict=True):
            if count:
                raise ValueError(f"{count} samples of the batch have {message}{where}")
