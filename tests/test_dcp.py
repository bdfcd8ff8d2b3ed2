"""FSR's state through torch.distributed.checkpoint, by hand and through Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import CLIP, assert_close
from processes import run
from test_distributed import State, build, global_batches, network, outcome, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fsr_wrap import FSRWrapper

STOP = 9  # batches, in mid-epoch
quiet = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")  # DCP says so in one process


def batches() -> list[torch.Tensor]:
    return [batch for epoch in global_batches() for batch in epoch]


class App:
    """The pattern of torch's tutorial: model and optimizer as one Stateful."""

    def __init__(self, model: nn.Module, fsr: FSRWrapper, options: StateDictOptions | None = None) -> None:
        self.model, self.fsr, self.options = model, fsr, options

    def state_dict(self) -> State:
        model, optim = get_state_dict(self.model, self.fsr, options=self.options)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state: State) -> None:
        set_model_state_dict(self.model, state["model"], options=self.options)
        set_optimizer_state_dict(self.model, self.fsr, state["optim"], options=self.options)


def save_and_go_on(folder: str, sharded: bool | None, options: State) -> State:
    model, core, fsr = build(options, sharded=sharded)
    train(model, fsr, batches()[:STOP])
    if sharded is None:
        fsr.consolidate()
    dcp.save({"app": App(model, fsr)}, checkpoint_id=folder)
    train(model, fsr, batches()[STOP:])
    return outcome(core, fsr)


def load_and_go_on(folder: str, sharded: bool | None, options: State) -> State:
    model, core, fsr = build(options, sharded=sharded)
    dcp.load({"app": App(model, fsr)}, checkpoint_id=folder)
    train(model, fsr, batches()[STOP:])
    return outcome(core, fsr)


@quiet
@pytest.mark.parametrize(("sharded", "options"), [(True, {}), (None, {}), (True, CLIP), (None, CLIP)])
def test_saved_by_two_processes_and_loaded_by_as_many_or_three_or_one(
    sharded: bool | None, options: State, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    undisturbed = run(2, save_and_go_on, folder, sharded, options)
    again = run(2, load_and_go_on, folder, sharded, options)
    for found in again:
        assert_close(found, undisturbed[0], 0.0)
    for found in [*run(3, load_and_go_on, folder, sharded, options), load_and_go_on(folder, None, options)]:
        for name, value in undisturbed[0].items():
            assert_close(found[name], value, 2e-3 if name == "pseudo" else 1e-5)


def full(broadcast: bool, options: State) -> list[State]:
    """A full state dict, on the host of the first process, loaded again into a new model."""
    model, core, fsr = build(options, sharded=True)
    train(model, fsr, batches()[:STOP])
    app = App(model, fsr, StateDictOptions(full_state_dict=True, cpu_offload=broadcast))
    state = app.state_dict()
    train(model, fsr, batches()[STOP:])
    expected = outcome(core, fsr)
    model, core, fsr = build(options, sharded=True)
    App(model, fsr, StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)).load_state_dict(state)
    train(model, fsr, batches()[STOP:])
    return [expected, outcome(core, fsr)]


@pytest.mark.parametrize(("broadcast", "options"), [(False, CLIP), (True, {})])
def test_full_state_dicts(broadcast: bool, options: State) -> None:
    for expected, found in run(2, full, broadcast, options):
        assert_close(found, expected, 0.0)


def by_accelerate(folder: str, kind: str, options: State) -> list[State]:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, load_fsdp_optimizer, save_fsdp_optimizer

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model, core, fsr = build(options, sharded=True)
    train(model, fsr, batches()[:STOP])
    save_fsdp_optimizer(plugin, accelerator, fsr, model, folder)  # as accelerator.save_state does under FSDP2
    values = [parameter.detach().clone() for parameter in core.parameters()]
    train(model, fsr, batches()[STOP:])
    expected = outcome(core, fsr)
    model, core, fsr = build(options, sharded=True)
    load_fsdp_optimizer(plugin, accelerator, fsr, model, folder)
    with torch.no_grad():
        for parameter, value in zip(core.parameters(), values, strict=True):
            parameter.copy_(value)
    train(model, fsr, batches()[STOP:])
    return [expected, outcome(core, fsr)]


