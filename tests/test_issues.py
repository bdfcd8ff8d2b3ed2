"""Which labels are wrong, as a table; averaged predictions for cleanlab; and the data set without the wrong ones."""

from __future__ import annotations

import builtins
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import PAPER, judge_soon
from pandas.testing import assert_frame_equal
from PIL import Image
from processes import run
from sklearn.datasets import load_digits
from test_distributed import build, global_batches
from test_distributed import digits as digits_of_several
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split

from fsr_wrap import FSRWrapper, distributed, issues, opinions, with_index
from fsr_wrap.issues import Evidence, judge
from fsr_wrap.memory import Memory
from fsr_wrap.visits import Visits

CLASSES = 10
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def noisy_digits(share: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's digits, given labels and right ones."""
    x, y = load_digits(return_X_y=True)
    images, right = torch.tensor(x / 8 - 1, dtype=torch.float32), torch.tensor(y)
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(len(right), generator=generator) < share
    other = (right + torch.randint(1, 10, (len(right),), generator=generator)) % 10
    return images, torch.where(hit, other, right), right


def train(x: Tensor, y: Tensor, epochs: int = 36, index: Tensor | None = None, **options: Any) -> FSRWrapper:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, CLASSES))
    options = {"num_samples": len(y), "samples_per_epoch": None if index is None else len(index), **options}
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), **options)
    index = torch.arange(len(y)) if index is None else index
    for _ in range(epochs):
        for i in index[torch.randperm(len(index))].split(60):
            fsr.loss(model(x[i]), y[i], i).backward()
            fsr.step()
            fsr.zero_grad()
    return fsr


@pytest.fixture(scope="module")
def noisy() -> tuple[Tensor, Tensor, Tensor, FSRWrapper]:
    x, given, right = noisy_digits(0.3)
    return x, given, right, train(x, given)


# --- the table -------------------------------------------------------------------------------------------------------


def test_wrong_labels_are_found(noisy: Any) -> None:
    _, given, right, fsr = noisy
    table = fsr.label_issues()
    wrong = (given != right).numpy()
    found = table["is_label_issue"].to_numpy()
    assert abs(found.sum() / wrong.sum() - 1) < 0.15
    assert (found & wrong).sum() / wrong.sum() > 0.85
    assert (found & wrong).sum() / found.sum() > 0.95
    predicted = table["predicted_label"].to_numpy(dtype=np.int64)
    assert (predicted == right.numpy())[found].mean() > 0.85


def test_the_columns_are_those_of_cleanlab_and_ours(noisy: Any) -> None:
    _, given, _, fsr = noisy
    table = fsr.label_issues()
    cleanlabs = ["is_label_issue", "label_quality", "given_label", "predicted_label"]
    assert list(table.columns) == [*cleanlabs, "score", "visits", "zero_weight"]
    assert table.index.tolist() == list(range(len(given)))
    assert table["is_label_issue"].dtype == bool
    assert table["label_quality"].between(0, 1).all()
    assert torch.equal(torch.tensor(table["given_label"].to_numpy(dtype=np.int64)), given)
    np.testing.assert_array_equal(table["score"], fsr.scores)
    assert (table["visits"] == 36).all()
    assert table["zero_weight"].between(0, 1).all()
    assert table.loc[table["is_label_issue"], "zero_weight"].mean() > table["zero_weight"].mean()


def test_a_share_of_ones_own(noisy: Any) -> None:
    *_, fsr = noisy
    table = fsr.label_issues(share=0.1)
    assert table["is_label_issue"].sum() == round(0.1 * len(table))
    flagged = table["is_label_issue"]
    assert table.loc[flagged, "label_quality"].max() <= table.loc[~flagged, "label_quality"].min()
    assert not fsr.label_issues(share=0.0)["is_label_issue"].any()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share="):
            fsr.label_issues(share=share)


