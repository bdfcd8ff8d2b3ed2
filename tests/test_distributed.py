"""The same training on one, two and four processes.

In double precision: what is left is then no rounding. P̂ is kept in float32 and ŷ in half precision all the same.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CLIP, assert_close, judge_soon
from processes import fully_shard, run
from test_wrapper import CLASSES
from test_wrapper import digits as float_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from fsr_wrap import FSRWrapper, distributed, functional, selection

N, BATCH, EPOCHS = 360, 60, 3
EARLY = {"VISITS": 1, "_GROWTH": -1.0, "_FEW": 1, "_LARGEST_SHARE": 0.2}  # shares are read after the first epoch
State = dict[str, Any]


def digits() -> tuple[Tensor, Tensor]:
    x, y, _ = float_digits(0.3)
    return x.double(), y


def global_batches(repeated: int = 7, seed: int = 7) -> list[list[Tensor]]:
    """The batches of each epoch: a short last one, so short that a process may get none of it, and samples that come
    again in a later batch (as `even_batches` makes them), and twice in one batch."""
    order = torch.Generator().manual_seed(seed)
    epochs = []
    for _ in range(EPOCHS):
        indices = torch.randperm(N, generator=order)
        indices = torch.cat([indices, indices[:repeated], indices[:1].repeat(60 - repeated), indices[5:8]])
        epochs.append(list(indices.split(BATCH)))
    return epochs


def network(mlp_head: bool = False) -> nn.Module:
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(32, CLASSES)
    if mlp_head:
        head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), head).double()


def shard(core: nn.Module, parts: bool) -> nn.Module:
    """FSDP2, of the whole, or of each layer as well."""
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    for layer in core if parts else ():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(core, mesh=mesh)


def build(
    options: State, mlp_head: bool = False, samples: int = N + 63, sharded: bool | None = None
) -> tuple[nn.Module, nn.Module, FSRWrapper]:
    """The model, inside DDP (or FSDP2, in parts or not) if there are several processes, and bare; and the wrapper,
    which judges labels soon, unless `soon` is false."""
    options = dict(options)
    soon = options.pop("soon", True)
    core = network(mlp_head)
    if sharded is not None:
        model = shard(core, sharded)
    else:
        model = DistributedDataParallel(core) if distributed.world_size() > 1 else core
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recipe = {"dictionary_size": 40, "reward_batch_size": 30, "warmup_epochs": 1, **options}
    fsr = FSRWrapper(model, inner, core[2], **{"num_samples": N, "samples_per_epoch": samples, **recipe})
    return model, core, judge_soon(fsr, CLASSES) if soon else fsr


def train(model: nn.Module, fsr: FSRWrapper, batches: list[Tensor]) -> list[Tensor]:
    """Trains on this process's share of each batch; returns the weights of all processes."""
    rank, world = distributed.rank(), distributed.world_size()
    x, y = digits()
    weights = []
    for batch in batches:
        index = batch.tensor_split(world)[rank]
        loss = fsr.loss(model(x[index]), y[index], index)
        loss.backward()
        fsr.step()
        fsr.zero_grad()
        parts: list[Any] = [None] * world
        if world > 1:
            dist.all_gather_object(parts, fsr.weights)
        weights.append(torch.cat(parts) if world > 1 else fsr.weights)
    return weights


def outcome(core: nn.Module, fsr: FSRWrapper) -> State:
    """What must not depend on the number of processes."""
    fsr.consolidate()
    state = fsr.state_dict()["fsr"]
    parameters = [distributed.whole(parameter.detach()).flatten() for parameter in core.parameters()]
    out = {"parameters": torch.cat(parameters), "scores": state["table"]["score"]}
    out |= {"last_epoch": state["table"]["epoch"], "epoch": fsr.epoch}
    out |= {name: column for name, column in state["table"].items() if name == "learned"}
    out |= {"members": fsr.dictionary.index, "momentum": fsr.dictionary.score}
    if fsr.config.selects:
        out |= {
            name: state["selection"][name]
            for name in (
                "code",
                "weight",
                "share",
                "first",
                "agreement",
                "growth",
                "readings",
                "estimated",
                "apart",
                "predicted",
                "early",
                "peak",
            )
        }
        out |= {"log_prior": state.get("log_prior")} | ({"margin": state["margin"]} if "margin" in state else {})
    else:
        out |= {"payload": fsr.dictionary.draw(40, torch.Generator().manual_seed(0)).payload[0]}
    return out | ({"pseudo": state["pseudo"]["logits"]} if "pseudo" in state else {})


