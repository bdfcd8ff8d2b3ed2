"""Where a data set has the samples that were trained on, and whether it is the one that has them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from .data import LABELS, IndexedDataset, class_names, first_difference, is_hugging_face
from .memory import Memory
from .pictures import streams_kept

# Labels compared, of a data set whose samples must be read, and at least; how far they must agree, from 0 by chance to
# 1; and how many of each class tell that its classes have other numbers.
_COMPARED, _FEWEST, _AGREES, _EACH = 128, 10, 0.6, 4


def indices_of(dataset: Any, column: str, rows: int) -> Tensor:
    """The index of each sample of a data set, (n,), that is the one of `rows` samples that was trained on, or a part.

    **Raises:** `ValueError` if it cannot be.
    """
    number = _indices(dataset, column)
    if number is None:
        if len(dataset) != rows:
            raise ValueError(
                f"The data set has {len(dataset)} samples, and {rows} were trained on. Give the one that was trained "
                "on, or a part of it whose samples have their indices: a part of with_index(dataset)."
            )
        number = torch.arange(rows)
    if len(number) and not 0 <= int(number.min()) <= int(number.max()) < rows:
        raise ValueError(
            f"The data set's indices go from {int(number.min())} to {int(number.max())}, and {rows} samples were "
            "trained on: give the data set that was trained on."
        )
    return number


def _indices(dataset: Any, column: str) -> Tensor | None:
    """The index of each of its samples, (n,), None if they have none."""
    if is_hugging_face(dataset, "Dataset"):
        return column_of(dataset, column) if column in dataset.column_names else None
    if isinstance(dataset, IndexedDataset):
        return torch.arange(len(dataset))
    if isinstance(dataset, Subset):
        inside = _indices(dataset.dataset, column)
        return None if inside is None else inside[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_indices(part, column) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    return None


def check_labels(memory: Memory, dataset: Any, number: Tensor, flagged: Tensor) -> None:
    """Looks whether it is the data set that was trained on, in its order: by the names of its classes and by its
    labels, where they are found.

    Labels that do not look wrong are compared with the given ones; of a torch data set some samples are read. Others
    may have been trained on than the data set has: but labels of another order agree no more than by chance.

    **Arguments:** `number` (n,), as `indices_of` gives it; `flagged` (N,) bool.

    **Raises:** `ValueError` if they do.
    """
    names, own = class_names(dataset), memory.class_names
    if names is not None and own is not None and names != own:
        raise ValueError(
            "It is not the data set that was trained on: its classes have other names, "
            f"{first_difference(names, own)} first."
        )
    given = memory.given.known()[: len(flagged)].cpu().long()[number]
    where = ((given >= 0) & ~flagged[number]).nonzero()[:, 0]
    found: dict[Any, Any]
    if is_hugging_face(dataset, "Dataset"):
        whole = [name for name, feature in dataset.features.items() if is_whole(feature)]
        texts = [
            name for name in LABELS if getattr(dataset.features.get(name), "dtype", "") in ("string", "large_string")
        ]
        found = {name: column_of(dataset, name)[where] for name in whole}
        plain = dataset.with_format(None)
        found |= {name: plain.select_columns([name])[where.tolist()][name] for name in texts}
    else:
        where = where[torch.linspace(0, len(where) - 1, min(len(where), _COMPARED)).long()]
        with streams_kept():
            samples = (dataset[position] for position in where.tolist())
            read = [numbers_in(sample) | _texts_in(sample) for sample in samples]
        found = {place: [parts[place] for parts in read] for place in set.intersection(*map(set, read))} if read else {}
    given, classes = given[where], memory.num_classes or 0
    labels = {place: _as_labels(values, given, classes, own) for place, values in found.items()}
    told = {place: numbers for place, numbers in labels.items() if (numbers != numbers[:1]).any()}
    usual = [place for place in (*LABELS, 1) if place in told]
    if len(where) >= _FEWEST and usual and not any(_agree(numbers, given, classes) for numbers in told.values()):
        first = int((told[usual[0]] != given).byte().argmax())
        raise ValueError(
            "It is not the data set that was trained on, or not in its order: its labels agree with those that were "
            f"trained on no more than by chance. Sample {int(where[first])} has {found[usual[0]][first]}, and "
            f"{int(given[first])} was trained on. Give the data set that was trained on."
        )


def _texts_in(sample: Any) -> dict[Any, str]:
    """What may be the name of a sample's class."""
    if isinstance(sample, Mapping):
        return {key: sample[key] for key in LABELS if isinstance(sample.get(key), str)}
    is_pair = isinstance(sample, (tuple, list)) and len(sample) > 1
    return {1: sample[1]} if is_pair and isinstance(sample[1], str) else {}


