"""The programs of docs/loops.md, run as they stand there."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from test_wrapper import Net, digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = (Path(__file__).parents[1] / "docs" / "loops.md").read_text(encoding="utf-8")
TABS = {
    name: textwrap.dedent(code)
    for name, code in re.findall(r'^=== "(.+?)"\n\n    ```python[^\n]*\n(.*?)^    ```$', PAGE, re.DOTALL | re.MULTILINE)
}
OTHERS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
EPOCHS = 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true"),
    pytest.mark.filterwarnings("ignore:.*train_dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .6. is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own; Accelerate shares its state over the process."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run(code: str, **names: Any) -> dict[str, Any]:
    """Runs a program of the page; what it defined, by name."""
    torch.manual_seed(0)
    common = {"torch": torch, "nn": nn, "DataLoader": DataLoader, "TensorDataset": TensorDataset, "epochs": EPOCHS}
    names = {**common, **names}
    exec(compile(code, "docs/loops.md", "exec"), names)
    return names


def samples() -> TensorDataset:
    x, y, _ = digits(0.3)
    return TensorDataset(x[:300], y[:300])


def test_every_program_of_the_page_is_run() -> None:
    assert set(TABS) == {"Plain loop", "Accelerate", "Trainer", "Lightning", "timm"}
    assert set(OTHERS) == {"tables", "signals"}
    assert PAGE.count("```python") == len(TABS) + len(OTHERS)


@pytest.mark.parametrize("name", TABS)
def test_marked_lines_are_those_of_fsr(name: str) -> None:
    head = re.search(rf'=== "{name}"\n\n    ```python hl_lines="([\d ]+)"', PAGE)
    assert head
    telling = re.compile(r"fsr|FSR|with_index|, index\b|optimizer\.loss|loader = create_loader")
    lines = [number for number, line in enumerate(TABS[name].splitlines(), 1) if telling.search(line)]
    assert [int(number) for number in head[1].split()] == lines


def test_plain_loop() -> None:
    names = run(TABS["Plain loop"], model=Net(), train_set=samples())
    assert names["optimizer"].epoch == EPOCHS


def test_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    names = run(TABS["Accelerate"], model=Net(), train_set=samples())
    assert names["fsr"].epoch == EPOCHS


def test_trainer(tmp_path: Path) -> None:
    from test_integrations_transformers import make_data, make_model

    names = run(TABS["Trainer"], model=make_model(), train_set=make_data()[0], val_set=make_data()[0])
    assert names["fsr"].epoch == EPOCHS
    assert (tmp_path / "output" / "checkpoint-10").is_dir()


def test_lightning() -> None:
    names = run(TABS["Lightning"], model=Net(), train_set=samples())
    assert names["module"].fsr.epoch == EPOCHS


def test_timm(tmp_path: Path) -> None:
    for number in range(110):
        place = tmp_path / "train" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), number, dtype=np.uint8)).save(place / f"{number}.png")
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    names = run(TABS["timm"], model=model, folder=str(tmp_path), device=torch.device("cpu"))
    assert names["optimizer"].epoch == EPOCHS


@pytest.mark.parametrize("name", OTHERS)
def test_other_data(name: str) -> None:
    """They learn, and FSR sees each sample."""
    names = run(OTHERS[name])
    fsr, data = names["optimizer"], names["train_set"].dataset
    assert fsr.epoch == {"tables": 10, "signals": 5}[name]
    assert fsr.scores.isfinite().all()
    found = names["model"].eval()(data.tensors[0]).argmax(1)
    assert (found == data.tensors[1]).float().mean() > 0.9