def job(options: State, mlp_head: bool, batches: list[list[Tensor]], sharded: bool | None = None) -> State:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({} if options.get("soon", True) else EARLY).items():
            patch.setattr(selection, name, value)
        patch.setattr(functional, "_ALIKE", 1.0)  # digits' classes are nearly of one size
        model, core, fsr = build(options, mlp_head, sharded=sharded)
        weights, shares = [], []
        for epoch in batches:
            weights += train(model, fsr, epoch)
            shares += [fsr._memory.selection.share.clone()] if fsr._memory.selection else []
    return {**outcome(core, fsr), "weights": torch.cat(weights), "shares": torch.stack(shares or [torch.zeros(1)])}


def assert_equal_runs(found: list[State], expected: State) -> None:
    for name, value in expected.items():
        for other in found[1:]:
            assert_close(other[name], found[0][name], 0.0)
        assert_close(found[0][name], value, 2e-3 if name == "pseudo" else 1e-5)  # half precision: one unit of the last


CASES = [
    (CLIP, False),
    ({**CLIP, "reward": "fresh", "pusher": "meta_margin"}, False),
    ({**CLIP, "weight_rule": "shift", "label_smoothing": 0.1, "relabel_weight": 0.0}, True),
    ({**CLIP, "num_samples": None, "dictionary_size": 10}, True),
    # Inner products in place of the head's gradient, since there are few reward samples.
    ({**CLIP, "reward_batch_size": 13, "pusher": "meta_margin", "relabel_storage": 3}, False),
    ({**CLIP, "reward_batch_size": 13, "pusher": "forgetting_event", "relabel_storage": "int8"}, False),
    ({}, False),
    ({"soon": False}, True),
    ({"pusher": "meta_margin", "relabel_storage": 3, "label_smoothing": 0.1}, True),
]
RUNS = [(2, 0), (4, 0), (4, 1), (2, 2), (4, 3), (4, 4), (2, 5), (2, 6), (4, 6), (4, 7), (2, 8)]


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_equal_on_any_number_of_processes(world: int, case: int) -> None:
    options, mlp_head = CASES[case]
    batches = global_batches()
    assert len(batches[0][-1]) == 3  # one of four processes gets nothing
    expected = job(options, mlp_head, batches)
    found = run(world, job, options, mlp_head, batches)
    assert expected["epoch"] == EPOCHS
    assert (expected["weights"] == 0).any() or options.get("weight_rule") == "shift"
    assert options.get("soon", True) or len(expected["shares"].unique(dim=0)) > 1  # they were read again
    assert_equal_runs(found, expected)


def soft_job(batches: list[Tensor]) -> State:
    """Targets of which one in three is mixed, so that a process may have none of them in a batch."""
    model, core, fsr = build({})
    rank, world, (x, y) = distributed.rank(), distributed.world_size(), digits()
    hard = torch.nn.functional.one_hot(y, CLASSES).double()
    mixed = (torch.arange(len(y)) % 3 == 0)[:, None]
    targets = torch.where(mixed, 0.6 * hard + 0.4 * hard.roll(1, 1), hard)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The soft targets are not those")
        for batch in batches:
            index = batch.tensor_split(world)[rank]
            fsr.loss(model(x[index]), targets[index], index).backward()
            fsr.step()
            fsr.zero_grad()
    fsr.end_epoch()
    return {**outcome(core, fsr), "given": fsr._memory.given.known().clone()}


def test_labels_of_mixed_targets_are_unknown_in_all_processes() -> None:
    batches = [index for epoch in global_batches() for index in epoch]
    expected = soft_job(batches)
    assert torch.equal(expected["given"] < 0, torch.arange(N) % 3 == 0)
    assert_equal_runs(run(2, soft_job, batches), expected)


