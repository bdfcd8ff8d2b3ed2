"""Lightning's own Trainer with FSR, against loops written out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLIP, judge_soon
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_loops import trace
from test_wrapper import CLASSES, Net, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fsr_wrap import FSRWrapper, with_index
from fsr_wrap.integrations.lightning import FSRCallback

N, BATCH = 300, 50
SMALL = {"dictionary_size": 30, "reward_batch_size": 20}
RULES: dict[str, dict[str, Any]] = {"select": SMALL, "clip": {**SMALL, **CLIP}}
RULE = pytest.mark.parametrize("rule", RULES)
pytestmark = [  # of Lightning's own
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, given labels and true ones."""
    x, y, clean = digits(0.3)
    return x[:N], y[:N], clean[:N]


class Shuffled:
    """A loader whose order is the epoch's own, and which goes on where it was."""

    def __init__(self, batch: int = BATCH) -> None:
        x, y, _ = data()
        self.batch, self.epoch, self.start, self.samples = batch, 0, 0, with_index(TensorDataset(x, y))

    def __len__(self) -> int:
        return -(-N // self.batch)

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).split(self.batch)
        for number in range(self.start, len(self)):
            self.start = number + 1
            if self.start == len(order):
                self.epoch, self.start = self.epoch + 1, 0
            columns = zip(*(self.samples[i] for i in order[number].tolist()), strict=True)
            x, y, index = (list(column) for column in columns)
            yield [torch.stack(x), torch.stack(y), torch.tensor(index)]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.start = state["epoch"], state["start"]


class Module(LightningModule):
    """As people write it: the three lines of FSR are those with `fsr`."""

    def __init__(self, rule: str = "clip", whole: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.whole, self.options = Net(), whole, {**RULES[rule], **options}
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        loss = self.fsr.loss(self(x), y, index)
        self.seen.append((index, self.fsr.weights.clone()))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        loss = self.fsr.loss(logits, y, y)
        torch.testing.assert_close(loss, F.cross_entropy(logits, y))
        self.log("val_loss", loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)
        options = {"num_samples": N, **self.options}
        self.fsr = judge_soon(FSRWrapper(self if self.whole else self.net, optimizer, **options), CLASSES)
        return [self.fsr], [torch.optim.lr_scheduler.StepLR(self.fsr, 2)]


def fit(
    module: Module, folder: Path, loader: Any = None, ckpt_path: Any = None, val: Any = None, **options: Any
) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"logger": False, "enable_checkpointing": False, "default_root_dir": folder, "max_epochs": 3}
    trainer = Trainer(**{**quiet, **options})
    trainer.fit(module, Shuffled() if loader is None else loader, val, ckpt_path=ckpt_path)
    return trainer


def written_out(rule: str, accumulate: int = 1, clip: float | None = None) -> tuple[nn.Module, FSRWrapper]:
    """The same run by hand."""
    module = Module(rule)
    net, loader = module.net, Shuffled()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    fsr = judge_soon(FSRWrapper(net, optimizer, num_samples=N, **RULES[rule]), CLASSES)
    schedule = torch.optim.lr_scheduler.StepLR(fsr, 2)
    for _ in range(3):
        for number, (x, y, index) in enumerate(loader, 1):
            (fsr.loss(net(x), y, index) / accumulate).backward()
            if number % accumulate == 0 or number == len(loader):
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                fsr.step()
                fsr.zero_grad()
        schedule.step()
    return net, fsr


