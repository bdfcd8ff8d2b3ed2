"""Data sets whose samples carry their index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, get_worker_info


def with_index(dataset: Any, column: str = "index") -> Any:
    """The data set with each sample's index added, as `FSRWrapper.loss` needs it.

    - A Hugging Face `Dataset` gets a column: it survives `select`, `shuffle`, `filter`, `map` and formats, and a
      transform that is set already passes it on. A transform set later must return it too: `"index": batch["index"]`.
    - A Hugging Face `IterableDataset` gets the same key, counted in the order of the stream. Call it before `shuffle`.
    - A torch map-style data set of tuples gets one more element, `(x, y)` → `(x, y, index)`; dicts get a key.
      Everything else of the data set is reached as before.
    - A torch `IterableDataset` counts in its own order; with several workers, worker w of W counts w, w + W, w + 2W, …
      The order must be the same in every epoch, or the scores mean nothing.

    The default collate function turns the indices into an int64 tensor.

    **Arguments:**

    - `dataset`: as above. `column`: the name of the column or key.

    **Raises:** `ValueError` if the column exists already with anything but distinct whole numbers, or if a Hugging Face
    stream has several shards, whose samples have no index of their own; `TypeError` for anything else.
    """
    if isinstance(dataset, (IndexedDataset, IndexedIterableDataset)) and dataset.column == column:
        return dataset
    if _is_hugging_face(dataset, "Dataset"):
        return _with_column(dataset, column)
    if _is_hugging_face(dataset, "IterableDataset"):
        return _with_count(dataset, column)
    if isinstance(dataset, IterableDataset):
        sized = hasattr(dataset, "__len__")
        return (_SizedIndexedIterableDataset if sized else IndexedIterableDataset)(dataset, column)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, dict):
        return IndexedDataset(dataset, column)
    raise TypeError(
        f"{type(dataset).__name__} is no data set: give a torch or Hugging Face data set, not a loader or an iterator."
    )


def _is_hugging_face(dataset: Any, name: str) -> bool:
    return any(base.__module__.split(".")[0] == "datasets" and base.__name__ == name for base in type(dataset).__mro__)


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


class _KeepColumn:
    """A transform of batches that passes the index by."""

    def __init__(self, transform: Callable[[dict[str, Any]], dict[str, Any]], column: str):
        self.transform, self.column = transform, column

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: values for name, values in batch.items() if name != self.column}
        return {**self.transform(rest), self.column: batch[self.column]}


def _with_count(dataset: Any, column: str) -> Any:
    shards = getattr(dataset, "num_shards", 1)
    if shards > 1:
        raise ValueError(
            f"The stream has {shards} shards, and each would count from 0. Give its samples a column of distinct whole "
            "numbers and pass that as the index, or read it as one shard."
        )
    return dataset.map(_AddCount(column), with_indices=True)


class _AddCount:
    def __init__(self, column: str):
        self.column = column

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        return {**example, self.column: index}


def _add(sample: Any, index: int, column: str) -> Any:
    if isinstance(sample, dict):
        return {**sample, column: index}
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return (*sample, index)
    if isinstance(sample, (tuple, list)):
        return type(sample)([*sample, index])
    return sample, index


class _Indexed:
    """What both kinds share: everything but the samples is the data set's own."""

    def __init__(self, dataset: Any, column: str = "index"):
        self.dataset, self.column = dataset, column

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "column") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __repr__(self) -> str:
        return f"with_index({self.dataset!r})"


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

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for count, sample in enumerate(self.dataset):
            yield _add(sample, start + count * step, self.column)


class _SizedIndexedIterableDataset(IndexedIterableDataset):
    def __len__(self) -> int:
        return len(self.dataset)


def sample_counts(dataset: Any, column: str = "index") -> tuple[int | None, int | None]:
    """How many rows the tables need (the largest index + 1), and how many samples an epoch has; None if unknown."""
    try:
        length = len(dataset)
    except TypeError:
        return None, None
    if isinstance(dataset, IndexedIterableDataset):
        return None, length  # the numbers leave gaps where the workers' shares differ
    rows = length
    base = dataset
    while isinstance(base, (Subset, IndexedDataset)):
        base = base.dataset
        rows = max(rows, len(base))  # type: ignore[arg-type]
    if isinstance(base, ConcatDataset) and any(isinstance(part, IndexedDataset) for part in base.datasets):
        raise ValueError("A ConcatDataset of indexed data sets repeats indices: call with_index on the ConcatDataset.")
    if _is_hugging_face(base, "Dataset") and column in base.column_names:
        import pyarrow.compute

        values = base.data.column(column)
        if pyarrow.types.is_integer(values.type):
            rows = max(rows, 1 + (pyarrow.compute.max(values).as_py() or 0))
    return rows, length
