"""The data set without its wrong labels, or with other labels in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from .data import LABELS, check_map_style, is_hugging_face, is_stream
from .issues import find_issues
from .lookup import check_labels, column_of, indices_of, is_whole, numbers_in
from .memory import Memory
from .opinions import known_rows

if TYPE_CHECKING:
    from pandas import DataFrame


def clean(memory: Memory, dataset: Any, *, drop: bool, relabel: bool, table: DataFrame | None, column: str) -> Any:
    """See `FSRWrapper.cleaned`. `column`: where a Hugging Face data set has its indices."""
    if drop == relabel:
        raise ValueError("Say what shall become of the wrong labels: cleaned(dataset, drop=True) or relabel=True.")
    if is_stream(dataset):
        raise TypeError(
            "A stream has no samples to look up. Leave the wrong labels out yourself: issues = fsr.label_issues(); "
            "bad = set(issues.index[issues.is_label_issue]); stream.filter(lambda sample: sample['index'] not in bad)."
        )
    check_map_style(dataset, "fsr.cleaned(dataset, drop=True)")
    rows = known_rows(memory)
    number = indices_of(dataset, column, rows)
    flagged, predicted = _verdict(memory, table, rows)
    check_labels(memory, dataset, number, flagged)
    flagged, predicted = flagged[number], predicted[number]
    if drop:
        kept = (~flagged).nonzero()[:, 0].tolist()
        return dataset.select(kept) if is_hugging_face(dataset, "Dataset") else Subset(dataset, kept)
    if bool((flagged & (predicted < 0)).any()):
        why = (
            "no averaged predictions are kept with relabel_weight=0"
            if table is None
            else "fill in predicted_label where is_label_issue is True"
        )
        raise RuntimeError(
            f"Some labels look wrong and have no prediction to put in their place: {why}. Or pass drop=True."
        )
    given = memory.given.known()[:rows].cpu().long()[number]
    if is_hugging_face(dataset, "Dataset"):
        return _relabelled(dataset, flagged, given, predicted)
    where = flagged.nonzero()[:, 0]
    pairs = zip(given[where].tolist(), predicted[where].tolist(), strict=True)
    return RelabelledDataset(dataset, dict(zip(where.tolist(), pairs, strict=True)))


def _verdict(memory: Memory, table: DataFrame | None, rows: int) -> tuple[Tensor, Tensor]:
    """Which labels are wrong, and what they are to be, (N,) each."""
    if table is None:
        found = find_issues(memory)
        return found.is_issue, found.predicted
    missing = [name for name in ("is_label_issue", "predicted_label") if name not in table.columns]
    if missing:
        raise ValueError(
            f"The table of issues has no column {missing[0]!r}: give what label_issues() gave, edited or not."
        )
    if "index" in table.columns:  # as a CSV file has it, or reset_index()
        table = table.set_index("index")
    index = torch.tensor(table.index.to_list(), dtype=torch.int64)
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < rows:
        raise ValueError(f"The table of issues has indices outside [0, {rows}), the samples that were trained on.")
    if "given_label" in table.columns:
        told = torch.tensor(table["given_label"].fillna(-1).astype("int64").to_list(), dtype=torch.int64)
        given = memory.given.known()[:rows].cpu().long()[index]
        if bool(((told != given) & (told >= 0)).any()):
            raise ValueError(
                "The table of issues has another given_label than was trained on: its index is not that of the "
                "samples, or it is of another run."
            )
    told_bad = table["is_label_issue"]
    # 1 and 0 as well, and words of a spreadsheet.
    bad = told_bad.map({True: True, False: False, "True": True, "False": False, "TRUE": True, "FALSE": False})
    if bool(bad.isna().any()):
        first = int(bad.isna().to_numpy().argmax())
        raise ValueError(
            f"The table of issues has {told_bad.iloc[first]!r} under is_label_issue, for sample {table.index[first]}: "
            "write True or False in every row."
        )
    bad = bad.astype(bool)
    wrong, index = table[bad], index[torch.tensor(bad.to_list(), dtype=torch.bool)]
    flagged, predicted = torch.zeros(rows, dtype=torch.bool), torch.full((rows,), -1)
    flagged[index] = True
    predicted[index] = torch.tensor(wrong["predicted_label"].fillna(-1).astype("int64").to_list(), dtype=torch.int64)
    classes = memory.num_classes or 0
    if int(predicted.max()) >= classes:
        raise ValueError(f"The table of issues has a predicted_label of {int(predicted.max())}; there are {classes}.")
    return flagged, predicted


class RelabelledDataset(Subset[Any]):
    """A map-style data set with other labels for some of its samples; made by `FSRWrapper.cleaned`.

    **Arguments:** `dataset`; `changes`, by position, the label that there is and the one to put in its place.
    """

    def __init__(self, dataset: Dataset[Any], changes: dict[int, tuple[int, int]]) -> None:
        super().__init__(dataset, range(len(dataset)))  # type: ignore[arg-type]
        self.changes = changes

    def __getitem__(self, index: Any) -> Any:
        position = int(index) + (len(self) if index < 0 else 0)
        sample = self.dataset[index]
        return sample if position not in self.changes else _changed(sample, position, *self.changes[position])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def _changed(sample: Any, position: int, given: int, new: int) -> Any:
    """The sample with the new label. **Raises:** `ValueError` if the given one is not found in it."""
    places = [place for place, number in numbers_in(sample).items() if number == given and place in (*LABELS, 1)]
    if not places:
        raise ValueError(
            f"Sample {position} was trained on with the label {given}, which is not found in it: looked at was "
            f"sample[1], or of a dict {', '.join(repr(key) for key in LABELS)}. Give the data set that was trained on."
        )
    old = sample[places[0]]
    if isinstance(old, Tensor):
        label = torch.full_like(old, new)
    elif hasattr(old, "__setitem__"):  # an array of numpy's, without dimensions
        label = old.copy()
        label[...] = new
    else:
        label = type(old)(new)
    if isinstance(sample, Mapping):
        return {**sample, places[0]: label}
    if hasattr(sample, "_fields"):
        return sample._replace(**{sample._fields[1]: label})
    return type(sample)([*sample[:1], label, *sample[2:]])


def _relabelled(dataset: Any, flagged: Tensor, given: Tensor, predicted: Tensor) -> Any:
    """The Hugging Face data set with the predicted labels where they are flagged."""
    known = given >= 0
    found = []
    for name, feature in dataset.features.items():
        if is_whole(feature):
            values = column_of(dataset, name)
            if torch.equal(values[known], given[known]):
                found.append((name, values))
    if len(found) != 1:
        names = [name for name, _ in found]
        raise ValueError(
            f"The labels that were trained on are those of {names or 'no column'} of the data set. Give the data set "
            "that was trained on, with one column of its labels, or change them yourself by what label_issues() says."
        )
    name, values = found[0]
    form, feature = dataset.format, dataset.features[name]
    mended = torch.where(flagged, predicted, values).numpy()
    plain = dataset.with_format(None)
    changed = plain.remove_columns(name).add_column(name, mended, feature=feature).select_columns(plain.column_names)
    return changed.with_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])
