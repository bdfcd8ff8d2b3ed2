"""The given labels, and how often each class comes.

They also tell whether one index is one sample: a sample keeps its given label, so an index that comes with another one
is several.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import warn
from .distributed import rank

_UNSEEN = -1
_SEVERAL = 64  # batches compared at once
_SHARE = 1000  # one label in as many may differ: those that were corrected since
_RENEWED = 0.2  # of the frequencies of classes, with each epoch


def label_dtype(num_classes: int) -> torch.dtype:
    """Of stored labels and -1."""
    return torch.int16 if num_classes <= 2**15 else torch.int32


class GivenLabels:
    """The given label of each index, 2 bytes a sample (4 from 2¹⁵ classes on), and how often another one came; and how
    often each class came.

    Samples that come again are no evidence: a sampler may draw with replacement, repeat augmentations or fill the last
    batch. That one index comes with two labels is. They are compared some batches at a time, and nothing waits for the
    device before the epoch's end.

    **Arguments:** `num_samples`, N; `num_classes`, C.
    """

    def __init__(self, num_samples: int, num_classes: int, device: torch.device | str = "cpu") -> None:
        dtype = label_dtype(num_classes)
        self.label = torch.full((num_samples + 1,), _UNSEEN, dtype=dtype, device=device)  # and a spare row
        self._classes = num_classes
        self._visits = 0  # since the epoch began
        self._other = torch.zeros((), dtype=torch.int64, device=device)  # of them with another label than before
        self._waiting: list[Tensor] = []  # index and label of batches, (2, b) each
        self._warned = False
        self._drawn = torch.zeros(num_classes + 1, dtype=torch.int64, device=device)  # in this epoch; the last: nobody
        # How often each class comes in an epoch, a moving average, (C,) on the host. Samplers may prefer some.
        self.frequency = torch.zeros(num_classes, dtype=torch.float64, device="cpu")

    def note(self, batch: Tensor) -> None:
        """Takes note of the indices and labels of a batch, (2, b) int64; index −1 is nobody, and label C
        not to be looked at."""
        self._waiting.append(batch)
        self._visits += batch.shape[1]
        if len(self._waiting) == _SEVERAL:
            self._compare()

    def _compare(self) -> None:
        if not self._waiting:
            return
        index, label = torch.cat(self._waiting, dim=1)
        index = torch.where(label < self._classes, index, -1)
        label = label.to(self.label.dtype)
        before = self.label[index]
        self.label[index] = label
        other = ((label != before) & (before != _UNSEEN)) | (label != self.label[index])
        self._other += (other & (index >= 0)).sum()
        came = torch.where(index >= 0, label.long(), self._classes)
        self._drawn.index_add_(0, came, torch.ones_like(came))
        self._waiting = []

    @property
    def are_mixed_up(self) -> bool:
        """Whether more labels were other than before, in this epoch, than may be. Synchronises with the device."""
        self._compare()
        return int(self._other) > max(2, self._visits // _SHARE)

    def end_epoch(self) -> None:
        """Counts classes. Warns, once, if there were other labels than before. Synchronises with the device."""
        self._compare()
        drawn = self._drawn[:-1].double().cpu()
        if drawn.any():
            self.frequency = self.frequency.lerp(drawn, _RENEWED) if self.frequency.any() else drawn
        self._drawn.zero_()
        other, visits, mixed_up = int(self._other), self._visits, self.are_mixed_up
        self._other.zero_()
        self._visits = 0
        if self._warned or not mixed_up:
            return
        self._warned = True
        if rank() == 0:
            warn(
                f"{other} of the {visits} samples of this epoch came with another label than another sample of their "
                "index. So several samples share an index, or the order of a stream changes, or loss() is called for a "
                "validation set without torch.no_grad(), and their scores and pseudo-labels are mixed up. Give every "
                "sample an index of its own: with_index(dataset) of the whole data set, after ConcatDataset, "
                "concatenate_datasets or interleave_datasets and before it is split or shuffled. (Where you corrected "
                "labels, all is well.)",
            )

    def known(self) -> Tensor:
        """The label of each sample, -1 where none came, (N,)."""
        self._compare()
        return self.label[:-1]

    def grow(self, num_samples: int) -> None:
        """Make room for at least `num_samples`."""
        held = len(self.label) - 1
        if num_samples > held:
            self._compare()
            bigger = self.label.new_full((num_samples + 1,), _UNSEEN)
            bigger[:held] = self.label[:-1]
            self.label = bigger

    def to(self, device: torch.device) -> None:
        """Moves all of it."""
        self._compare()
        self.label, self._other, self._drawn = (one.to(device) for one in (self.label, self._other, self._drawn))

    def state_dict(self) -> dict[str, Tensor]:
        """The labels without the spare row, and the counts."""
        self._compare()
        return {
            "label": self.label[:-1].clone(),
            "drawn": self._drawn[:-1].clone(),
            "frequency": self.frequency.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes all of it back. Checkpoints of earlier versions have the labels alone."""
        self.label[:-1] = state["label"]
        if "drawn" in state:
            self._drawn[:-1] = state["drawn"]
            self.frequency.copy_(state["frequency"])
