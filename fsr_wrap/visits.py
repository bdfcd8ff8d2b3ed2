"""How often each sample was seen, and in how many of these epochs its given label was held out or taken for wrong."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = torch.iinfo(torch.int16).max


class Visits:
    """Epochs in which each sample was seen, and those in which its label was held out or taken for wrong. 4 bytes each.

    They are counted at an epoch's end, so that no step has anything to do with them. They stop at 32,767.

    **Arguments:** `num_samples`, N.
    """

    def __init__(self, num_samples: int, device: torch.device | str = "cpu") -> None:
        self.seen = torch.zeros(num_samples, dtype=torch.int16, device=device)
        self.unused = torch.zeros(num_samples, dtype=torch.int16, device=device)

    def end_epoch(self, seen: Tensor, unused: Tensor) -> None:
        """Counts an epoch. (N,) bool each."""
        room = seen & (self.seen < _MOST)
        self.seen += room
        self.unused += room & unused

    def grow(self, num_samples: int) -> None:
        """Make room for at least `num_samples`."""
        held = len(self.seen)
        if num_samples > held:
            bigger = Visits(num_samples, self.seen.device)
            bigger.seen[:held], bigger.unused[:held] = self.seen, self.unused
            self.seen, self.unused = bigger.seen, bigger.unused

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of both columns."""
        return {"seen": self.seen.clone(), "unused": self.unused.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the columns back. There must be as many samples."""
        self.seen.copy_(state["seen"])
        self.unused.copy_(state["unused"])

    def to(self, device: torch.device) -> None:
        """Moves both."""
        self.seen, self.unused = self.seen.to(device), self.unused.to(device)
