"""Looks at a state before it is taken over, so that what no run of this kind has left is refused whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .collisions import label_dtype
from .config import FSRConfig, is_int
from .relabel import get_storage

State = dict[str, Any]
COUNTERS = {"epoch": 0, "consumed": 0, "draws": 0, "largest": -1, "steps": 0, "gradient_age": 0, "planned": 0}
_Told = (bool, int, float, type(None))


class Unfit(ValueError):
    """A state of another run than this one."""


def check_fit(state: State, config: FSRConfig, num_samples: int | None, version: int) -> None:
    """**Raises:** `Unfit` if the state belongs to a newer format than `version`, another data set or a configuration
    that stores something else."""
    if state["version"] > version:
        raise Unfit(
            f"The checkpoint has FSR's state in format {state['version']}; this fsr_wrap reads up to {version}. Update "
            "fsr_wrap."
        )
    if num_samples is not None and state["num_samples"] not in (None, num_samples):
        raise Unfit(f"The checkpoint is of a data set of {state['num_samples']} samples, this one has {num_samples}.")
    if num_samples is not None and state["largest"] >= num_samples:
        raise Unfit(f"The checkpoint has samples of up to index {state['largest']}, this data set has {num_samples}.")
    if config.selects != (state["config"]["weight_rule"] == "select"):
        saved = state["config"]["weight_rule"]
        raise Unfit(
            f"The checkpoint was made with weight_rule={saved!r}, this run has {config.weight_rule!r}, which keeps "
            f"something else of each sample: pass {saved!r}, and the other settings of that run."
        )
    must_agree = ["dictionary_size", "reward"]
    if (config.selects or config.relabel_weight) and "pseudo" in state:
        must_agree.append("relabel_storage")
    for name in must_agree:
        saved, live = state["config"][name], getattr(config, name)
        if saved != live:
            raise Unfit(f"The checkpoint was made with {name}={saved!r}, this run has {live!r}: pass {saved!r}.")
    if config.get_pusher().needs_learned and "learned" not in state.get("table", {"learned": None}):
        saved = state["config"]["pusher"]
        raise Unfit(
            f"The checkpoint was made with pusher={saved!r}, this run has {config.pusher_name!r}, which needs to know "
            f"what earlier visits of each sample found: pass {saved!r}."
        )


def cropped(state: State, rows: int) -> State:
    """The state with as many rows at most of each table. One of a run that did not know N has more."""
    tables = [name for name in ("table", "given", "visits", "pseudo", "selection") if name in state]
    if not tables or len(state["table"]["score"]) <= rows:
        return state

    def crop(table: State) -> State:
        of_classes = "share", "drawn", "frequency"
        of_samples = {name for name, value in table.items() if isinstance(value, Tensor)}.difference(of_classes)
        return {name: value[:rows] if name in of_samples else value for name, value in table.items()}

    return {**state, **{name: crop(state[name]) for name in tables}}


def check_state(state: State, *, metrics: int, sums: int, planned: int) -> None:
    """Structure, dtypes, shapes, ranges and finiteness of what `Memory.state_dict` gives.

    **Arguments:** `metrics`, how many sums there are; `sums`, how many the history has; `planned`, how many reward
    batches a plan has.

    **Raises:** `ValueError` naming the first entry that cannot be.
    """
    for name, least in COUNTERS.items():
        _need(is_int(state[name]) and state[name] >= least, name, state[name])
    _need(state["planned"] <= planned, "planned", state["planned"])
    samples = state["num_samples"]
    _need(samples is None or (is_int(samples) and samples > state["largest"]), "num_samples", samples)
    processes = state.get("world_size", 1)
    _need(is_int(processes) and processes >= 1, "world_size", processes)
    names = state.get("class_names", [])
    _need(isinstance(names, list) and all(isinstance(name, str) for name in names), "class_names", names)
    if "table" not in state:
        return
    rows, classes = len(state["table"]["score"]), state["dictionary"]["num_classes"]
    _need(rows > state["largest"] and samples in (None, rows), "table", f"{rows} rows")
    _check_table(state, rows)
    selects = state["config"]["weight_rule"] == "select"
    _check_dictionary(state["dictionary"], rows, bare=selects)
    if selects or "given" in state:
        label = _tensor(state["given"], "label", label_dtype(classes), (rows,))
        _need(_within(label, -1, classes), "given/label", "a class that is not there")
        if "drawn" in state["given"]:  # not in checkpoints of earlier versions
            drawn = _tensor(state["given"], "drawn", torch.int64, (classes,))
            often = _tensor(state["given"], "frequency", torch.float64, (classes,))
            good = bool((drawn >= 0).all()) and bool((often.isfinite() & (often >= 0)).all())
            _need(good, "given/drawn", "no numbers of samples")
    if "visits" in state:
        seen, unused = (_tensor(state["visits"], name, torch.int16, (rows,)) for name in ("seen", "unused"))
        _need(bool(((unused >= 0) & (unused <= seen)).all()), "visits", "more without a label than there were")
    if selects or "pseudo" in state:
        _check_pseudo(state["pseudo"], rows, classes, state["config"]["relabel_storage"])
    if selects:
        _check_selection(state["selection"], rows, classes)
    if "log_prior" in state:
        prior = _tensor(state, "log_prior", torch.float32, (classes,))
        _need(bool(prior.isfinite().all()), "log_prior", "NaN or infinity")
    if "margin" in state:
        margin = _tensor(state, "margin", torch.float32, (classes,))
        _need(bool((margin.isfinite() & (margin >= 0)).all()), "margin", "no margins")
    if "plan" in state:
        _check_plan(state["plan"], state["dictionary"], planned)
    _check_metrics(state, metrics)
    if "history" in state:
        _check_history(state["history"], sums)


def _check_selection(state: State, rows: int, classes: int) -> None:
    for name in ("active", "estimated"):
        _need(isinstance(state[name], bool), f"selection/{name}", state[name])
    _need(_is_share(state["pull"]), "selection/pull", state["pull"])
    # The next seven are not in checkpoints of earlier versions.
    predicted, peak = state.get("predicted", []), state.get("peak", 0.0)
    _need(len(predicted) <= 2 and all(map(_is_share, predicted)), "selection/predicted", predicted)
    _need(_is_share(peak), "selection/peak", peak)
    _need(_is_share(state.get("down", 0.0)), "selection/down", state.get("down"))
    rate = state.get("highest_rate", 0.0)
    _need(isinstance(rate, float) and math.isfinite(rate) and rate >= 0, "selection/highest_rate", rate)
    for name in ("early", "drifts", "begun"):
        _need(isinstance(state.get(name, False), bool), f"selection/{name}", state[name])
    _need(is_int(state["apart"]) and state["apart"] >= 0, "selection/apart", state["apart"])
    agreement = state["agreement"]
    good = len(agreement) <= 2 and all(len(pair) == 2 and all(map(_is_share, pair)) for pair in agreement)
    _need(good, "selection/agreement", agreement)
    if "first" in state or "growth" in state or "readings" in state:  # not in checkpoints of earlier versions
        growth = state["growth"]
        good = len(growth) <= 2 and all(isinstance(one, float) and math.isfinite(one) for one in growth)
        _need(good, "selection/growth", growth)
        readings = state["readings"]
        numbers = [one for pair in readings for one in pair]
        good = all(len(pair) == 2 for pair in readings) and all(isinstance(one, float) for one in numbers)
        _need(good and all(map(math.isfinite, numbers)), "selection/readings", readings)
        first = _tensor(state, "first", torch.float32, (rows,))
        _need(not bool((first > 0).any() | first.isinf().any()), "selection/first", "no logarithms of probabilities")
    for name, length in (("share", classes), ("weight", rows)):
        if name != "weight" or name in state:  # not in checkpoints of earlier versions
            values = _tensor(state, name, torch.float32, (length,))
            _need(bool(((values >= 0) & (values <= 1)).all()), f"selection/{name}", "values outside [0, 1]")
    _need(_within(_tensor(state, "code", torch.uint8, (rows,)), 0, 3), "selection/code", "no such code")


def _check_table(state: State, rows: int) -> None:
    table = state["table"]
    score = _tensor(table, "score", torch.float32, (rows,))
    _need(not score.isinf().any(), "table/score", "infinity")
    _need(_within(_tensor(table, "epoch", torch.int16, (rows,)), -1, 2**15), "table/epoch", "an epoch below -1")
    if "learned" in table:
        _need(_within(_tensor(table, "learned", torch.uint8, (rows,)), 0, 3), "table/learned", "no such code")


def _check_dictionary(state: State, samples: int, *, bare: bool) -> None:
    """`bare`: whether it keeps no payloads."""
    classes, size, length = state["num_classes"], state["size"], state["length"]
    for name, least in (("num_classes", 2), ("size", 1), ("length", 1), ("turn", 0)):
        _need(is_int(state[name]) and state[name] >= least, name, state[name])
    quota = max(1, size // classes)
    capacity = classes * quota
    rows = 2 * capacity + length
    used = []
    for name, slots in (("members", capacity), ("best", capacity), ("buffer", len(state["buffer"]["index"]))):
        used.append(_check_entries(state[name], name, slots, samples, classes, rows))
    _need(len(state["buffer"]["index"]) <= length, "buffer", "more than it holds")
    count = _tensor(state, "count", torch.int64, (classes,))
    filled = state["members"]["index"].view(classes, quota) >= 0
    rank = torch.arange(quota, device=filled.device)
    _need(torch.equal(filled, rank < count[:, None]), "count", "another number of members than there are")
    own = state["members"]["label"].view(classes, quota) == torch.arange(classes, device=filled.device)[:, None]
    _need(bool((own | ~filled).all()), "members/label", "a member of another class")
    present = count.cpu().nonzero()[:, 0]
    order = _tensor(state, "classes", torch.int64, (len(present),)).cpu()
    _need(torch.equal(order.sort().values, present), "classes", "others than the members'")
    _need(state["turn"] < max(1, len(present)), "turn", state["turn"])
    free = _tensor(state, "free", torch.int64, (length,))
    _need(_within(free, 0, rows) and len(free.unique()) == length, "free", "a row twice, or one that is not there")
    ahead = free[len(state["buffer"]["index"]) :]  # where the next candidates go
    _need(not torch.isin(ahead, torch.cat(used)).any(), "free", "a row that is in use")
    _need(len(state["arena"]) == len(state["channels_last"]), "arena", f"{len(state['arena'])} tensors")
    _need(bool(state["arena"]) != bare or not len(torch.cat(used)), "arena", "nothing for the entries")
    for arena in state["arena"]:
        _need(isinstance(arena, Tensor) and arena.ndim >= 1 and len(arena) == rows, "arena", "another number of rows")
        if arena.is_floating_point():
            _need(bool(arena[torch.cat(used)].isfinite().all()), "arena", "NaN or infinity")


def _check_entries(state: State, name: str, slots: int, samples: int, classes: int, rows: int) -> Tensor:
    """Checks a part of the dictionary; returns the rows of the arena that it uses."""
    index, label, row = (_tensor(state, column, torch.int64, (slots,)) for column in ("index", "label", "row"))
    score = _tensor(state, "score", torch.float32, (slots,))
    _need(_within(index, -1, samples), f"{name}/index", "a sample that is not there")
    there = index >= 0
    nobodys = name == "buffer"  # the class C: of samples that are no candidates, see `Reweighting`
    _need(_within(label[there], 0, classes + nobodys), f"{name}/label", "a class that is not there")
    _need(_within(row[there], 0, rows), f"{name}/row", "a row that is not there")
    _need(bool(score[there].isfinite().all()), f"{name}/score", "NaN or infinity")
    return row[there]


def _check_pseudo(state: State, rows: int, classes: int, storage: str | int) -> None:
    for name, (width, dtype) in get_storage(storage).columns(classes).items():
        column = _tensor(state, name, dtype, (rows, width))
        if dtype.is_floating_point:
            _need(bool(column.isfinite().all()), f"pseudo/{name}", "NaN or infinity")
        if name == "classes":
            _need(_within(column, 0, classes), "pseudo/classes", "a class that is not there")


def _check_plan(plan: Tensor, dictionary: State, planned: int) -> None:
    _need(plan.dtype == torch.int64 and plan.ndim == 3 and plan.shape[:2] == (3, planned), "plan", tuple(plan.shape))
    slot, row, label = plan
    members = dictionary["members"]
    _need(_within(slot, 0, len(members["index"])) and bool((members["index"][slot] >= 0).all()), "plan", "no member")
    same = torch.equal(members["row"][slot], row) and torch.equal(members["label"][slot], label)
    _need(same, "plan", "other rows or labels than the members'")


def _check_metrics(state: State, metrics: int) -> None:
    _tensor(state, "sums", torch.float64, (metrics,))
    sizes, columns = state["sizes"], state["uncounted"]
    _need(all(is_int(size) and size >= 0 for size in sizes), "sizes", sizes)
    _need(len(columns) == (5 if sizes else 0), "uncounted", f"{len(columns)} columns")
    for number, column in enumerate(columns):  # weights and losses of the samples, and three numbers of each step
        shape = columns[0].shape if number < 2 else (len(sizes),)
        fits = column.is_floating_point() or (number > 2 and column.dtype == torch.int64)
        _need(fits and column.shape == shape and len(column) == len(sizes), "uncounted", tuple(column.shape))
    for name, value in state["gradient"].items():
        _need(isinstance(name, str) and value.is_floating_point(), "gradient", name)


def _check_history(state: State, sums: int) -> None:
    _tensor(state, "sums", torch.float64, (sums,))
    _need(is_int(state["samples"]) and state["samples"] >= 0, "history/samples", state["samples"])
    for entry in state["epochs"]:
        good = all(isinstance(name, str) and isinstance(value, _Told) for name, value in entry.items())
        _need(good and is_int(entry["epoch"]) and is_int(entry["samples"]), "history/epochs", entry)


def _tensor(state: State, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    value = state[name]
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
    if value.dtype != dtype or tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name!r} is {value.dtype} of shape {tuple(value.shape)}, not {dtype} of {tuple(shape)}")
    return value


def _within(values: Tensor, least: int, below: int) -> bool:
    return not len(values) or (int(values.min()) >= least and int(values.max()) < below)


def _need(ok: bool, name: str, found: object) -> None:
    if not ok:
        raise ValueError(f"{name!r} has {found}")


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= 1