@pytest.mark.parametrize(
    ("rule", "storage"),
    [("select", "float16"), ("select", "int8"), ("select", 3), ("clip", 3), ("shift", "int8"), ("uniform", "float16")],
)
def test_every_rule_and_storage_tells_something(rule: str, storage: Any) -> None:
    x, given, right = noisy_digits(0.3)
    paper = {} if rule == "select" else {**PAPER, "weight_rule": rule, "dictionary_size": 100}
    fsr = train(x, given, epochs=6, relabel_storage=storage, **paper)
    table = fsr.label_issues()
    wrong, quality = (given != right).numpy(), table["label_quality"].to_numpy()
    assert np.median(quality[wrong]) < np.quantile(quality[~wrong], 0.1)
    assert table["zero_weight"].notna().all() == (rule == "select")
    np.testing.assert_allclose(fsr.pred_probs().sum(1), 1, atol=1e-4)


def test_without_averages_it_works_and_says_what_it_lacks() -> None:
    x, given, right = noisy_digits(0.3)
    fsr = train(x, given, epochs=6, **{**PAPER, "relabel_weight": 0.0, "dictionary_size": 100})
    table = fsr.label_issues()
    wrong, quality = (given != right).numpy(), table["label_quality"].to_numpy()
    assert np.median(quality[wrong]) < np.quantile(quality[~wrong], 0.1)
    assert table["predicted_label"].isna().all()
    with pytest.raises(RuntimeError, match="relabel_weight=0"):
        fsr.pred_probs()
    with pytest.raises(RuntimeError, match="drop=True"):
        fsr.cleaned(TensorDataset(x, given), relabel=True)


def test_who_was_never_seen_is_no_issue() -> None:
    x, given, _ = noisy_digits(0.3)
    fsr = train(x, given, epochs=6, index=torch.arange(5, 1000))
    table = fsr.label_issues()
    assert len(table) == len(given)
    nobody = table.drop(index=range(5, 1000))
    assert not nobody["is_label_issue"].any()
    assert (nobody["visits"] == 0).all()
    for column in ("label_quality", "given_label", "predicted_label", "score", "zero_weight"):
        assert nobody[column].isna().all()
        assert table.loc[5:999, column].notna().all()
    np.testing.assert_allclose(fsr.pred_probs()[:5], 0.1)


def test_nothing_is_known_before_training() -> None:
    model = nn.Linear(64, CLASSES)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=10)
    for ask in (fsr.label_issues, fsr.pred_probs, lambda: fsr.cleaned([1], drop=True)):
        with pytest.raises(RuntimeError, match="knows nothing yet"):
            ask()


def test_the_table_needs_pandas_and_says_how_to_get_it(noisy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pandas(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match=r'pip install "fsr_wrap\[report\]"'):
        noisy[-1].label_issues()


def test_nothing_is_flagged_where_all_is_right() -> None:
    x, _, right = noisy_digits(0.0)
    assert not train(x, right, epochs=10).label_issues()["is_label_issue"].any()


# --- how many --------------------------------------------------------------------------------------------------------


def evidence(doubted: int, confident: int, classes: int = 4) -> tuple[Evidence, Tensor]:
    """1,000 samples, the first of them doubted, the first of these with confidence."""
    place = torch.arange(1000)
    return Evidence((place + 1) / 1000, place < doubted, place < confident), place % classes


@pytest.mark.parametrize(
    ("doubted", "confident", "flagged"),
    [(400, 390, 400), (200, 100, 90), (200, 40, 0), (200, 140, 163), (0, 0, 0), (1, 1, 1)],
)
def test_doubts_count_as_far_as_they_are_confident(doubted: int, confident: int, flagged: int) -> None:
    assert abs(int(judge(*evidence(doubted, confident)).sum()) - flagged) <= 1


def test_what_was_estimated_early_counts_where_labels_were_learned_by_heart() -> None:
    assert judge(*evidence(20, 5), 0.3, 0.0).sum() == 0
    assert judge(*evidence(20, 5), 0.3, 1.0).sum() == round(1000 * 0.3**2 / 0.32)
    assert judge(*evidence(400, 390), 0.3, 1.0).sum() == 400


def test_once_labels_are_judged_doubts_and_estimate_count_alike() -> None:
    assert judge(*evidence(400, 390), 0.3, 0.0, judged=True).sum() == 350
    assert judge(*evidence(20, 5), 0.3, 0.0, judged=True).sum() == 150
    assert judge(*evidence(20, 5), 0.3, 0.75, judged=True).sum() == 225  # little is forgotten yet
    assert judge(*evidence(0, 0), 0.0, 0.0, judged=True).sum() == 0


def test_no_class_is_flagged_wholesale() -> None:
    found, given = evidence(500, 500)
    given = (torch.arange(1000) >= 60).long() + 1  # of class 1 all are doubted
    given[:4] = 0  # and of class 0, which has four samples
    flagged = judge(found, given)
    assert not flagged[:4].any()
    assert flagged[4:60].sum() == 56 - 5
    assert flagged[60:500].all()


def test_rare_classes_are_judged_as_rare_ones() -> None:
    """Where the network was trained as if classes were equally frequent, that is taken back."""
    model = nn.Linear(4, 2)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), model, num_samples=10)
    memory = fsr._memory
    memory.prepare(torch.arange(10), 2, torch.device("cpu"))
    memory.given.label[:-1], memory.table.score[:-1] = 0, 0.0
    average = torch.tensor([[0.9, 0.1]] * 9 + [[0.45, 0.55]])
    memory.pseudo.columns["logits"][:-1] = average.half()
    assert fsr.pred_probs()[9].argmax() == 1
    memory.log_prior = torch.zeros(2)
    prior = average.mean(0)
    np.testing.assert_allclose(fsr.pred_probs(), average * prior / (average * prior).sum(1, keepdim=True), atol=1e-3)
    assert fsr.pred_probs()[9].argmax() == 0