@pytest.mark.parametrize("options", [{}, CLIP])
def test_a_repeated_sample_counts_once(options: State) -> None:
    """With and without repeats, scores and dictionary of the first epoch are the same, in one process and in two."""
    with_repeats = global_batches()[0]
    without = list(torch.cat(with_repeats)[:N].split(BATCH))
    outcomes = []
    for batches in (with_repeats, without):
        torch.manual_seed(0)
        model, core, fsr = build(options)
        fsr.optimizer.param_groups[0]["lr"] = 0.0
        train(model, fsr, batches)
        fsr.end_epoch()
        outcomes.append(outcome(core, fsr))
    assert outcomes[0]["epoch"] == 1
    for name in ("scores", "members", "momentum", "pseudo"):
        assert_close(outcomes[0][name], outcomes[1][name], 1e-6)


# --- with Accelerate's own loader ------------------------------------------------------------------------------------


def accelerated(epochs: int, options: State) -> State:
    """Trains with Accelerate on 37 samples a process and step: the last batch repeats samples."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    from fsr_wrap import with_index

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    x, y = digits()
    train_set = with_index(TensorDataset(x[:N], y[:N]))
    core = network()
    inner = torch.optim.SGD(core.parameters(), lr=0.05, momentum=0.9)
    recipe = {"dictionary_size": 40, "reward_batch_size": 30, "warmup_epochs": 1, **options}
    fsr = judge_soon(FSRWrapper(core, inner, dataset=train_set, **recipe), CLASSES)
    loader = DataLoader(train_set, 37, shuffle=True)
    model, optimizer, loader = accelerator.prepare(core, fsr, loader)
    batches, weights = [], []
    for _ in range(epochs):
        for images, labels, index in loader:
            batches.append(accelerator.gather(index))
            loss = fsr.loss(model(images), labels, index)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            weights.append(accelerator.gather(fsr.weights))
    assert fsr.epoch == epochs
    return {**outcome(core, fsr), "weights": torch.cat(weights), "batches": batches}


@pytest.mark.parametrize("options", [{}, CLIP])
def test_accelerates_loader_with_repeated_samples(options: State) -> None:
    found = run(2, accelerated, EPOCHS, options)
    batches, _ = [state.pop("batches") for state in found]
    per_epoch = batches[: len(batches) // EPOCHS]
    assert len(torch.cat(per_epoch)) > len(torch.cat(per_epoch).unique()) == N  # some came twice
    model, core, fsr = build(options, samples=N)
    weights = train(model, fsr, batches)
    assert_equal_runs(found, {**outcome(core, fsr), "weights": torch.cat(weights)})


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


FSDP_CASES = [
    ({}, False, True),
    ({}, True, False),
    (CLIP, False, False),
    (CLIP, False, True),
    ({**CLIP, "reward": "fresh"}, False, True),
    (CLIP, True, False),
]


@pytest.mark.parametrize(("options", "mlp_head", "parts"), FSDP_CASES)
def test_fully_shard_gives_the_weights_of_ddp(options: State, mlp_head: bool, parts: bool) -> None:
    batches = global_batches()
    expected = run(2, job, options, mlp_head, batches)[0]
    assert (expected["weights"] == 0).any()
    assert_equal_runs(run(2, job, options, mlp_head, batches, parts), expected)


def refused() -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    def tensor_parallel(core: nn.Module) -> nn.Module:
        return parallelize_module(core, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})

    def zero_3(core: nn.Module) -> nn.Module:
        for number, parameter in enumerate(core.parameters()):
            parameter.ds_id = number  # type: ignore[attr-defined]
        return core

    def nested(core: nn.Module) -> nn.Module:
        return nn.Sequential(core[0], core[1], nn.DataParallel(core[2]))

    def fsdp_1(core: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(core, device_id=torch.device("cpu"))

    def sharded_head(core: nn.Module) -> nn.Module:
        core[2] = nn.Sequential(core[2], nn.Tanh(), nn.Linear(CLASSES, CLASSES).double())
        fully_shard(core[2][0], mesh=init_device_mesh("cpu", (2,)))
        return fully_shard(core, mesh=init_device_mesh("cpu", (2,)))

    messages = []
    for wrap in (tensor_parallel, zero_3, DeepSpeedEngine, nested, fsdp_1, sharded_head):
        model = wrap(network())
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            FSRWrapper(model, inner, "2" if wrap is sharded_head else "auto", num_samples=N)
        except TypeError as error:
            messages.append(str(error))
    return messages


def test_what_is_not_supported_is_refused_by_name() -> None:
    found = run(2, refused)[0]
    parts = ("tensor-parallel", "ZeRO-3", "DeepSpeed", "nn.DataParallel", "FSDP1", "fully_shard")
    for message, part in zip(found, parts, strict=True):
        assert part in message
        assert "DistributedDataParallel" in message or "do not call" in message  # what to do instead


def sharded_state(folder: str, options: State) -> State:
    """Saves under FSDP2, and loads what was saved into FSDP2 and DDP; what comes of one more epoch in each."""
    batches = global_batches()
    model, core, fsr = build(options, sharded=True)
    for epoch in batches[:2]:
        train(model, fsr, epoch)
    fsr.save(folder)
    values = [distributed.whole(parameter.detach()).clone() for parameter in core.parameters()]
    outcomes = {}
    for name, sharded in (("undisturbed", None), ("fsdp", True), ("ddp", None)):
        if name != "undisturbed":
            model, core, fsr = build(options, sharded=sharded)
            with torch.no_grad():
                for parameter, value in zip(core.parameters(), values, strict=True):
                    parameter.copy_(distributed.shard_like(value, parameter))
            fsr.load(folder)
        train(model, fsr, batches[2])
        outcomes[name] = outcome(core, fsr)
    return outcomes


@pytest.mark.parametrize("options", [{}, CLIP])
def test_a_checkpoint_of_fsdp_loads_into_fsdp_and_ddp(options: State, tmp_path: Path) -> None:
    found = run(2, sharded_state, str(tmp_path), options)[0]
    assert found["undisturbed"]["epoch"] == 3
    assert_equal_runs([found["fsdp"]], found["undisturbed"])
    assert_equal_runs([found["ddp"]], found["undisturbed"])


# --- state -----------------------------------------------------------------------------------------------------------


def until(stop: int, folder: str | None, options: State) -> State:
    """Trains up to batch `stop`, in mid-epoch, and saves there; with a folder given, goes on from what it holds."""
    batches = [batch for epoch in global_batches() for batch in epoch]
    model, core, fsr = build(options)
    if folder is not None:
        core.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
        fsr.load(folder)
        train(model, fsr, batches[stop:])
        return outcome(core, fsr)
    train(model, fsr, batches[:stop])
    return {"epoch": fsr.epoch}


def save_and_go_on(stop: int, folder: str, options: State) -> State:
    batches = [batch for epoch in global_batches() for batch in epoch]
    model, core, fsr = build(options)
    train(model, fsr, batches[:stop])
    fsr.save(folder)
    if distributed.rank() == 0:
        torch.save(core.state_dict(), f"{folder}/model.pt")
    distributed.barrier()
    train(model, fsr, batches[stop:])
    return outcome(core, fsr)


@pytest.mark.parametrize(
    "options", [{}, {"soon": False, "num_samples": None}, CLIP, {**CLIP, "reward": "fresh", "num_samples": None}]
)
def test_saved_in_mid_epoch_and_loaded_into_any_number_of_processes(options: State, tmp_path: Path) -> None:
    """Bit for bit in as many processes, up to rounding in another number; and saving changes nothing."""
    stop = 13  # of 8 batches an epoch: re-weighting is on
    torch.manual_seed(0)
    model, core, fsr = build(options)
    train(model, fsr, [batch for epoch in global_batches() for batch in epoch])
    undisturbed = outcome(core, fsr)
    saved = run(2, save_and_go_on, stop, str(tmp_path), options)
    assert_equal_runs(saved, undisturbed)
    again = run(2, until, stop, str(tmp_path), options)
    for name, value in saved[0].items():
        assert_close(again[0][name], value, 0.0)
        assert_close(again[1][name], value, 0.0)
    assert_equal_runs([until(stop, str(tmp_path), options)], undisturbed)
    assert_equal_runs(run(3, until, stop, str(tmp_path), options), undisturbed)


def state_of_one_process(options: State) -> State:
    model, _, fsr = build(options)
    train(model, fsr, global_batches()[0][:2])
    with pytest.warns(UserWarning, match=r"call consolidate\(\) in all processes"):
        before = fsr.state_dict()["fsr"]
    fsr.consolidate()
    after = fsr.state_dict()["fsr"]
    held = [int((state["dictionary"]["buffer"]["index"] >= 0).sum()) for state in (before, after)]
    return {"held": held, "pseudo": after["pseudo"]["logits"], "scores": before["table"]["score"]}


@pytest.mark.parametrize("options", [{}, CLIP])
def test_consolidate_brings_what_a_state_dict_of_one_process_lacks(options: State) -> None:
    first, second = run(2, state_of_one_process, options)
    if options:
        assert first["held"][0] + second["held"][0] == first["held"][1] == second["held"][1] == 2 * BATCH
    assert_close(first["pseudo"], second["pseudo"], 0.0)
    assert int(first["scores"].isfinite().sum()) == 2 * BATCH  # the scores are everywhere at once


# --- collectives -----------------------------------------------------------------------------------------------------


def count_collectives(options: State) -> State:
    counts: list[list[int]] = []
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "barrier"):
        original = getattr(dist, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            counts[-1].append(args[0].numel() if args else 0)
            return original(*args, **kwargs)

        setattr(distributed.dist, name, counted)
    model, _, fsr = build(options)
    x, y = digits()
    for epoch in range(2):
        for batch in torch.arange(N).split(BATCH):
            index = batch.chunk(2)[distributed.rank()]
            counts.append([])
            fsr.loss(model(x[index]), y[index], index).backward()
        counts.append([])
        fsr.end_epoch()
        assert fsr.epoch == epoch + 1
        counts.pop()
    return {"counts": counts}


@pytest.mark.parametrize(
    ("options", "last"),
    [({}, 2), (CLIP, 3), ({**CLIP, "weight_rule": "shift"}, 3), ({**CLIP, "pusher": "meta_margin"}, 3)],
)
def test_at_most_three_small_collectives_a_step(options: State, last: int) -> None:
    first, second = run(2, count_collectives, options)
    head, rows = 33 * CLASSES, BATCH // 2
    assert first == second
    for counts in first["counts"]:
        assert len(counts) <= 3
        assert max(counts) <= max(head, 2 * 3 * rows) + 16
    assert len(first["counts"][-1]) == last


def test_many_classes_send_no_gradient_of_the_head() -> None:
    """With more classes than half of the reward samples features and residuals are gathered in the gradients' place."""
    first, second = run(2, count_collectives, {**CLIP, "reward_batch_size": 18})
    assert first == second
    rows = BATCH // 2
    sent = first["counts"][-1]
    assert sent[1:3] == [2 * rows * (32 + CLASSES), 18 * (32 + CLASSES)]
    assert len(sent) == 4


def growing_batches() -> State:
    """Batches may grow, in one process alone."""
    model, core, fsr = build({}, samples=N)
    x, y = digits()
    rank = distributed.rank()
    known = []
    for step, batch in enumerate(torch.arange(N).split(BATCH)):
        index = batch[:10].chunk(2)[rank] if step < 2 else batch[10 + 40 * rank :][: 40 if rank == 0 else 10]
        fsr.loss(model(x[index]), y[index], index).backward()
        known.append(int(fsr.scores.isfinite().sum()))
    return {"known": known, "parameters": parameters_to_vector(core.parameters()).detach()}


def test_batches_that_grow() -> None:
    first, second = run(2, growing_batches)
    assert first["known"] == second["known"] == [10, 20, 70, 120, 170, 220]
