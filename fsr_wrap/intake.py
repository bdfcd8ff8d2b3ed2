"""Takes in a batch: finds the forward that it comes from and checks it, before anything is changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, functional
from .calls import other_streams_kept
from .checks import INDEX_LIMIT, Watch, all_good, check_batch, describe_targets, find_problems, warn
from .config import FSRConfig
from .heads import Head, meta_dtype
from .memory import Memory
from .mixing import Mix, Mixer, check_mixable, is_pure, shown
from .replay import Replay
from .tap import Capture, Tap, check_rows


@dataclass
class Accepted:
    """A batch that passed the checks. `clean` is the capture of the inputs that are not mixed; `valid` is None where
    every sample is; `given` and `found` are the user's logits and the capture of their forward; `shown` is whether the
    sample's own class is the largest in a target that somebody else mixed, None where nobody did; `own`, (b,) bool, is
    whether the label is the sample's own, not guessed from a mixed target, None where all are."""

    logits: Tensor
    target: Tensor
    label: Tensor
    index: Tensor
    capture: Capture
    clean: Capture
    mix: Mix | None
    valid: Tensor | None
    given: Tensor
    found: Capture
    shown: Tensor | None = None
    own: Tensor | None = None


class Intake:
    """The way in: the hooks on the model, what is run once more, MixUp, and the checks.

    **Arguments:** `core`, the user's own module; `head`, Θ^meta in it; `config`.
    """

    def __init__(self, core: nn.Module, head: Head, config: FSRConfig) -> None:
        self.core, self._head, self._config = core, head, config
        self._tap = Tap(core, *head.parts)
        self.replay = Replay(core, head, self._tap, config.reward == "cached" or config.selects)
        self._mixer = Mixer()
        self._watch = Watch()
        self._soft = 0  # batches of soft targets without label
        self._checked = False
        self._looks = 0  # batches that came before the check saw something
        weakref.finalize(self, self._tap.remove)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tap.adopt(self.core, *self._head.parts)
        weakref.finalize(self, self._tap.remove)

    @property
    def waiting(self) -> int:
        """How many samples the last forward had, 0 if it was discarded."""
        return self._tap.waiting

    def check_again(self) -> None:
        """The head is to be looked at as at the first batch."""
        self._checked, self._looks = False, 0

    @contextmanager
    def apart(self, device: str) -> Iterator[None]:
        """Within it, forwards are our own: without gradients or autocast, and nothing is left behind."""
        # Entering nothing where autocast is off takes less time.
        on = torch.is_autocast_enabled(device)
        off: AbstractContextManager[Any] = torch.autocast(device, enabled=False) if on else nullcontext()
        with torch.no_grad(), off, self._tap.mute():
            yield

    def mixup(self, memory: Memory, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed inputs and their soft targets; see `FSRWrapper.mixup`."""
        check_mixable(inputs, target)
        # Numbers that depend on where training stands, so that a call whose batch is not used changes nothing.
        position = memory.epoch, memory.consumed
        generator = memory.generator_at(position, self._mixer.number(position), distributed.rank())
        beta = self._config.mixup_beta
        return self._mixer.mix(inputs, target, self._num_classes(memory), position, generator, beta)

    def _num_classes(self, memory: Memory) -> int:
        if memory.num_classes is not None:
            return memory.num_classes
        if self._head.is_linear:
            return self._head.num_classes
        raise RuntimeError("mixup() must know the number of classes: pass one batch to loss() first, or a linear head.")

    def accept(
        self, memory: Memory, logits: Tensor, target: Tensor, index: Tensor, given: Tensor | None, again: bool
    ) -> Accepted:
        """Checks all that was passed; raises before anything is changed.

        **Arguments:** `memory`, what is known so far; `given`, the user's own `label`; `again`, whether the batch was
        valued before, at another evaluation of a closure; the others as in `FSRWrapper.loss`.
        """
        index = check_batch(logits, target, index, given, num_classes=memory.num_classes)
        found = self._tap.find(logits)
        if found is None:
            raise RuntimeError(self._tap.explain(logits, self._head.name))
        self.replay.check(found)
        mix, capture = self._mixer.find(found, target), self.replay.complete(found, logits)
        clean = capture if mix is None or again else self._clean(capture, mix)
        if memory.ready and not self._config.selects:
            memory.dictionary.check_payload(self.replay.payload(clean), self.replay.advice)
        label = _label(target, given, mix)
        rows = memory.num_samples or INDEX_LIMIT
        # A linear head's logits cannot be finite where its input is not.
        told = self._head.is_linear and capture.output.data_ptr() == logits.data_ptr()
        others = (*_looked_at(clean), clean.output) if clean is not capture else ()
        features = _looked_at(capture)
        good = all_good(logits, others if told else (*features, *others), target, label, index, rows)
        if not good:
            valid = self._look_closer(logits, (*features, *others), target, label, index, rows)
        if not self._checked:
            self._check_head(found, capture, logits)
        batch = Accepted(logits, target, label, index, capture, clean, mix, None, logits, found)
        if target.ndim == 2 and mix is None and given is None:
            batch.own = is_pure(target.detach())
        if not good and (logits.device.type != "cpu" or self._config.nonfinite == "skip"):
            batch = self._masked(batch, valid)
        if given is not None and target.ndim == 2 and mix is None:
            batch.shown = shown(target.detach(), batch.label)
        if batch.own is not None and not again:
            self._look_at_targets(batch.own)
        return batch

    def discard(self, batch: Accepted) -> None:
        """The batch is used: forgets what was kept for it."""
        self.replay.remember(batch.found)
        self._tap.discard(batch.found, batch.given)
        self._mixer.discard(batch.mix)

    def _clean(self, capture: Capture, mix: Mix) -> Capture:
        """The capture of one more forward, on the inputs before they were mixed."""
        with self.apart(capture.output.device.type):
            return self.replay.clean(capture, mix.mixed, mix.inputs)

    def _masked(self, batch: Accepted, valid: Tensor) -> Accepted:
        """The batch with zeros for the samples that are not valid."""
        index, label = torch.where(valid, batch.index, 0), batch.label.clamp(0, batch.logits.shape[1] - 1)
        logits = torch.where(valid[:, None], batch.logits, 0)
        hard_or_soft = label if batch.target.ndim == 1 else torch.where(valid[:, None], batch.target, 0)
        soft = functional.dense_target(hard_or_soft, logits.detach().to(meta_dtype(logits)))
        features, soft = masked(valid, batch.capture.features, soft, self._config.label_smoothing)
        capture = clean = replace(batch.capture, features=features)
        if batch.clean is not batch.capture:
            rows = batch.clean
            clean = replace(rows, features=_rows(valid, rows.features), output=_rows(valid, rows.output))
        batch = replace(batch, logits=logits, target=soft, label=label, index=index, valid=valid)
        return replace(batch, capture=capture, clean=clean)

    def _check_head(self, found: Capture, capture: Capture, logits: Tensor) -> None:
        """Looks at the head at the first batch, and at the 2nd, 4th, 8th and so on as long as nothing could be seen."""
        if self._looks & (self._looks + 1) == 0:
            with self.apart(logits.device.type), other_streams_kept():
                if not self.replay.is_whole:
                    check_rows(found, logits, self._head.name)
                self._checked = self._head.check(capture, logits)
                self._head.find_derivative(capture.features, logits)
        self._looks += 1

    def _look_closer(
        self,
        logits: Tensor,
        features: tuple[Tensor, ...],
        target: Tensor,
        label: Tensor,
        index: Tensor,
        rows: int,
    ) -> Tensor:
        """Which samples are good, (b,) bool. **Raises:** `ValueError` for others, as far as they are not skipped."""
        problems, details, valid = find_problems(logits, features, target, label, index, rows)
        messages: dict[str, str | Callable[..., str]] = {
            "label": f"a label outside [0, {logits.shape[1]}), the classes of the logits, or another than mixup() was "
            "given.",
            "target": describe_targets,
            "index": f"an index outside [0, {rows}). Indices number the samples from 0, as with_index(dataset) does; "
            "pass dataset= or num_samples= of the whole data set.",
            "non-finite": "NaN or infinite logits or features. Lower the learning rate, or pass nonfinite='skip'.",
        }
        skip = self._config.nonfinite == "skip"
        raised = {name: n for name, n in problems.items() if not (skip and name == "non-finite")}
        self._watch(raised, messages, details)
        return valid

    def _look_at_targets(self, own: Tensor) -> None:
        """Warns once of mixed targets. Looks at the 1st, 2nd, 4th batch and so on, as that waits for the device."""
        self._soft += self._soft >= 0
        if self._soft & (self._soft - 1) or bool(own.all()):
            return
        self._soft = -1
        warn(
            "The soft targets are not those of FSR's own mixup(), so FSR does not know which label each sample was "
            "given: it judges none of them, and label_issues() does not tell of them. Scores and dictionary see the "
            "largest entry of each target, which may be the partner's. Pass the samples' own classes as well: "
            "loss(logits, target, index, label=y).",
        )


def masked(valid: Tensor, features: Any, target: Tensor, label_smoothing: float) -> tuple[Any, Tensor]:
    """Features (n, ...) and dense targets (n, C), smoothed, with zeros for the samples that are not valid."""
    return _rows(valid, features), functional.dense_target(target, target, label_smoothing) * valid[:, None]


def _rows(valid: Tensor, tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor.where(valid)
    return torch.where(valid.view(-1, *[1] * (tensor.ndim - 1)), tensor, 0)


def _looked_at(capture: Capture) -> tuple[Tensor, ...]:
    """What must be finite besides the logits: the head's input. The model's may be infinite, as masks are."""
    return (capture.features,) if isinstance(capture.features, Tensor) else ()


def _label(target: Tensor, given: Tensor | None, mix: Mix | None) -> Tensor:
    """The class of each sample that scores and dictionary see, (b,)."""
    if mix is not None:
        return mix.label if given is None or given is mix.label else torch.where(given == mix.label, given, -1)
    if given is not None:
        return given
    return target if target.ndim == 1 else target.detach().argmax(1)