@RULE
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}], ids=["", "more"])
def test_equals_the_loop_written_out(rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, with the callback and with evaluations, before the first step and every two steps."""
    module, (x, _, clean) = Module(rule), data()
    val = DataLoader(TensorDataset(x, clean), 100)
    fit(module, tmp_path, val=val, val_check_interval=2, callbacks=[FSRCallback()], **options)
    assert module.fsr.epoch == 3
    assert module.fsr.is_reweighting
    twin = written_out(rule, options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val"))
    assert trace(module.net, module.fsr) == trace(*twin)


@RULE
def test_wrong_labels_get_less(rule: str, tmp_path: Path) -> None:
    module = Module(rule)
    fit(module, tmp_path, max_epochs=8)
    index, weights = (torch.cat(parts) for parts in zip(*module.seen[-6:], strict=True))
    _, y, clean = data()
    wrong = (y != clean)[index]
    assert weights[wrong].sum() / weights.sum() < 0.5 * wrong.float().mean()


@RULE
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_precisions(precision: Any, whole: bool, rule: str, tmp_path: Path) -> None:
    """What FSR remembers is float32, whatever the default dtype is in a step."""
    module = Module(rule, whole)
    fit(module, tmp_path, precision=precision)
    weights = torch.cat([weights for _, weights in module.seen[-6:]])
    least = weights.max() / 2 if rule == "select" else 0.0
    assert 0.05 < (weights <= least).float().mean() < 0.95
    assert module.fsr.scores.dtype == torch.float32
    assert weights.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert next(module.parameters()).dtype == {
        "bf16-true": torch.bfloat16,
        "16-true": torch.float16,
        "64-true": torch.float64,
    }.get(precision, torch.float32)


def test_fresh_reward_data(tmp_path: Path) -> None:
    for whole in (True, False):
        module = Module("clip", whole, reward="fresh")
        fit(module, tmp_path, precision="64-true")
        assert module.fsr.is_reweighting


def test_manual_optimization(tmp_path: Path) -> None:
    """`self.optimizers()` is Lightning's wrapper around ours, and has `loss` too."""

    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            x, y, index = batch
            optimizer: Any = self.optimizers()
            self.manual_backward(optimizer.loss(self(x), y, index))
            optimizer.step()
            optimizer.zero_grad()

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step()  # type: ignore[union-attr]

    module = Manual()
    fit(module, tmp_path)
    assert trace(module.net, module.fsr) == trace(*written_out("clip"))


@RULE
def test_resumes_in_mid_epoch_bit_for_bit(rule: str, tmp_path: Path) -> None:
    """From Lightning's own checkpoint, with a loader that goes on where it was."""
    options: dict[str, Any] = {"enable_checkpointing": True}
    options["callbacks"] = [FSRCallback(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)]
    module = Module(rule)
    fit(module, tmp_path, **options)
    resumed = Module(rule)
    resumed.net.load_state_dict(Net().state_dict())
    trainer = fit(resumed, tmp_path, ckpt_path=tmp_path / "step=8.ckpt", **options)
    assert trainer.global_step == 18
    assert len(resumed.seen) == 10
    assert trace(resumed.net, resumed.fsr) == trace(module.net, module.fsr) == trace(*written_out(rule))


@pytest.mark.parametrize("outer", [True, False])
def test_the_learning_rate_monitor_sees_one_optimizer(outer: bool, tmp_path: Path) -> None:
    """With the schedule on the wrapper, or on the optimizer in it, as it was before FSR came."""

    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            [fsr], _ = super().configure_optimizers()
            return [fsr], [torch.optim.lr_scheduler.StepLR(fsr if outer else fsr.optimizer, 2)]

    monitor, module = LearningRateMonitor("step", log_momentum=True), Scheduled()
    fit(module, tmp_path, logger=CSVLogger(tmp_path), callbacks=[monitor], log_every_n_steps=1)
    rows, name = read(tmp_path), "lr-FSRWrapper" if outer else "lr-SGD"
    assert {key for key in rows[0] if key.startswith("lr")} == {name, f"{name}-momentum"}
    rates = [float(row[name]) for row in rows if row[name]]
    assert rates == pytest.approx([0.1] * 12 + [0.01] * 6)
    assert trace(module.net, module.fsr) == trace(*written_out("clip"))


def test_equal_to_the_optimizer_inside() -> None:
    """What looks an optimizer up in a list finds it, wrapped or not."""
    one, other = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1) for _ in range(2))
    fsr, again = (FSRWrapper(nn.Linear(2, 2), one) for _ in range(2))
    assert one in [fsr]
    assert fsr in [one]
    assert fsr == again
    assert other not in [fsr]
    assert fsr != FSRWrapper(nn.Linear(2, 2), other)
    assert len({fsr, one, again}) == 1
    assert fsr != "SGD"


def read(folder: Path) -> list[dict[str, str]]:
    import csv

    [file] = folder.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_metrics_are_logged(accumulate: int, tmp_path: Path) -> None:
    """Once a step that is due."""
    options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 6 // accumulate}
    fit(Module(), tmp_path, logger=CSVLogger(tmp_path), callbacks=[FSRCallback()], **options)
    rows = read(tmp_path)
    assert [accumulate * (int(row["step"]) + 1) for row in rows] == [6, 12, 18]
    assert [float(row["fsr/epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[0]["fsr/zero_weight_ratio"]) == 0 < float(rows[1]["fsr/zero_weight_ratio"])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(*data()[:2], strict=True)


@pytest.mark.parametrize("kind", ["files", "stream"])
def test_the_report_is_written(kind: str, tmp_path: Path) -> None:
    samples = Stream() if kind == "stream" else TensorDataset(*data()[:2])
    loader = DataLoader(with_index(samples), 70, shuffle=kind != "stream")
    module = Module(num_samples=None if kind == "stream" else N)
    fit(module, tmp_path, loader, callbacks=[FSRCallback(tmp_path / "report")])
    assert (tmp_path / "report" / "index.html").is_file()
    assert (tmp_path / "report" / "label_issues.csv").is_file()


@pytest.mark.parametrize("kind", ["limit_train_batches", "drop_last", "stream"])
def test_epochs_end_where_the_trainers_do(kind: str, tmp_path: Path) -> None:
    samples = Stream() if kind == "stream" else TensorDataset(*data()[:2])
    loader = DataLoader(with_index(samples), 70, shuffle=kind != "stream", drop_last=kind == "drop_last")
    module = Module(num_samples=None if kind == "stream" else N)
    options = {"limit_train_batches": 3} if kind == "limit_train_batches" else {}
    fit(module, tmp_path, loader, callbacks=[FSRCallback()], **options)
    assert len(module.seen) == {"limit_train_batches": 9, "drop_last": 12, "stream": 15}[kind]
    assert module.fsr.epoch == 3
    assert module.fsr.is_reweighting


def test_an_epoch_that_is_not_at_its_end_goes_on(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, callbacks=[FSRCallback()], max_steps=9, max_epochs=-1)
    assert module.fsr.epoch == 1


def test_the_callback_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    class Forgot(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(ValueError, match=r"there is SGD\. Return it from configure_optimizers"):
        fit(Forgot(), tmp_path, callbacks=[FSRCallback()])


def test_what_a_report_needs_is_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'needs jinja2: pip install "fsr_wrap\[report\]"'):
        FSRCallback(tmp_path)


def test_a_report_that_fails_does_not_end_what_comes_after_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = Module()
    with pytest.warns(UserWarning, match=r"The report could not be written \(\w+Error: .*call fsr\.report"):
        fit(module, tmp_path / "logs", callbacks=[FSRCallback(tmp_path / "file" / "report")])
    assert module.fsr.epoch == 3
