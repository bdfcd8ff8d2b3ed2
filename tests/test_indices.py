"""One index, one sample: collisions are refused where they can be known, and noticed where they cannot."""

import copy
import pickle
import warnings
from collections import UserDict

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from processes import run
from torch import nn
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from fsr_wrap import FSRWrapper, with_index
from fsr_wrap.collisions import GivenLabels
from fsr_wrap.data import sample_counts

N = 12


def rows(start: int = 0, **columns):
    numbers = list(range(start, start + N))
    return datasets.Dataset.from_dict({"x": numbers, "y": [i % 3 for i in numbers], **columns})


class Images(Dataset):
    """As torchvision's and timm's: a transform that may be set later."""

    def __init__(self):
        self.transform = None

    def __len__(self):
        return N

    def __getitem__(self, i):
        return (i if self.transform is None else self.transform(i)), i % 3


class Stream(IterableDataset):
    """Shared out between all workers of all processes."""

    def __init__(self, form=lambda i: (i, i % 3)):
        self.form = form

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for i in range(rank * workers + number, N, world * workers):
            yield self.form(i)


# --- what is set on an indexed data set is set on the data set -------------------------------------------------------


def test_what_is_set_reaches_the_data_set():
    images = Images()
    dataset = with_index(images)
    dataset.transform = lambda i: -i
    assert dataset[4] == (-4, 1, 4)
    assert images[4] == (-4, 1)
    dataset.extra = 3
    assert images.extra == 3
    del dataset.extra
    assert not hasattr(images, "extra")
    with pytest.raises(AttributeError):
        del dataset.extra
    dataset.dataset = other = Images()
    assert dataset[4] == (4, 1, 4)
    dataset.transform = abs
    assert other.transform is abs


def test_what_is_set_reaches_the_data_set_of_copies_and_in_workers():
    for copied in (copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))):
        dataset = copied(with_index(Images()))
        dataset.transform = torch.tensor
        assert torch.equal(dataset.dataset[2][0], torch.tensor(2))
        dataset.column = "number"
        assert dataset.column == "number"
        assert not hasattr(dataset.dataset, "column")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves files to the collector
def test_timm_sets_the_transform(tmp_path):
    timm_data = pytest.importorskip("timm.data")
    image = pytest.importorskip("PIL.Image").new("RGB", (40, 40))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "one.png")
    dataset = with_index(timm_data.create_dataset("", root=str(tmp_path)))
    timm_data.create_loader(dataset, (3, 32, 32), 2, use_prefetcher=False, num_workers=0, persistent_workers=False)
    inputs, label, index = dataset[1]
    assert (inputs.shape, label, index) == ((3, 32, 32), 1, 1)


# --- a key that is there already -------------------------------------------------------------------------------------


def test_a_key_is_not_overwritten():
    with pytest.raises(ValueError, match=r"Sample 0 has 77 under 'index' already.*column=\"fsr_index\""):
        with_index([{"x": 1, "index": 77}])[0]
    with pytest.raises(ValueError, match=r"has 'a\.png' under 'index' already"):
        with_index([{"x": 1, "index": "a.png"}])[0]
    assert with_index([{"x": 1, "index": 77}], column="fsr_index")[0] == {"x": 1, "index": 77, "fsr_index": 0}
    twice = with_index([{"x": 1, "index": i} for i in range(3)])
    assert twice[2] == {"x": 1, "index": 2}


def test_mappings_that_are_no_dicts_get_the_key():
    assert with_index([UserDict(x=1)])[0] == {"x": 1, "index": 0}


# --- several data sets -----------------------------------------------------------------------------------------------


def pair():
    return with_index(TensorDataset(torch.arange(5))), with_index(TensorDataset(torch.arange(5)))


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: ConcatDataset([a, b]),
        lambda a, b: a + b,
        lambda a, b: ConcatDataset([Subset(a, [0, 1]), Subset(b, [0, 1])]),
        lambda a, b: ConcatDataset([Subset(a, [0, 1]), Subset(Subset(b, [0, 1]), [1])]),
        lambda a, b: Subset(ConcatDataset([a, b]), [3, 4]),
        lambda a, b: ConcatDataset([ConcatDataset([a]), ConcatDataset([Subset(b, [3])])]),
        lambda a, b: ConcatDataset([a, b.dataset]),
        lambda a, b: ChainDataset([with_index(Stream()), with_index(Stream())]),
    ],
)
def test_several_indexed_data_sets_are_refused(join):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="repeats indices: call with_index on the ConcatDataset"):
        FSRWrapper(model, torch.optim.SGD(model.parameters()), dataset=join(*pair()), dictionary_size=2)