@pytest.mark.parametrize(("kind", "options"), [("SHARDED_STATE_DICT", {}), ("FULL_STATE_DICT", CLIP)])
def test_accelerate_under_fsdp2(kind: str, options: State, tmp_path: Path) -> None:
    for expected, found in run(2, by_accelerate, str(tmp_path), kind, options):
        assert_close(found, expected, 0.0)


# --- in one process --------------------------------------------------------------------------------------------------


def trained(seen: int = STOP) -> tuple[nn.Module, FSRWrapper]:
    model, _, fsr = build({})
    train(model, fsr, batches()[:seen])
    return model, fsr


@quiet
def test_the_wrapper_itself_is_a_stateful(tmp_path: Path) -> None:
    _, fsr = trained()
    dcp.save({"fsr": fsr}, checkpoint_id=tmp_path, no_dist=True)
    _, again = trained(1)
    dcp.load({"fsr": again}, checkpoint_id=tmp_path, no_dist=True)
    assert_close(again.state_dict(), fsr.state_dict(), 0.0)


def test_a_plain_optimizer_loads_it_and_a_plain_state_is_told_of() -> None:
    model, fsr = trained()
    state = get_optimizer_state_dict(model, fsr)
    plain_model = network()
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.05, momentum=0.9)
    set_optimizer_state_dict(plain_model, plain, state)
    assert_close(plain.state_dict()["state"], fsr.state_dict()["state"], 0.0)
    with pytest.warns(UserWarning, match="no state of FSR, so FSR starts afresh"):
        set_optimizer_state_dict(model, fsr, get_optimizer_state_dict(model, fsr.optimizer))
    assert fsr.epoch == 0
    _, fsr = trained()
    with pytest.warns(UserWarning, match="no state of FSR, so FSR starts afresh"):
        fsr.load_state_dict(fsr.optimizer.state_dict())


def test_what_cannot_be_carried_is_told_of() -> None:
    model, fsr = trained()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    with pytest.warns(UserWarning, match=r"flatten_optimizer_state_dict=True .* fsr.save\(folder\)"):
        state: Any = get_optimizer_state_dict(model, fsr, options=flat)
    assert not any("fsr" in name for name in state)


@quiet
def test_a_state_that_dcp_filled_in_by_halves_is_refused(tmp_path: Path) -> None:
    _, fsr = trained()
    dcp.save({"optim": fsr.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    _, _, again = build({"soon": False})  # no tables yet
    state = {"optim": again.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="not whole"):
        again.load_state_dict(state["optim"])
    assert again.epoch == 0


# --- saving and loading that fail in one process ---------------------------------------------------------------------


def fails_in_one(folder: str) -> list[str]:
    """Saves where nothing can be written, loads what one process alone has, and trains on after each."""
    rank = dist.get_rank()
    model, core, fsr = build({})
    train(model, fsr, batches()[:2])
    fsr.save(f"{folder}/good")
    messages = []
    for attempt in (
        lambda: fsr.save(f"{folder}/file"),
        lambda: fsr.load(f"{folder}/good" if rank == 0 else f"{folder}/nowhere"),
        lambda: fsr.load(f"{folder}/damaged" if rank == 0 else f"{folder}/good"),
    ):
        try:
            attempt()
        except (OSError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        train(model, fsr, batches()[2 + len(messages) :][:1])
    dist.barrier()
    values = torch.cat([parameter.detach().flatten() for parameter in core.parameters()])
    return [*messages, str(values.double().sum().item())]


def test_every_process_hears_of_a_failure_and_can_go_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "fsr.safetensors").write_bytes(b"nothing of the kind")
    first, second = run(2, fails_in_one, str(tmp_path))
    assert len(first) == len(second) == 4
    for here, there, kind in zip(first, second, ("file", "nowhere", "damaged"), strict=False):
        assert kind in here
        assert kind in there
    assert first[3] == second[3]