@pytest.mark.parametrize("balance", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["select", "clip"])
@pytest.mark.parametrize("stored", [1, 3, 12])
def test_from_the_largest_values_follows_what_follows_from_all(
    stored: int, rule: str, balance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes, number = 12, 3000
    model = nn.Linear(4, classes)
    options = {} if rule == "select" else {**PAPER, "dictionary_size": 100}
    options = {**options, "relabel_storage": stored, "class_balance": balance, "num_samples": number}
    memory = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), model, **options)._memory
    memory.prepare(torch.arange(number), classes, torch.device("cpu"))
    assert memory.pseudo is not None
    logits = torch.randn(number, classes) * 3 * torch.rand(number, 1)  # some flat, some steep
    logits[:, 3] -= 4  # seldom likely, so that little is confident of it
    index = torch.arange(5, number)  # the first were never seen
    blank = torch.zeros_like(logits[5:])
    if rule == "select":
        memory.pseudo.average(index, logits[5:], blank, blank == 0)
    else:
        memory.pseudo.update(index, logits[5:], blank, torch.zeros(()))
    memory.table.score[5:number] = torch.randn(number - 5)
    memory.given.label[:-1] = torch.randint(classes - 1, (number,)).to(memory.given.label.dtype)  # the last: to nobody
    memory.log_prior = balance * torch.randn(classes) if balance else None
    few = find(memory)
    monkeypatch.setattr(opinions, "predictions", opinions_of_all)
    for one, other in zip(few, find(memory), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def opinions_of_all(memory: Memory, log_prior: Tensor | None) -> Any:
    return ((where, opinions.AllOf(rows)) for where, rows in opinions.averaged_probabilities(memory, log_prior))


def find(memory: Memory) -> list[Tensor]:
    log_prior, given = opinions.true_prior(memory), memory.given.known().long()
    opinion = opinions.gather_opinion(memory, torch.where(memory.table.score[:-1].isnan(), -1, given), log_prior)
    prior = torch.zeros(1) if log_prior is None else log_prior
    seen = ~memory.table.score[:-1].isnan()
    return [prior, *(column[seen] for column in vars(opinion).values())]


# --- names -----------------------------------------------------------------------------------------------------------


class Named(TensorDataset):
    classes = NAMES  # as torchvision's


def hugging_face(given: Tensor, **columns: Any) -> Any:
    features = Features({"x": Value("int64"), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"x": list(range(len(given))), "label": given.tolist()}, features=features)


@pytest.mark.parametrize("kind", ["classes", "subset", "hugging face"])
def test_classes_have_the_names_of_the_data_set(kind: str) -> None:
    x, given, _ = noisy_digits(0.3)
    named = Named(x, given)
    dataset = {
        "classes": named,
        "subset": Subset(named, range(len(given))),
        "hugging face": hugging_face(given),
    }[kind]
    fsr = train(x, given, epochs=4, dataset=with_index(dataset))
    table = fsr.label_issues()
    assert table["given_name"].tolist() == [NAMES[label] for label in given]
    assert table["predicted_name"].tolist() == [NAMES[label] for label in table["predicted_label"]]
    assert fsr.state_dict()["fsr"]["class_names"] == NAMES
    other = fsr.label_issues(class_names=[f"class {number}" for number in range(10)])
    assert other["given_name"].tolist() == [f"class {label}" for label in given]
    by_number = fsr.label_issues(class_names=dict(reversed([*enumerate(NAMES)])))  # as a model's id2label
    assert_frame_equal(by_number, table)
    for wrong in (["one"], "0123456789", set(NAMES), dict.fromkeys(NAMES)):
        with pytest.raises(ValueError, match="10 names"):
            fsr.label_issues(class_names=wrong)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_what_was_saved_is_enough(noisy: Any, tmp_path: Path) -> None:
    *_, fsr = noisy
    fsr.save(tmp_path)
    from fsr_wrap.state import read_state

    memory = Memory.from_state_dict(read_state(tmp_path)["fsr"], fsr.config, None)
    pd.testing.assert_frame_equal(issues.label_issues_from_memory(memory), fsr.label_issues())
    np.testing.assert_array_equal(issues.pred_probs(memory), fsr.pred_probs())


def test_a_state_without_visits_loads(noisy: Any) -> None:
    *_, fsr = noisy
    state = fsr.state_dict()["fsr"]
    del state["visits"]
    memory = Memory.from_state_dict(state, fsr.config, None)
    table = issues.label_issues_from_memory(memory)
    assert (table["visits"] == 0).all()
    assert table["zero_weight"].isna().all()
    pd.testing.assert_series_equal(table["label_quality"], fsr.label_issues()["label_quality"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("visits", {"seen": torch.zeros(5, dtype=torch.int16), "unused": torch.zeros(5, dtype=torch.int16)}),
        ("visits", {"seen": torch.zeros(1797, dtype=torch.int16), "unused": torch.ones(1797, dtype=torch.int16)}),
        ("visits", {"seen": torch.zeros(1797)}),
        ("class_names", [1, 2]),
        ("class_names", "names"),
    ],
)
def test_a_damaged_state_is_refused(noisy: Any, name: str, value: Any) -> None:
    *_, fsr = noisy
    state = {**fsr.state_dict()["fsr"], name: value}
    with pytest.raises(ValueError, match="none that state_dict"):
        Memory.from_state_dict(state, fsr.config, None)


def test_visits_grow_and_stop_counting() -> None:
    visits = Visits(2)
    visits.seen.fill_(32766)
    for _ in range(3):
        visits.end_epoch(torch.tensor([True, False]), torch.tensor([True, True]))
    visits.grow(4)
    assert visits.seen.tolist() == [32767, 32766, 0, 0]
    assert visits.unused.tolist() == [1, 0, 0, 0]


def of_several_processes(half: bool) -> dict[str, Tensor]:
    x, y = digits_of_several()
    model, _, fsr = build({"relabel_storage": "float16"})
    batches = [batch for epoch in global_batches() for batch in epoch]
    for batch in batches[: len(batches) - 2 * half]:
        mine = batch.tensor_split(distributed.world_size())[distributed.rank()]
        fsr.loss(model(x[mine]), y[mine], mine).backward()
        fsr.step()
        fsr.zero_grad()
    if half and distributed.world_size() > 1:
        with pytest.raises(RuntimeError, match="consolidate"):
            fsr.label_issues()
    fsr.consolidate()
    table = fsr.label_issues()
    return {name: torch.tensor(table[name].astype("float64").fillna(-1).to_numpy()) for name in table.columns}


@pytest.mark.parametrize("half", [False, True])
def test_the_table_is_the_same_on_any_number_of_processes(half: bool) -> None:
    alone = run(1, of_several_processes, half)[0]
    first, second = run(2, of_several_processes, half)
    for name, column in first.items():
        assert torch.equal(column, second[name])
        torch.testing.assert_close(column, alone[name], rtol=1e-3, atol=1e-3)


# --- cleanlab --------------------------------------------------------------------------------------------------------


def test_cleanlab_takes_the_predictions(noisy: Any) -> None:
    from cleanlab.filter import find_label_issues  # takes a while, in every process of the tests above

    _, given, right, fsr = noisy
    probabilities = fsr.pred_probs()
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (len(given), CLASSES)
    found = find_label_issues(given.numpy(), probabilities)
    wrong = (given != right).numpy()
    assert (found & wrong).sum() / wrong.sum() > 0.45
    assert (found & wrong).sum() / found.sum() > 0.8


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # cleanlab under pandas 3.1
def test_datalab_takes_the_predictions(noisy: Any) -> None:
    from cleanlab import Datalab

    _, given, right, fsr = noisy
    lab = Datalab(data={"digit": given.numpy()}, label_name="digit", verbosity=0)
    lab.find_issues(pred_probs=fsr.pred_probs())
    found, wrong = lab.get_issues("label"), (given != right).numpy()
    flagged = found["is_label_issue"].to_numpy()
    assert (flagged & wrong).sum() / wrong.sum() > 0.45
    assert (flagged & wrong).sum() / flagged.sum() > 0.8
    suggested = fsr.label_issues()["predicted_label"].to_numpy(dtype=np.int64)
    np.testing.assert_array_equal(found["predicted_label"][flagged], suggested[flagged])


# --- the way back ----------------------------------------------------------------------------------------------------

Sample = namedtuple("Sample", ["image", "digit"])


class Kinds(torch.utils.data.Dataset[Any]):
    def __init__(self, kind: str, x: Tensor, y: Tensor):
        self.kind, self.x, self.y = kind, x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        x, y = self.x[i], int(self.y[i])
        return {
            "tuple": (x, y),
            "list": [x, np.int64(y)],
            "array": (x, np.array(y, np.uint8)),
            "named": Sample(x, y),
            "dict": {"pixel_values": x, "labels": self.y[i]},
            "arrays": {"pixel_values": x.numpy(), "mask": np.ones(3, dtype=np.int64), "labels": np.int64(y)},
        }[self.kind]


def label_of(sample: Any) -> int:
    return int(sample["labels"] if isinstance(sample, dict) else sample[1])


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", ["tuple", "list", "array", "named", "dict", "arrays"])
def test_torch_data_sets_are_cleaned(noisy: Any, kind: str, indexed: bool) -> None:
    x, given, _, fsr = noisy
    table = fsr.label_issues()
    flagged = table.index[table["is_label_issue"]].tolist()
    dataset = Kinds(kind, x, given)
    dataset = with_index(dataset) if indexed else dataset
    dropped = fsr.cleaned(dataset, drop=True)
    kept = sorted(set(range(len(given))) - set(flagged))
    assert len(dropped) == len(kept)
    assert [label_of(dropped[i]) for i in range(50)] == given[kept[:50]].tolist()
    mended = fsr.cleaned(dataset, relabel=True)
    expected = given.clone()
    expected[flagged] = torch.tensor(table["predicted_label"][flagged].to_numpy(dtype=np.int64))
    assert len(mended) == len(given)
    assert [label_of(mended[i]) for i in range(len(given))] == expected.tolist()
    assert [label_of(sample) for sample in mended.__getitems__(flagged)] == expected[flagged].tolist()
    assert type(mended[flagged[0]]) is type(dataset[flagged[0]])
    place = "labels" if isinstance(dataset[0], dict) else 1
    assert type(mended[flagged[0]][place]) is type(dataset[flagged[0]][place])
    assert label_of(mended[-1]) == expected[-1]
    if indexed:
        index = dropped[7]["index" if isinstance(dataset[0], dict) else -1]
        assert index == kept[7]
        train(x, given, epochs=1, dataset=dropped, num_samples=None)


def test_a_part_with_indices_is_cleaned(noisy: Any) -> None:
    x, given, _, fsr = noisy
    flagged = fsr.label_issues()["is_label_issue"].to_numpy()
    part = Subset(with_index(TensorDataset(x, given)), [900, 3, 4, 5])
    dropped = fsr.cleaned(part, drop=True)
    assert [sample[-1] for sample in dropped] == [i for i in (900, 3, 4, 5) if not flagged[i]]
    with pytest.raises(ValueError, match="4 samples, and 1797 were trained on"):
        fsr.cleaned(Subset(TensorDataset(x, given), [900, 3, 4, 5]), drop=True)


@pytest.mark.parametrize("shuffled", [False, True])
def test_hugging_face_data_sets_are_cleaned(noisy: Any, shuffled: bool) -> None:
    _, given, _, fsr = noisy
    table = fsr.label_issues()
    flagged = table["is_label_issue"].to_numpy()
    dataset = hugging_face(given)
    if shuffled:
        dataset = with_index(dataset).shuffle(seed=1).select(range(1000)).with_format("torch", columns=["label"])
    order = dataset.with_format(None)["x"][:]
    dropped = fsr.cleaned(dataset, drop=True)
    assert dropped.with_format(None)["x"][:] == [i for i in order if not flagged[i]]
    mended = fsr.cleaned(dataset, relabel=True)
    assert mended.features == dataset.features
    assert mended.column_names == dataset.column_names
    assert mended.format == dataset.format
    predicted = table["predicted_label"]
    expected = [int(predicted[i]) if flagged[i] else int(given[i]) for i in order]
    assert mended.with_format(None)["label"][:] == expected
    assert mended.with_format(None)["x"][:] == order


def test_an_edited_table_is_followed(noisy: Any) -> None:
    x, given, _, fsr = noisy
    table = fsr.label_issues()
    table["is_label_issue"] = False
    table.loc[[4, 8], "is_label_issue"] = True
    table.loc[4, "predicted_label"] = 9
    dataset = TensorDataset(x, given)
    assert fsr.cleaned(dataset, drop=True, issues=table[table["is_label_issue"]]).indices[:6] == [0, 1, 2, 3, 5, 6]
    assert int(fsr.cleaned(dataset, relabel=True, issues=table)[4][1]) == 9
    table.loc[4, "predicted_label"] = 10
    with pytest.raises(ValueError, match="predicted_label"):
        fsr.cleaned(dataset, relabel=True, issues=table)
    with pytest.raises(ValueError, match="indices outside"):
        fsr.cleaned(dataset, drop=True, issues=table.rename(index={4: 5000}))


def test_what_cannot_be_cleaned_is_refused(noisy: Any) -> None:
    x, given, _, fsr = noisy
    dataset = TensorDataset(x, given)
    for both in (False, True):
        with pytest.raises(ValueError, match=r"drop=True\) or relabel=True"):
            fsr.cleaned(dataset, drop=both, relabel=both)
    with pytest.raises(TypeError, match="stream"):
        fsr.cleaned(hugging_face(given).to_iterable_dataset(), drop=True)
    with pytest.raises(TypeError, match="is no data set"):
        fsr.cleaned(torch.utils.data.DataLoader(dataset), drop=True)
    worst = fsr.label_issues().label_quality.argmin()
    corrected, best = given.clone(), given.clone()
    corrected[worst] = (given[worst] + 1) % 10
    best[fsr.label_issues().label_quality.argmax()] += 1
    with pytest.raises(ValueError, match="not found in it"):
        list(fsr.cleaned(TensorDataset(x, corrected), relabel=True))
    with pytest.raises(ValueError, match="no column"):
        fsr.cleaned(hugging_face(best % 10), relabel=True)


class Reordered(torch.utils.data.Dataset[Any]):
    """A data set of somebody's own around another."""

    def __init__(self, dataset: Any, order: list[int]) -> None:
        self.inner, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Any:
        return self.inner[self.order[position]]


def test_another_order_or_another_data_set_is_refused(noisy: Any, tmp_path: Path) -> None:
    x, given, _, fsr = noisy
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(1))
    plain = TensorDataset(x, given)
    others = [
        TensorDataset(x[order], given[order]),
        ConcatDataset(random_split(plain, [0.5, 0.5], torch.Generator().manual_seed(2))),
        Reordered(with_index(plain), order.tolist()),
        with_index(TensorDataset(x[order[:500]], given[order[:500]])),
        Kinds("dict", x[order], given[order]),
        hugging_face(given[order]),
        TensorDataset(x, (given + 1) % 10),
    ]
    for other in others:
        for ask in ({"drop": True}, {"relabel": True}):
            with pytest.raises(ValueError, match=r"not in its order: its labels .* by chance\. Sample \d+ has "):
                fsr.cleaned(other, **ask)
        with pytest.raises(ValueError, match="not the data set that was trained on"):
            fsr.report(tmp_path, other)
    assert not list(tmp_path.iterdir())