def test_parts_of_one_indexed_data_set_are_not():
    dataset, _ = pair()
    assert sample_counts(ConcatDataset([Subset(dataset, [0, 1]), Subset(dataset, [4])])) == (5, 3)
    assert sample_counts(ConcatDataset([dataset, Subset(dataset, [4])])) == (6, 6)
    assert sample_counts(ConcatDataset([Images(), Images()])) == (2 * N, 2 * N)


@pytest.mark.parametrize("join", [datasets.concatenate_datasets, datasets.interleave_datasets])
def test_columns_that_collide_are_refused(join):
    joined = join([with_index(rows()), with_index(rows(N + 1))])
    with pytest.raises(ValueError, match=r"24 samples have 12 .*another '.' than the first of their number: call with"):
        sample_counts(joined)
    other = with_index(join([rows(), rows(N + 1)]))
    assert sample_counts(other) == (2 * N, 2 * N)


def test_columns_of_one_data_set_may_repeat():
    dataset = with_index(rows())
    assert sample_counts(dataset.select([3, 3, 7])) == (N, 3)
    assert sample_counts(datasets.concatenate_datasets([dataset, dataset.select([7, 8])])) == (N + 2, N + 2)
    assert sample_counts(datasets.concatenate_datasets([dataset.select([1, 5]), dataset.select([7, 8])])) == (N, 4)


def test_another_column_is_looked_at():
    dataset = with_index(rows(index=list("abcdefghijkl")), column="fsr_index").filter(lambda row: row["x"] > 9)
    model = nn.Linear(2, 3)
    fsr = FSRWrapper(
        model, torch.optim.SGD(model.parameters(), 0.1), dataset=dataset, column="fsr_index", dictionary_size=1
    )
    for batch in DataLoader(dataset.with_format("torch", columns=["y", "fsr_index"]), 2):
        fsr.loss(model(torch.randn(len(batch["y"]), 2)), batch["y"], batch["fsr_index"])
    assert fsr.epoch == 1


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda: DataLoader(Images(), 2), r"dataset=loader\.dataset"),
        (lambda: iter(DataLoader(Images(), 2)), r"dataset=loader\.dataset"),
        (lambda: (i for i in range(3)), r"dataset=loader\.dataset"),
        (lambda: datasets.DatasetDict(train=rows()), r"dataset=loader\.dataset"),
        (lambda: 50_000, r"num_samples=\.\.\."),
        (lambda: "train", r"dataset=loader\.dataset"),
    ],
)
def test_what_is_no_data_set_is_refused(wrong, line):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"is no data set: give a torch .* FSRWrapper\(model, optimizer, " + line):
        FSRWrapper(model, torch.optim.SGD(model.parameters()), dataset=wrong())


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_column_of_a_stream_is_taken_as_it_is():
    numbers = [7 * i for i in range(N)]
    stream = with_index(rows(index=numbers).to_iterable_dataset(num_shards=3))
    assert [row["index"] for row in stream] == numbers
    indexed = with_index(with_index(rows()).to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=4))
    assert all(row["index"] == row["x"] for row in indexed)
    named = with_index(rows(number=numbers).to_iterable_dataset(num_shards=3), column="number")
    assert [row["number"] for row in named] == numbers


def generate(shards, column="index"):
    for shard in shards:
        for i in range(4):
            yield {"x": 4 * shard + i, column: 4 * shard + i}


def test_of_a_stream_of_unknown_columns_the_samples_tell():
    shards = {"shards": [0, 1, 2]}
    stream = with_index(datasets.IterableDataset.from_generator(generate, gen_kwargs=shards))
    assert [row["index"] for row in stream] == [row["x"] for row in stream] == list(range(N))
    unnumbered = datasets.IterableDataset.from_generator(generate, gen_kwargs={**shards, "column": "y"})
    with pytest.raises(ValueError, match="3 shards, and each would count from 0"):
        next(iter(with_index(unnumbered)))


