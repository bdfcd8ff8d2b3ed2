"""The dictionary R of proxy reward samples: a class-balanced running top-k over the batches that go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import sum_in_place, world_size

EMPTY = -1


@dataclass(frozen=True)
class RewardBatch:
    """A class-balanced draw from the dictionary.

    **Arguments:** `index` (q,) dataset indices; `label` (q,) given classes; `payload`, stored tensors, (q, ...) each.
    """

    index: Tensor
    label: Tensor
    payload: tuple[Tensor, ...]


@dataclass
class _Entries:
    """Columns of equal length: dataset index (or EMPTY), label, P̂, and the arena row of the payload."""

    index: Tensor
    label: Tensor
    score: Tensor
    row: Tensor

    @classmethod
    def empty(cls, length: int, device: torch.device | str) -> _Entries:
        integers = torch.full((3, length), EMPTY, dtype=torch.int64, device=device)
        score = torch.full((length,), -torch.inf, dtype=torch.float32, device=device)
        return cls(integers[0].clone(), integers[1].clone(), score, integers[2].clone())

    def columns(self) -> dict[str, Tensor]:
        return {"index": self.index, "label": self.label, "score": self.score, "row": self.row}

    def to(self, device: torch.device) -> _Entries:
        return _Entries(**{name: column.to(device) for name, column in self.columns().items()})

    def where(self, mask: Tensor) -> _Entries:
        """The same entries, emptied where the mask is False."""
        index = torch.where(mask, self.index, EMPTY)
        return _Entries(index, self.label, self.score, self.row)


def _concatenate(parts: list[_Entries]) -> _Entries:
    names = ("index", "label", "score", "row")
    return _Entries(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


class RewardDictionary:
    """R of Eq. 4: per class the `max(1, |R| // C)` training samples of highest P̂, balanced over the classes.

    Batches are pushed as they go by and [`update`][fsr_wrap.RewardDictionary.update] at the epoch's end makes the
    best of them the new dictionary. Where each sample is visited once an epoch this is a full sort of P̂ over the
    data set, exactly, in one pass and without random access. Between updates a sample counts with its last visit; a
    sample of the old dictionary that was not visited in the epoch competes with its P̂ as it stands, for one epoch at
    most. Ties go to the lower index. Classes without samples are left out of the draws, short classes are drawn with
    replacement, and where q is smaller than the number of classes they take turns.

    Payloads (the head's input features, or the model's inputs) lie in one arena of (2·C·k + m) rows, k the quota and m
    the length of the buffer of candidates: 2.25 to 3 times |R| rows, whatever N. Selection moves no payload.

    **Arguments:**

    - `num_classes`: C. `size`: |R|.
    - `buffer`: m; a quarter of C·k, at least 128, if not given.
    """

    def __init__(
        self, num_classes: int, size: int, *, buffer: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.num_classes = num_classes
        self.size = size
        self.quota: int = max(1, size // num_classes)
        self._capacity = num_classes * self.quota
        self._length = max(128, self._capacity // 4) if buffer is None else buffer
        self._rows = 2 * self._capacity + self._length  # of the arena
        self._members = _Entries.empty(self._capacity, device)  # R_t, class by class, best first
        self._count = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._best = _Entries.empty(self._capacity, device)  # top-k of this epoch so far
        self._buffer: list[_Entries] = []  # visits since the last selection, batch by batch
        self._filled = 0
        self._free = torch.arange(self._length, device=device)  # rows of the arena, where they go
        self._arena: tuple[Tensor, ...] = ()
        # In several processes: whether a row's payload is in one process only, and whether in this one.
        self._alone, self._here = torch.zeros(2, self._rows, dtype=torch.bool, device=device)
        self._turn = 0
        self._classes: Tensor = torch.zeros(0, dtype=torch.int64, device="cpu")  # those present in R_t, on the host

    def __len__(self) -> int:
        return int(self._count.sum())

    def __bool__(self) -> bool:
        return self._classes.numel() > 0

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self._count.device

    @property
    def index(self) -> Tensor:
        """Dataset indices of the samples in R, (|R|,), class by class, best first."""
        return self._members.index[self._members.index != EMPTY]

    @property
    def label(self) -> Tensor:
        """Their given labels, (|R|,)."""
        return self._members.label[self._members.index != EMPTY]

    @property
    def score(self) -> Tensor:
        """Their P̂, (|R|,)."""
        return self._members.score[self._members.index != EMPTY]

    @property
    def slots(self) -> Tensor:
        """Dataset indices by slot, (C·k,), -1 where a slot is empty."""
        return self._members.index

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        entries = [c for e in (self._members, self._best, *self._buffer) for c in e.columns().values()]
        return sum(t.nbytes for t in [*entries, *self._arena, self._free, self._alone, self._here, self._count])

    def push(
        self, index: Tensor, label: Tensor, score: Tensor, payload: tuple[Tensor, ...], *, offset: int = 0
    ) -> None:
        """Offers the samples of a batch.

        In several processes each pushes the samples of all of them, in the same order, and the payloads of its own;
        the selection is then the same everywhere, and `consolidate` brings the payloads.

        **Arguments:**

        - `index`, `label`: (b,) integers. `score`: P̂ (b,), −inf for a sample that must not enter. They are kept as they
            are: do not write to them.
        - `payload`: tensors of (n, ...), in the shapes of the first push, n = b in one process. They are kept in its
            dtypes, or in wider ones if a later push needs them.
        - `offset`: the position of this process's first sample in the batch.

        **Raises:** `ValueError` if a payload's shape is another than at the first push.
        """
        if not self._arena:
            self._arena = tuple(_rows_like(tensor, self._rows) for tensor in payload)
        self.check_payload(payload)
        if any(tensor.dtype != arena.dtype for tensor, arena in zip(payload, self._arena, strict=True)):
            self._widen(payload)
        for start in range(0, len(index), self._length):
            part = slice(start, start + self._length)
            self._push(index[part], label[part], score[part], payload, offset - start)

    def _widen(self, payload: tuple[Tensor, ...]) -> None:
        """The arena in dtypes that hold what it has and the payload: features of float32 may be infinite in float16."""
        dtypes = [torch.promote_types(a.dtype, p.dtype) for a, p in zip(self._arena, payload, strict=True)]
        self._arena = tuple(arena.to(dtype) for arena, dtype in zip(self._arena, dtypes, strict=True))

    def check_payload(self, payload: tuple[Tensor, ...], advice: str = "Pad to one shape.") -> None:
        """**Raises:** `ValueError` if the shapes are others than those stored, with the advice."""
        if not self._arena:
            return
        found = [tuple(tensor.shape[1:]) for tensor in payload]
        expected = [tuple(tensor.shape[1:]) for tensor in self._arena]
        if found != expected:
            raise ValueError(
                f"The stored tensors have the shapes {expected} a sample, this batch has {found}. {advice}"
            )

    def _push(self, index: Tensor, label: Tensor, score: Tensor, payload: tuple[Tensor, ...], offset: int) -> None:
        """As `push`, for at most as many as the buffer holds; `offset` is negative where earlier payloads are done."""
        if self._filled + len(index) > self._length:
            self._select()
        row = self._free[self._filled : self._filled + len(index)]
        mine = row
        if offset or (payload and len(payload[0]) != len(row)):
            mine = row[max(offset, 0) : max(offset + (len(payload[0]) if payload else 0), 0)]
            payload = tuple(tensor[max(-offset, 0) :][: len(mine)] for tensor in payload)
        for arena, tensor in zip(self._arena, payload, strict=True):
            arena.index_copy_(0, mine, tensor.to(arena.dtype))
        if world_size() > 1:
            self._alone[row], self._here[row], self._here[mine] = True, False, True
        self._buffer.append(_Entries(index, label, score.float(), row))
        self._filled += len(index)

    def _select(self, carried: _Entries | None = None) -> Tensor:
        """Merges the buffer into the best of the epoch; returns how many of each class there are."""
        parts = [self._best, self._waiting()] if carried is None else [carried, self._best, self._waiting()]
        self._best, count = top_k_per_class(_concatenate(parts), self.num_classes, self.quota)
        self._clear_buffer([self._members, self._best])
        return count

    def _waiting(self) -> _Entries:
        """The buffer."""
        entries = _concatenate([_Entries.empty(0, self.device), *self._buffer])
        return entries.where(entries.score.isfinite())

    def _clear_buffer(self, in_use: list[_Entries]) -> None:
        self._buffer, self._filled = [], 0
        rows = self._rows
        used = torch.zeros(rows + 1, dtype=torch.int8, device=self.device)
        for entries in in_use:
            used[torch.where(entries.index != EMPTY, entries.row, rows)] = 1
        self._free = used[:rows].argsort(stable=True)[: self._length]

    def update(self, carry: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        """Makes the best samples of the epoch the new dictionary (Eq. 4). Synchronises with the device.

        **Arguments:**

        - `carry`: (C·k,) bool over `slots`: old members, not visited in the epoch, that compete on.
        - `generator`: on the host, for the order in which classes take turns.
        """
        self._count = self._select(None if carry is None else self._members.where(carry))
        self._members = self._best
        self._best = _Entries.empty(self._capacity, self.device)
        self._clear_buffer([self._members])
        present = self._count.cpu().nonzero()[:, 0]
        self._classes = present[torch.randperm(len(present), generator=generator, device="cpu")]
        self._turn = 0

    def consolidate(self) -> None:
        """Brings every process the payloads that one process alone has. All processes must call it."""
        entries = _concatenate([self._members, self._best, self._waiting()])
        rows = entries.row[entries.index != EMPTY]
        rows = rows[self._alone[rows]]
        here = self._here[rows, None]
        for arena in self._arena if len(rows) else ():  # the same rows in every process
            held = arena[rows].contiguous()
            sent = held.view(len(rows), -1).view(torch.uint8)  # no backend adds numbers of every dtype
            sum_in_place(sent.masked_fill_(~here, 0))  # exact: one at most adds something to zeros
            arena[rows] = held
        self._alone[rows] = False

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> RewardBatch:
        """A class-balanced reward batch: classes take turns, samples of a class are drawn with replacement.

        **Arguments:** `batch_size`, q; `generator`, on the host.

        **Raises:** `RuntimeError` if the dictionary is empty.
        """
        slot, row, label = self.plan(batch_size, generator)
        return RewardBatch(self._members.index[slot], label, self.payload(row))

    def plan(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """The draw of as many samples, without their payloads: slots, rows and labels, (3, number).

        Holds until the next update. It may be several reward batches, one after another.

        **Raises:** `RuntimeError` if the dictionary is empty.
        """
        if not self:
            raise RuntimeError("The dictionary is empty: there is reward data after the first update() only.")
        classes = len(self._classes)
        cls = self._classes.roll(-self._turn).repeat(-(-number // classes))[:number]
        self._turn = (self._turn + number) % classes
        uniform = torch.rand(number, generator=generator, dtype=torch.float32, device="cpu")
        cls, uniform = cls.to(self.device, non_blocking=True), uniform.to(self.device, non_blocking=True)
        count = self._count[cls]
        slot = cls * self.quota + torch.minimum((uniform * count).long(), count - 1)
        return torch.stack([slot, self._members.row[slot], cls])

    def payload(self, row: Tensor) -> tuple[Tensor, ...]:
        """What is stored in these rows of a plan, (n, ...) each."""
        # Indexing keeps the memory format of images; for rows of features index_select is faster.
        return tuple(arena.index_select(0, row) if arena.ndim == 2 else arena[row] for arena in self._arena)

    def to(self, device: torch.device) -> None:
        """Moves the entries; payloads move too."""
        self._members, self._best, *self._buffer = (
            entries.to(device) for entries in (self._members, self._best, *self._buffer)
        )
        self._count, self._free = self._count.to(device), self._free.to(device)
        self._alone, self._here = self._alone.to(device), self._here.to(device)
        self._arena = tuple(arena.to(device) for arena in self._arena)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; loads with `weights_only=True`. Without entries whose payload is elsewhere."""
        elsewhere = self._alone & ~self._here
        best, buffer = (entries.where(~elsewhere[entries.row]) for entries in (self._best, self._waiting()))
        return {
            "num_classes": self.num_classes,
            "size": self.size,
            "length": self._length,
            "free": self._free.clone(),
            "turn": self._turn,
            "classes": self._classes.clone(),
            "count": self._count.clone(),
            "members": {k: v.clone() for k, v in self._members.columns().items()},
            "best": {k: v.clone() for k, v in best.columns().items()},
            "buffer": {k: v.clone() for k, v in buffer.columns().items()},
            "arena": [arena.clone() for arena in self._arena],
            "channels_last": [not arena.is_contiguous() for arena in self._arena],  # files do not keep it
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RewardDictionary:
        """The dictionary that `state_dict` described."""
        self = cls(state["num_classes"], state["size"], buffer=state["length"], device=state["count"].device)
        self._turn = state["turn"]
        self._classes = state["classes"].cpu().clone()
        self._count, self._free = state["count"].clone(), state["free"].clone()
        self._members, self._best, waiting = (
            _Entries(**{k: v.clone() for k, v in state[name].items()}) for name in ("members", "best", "buffer")
        )
        self._buffer, self._filled = [waiting], len(waiting.index)
        self._arena = tuple(
            arena.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
            for arena, last in zip(state["arena"], state["channels_last"], strict=True)
        )
        return self


def _rows_like(tensor: Tensor, rows: int) -> Tensor:
    """Zeros of as many rows, in the memory format of the tensor."""
    # As zeros come from the allocator, which takes no memory for rows that are not written yet.
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        channels, height, width = tensor.shape[1:]
        return tensor.new_zeros((rows, height, width, channels)).permute(0, 3, 1, 2)
    return tensor.new_zeros((rows, *tensor.shape[1:]))


def top_k_per_class(entries: _Entries, num_classes: int, k: int) -> tuple[_Entries, Tensor]:
    """The k entries of highest score of each class, in (C·k) slots, class by class, best first; and the counts (C,).

    Of several entries with one index the last one counts; entries with index -1 do not. All shapes are fixed, so
    nothing waits for the device.
    """
    by_index = entries.index.argsort(stable=True)
    ordered = entries.index[by_index]
    alive = ordered != EMPTY
    alive[:-1] &= ordered[:-1] != ordered[1:]
    by_score = by_index[entries.score[by_index].argsort(descending=True, stable=True)]
    alive = torch.empty_like(alive).scatter_(0, by_index, alive)
    label = torch.where(alive, entries.label, num_classes)
    order = by_score[label[by_score].argsort(stable=True)]
    label = label[order]
    bounds = torch.searchsorted(label, torch.arange(num_classes + 1, device=label.device))
    rank = torch.arange(len(label), device=label.device) - bounds[label]
    spare = num_classes * k
    slot = torch.where((label < num_classes) & (rank < k), label * k + rank, spare)
    kept = _Entries.empty(spare + 1, label.device)
    for name, column in kept.columns().items():
        column[slot] = getattr(entries, name)[order]
    columns = {name: column[:spare] for name, column in kept.columns().items()}
    return _Entries(**columns), bounds.diff().clamp(max=k)
