"""Which labels are wrong: what a run knows of each sample, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import warn
from .memory import Memory
from .opinions import Opinion, averaged_probabilities, gather_opinion, known_rows, true_prior
from .selection import VISITS, WRONG
from .shares import rank_within

if TYPE_CHECKING:
    from numpy import ndarray
    from pandas import DataFrame


@dataclass(frozen=True)
class Evidence:
    """What speaks against each label, (N,) each, on the host: `quality` in [0, 1], NaN where nothing is known;
    `doubted`, whether another class is preferred; `confident`, whether it is with confidence."""

    quality: Tensor
    doubted: Tensor
    confident: Tensor


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
    log_prior = true_prior(memory)
    opinion = gather_opinion(memory, given, log_prior)
    evidence = weigh_evidence(memory, score, given, opinion, log_prior, calibrated=share is None)
    if share is not None:
        flagged = lowest(evidence.quality, round(share * int((given >= 0).sum())))
    elif is_too_early(memory):
        warn(
            f"After {memory.epoch} epochs FSR cannot tell yet how many labels are wrong, so none is flagged: train for "
            f"{VISITS} epochs at least, or pass the share that shall be flagged, label_issues(share=0.1) say.",
        )
        flagged = torch.zeros_like(given, dtype=torch.bool)
    else:
        flagged = judge(evidence, given, *early_estimate(memory, given))
    visits, unused = (count[:rows].cpu() for count in memory.counted_visits())
    share_unused = unused / visits if memory.config.selects else torch.full_like(score, torch.nan)
    predicted = torch.full_like(given, -1) if opinion is None else opinion.predicted
    predicted = torch.where(given < 0, -1, predicted)
    return Issues(flagged, evidence.quality, given, predicted, score, visits, share_unused)


def is_too_early(memory: Memory) -> bool:
    """Whether labels are to be judged, but nothing tells yet how many are wrong."""
    return memory.selection is not None and not memory.selection.estimated


def weigh_evidence(
    memory: Memory,
    score: Tensor,
    given: Tensor,
    opinion: Opinion | None,
    log_prior: Tensor | None = None,
    *,
    calibrated: bool,
) -> Evidence:
    """What speaks against each label: averaged predictions and P̂ where labels are judged, else P̂ where it has a scale
    that tells right from wrong, which ŷ of the last visit does less well.

    **Raises:** `ValueError` if it is to be `calibrated` and there is neither.
    """
    pusher, seen, selects = memory.config.pusher_name, given >= 0, memory.config.selects
    margin = score if opinion is None else score - opinion.against
    if log_prior is not None and opinion is not None:
        margin = margin + log_prior[given.clamp(min=0)] - log_prior[opinion.rival]
    scaled = {"area_under_margin": margin.sigmoid(), "negative_loss": score.exp().clamp(max=1)}.get(pusher)
    if opinion is not None and (selects or scaled is None):
        quality = opinion.own if scaled is None else (opinion.own + scaled) / 2
        doubted, confident = opinion.doubted, opinion.confident
    elif scaled is not None:
        quality, value = scaled, margin if pusher == "area_under_margin" else 2 * scaled - 1
        doubted = value < 0
        confident = value < -value[seen & ~doubted].mean()
    elif calibrated:
        raise ValueError(
            f"With pusher={pusher!r} and relabel_weight=0 nothing tells how many labels are wrong: pass the share that "
            "shall be flagged, label_issues(share=0.1) say."
        )
    else:
        quality = _places(score)
        doubted = confident = torch.zeros_like(seen)
    return Evidence(quality.masked_fill(~seen, torch.nan), doubted & seen, confident & seen)


# Which part of the doubted labels is doubted with confidence: from where on doubts tell something, and all of them do.
_GUESSES, _TELLING, _MOSTLY, _SURE = 0.27, 0.36, 0.65, 0.75
_OWN = 0.1  # of the confident doubts, those about right labels all the same
_EARLY = 0.02  # the share of wrong labels of which the early estimate finds half: below, it counts hard ones
_FORGOTTEN = 12  # epochs without its label, after which a network has forgotten what it learned by heart
_BY_HEART = 0.08, 0.16  # by how much more the network agrees with what it trains on, if it learned much by heart
_TOO_MUCH = 0.03  # by how much it agrees with more labels than are right, if so
_SPARED, _FEW = 0.1, 5  # of each class, the share and the number that is never flagged


def judge(evidence: Evidence, given: Tensor, early: float = 0.0, by_heart: float = 0.0, judged: bool = False) -> Tensor:
    """Which labels look wrong, (N,) bool, about as many as are.

    A network doubts wrong labels, and right ones that are hard for it; of the former it is confident more often. So
    where nearly all doubts are confident, all of them count; where fewer are, about as many as are confident; and
    where few are, none: the network is too weak to tell, or nothing is wrong. Those of lowest quality are flagged, but
    never the best of a class.

    **Arguments:** `early`, the share of wrong labels that was estimated before anything was learned by heart; it counts
    in place of fewer doubts as far as they are those of a network that learned by heart, `by_heart` in [0, 1];
    `judged`, whether training took as many for wrong: either number may then be too high or too low, and the share
    counts for half at least.
    """
    seen = given >= 0
    doubted, confident = (int(one.sum()) for one in (evidence.doubted, evidence.confident & evidence.doubted))
    part = confident / max(1, doubted)
    telling, sure, found = _ramp(part, _GUESSES, _TELLING), _ramp(part, _MOSTLY, _SURE), (1 - _OWN) * part
    now = doubted * telling * (found + (1 - found) * sure)
    more = int(seen.sum()) * (early if judged else early**2 / (early + _EARLY)) - now
    number = round(now + (max(by_heart, 0.5) * more if judged else by_heart * max(0.0, more)))
    flagged = lowest(evidence.quality + (~evidence.doubted).float(), number)
    size = torch.bincount(given[seen])
    spared = torch.maximum((size * _SPARED).long(), size.clamp(max=_FEW))
    flagged[seen] &= rank_within(-evidence.quality[seen], given[seen]) >= spared[given[seen]]
    return flagged


def early_estimate(memory: Memory, given: Tensor) -> tuple[float, float, bool]:
    """The share of wrong labels by the selection's own estimate, how far the network has learned them by heart, and
    whether labels are judged."""
    selection = memory.selection
    if selection is None or not selection.estimated:
        return 0.0, 0.0, False
    share = float(selection.share[given[given >= 0]].double().mean())
    agreement, outside = selection.agreement[-1] if selection.agreement else (0.0, 0.0)
    # It agrees with more labels than there are right ones.
    too_much = _ramp(agreement + share - 1, 0, _TOO_MUCH)
    if not selection.active:
        return share, max(too_much, _ramp(agreement - outside, *_BY_HEART)), False
    judged = memory.counted_visits()[1].cpu()[: len(given)][selection.code[:-1].cpu()[: len(given)] == WRONG]
    remembered = 1 - _ramp(float(judged.float().mean()) if len(judged) else 0.0, 0, _FORGOTTEN)
    return share, float(remembered ** (2 - too_much)), True


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def lowest(quality: Tensor, number: int) -> Tensor:
    """The `number` of lowest quality, NaN last, (N,) bool."""
    order = quality.nan_to_num(torch.inf).argsort(stable=True)
    return torch.zeros_like(quality, dtype=torch.bool).scatter_(0, order[:number], True)


def _places(score: Tensor) -> Tensor:
    """The place of each among all, as a share."""
    place = torch.empty_like(score)
    place[score.argsort(stable=True)] = torch.arange(len(score), dtype=score.dtype, device=score.device)
    return place / max(1, len(score) - 1)


def pred_probs(memory: Memory) -> ndarray:
    """See `FSRWrapper.pred_probs`."""
    rows = known_rows(memory)
    if memory.pseudo is None:
        raise RuntimeError(
            "No averaged predictions are kept with relabel_weight=0: pass a relabel_weight above 0, or "
            'weight_rule="select".'
        )
    log_prior = true_prior(memory)
    out = torch.empty(rows, memory.pseudo.num_classes, dtype=torch.float32)
    for where, values in averaged_probabilities(memory, log_prior):
        out[where] = values
    return out.numpy()


# --- as a table ------------------------------------------------------------------------------------------------------


def label_issues_from_memory(
    memory: Memory, share: float | None = None, class_names: Sequence[str] | Mapping[int, str] | None = None
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


def check_class_names(memory: Memory, class_names: Sequence[str] | Mapping[int, str] | None) -> list[str] | None:
    """The names given, or the data set's own if there are C. **Raises:** `ValueError` if not C names are given."""
    if class_names is not None:
        names: Any = class_names
        if isinstance(names, Mapping):  # a model's id2label
            names = [names.get(label) for label in range(len(names))]
        if isinstance(names, (str, Set)) or len(names) != memory.num_classes or None in names:
            raise ValueError(
                f"class_names={class_names!r} is not allowed: give {memory.num_classes} names, one of each class."
            )
        return [str(name) for name in names]
    own = memory.class_names
    return own if own is not None and len(own) == memory.num_classes else None


def import_pandas() -> Any:
    """pandas. **Raises:** `ImportError` saying how to get it."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError('label_issues() needs pandas: pip install "fsr_wrap[report]"') from error
    return pandas


def _whole(pandas: Any, label: Tensor) -> Any:
    """Whole numbers, with <NA> for −1."""
    return pandas.arrays.IntegerArray(label.numpy().copy(), (label < 0).numpy())


def _distinct(names: list[str]) -> list[str]:
    """Names of which no two are the same."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
