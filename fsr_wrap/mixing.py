"""MixUp, with the clean inputs and labels kept for what is remembered of the samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import functional
from .replay import takes
from .tap import Capture

_MEMORY = 8  # mixed batches whose loss() may still come
# Of a target that was smoothed: what other classes' entries are at most, and by how much they may differ.
_SMALL, _EQUAL = 0.1001, 1e-3


@dataclass
class Mix:
    """What one call of `mixup` mixed, and where in training: epoch and samples consumed."""

    mixed: Tensor
    target: Tensor
    inputs: Tensor
    label: Tensor
    partner: Tensor
    share: Tensor
    position: tuple[int, int]

    def of(self, values: Tensor) -> Tensor:
        """Values of the samples, (b, k), mixed as the inputs were."""
        return torch.lerp(values[self.partner], values, self.share.to(values.dtype)[:, None])


class Mixer:
    """Mixes batches, and knows them again in `loss()`. A batch that is mixed and not used leaves nothing behind."""

    def __init__(self) -> None:
        self._waiting: deque[Mix] = deque(maxlen=_MEMORY)

    def number(self, position: tuple[int, int]) -> int:
        """How many batches wait that were mixed at this position."""
        return sum(mix.position == position for mix in self._waiting)

    def mix(
        self,
        inputs: Tensor,
        target: Tensor,
        num_classes: int,
        position: tuple[int, int],
        generator: torch.Generator,
        beta: float,
    ) -> tuple[Tensor, Tensor]:
        """The mixed inputs and their soft targets (b, C). `generator`: on the host."""
        on_host: dict[str, Any] = {"generator": generator, "device": "cpu"}
        uniform = torch.rand(len(inputs), dtype=torch.float32, **on_host).to(inputs.device, non_blocking=True)
        partner = torch.randperm(len(inputs), **on_host).to(inputs.device, non_blocking=True)
        share = functional.mixup_coefficients(uniform, beta)
        shape = (-1, *[1] * (inputs.ndim - 1))
        mixed = torch.lerp(inputs[partner], inputs, share.view(shape).to(inputs.dtype))
        known = target.clamp(0, num_classes - 1)  # loss() refuses the others
        hard = functional.dense_target(known, share.new_zeros(len(target), num_classes))
        soft = torch.lerp(hard[partner], hard, share[:, None])
        self._waiting.append(Mix(mixed, soft, inputs, target, partner, share, position))
        return mixed, soft

    def find(self, capture: Capture, target: Tensor) -> Mix | None:
        """What was mixed for the forward that left this capture, None if nothing was.

        **Raises:** `ValueError` where only the inputs or only the target are those that `mix` returned.
        """
        for mix in reversed(self._waiting):
            if takes(capture, mix.mixed):
                if target.shape == mix.target.shape and target.data_ptr() == mix.target.data_ptr():
                    return mix
                raise ValueError(
                    "The model was called with inputs that mixup() mixed, but loss() got another target: pass it as "
                    "mixup() returned it."
                )
        if any(mix.target is target for mix in self._waiting):
            raise ValueError("The model was not called with the inputs that mixup() returned: mix last, then call it.")
        return None

    def discard(self, mix: Mix | None) -> None:
        """Forgets a batch whose loss was computed, and those before it."""
        while mix is not None and self._waiting and self._waiting.popleft() is not mix:
            pass


def check_mixable(inputs: Any, target: Tensor) -> None:
    """**Raises:** `TypeError` or `ValueError` for what cannot be mixed."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise TypeError("mixup() takes floating-point inputs: normalise the images first.")
    if target.dtype != torch.int64 or target.shape != inputs.shape[:1]:
        raise ValueError(
            f"mixup() takes int64 class numbers of shape ({len(inputs)},), not {target.dtype} of shape "
            f"{tuple(target.shape)}."
        )


def shown(target: Tensor, label: Tensor) -> Tensor:
    """Whether no class is more of a soft target than the sample's own, (b, C) and (b,) → (b,) bool."""
    return target.gather(1, label[:, None])[:, 0] >= target.amax(1)


def is_pure(target: Tensor) -> Tensor:
    """Whether a soft target is that of one class, one-hot or smoothed: all its other entries are equal, and small.
    (b, C) → (b,) bool."""
    largest, place = target.max(1)
    others = target.scatter(1, place[:, None], 0).amax(1)
    return (largest > others) & (others <= _SMALL) & (others - target.amin(1) <= _EQUAL)
