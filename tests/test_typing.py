"""What a type checker says of a user's script, and what Python says of the names that are misspelt in it."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

import fsr_wrap.config
from fsr_wrap import FSRConfig, FSRWrapper
from fsr_wrap.config import PRESETS, Overrides, PresetName, PusherName
from fsr_wrap.pushers import PUSHERS

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fsr_wrap import FSRConfig, FSRWrapper, RewardDictionary, with_index
from fsr_wrap.pushers import NegativeLoss

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
inner = torch.optim.SGD(model.parameters(), lr=0.1)
train_set = with_index(TensorDataset(torch.randn(9, 4), torch.arange(9) % 3))

config = FSRConfig(relabel_storage=10, pusher=NegativeLoss(), weight_rule="shift")
config = FSRConfig.preset("inat2018", warmup_epochs=3, relabel_storage="int8")
fsr = FSRWrapper(model, inner, "2", dataset=train_set, column="index", config=config, pusher="negative_loss")
fsr = FSRWrapper(model, inner, ["0", model[2]], num_samples=9, class_balance=0.5, seed=1)
optimizer: torch.optim.Optimizer = fsr
scheduler = torch.optim.lr_scheduler.StepLR(fsr, 3)
for x, y, index in DataLoader(train_set):
    inputs, target = fsr.mixup(x, y)
    loss: torch.Tensor = fsr.loss(model(inputs), target, index)
    loss.backward()
    fsr.step()
    fsr.zero_grad()
fsr.end_epoch()
fsr.param_groups[0]["lr"] = 0.2
epoch: int = fsr.epoch
dictionary: RewardDictionary = fsr.dictionary
metrics: dict[str, float] = fsr.metrics()
fsr.save("folder")

fsr.los  # error: attr-defined
fsr.end_epoc()  # error: attr-defined
fsr.epochs = 3  # error: attr-defined
fsr.epoch = 3  # error: misc
FSRConfig(weight_rule="clipped")  # error: arg-type
FSRConfig(pusher="negative_los")  # error: arg-type
FSRConfig(relabel_storage="float8")  # error: arg-type
FSRConfig(warmup_epoch=3)  # error: call-arg
FSRConfig.preset("inat")  # error: arg-type
FSRConfig.preset("inat2018", seeds=1)  # error: call-arg
FSRConfig.preset("inat2018", seed="1")  # error: arg-type
FSRWrapper(model, inner, warmup_epoch=3)  # error: call-arg
FSRWrapper(model, inner, nonfinite="ignore")  # error: arg-type
FSRWrapper(model, inner, relabel_storage=1.5)  # error: arg-type
FSRWrapper(model, [inner])  # error: arg-type
number: int = fsr.loss(model(x), y, index)  # error: assignment
config.seed = 3  # error: misc
"""


def test_a_users_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = ["--strict", "--no-error-summary", "--hide-error-context", "--no-pretty", "--config-file", ""]
    options += ["--cache-dir", str(ROOT / ".mypy_cache" / "script"), "--disable-error-code", "no-untyped-call"]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(script)],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    errors = re.findall(r"script\.py:(\d+): error: .*\[([\w-]+)\]$", found.stdout, re.MULTILINE)
    lines = enumerate(SCRIPT.splitlines(), 1)
    expected = [(str(number), line.split("# error: ")[1]) for number, line in lines if "# error: " in line]
    assert errors == expected, found.stdout + found.stderr


def test_names_and_fields_are_those_that_are_checked() -> None:
    types = typing.get_type_hints(FSRConfig, {**vars(fsr_wrap.config)})
    assert typing.get_type_hints(Overrides) == types
    assert set(types) == {field.name for field in fields(FSRConfig)}
    assert set(typing.get_args(PresetName)) == set(PRESETS)
    assert set(typing.get_args(PusherName)) == set(PUSHERS)


def make() -> FSRWrapper:
    model = nn.Linear(2, 2)
    return FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=9, dictionary_size=2)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("los", "loss"), ("end_epoc", "end_epoch"), ("param_group", "param_groups"), ("Epoch", "epoch"), ("xyz", None)],
)
def test_a_misspelt_name(name: str, meant: str | None) -> None:
    with pytest.raises(AttributeError) as raised:
        getattr(make(), name)
    end = f": did you mean {meant!r}?" if meant else "."
    assert str(raised.value) == f"FSRWrapper has no attribute {name!r}, nor has the SGD in it{end}"


def test_names_of_the_inner_optimizer_are_found_and_copies_made() -> None:
    fsr = make()
    fsr.optimizer.own = 3  # type: ignore[attr-defined]
    assert fsr.own == 3  # type: ignore[attr-defined]
    assert not hasattr(fsr, "_step_supports_amp_scaling")
    for twin in (copy.copy(fsr), copy.deepcopy(fsr), pickle.loads(pickle.dumps(fsr))):
        assert twin.param_groups[0]["lr"] == 0.1
        with pytest.raises(AttributeError, match="did you mean 'loss'"):
            _ = twin.los
