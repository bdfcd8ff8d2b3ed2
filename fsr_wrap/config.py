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
WeightRule = Literal["clip", "shift", "uniform"]
Storage = Literal["float16", "int8"]


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not allowed: give {allowed}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class FSRConfig:
    """The hyper-parameters of FSR, frozen and checked.

    The default is the recipe that did best in this project's benchmarks on wrong labels (area-under-margin pusher,
    momentum re-labelling, cached reward features, no MixUp). [`FSRConfig.preset`][fsr_wrap.FSRConfig.preset] gives the
    rows of the paper's Table 4.

    **Arguments:**

    - `dictionary_size`: |R|, the number of training samples that stand in for clean reward data (Eq. 4). Each class
        gets `max(1, |R| // C)` of them.
    - `reward_batch_size`: q, the number of reward samples drawn a step, in all processes together.
    - `score_momentum`: λ in [0, 1), P̂ ← λP̂ + (1−λ)P (Section 4.1).
    - `lookahead_lr`: η, the step size of the look-ahead (Table 4: 0.1). 0 takes none, which is L2R's meta-gradient at
        ω₀ = 0; scores are then in units of η.
    - `weight_lr`: α, the step size of the weight update (Eq. 3). Under `weight_rule="clip"` it cancels in the
        normalisation.
    - `warmup_epochs`: E, epochs of plain training before re-weighting begins (Algorithm 1). The first epoch is always
        plain: there is no dictionary yet. The deferred schedule of Section 5.2 is E = 160 of 200. Lower it for short
        runs: of 5 epochs or fewer, none would be re-weighted at the default.
    - `weight_rule`: `"clip"`, u = max(0, score), for wrong labels (Eq. 2); `"shift"`, u = score − min(score) + 1/b, for
        long-tailed classes (Section 5.2); `"uniform"`, no re-weighting, to see what re-labelling does alone.
    - `pusher`: the valuation function P, a name in `fsr_wrap.pushers.PUSHERS` or a `Pusher`.
    - `reward`: `"cached"` takes the head's input feature as it passed by in training, `"fresh"` runs a no-grad
        forward of the stored inputs at every step. Same maths, see the docs for the costs.
    - `reward_every`: k, G is taken afresh every k steps, and used again in between: with a deep Θ^meta a step then
        costs little more than its forward-mode pass. 1 is the paper's.
    - `relabel_weight`: p, the multiplier of the re-labelling loss; 0 turns re-labelling and its N×C state off.
    - `relabel_momentum`: β in [0, 1), the weight of the **old** value in Eq. 7.
    - `relabel_temperature`: T > 0, the pseudo-label is softmax(ŷ / T).
    - `relabel_storage`: how ŷ is kept. `"float16"`: all C values, 2·C bytes a sample; `"int8"`: half of that; an
        integer K: the K largest values and the mean of the others, 4·K + 6 bytes a sample, for many classes.
    - `label_smoothing`: in [0, 1), for the weighted loss, the look-ahead and the reward loss alike.
    - `mixup_beta`: m = U^(1/β)/2 in [`FSRWrapper.mixup`][fsr_wrap.FSRWrapper.mixup]; 0.5 as in the released code.
    - `max_weight`: None, or the largest weight of a sample as a multiple of the uniform weight 1/b. A remedy when
        training diverges because few samples carry all the weight (`fsr/effective_sample_size` near 1).
    - `nonfinite`: `"raise"` stops at NaN or infinite logits or features with everything as it was, `"skip"` leaves
        such samples out of the loss, the scores and the dictionary, and counts them. A NaN that entered before the head
        still reaches the gradients in the backward pass: skip such steps as you would without FSR.
    - `compile`: whether a linear head's arithmetic is compiled (`torch.compile`): about 20 operations become a few. Has
        an effect in one process, at `reward_every=1`.
    - `seed`: of the wrapper's own random numbers; the global RNG streams are never touched.

    **Raises:** `ValueError` naming the field and the range that is allowed.
    """

    dictionary_size: int = 2000
    reward_batch_size: int = 200
    score_momentum: float = 0.9
    lookahead_lr: float = 0.1
    weight_lr: float = 1.0
    warmup_epochs: int = 5
    weight_rule: WeightRule = "clip"
    pusher: PusherName | Pusher = "area_under_margin"
    reward: Literal["cached", "fresh"] = "cached"
    reward_every: int = 1
    relabel_weight: float = 2.0
    relabel_momentum: float = 0.1
    relabel_temperature: float = 1.0
    relabel_storage: Storage | int = "float16"
    label_smoothing: float = 0.0
    mixup_beta: float = 0.5
    max_weight: float | None = None
    nonfinite: Literal["raise", "skip"] = "raise"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one: tuple[Callable[[Any], bool], str] = (lambda v: _is_int(v) and v >= 1, "an integer >= 1")
        natural: tuple[Callable[[Any], bool], str] = (lambda v: _is_int(v) and v >= 0, "an integer >= 0")
        below_one: tuple[Callable[[Any], bool], str] = (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)")
        positive: tuple[Callable[[Any], bool], str] = (lambda v: _is_number(v) and v > 0, "a number > 0")
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "dictionary_size": at_least_one,
            "reward_batch_size": at_least_one,
            "score_momentum": below_one,
            "lookahead_lr": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
            "weight_lr": positive,
            "warmup_epochs": natural,
            "weight_rule": (lambda v: v in ("clip", "shift", "uniform"), '"clip", "shift" or "uniform"'),
            "reward": (lambda v: v in ("cached", "fresh"), '"cached" or "fresh"'),
            "reward_every": at_least_one,
            "relabel_weight": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
            "relabel_momentum": below_one,
            "relabel_temperature": positive,
            "relabel_storage": (
                lambda v: v in ("float16", "int8") or (_is_int(v) and v >= 1),
                '"float16", "int8" or an integer >= 1',
            ),
            "label_smoothing": below_one,
            "mixup_beta": positive,
            "max_weight": (lambda v: v is None or (_is_number(v) and v >= 1), "None or a number >= 1"),
            "nonfinite": (lambda v: v in ("raise", "skip"), '"raise" or "skip"'),
            "compile": (lambda v: isinstance(v, bool), "True or False"),
            "seed": natural,
        }
        for name, (ok, allowed) in rules.items():
            value = getattr(self, name)
            _check(ok(value), name, value, allowed)
        known = isinstance(self.pusher, Pusher) or (isinstance(self.pusher, str) and self.pusher in PUSHERS)
        _check(known, "pusher", self.pusher, f"a Pusher or one of {', '.join(sorted(PUSHERS))}")

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
    def pusher_name(self) -> str:
        """The pusher as a string."""
        return self.pusher if isinstance(self.pusher, str) else type(self.pusher).__name__


