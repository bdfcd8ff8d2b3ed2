"""Accelerate's own test scripts, with FSRWrapper around each optimizer that they make.

They train a regression, so FSR has nothing to say in them; what is asked is that the wrapper is an optimizer to
Accelerate. Its scripts of checkpoints and metrics need models of the hub, and are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import processes
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.test_utils.scripts import test_script, test_sync
from torch import nn

from fsr_wrap import FSRWrapper

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")


def wrap_optimizers(patch: pytest.MonkeyPatch) -> list[FSRWrapper]:
    """From now on; those that were made."""
    made: list[FSRWrapper] = []
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD

    def wrapper(kind: Any) -> Any:
        def make(params: Any, **options: Any) -> FSRWrapper:
            made.append(FSRWrapper(nn.Linear(2, 2), kind(params, **options), num_samples=10_000))
            return made[-1]

        return make

    # Its data are drawn anew each time: a gradient that is nearly nothing is then not equal to eight digits.
    patch.setattr(test_sync, "RegressionDataset", partial(test_sync.RegressionDataset, seed=0))
    patch.setattr(test_sync, "AdamW", wrapper(adamw))
    patch.setattr(torch.optim, "SGD", wrapper(sgd))
    return made


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def test_sync_script(monkeypatch: pytest.MonkeyPatch) -> None:
    made = wrap_optimizers(monkeypatch)
    test_sync.test_noop_sync(Accelerator())
    for split in (True, False):
        reset()
        test_sync.test_gradient_accumulation_with_opt_and_scheduler(split)
    assert len(made) == 4


def test_training_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is what it is without Accelerate: batches split, dispatched, in half precision."""
    made = wrap_optimizers(monkeypatch)
    Accelerator()
    test_script.training_check(use_seedable_sampler=False)
    assert len(made) >= 4


def in_each_process() -> dict[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        made = wrap_optimizers(patch)
        test_sync.test_distributed_sync(Accelerator())
        for split, dispatch in ((False, False), (True, False), (False, True)):
            AcceleratorState._reset_state()
            GradientState._reset_state()
            test_sync.test_gradient_accumulation_with_opt_and_scheduler(split, dispatch)
        return {"made": len(made)}


def test_sync_script_in_two_processes() -> None:
    assert [found["made"] for found in processes.run(2, in_each_process)] == [6, 6]
