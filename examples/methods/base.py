"""What methods share: what one may know (`Task`), what it must do (`Method`), and how a first network is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Recipe = Callable[[Iterable[nn.Parameter], int], tuple[Optimizer, LRScheduler]]


@dataclass(frozen=True)
class Task:
    """What a method may know.

    **Arguments:**

    - `model`: the network to train, on its device.
    - `labels`: (N,) the given labels, on that device.
    - `num_classes`, `epochs`, `batch_size`: of the run.
    - `inputs`: indices (n,) to inputs as they are evaluated; `augmented`: as they are trained on.
    - `make_model`: a fresh network of the same kind, on the same device.
    - `recipe`: parameters and a number of steps to an optimizer and its schedule, which is stepped after every step.
    - `clean`: inputs and right labels from outside the training set, for methods that need them.
    - `noise_rate`: the share of wrong labels, for methods that must be told.
    - `noise`: their kind, none, uniform, asymmetric or column (of people), for methods with settings published for it.
    - `seed`: for a generator of one's own; all else draws from the global stream.
    """

    model: nn.Module
    labels: Tensor
    num_classes: int
    epochs: int
    batch_size: int
    inputs: Callable[[Tensor], Tensor]
    augmented: Callable[[Tensor], Tensor]
    make_model: Callable[[], nn.Module]
    recipe: Recipe
    clean: tuple[Tensor, Tensor] | None = None
    noise_rate: float | None = None
    noise: str | None = None
    seed: int = 0

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def one_hot(self, labels: Tensor) -> Tensor:
        """(b, C) float32."""
        return F.one_hot(labels, self.num_classes).float()

    def class_counts(self) -> Tensor:
        """n_c of the given labels, (C,) float32, at least 1."""
        return torch.bincount(self.labels, minlength=self.num_classes).clamp(min=1).float()

    def scaled(self, epochs: float, of: float) -> float:
        """An epoch count that was published for runs of `of` epochs, for this run's length."""
        return epochs / of * self.epochs


class Method:
    """A way to train. The loop makes one, builds the optimizer over the model's and `parameters()`, and calls

        optimizer = method.attach(optimizer)
        method.prepare()
        for epoch in range(epochs):
            method.start_epoch(epoch)
            for x, y, index in batches:
                method.loss(model, x, y, index).backward()
                ...
            method.end_epoch(epoch)

    A resumed run calls `load_state_dict` in place of `prepare`. Randomness comes from the global stream.

    `cost` is in plain steps, backward passes counted as two forward passes; `state` names the attributes that a
    checkpoint holds. Methods are for one process.
    """

    title: ClassVar[str]
    cost: ClassVar[str] = "1"
    needs_clean: ClassVar[bool] = False
    needs_rate: ClassVar[bool] = False
    state: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        if self.needs_clean and task.clean is None:
            raise ValueError(f"{self.title} needs clean images: pass Task(clean=(inputs, labels)).")
        if self.needs_rate and task.noise_rate is None:
            raise ValueError(f"{self.title} needs the share of wrong labels: pass Task(noise_rate=...).")
        self.task = task

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that are trained along with the model's, by the same optimizer."""
        return []

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Takes the optimizer, and returns the one to step."""
        self.optimizer = optimizer
        return optimizer

    def prepare(self) -> None:
        """Work before the first epoch, such as training other networks."""

    def start_epoch(self, epoch: int) -> None:
        """Work before an epoch; epochs count from 0."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """The scalar to back-propagate. `x` (b, ...), `y` (b,) given labels, `index` (b,) in [0, N)."""
        raise NotImplementedError

    def end_epoch(self, epoch: int) -> None:
        """Work after an epoch, before it is evaluated."""

    def predict(self, model: nn.Module, x: Tensor) -> Tensor:
        """Scores of the classes, (b, C), for evaluation."""
        return model(x)

    def metrics(self) -> dict[str, float]:
        """What else is worth noting of the last epoch."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, and state dicts of modules and optimizers."""

        def plain(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().clone()
            return copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)

        return {name: plain(getattr(self, name)) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """**Raises:** `ValueError` if the state is another method's or another data set's; nothing has then changed."""
        if set(state) != set(self.state):
            raise ValueError(f"{self.title} has the state {sorted(self.state)}, not {sorted(state)}.")
        for name, value in state.items():
            own = getattr(self, name)
            if isinstance(own, Tensor) and own.shape != value.shape:
                raise ValueError(f"{self.title}: {name} has the shape {tuple(own.shape)}, not {tuple(value.shape)}.")
        for name, value in state.items():
            own = getattr(self, name)
            if isinstance(own, Tensor):
                own.copy_(value)
            elif hasattr(own, "load_state_dict"):
                own.load_state_dict(value)
            else:
                setattr(self, name, copy.deepcopy(value))


def fit(
    task: Task, subset: Tensor, epochs: int, score: Callable[[nn.Module], float] | None = None, best_only: bool = True
) -> nn.Module:
    """A fresh network trained by cross-entropy, with the task's recipe.

    **Arguments:** `subset`, the samples' indices; `score`, what to ask of the network after every epoch: with
    `best_only` the network of the highest score is returned, else the last.
    """
    model = task.make_model()
    steps = max(1, len(subset) // task.batch_size)
    optimizer, schedule = task.recipe(list(model.parameters()), epochs * steps)
    best, kept = float("-inf"), None
    for _ in range(epochs):
        model.train()
        for index in subset[torch.randperm(len(subset), device=subset.device)].tensor_split(steps):
            F.cross_entropy(model(task.augmented(index)), task.labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if score is not None and best_only and (found := score(model)) > best:
            best, kept = found, copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, and the mode of before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm's running averages stay as they are; what normalises is still the batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
