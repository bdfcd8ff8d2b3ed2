"""Hyper-parameters of FSR, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from .pushers import PUSHERS, Pusher, get_pusher

if TYPE_CHECKING:
    from typing_extensions import Unpack

PusherName = Literal[
    "meta_margin", "authors_margin", "negative_loss", "area_under_margin", "max_margin", "forgetting_event"
]
PresetName = Literal["cifar_noise", "webvision", "cifar_long_tailed", "inat2018", "cifar_long_tailed_noise"]
WeightRule = Literal["select", "clip", "shift", "uniform"]
Storage = Literal["float16", "int8"]


def is_int(value: object) -> bool:
    """Whether it is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and which ones are
_POSITIVE_INT: _Rule = (lambda v: is_int(v) and v >= 1, "an integer >= 1")
_NATURAL: _Rule = (lambda v: is_int(v) and v >= 0, "an integer >= 0")
_BELOW_ONE: _Rule = (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)")
_NOT_NEGATIVE: _Rule = (lambda v: _is_number(v) and v >= 0, "a number >= 0")
_RULES: dict[str, _Rule] = {
    "dictionary_size": _POSITIVE_INT,
    "reward_batch_size": _POSITIVE_INT,
    "score_momentum": _BELOW_ONE,
    "class_balance": _NOT_NEGATIVE,
    "lookahead_lr": _NOT_NEGATIVE,
    "warmup_epochs": _NATURAL,
    "weight_rule": (lambda v: v in ("select", "clip", "shift", "uniform"), '"select", "clip", "shift" or "uniform"'),
    "reward": (lambda v: v in ("cached", "fresh"), '"cached" or "fresh"'),
    "reward_every": _POSITIVE_INT,
    "relabel_weight": _NOT_NEGATIVE,
    "relabel_momentum": _BELOW_ONE,
    "relabel_storage": (
        lambda v: v in ("float16", "int8") or (is_int(v) and v >= 1),
        '"float16", "int8" or an integer >= 1',
    ),
    "label_smoothing": _BELOW_ONE,
    "mixup_beta": (lambda v: _is_number(v) and v > 0, "a number > 0"),
    "nonfinite": (lambda v: v in ("raise", "skip"), '"raise" or "skip"'),
    "seed": _NATURAL,
    "pusher": (
        lambda v: isinstance(v, Pusher) or (isinstance(v, str) and v in PUSHERS),
        f"a Pusher or one of {', '.join(sorted(PUSHERS))}",
    ),
}


