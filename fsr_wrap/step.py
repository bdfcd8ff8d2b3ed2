"""The order of a step: check, look ahead, ask the reward batch, weigh, value."""

from __future__ import annotations

import math
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from . import distributed, functional
from .checks import INDEX_LIMIT, Watch, all_good, check_batch, find_problems
from .config import FSRConfig
from .heads import Batch, Capture, FunctionalStep, Head, LinearStep, MetaStep, Reward, Tap, meta_dtype
from .memory import Memory
from .pushers import Pusher, Visit


@dataclass
class _Mix:
    """What one call of `mixup` mixed."""

    mixed: Tensor
    target: Tensor
    inputs: Tensor
    label: Tensor
    partner: Tensor
    share: Tensor


@dataclass
class _Accepted:
    """A batch that passed the checks. `valid` is None where every sample is; `given` and `found` are the user's logits
    and the capture of their forward."""

    logits: Tensor
    target: Tensor
    label: Tensor
    index: Tensor
    capture: Capture
    mix: _Mix | None
    valid: Tensor | None
    given: Tensor
    found: Capture


@dataclass
class _Decision:
    """How a batch is trained on: weights, pseudo-labels and how much each counts, (b,), (b, C), (b,); b everywhere."""

    weights: Tensor
    pseudo: Tensor | None
    share: Tensor | None
    size: int


