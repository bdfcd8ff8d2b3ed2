"""Data sets whose samples carry their index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from . import distributed
from .checks import warn

_SPARSE, _FEW = 10, 10_000  # numbers to a sample, from which on they are no count; of as many samples at least
LABELS = ("label", "labels", "target", "targets", "y")  # what columns of class numbers are called


def with_index(dataset: Any, column: str = "index") -> Any:
    """The data set with each sample's index added, as `FSRWrapper.loss` needs it.

    - A Hugging Face `Dataset` gets a column: it survives `select`, `shuffle`, `filter`, `map` and formats, and a
      transform that is set already passes it on. A transform set later must return it too: `"index": batch["index"]`.
      Call it after `concatenate_datasets` and `interleave_datasets`, and before `split_dataset_by_node`.
    - A Hugging Face `IterableDataset` gets the same key, counted in the order of the stream. Call it before `shuffle`.
      A stream of several shards must have an integer column of that name, which is taken as it is.
    - A torch map-style data set of tuples gets one more element, `(x, y)` → `(x, y, index)`; dicts get a key.
      Everything else of the data set is reached as before; what is set, `dataset.transform` say, is set on it.
      Call it after `ConcatDataset`.
    - A torch `IterableDataset` counts in its own order; of S loader workers in all processes, the s-th counts s, s + S,
      s + 2S, … Integers that are there already under the key are taken as they are. The order must be the same in
      every epoch, or the scores mean nothing: a stream that deals chunks or shards out to the workers needs the same
      number of workers and processes throughout, also in a run that is resumed.

    The default collate function turns the indices into an int64 tensor.

    **Arguments:**

    - `dataset`: as above. `column`: the name of the column or key.

    **Raises:** `ValueError` if the column exists already with anything but distinct whole numbers, or if a Hugging Face
    stream has several shards, whose samples have no index of their own; `TypeError` for anything else. Where only the
    samples tell, the first of them raises.
    """
    if isinstance(dataset, (IndexedDataset, IndexedIterableDataset)) and dataset.column == column:
        return dataset
    if is_hugging_face(dataset, "Dataset"):
        return _with_column(dataset, column)
    if is_hugging_face(dataset, "IterableDataset"):
        return _with_count(dataset, column)
    if isinstance(dataset, IterableDataset):
        sized, stateful = hasattr(dataset, "__len__"), hasattr(dataset, "load_state_dict")
        kinds = {(0, 0): IndexedIterableDataset, (1, 0): _Sized, (0, 1): _Stateful, (1, 1): _SizedStateful}
        return kinds[sized, stateful](dataset, column)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, dict):
        return IndexedDataset(dataset, column)
    raise no_data_set(dataset, "DataLoader(with_index(dataset), ...)")


def no_data_set(found: Any, line: str) -> TypeError:
    return TypeError(
        f"{type(found).__name__} is no data set: give a torch or Hugging Face data set, not a loader or an iterator: "
        f"{line}."
    )


def check_map_style(dataset: Any, line: str) -> None:
    """**Raises:** `TypeError` if its samples cannot be looked up by position, with the `line` to write."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, (str, dict)):
        raise no_data_set(dataset, line)


def is_hugging_face(dataset: Any, name: str) -> bool:
    return any(base.__module__.split(".")[0] == "datasets" and base.__name__ == name for base in type(dataset).__mro__)


def is_stream(dataset: Any) -> bool:
    """Whether its samples come in their own order only."""
    return isinstance(dataset, IterableDataset) or is_hugging_face(dataset, "IterableDataset")


def _with_column(dataset: Any, column: str) -> Any:
    if column in dataset.column_names:
        values = dataset.with_format("numpy")[column][:]
        whole = values.dtype.kind in "iu" and values.ndim == 1 and values.min(initial=0) >= 0
        if whole and len(set(values.tolist())) == len(values):
            return dataset
        raise ValueError(
            f"The data set has a column {column!r} already, and it does not number the samples: pass another name, "
            f'with_index(dataset, column="fsr_index").'
        )
    import numpy

    form = dataset.format
    kwargs, columns = form["format_kwargs"], None
    if form["type"] == "custom":
        kwargs = {**kwargs, "transform": _KeepColumn(kwargs["transform"], column)}
    if set(form["columns"]) != set(dataset.column_names):
        columns = [*form["columns"], column]
    indexed = dataset.with_format(None).add_column(column, numpy.arange(len(dataset)))
    return indexed.with_format(form["type"], columns, form["output_all_columns"], **kwargs)


def class_names(dataset: Any) -> list[str] | None:
    """The names of the classes, where the data set has them: as a Hugging Face `ClassLabel`, or torchvision's
    `classes`."""
    found = [_own_names(leaf) for leaf in _leaves(dataset)]
    return found[0] if found and all(names == found[0] for names in found) else None