@dataclass(frozen=True, kw_only=True)
class FSRConfig:
    """The hyper-parameters of FSR, frozen and checked.

    The default asks for nothing but the training set, and is what did best in this project's benchmarks.
    [`FSRConfig.preset`][fsr_wrap.FSRConfig.preset] gives the rows of the paper's Table 4.

    **What to look at first:**

    - `weight_rule`: how samples are weighed. `"select"`, the default: all labels count alike until the network
        begins to learn them by heart, or knows the right ones, and then each as far as it is likely right (see the
        docs). The paper's rules need the reward data: `"clip"`, u = max(0, score), for wrong labels (Eq. 2); `"shift"`,
        u = score − min(score) + 1/b, for long-tailed classes (Section 5.2); `"uniform"`, no re-weighting, to see what
        re-labelling does alone.
    - `class_balance`: τ, the loss is that of the logits + τ log(share of the class) (Menon et al., ICLR 2021; 1 is the
        balanced softmax), under `"select"` up to twice that once right labels are learned by heart. Once labels are
        judged those of rare classes must be ahead by a margin as well (Cao et al., NeurIPS 2019). At 1 it trains for a
        test set in which every class counts the same; where yours has the training set's shares, pass 0. Without effect
        where classes are of one size.
    - `warmup_epochs`: E, epochs of plain training at least. Under the paper's rules re-weighting begins after them
        (Algorithm 1); the first epoch is always plain, as there is no dictionary yet, and the deferred schedule of
        Section 5.2 is E = 160 of 200. Under `"select"` the training itself tells when.
    - `relabel_weight`: under `"select"`, λ of the regulariser that pulls predictions to their average so far (ELR; Liu
        et al., NeurIPS 2020); 0 turns it off. Under the paper's rules p, the multiplier of the re-labelling loss; 0
        turns re-labelling and its N×C state off.

    **Memory:**

    - `relabel_storage`: how p̄ or ŷ is kept. `"float16"`: all C values, 2·C bytes a sample; `"int8"`: half of that; an
        integer K: the K largest values and the mean of the others, 4·K + 6 bytes a sample, for many classes.
    - `dictionary_size`: |R|, the number of training samples that stand in for clean reward data (Eq. 4). Each class
        gets `max(1, |R| // C)` of them.

    **What is averaged:**

    - `pusher`: the valuation function P, a name in `fsr_wrap.pushers.PUSHERS` or a `Pusher`; the higher, the likelier
        is the label right.
    - `score_momentum`: λ in [0, 1), P̂ ← λP̂ + (1−λ)P (Section 4.1).
    - `relabel_momentum`: β in [0, 1), the weight of the **old** value: in Eq. 7, and in p̄. The paper's is 0.1.

    **The paper's re-weighting:**

    - `reward_batch_size`: q, the number of reward samples drawn a step, in all processes together.
    - `lookahead_lr`: η, the step size of the look-ahead (Table 4: 0.1). 0 takes none, which is L2R's meta-gradient at
        ω₀ = 0; scores are then in units of η.
    - `reward`: `"cached"` takes the head's input feature as it passed by in training, `"fresh"` runs a no-grad
        forward of the stored inputs at every step. Same maths, see the docs for the costs.
    - `reward_every`: k, G is taken afresh every k steps, and used again in between: with a deep Θ^meta a step then
        costs little more than its forward-mode pass. 1 is the paper's.

    **Rarely:**

    - `label_smoothing`: in [0, 1), for the weighted loss, the look-ahead and the reward loss alike.
    - `mixup_beta`: m = U^(1/β)/2 in [`FSRWrapper.mixup`][fsr_wrap.FSRWrapper.mixup]; 0.5 as in the released code.
    - `nonfinite`: `"raise"` stops at NaN or infinite logits or features with everything as it was, `"skip"` leaves
        such samples out of the loss, the scores and the dictionary, and counts them. A NaN that entered before the head
        still reaches the gradients in the backward pass: skip such steps as you would without FSR.
    - `seed`: of the wrapper's own random numbers; the global RNG streams are never touched.

    **Raises:** `ValueError` naming the field and the range that is allowed.
    """

    weight_rule: WeightRule = "select"
    class_balance: float = 1.0
    warmup_epochs: int = 3
    relabel_weight: float = 3.0
    relabel_storage: Storage | int = "float16"
    dictionary_size: int = 2000
    pusher: PusherName | Pusher = "area_under_margin"
    score_momentum: float = 0.9
    relabel_momentum: float = 0.8
    reward_batch_size: int = 200
    lookahead_lr: float = 0.1
    reward: Literal["cached", "fresh"] = "cached"
    reward_every: int = 1
    label_smoothing: float = 0.0
    mixup_beta: float = 0.5
    nonfinite: Literal["raise", "skip"] = "raise"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (is_allowed, allowed) in _RULES.items():
            value = getattr(self, name)
            if not is_allowed(value):
                raise ValueError(f"{name}={value!r} is not allowed: give {allowed}.")

    @classmethod
    def preset(cls, name: PresetName, **overrides: Unpack[Overrides]) -> FSRConfig:
        """One row of the paper's Table 4, with Section 5's settings for its task.

        The numbers are Table 4's. The pusher is the area under the margin unless you pass another: without MixUp the
        paper's own margin picks the wrong samples (see the docs). For the paper's own recipe on wrong labels pass
        `pusher="authors_margin"` and mix with [`FSRWrapper.mixup`][fsr_wrap.FSRWrapper.mixup].

        **Arguments:**

        - `name`: `"cifar_noise"`, `"webvision"`, `"cifar_long_tailed"`, `"inat2018"` or `"cifar_long_tailed_noise"`.
        - `overrides`: fields to set otherwise.

        **Raises:** `ValueError` for an unknown name or a wrong value.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}: give one of {', '.join(sorted(PRESETS))}.")
        return cls(**{**PRESETS[name], **check_names(overrides)})

    def get_pusher(self) -> Pusher:
        """The valuation function itself."""
        return get_pusher(self.pusher)

    @property
    def selects(self) -> bool:
        """Whether given labels are judged, with no reward data."""
        return self.weight_rule == "select"

    @property
    def pusher_name(self) -> str:
        """The pusher as a string."""
        if isinstance(self.pusher, str):
            return self.pusher
        kind = type(self.pusher)
        return next((name for name, known in PUSHERS.items() if known is kind), kind.__name__)


class Overrides(TypedDict, total=False):
    """The fields of `FSRConfig` once more, for type checkers: what may be set otherwise by keyword."""

    weight_rule: WeightRule
    class_balance: float
    warmup_epochs: int
    relabel_weight: float
    relabel_storage: Storage | int
    dictionary_size: int
    pusher: PusherName | Pusher
    score_momentum: float
    relabel_momentum: float
    reward_batch_size: int
    lookahead_lr: float
    reward: Literal["cached", "fresh"]
    reward_every: int
    label_smoothing: float
    mixup_beta: float
    nonfinite: Literal["raise", "skip"]
    seed: int


def check_names(overrides: Overrides) -> dict[str, Any]:
    """The overrides as they are, if each names a field of `FSRConfig`. **Raises:** `TypeError` if one does not."""
    names = [field.name for field in fields(FSRConfig)]
    for name in overrides:
        if name not in names:
            raise TypeError(f"FSRConfig has no field {name!r}; its fields are {', '.join(names)}.")
    return dict(overrides)


_NOISE: dict[str, Any] = {
    "weight_rule": "clip",
    "class_balance": 0.0,
    "warmup_epochs": 5,
    "relabel_weight": 2.0,
    "relabel_momentum": 0.1,
}
_LONG_TAIL = {**_NOISE, "weight_rule": "shift", "label_smoothing": 0.1, "relabel_weight": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "cifar_noise": {**_NOISE, "dictionary_size": 2000, "reward_batch_size": 200},
    "webvision": {**_NOISE, "dictionary_size": 5000, "reward_batch_size": 200, "relabel_weight": 1.0},
    "cifar_long_tailed": {**_LONG_TAIL, "dictionary_size": 3000, "reward_batch_size": 800},
    "inat2018": {**_LONG_TAIL, "dictionary_size": 2000, "reward_batch_size": 350},
    "cifar_long_tailed_noise": {**_NOISE, "dictionary_size": 3000, "reward_batch_size": 200},
}
