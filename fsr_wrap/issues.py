"""Which labels are wrong: what a run knows of each sample, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .functional import distribution
from .memory import Memory

if TYPE_CHECKING:
    from numpy import ndarray
    from pandas import DataFrame


@dataclass(frozen=True)
class Opinion:
    """What the network thinks of the given labels, (N,) each, on the host.

    **Arguments:** `own`, the averaged probability of the given label; `other`, the largest of another class;
    `predicted`, the class of the largest of all.
    """

    own: Tensor
    other: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Issues:
    """What is known of each label, columns (N,) on the host; see `FSRWrapper.label_issues`.

    Of a sample that was never seen `given` is −1, `quality`, `score` and `unused` are NaN, and it is no issue;
    `predicted` is −1 where there is no averaged prediction.
    """

    is_issue: Tensor
    quality: Tensor
    given: Tensor
    predicted: Tensor
    score: Tensor
    visits: Tensor
    unused: Tensor


def find_issues(memory: Memory, share: float | None = None) -> Issues:
    """What a run knows of each label, from its memory alone.

    **Arguments:** `share`, of all samples, those of the lowest quality are issues; if it is not given, about as many
    as there are wrong labels.

    **Raises:** `RuntimeError` if there is nothing to tell yet; `ValueError` for a share out of range.
    """
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share={share!r} is not allowed: give a number in [0, 1], or None for a calibrated one.")
    rows = known_rows(memory)
    score = memory.table.score[:rows].cpu()
    given = torch.where(score.isnan(), -1, memory.given.known()[:rows].cpu().long())
    opinion = gather_opinion(memory, given)
    quality = label_quality(score, opinion, memory.config.pusher_name).masked_fill(given < 0, torch.nan)
    if share is not None:
        flagged = lowest(quality, round(share * int((given >= 0).sum())))
    else:
        flagged = estimate(memory, quality, given, opinion)
    visits, unused = (count[:rows].cpu() for count in memory.counted_visits())
    share_unused = unused / visits if memory.config.selects else torch.full_like(score, torch.nan)
    predicted = torch.full_like(given, -1) if opinion is None else opinion.predicted
    predicted = torch.where(given < 0, -1, predicted)
    return Issues(flagged, quality, given, predicted, score, visits, share_unused)


def known_rows(memory: Memory) -> int:
    """N, or if it is not known the largest index that was seen plus 1. **Raises:** `RuntimeError` if nothing was."""
    if not memory.ready:
        raise RuntimeError("FSR knows nothing yet: train for an epoch first.")
    if memory.scattered:
        raise RuntimeError(
            "In mid-epoch each process knows a part of the averaged predictions only: call consolidate() in all "
            "processes before, or ask when the epoch has ended."
        )
    return memory.num_samples or memory.largest + 1 or memory.table.num_samples


def averaged_probabilities(memory: Memory) -> Iterator[tuple[slice, Tensor]]:
    """The averaged predictions of all samples, some rows at a time: which they are, and (n, C) float32 that sum to 1.

    They are p̄ where labels are judged, else softmax(ŷ). Who was never seen has 1/C everywhere.
    """
    assert memory.pseudo is not None
    rows = known_rows(memory)
    for where, values in memory.pseudo.parts():
        where = slice(where.start, min(where.stop, rows))
        if where.start >= where.stop:
            return
        values = values[: where.stop - where.start]
        if memory.config.selects:
            values = distribution(values + (values.sum(1, keepdim=True) == 0))
        else:
            values = values.softmax(1)
        yield where, values.cpu()


def gather_opinion(memory: Memory, given: Tensor) -> Opinion | None:
    """What the averaged predictions say of the given labels (N,), −1 where there is none; None if there are none."""
    if memory.pseudo is None:
        return None
    columns = []
    for where, values in averaged_probabilities(memory):
        label = given[where, None].clamp(min=0)
        own = values.gather(1, label)
        columns.append((own[:, 0], values.scatter(1, label, 0).amax(1), values.argmax(1)))
    return Opinion(*(torch.cat(column) for column in zip(*columns, strict=True)))


def label_quality(score: Tensor, opinion: Opinion | None, pusher: str) -> Tensor:
    """How likely each label is right, in [0, 1], from P̂ and the averaged predictions. (N,) → (N,) float32."""
    scaled = {"area_under_margin": score.sigmoid(), "negative_loss": score.exp().clamp(max=1)}.get(pusher)
    if opinion is None:
        return _places(score) if scaled is None else scaled
    return opinion.own if scaled is None else (opinion.own + scaled) / 2


def estimate(memory: Memory, quality: Tensor, given: Tensor, opinion: Opinion | None) -> Tensor:
    """Which labels look wrong, (N,) bool, about as many as are."""
    if opinion is None:
        return quality < 0.5
    doubted = (opinion.predicted != given) & (given >= 0)
    selection = memory.selection
    if selection is None or not selection.estimated:
        return doubted
    share = float(selection.share[given[given >= 0]].double().sum())
    return doubted & lowest(quality, round(share))


def lowest(quality: Tensor, number: int) -> Tensor:
    """The `number` of lowest quality, NaN last, (N,) bool."""
    order = quality.nan_to_num(torch.inf).argsort(stable=True)
    return torch.zeros(len(quality), dtype=torch.bool).scatter_(0, order[:number], True)


def _places(score: Tensor) -> Tensor:
    """The place of each among all, as a share."""
    place = torch.empty_like(score)
    place[score.argsort(stable=True)] = torch.arange(len(score), dtype=score.dtype)
    return place / max(1, len(score) - 1)


def pred_probs(memory: Memory) -> ndarray:
    """See `FSRWrapper.pred_probs`."""
    rows = known_rows(memory)
    if memory.pseudo is None:
        raise RuntimeError(
            "No averaged predictions are kept with relabel_weight=0: pass a relabel_weight above 0, or "
            'weight_rule="select".'
        )
    out = torch.empty(rows, memory.pseudo.num_classes, dtype=torch.float32)
    for where, values in averaged_probabilities(memory):
        out[where] = values
    return out.numpy()


# --- as a table ------------------------------------------------------------------------------------------------------


def label_issues_from_memory(
    memory: Memory, share: float | None = None, class_names: Sequence[str] | None = None
) -> DataFrame:
    """The table of [`label_issues`][fsr_wrap.FSRWrapper.label_issues], from a memory alone, one that was saved say.

    **Raises:** as `label_issues`.
    """
    pandas = import_pandas()
    issues = find_issues(memory, share)
    columns: dict[str, Any] = {
        "is_label_issue": issues.is_issue.numpy(),
        "label_quality": issues.quality.numpy(),
        "given_label": _whole(pandas, issues.given),
        "predicted_label": _whole(pandas, issues.predicted),
    }
    names = check_class_names(memory, class_names)
    if names is not None:
        for column, label in (("given_name", issues.given), ("predicted_name", issues.predicted)):
            columns[column] = pandas.Categorical.from_codes(label.numpy(), categories=_distinct(names))
    columns["score"] = issues.score.numpy()
    columns["visits"] = issues.visits.numpy()
    columns["zero_weight"] = issues.unused.numpy()
    return pandas.DataFrame(columns, index=pandas.RangeIndex(len(issues.given), name="index"))


def check_class_names(memory: Memory, class_names: Sequence[str] | None) -> list[str] | None:
    """The names given, or the data set's own if there are C. **Raises:** `ValueError` if not C names are given."""
    if class_names is not None:
        if isinstance(class_names, str) or len(class_names) != memory.num_classes:
            raise ValueError(
                f"class_names={class_names!r} is not allowed: give {memory.num_classes} names, one of each class."
            )
        return [str(name) for name in class_names]
    own = memory.class_names
    return own if own is not None and len(own) == memory.num_classes else None


def import_pandas() -> Any:
    """pandas. **Raises:** `ImportError` saying how to get it."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("label_issues() needs pandas: pip install fsr_wrap[report]") from error
    return pandas


def _whole(pandas: Any, label: Tensor) -> Any:
    """Whole numbers, with <NA> for −1."""
    return pandas.arrays.IntegerArray(label.numpy().copy(), (label < 0).numpy())


def _distinct(names: list[str]) -> list[str]:
    """Names of which no two are the same."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
