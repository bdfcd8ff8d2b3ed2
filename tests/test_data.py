import copy
import pickle
from collections import namedtuple
from typing import Protocol, runtime_checkable

import datasets
import pytest
import torch
from helpers import assert_close, worker_warnings
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from fsr_wrap import with_index
from fsr_wrap.data import IndexedDataset, sample_counts

N = 10
Pair = namedtuple("Pair", ["x", "y"])


class Samples(Dataset):
    """x = 10·i, y = i % 3, in whatever form; one extra attribute."""

    classes = ("a", "b", "c")

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, i):
        if not -N <= i < N:
            raise IndexError(i)
        return self.form(10 * (i % N), i % N % 3)


class Stream(IterableDataset):
    """x = 10·i, shared out among the workers in turn; the tail is uneven."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(start, N + 1, step):
            yield 10 * i, i % 3


class SizedStream(Stream):
    def __len__(self):
        return N + 1


def hugging_face(**columns):
    return datasets.Dataset.from_dict({"x": [10 * i for i in range(N)], "y": [i % 3 for i in range(N)], **columns})


# --- torch map-style -------------------------------------------------------------------------------------------------


def test_tensor_dataset():
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    sample = with_index(TensorDataset(x, y))[4]
    assert isinstance(sample, tuple)
    assert_close(sample, (x[4], y[4], 4))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (lambda x, y: (x, y), (40, 1, 4)),
        (lambda x, y: [x, y], [40, 1, 4]),
        (Pair, (40, 1, 4)),
        (lambda x, y: {"x": x, "y": y}, {"x": 40, "y": 1, "index": 4}),
        (lambda x, y: x, (40, 4)),
    ],
)
def test_forms_of_samples(form, expected):
    dataset = with_index(Samples(form))
    assert dataset[4] == expected
    assert type(dataset[4]) is type(expected)
    assert dataset[4 - N] == expected
    assert dataset[torch.tensor(4)] == expected
    assert len(dataset) == N
    assert dataset.classes == ("a", "b", "c")
    assert not hasattr(dataset, "nothing")


def test_another_key():
    assert with_index(Samples(lambda x, y: {"x": x}), column="number")[2] == {"x": 20, "number": 2}


def test_samples_are_not_written_to():
    rows = [{"x": 1}, {"x": 2}]
    assert with_index(rows)[1] == {"x": 2, "index": 1}
    assert rows == [{"x": 1}, {"x": 2}]


def test_subsets_keep_the_index_of_the_whole():
    dataset = with_index(Samples(Pair))
    assert [sample[2] for sample in Subset(dataset, [7, 2])] == [7, 2]
    parts = random_split(dataset, [4, 6])
    assert sorted(sample[2] for part in parts for sample in part) == list(range(N))


@worker_warnings
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_int64(workers):
    loader = DataLoader(with_index(Samples(lambda x, y: (x, y))), batch_size=4, shuffle=True, num_workers=workers)
    batches = list(loader)
    index = torch.cat([batch[2] for batch in batches])
    assert index.dtype == torch.int64
    assert sorted(index.tolist()) == list(range(N))
    assert_close(torch.cat([batch[0] for batch in batches]), 10 * index)


def test_a_loader_of_dicts_gives_int64():
    (batch,) = DataLoader(with_index(Samples(lambda x, y: {"x": x})), batch_size=N)
    assert_close(batch["index"], torch.arange(N))
    assert batch["index"].dtype == torch.int64


def test_twice_is_once():
    dataset = with_index(Samples(Pair))
    assert with_index(dataset) is dataset
    stream = with_index(Stream())
    assert with_index(stream) is stream
    rows = with_index(hugging_face())
    assert with_index(rows) is rows
    assert list(with_index(with_index(hugging_face().to_iterable_dataset()))) == list(rows)
    assert with_index(with_index(Samples(lambda x, y: {}), "a"), "b")[3] == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DataLoader(Samples(Pair)),
        lambda: iter([1, 2]),
        lambda: 3,
        lambda: {"train": Samples(Pair)},
        lambda: datasets.DatasetDict(train=hugging_face()),
    ],
)
def test_what_is_no_data_set_is_refused(wrong):
    with pytest.raises(TypeError, match="is no data set: give a torch or Hugging Face data set"):
        with_index(wrong())


# --- torch streams ---------------------------------------------------------------------------------------------------


@worker_warnings
@pytest.mark.parametrize("stream", [Stream, SizedStream])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams(stream, workers):
    dataset = with_index(stream())
    loader = DataLoader(dataset, batch_size=2, num_workers=workers)
    epochs = [{x.item(): i.item() for batch in loader for x, _, i in zip(*batch, strict=True)} for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert epochs[0].keys() == {10 * i for i in range(N + 1)}
    assert sorted(epochs[0].values()) == list(range(N + 1))
    assert isinstance(dataset, IterableDataset)


class Resumable(Stream):
    """Goes on where it was, as stateful loaders ask."""

    at = 0

    def __iter__(self):
        while self.at < N:
            self.at += 1
            yield torch.tensor(10 * (self.at - 1)), 0
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@runtime_checkable
class Resumes(Protocol):
    """What stateful loaders ask for; from Python 3.12 on in the class alone."""

    def state_dict(self): ...

    def load_state_dict(self, state): ...


@pytest.mark.parametrize("came", [0, 3, N])
def test_a_stream_that_goes_on_keeps_its_numbers(came):
    stream = with_index(Resumable())
    samples = iter(stream)
    for _ in range(came):
        next(samples)
    if came == N:
        assert next(samples, None) is None
    other = with_index(Resumable())
    assert isinstance(other, Resumes)
    assert not isinstance(with_index(Stream()), Resumes)
    other.load_state_dict(stream.state_dict())
    for first in (came % N, 0):
        assert [(x.item(), i) for x, _, i in other] == [(10 * i, i) for i in range(first, N)]


def test_samples_that_are_none_stay_none():
    """Collate functions leave out what could not be read."""
    dataset = with_index([(1, 2), None, (3, 4)])
    assert [dataset[i] for i in range(3)] == [(1, 2, 0), None, (3, 4, 2)]


def test_only_a_stream_of_a_length_has_one():
    assert len(with_index(SizedStream())) == N + 1
    assert len(DataLoader(with_index(SizedStream()), batch_size=2)) == 6
    with pytest.raises(TypeError):
        len(with_index(Stream()))
    assert not hasattr(with_index(Stream()), "__len__")


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def test_the_column_survives_what_is_done_to_the_rows():
    dataset = with_index(hugging_face())
    assert dataset[3] == {"x": 30, "y": 0, "index": 3}
    for rows in (
        dataset.select([7, 2]),
        dataset.shuffle(seed=0),
        dataset.filter(lambda row: row["y"] == 1),
        dataset.map(lambda row: {"z": row["x"] + 1}),
        dataset.train_test_split(0.5, seed=0)["test"],
    ):
        assert [row["index"] for row in rows] == [row["x"] // 10 for row in rows]


@pytest.mark.parametrize("workers", [0, 2])
@worker_warnings
def test_hugging_face_loader_gives_int64(workers):
    loader = DataLoader(with_index(hugging_face()).with_format("torch"), batch_size=4, num_workers=workers)
    index = torch.cat([batch["index"] for batch in loader])
    assert index.dtype == torch.int64
    assert_close(index, torch.arange(N))


@pytest.mark.parametrize("before", [True, False])
def test_torch_format(before):
    dataset = hugging_face()
    dataset = with_index(dataset.with_format("torch")) if before else with_index(dataset).with_format("torch")
    assert_close(dataset[3], {"x": torch.tensor(30), "y": torch.tensor(0), "index": torch.tensor(3)})
    assert dataset.map(lambda row: {"z": row["x"]})[3].keys() == {"x", "y", "index", "z"}


@pytest.mark.parametrize("others", [False, True])
def test_a_format_of_some_columns_stays_one(others):
    dataset = with_index(hugging_face().with_format("torch", columns=["x"], output_all_columns=others))
    assert_close(dataset[3], {"x": torch.tensor(30), "index": torch.tensor(3), **({"y": 0} if others else {})})
    assert with_index(hugging_face().with_format(None, columns=["x"]))[3] == {"x": 30, "index": 3}


def test_a_transform_set_before_passes_the_index_by():
    seen = []

    def transform(batch):
        seen.append(sorted(batch))
        return {"z": [v + 1 for v in batch["x"]]}

    dataset = with_index(hugging_face().with_transform(transform))
    assert dataset[3] == {"z": 31, "index": 3}
    assert dataset.select([5, 1])[:] == {"z": [51, 11], "index": [5, 1]}
    assert with_index(hugging_face().with_transform(transform, columns=["x"]))[3] == {"z": 31, "index": 3}
    assert seen == [["x", "y"], ["x", "y"], ["x"]]
    (batch,) = DataLoader(dataset, batch_size=N)
    assert_close(batch["index"], torch.arange(N))


def test_a_transform_set_later_may_return_the_index():
    dataset = with_index(hugging_face())
    dataset.set_transform(lambda batch: {"z": batch["x"], "index": batch["index"]})
    assert dataset[4] == {"z": 40, "index": 4}


def test_a_column_that_numbers_the_samples_is_taken():
    numbers = [3 * i for i in reversed(range(N))]
    dataset = hugging_face(index=numbers)
    assert with_index(dataset) is dataset
    assert sample_counts(dataset) == (28, N)
    assert with_index(hugging_face(), column="x")[2] == {"x": 20, "y": 2}


@pytest.mark.parametrize(
    "numbers",
    [[0] * N, list(range(-1, N - 1)), [i / 2 for i in range(N)], list("abcdefghij"), [[i] for i in range(N)]],
    ids=["repeated", "negative", "fractions", "strings", "lists"],
)
def test_a_column_that_does_not_is_refused(numbers):
    dataset = hugging_face(index=numbers)
    with pytest.raises(ValueError, match=r"column 'index' already.*with_index\(dataset, column=\"fsr_index\"\)"):
        with_index(dataset)
    renamed = with_index(dataset, column="fsr_index")
    assert renamed["fsr_index"][:] == list(range(N))
    rows, length = sample_counts(renamed, "fsr_index")
    assert (rows >= N, length) == (True, N)


def test_a_column_of_ids_takes_a_row_for_each_number():
    dataset = datasets.Dataset.from_dict({"index": [7, 3_000_000, 12], "label": [0, 1, 0]})
    with pytest.warns(UserWarning, match=r"goes up to 3,000,000 for 3 samples.*fsr_index"):
        assert sample_counts(dataset) == (3_000_001, 3)
    counted = with_index(dataset, column="fsr_index")
    assert sample_counts(counted, "fsr_index") == (3, 3)
    assert sample_counts(datasets.Dataset.from_dict({"index": [7, 90_000, 12]})) == (90_001, 3)


def test_an_empty_data_set():
    assert len(with_index(datasets.Dataset.from_dict({"x": []}))) == 0


def test_hugging_face_streams():
    stream = hugging_face().to_iterable_dataset()
    expected = [{"x": 10 * i, "y": i % 3, "index": i} for i in range(N)]
    assert list(with_index(stream)) == expected
    assert sorted(with_index(stream).shuffle(seed=0, buffer_size=4), key=lambda row: row["x"]) == expected
    (batch,) = DataLoader(with_index(stream), batch_size=N)
    assert_close(batch["index"], torch.arange(N))
    with pytest.raises(ValueError, match="2 shards, and each would count from 0"):
        with_index(hugging_face().to_iterable_dataset(num_shards=2))


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: with_index(Samples(Pair)), (N, N)),
        (lambda: Samples(Pair), (N, N)),
        (lambda: Subset(with_index(Samples(Pair)), [7, 2]), (N, 2)),
        (lambda: Subset(Subset(with_index(Samples(Pair)), [7, 2, 9]), [0]), (N, 1)),
        (lambda: with_index(Stream()), (None, None)),
        (lambda: with_index(SizedStream()), (None, N + 1)),
        (lambda: with_index(ConcatDataset([Samples(Pair)] * 2)), (2 * N, 2 * N)),
        (lambda: with_index(hugging_face()), (N, N)),
        (lambda: with_index(hugging_face()).select([7, 2]), (N, 2)),
        (lambda: with_index(hugging_face().to_iterable_dataset()), (None, None)),
    ],
)
def test_sample_counts(make, expected):
    assert sample_counts(make()) == expected


def test_counts_cover_every_index_of_a_filtered_data_set():
    dataset = with_index(hugging_face()).filter(lambda row: row["x"] >= 70)
    rows, length = sample_counts(dataset)
    assert length == 3
    assert rows > max(dataset["index"])


def test_a_concatenation_of_indexed_data_sets_is_refused():
    with pytest.raises(ValueError, match="repeats indices: call with_index on the ConcatDataset"):
        sample_counts(ConcatDataset([with_index(Samples(Pair)), with_index(Samples(Pair))]))


def test_copies_and_names():
    dataset = with_index(TensorDataset(torch.arange(3)))
    for twin in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert isinstance(twin, IndexedDataset)
        assert_close(twin[2], (torch.tensor(2), 2))
    assert repr(dataset).startswith("with_index(<torch")
    assert repr(with_index(Stream())).startswith("with_index(")