@pytest.mark.parametrize("wrong", [list("abcdefghijkl"), [i / 2 for i in range(N)]])
def test_a_column_of_a_stream_that_does_not_number_is_refused(wrong):
    with pytest.raises(ValueError, match=r"'index' already.*column=\"fsr_index\""):
        with_index(rows(index=wrong).to_iterable_dataset())
    stream = with_index(rows(index=wrong).to_iterable_dataset().map(lambda row: row))
    with pytest.raises(ValueError, match=r"'index' already.*column=\"fsr_index\""):
        next(iter(stream))


def test_a_stream_that_is_split_is_refused():
    """Each process would count its own shards from 0."""
    for shards in (1, 2):
        stream = rows().to_iterable_dataset(num_shards=shards)
        with pytest.raises(ValueError, match="call with_index before, split_dataset_by_node"):
            with_index(split_dataset_by_node(stream, 0, 2))
    parts = [split_dataset_by_node(with_index(rows().to_iterable_dataset()), rank, 2) for rank in (0, 1)]
    assert [(row["x"], row["index"]) for part in parts for row in part] == [(i, i) for i in [*range(0, N, 2)]] + [
        (i, i) for i in range(1, N, 2)
    ]


def numbers_of_a_stream(workers: int) -> list[tuple[int, int]]:
    context = "fork" if workers else None  # the group comes along, for the stream's own get_rank()
    loader = DataLoader(with_index(Stream()), 2, num_workers=workers, multiprocessing_context=context)
    return [(x.item(), i.item()) for batch in loader for x, _, i in zip(*batch, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_of_several_processes_do_not_collide(workers):
    found = run(2, numbers_of_a_stream, workers)
    assert sorted(pair for part in found for pair in part) == [(i, i) for i in range(N)]


def rank_in_a_pickle() -> list[int]:
    dataset = pickle.loads(pickle.dumps(with_index(Plain())))
    return list(dataset.__dict__["_process"])


class Plain(IterableDataset):
    def __iter__(self):
        return iter([(i, 0) for i in range(3)])


def test_a_worker_that_is_started_anew_is_told_its_process():
    assert run(2, rank_in_a_pickle) == [[0, 2], [1, 2]]
    dataset = with_index(Plain())
    dataset.__dict__["_process"] = (1, 2)
    assert [i for _, _, i in pickle.loads(pickle.dumps(dataset))] == [1, 3, 5]


def test_whole_numbers_in_a_torch_stream_are_taken():
    class Numbered(IterableDataset):
        def __init__(self, value):
            self.value = value

        def __iter__(self):
            return iter([{"index": self.value}])

    assert next(iter(with_index(Numbered(77)))) == {"index": 77}
    assert next(iter(with_index(Numbered(torch.tensor(77))))) == {"index": torch.tensor(77)}
    for wrong in ("a", 1.5, True, torch.tensor(1.5)):
        with pytest.raises(ValueError, match="does not number them"):
            next(iter(with_index(Numbered(wrong))))


# --- what nobody can know before -------------------------------------------------------------------------------------


def small_run(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    options = {"num_samples": 60, "dictionary_size": 6, "reward_batch_size": 6, "warmup_epochs": 1, **options}
    return model, FSRWrapper(model, inner, **options)


INPUTS, LABELS = torch.randn(60, 4), torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))


def go(model, fsr, samples, index=None, labels=LABELS):
    for part in range(0, len(samples), 10):
        these = samples[part : part + 10]
        given = these if index is None else index[part : part + 10]
        fsr.loss(model(INPUTS[these]), labels[these], given).backward()
        fsr.step()
        fsr.zero_grad()


ORDER = torch.arange(60)


def test_samples_that_share_an_index_are_noticed_at_the_end_of_the_first_epoch():
    """As of two streams that each count from 0."""
    pair = small_run()
    with pytest.warns(UserWarning, match=r"^\d+ of the 60 samples of this epoch came with another label .*with_index"):
        go(*pair, ORDER, ORDER % 30)
    go(*pair, ORDER, ORDER % 30)  # once


def test_a_small_part_that_collides_is_noticed():
    """As of a small data set that was joined to a large one."""
    with pytest.warns(UserWarning, match="came with another label"):
        go(*small_run(), ORDER, torch.where(ORDER < 50, ORDER, ORDER - 50))


def test_an_order_that_changes_is_noticed_in_the_second_epoch():
    model, fsr = small_run()
    go(model, fsr, ORDER, ORDER)
    with pytest.warns(UserWarning, match="came with another label"):
        go(model, fsr, ORDER.roll(7), ORDER)


def test_an_order_that_changes_is_noticed_after_a_resume(tmp_path):
    """As of chunks that are dealt out to another number of workers."""
    model, fsr = small_run()
    go(model, fsr, ORDER, ORDER)
    fsr.save(tmp_path)
    model, resumed = small_run()
    resumed.load(tmp_path)
    with pytest.warns(UserWarning, match="came with another label"):
        go(model, resumed, ORDER.roll(7), ORDER)


def test_of_an_unknown_number_of_samples():
    model, fsr = small_run(num_samples=None)
    go(model, fsr, ORDER[:50], ORDER[:50] % 30)
    with pytest.warns(UserWarning, match="came with another label"):
        fsr.end_epoch()


def with_replacement():
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1)) ** 4
    return torch.multinomial(weights, 60, True, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "samples",
    [
        with_replacement(),
        torch.cat([ORDER, ORDER[:20]]),  # padding, in a part of the next epoch
        ORDER.repeat_interleave(3),  # repeated augmentation
        torch.cat([ORDER, *[ORDER[:20]] * 3])[torch.randperm(120, generator=torch.Generator().manual_seed(3))],
    ],
    ids=["weighted", "padding", "repeated", "oversampled"],
)
def test_samples_that_come_again_are_fine(samples):
    pair = small_run()
    go(*pair, samples)
    go(*pair, samples.flip(0))
    pair[1].end_epoch()