def test_the_same_data_set_is_known_again(noisy: Any) -> None:
    """In other clothes: in parts with indices, with right labels, with other labels beside, or with none at all."""
    x, given, right, fsr = noisy
    flagged = fsr.label_issues()["is_label_issue"].to_numpy()
    indexed = with_index(TensorDataset(x, given))
    halves = random_split(indexed, [0.5, 0.5], torch.Generator().manual_seed(2))
    dropped = fsr.cleaned(ConcatDataset(halves), drop=True)
    assert sorted(int(sample[-1]) for sample in dropped) == (~flagged).nonzero()[0].tolist()
    corrected = torch.where(torch.tensor(flagged), right, given)
    numbers = torch.randperm(10, generator=torch.Generator().manual_seed(3)) * 7 + 2  # of the same classes
    noise = torch.randint(10, given.shape, generator=torch.Generator().manual_seed(4))
    same = [TensorDataset(x, y) for y in (given, right, corrected, given + 1, numbers[given], torch.zeros_like(given))]
    same += [TensorDataset(x), TensorDataset(x, x), TensorDataset(x, noise, given)]
    same += [hugging_face(y) for y in (given, right)]
    same += [hugging_face(noise).add_column("other", given.numpy()), hugging_face(given).remove_columns("label")]
    ids = hugging_face(given).add_column("id", 1000 + np.arange(len(given)))
    same += [ids.select_columns(["id", "label"]), with_index(ids).select_columns(["index", "id", "label"])]
    state = torch.get_rng_state()
    for dataset in same:
        assert len(fsr.cleaned(dataset, drop=True)) == (~flagged).sum()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [None, float("nan"), "WAHR", "yes", 2])
