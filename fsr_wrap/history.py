"""How training went, epoch by epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dictionary import RewardDictionary
from .distributed import sum_in_place, world_size
from .relabel import PseudoLabels

SUMS = 5
_CHUNK = 2**24  # values decoded at once
_SHARES = "zero_weight_ratio", "effective_share", "agreement", "held_out_agreement", "wrong_share"
NUMBERS = ("loss", "reward_loss", *_SHARES, "dictionary_agreement")

Epoch = dict[str, float | None]


class History:
    """A few numbers of each epoch that ended, and what those of the present one are made of.

    In several processes each adds up its own part of the batches; `consolidate` brings the parts together.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.epochs: list[Epoch] = []
        self.samples = 0  # of the present epoch, over all processes
        # Of them: loss, reward loss, missing weights, Σu and Σu², where u is ω in units of 1/b.
        self.sums = torch.zeros(SUMS, dtype=torch.float64, device=device)  # known to all processes
        self._mine = torch.zeros_like(self.sums)  # to this one alone

    def add(self, units: Tensor, losses: Tensor, reward_loss: Tensor, missing: Tensor, *, known: bool = False) -> None:
        """Adds up several steps.

        **Arguments:** `units`, the weights in units of 1/b, and `losses` (k, b); `reward_loss` (k,), times b; `missing`
        (k, b), the part of each weight that is missing; `known`, whether all processes add the same.
        """
        values = units * losses, reward_loss, missing, units, units.square()
        sums = torch.stack([value.sum(dtype=torch.float64) for value in values])
        if known or world_size() == 1:
            self.sums += sums
        else:
            self._mine += sums

    def add_reward_loss(self, reward_loss: Tensor, size: int) -> None:
        """Adds the reward loss of a step in which this process has no samples."""
        self._mine[1] += reward_loss * size

    def consolidate(self) -> None:
        """Brings the parts of all processes together."""
        self.sums += sum_in_place(self._mine)
        self._mine = torch.zeros_like(self.sums)

    def end_epoch(self, epoch: int, *, reweighting: bool, told: Epoch) -> None:
        """Ends an epoch. `told`: what else is known of it. Synchronises with the device."""
        loss, reward_loss, zeros, total, squares = self.sums.tolist()
        samples = self.samples
        if samples:
            entry: Epoch = {"epoch": epoch, "samples": samples, "reweighting": reweighting}
            entry |= dict.fromkeys(NUMBERS)
            entry |= {"loss": loss / samples, "reward_loss": reward_loss / samples}
            entry |= {"zero_weight_ratio": zeros / samples}
            entry |= {"effective_share": total**2 / (squares * samples) if squares else 0.0}
            self.epochs.append(entry | told)
        self.samples = 0
        self.sums.zero_()

    def to(self, device: torch.device) -> None:
        """Moves the sums."""
        self.sums, self._mine = self.sums.to(device), self._mine.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and a tensor; in several processes, `consolidate` first."""
        epochs = [dict(entry) for entry in self.epochs]
        return {"epochs": epochs, "samples": self.samples, "sums": self.sums + self._mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all of it back."""
        self.epochs = [dict(entry) for entry in state["epochs"]]
        self.samples = state["samples"]
        self.sums.copy_(state["sums"])


def dictionary_agreement(dictionary: RewardDictionary, pseudo: PseudoLabels | None) -> float | None:
    """The share of the dictionary's samples that the network, on average, classifies as they are labelled: a sign of
    its purity. None if there are none, or no pseudo-labels."""
    index, label = dictionary.index, dictionary.label
    if pseudo is None or not len(index):
        return None
    right = torch.zeros((), dtype=torch.int64, device=index.device)
    for part in torch.arange(len(index), device=index.device).split(max(1, _CHUNK // pseudo.num_classes)):
        values, _ = pseudo.stored(index[part], torch.float32)
        right += (values.argmax(1) == label[part]).sum()
    return int(right) / len(index)
