"""FSR in the Trainer of Hugging Face's transformers, without a subclass."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from ..config import FSRConfig
from ..data import sample_counts
from ..heads import REFUSED, unwrap
from ..report import check_packages, report_at_end
from ..wrapper import FSRWrapper


def add_fsr(
    trainer: Trainer, *, column: str = "index", report: str | os.PathLike[str] | None = None, **options: Any
) -> FSRWrapper:
    """Lets a `Trainer` train with FSR.

    ```python
    trainer = Trainer(model, args, train_dataset=with_index(train_set), eval_dataset=val_set)
    fsr = add_fsr(trainer)
    trainer.train()
    ```

    The optimizer, its groups and its schedule are the Trainer's own, made from `args`, or what it was given as
    `optimizers=`, also an `FSRWrapper`. The index comes along with `remove_unused_columns` too, and is taken off before
    the model sees it. Gradients under accumulation are those of the whole batch. Evaluation needs no index, and its
    loss is the plain one. Checkpoints carry FSR's state. The Trainer's logs have `fsr.metrics()`.
    `args.label_smoothing_factor` is FSR's `label_smoothing`.

    **Arguments:**

    - `trainer`: not yet trained. Its model must be one for classification, and is not put inside anything else.
    - `column`: the key of the index in the batches, as `with_index` was told.
    - `report`: a folder, to which [`fsr.report`][fsr_wrap.FSRWrapper.report] writes its page when training is over.
    - `options`: as of [`FSRWrapper`][fsr_wrap.FSRWrapper]: `head`, `config`, fields of `FSRConfig`.

    **Returns:** the wrapper, also for `fsr.label_issues()` and the like after training.

    **Raises:** `TypeError` or `ValueError`, saying what to write instead, for what the Trainer has that cannot go with
    FSR, and as `FSRWrapper` does. The trainer is then as it was.
    """
    _check(trainer, column)
    if report is not None:
        check_packages()  # not to fail when training is over
    fsr = _wrapper(trainer, column, options)
    bridge = FSRCallback(trainer, fsr, column, report)
    trainer.optimizer = fsr
    trainer.compute_loss_func = bridge.loss
    # Behind the callback that decides on logs and checkpoints, before those that pass the logs on.
    callbacks = trainer.callback_handler.callbacks
    first = [isinstance(callback, DefaultFlowCallback) for callback in callbacks]
    callbacks.insert(first.index(True) + 1 if any(first) else 0, bridge)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*(trainer._signature_columns or ()), column]  # type: ignore[assignment]
    return fsr


def _check(trainer: Trainer, column: str) -> None:
    """**Raises:** `TypeError` or `ValueError` for a trainer that cannot train with FSR."""
    if not isinstance(trainer, Trainer):
        raise TypeError(f"add_fsr takes a transformers.Trainer, not {type(trainer).__name__}.")
    if any(isinstance(callback, FSRCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("This Trainer has FSR already: call add_fsr once.")
    if trainer.model_init is not None:
        raise ValueError(
            "model_init makes a new model in every train(), and FSR belongs to one: Trainer(model=model_init(), ...)."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func would take the place of FSR's loss: leave it out.")
    if trainer.train_dataset is None:
        raise ValueError("The Trainer has no train_dataset: Trainer(..., train_dataset=with_index(train_set)).")
    if column in inspect.signature(_core(trainer).forward).parameters:
        raise ValueError(
            f"The model has an argument {column!r} of its own: with_index(train_set, column='fsr_index') and "
            "add_fsr(trainer, column='fsr_index')."
        )
    if trainer.is_deepspeed_enabled:
        raise TypeError(REFUSED["DeepSpeedEngine"])
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise TypeError(REFUSED["FullyShardedDataParallel"])
    if trainer.args.n_gpu > 1:
        raise TypeError(f"{REFUSED['DataParallel']} Start with torchrun --nproc-per-node={trainer.args.n_gpu}.")


def _core(trainer: Trainer) -> nn.Module:
    assert isinstance(trainer.model, nn.Module)
    return unwrap(trainer.model)


def _wrapper(trainer: Trainer, column: str, options: dict[str, Any]) -> FSRWrapper:
    """The wrapper that the Trainer was given, or one around its optimizer."""
    smoothing = float(trainer.args.label_smoothing_factor or 0.0)
    given: Optimizer | None = trainer.optimizer
    if isinstance(given, FSRWrapper):
        if options:
            raise ValueError(f"The Trainer has an FSRWrapper already: pass {', '.join(options)} to that one.")
        own = given.config.label_smoothing
        if smoothing not in (0.0, own):
            raise ValueError(_differ(smoothing, own))
        return given
    own = options.get("label_smoothing", (options.get("config") or FSRConfig()).label_smoothing)
    if smoothing and own not in (0.0, smoothing):
        raise ValueError(_differ(smoothing, own))
    if smoothing:
        options = {**options, "label_smoothing": smoothing}
    options = {"dataset": trainer.train_dataset, "column": column, **options}
    if trainer.args.dataloader_drop_last and (length := sample_counts(trainer.train_dataset, column)[1]):
        batch = trainer.args.train_batch_size * trainer.args.world_size
        options = {"samples_per_epoch": max(1, length // batch) * batch, **options}
    try:
        return FSRWrapper(_core(trainer), trainer.create_optimizer(), **options)
    except BaseException:
        trainer.optimizer = given
        raise


def _differ(smoothing: float, own: float) -> str:
    return f"label_smoothing_factor of args, {smoothing}, and label_smoothing of FSR, {own}, differ: leave one out."


class FSRCallback(TrainerCallback):
    """What `add_fsr` adds to a Trainer: the loss, the metrics in its logs, the report at the end."""

    def __init__(self, trainer: Trainer, fsr: FSRWrapper, column: str, report: str | os.PathLike[str] | None) -> None:
        self.fsr: FSRWrapper = fsr
        self._args, self._report, self._dataset = trainer.args, report, trainer.train_dataset
        self._index = _Index(column)
        # First of all, so that nobody else sees the index: not the model, nor what FSR keeps of its inputs.
        _core(trainer).register_forward_pre_hook(self._index.take_off, with_kwargs=True, prepend=True)

    def loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's `compute_loss_func`. **Raises:** `ValueError` for a batch without index or labels."""
        index, self._index.value = self._index.value, None
        if not torch.is_grad_enabled():
            return self.fsr.loss(outputs, labels, labels)
        column = self._index.column
        if index is None:
            raise ValueError(
                f"The training batches have no {column!r}: Trainer(..., train_dataset=with_index(train_set)). A "
                f"transform and a data_collator of your own must return it too, as they do the labels."
            )
        if labels is None:
            raise ValueError(
                "The training batches have no 'labels', one class number a sample: name the column 'label' or 'labels'."
            )
        loss = self.fsr.loss(outputs, labels, index)
        # The Trainer adds the gradients of an accumulated batch up, and leaves the mean over its samples to its loss.
        if num_items_in_batch is None:
            return loss / self._args.gradient_accumulation_steps
        return loss * (len(labels) / num_items_in_batch)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """**Raises:** `RuntimeError` if the samples of this step were not FSR's."""
        if self._index.value is not None:
            self._index.value = None
            raise RuntimeError(
                "This Trainer's compute_loss did not call compute_loss_func, so FSR saw nothing: call "
                "super().compute_loss(model, inputs, ...) there, or use a Trainer that does not override it."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Brings together what the processes hold apart, before one of them writes a checkpoint."""
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            self.fsr.consolidate()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the epoch of a stream, whose length is not known."""
        if self.fsr._samples_per_epoch is None:
            self.fsr.end_epoch()
        self.on_step_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The metrics, in the logs of training."""
        if logs is not None and "loss" in logs:
            metrics = self.fsr.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The report, of the first process."""
        if self._report is not None:
            self.fsr.consolidate()
            if state.is_world_process_zero:
                report_at_end(self.fsr, self._report, self._dataset)


class _Index:
    """Takes the index off a model's inputs, and keeps it until the loss is computed."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"column": self.column, "value": None}  # of a copied model

    def take_off(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward pre-hook of the model."""
        if self.column not in kwargs:
            return args, kwargs
        # The number of items changes from batch to batch, and a model that gets no labels has no use for it.
        if torch.is_grad_enabled():
            self.value = kwargs[self.column]
        return args, {name: value for name, value in kwargs.items() if name not in (self.column, "num_items_in_batch")}