def test_a_table_with_other_than_true_and_false_is_refused(noisy: Any, wrong: Any) -> None:
    x, given, _, fsr = noisy
    dataset, table = TensorDataset(x, given), fsr.label_issues()
    kept = fsr.cleaned(dataset, drop=True).indices
    for kind in (object, int, str, "boolean"):
        same = table.assign(is_label_issue=table["is_label_issue"].astype(kind))
        assert fsr.cleaned(dataset, drop=True, issues=same).indices == kept
    table["is_label_issue"] = table["is_label_issue"].astype(object)
    table.loc[7, "is_label_issue"] = wrong
    with pytest.raises(ValueError, match="under is_label_issue, for sample 7: write True or False"):
        fsr.cleaned(dataset, drop=True, issues=table)
    with pytest.raises(ValueError, match="no column 'is_label_issue'"):
        fsr.cleaned(dataset, drop=True, issues=table.drop(columns="is_label_issue"))
    blank = fsr.label_issues().assign(predicted_label=pd.NA)
    with pytest.raises(RuntimeError, match="fill in predicted_label"):
        fsr.cleaned(dataset, relabel=True, issues=blank)


@pytest.mark.parametrize("kind", ["pairs", "dicts", "hugging face"])
def test_labels_that_are_texts_or_that_the_loader_merges_tell_the_order_too(noisy: Any, kind: str) -> None:
    """They are made numbers by a collate function, say."""
    x, given, _, fsr = noisy

    def make_data(order: Tensor, names: list[Any]) -> Any:
        rows = [{"x": x[i].tolist(), "label": names[given[i]]} for i in order.tolist()]
        pairs = [(row["x"], row["label"]) for row in rows]
        return {"pairs": pairs, "dicts": rows, "hugging face": Dataset.from_list(rows) if kind[0] == "h" else None}[
            kind
        ]

    there, other = torch.arange(len(given)), torch.randperm(len(given), generator=torch.Generator().manual_seed(1))
    for names in (NAMES, [f"name {(7 * number) % 10}" for number in range(10)]):
        dropped = fsr.cleaned(make_data(there, names), drop=True)
        assert len(dropped) == (~fsr.label_issues()["is_label_issue"]).sum()
        with pytest.raises(ValueError, match="not in its order"):
            fsr.cleaned(make_data(other, names), drop=True)
    if kind == "pairs":  # texts of the samples themselves are no labels
        assert fsr.cleaned([(int(y), f"text {number}") for number, y in enumerate(given)], drop=True)
    merged = train(x, given // 3, epochs=6)
    assert merged.cleaned(make_data(there, list(range(10, 20))), drop=True)
    with pytest.raises(ValueError, match="not in its order"):
        merged.cleaned(make_data(other, list(range(10, 20))), drop=True)


def test_a_table_is_read_by_its_indices(noisy: Any, tmp_path: Path) -> None:
    x, given, _, fsr = noisy
    dataset, table = TensorDataset(x, given), fsr.label_issues()
    kept = fsr.cleaned(dataset, drop=True).indices
    fsr.report(tmp_path)
    from_file = pd.read_csv(tmp_path / "label_issues.csv")
    worst_first = table.sort_values("label_quality")
    for same in (from_file, from_file.set_index("index"), worst_first, worst_first.reset_index()):
        assert fsr.cleaned(dataset, drop=True, issues=same).indices == kept
        assert fsr.cleaned(dataset, drop=True, issues=same[same["is_label_issue"]]).indices == kept
    with pytest.raises(ValueError, match="another given_label than was trained on"):
        fsr.cleaned(dataset, drop=True, issues=worst_first.reset_index(drop=True))


def test_labels_that_are_judged_make_no_difference_to_who_asks() -> None:
    x, given, _ = noisy_digits(0.3)
    fsr = train(x, given, epochs=3)
    judge_soon(fsr, CLASSES)
    before = {name: value.clone() for name, value in fsr.state_dict()["fsr"]["table"].items()}
    fsr.label_issues()
    fsr.pred_probs()
    assert all(torch.equal(value, before[name]) for name, value in fsr.state_dict()["fsr"]["table"].items())


# --- the example -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True])
def test_the_example_finds_and_mends(
    data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    import find_label_issues

    arguments = ["--epochs", "36"]
    if data:
        x, y = load_digits(return_X_y=True)
        for number in range(120):
            (tmp_path / str(y[number])).mkdir(exist_ok=True)
            image = Image.fromarray((x[number] * 15).astype(np.uint8).reshape(8, 8))
            image.save(tmp_path / str(y[number]) / f"{number}.png")
        arguments = ["--epochs", "3", "--data", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["find_label_issues.py", *arguments, "--csv", str(tmp_path / "issues.csv")])
    find_label_issues.main()
    out = capsys.readouterr().out
    assert "labels look wrong" in out
    accuracies = [float(line.split()[-1]) for line in out.splitlines()[-4:]]
    if not data:
        assert accuracies[0] < min(accuracies[1:]) - 0.05
        assert len(pd.read_csv(tmp_path / "issues.csv")) == 1438
    monkeypatch.setattr("sys.argv", ["find_label_issues.py", "--data", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no such file"):
        find_label_issues.main()