def first_difference(found: list[str], expected: list[str]) -> str:
    """Where lists of names begin to differ."""
    pairs = zip(found, expected, strict=False)
    one, other = next((pair for pair in pairs if pair[0] != pair[1]), (len(found), len(expected)))
    return f"{one!r} in place of {other!r}"


def _own_names(dataset: Any) -> list[str] | None:
    if is_hugging_face(dataset, "Dataset") or is_hugging_face(dataset, "IterableDataset"):
        features = {key: feature for key, feature in (dataset.features or {}).items() if hasattr(feature, "int2str")}
        usual = [key for key in LABELS if key in features]
        key = usual[0] if usual else next(iter(features)) if len(features) == 1 else None
        names = None if key is None else features[key].names
    else:
        names = getattr(dataset, "classes", None)
        if names is None and isinstance(dataset, _Indexed):
            return class_names(dataset.dataset)
    good = isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)
    return list(names) if good and names is not None else None


class _KeepColumn:
    """A transform of batches that passes the index by."""

    def __init__(self, transform: Callable[[dict[str, Any]], dict[str, Any]], column: str):
        self.transform, self.column = transform, column

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: values for name, values in batch.items() if name != self.column}
        return {**self.transform(rest), self.column: batch[self.column]}


def _with_count(dataset: Any, column: str) -> Any:
    if column in (dataset.column_names or ()):
        if getattr(dataset.features[column], "dtype", "")[:3] in ("int", "uin"):
            return dataset
        raise ValueError(_not_a_number(column, dataset.features[column]))
    split = getattr(dataset, "_distributed", None) is not None
    add = _AddCount(column, dataset.num_shards, split)
    if dataset.column_names is not None:
        add.check()
    return dataset.map(add, with_indices=True)


class _AddCount:
    """Numbers the samples of a stream that has no numbers yet; of which columns it has, the samples may tell first."""

    def __init__(self, column: str, shards: int, split: bool):
        self.column, self.shards, self.split = column, shards, split

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        if self.column not in example:
            self.check()
        return _add_to_stream(example, index, self.column)

    def check(self) -> None:
        """**Raises:** `ValueError` if counts would collide."""
        if self.split:
            raise ValueError(
                "The stream is split between processes, and each would count from 0: call with_index before, "
                "split_dataset_by_node(with_index(stream), rank, world_size)."
            )
        if self.shards > 1:
            raise ValueError(
                f"The stream has {self.shards} shards, and each would count from 0. Give its samples a column "
                f"{self.column!r} of distinct whole numbers, which is then taken as it is (of a data set in memory: "
                "with_index(dataset).to_iterable_dataset(num_shards)), or read it as one shard."
            )


def _not_a_number(column: str, found: object) -> str:
    return (
        f"The samples have {column!r} already, which is {found!r} and does not number them: pass another name, "
        f'with_index(dataset, column="fsr_index").'
    )


def _add_to_stream(sample: Any, index: int, column: str) -> Any:
    """As `_add`; a whole number that a dict has already is its index."""
    if not isinstance(sample, Mapping) or column not in sample:
        return _add(sample, index, column)
    if not _is_whole(sample[column]):
        raise ValueError(_not_a_number(column, sample[column]))
    return sample


def _is_whole(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _add(sample: Any, index: int, column: str) -> Any:
    if sample is None:  # a sample that could not be read, which the collate function leaves out
        return None
    if isinstance(sample, Mapping):
        if column not in sample:
            return {**sample, column: index}
        if _is_whole(sample[column]) and int(sample[column]) == index:
            return sample
        raise ValueError(
            f"Sample {index} has {sample[column]!r} under {column!r} already, which with_index would overwrite: pass "
            f'another name, with_index(dataset, column="fsr_index"), or leave with_index away if these are distinct '
            "whole numbers."
        )
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return (*sample, index)
    if isinstance(sample, (tuple, list)):
        return type(sample)([*sample, index])
    return sample, index


class _Indexed:
    """What both kinds share: everything but the samples is the data set's own, to read, to set and to delete."""

    def __init__(self, dataset: Any, column: str = "index"):
        self.dataset: Any = dataset
        self.column: str = column

    def __getattr__(self, name: str) -> Any:
        if _is_own(name):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_own(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.dataset, name, value)

    def __delattr__(self, name: str) -> None:
        if _is_own(name):
            object.__delattr__(self, name)
        else:
            delattr(self.dataset, name)

    def __repr__(self) -> str:
        return f"with_index({self.dataset!r})"


def _is_own(name: str) -> bool:
    return name in ("dataset", "column") or name.startswith("__")


class IndexedDataset(_Indexed, Dataset[Any]):
    """A map-style data set whose samples carry their index; made by `with_index`."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        position = int(index)
        if position < 0:
            position += len(self)
        return _add(self.dataset[index], position, self.column)


class IndexedIterableDataset(_Indexed, IterableDataset[Any]):
    """An iterable data set whose samples carry their number; made by `with_index`."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": self._rank_and_world()}

    def _rank_and_world(self) -> tuple[int, int]:
        """Of the process whose loader this is: where its workers are started anew, they were told in a pickle."""
        told: tuple[int, int] = self.__dict__.get("_process", (0, 1))
        world = distributed.world_size()
        return told if world == 1 else (distributed.rank(), world)

    def __iter__(self) -> Iterator[Any]:
        worker, (rank, world) = get_worker_info(), self._rank_and_world()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for count, sample in enumerate(self.dataset, self.__dict__.pop("_start", 0)):
            self.__dict__["_came"] = count + 1
            yield _add_to_stream(sample, rank * workers + number + count * world * workers, self.column)
        self.__dict__["_came"] = 0


