"""The store of momentum pseudo-labels ŷ (Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import rank, sum_in_place
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
        try:
            self.logits = torch.zeros(num_samples + 1, num_classes, dtype=torch.float16, device=device)
        except RuntimeError as error:
            raise MemoryError(
                f"Re-labelling keeps {num_samples} x {num_classes} half-precision values, which do not fit on "
                f"{device}. Pass relabel_weight=0 to train without it."
            ) from error

    def grow(self, num_samples: int) -> None:
        """Make room for at least `num_samples`, doubling."""
        held = self.logits.shape[0] - 1
        if num_samples > held:
            extra = self.logits.new_zeros(max(num_samples, 2 * held) - held, self.logits.shape[1])
            self.logits = torch.cat([self.logits[:-1], extra, self.logits[-1:]])

    def stored(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """ŷ_{t−1} of a batch, (b, C)."""
        return self.logits[index].to(dtype)

    def update(
        self, index: Tensor, logits: Tensor, stored: Tensor, keep: Tensor, mean_square: Tensor | None = None
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
        self.logits[torch.where(keep, index, self.logits.shape[0] - 1)] = new.clamp(-limit, limit).half()
        return target, stored.ne(0).any(1)

    def merge(self, owner: Tensor, chunk: int = 2**24) -> None:
        """Takes each row from the process that owns it; the others' rows stay. `owner` as in `ScoreTable.merge`."""
        rows = max(1, chunk // self.logits.shape[1])
        for start in range(0, len(owner), rows):
            part = slice(start, min(start + rows, len(owner)))
            values, of = self.logits[part], owner[part, None]
            merged = sum_in_place(torch.where(of == rank(), values, 0).float())
            values.copy_(torch.where(of >= 0, merged.half(), values))

    def state_dict(self) -> dict[str, Tensor]:
        """ŷ without the spare row."""
        return {"logits": self.logits[:-1].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes ŷ back."""
        self.logits[:-1] = state["logits"]

    def to(self, device: torch.device) -> None:
        """Moves the store."""
        self.logits = self.logits.to(device)