class Overrides(TypedDict, total=False):
    """The fields of `FSRConfig` once more, for type checkers: what may be set otherwise by keyword."""

    dictionary_size: int
    reward_batch_size: int
    score_momentum: float
    lookahead_lr: float
    weight_lr: float
    warmup_epochs: int
    weight_rule: WeightRule
    pusher: PusherName | Pusher
    reward: Literal["cached", "fresh"]
    reward_every: int
    relabel_weight: float
    relabel_momentum: float
    relabel_temperature: float
    relabel_storage: Storage | int
    label_smoothing: float
    mixup_beta: float
    max_weight: float | None
    nonfinite: Literal["raise", "skip"]
    compile: bool
    seed: int


def check_names(overrides: Overrides) -> dict[str, Any]:
    """The overrides as they are, if each names a field of `FSRConfig`. **Raises:** `TypeError` if one does not."""
    names = [field.name for field in fields(FSRConfig)]
    for name in overrides:
        if name not in names:
            raise TypeError(f"FSRConfig has no field {name!r}; its fields are {', '.join(names)}.")
    return dict(overrides)


_LONG_TAIL: dict[str, Any] = {"weight_rule": "shift", "label_smoothing": 0.1, "relabel_weight": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "cifar_noise": {"dictionary_size": 2000, "reward_batch_size": 200},
    "webvision": {"dictionary_size": 5000, "reward_batch_size": 200, "relabel_weight": 1.0},
    "cifar_long_tailed": {"dictionary_size": 3000, "reward_batch_size": 800, **_LONG_TAIL},
    "inat2018": {"dictionary_size": 2000, "reward_batch_size": 350, **_LONG_TAIL},
    "cifar_long_tailed_noise": {"dictionary_size": 3000, "reward_batch_size": 200},
}
