"""The order of a step: check, look ahead, ask the reward batch, weigh, value."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, functional, rules
from .calls import other_streams_kept
from .checks import finite_rows
from .config import FSRConfig
from .heads import Batch, GradientStep, Head, KernelStep, MetaStep, Reward, meta_dtype
from .intake import Accepted, Intake, masked
from .memory import Memory
from .pushers import Pusher, Visit
from .selection import HELD


@dataclass
class _Decision:
    """How a batch is trained on: the weights (b,), the targets with the weights in them (b, C), b everywhere, the
    averaged probabilities that predictions are pulled to, (b, C), if they are, and by how much, and the classes'
    log-prior and margins (C,)."""

    weights: Tensor
    target: Tensor
    size: int
    average: Tensor | None = None
    pull: float = 0.0
    prior: Tensor | None = None
    margin: Tensor | None = None


@dataclass
class _Seen:
    """What is known of a batch before anything is asked: the batch at the head, its losses (b,), the logits of the
    clean inputs (b, C), indices with −1 for what must leave no trace, and whether each comes first in this epoch. Where
    they are kept: ŷ or p̄ (b, C), its mean squares (b,), and which classes no mask shuts (b, C)."""

    at_head: Batch
    losses: Tensor
    logits: Tensor
    index: Tensor
    new: Tensor
    stored: Tensor | None = None
    squares: Tensor | None = None
    is_open: Tensor | None = None


class Reweighting:
    """FSR on one model: weighs each batch, and keeps what is learned of it in its memory.

    **Arguments:** `core`, the user's own module; `head`, Θ^meta in it; `config`; `memory`.
    """

    def __init__(self, core: nn.Module, head: Head, config: FSRConfig, memory: Memory) -> None:
        self.intake = Intake(core, head, config)
        self.head, self.config, self.memory = head, config, memory
        self.weights: Tensor | None = None  # of the last batch
        self.new: Tensor | None = None  # who of it came for the first time in this epoch
        self._pusher: Pusher = config.get_pusher()
        self._recorded: list[_Decision] | None = None
        self._replayed: deque[_Decision] = deque()

    def take_over(self, memory: Memory) -> None:
        """Goes on with another memory; while it knows no number of classes, the head tells wrong logits."""
        self.memory = memory
        if not memory.ready:
            self.intake.check_again()

    def loss(self, logits: Tensor, target: Tensor, index: Tensor, label: Tensor | None) -> tuple[Tensor, int]:
        """The loss to back-propagate, and b over all processes, 0 if it does not count; see `FSRWrapper.loss`."""
        batch = self.intake.accept(self.memory, logits, target, index, label, again=bool(self._replayed))
        self.memory.prepare(batch.index, batch.logits.shape[1], batch.logits.device)
        self.intake.discard(batch)
        return self._train(batch)

    def evaluated_once(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, such that what FSR makes of a batch at its first evaluation is kept for the others.

        An optimizer that evaluates its closure several times a step (LBFGS, SAM) then minimises one function.
        """
        kept: list[_Decision] = []
        evaluations = iter([kept])  # the list to write to, at the first evaluation

        def evaluate() -> Any:
            self._recorded, self._replayed = next(evaluations, None), deque(kept)
            try:
                return closure()
            finally:
                self._recorded, self._replayed = None, deque()

        return evaluate

    def _train(self, batch: Accepted) -> tuple[Tensor, int]:
        """Values and weighs the batch; returns the loss to back-propagate, and b over all processes."""
        logits = batch.logits.to(meta_dtype(batch.logits))
        decision = self._replayed.popleft() if self._replayed else None
        # An epoch may have ended since the decision was made, and the classes be counted anew.
        prior = self.head.log_prior = self.memory.log_prior if decision is None else decision.prior
        adjusted = logits if prior is None else logits + prior
        size = 0
        if decision is None:
            kept = nullcontext() if self.head.is_linear else other_streams_kept()
            with self.intake.apart(logits.device.type), kept:
                decision = self._decide(batch, logits.detach(), adjusted.detach())
            size, decision.prior = decision.size, prior
            if self._recorded is not None:
                self._recorded.append(decision)
        # Σ ω_i ℓ_i + Σ s_i CE(ŷ_i) is one cross-entropy, with the targets ω_i y_i + s_i ŷ_i.
        if decision.margin is not None:
            adjusted = functional.held_back(adjusted, decision.target, decision.margin)
        loss = functional.cross_entropy(adjusted, decision.target, reduction="sum")
        if decision.average is not None:
            pull = functional.early_learning(logits, decision.average)
            loss = loss + pull.sum() * (decision.pull / decision.size)
        world = distributed.world_size()
        return loss if world == 1 else loss * world, size

    def _decide(self, batch: Accepted, logits: Tensor, adjusted: Tensor) -> _Decision:
        """The batch's weights and targets; updates what FSR knows. `adjusted`: the logits plus the log-prior."""
        memory, valid, selection = self.memory, batch.valid, self.memory.selection
        seen = self._look(batch, logits, adjusted)
        self.new = seen.new
        step, counts, mean_square = self._look_ahead(seen)
        size = sum(counts)
        rule, unnormalized, sums, reward = self._weigh(batch, seen, step)
        score, right = self._value(batch, seen, step)
        # A class that there is not is no candidate's.
        label = batch.label if batch.shown is None else torch.where(batch.shown, batch.label, logits.shape[1])
        more = {name: one for name, one in (("right", right), ("own", batch.own)) if one is not None}
        mine, length = (seen.index, label, score, *more.values()), max(counts)
        sums, (index, label, score, *others) = distributed.gather(sums, mine, length)
        weights = rules.normalize(rule, unnormalized, valid, size, sums)
        alone, offset = len(counts) == 1, distributed.rank() * length
        payload = () if selection is not None else self.intake.replay.payload(batch.clean)
        told = dict(zip(more, others, strict=True))
        row = memory.visit(index, label, score, payload, offset=offset, new=seen.new if alone else None, **told)
        row = row if alone else row[offset : offset + len(seen.losses)]
        if batch.shown is not None:
            row = torch.where(batch.shown, row, -1)

        if selection is not None:
            decision = self._select(batch, seen, row, weights, size, sums)
        else:
            decision = self._relabel(batch, seen, row, weights, size, mean_square)
        self.weights = weights
        bad = None if valid is None else (~valid).sum()
        memory.count(weights, seen.losses, size, skipped_samples=bad, **reward)
        return decision

    def _weigh(
        self, batch: Accepted, seen: _Seen, step: MetaStep | None
    ) -> tuple[str, Tensor, Tensor, dict[str, Tensor | None]]:
        """The rule that holds now, u of each sample, (b,), what the other processes must know of them, (k,), and what
        `Memory.count` is told of the reward batch."""
        memory, rule, valid, dtype = self.memory, self.config.weight_rule, batch.valid, seen.logits.dtype
        if memory.selection is not None:
            return "select", *memory.selection.weigh(seen.index, valid, dtype), {}
        if step is None or not memory.is_active:
            return "uniform", *rules.unnormalized("uniform", seen.losses, valid), {}
        scores, reward_loss, skipped = self._scores(step, batch, dtype)
        scores = scores if valid is None else torch.where(valid, scores, 0)
        told = {"reward_loss": reward_loss, "skipped_reward": skipped}
        return rule, *rules.unnormalized(rule, scores, valid), told

    def _look(self, batch: Accepted, logits: Tensor, adjusted: Tensor) -> _Seen:
        """What is known of the batch before anything is asked."""
        memory, valid = self.memory, batch.valid
        smoothing = self.config.label_smoothing if valid is None else 0.0  # masked targets are smooth already
        target = batch.target if batch.target.ndim == 1 else batch.target.detach().to(logits.dtype)
        losses, residual = functional.losses_and_residual(adjusted, target, smoothing)
        at_head = Batch(self.head.features(batch.capture.features, logits.dtype), target, residual, smoothing)
        index, new = batch.index, memory.table.is_new(batch.index, memory.epoch)
        if valid is not None:
            new, index = new & valid, torch.where(valid, index, -1)
        clean = logits if batch.mix is None else batch.clean.output.to(logits.dtype).flatten(1)
        seen = _Seen(at_head, losses, clean, index, new)
        if memory.pseudo is not None:
            seen.stored, seen.squares = memory.pseudo.stored(batch.index, logits.dtype)
            seen.is_open = clean > functional.SHUT
        return seen

    def _value(self, batch: Accepted, seen: _Seen, step: MetaStep | None) -> tuple[Tensor, Tensor | None]:
        """P of each sample, (b,), and, if the table keeps it, whether it is classified as its label."""
        ahead, dtype = None, seen.logits.dtype
        if step is not None and self._pusher.needs_lookahead:
            own = seen.at_head.features
            ahead = step.logits(
                own if batch.mix is None else self.head.features(batch.clean.features, dtype), seen.logits
            )
        learned = self.memory.table.learned
        learned = None if learned is None else learned[seen.index]
        visit = Visit(seen.logits, batch.label, seen.losses, ahead, learned)
        return self._pusher(visit), None if learned is None else visit.right

    def _relabel(
        self, batch: Accepted, seen: _Seen, row: Tensor, weights: Tensor, size: int, mean_square: Tensor | None
    ) -> _Decision:
        """The batch's targets under the paper's rules: the given ones by their weights, and pseudo-labels by p/b."""
        store, blend = self.memory.pseudo, None
        if store is not None and seen.stored is not None and seen.squares is not None and mean_square is not None:
            pseudo = store.update(row, seen.logits, seen.stored, mean_square, seen.is_open)
            there = (seen.squares > 0) & (row >= 0)  # a repeat in the batch takes no pseudo-label either
            if batch.mix is not None:
                pseudo, there = batch.mix.of(pseudo), there & there[batch.mix.partner]
            if self.memory.is_active:
                blend = pseudo * (there.to(weights.dtype) * (self.config.relabel_weight / size))[:, None]
        blend = torch.zeros_like(seen.logits) if blend is None else blend
        return _Decision(weights, _blended(seen.at_head, weights, blend), size)

    def _select(self, batch: Accepted, seen: _Seen, row: Tensor, weights: Tensor, size: int, sums: Tensor) -> _Decision:
        """The batch's targets: once labels are judged, what is missing of their weights goes to the average so far."""
        memory, mix = self.memory, batch.mix
        store, selection = memory.pseudo, memory.selection
        assert store is not None
        assert selection is not None
        assert seen.stored is not None
        assert seen.is_open is not None
        store.average(row, seen.logits, seen.stored, seen.is_open)
        hold = selection.hold(tail=memory.margin is not None)
        if not selection.active and not hold:
            return _Decision(weights, self._mixed(batch, seen, weights, torch.zeros_like(seen.stored)), size)
        # K values say nothing of what is shut; and what came before in this epoch may be known to another process only.
        known = row >= 0
        if not selection.active:  # nobody is held out any more once labels are judged
            known &= selection.code[seen.index] != HELD
        average = functional.distribution(seen.stored * (seen.is_open & known[:, None]))
        share = (1 - selection.weight[seen.index].to(weights.dtype)) / sums.sum().clamp(min=1)
        target = self._mixed(batch, seen, weights, functional.sharpen(average) * share[:, None])
        average = average if mix is None else mix.of(average)
        # Before labels are judged margins would teach wrong ones, most of which are those of rare classes.
        margin = memory.margin if selection.active else None
        return _Decision(weights, target, size, average, hold * self.config.relabel_weight, margin=margin)

    def _mixed(self, batch: Accepted, seen: _Seen, weights: Tensor, blend: Tensor) -> Tensor:
        """The targets of samples whose partners, under MixUp, are weighed for themselves."""
        if batch.mix is None:
            return _blended(seen.at_head, weights, blend)
        own = replace(seen.at_head, target=batch.label, label_smoothing=self.config.label_smoothing)
        return batch.mix.of(_blended(own, weights, blend))

    def _reward(self, batch: Accepted, dtype: torch.dtype) -> tuple[Reward, Tensor | None]:
        """This process's part of the reward batch, and how many samples were left out of it because of NaN or inf."""
        config, capture = self.config, batch.capture
        label, payload = self.memory.reward_batch()
        if distributed.world_size() > 1:
            part = slice(distributed.rank(), None, distributed.world_size())
            label, payload = label[part], tuple(tensor[part] for tensor in payload)
        features = self.head.features(self.intake.replay.features(payload, capture), dtype)
        reward = Reward(features, label, config.label_smoothing, config.reward_batch_size)
        if not isinstance(features, Tensor):  # a call of the model
            return reward, None
        if features.device.type == "cpu" and math.isfinite(features.sum().item()):
            return reward, None
        finite = finite_rows(features)
        soft = functional.dense_target(label, batch.logits.new_zeros(len(label), batch.logits.shape[1], dtype=dtype))
        features, soft = masked(finite, features, soft, config.label_smoothing)
        return replace(reward, features=features, target=soft, label_smoothing=0.0), (~finite).sum()

    def _scores(self, step: MetaStep, batch: Accepted, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores of the batch, this process's part of the reward loss, and how many reward samples were left out."""
        memory, every = self.memory, self.config.reward_every
        if every == 1 or not isinstance(step, GradientStep):
            reward, skipped = self._reward(batch, dtype)
            return *step.scores(reward), skipped
        skipped = None
        if memory.gradient_age % every == 0:
            reward, skipped = self._reward(batch, dtype)
            gradient, loss = step.reward_gradient(reward)
            memory.gradient = {**gradient, "/loss": loss}
        memory.gradient_age = memory.gradient_age % every + 1
        gradient = {name: value.to(dtype) for name, value in memory.gradient.items()}
        loss = gradient.pop("/loss")
        return step.scores_along(gradient), loss, skipped

    def _look_ahead(self, seen: _Seen) -> tuple[MetaStep | None, list[int], Tensor | None]:
        """The look-ahead step if it is needed, each process's b, and the mean square of ŷ over all: one all-reduce.

        Several processes wait for the device here, to know how much there is to exchange.
        """
        batch, squares, is_open = seen.at_head, seen.squares, seen.is_open
        if self.config.selects:
            squares = None
        needed = self._pusher.needs_lookahead or (self.memory.is_active and not self.config.selects)
        head, lr, here, world = self.head, self.config.lookahead_lr, len(batch.residual), distributed.world_size()
        dtype = batch.residual.dtype
        total: dict[str, Tensor] = {}
        if squares is not None and is_open is not None:
            known = seen.new.to(dtype)
            total = {"/square": known @ squares, "/new": known @ is_open.mean(1, dtype=dtype)}
        params = head.params(dtype) if needed else {}
        # Inner products of features are the cheaper form where there are more classes than about half as many reward
        # samples; the choice must be the same in all processes, so it does not depend on b.
        many_classes = 2 * batch.residual.shape[1] > self.config.reward_batch_size
        by_kernel = head.is_linear and self.config.reward_every == 1 and many_classes
        if needed and lr and not by_kernel:
            total |= head.batch_gradient(params, batch)
        counts = [here]
        if world > 1:
            of_each = batch.residual.new_zeros(world)
            of_each[distributed.rank()] = here
            total = distributed.sum_all({**total, "/counts": of_each})
            counts = [int(count) for count in total["/counts"].tolist()]
        step: MetaStep | None = None
        if needed and by_kernel:
            step = KernelStep(head, batch, lr, params, sum(counts), max(counts))
        elif needed:
            step = GradientStep(head, batch, lr, params, total, sum(counts))
        return step, counts, total["/square"] / total["/new"].clamp(min=1) if squares is not None else None


def _blended(batch: Batch, weights: Tensor, blend: Tensor) -> Tensor:
    """Σ of the batch's own targets by their weights (b,), and what else there is of each class, (b, C)."""
    if batch.target.ndim == 1 and not batch.label_smoothing:
        return blend.scatter_add_(1, batch.target[:, None], weights[:, None])
    return torch.addcmul(blend, functional.dense_target(batch.target, blend, batch.label_smoothing), weights[:, None])
