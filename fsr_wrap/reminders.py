"""What a training loop seems to have forgotten, said once."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import warn
from .distributed import rank
from .memory import Memory
from .pushers import stored_epoch

_MANY_STEPS = 1000  # where the length of an epoch is not known


class Reminders:
    """Counts what tells that something was forgotten.

    **Arguments:** `samples_per_epoch`, or None if it is not known; `told`, whether the user gave it.
    """

    def __init__(self, samples_per_epoch: int | None, told: bool = False) -> None:
        self._per_epoch, self._told = samples_per_epoch, told
        self._idle_steps = self._idle_samples = 0
        self._valued = self._warned_of_loss = False
        self._before: Tensor | None = None  # samples that came before one came again, () int64; -1: none did

    def valued(self) -> None:
        """`loss()` was called."""
        self._valued = True

    def stepped(self, samples: int) -> None:
        """`step()` was called, after a forward of as many samples; warns if `loss()` was not for a whole epoch."""
        if self._valued:
            self._idle_steps, self._idle_samples, self._valued = 0, 0, False
            return
        self._idle_steps += 1
        self._idle_samples += max(samples, 1)
        idle = self._idle_steps >= _MANY_STEPS if self._per_epoch is None else self._idle_samples >= self._per_epoch
        if idle and not self._warned_of_loss:
            self._warned_of_loss = True
            warn(
                f"The optimizer made {self._idle_steps} steps, about an epoch, without loss(): FSR sees nothing and "
                "re-weights nothing. Take loss = optimizer.loss(model(x), y, index) in place of the cross-entropy.",
            )

    def came(self, new: Tensor, before: int) -> None:
        """A batch of the first epoch came, after `before` samples; `new` (b,) bool, who comes for the first time."""
        if self._before is None:
            self._before = torch.full((), -1, dtype=torch.int64, device=new.device)
        earlier = self._before.to(new.device)
        self._before = torch.where(~new.all() & (earlier < 0), before, earlier)

    def epoch_ends(self, memory: Memory, size: int) -> None:
        """Warns after the first epoch if the loader's is shorter: since one came again nobody new did, or that was in
        the last batch, of `size` samples. Synchronises with the device."""
        if memory.epoch or self._per_epoch is None or self._before is None or rank() or memory.given.are_mixed_up:
            return
        seen, loaders = int((memory.table.epoch[:-1] == stored_epoch(0)).sum()), int(self._before)
        part = loaders == seen and not self._told
        if loaders <= seen < self._per_epoch and (part or memory.consumed - size == loaders):
            warn(
                f"FSR counts {self._per_epoch} samples an epoch, but samples came again after {loaders}, so its epochs "
                f"drift away from the loader's. Pass samples_per_epoch={loaders} to FSRWrapper (a sampler or "
                "drop_last=True leaves samples out), or load the others too.",
            )
