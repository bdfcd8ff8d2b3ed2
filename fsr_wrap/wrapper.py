"""FSRWrapper: the optimizer's face, and the order of a step."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from . import distributed, functional
from .checks import INDEX_LIMIT, Watch, as_logits, check_batch, find_problems
from .config import FSRConfig, check_names
from .data import sample_counts
from .dictionary import RewardDictionary
from .heads import (
    Batch,
    Capture,
    FunctionalStep,
    Head,
    LinearStep,
    MetaStep,
    Reward,
    Tap,
    meta_dtype,
    resolve_head,
    unwrap,
)
from .memory import METRICS, Memory
from .pushers import Pusher, Visit
from .state import read_state, write_state


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
    """A batch that passed the checks. `valid` is None where every sample is."""

    logits: Tensor
    target: Tensor
    label: Tensor
    index: Tensor
    capture: Capture
    mix: _Mix | None
    valid: Tensor | None


class FSRWrapper(Optimizer):
    """Wraps an optimizer so that training with it is robust to wrong labels and long-tailed classes (FSR).

    ```python
    train_set = with_index(train_set)
    optimizer = FSRWrapper(model, optimizer, head="fc", dataset=train_set)
    for x, y, index in loader:
        loss = optimizer.loss(model(x), y, index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ```

    It is an optimizer to everything that takes one: `param_groups`, `state` and `defaults` are the inner optimizer's
    own. All of FSR happens inside [`loss`][fsr_wrap.FSRWrapper.loss], nothing in `step`.

    **Arguments:**

    - `model`: the model that is trained, as it is or inside DDP or torch.compile.
    - `optimizer`: any `torch.optim.Optimizer`, also one that Accelerate prepared.
    - `head`: Θ^meta, the part that takes the look-ahead step: a module of the model or its dotted name; `"auto"` finds
        the classifier of timm and Hugging Face models, else the last linear layer.
    - `dataset`: the training set, for its length (see [`with_index`][fsr_wrap.with_index]).
    - `num_samples`: N, if there is no data set to give: indices lie in [0, N).
    - `samples_per_epoch`: how many samples an epoch consumes, over all processes. The data set's length if not given.
        Give it where a sampler or `drop_last` makes an epoch of another length. Without any of the three, call
        [`end_epoch`][fsr_wrap.FSRWrapper.end_epoch].
    - `config`: an [`FSRConfig`][fsr_wrap.FSRConfig]; `overrides` set single fields of it.

    **Raises:** `ValueError` if the head is not found or a value is out of range, `TypeError` for an unknown field or a
    wrong type. Model and optimizer are then as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        head: str | nn.Module = "auto",
        *,
        dataset: Any = None,
        num_samples: int | None = None,
        samples_per_epoch: int | None = None,
        config: FSRConfig | None = None,
        **overrides: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
        if config is not None and not isinstance(config, FSRConfig):
            raise TypeError(f"config must be an FSRConfig, not {type(config).__name__}.")
        for name, value in (("num_samples", num_samples), ("samples_per_epoch", samples_per_epoch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} is not allowed: give an integer >= 1 or None.")
        config = replace(config or FSRConfig(), **check_names(overrides))
        rows, length = (None, None) if dataset is None else sample_counts(dataset)
        core = unwrap(model)
        name, module = resolve_head(core, head)
        total = num_samples or rows
        if config.weight_rule == "clip" and total is not None and 2 * config.dictionary_size > total:
            warnings.warn(
                f"dictionary_size={config.dictionary_size} is more than half of the {total} samples, so the dictionary "
                f"cannot leave the wrong labels out: pass about dictionary_size={max(1, total // 10)}.",
                stacklevel=2,
            )

        self.optimizer = optimizer
        self.config = config
        self._core = core
        self._head = Head(name, module)
        self._pusher: Pusher = config.get_pusher()
        self._memory = Memory(config, total)
        self._samples_per_epoch = samples_per_epoch or length or num_samples
        self._warned = False
        self._checked = False
        self._mixes: deque[_Mix] = deque(maxlen=8)
        self._watch = Watch()
        self._weights: Tensor | None = None
        self._tap = Tap(core, module)
        weakref.finalize(self, self._tap.remove)

    # --- the optimizer's face ----------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's own."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's own."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's own."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """The inner optimizer's step. With `closure`, the closure calls `loss()` as usual."""
        return self.optimizer.step(closure, **kwargs) if closure is not None else self.optimizer.step(**kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's `zero_grad`."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The inner optimizer's `add_param_group`."""
        self.optimizer.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """The inner optimizer's; the hook is given the inner optimizer."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """The inner optimizer's; the hook is given the inner optimizer."""
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The inner optimizer's."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    # GradScaler hands these to fused optimizers by setting and deleting them.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("grad_scale", "found_inf"):
            setattr(self.optimizer, name, value)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in ("grad_scale", "found_inf"):
            delattr(self.optimizer, name)
        else:
            object.__delattr__(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for module in (self._core, self._head.module):  # the copied hooks lead nowhere: put new ones in their place
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self._tap]:
                    del hooks[key]
        self._tap = Tap(self._core, self._head.module)
        weakref.finalize(self, self._tap.remove)

    def __repr__(self) -> str:
        return f"FSRWrapper(head={self._head.name!r}, epoch={self.epoch}, config={self.config})\n{self.optimizer!r}"

    # --- what FSR knows ----------------------------------------------------------------------------------------------

    @property
    def head(self) -> str:
        """The dotted name of the head."""
        return self._head.name

    @property
    def epoch(self) -> int:
        """Epochs ended so far."""
        return self._memory.epoch

    @property
    def is_reweighting(self) -> bool:
        """Whether the next `loss()` re-weights: the warm-up is over and there is reward data."""
        memory = self._memory
        return memory.epoch >= self.config.warmup_epochs and memory.ready and bool(memory.dictionary)

    @property
    def dictionary(self) -> RewardDictionary:
        """R. **Raises:** `RuntimeError` before the first `loss()`, when the number of classes is not known yet."""
        return self._known().dictionary

    @property
    def scores(self) -> Tensor:
        """P̂ of each sample, (N,) float32, NaN where a sample was not visited. A view: do not write to it."""
        return self._known().table.score[:-1]

    def _known(self) -> Memory:
        if not self._memory.ready:
            raise RuntimeError("FSR knows nothing yet: call loss() first, which also tells the number of classes.")
        return self._memory

    @property
    def weights(self) -> Tensor:
        """ω of the last batch in this process, (b,), detached; they sum to 1 over all processes, or to 0."""
        if self._weights is None:
            raise RuntimeError("There are no weights before the first loss().")
        return self._weights

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, for a tracker; synchronises with the device.

        In several processes each reports its own part of the batches.

        **Returns:** means over the steps since the last call: `fsr/loss` (the weighted loss), `fsr/reward_loss`
        (0 in warm-up), `fsr/zero_weight_ratio` (should come near the share of wrong labels),
        `fsr/effective_sample_size` ((Σω)²/Σω² of a batch), `fsr/max_weight` (the largest ω times b); sums:
        `fsr/all_zero_batches`, `fsr/skipped_samples`; and as they stand: `fsr/epoch`, `fsr/reweighting`,
        `fsr/dictionary_size`.
        Empty before the first `loss()`.
        """
        memory = self._memory
        if not memory.ready:
            return {}
        sums, steps = memory.sums.tolist(), max(memory.steps, 1)
        memory.sums.zero_()
        memory.steps = 0
        out = {f"fsr/{name}": value / steps for name, value in zip(METRICS, sums, strict=True)}
        for name in ("all_zero_batches", "skipped_samples"):
            out[f"fsr/{name}"] *= steps
        out["fsr/epoch"] = memory.epoch
        out["fsr/reweighting"] = float(self.is_reweighting)
        out["fsr/dictionary_size"] = len(memory.dictionary)
        return out

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, and FSR's own state under `"fsr"`: plain tensors, numbers and strings.

        It loads with `weights_only=True`, and a plain optimizer loads it too, leaving FSR's part aside.
        """
        return {**self.optimizer.state_dict(), "fsr": self._memory.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; the run goes on bit for bit. From a plain optimizer's state dict the inner
        optimizer loads, and FSR starts afresh.

        **Raises:** `ValueError` if FSR's part belongs to a newer format, another data set or another kind of reward
        data; the wrapper is then as it was.
        """
        state_dict = dict(state_dict)
        state = state_dict.pop("fsr", None)
        memory = Memory(self.config, self._memory.num_samples)
        if state is not None:
            memory = Memory.from_state_dict(state, self.config, self._memory.num_samples)
        self.optimizer.load_state_dict(state_dict)
        self._memory = memory

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `state_dict()` to `folder/fsr.safetensors`, without pickle; a file of that name is always whole.

        In several processes call it in one of them.
        """
        write_state(folder, self.state_dict())

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Loads what `save` wrote to the folder.

        **Raises:** `FileNotFoundError`; `ValueError` if the file is damaged, or as in `load_state_dict`. The wrapper is
        then as it was.
        """
        self.load_state_dict(read_state(folder))

    # --- the step ----------------------------------------------------------------------------------------------------

    def loss(self, logits: Any, target: Tensor, index: Tensor) -> Tensor:
        """The loss to back-propagate, in place of cross-entropy: Σ ω_i ℓ_i + p · mean CE(ŷ_i, f(x_i)) (Section 4.3).

        It also values the batch, offers it to the dictionary and counts the epoch; it leaves gradients, RNG streams,
        BatchNorm statistics and train/eval flags alone. Without gradients (`torch.no_grad()`) it is the plain mean
        cross-entropy and leaves no trace.

        **Arguments:**

        - `logits`: (b, C) as they leave the model, or a Hugging Face model output that has `logits`.
        - `target`: (b,) int64 class numbers, or (b, C) soft targets, from `mixup` or your own (of those the largest
            entry is the class that scores and dictionary see).
        - `index`: (b,) integers, the samples' indices in [0, N).

        **Returns:** a scalar. In several processes it is scaled so that DDP's averaging gives the global loss.

        **Raises:** `ValueError` or `TypeError` for input of a wrong shape, dtype or range, or of another number of
        classes than before, or NaN or infinite; `RuntimeError` if no forward of the model preceded. Nothing has then
        changed. On an accelerator, where looking would wait for the device, values out of range are left out of the
        step at once and raised at the next call.
        """
        logits = as_logits(logits)
        if not torch.is_grad_enabled():
            return functional.cross_entropy(logits, target, self.config.label_smoothing).mean()
        batch = self._accept(logits, target, index)
        self._prepare(batch)
        loss, size = self._train(batch)
        self._count(int(size))
        return loss

    def end_epoch(self) -> None:
        """Ends the epoch now: the best samples become the dictionary (Eq. 4). Does nothing if none came since the last.

        Needed only where the number of samples an epoch is not known, or an epoch shall end early.
        """
        if self._memory.ready and self._memory.consumed > 0:
            self._memory.end_epoch()

    def mixup(self, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes a batch (MixUp as released: each sample with a partner, m = max(U²/2, 1 − U²/2)).

        Pass the mixed inputs to the model and the target to [`loss`][fsr_wrap.FSRWrapper.loss], both as they are
        returned. The clean inputs and labels are kept for scores, re-labelling and dictionary: `loss` runs the model
        on them once more, without gradients, which costs about a third of a plain step.

        **Arguments:** `inputs` (b, ...) floating point, the model's only tensor input or one of several;
        `target` (b,) int64 class numbers.

        **Returns:** the mixed inputs, and the target: (b, C) soft targets if the number of classes is known, that is
        from the second batch on or where the head is linear.

        **Raises:** `TypeError` or `ValueError` for inputs that cannot be mixed.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise TypeError("mixup() takes floating-point inputs: normalise the images first.")
        if target.dtype != torch.int64 or target.shape != inputs.shape[:1]:
            raise ValueError(
                f"mixup() takes int64 class numbers of shape ({len(inputs)},), not {target.dtype} of shape "
                f"{tuple(target.shape)}."
            )
        generator = self._memory.generator(1 + distributed.rank())
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

    # --- inside a step -----------------------------------------------------------------------------------------------

    def _num_classes(self) -> int:
        if self._memory.num_classes is not None:
            return self._memory.num_classes
        if self._head.is_linear:
            return self._head.module.weight.shape[0]  # type: ignore[union-attr,index,return-value]
        raise RuntimeError("mixup() must know the number of classes: pass one batch to loss() first, or a linear head.")

    def _accept(self, logits: Tensor, target: Tensor, index: Tensor) -> _Accepted:
        """Checks all that was passed; raises before anything is changed."""
        index = check_batch(logits, target, index, num_classes=self._memory.num_classes)
        mix = self._find_mix(target)
        capture = self._tap.find(logits)
        if capture is None:
            raise RuntimeError(
                f"loss() found no forward of this model that passed through the head {self._head.name!r}: call "
                "model(x) with gradients before it. If the model was compiled, wrap it before its first call."
            )
        inputs = pytree.tree_leaves((capture.args, capture.kwargs))
        if mix is not None and not any(_same(leaf, mix.mixed) for leaf in inputs):
            raise ValueError("The model was not called with the inputs that mixup() returned: mix last, then call it.")
        if self._memory.ready:
            self._memory.dictionary.check_payload(self._payload(capture))
        label = mix.label if mix else target if target.ndim == 1 else target.detach().argmax(1)
        rows = self._memory.num_samples or INDEX_LIMIT
        problems, valid = find_problems(logits, capture.features, label, index, rows)
        messages = {
            "label": f"a label outside [0, {logits.shape[1]}), the classes of the logits.",
            "index": f"an index outside [0, {rows}). Pass dataset= or num_samples= of the whole data set.",
            "non-finite": "NaN or infinite logits or features. Lower the learning rate, or pass nonfinite='skip'.",
        }
        skip = self.config.nonfinite == "skip"
        self._watch({name: n for name, n in problems.items() if not (skip and name == "non-finite")}, messages)
        if not self._checked:
            self._head.check(capture, logits)
        if logits.device.type == "cpu" and not skip:
            return _Accepted(logits, target, label, index, capture, mix, None)
        index, label = index.clamp(0, rows - 1), label.clamp(0, logits.shape[1] - 1)
        logits = torch.where(valid[:, None], logits, 0)
        soft = functional.dense_target(label if target.ndim == 1 else target, logits.detach().to(meta_dtype(logits)))
        soft = functional.dense_target(soft, logits, self.config.label_smoothing) * valid[:, None]
        features = capture.features
        features = torch.where(valid.view(-1, *[1] * (features.ndim - 1)), features, 0)
        return _Accepted(logits, soft, label, index, replace(capture, features=features), mix, valid)

    def _find_mix(self, target: Tensor) -> _Mix | None:
        for mix in reversed(self._mixes):
            if mix.target is target:
                return mix
        if self._mixes and target.is_floating_point():
            raise ValueError("mixup() was called, but loss() got another target: pass it as mixup() returned it.")
        return None

    def _prepare(self, batch: _Accepted) -> None:
        """The batch is good: forgets what was kept for it, and makes room for it."""
        self._tap.discard(batch.capture)
        while batch.mix is not None and self._mixes and self._mixes.popleft() is not batch.mix:
            pass
        self._checked = True
        self._memory.prepare(batch.index, batch.logits.shape[1], batch.logits.device)

    def _train(self, batch: _Accepted) -> tuple[Tensor, int | Tensor]:
        """Values and weighs the batch; returns the loss to back-propagate, and b over all processes."""
        dtype, config = meta_dtype(batch.logits), self.config
        smoothing = config.label_smoothing if batch.valid is None else 0.0  # masked targets are smooth already
        logits = batch.logits.to(dtype)
        target = batch.target if batch.target.ndim == 1 else batch.target.to(dtype)
        losses = functional.cross_entropy(logits, target, smoothing)
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            features = self._head.features(batch.capture.features, dtype)
            at_head = Batch(features, logits.detach(), target.detach(), smoothing)
            weights, pseudo, share, size = self._value(batch, at_head, losses.detach())
        loss = (weights * losses).sum()
        if pseudo is not None and share is not None:
            loss = loss + config.relabel_weight * (share * functional.cross_entropy(logits, pseudo)).sum()
        return loss * distributed.world_size(), size

    def _value(
        self, batch: _Accepted, at_head: Batch, losses: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, int | Tensor]:
        """Weights of the samples, their pseudo-labels, how much each of these counts, and b; updates what FSR knows."""
        memory, active = self._memory, self.is_reweighting
        valid = torch.ones_like(losses, dtype=torch.bool) if batch.valid is None else batch.valid
        clean = self._clean(batch)
        clean_features = self._head.features(clean.features, losses.dtype)
        clean_logits = at_head.logits if batch.mix is None else clean.output.to(losses.dtype)
        stored = None if memory.pseudo is None else memory.pseudo.stored(batch.index, losses.dtype)

        step, size, mean_square = self._look_ahead(at_head, stored, active or self._pusher.needs_lookahead)
        weights, reward_loss = valid / size, losses.new_zeros(())
        if active and step is not None:
            scores, reward_loss = step.scores(self._reward(batch, losses.dtype))
            weights = self._weigh(scores, valid, size)

        ahead = step.logits(clean_features, clean_logits) if step is not None and self._pusher.needs_lookahead else None
        score = self._pusher(Visit(clean_logits, batch.label, losses, ahead))
        momentum = memory.table.update(batch.index, score, batch.label, memory.epoch, valid)
        memory.dictionary.push(batch.index, batch.label, momentum, self._payload(clean))
        pseudo = share = None
        if memory.pseudo is not None and stored is not None:
            pseudo, seen = memory.pseudo.update(batch.index, clean_logits, stored, momentum > -torch.inf, mean_square)
            if batch.mix is not None:
                pseudo = torch.lerp(pseudo[batch.mix.partner], pseudo, batch.mix.share.to(pseudo.dtype)[:, None])
                seen = seen & seen[batch.mix.partner]
            share = (seen & valid) / size if active else None

        self._weights = weights
        memory.steps += 1
        world = distributed.world_size()
        seen_now = world * (weights * losses).sum(), world * reward_loss, (weights <= 0).sum() / len(weights)
        spread = functional.effective_sample_size(weights), weights.amax() * size
        counts = (weights.amax() <= 0), (~valid).sum()
        memory.sums += torch.stack(
            [torch.as_tensor(value, device=weights.device) for value in (*seen_now, *spread, *counts)]
        )
        return weights, pseudo, share, size

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
        buffers = {name: buffer.clone() for name, buffer in self._core.named_buffers()}
        with (
            torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type),
            torch.autocast(device.type, like.autocast, enabled=like.autocast is not None),
            self._tap.divert() as box,
        ):
            functional_call(self._core, buffers, args, kwargs)
        if not box:
            raise RuntimeError(f"The extra forward did not pass through the head {self._head.name!r}.")
        return replace(box[0], args=args, kwargs=kwargs)

    def _payload(self, capture: Capture) -> tuple[Tensor, ...]:
        """What the dictionary stores of a batch: the head's input, or the model's."""
        if self.config.reward == "cached":
            return (capture.features,)
        leaves = pytree.tree_leaves((capture.args, capture.kwargs))
        return tuple(leaf.detach() for leaf in leaves if _is_batched(leaf, len(capture.features)))

    def _reward(self, batch: _Accepted, dtype: torch.dtype) -> Reward:
        """This process's part of the reward batch."""
        config, capture = self.config, batch.capture
        drawn = self.dictionary.draw(config.reward_batch_size, self._memory.generator(0))
        part = slice(distributed.rank(), None, distributed.world_size())
        payload, label = [tensor[part] for tensor in drawn.payload], drawn.label[part]
        if config.reward == "cached":
            features = payload[0]
        else:
            leaves, tree = pytree.tree_flatten((capture.args, capture.kwargs))
            rows = iter(payload)
            leaves = [next(rows) if _is_batched(leaf, len(capture.features)) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, tree)
            features = self._replay(args, kwargs, capture).features
        return Reward(self._head.features(features, dtype), label, config.label_smoothing, config.reward_batch_size)

    def _look_ahead(
        self, batch: Batch, stored: Tensor | None, needed: bool
    ) -> tuple[MetaStep | None, int | Tensor, Tensor | None]:
        """The look-ahead step if it is needed, b and the mean square of ŷ over all processes: one all-reduce."""
        lr, here = self.config.lookahead_lr, len(batch.logits)
        if distributed.world_size() == 1:
            if not needed:
                return None, here, None
            if self._head.is_linear:
                return LinearStep(self._head, batch, lr), here, None
            gradient = self._head.gradient(batch)
            return FunctionalStep(self._head, batch, lr, gradient, here, distributed.sum_all), here, None
        gradient = self._head.gradient(batch) if needed else {}
        extra = {"/size": batch.logits.new_tensor(float(here))}
        if stored is not None:
            extra["/square"] = stored.square().sum()
        total = distributed.sum_all({**gradient, **extra})
        size = total.pop("/size")
        mean_square = total.pop("/square") / (size * batch.logits.shape[1]) if stored is not None else None
        step = FunctionalStep(self._head, batch, lr, total, size, distributed.sum_all) if needed else None
        return step, size, mean_square

    def _weigh(self, scores: Tensor, valid: Tensor, size: int | Tensor) -> Tensor:
        """ω of the batch, normalised over all processes (Eq. 2, Section 5.2)."""
        scores = torch.where(valid, self.config.weight_lr * scores, 0)
        if self.config.weight_rule == "uniform":
            return valid / size
        if self.config.weight_rule == "clip":
            unnormalized = functional.clip_weights(scores)
            total = distributed.sum_all({"total": unnormalized.sum()})["total"]
        else:
            here = torch.stack(
                [torch.where(valid, scores, torch.inf).amin(), scores.sum(), valid.sum().to(scores.dtype)]
            )
            everywhere = distributed.gather_all(here)
            minimum, count = everywhere[:, 0].amin(), everywhere[:, 2].sum()
            unnormalized = functional.shift_weights(scores, minimum, size) * valid
            total = everywhere[:, 1].sum() - count * minimum + count / size
        weights = functional.normalize_weights(unnormalized, total)
        weights = torch.where(total.isfinite(), weights, valid / size)  # a non-finite reward batch: plain training
        return weights if self.config.max_weight is None else weights.clamp(max=self.config.max_weight / size)

    def _count(self, size: int) -> None:
        """Ends the epoch when its samples are consumed; reminds of `end_epoch` where their number is not known."""
        memory = self._memory
        memory.consumed += size
        if self._samples_per_epoch is not None:
            if memory.consumed >= self._samples_per_epoch:
                self.end_epoch()
        elif memory.epoch == 0 and memory.consumed >= 2 * (memory.largest + 1) and not self._warned:
            self._warned = True
            warnings.warn(
                "The samples seem to come again, but no epoch has ended, so there is no reward data and nothing is "
                "re-weighted: pass dataset= or num_samples= to FSRWrapper, or call end_epoch() after each epoch.",
                stacklevel=3,
            )


def _is_batched(leaf: Any, batch_size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch_size


def _same(leaf: Any, tensor: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape == tensor.shape and leaf.data_ptr() == tensor.data_ptr()