class _Sized(IndexedIterableDataset):
    def __len__(self) -> int:
        return len(self.dataset)


class _Stateful(IndexedIterableDataset):
    """Of a stream that can go on where it was, as stateful loaders ask."""

    def state_dict(self) -> dict[str, Any]:
        """The stream's own, and how many samples came."""
        return {"dataset": self.dataset.state_dict(), "came": self.__dict__.get("_came", 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there."""
        self.dataset.load_state_dict(state["dataset"])
        self.__dict__["_start"] = state["came"]


class _SizedStateful(_Sized, _Stateful):
    pass


def sample_counts(dataset: Any, column: str = "index") -> tuple[int | None, int | None]:
    """How many rows the tables need (the largest index + 1), and how many samples an epoch has; None if unknown.

    **Arguments:** `column`, where a Hugging Face data set has its indices.

    **Raises:** `ValueError` if several samples have one index, as far as that can be known; `TypeError` for what is no
    data set.
    """
    is_map_style = hasattr(dataset, "__getitem__") and not isinstance(dataset, (str, Mapping))
    if not (is_map_style or isinstance(dataset, IterableDataset)) or isinstance(dataset, DataLoader):
        line = "num_samples=..." if _is_whole(dataset) else "dataset=loader.dataset"
        raise no_data_set(dataset, f"FSRWrapper(model, optimizer, {line})")
    leaves = _leaves(dataset)
    indexed = [leaf for leaf in leaves if isinstance(leaf, _Indexed)]
    if indexed and any(leaf is not indexed[0] for leaf in leaves):
        raise ValueError(
            f"A {type(dataset).__name__} of several indexed data sets repeats indices: call with_index on the "
            "ConcatDataset, or ChainDataset, of the data sets without index."
        )
    try:
        length = len(dataset)
    except TypeError:
        return None, None
    if indexed and isinstance(indexed[0], IndexedIterableDataset):
        return None, length  # the numbers leave gaps where the workers' shares differ
    return max(length, *(_rows(leaf, column) for leaf in leaves)), length


def _leaves(dataset: Any) -> list[Any]:
    """The data sets that it is a part or a chain of, down to those that give the indices."""
    if isinstance(dataset, (ConcatDataset, ChainDataset)):
        return [leaf for part in dataset.datasets for leaf in _leaves(part)]
    return _leaves(dataset.dataset) if isinstance(dataset, Subset) else [dataset]


def _rows(dataset: Any, column: str) -> int:
    rows = len(dataset)
    if not is_hugging_face(dataset, "Dataset") or column not in dataset.column_names:
        return rows
    import pyarrow.compute

    held = dataset.data.column(column)  # also of the rows that are not selected
    if not pyarrow.types.is_integer(held.type):
        return rows
    _check_repeats(dataset, column)
    needed = max(rows, 1 + (pyarrow.compute.max(held).as_py() or 0))
    if needed > _SPARSE * max(len(held), _FEW):
        warn(
            f"The column {column!r} goes up to {needed - 1:,} for {len(held):,} samples, and FSR keeps a row for each "
            'number: pass with_index(dataset, column="fsr_index"), which counts from 0, and column="fsr_index".',
        )
    return needed


def _check_repeats(dataset: Any, column: str) -> None:
    """Rows may be repeated on purpose, but then they are equal. **Raises:** `ValueError` if they are not."""
    import numpy

    values = dataset.with_format("numpy")[column][:]
    numbers, first, inverse = numpy.unique(values, return_index=True, return_inverse=True)
    if len(numbers) == len(values):
        return
    for name, feature in dataset.features.items():
        if name == column or getattr(feature, "dtype", "") not in ("int64", "int32", "bool", "string"):
            continue
        others = dataset.with_format("numpy")[name][:]
        differ = int((others != others[first][inverse]).sum())
        if differ:
            raise ValueError(
                f"{len(values)} samples have {len(numbers)} different numbers in the column {column!r}, and {differ} "
                f"of them have another {name!r} than the first of their number: call with_index after "
                "concatenate_datasets or interleave_datasets, not before; or name another column, column=...."
            )
