"""What FSR remembers between steps: scores, dictionary, pseudo-labels, counters; as plain tensors and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .collisions import GivenLabels
from .config import FSRConfig
from .dictionary import RewardDictionary
from .distributed import world_size
from .functional import class_margins, effective_sample_size
from .history import SUMS, History, dictionary_agreement
from .loading import COUNTERS, Unfit, check_fit, check_state, cropped
from .pushers import ScoreTable, stored_epoch
from .relabel import PseudoLabels
from .selection import TRAINED, WRONG, Selection
from .visits import Visits

STATE_VERSION = 1
METRICS = (
    "loss",
    "reward_loss",
    "zero_weight_ratio",
    "effective_sample_size",
    "max_weight",
    "all_zero_batches",
    "skipped_samples",
    "skipped_reward_samples",
)
_AHEAD = 16  # reward batches drawn at once
_UNCOUNTED = 64  # steps whose metrics are added up at once


class Memory:
    """Everything that FSR carries from one step to the next.

    The tables are made at the first batch, when the number of classes and the device are known.

    **Arguments:** `config`; `num_samples`, N, or None if it is not known; `samples`, how many of them are trained on,
    if that is known to be less.
    """

    table: ScoreTable
    given: GivenLabels
    dictionary: RewardDictionary
    pseudo: PseudoLabels | None
    selection: Selection | None
    visits: Visits
    sums: Tensor
    history: History

    def __init__(self, config: FSRConfig, num_samples: int | None, samples: int | None = None) -> None:
        self.config, self.num_samples, self.samples = config, num_samples, samples or num_samples
        self.ready = False
        self.epoch = 0  # epochs ended
        self.consumed = 0  # samples since, over all processes
        self.draws = 0
        self.largest = -1  # index seen
        self.steps = 0  # since the metrics were read
        self.gradient: dict[str, Tensor] = {}  # G and the reward loss, where they serve for several steps
        self.gradient_age = 0
        self.log_prior: Tensor | None = None  # τ log π of each class, from the end of the first epoch on
        self.margin: Tensor | None = None  # (C,), by how much labels must be ahead; see `functional.class_margins`
        self.plan: Tensor | None = None  # the next reward batches: slots, rows, labels (3, 16, q)
        self.planned = 0  # those of them that were used
        # Steps whose metrics are not in the sums yet: weights, losses, reward loss, two numbers skipped; and b.
        self._uncounted: list[tuple[Any, ...]] = []
        self._sizes: list[int] = []
        self.scattered = False  # whether a part of it is in other processes only
        self.class_names: list[str] | None = None

    @property
    def num_classes(self) -> int | None:
        """C, or None before the first batch."""
        return self.dictionary.num_classes if self.ready else None

    @property
    def is_active(self) -> bool:
        """Whether the next batch is re-weighted: labels are taken for wrong, or the warm-up is over and there is
        reward data."""
        if self.config.selects:
            return self.ready and self.selection is not None and self.selection.active
        return self.epoch >= self.config.warmup_epochs and self.ready and bool(self.dictionary)

    @property
    def balance(self) -> float:
        """τ, as it counts now."""
        return self.config.class_balance * (1.0 if self.selection is None else self.selection.balance)

    def prepare(self, index: Tensor, num_classes: int, device: torch.device) -> None:
        """Makes the tables for the first batch; later makes room in them, and moves them to the batch's device."""
        largest = self.largest
        if self.num_samples is None and len(index):
            largest = max(largest, int(index.max()))
        rows = self.num_samples or 1 << max(largest, 0).bit_length()
        if not self.ready:
            self._make(rows, num_classes, device)
        if self.table.score.device != device:
            self._to(device)
        for part in self._tables():
            part.grow(rows)
        self.largest = largest

    def _tables(self) -> Iterator[Any]:
        """What has a row for each sample; first what takes most room, so that nothing has changed if there is none."""
        tables = self.pseudo, self.selection, self.table, self.given, self.visits
        return (table for table in tables if table is not None)

    def _to(self, device: torch.device) -> None:
        for part in (*self._tables(), self.dictionary):
            part.to(device)
        self.log_prior = None if self.log_prior is None else self.log_prior.to(device)
        self.margin = None if self.margin is None else self.margin.to(device)
        self.sums = self.counted().to(device)
        self.history.to(device)
        self.plan = None if self.plan is None else self.plan.to(device)
        self.gradient = {name: value.to(device) for name, value in self.gradient.items()}

    def _make(self, rows: int, num_classes: int, device: torch.device | str) -> None:
        config, pseudo, selection = self.config, None, None
        if config.selects:
            more: dict[str, Any] = {"samples": self.samples, "seed": config.seed}
            more["log_odds"] = config.get_pusher().log_odds
            selection = Selection(rows, num_classes, device=device, **more)
        if config.selects or config.relabel_weight > 0:
            pseudo = PseudoLabels(rows, num_classes, config.relabel_momentum, config.relabel_storage, device=device)
        learned = config.selects or config.get_pusher().needs_learned
        self.table = ScoreTable(rows, config.score_momentum, device, learned=learned)
        self.given = GivenLabels(rows, num_classes, device)
        self.visits = Visits(rows, device)
        # Features take little room: a long buffer saves time. Inputs may be images: a short one saves room.
        long = max(512, config.dictionary_size) if config.reward == "cached" else None
        self.dictionary = RewardDictionary(num_classes, config.dictionary_size, buffer=long, device=device)
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        self.history = History(device)
        self.pseudo, self.selection, self.ready = pseudo, selection, True

    def end_epoch(self, rate: float = 0.0) -> None:
        """The best samples of the epoch become the dictionary (Eq. 4); given labels are judged, and classes counted.

        **Arguments:** `rate`, the learning rate, 0 where that is not known.
        """
        active = self.is_active
        members = self.dictionary.slots
        last = self.table.epoch[members.clamp(min=0)]
        # Of the old members, those visited in the last epoch and not in this one compete on.
        carry = (members >= 0) & (last == stored_epoch(self.epoch - 1))
        self.epoch += 1
        self.consumed = 0
        self.dictionary.update(carry, self.generator())
        self.plan = None
        self.counted()
        self.consolidate()
        self.given.end_epoch()
        given = self.given.known()
        self.visits.end_epoch(*self._seen(self.epoch - 1))
        if self.selection is not None and self.pseudo is not None:
            known = self.table, given, self.pseudo, self.log_prior
            told = self.selection.end_epoch(self.epoch - 1, self.config.warmup_epochs, *known, rate)
        else:
            told = {"dictionary_agreement": dictionary_agreement(self.dictionary, self.pseudo)}
        self.history.end_epoch(self.epoch - 1, reweighting=active, told=told)
        if self.config.class_balance:
            self._count_classes(given)

    def _seen(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Who was seen in an epoch, and whose label is held out or taken for wrong, (N,) bool each."""
        seen = self.table.epoch[:-1] == stored_epoch(epoch)
        return seen, torch.zeros_like(seen) if self.selection is None else self.selection.code[:-1] != TRAINED

    def counted_visits(self) -> tuple[Tensor, Tensor]:
        """How many epochs saw each sample, this one too, and in how many its label was held out or taken for wrong."""
        seen, unused = self._seen(self.epoch)
        return self.visits.seen.int() + seen, self.visits.unused.int() + (seen & unused)

    def _count_classes(self, given: Tensor) -> None:
        """How often each class comes, labels that are taken for wrong left out: the prior; and how many samples of it
        there are: the margins."""
        known = counts = given >= 0
        if self.selection is not None:
            counts = known & (self.selection.code[:-1] != WRONG)
        everybody, number = (
            torch.bincount(given[those].long(), minlength=self.dictionary.num_classes) for those in (known, counts)
        )
        if self.selection is not None:
            margin = (class_margins(number) * self.balance).float()
            self.margin = margin if margin.any() else None
        often = self.given.frequency.to(number.device)
        often = often * (known.sum() / often.sum().clamp(min=1))  # in as many draws as there are samples
        number = (often * number / everybody.clamp(min=1)).clamp(min=1)
        self.log_prior = (self.balance * (number / number.mean()).log()).float()

    def reward_batch(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Labels (q,) and payloads of the next reward batch."""
        if self.plan is None or self.planned == self.plan.shape[1]:
            size = self.config.reward_batch_size
            self.plan = self.dictionary.plan(_AHEAD * size, self.generator()).view(3, _AHEAD, size)
            self.planned = 0
        _, row, label = self.plan[:, self.planned].unbind()
        self.planned += 1
        return label, self.dictionary.payload(row)

    def consolidate(self) -> None:
        """Brings together what the processes hold apart: candidates' payloads and ŷ. All processes must call it."""
        if self.scattered:
            self.dictionary.consolidate()
            self.counted()
            self.history.consolidate()
            if self.pseudo is not None:
                self.pseudo.consolidate()
            self.scattered = False

    def visit(
        self,
        index: Tensor,
        label: Tensor,
        score: Tensor,
        payload: tuple[Tensor, ...],
        *,
        offset: int = 0,
        new: Tensor | None = None,
        right: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """Takes note of a batch: of the samples of all processes, and the payloads of this one's.

        **Arguments:** as in `ScoreTable.update` and `RewardDictionary.push`; `own`, whether each label is the one that
        the sample was given, as the largest entry of a soft target may not be, (b,) bool, None if all are.

        **Returns:** the rows of the score table that were written, -1 where nothing was kept.
        """
        if world_size() > 1:
            self.scattered = True
            if self.num_samples is None:
                self.prepare(index, self.dictionary.num_classes, index.device)
        batch = torch.stack([index, label])  # a copy: they may be the user's own
        index, label = batch
        if own is not None:
            batch = torch.stack([index, torch.where(own, label, self.dictionary.num_classes)])
        self.given.note(batch)
        row, momentum = self.table.update(index, score, self.epoch, new, right)
        self.dictionary.push(row, label, momentum, payload, offset=offset)
        return row

    def count(
        self,
        weights: Tensor,
        losses: Tensor,
        size: int,
        *,
        reward_loss: Tensor | None = None,
        skipped_samples: Tensor | None = None,
        skipped_reward: Tensor | None = None,
    ) -> None:
        """Takes note of a batch for what `metrics` will tell. `weights` and `losses` (b,), `size` b over all processes.

        They are added up some 64 steps at a time.
        """
        self.history.samples += size
        if not len(weights):
            if reward_loss is not None:
                self.history.add_reward_loss(reward_loss, size)
            return
        if self._uncounted and self._uncounted[0][0].shape != weights.shape:
            self.counted()
        self.steps += 1
        self._uncounted.append((weights, losses, reward_loss, skipped_samples, skipped_reward))
        self._sizes.append(size)
        if len(self._uncounted) == _UNCOUNTED:
            self.counted()

    def counted(self, known: bool = False, processes: int | None = None) -> Tensor:
        """The sums of all steps since the metrics were read, (8,) float64.

        **Arguments:** `known`, whether all processes have the same steps, see `History.add`; `processes`, of how many
        each step has the part of one.
        """
        if self._uncounted:
            weights, losses, reward_loss, skipped_samples, skipped_reward = self._uncounted_columns()
            size = torch.tensor(self._sizes, device="cpu").to(weights.device, non_blocking=True)
            largest, units = weights.amax(1), weights * size[:, None]
            # Labels that are judged keep a part of their weight: what is missing adds up.
            missing = (1 - units).clamp(min=0) if self.config.selects else weights <= 0
            parts = world_size() if processes is None else processes
            values = (
                parts * (weights * losses).sum(1),
                parts * reward_loss,
                missing.to(losses.dtype).mean(1),
                effective_sample_size(weights),
                largest * size,
                largest <= 0,
                skipped_samples,
                skipped_reward,
            )
            self.sums += torch.stack([value.to(self.sums.dtype).sum() for value in values])
            self.history.add(units, losses, reward_loss * size, missing, known=known)
            self._uncounted, self._sizes = [], []
        return self.sums

    def _uncounted_columns(self) -> list[Tensor]:
        if not self._uncounted:
            return []
        zero = self.sums.new_zeros((), dtype=torch.float32)
        columns = zip(*self._uncounted, strict=True)
        return [torch.stack([zero if value is None else value for value in column]) for column in columns]

    def generator(self) -> torch.Generator:
        """A generator that depends on seed and count alone, so that there is none to save."""
        self.draws += 1
        seed = (self.config.seed * 1_000_003 + self.draws) * 4096
        return torch.Generator("cpu").manual_seed(seed % 2**63)

    def generator_at(self, *place: object) -> torch.Generator:
        """A generator that depends on seed and place alone."""
        digest = hashlib.blake2b(repr((self.config.seed, place)).encode(), digest_size=8).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") % 2**63)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings; copies."""
        config = {**asdict(self.config), "pusher": self.config.pusher_name}
        state: dict[str, Any] = {"version": STATE_VERSION, "num_samples": self.num_samples, "config": config}
        state["world_size"] = world_size()
        state |= {name: getattr(self, name) for name in COUNTERS}
        if self.class_names is not None:
            state["class_names"] = list(self.class_names)
        if self.ready:
            state |= {"table": self.table.state_dict(), "dictionary": self.dictionary.state_dict()}
            state |= {"given": self.given.state_dict(), "visits": self.visits.state_dict()}
            state |= {"sums": self.sums.clone(), "gradient": {k: v.clone() for k, v in self.gradient.items()}}
            state |= {"uncounted": self._uncounted_columns(), "sizes": list(self._sizes)}
            state["history"] = self.history.state_dict()
            if self.pseudo is not None:
                state["pseudo"] = self.pseudo.state_dict()
            if self.selection is not None:
                state["selection"] = self.selection.state_dict()
            if self.log_prior is not None:
                state["log_prior"] = self.log_prior.clone()
            if self.margin is not None:
                state["margin"] = self.margin.clone()
            if self.plan is not None:
                state["plan"] = self.plan.clone()
        return state

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], config: FSRConfig, num_samples: int | None, samples: int | None = None
    ) -> Memory:
        """The memory that `state_dict` described, for a run with this configuration.

        **Raises:** `ValueError` if it belongs to a newer format, another data set or a configuration that stores
        something else, or if it is none that `state_dict` gave.
        """
        try:
            check_fit(state, config, num_samples, STATE_VERSION)
            check_state(state, metrics=len(METRICS), sums=SUMS, planned=_AHEAD)
            if num_samples is not None:
                state = cropped(state, num_samples)
            memory = cls(config, num_samples, samples)
            memory._restore(state)
            return memory
        except Unfit:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"FSR's part of the state is none that state_dict() gave: {error!r}.") from error

    def _restore(self, state: dict[str, Any]) -> None:
        config = self.config
        for name in COUNTERS:
            setattr(self, name, state[name])
        if self.num_samples is None:  # of a run that knew N, which counts no indices
            self.largest = max(self.largest, (state["num_samples"] or 0) - 1)
        self.class_names = state.get("class_names")
        if "table" in state:
            rows = state["table"]["score"].shape[0]
            dictionary = RewardDictionary.from_state_dict(state["dictionary"])
            self._make(rows, dictionary.num_classes, state["table"]["score"].device)
            self.dictionary = dictionary
            self.table.load_state_dict(state["table"])
            if "given" in state:
                self.given.load_state_dict(state["given"])
            if "visits" in state:
                self.visits.load_state_dict(state["visits"])
            self.sums.copy_(state["sums"])
            self._uncounted = list(zip(*(column.clone() for column in state["uncounted"]), strict=True))
            self._sizes = list(state["sizes"])
            told = "history" in state  # not in states of 0.1, whose steps may be of an epoch that ended
            if told:
                self.history.load_state_dict(state["history"])
            processes = state.get("world_size", 1)
            if world_size() > 1 or processes > 1 or not told:
                self.counted(known=True, processes=processes)  # each process has them all
            if not told:
                self.history.sums.zero_()
            if "plan" in state and state["plan"].shape[2] == config.reward_batch_size:
                self.plan = state["plan"].clone()
            self.gradient = {name: value.clone() for name, value in state["gradient"].items()}
            if self.pseudo is not None and "pseudo" in state:
                self.pseudo.load_state_dict(state["pseudo"])
            if self.selection is not None:
                self.selection.load_state_dict(state["selection"])
            if "log_prior" in state and config.class_balance:
                self.log_prior = state["log_prior"].clone()
            if "margin" in state and config.class_balance and config.selects:
                self.margin = state["margin"].clone()
            for part in self._tables():
                part.grow(self.num_samples or rows)
