"""The store of momentum pseudo-labels ŷ (Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import sum_in_place, world_size
from .functional import relabel


class PseudoLabels:
    """ŷ of each sample: N×C values in half precision, zeros where a sample was never seen.

    **Arguments:** `num_samples`, N; `num_classes`, C; `momentum`, β; `temperature`, T.

    **Raises:** `MemoryError` if N×C values do not fit, saying how to do without.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        momentum: float,
        temperature: float,
        device: torch.device | str = "cpu",
    ):
        self.momentum, self.temperature = momentum, temperature
        self._mine: Tensor | None = None  # rows whose newest value this process alone has; in several processes
        try:
            self.logits = torch.zeros(num_samples + 1, num_classes, dtype=torch.float16, device=device)
        except RuntimeError as error:
            raise MemoryError(
                f"Re-labelling keeps {num_samples} x {num_classes} half-precision values, which do not fit on "
                f"{device}. Pass relabel_weight=0 to train without it."
            ) from error

    def grow(self, num_samples: int) -> None:
        """Make room for at least `num_samples`."""
        held = self.logits.shape[0] - 1
        if num_samples > held:
            extra = self.logits.new_zeros(num_samples - held, self.logits.shape[1])
            self.logits = torch.cat([self.logits[:-1], extra, self.logits[-1:]])
            if self._mine is not None:
                self._mine = torch.cat([self._mine[:-1], self._mine.new_zeros(len(extra)), self._mine[-1:]])

    def stored(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """ŷ_{t−1} of a batch, (b, C)."""
        return self.logits[index].to(dtype)

    def update(
        self, index: Tensor, logits: Tensor, stored: Tensor, keep: Tensor, mean_square: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of Eq. 7 for a batch.

        **Arguments:**

        - `index`: (b,). `logits`: f(x) (b, C). `stored`: from `stored()`. `keep`: (b,) bool, the others leave no trace.
        - `mean_square`: (), of `stored` over all processes.

        **Returns:** the pseudo-labels (b, C) from before the step, and (b,) bool, whether there were any.
        """
        target, new = relabel(
            stored, logits, momentum=self.momentum, temperature=self.temperature, mean_square=mean_square
        )
        limit = torch.finfo(self.logits.dtype).max
        row = torch.where(keep, index, self.logits.shape[0] - 1)
        self.logits[row] = new.clamp(-limit, limit).half()
        if world_size() > 1:
            if self._mine is None:
                self._mine = self._nobodys()
            self._mine[row] = True
        return target, stored.ne(0).any(1)

    def consolidate(self, chunk: int = 2**24) -> None:
        """Brings the newest values of all processes together."""
        if self._mine is None:
            self._mine = self._nobodys()
        held, classes = self.logits.shape[0] - 1, self.logits.shape[1]
        rows = max(1, chunk // classes)
        for start in range(0, held, rows):
            part = slice(start, min(start + rows, held))
            values, mine = self.logits[part], self._mine[part, None]
            sent = torch.cat([torch.where(mine, values, 0), mine.half()], dim=1)
            merged = sum_in_place(sent)  # exact: of all processes one at most adds something to zeros
            values.copy_(torch.where(merged[:, classes:] > 0, merged[:, :classes], values))
        self._mine.zero_()

    def _nobodys(self) -> Tensor:
        return torch.zeros(self.logits.shape[0], dtype=torch.bool, device=self.logits.device)

    def state_dict(self) -> dict[str, Tensor]:
        """ŷ without the spare row."""
        return {"logits": self.logits[:-1].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes ŷ back."""
        self.logits[:-1] = state["logits"]

    def to(self, device: torch.device) -> None:
        """Moves the store."""
        self.logits = self.logits.to(device)
        self._mine = None if self._mine is None else self._mine.to(device)
