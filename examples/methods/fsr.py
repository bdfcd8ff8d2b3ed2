"""FSR itself, as a method like the others: the default, the paper's own recipe, and the long-tail preset, deferred.

Cost: about 1 (1.3 with MixUp). State: the wrapper's, which is in the optimizer's own state dict.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fsr_wrap import FSRConfig, FSRWrapper

from .base import Method, Task


class FSR(Method):
    title = "FSR"
    mixup = False
    wrapper: FSRWrapper

    def __init__(self, task: Task, **fields: Any) -> None:
        super().__init__(task)
        self.config = self.make_config(**fields)

    def make_config(self, **fields: Any) -> FSRConfig:
        """The recipe, with single fields set otherwise."""
        return FSRConfig(**fields)

    def attach(self, optimizer: Optimizer) -> Optimizer:
        self.wrapper = FSRWrapper(
            self.task.model, optimizer, num_samples=self.task.num_samples, config=self.config, seed=self.task.seed
        )
        return self.wrapper

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        target = y
        if self.mixup:
            x, target = self.wrapper.mixup(x, y)
        return self.wrapper.loss(model(x), target, index)

    def metrics(self) -> dict[str, float]:
        return self.wrapper.metrics()


class FSRClip(FSR):
    """Table 4's row for CIFAR with noise, without MixUp and so with the area under the margin."""

    title = "FSR, clip (no MixUp)"

    def make_config(self, **fields: Any) -> FSRConfig:
        return FSRConfig.preset("cifar_noise", **fields)


class FSRPaper(FSR):
    """Table 4's row for CIFAR with noise, MixUp and the released margin."""

    title = "FSR, paper's recipe (MixUp)"
    cost = "1.3"
    mixup = True

    def make_config(self, **fields: Any) -> FSRConfig:
        return FSRConfig.preset("cifar_noise", **{"pusher": "authors_margin", **fields})


class FSRLongTail(FSR):
    """Table 4's row for long-tailed CIFAR, re-weighting from 160 of 200 epochs on, scaled to the run."""

    title = "FSR-DF (long-tail preset, deferred)"

    def make_config(self, **fields: Any) -> FSRConfig:
        deferred = {"warmup_epochs": round(self.task.scaled(160, 200))}
        return FSRConfig.preset("cifar_long_tailed", **{**deferred, **fields})