def test_a_few_corrected_labels_are_fine_and_many_are_said_once():
    model, fsr = small_run()
    go(model, fsr, ORDER)
    few = LABELS.clone()
    few[:2] = (few[:2] + 1) % 3
    go(model, fsr, ORDER, labels=few)
    with pytest.warns(UserWarning, match="Where you corrected labels, all is well"):
        go(model, fsr, ORDER, labels=(LABELS + 1) % 3)


def test_mixed_targets_tell_nothing():
    """mixup()'s own leave the labels known; the largest entry of another soft target may be the partner's."""
    model, fsr = small_run()
    for _ in range(3):
        for index in ORDER.split(10):
            mixed, target = fsr.mixup(INPUTS[index], LABELS[index])
            fsr.loss(model(mixed), target, index)
    assert fsr.epoch == 3
    model, fsr = small_run()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!.*another label)")  # what is said of soft targets
        for epoch in range(3):
            for index in ORDER.split(10):
                target = 0.7 * nn.functional.one_hot((LABELS[index] + epoch) % 3, 3)
                target = target + 0.3 * target.roll(1, 1) / 0.7
                fsr.loss(model(INPUTS[index]), target, index)


def test_many_classes_and_samples_that_are_left_out():
    labels = GivenLabels(10, 40_000)
    for epoch in range(3):
        labels.note(torch.tensor([[0, 1, 2, 3, -1], [39_999, 32_767, 32_768, 25_535, epoch]]))
    labels.note(torch.stack([torch.tensor([-1] * 9), torch.arange(9)]))
    labels.end_epoch()
    labels.grow(50)
    labels.note(torch.tensor([[0, 1, 2, 40], [1, 2, 3, 4]]))
    with pytest.warns(UserWarning, match="^3 of the 4 samples"):
        labels.end_epoch()


def in_two_processes() -> bool:
    model, fsr = small_run()
    rank = torch.distributed.get_rank()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        go(model, fsr, ORDER[:30] + 30 * rank, ORDER[:30])
    assert fsr.epoch == 1
    return any("came with another label" in str(warning.message) for warning in said)


def test_processes_whose_indices_collide_are_noticed_by_the_first():
    assert run(2, in_two_processes) == [True, False]
