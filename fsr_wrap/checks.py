"""Looks at what the user passes, before anything is changed."""

from __future__ import annotations

import math
import sys
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .distributed import world_size

SUM_TOLERANCE = 0.02  # of a row of soft targets: mixed and smoothed in bfloat16 they may be off by 0.01
INDEX_LIMIT = 2**27  # where N is not known: larger numbers are hardly those of samples counted from 0


def warn(message: str) -> None:
    """Warns of the user's line that led here, the first outside of this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fsr_wrap", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


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


def check_batch(logits: Tensor, target: Tensor, index: Any, label: Any = None, *, num_classes: int | None) -> Tensor:
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
    if label is not None:
        _check_label(label, logits)
    if not isinstance(index, Tensor):
        index = torch.as_tensor(index, device="cpu")
    if index.shape != (samples,):
        raise ValueError(f"index must have the shape ({samples},), one index a sample, not {tuple(index.shape)}.")
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(
            f"index must be integers, not {index.dtype}. with_index(dataset) adds the index of each sample."
        )
    return index.to(logits.device, torch.int64, non_blocking=True)


def _check_label(label: Any, logits: Tensor) -> None:
    if not isinstance(label, Tensor) or label.dtype != torch.int64 or label.shape != logits.shape[:1]:
        found = f"{label.dtype} of shape {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise ValueError(
            f"label must be int64 class numbers of shape ({len(logits)},), each sample's own, not {found}."
        )
    if label.device != logits.device:
        raise ValueError(f"label is on {label.device}, the logits on {logits.device}: move it there.")


def all_good(
    logits: Tensor, features: tuple[Tensor, ...], target: Tensor, label: Tensor, index: Tensor, rows: int
) -> bool:
    """Whether all is certainly in range, by few looks at the batch as a whole; on the host only, where looking is free.

    `features`: what else must be finite. False says that `find_problems` must look closer.
    """
    if logits.device.type != "cpu" or len(label) == 0:
        return False
    if not math.isfinite(logits.detach().sum().item()):
        return False
    if not all(math.isfinite(tensor.sum().item()) for tensor in features):
        return False
    if target.ndim == 2:
        gap = (target.detach().sum(1, dtype=torch.float32) - 1).abs().max().item()
        if not (gap <= SUM_TOLERANCE and target.min().item() >= 0):
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
    logits: Tensor, features: tuple[Tensor, ...], target: Tensor, label: Tensor, index: Tensor, rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Which samples have values out of range.

    **Returns:** for each kind of problem how many samples have it, (); what `describe_targets` must know, (); and (b,)
    bool, the samples that have none.
    """
    finite = finite_rows(logits.detach())
    for tensor in features:
        finite = finite & finite_rows(tensor)
    good = {"label": (label >= 0) & (label < logits.shape[1]), "index": (index >= 0) & (index < rows)}
    details: dict[str, Tensor] = {}
    if target.ndim == 2 and len(target):
        soft = target.detach()
        sums = soft.sum(1, dtype=torch.float32)
        good["target"] = (soft >= 0).all(1) & ((sums - 1).abs() <= SUM_TOLERANCE)
        whole = ((soft == 0) | (soft == 1)).all()
        details = {"low": soft.amin(), "high": soft.amax(), "least": sums.amin(), "most": sums.amax(), "whole": whole}
    good["non-finite"] = finite
    valid = torch.stack(list(good.values())).all(0)
    return {name: (~one).sum() for name, one in good.items()}, details, valid


def describe_targets(low: float, high: float, least: float, most: float, whole: float) -> str:
    """What is wrong with soft targets of these values and sums of rows."""
    if not (low >= 0 and high <= 1):
        found = f"values in [{low:.4g}, {high:.4g}], as of regression"
    elif whole:
        found = f"rows of {least:.0f} to {most:.0f} ones, as where a sample may have several labels (multi-hot)"
    else:
        found = f"rows that sum to {least:.4g}" + (f" to {most:.4g}" if most > least else "")
    return (
        f"soft targets that are no class distribution: {found}. FSR is for classification by softmax cross-entropy: "
        "give int64 class numbers, or rows of values in [0, 1] that sum to 1."
    )


Messages = dict[str, str | Callable[..., str]]


class Watch:
    """Raises for problems: on the host at once, on an accelerator when their count has arrived, without waiting."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, Any, Messages, list[str]]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pending = deque()

    def __call__(self, problems: dict[str, Tensor], messages: Messages, details: dict[str, Tensor]) -> None:
        """Looks at the counts of one batch, and at those that came in since. **Raises:** `ValueError`.

        A message is a text, or a function of the `details`.
        """
        counts = torch.stack([value.float() for value in (*problems.values(), *details.values())])
        messages, names = {name: messages[name] for name in problems}, list(details)
        if counts.device.type == "cpu":
            self._raise(counts, messages, names)
            return
        while self._pending and self._pending[0][1].query():
            counted, _, said, of = self._pending.popleft()
            self._raise(counted, said, of, " (in an earlier batch; the samples were left out of it)")
        copied = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
        copied.copy_(counts, non_blocking=True)
        event = torch.get_device_module(counts.device).Event()
        event.record()
        self._pending.append((copied, event, messages, names))

    @staticmethod
    def _raise(counts: Tensor, messages: Messages, names: list[str], where: str = "") -> None:
        numbers = counts.tolist()
        details = dict(zip(names, numbers[len(messages) :], strict=True))
        for count, message in zip(numbers, messages.values(), strict=False):
            if count:
                text = message if isinstance(message, str) else message(**details)
                raise ValueError(f"{count:.0f} samples of the batch have {text}{where}")
