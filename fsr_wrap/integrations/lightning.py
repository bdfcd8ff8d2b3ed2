"""FSR in Lightning: the wrapper is what `configure_optimizers` returns, and this callback tells of it."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..report import check_packages, report_at_end
from ..wrapper import FSRWrapper


class FSRCallback(Callback):
    """Logs `fsr.metrics()`, and ends FSR's epochs where the Trainer's end.

    ```python
    def configure_optimizers(self):
        self.fsr = FSRWrapper(self, torch.optim.SGD(self.parameters(), lr=0.1), dataset=self.train_set)
        return self.fsr

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        return self.fsr.loss(self(x), y, index)

    trainer = Trainer(callbacks=[FSRCallback()])
    ```

    Training needs none of it, unless the loader leaves samples out (`drop_last`, `limit_train_batches`) or is a stream.
    The metrics come every `log_every_n_steps` steps, to all loggers. In several processes it also brings together what
    they hold apart, before a checkpoint is written.

    **Arguments:** `report`, a folder, to which [`fsr.report`][fsr_wrap.FSRWrapper.report] writes its page when training
    is over; with several wrappers, that of the first.

    **Raises:** `ImportError` if `report` needs a package that is missing; `ValueError` when training starts, if no
    optimizer is an `FSRWrapper`.
    """

    def __init__(self, report: str | os.PathLike[str] | None = None) -> None:
        if report is not None:
            check_packages()  # not to fail when training is over
        self._report = report
        self._wrappers: list[FSRWrapper] = []
        self._logged = 0  # the step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the wrappers."""
        self._wrappers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, FSRWrapper)]
        if not self._wrappers:
            found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise ValueError(
                f"No optimizer is an FSRWrapper; there is {found}. Return it from configure_optimizers: "
                "self.fsr = FSRWrapper(self, optimizer, dataset=...); return self.fsr."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Logs, where the Trainer's loggers listen."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if trainer.loggers and step != self._logged and step % every == 0:
            self._logged = step
            for number, fsr in enumerate(self._wrappers):
                metrics = fsr.metrics()
                if number:
                    metrics = {name.replace("fsr/", f"fsr-{number}/"): value for name, value in metrics.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the epoch, if all batches of it came."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            for fsr in self._wrappers:
                fsr.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The report, of the first process."""
        if self._report is not None:
            dataset = getattr(trainer.train_dataloader, "dataset", None)
            self._wrappers[0].consolidate()
            if trainer.is_global_zero:
                report_at_end(self._wrappers[0], self._report, dataset)

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own: FSR's state is the optimizer's. The callbacks are asked first, in all processes."""
        for fsr in self._wrappers:
            fsr.consolidate()
        return {}