def _as_labels(values: Any, given: Tensor, classes: int, names: list[str] | None) -> Tensor:
    """Values as numbers of classes: texts by the `names` of the classes, or from C on if there are as many as classes.

    All 0 if they tell nothing: texts that are others, or too many.
    """
    if isinstance(values, Tensor) or not any(value is None or isinstance(value, str) for value in values):
        return torch.as_tensor(values)
    nothing = torch.zeros(len(values), dtype=torch.int64)
    if not all(isinstance(value, str) for value in values):
        return nothing
    if names is not None and set(values) <= set(names):
        number = {name: label for label, name in enumerate(names)}
    else:
        different = sorted(set(values))
        if not len(different) == len(given.unique()) <= len(values) // _EACH:
            return nothing
        number = {name: classes + place for place, name in enumerate(different)}
    return torch.tensor([number[value] for value in values])


def _agree(found: Tensor, given: Tensor, classes: int) -> bool:
    """Whether labels agree with the given ones by more than chance.

    If they are no numbers of classes, classes may have got theirs in training: counted from another one on, one by one,
    or several in one.
    """
    made = [found]
    if int(found.max()) >= classes:
        values, place = found.unique(return_inverse=True)
        made = [found + (given - found).mode().values]
        pair, count = (place * classes + given).unique(return_counts=True)
        most = torch.zeros_like(values).scatter_reduce(0, pair // classes, count * classes + pair % classes, "amax")
        likeliest = most % classes
        each = _EACH if len(likeliest.unique()) == len(values) else 2 * _EACH
        if len(values) <= len(given) // each:  # ids have as many as there are samples
            made.append(likeliest[place])
    return any(_kappa(labels, given) >= _AGREES for labels in made)


def _kappa(one: Tensor, other: Tensor) -> float:
    """Agreement beyond chance (Cohen, 1960): 1 where all are the same, about 0 where none is but by chance."""
    _, both = torch.cat([one, other]).unique(return_inverse=True)
    first, second = (torch.bincount(part, minlength=int(both.max()) + 1) / len(one) for part in both.chunk(2))
    chance, agree = float(first @ second), float((one == other).float().mean())
    return (agree - chance) / (1 - chance) if chance < 1 else agree


def is_whole(feature: Any) -> bool:
    """Whether a column of a Hugging Face data set has whole numbers."""
    return getattr(feature, "dtype", "").startswith(("int", "uint"))


def column_of(dataset: Any, name: str) -> Tensor:
    """The whole numbers of a column of a Hugging Face data set, (n,) int64."""
    return torch.as_tensor(dataset.with_format("numpy")[name][:].astype("int64"))


def numbers_in(sample: Any) -> dict[Any, int]:
    """The whole numbers of a sample, by key, or by place from the second on."""
    if isinstance(sample, Mapping):
        parts: list[tuple[Any, Any]] = [(key, sample[key]) for key in (*LABELS, *sample) if key in sample]
    else:
        parts = list(enumerate(sample))[1:] if isinstance(sample, (tuple, list)) else []
    found = {place: _number(value) for place, value in parts}
    return {place: number for place, number in found.items() if number is not None}


def _number(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return None if value.numel() != 1 or value.is_floating_point() or value.is_complex() else int(value)
    try:
        return operator.index(value)
    except TypeError:
        return None
