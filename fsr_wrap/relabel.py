"""What the network thought of each sample: momentum pseudo-labels ŷ (Eq. 7), or averaged probabilities p̄."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .distributed import sum_in_place, world_size
from .functional import SHUT, distribution, relabel

_LARGEST = torch.finfo(torch.float16).max
_CHUNK = 2**24  # values exchanged at once

Columns = dict[str, Tensor]


class Storage(Protocol):
    """How ŷ is kept: rows of a few columns, zeros where a sample was never seen."""

    def columns(self, num_classes: int) -> dict[str, tuple[int, torch.dtype]]:
        """Width and dtype of each column."""
        ...

    def encode(self, logits: Tensor, is_open: Tensor) -> Columns:
        """(b, C) → (b, width) each, in range of the columns' dtypes but not in them yet. `is_open`: classes
        that no mask shuts, (b, C)."""
        ...

    def decode(self, columns: Columns, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(b, width) each → (b, C), and the mean square of each row, (b,)."""
        ...


class Half:
    """All C values in half precision: 2·C bytes a sample."""

    def columns(self, num_classes: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"logits": (num_classes, torch.float16)}

    def encode(self, logits: Tensor, is_open: Tensor) -> Columns:
        return {"logits": logits.clamp(-_LARGEST, _LARGEST)}

    def decode(self, columns: Columns, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = columns["logits"].to(dtype)
        return logits, logits.square().mean(1)


class Byte:
    """All C values as multiples of 1/127 of the sample's largest: C + 2 bytes a sample."""

    def columns(self, num_classes: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"logits": (num_classes, torch.int8), "scale": (1, torch.float16)}

    def encode(self, logits: Tensor, is_open: Tensor) -> Columns:
        scale = (logits.abs().amax(1, keepdim=True) / 127).clamp(max=_LARGEST).half()
        number = (logits / scale.to(logits.dtype)).nan_to_num(0.0).round().clamp(-127, 127)  # 0/0 where all are 0
        return {"logits": number, "scale": scale}

    def decode(self, columns: Columns, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = columns["logits"] * columns["scale"].to(dtype)
        return logits, logits.square().mean(1)


class Largest:
    """The K largest values of each sample, the mean of its others and the mean square of all: 4·K + 6 bytes a sample,
    6·K + 6 from 2¹⁵ classes on."""

    def __init__(self, number: int) -> None:
        self.number = number

    def columns(self, num_classes: int) -> dict[str, tuple[int, torch.dtype]]:
        number = min(self.number, num_classes)
        index = torch.int16 if num_classes <= 2**15 else torch.int32
        few = {"rest": (1, torch.float16), "square": (1, torch.float32)}
        return {"logits": (number, torch.float16), "classes": (number, index), **few}

    def encode(self, logits: Tensor, is_open: Tensor) -> Columns:
        logits = torch.where(is_open, logits.clamp(-_LARGEST, _LARGEST), 0)
        where = torch.where(is_open, logits, -torch.inf).topk(min(self.number, logits.shape[1]), dim=1).indices
        top = logits.gather(1, where)
        others = is_open.sum(1) - is_open.gather(1, where).sum(1)
        rest = (logits.sum(1) - top.sum(1)) / others.clamp(min=1)
        few = {"rest": rest[:, None], "square": logits.float().square().mean(1, keepdim=True)}
        return {"logits": top, "classes": where, **few}

    def decode(self, columns: Columns, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rest = columns["rest"].to(dtype).expand(-1, num_classes)
        logits = rest.scatter(1, columns["classes"].long(), columns["logits"].to(dtype))
        return logits, columns["square"][:, 0].to(dtype)


def get_storage(storage: str | int) -> Storage:
    """`"float16"`, `"int8"`, or K. **Raises:** `KeyError` for another name."""
    if isinstance(storage, int):
        return Largest(storage)
    named: dict[str, type[Storage]] = {"float16": Half, "int8": Byte}
    return named[storage]()


class Reading(NamedTuple):
    """Of each sample, the averaged probability of its label, (N,), the largest and its class, (N,); of all, their mean,
    (C,); of each sample, the likeliest class besides its label, (N,). On the host. Where a sample was never seen, the
    former two are 0, and it has no part in the mean."""

    own: Tensor
    confidence: Tensor
    predicted: Tensor
    mean: Tensor
    rival: Tensor


class PseudoLabels:
    """ŷ or p̄ of each sample, zeros where a sample was never seen.

    **Arguments:** `num_samples`, N; `num_classes`, C; `momentum`, β; `storage`, as in
    [`FSRConfig`][fsr_wrap.FSRConfig].

    **Raises:** `MemoryError` if it does not fit, saying how to do with less.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        momentum: float,
        storage: str | int = "float16",
        device: torch.device | str = "cpu",
    ):
        self.num_classes, self.momentum = num_classes, momentum
        self.storage = get_storage(storage)
        self._mine: Tensor | None = None  # rows whose newest value this process alone has; in several processes
        self.columns = self._zeros(num_samples + 1, device)

    def _zeros(self, rows: int, device: torch.device | str) -> Columns:
        columns = self.storage.columns(self.num_classes)
        try:
            return {
                name: torch.zeros(rows, width, dtype=dtype, device=device) for name, (width, dtype) in columns.items()
            }
        except RuntimeError as error:
            raise MemoryError(
                f"Re-labelling keeps {sum(width * dtype.itemsize for width, dtype in columns.values())} bytes of each "
                f"of {rows - 1} samples, which do not fit on {device}. Pass relabel_storage=10 to keep the 10 largest "
                f"of {self.num_classes} values. If there are fewer samples, their "
                "indices do not count them from 0: call with_index(dataset), and pass dataset= or num_samples=."
            ) from error

    def __len__(self) -> int:
        return len(self.columns["logits"]) - 1

    def grow(self, num_samples: int) -> None:
        """Make room for at least `num_samples`."""
        held, device = len(self), self.columns["logits"].device
        if num_samples <= held:
            return
        bigger = self._zeros(num_samples + 1, device)
        for name, column in self.columns.items():
            bigger[name][:held] = column[:-1]
        self.columns = bigger
        if self._mine is not None:
            mine, self._mine = self._mine, self._nobodys()
            self._mine[:held] = mine[:-1]

    def stored(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """ŷ_{t−1} of a batch, (b, C), and the mean square of each sample's, (b,), 0 where there is none."""
        rows = {name: column[index] for name, column in self.columns.items()}
        return self.storage.decode(rows, self.num_classes, dtype)

    def update(
        self, row: Tensor, logits: Tensor, stored: Tensor, mean_square: Tensor, is_open: Tensor | None = None
    ) -> Tensor:
        """One step of Eq. 7 for a batch.

        **Arguments:**

        - `row`: (b,) indices, -1 for what must leave no trace. `logits`: f(x) (b, C). `stored`: from `stored()`.
        - `mean_square`: (), of `stored` over all processes. `is_open`: (b, C) bool, classes that no mask shuts.

        **Returns:** the pseudo-labels (b, C) from before the step.
        """
        is_open = logits > SHUT if is_open is None else is_open
        target, new = relabel(stored, logits, momentum=self.momentum, mean_square=mean_square, is_open=is_open)
        self._write(row, new, is_open)
        return target

    def average(self, row: Tensor, logits: Tensor, stored: Tensor, is_open: Tensor) -> None:
        """One step of the moving average of a batch's probabilities, p̄ ← βp̄ + (1−β)·softmax(f(x)), from zero on.

        **Arguments:** as in `update`.
        """
        self._write(row, torch.lerp(logits.softmax(1), stored, self.momentum), is_open)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """ŷ or p̄ of all samples, some rows at a time: which they are, and their values, (n, C) float32."""
        rows = max(1, _CHUNK // self.num_classes)
        for start in range(0, len(self), rows):
            where = slice(start, min(start + rows, len(self)))
            part = {name: column[where] for name, column in self.columns.items()}
            yield where, self.storage.decode(part, self.num_classes, torch.float32)[0]

    def read(self, label: Tensor, log_prior: Tensor | None = None) -> Reading:
        """What p̄ says of each sample and of all.

        **Arguments:** `label` (N,) int64, on the host, the class to ask for; −1 where there is none, which takes
        another's. `log_prior`, (C,), for classes as frequent as it says; None if p̄ is of such a network already.
        """
        own, best = [], []
        mean = self.columns["logits"].new_zeros(self.num_classes, dtype=torch.float64)
        for where, values in self.parts():
            usual, asked = distribution(values), label[where, None].clamp(min=0).to(values.device)
            own.append(usual.gather(1, asked)[:, 0].cpu())
            if log_prior is not None:
                usual = distribution(values * log_prior.to(values.device).exp())
            mean += usual.sum(0)
            best.append([one.cpu() for one in (*usual.max(1), usual.scatter(1, asked, -1).argmax(1))])
        confidence, predicted, rival = (torch.cat(column) for column in zip(*best, strict=True))
        return Reading(torch.cat(own), confidence, predicted, (mean / mean.sum().clamp(min=1)).cpu(), rival)

    def _write(self, row: Tensor, values: Tensor, is_open: Tensor) -> None:
        for name, column in self.storage.encode(values, is_open).items():
            self.columns[name][row] = column.to(self.columns[name].dtype)
        if world_size() > 1:
            if self._mine is None:
                self._mine = self._nobodys()
            self._mine[row] = True

    def consolidate(self) -> None:
        """Brings the newest values of all processes together."""
        if self._mine is None:
            self._mine = self._nobodys()
        rows = max(1, _CHUNK // self.num_classes)
        for start in range(0, len(self), rows):
            part = slice(start, min(start + rows, len(self)))
            mine = self._mine[part, None]
            renewed = sum_in_place(mine.to(torch.uint8)) > 0
            for column in self.columns.values():
                held = column[part].view(torch.uint8)
                sent = sum_in_place(torch.where(mine, held, 0))  # exact: one at most adds something to zeros
                held.copy_(torch.where(renewed, sent, held))
        self._mine.zero_()

    def _nobodys(self) -> Tensor:
        return torch.zeros(len(self) + 1, dtype=torch.bool, device=self.columns["logits"].device)

    def state_dict(self) -> dict[str, Any]:
        """The columns without the spare row."""
        return {name: column[:-1].clone() for name, column in self.columns.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes ŷ back."""
        for name, column in self.columns.items():
            column[:-1] = state[name]

    def to(self, device: torch.device) -> None:
        """Moves the store."""
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        self._mine = None if self._mine is None else self._mine.to(device)