class Reweighting:
    """FSR on one model: weighs each batch, and keeps what is learned of it in its memory.

    **Arguments:** `core`, the user's own module; `head`, Θ^meta in it; `config`; `memory`.
    """

    def __init__(self, core: nn.Module, head: Head, config: FSRConfig, memory: Memory) -> None:
        self.core, self.head, self.config, self.memory = core, head, config, memory
        self.weights: Tensor | None = None  # of the last batch
        self._pusher: Pusher = config.get_pusher()
        self._watch = Watch()
        self._mixes: deque[_Mix] = deque(maxlen=8)
        self._checked = False
        # Where Θ^meta is more than the head, "features" are the model's input, and nothing is to be run for them.
        self._keeps_features = config.reward == "cached" or head.module is core
        self._recorded: list[_Decision] | None = None
        self._replayed: Iterator[_Decision] = iter(())
        self._listen()

    def _listen(self) -> None:
        self._tap = Tap(self.core, self.head.module)
        weakref.finalize(self, self._tap.remove)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for module in (self.core, self.head.module):  # the copied hooks lead nowhere: put new ones in their place
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self._tap]:
                    del hooks[key]
        self._listen()

    @property
    def is_active(self) -> bool:
        """Whether the next batch is re-weighted: the warm-up is over and there is reward data."""
        memory = self.memory
        return memory.epoch >= self.config.warmup_epochs and memory.ready and bool(memory.dictionary)

    def loss(self, logits: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, int]:
        """The loss to back-propagate, and b over all processes, 0 if it does not count; see `FSRWrapper.loss`."""
        batch = self._accept(logits, target, index)
        self._prepare(batch)
        return self._train(batch)

    def evaluated_once(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, such that what FSR makes of a batch at its first evaluation is kept for the others.

        An optimizer that evaluates its closure several times a step (LBFGS, SAM) then minimises one function.
        """
        kept: list[_Decision] = []
        evaluations = iter([kept])  # the list to write to, at the first evaluation

        def evaluate() -> Any:
            self._recorded, self._replayed = next(evaluations, None), iter(list(kept))
            try:
                return closure()
            finally:
                self._recorded, self._replayed = None, iter(())

        return evaluate

    def mixup(self, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed inputs and their soft targets; see `FSRWrapper.mixup`."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise TypeError("mixup() takes floating-point inputs: normalise the images first.")
        if target.dtype != torch.int64 or target.shape != inputs.shape[:1]:
            raise ValueError(
                f"mixup() takes int64 class numbers of shape ({len(inputs)},), not {target.dtype} of shape "
                f"{tuple(target.shape)}."
            )
        generator = self.memory.generator(1 + distributed.rank())
        uniform = torch.rand(len(inputs), generator=generator).to(inputs.device, non_blocking=True)
        partner = torch.randperm(len(inputs), generator=generator).to(inputs.device, non_blocking=True)
        share = functional.mixup_coefficients(uniform, self.config.mixup_beta)
        shape = (-1, *[1] * (inputs.ndim - 1))
        mixed = torch.lerp(inputs[partner], inputs, share.view(shape).to(inputs.dtype))
        known = target.clamp(0, self._num_classes() - 1)  # loss() refuses the others
        hard = functional.dense_target(known, share.new_zeros(len(target), self._num_classes()))
        soft = torch.lerp(hard[partner], hard, share[:, None])
        self._mixes.append(_Mix(mixed, soft, inputs, target, partner, share))
        return mixed, soft

    def _num_classes(self) -> int:
        if self.memory.num_classes is not None:
            return self.memory.num_classes
        if self.head.is_linear:
            return self.head.module.weight.shape[0]  # type: ignore[union-attr,index,return-value]
        raise RuntimeError("mixup() must know the number of classes: pass one batch to loss() first, or a linear head.")

    def _accept(self, logits: Tensor, target: Tensor, index: Tensor) -> _Accepted:
        """Checks all that was passed; raises before anything is changed."""
        index = check_batch(logits, target, index, num_classes=self.memory.num_classes)
        mix = self._find_mix(target)
        capture, given = self._tap.find(logits), logits
        if capture is None:
            raise RuntimeError(
                f"loss() found no forward of this model that passed through the head {self.head.name!r}: call "
                "model(x) with gradients before each loss(), and not many other forwards between the two. If the model "
                "was compiled, wrap it before its first call."
            )
        inputs = pytree.tree_leaves((capture.args, capture.kwargs))
        if mix is not None and not any(_same(leaf, mix.mixed) for leaf in inputs):
            raise ValueError("The model was not called with the inputs that mixup() returned: mix last, then call it.")
        if self.memory.ready:
            self.memory.dictionary.check_payload(self._payload(capture))
        label = mix.label if mix else target if target.ndim == 1 else target.detach().argmax(1)
        rows = self.memory.num_samples or INDEX_LIMIT
        good = all_good(logits, capture.features, target, label, index, rows)
        if not good:
            valid = self._look_closer(logits, capture, target, label, index, rows)
        if not self._checked:
            with self._tap.mute():
                self._checked = self.head.check(capture, logits)
        if good or (logits.device.type == "cpu" and self.config.nonfinite == "raise"):
            return _Accepted(logits, target, label, index, capture, mix, None, given, capture)
        index, label = index.clamp(0, rows - 1), label.clamp(0, logits.shape[1] - 1)
        logits = torch.where(valid[:, None], logits, 0)
        hard_or_soft = label if target.ndim == 1 else torch.where(valid[:, None], target, 0)
        soft = functional.dense_target(hard_or_soft, logits.detach().to(meta_dtype(logits)))
        soft = functional.dense_target(soft, logits, self.config.label_smoothing) * valid[:, None]
        features = capture.features
        features = torch.where(valid.view(-1, *[1] * (features.ndim - 1)), features, 0)
        kept = replace(capture, features=features)
        return _Accepted(logits, soft, label, index, kept, mix, valid, given, capture)

    def _look_closer(
        self, logits: Tensor, capture: Capture, target: Tensor, label: Tensor, index: Tensor, rows: int
    ) -> Tensor:
        """Which samples are good, (b,) bool. **Raises:** `ValueError` for others, as far as they are not skipped."""
        problems, valid = find_problems(logits, capture.features, target, label, index, rows)
        messages = {
            "label": f"a label outside [0, {logits.shape[1]}), the classes of the logits, or soft targets that are "
            "negative, NaN or infinite.",
            "index": f"an index outside [0, {rows}). Pass dataset= or num_samples= of the whole data set.",
            "non-finite": "NaN or infinite logits or features. Lower the learning rate, or pass nonfinite='skip'.",
        }
        skip = self.config.nonfinite == "skip"
        self._watch({name: n for name, n in problems.items() if not (skip and name == "non-finite")}, messages)
        return valid

    def _find_mix(self, target: Tensor) -> _Mix | None:
        for mix in reversed(self._mixes):
            if mix.target is target:
                return mix
        if self._mixes and target.is_floating_point():
            raise ValueError("mixup() was called, but loss() got another target: pass it as mixup() returned it.")
        return None

    def _prepare(self, batch: _Accepted) -> None:
        """The batch is good: forgets what was kept for it, and makes room for it."""
        self._tap.discard(batch.found, batch.given)
        while batch.mix is not None and self._mixes and self._mixes.popleft() is not batch.mix:
            pass
        self.memory.prepare(batch.index, batch.logits.shape[1], batch.logits.device)

    def _train(self, batch: _Accepted) -> tuple[Tensor, int]:
        """Values and weighs the batch; returns the loss to back-propagate, and b over all processes."""
        dtype, config = meta_dtype(batch.logits), self.config
        smoothing = config.label_smoothing if batch.valid is None else 0.0  # masked targets are smooth already
        logits = batch.logits.to(dtype)
        target = batch.target if batch.target.ndim == 1 else batch.target.to(dtype)
        losses = functional.cross_entropy(logits, target, smoothing)
        decision = next(self._replayed, None)
        size = 0
        if decision is None:
            with torch.no_grad(), torch.autocast(logits.device.type, enabled=False), self._tap.mute():
                features = self.head.features(batch.capture.features, dtype)
                at_head = Batch(features, logits.detach(), target.detach(), smoothing)
                decision = self._decide(batch, at_head, losses.detach())
            size = decision.size
            if self._recorded is not None:
                self._recorded.append(decision)
        loss = (decision.weights * losses).sum()  # no dot product: autocast would take it for a matrix product
        if decision.pseudo is not None and decision.share is not None:
            loss = loss + (decision.share * functional.cross_entropy(logits, decision.pseudo)).sum()
        world = distributed.world_size()
        return loss if world == 1 else loss * world, size

    def _decide(self, batch: _Accepted, at_head: Batch, losses: Tensor) -> _Decision:
        """Weights of the samples, their pseudo-labels, how much each of these counts; updates what FSR knows."""
        memory, active, valid = self.memory, self.is_active, batch.valid
        new = ~memory.table.visited(batch.index, memory.epoch)
        index = batch.index
        if valid is not None:
            new, index = new & valid, torch.where(valid, index, -1)
        clean = self._clean(batch)
        clean_features = self.head.features(clean.features, losses.dtype)
        clean_logits = at_head.logits if batch.mix is None else clean.output.to(losses.dtype)
        stored = None if memory.pseudo is None else memory.pseudo.stored(batch.index, losses.dtype)

        step, counts, mean_square = self._look_ahead(at_head, stored, new, active or self._pusher.needs_lookahead)
        size = sum(counts)
        scores: Tensor | None = None
        reward_loss, skipped = losses.new_zeros(()), losses.new_zeros(())
        if active and step is not None:
            scores, reward_loss, skipped = self._scores(step, batch, losses.dtype)
            scores = self.config.weight_lr * scores
            if valid is not None:
                scores = torch.where(valid, scores, 0)
        rule = "uniform" if scores is None else self.config.weight_rule
        scores = losses if scores is None else scores
        ahead = step.logits(clean_features, clean_logits) if step is not None and self._pusher.needs_lookahead else None
        score = self._pusher(Visit(clean_logits, batch.label, losses, ahead))

        mine, length = (index, batch.label, score), max(counts)
        sums, (index, label, score) = distributed.gather(_sums(rule, scores, valid), mine, length)
        weights = self._weigh(rule, scores, valid, size, sums)
        offset = distributed.rank() * length
        momentum = memory.visit(index, label, score, self._payload(clean), offset)[offset : offset + len(losses)]
        pseudo = share = None
        if memory.pseudo is not None and stored is not None and mean_square is not None:
            pseudo, seen = memory.pseudo.update(batch.index, clean_logits, stored, momentum > -torch.inf, mean_square)
            seen = seen & new
            if batch.mix is not None:
                pseudo = torch.lerp(pseudo[batch.mix.partner], pseudo, batch.mix.share.to(pseudo.dtype)[:, None])
                seen = seen & seen[batch.mix.partner]
            share = seen.to(weights.dtype) * (self.config.relabel_weight / size) if active else None

        self.weights = weights
        if len(losses):
            bad = 0.0 if valid is None else (~valid).sum()
            memory.count(weights, losses, size, reward_loss=reward_loss, skipped_samples=bad, skipped_reward=skipped)
        return _Decision(weights, pseudo, share, size)

    def _clean(self, batch: _Accepted) -> Capture:
        """The capture of the clean inputs: the batch's own, or of one more forward under MixUp."""
        mix, capture = batch.mix, batch.capture
        if mix is None:
            return capture
        leaves, tree = pytree.tree_flatten((capture.args, capture.kwargs))
        args, kwargs = pytree.tree_unflatten([mix.inputs if _same(leaf, mix.mixed) else leaf for leaf in leaves], tree)
        return self._replay(args, kwargs, capture)

    def _replay(self, args: tuple[Any, ...], kwargs: dict[str, Any], like: Capture) -> Capture:
        """One more forward as the user's was, without gradients and without a trace."""
        device = like.features.device
        devices = [] if device.type == "cpu" else [device]
        buffers = {name: buffer.clone() for name, buffer in self.core.named_buffers()}
        with (
            _other_streams_kept(),
            torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type),
            torch.autocast(device.type, like.autocast, enabled=like.autocast is not None),
            self._tap.divert() as box,
        ):
            functional_call(self.core, buffers, args, kwargs)
        if not box:
            raise RuntimeError(f"The extra forward did not pass through the head {self.head.name!r}.")
        return replace(box[0], args=args, kwargs=kwargs)

    def _payload(self, capture: Capture) -> tuple[Tensor, ...]:
        """What the dictionary stores of a batch: the head's input, or the model's."""
        if self._keeps_features:
            return (capture.features,)
        leaves = pytree.tree_leaves((capture.args, capture.kwargs))
        return tuple(leaf.detach() for leaf in leaves if _is_batched(leaf, len(capture.features)))

    def _reward(self, batch: _Accepted, dtype: torch.dtype) -> tuple[Reward, Tensor]:
        """This process's part of the reward batch, and how many samples were left out of it because of NaN or inf."""
        config, capture = self.config, batch.capture
        drawn = self.memory.dictionary.draw(config.reward_batch_size, self.memory.generator(0))
        part = slice(distributed.rank(), None, distributed.world_size())
        payload, label = [tensor[part] for tensor in drawn.payload], drawn.label[part]
        if self._keeps_features:
            features = payload[0]
        else:
            leaves, tree = pytree.tree_flatten((capture.args, capture.kwargs))
            rows = iter(payload)
            leaves = [next(rows) if _is_batched(leaf, len(capture.features)) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, tree)
            features = self._replay(args, kwargs, capture).features
        features = self.head.features(features, dtype)
        reward = Reward(features, label, config.label_smoothing, config.reward_batch_size)
        if features.device.type == "cpu" and math.isfinite(features.sum().item()):
            return reward, features.new_zeros(())
        finite = features.flatten(1).float().sum(1).isfinite()
        features = torch.where(finite.view(-1, *[1] * (features.ndim - 1)), features, 0)
        dense = functional.dense_target(label, batch.logits.new_zeros(len(label), batch.logits.shape[1], dtype=dtype))
        soft = functional.dense_target(dense, dense, config.label_smoothing) * finite[:, None]
        return replace(reward, features=features, target=soft, label_smoothing=0.0), (~finite).sum()

    def _scores(self, step: MetaStep, batch: _Accepted, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the batch, this process's part of the reward loss, and how many reward samples were left out."""
        memory, every = self.memory, self.config.reward_every
        if every == 1 or not isinstance(step, FunctionalStep):
            reward, skipped = self._reward(batch, dtype)
            return *step.scores(reward), skipped
        skipped = batch.logits.new_zeros(())
        if memory.gradient_age % every == 0:
            reward, skipped = self._reward(batch, dtype)
            gradient, loss = step.reward_gradient(reward)
            memory.gradient = {**gradient, "/loss": loss}
        memory.gradient_age = memory.gradient_age % every + 1
        gradient = dict(memory.gradient)
        loss = gradient.pop("/loss")
        return step.scores_along(gradient), loss, skipped

    def _look_ahead(
        self, batch: Batch, stored: Tensor | None, new: Tensor, needed: bool
    ) -> tuple[MetaStep | None, list[int], Tensor | None]:
        """The look-ahead step if it is needed, each process's b, and the mean square of ŷ over all: one all-reduce.

        Several processes wait for the device here, to know how much there is to exchange.
        """
        lr, here, world = self.config.lookahead_lr, len(batch.logits), distributed.world_size()
        known = new.to(batch.logits.dtype)
        sums = {} if stored is None else {"/square": known @ stored.square().mean(1), "/new": known.sum()}
        if world == 1 and self.head.is_linear and self.config.reward_every == 1:
            step: MetaStep | None = LinearStep(self.head, batch, lr) if needed else None
            counts = [here]
        else:
            gradient: dict[str, Tensor] = {}
            if needed and lr:
                params, smoothing = self.head.params(batch.logits.dtype), batch.label_smoothing
                gradient, _ = self.head.gradient(params, batch.features, batch.target, label_smoothing=smoothing)
            of_each = batch.logits.new_zeros(world)
            of_each[distributed.rank()] = here
            total = distributed.sum_all({**gradient, **sums, "/counts": of_each})
            sums = {name: total.pop(name) for name in sums}
            counts = [int(count) for count in total.pop("/counts").tolist()] if world > 1 else [here]
            step = FunctionalStep(self.head, batch, lr, total, sum(counts), distributed.sum_all) if needed else None
        return step, counts, sums["/square"] / sums["/new"].clamp(min=1) if sums else None

    def _weigh(self, rule: str, scores: Tensor, valid: Tensor | None, size: int, sums: Tensor) -> Tensor:
        """ω of the batch, normalised over all processes (Eq. 2, Section 5.2). `sums`: `_sums` of each, (W, k)."""
        uniform = torch.ones_like(scores) / size if valid is None else valid.to(scores.dtype) / size
        if rule == "uniform":
            return uniform
        if rule == "clip":
            unnormalized, total = functional.clip_weights(scores), sums.sum()
        else:
            minimum, count = sums[:, 0].amin(), sums[:, 2].sum()
            unnormalized = functional.shift_weights(scores, minimum, size) * (1 if valid is None else valid)
            total = sums[:, 1].sum() - count * minimum + count / size
        weights = functional.normalize_weights(unnormalized, total).to(scores.dtype)
        weights = torch.where(total - total == 0, weights, uniform)  # an infinite reward gradient: plain training
        return weights if self.config.max_weight is None else weights.clamp(max=self.config.max_weight / size)


def _sums(rule: str, scores: Tensor, valid: Tensor | None) -> Tensor:
    """What the other processes must know of this one's scores to normalise the weights, (k,)."""
    if rule == "clip":
        return functional.clip_weights(scores).sum()[None]
    if rule == "shift":
        bounded = scores if valid is None else torch.where(valid, scores, torch.inf)
        lowest = bounded.amin() if len(scores) else scores.new_tensor(torch.inf)
        count = scores.new_tensor(float(len(scores))) if valid is None else valid.sum().to(scores.dtype)
        return torch.stack([lowest, scores.sum(), count])
    return scores.new_zeros(0)


@contextmanager
def _other_streams_kept() -> Iterator[None]:
    """Python's and numpy's random streams go on as if nothing had been drawn within."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _is_batched(leaf: Any, batch_size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch_size


def _same(leaf: Any, tensor: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == tensor.shape and leaf.data_ptr() == tensor.data_ptr()
