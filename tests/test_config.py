import dataclasses
import math
import pickle
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from fsr_wrap import FSRConfig
from fsr_wrap.pushers import PUSHERS, AreaUnderMargin, AuthorsMargin, NegativeLoss

NAN, INF = math.nan, math.inf
AT_LEAST_ONE = "an integer >= 1", [0, -1, 2.0, True, "2", None]
NATURAL = "an integer >= 0", [-1, 0.5, True, "1", None]
BELOW_ONE = r"a number in \[0, 1\)", [1, 1.0, -0.1, NAN, INF, "0.5", None, True]
NOT_NEGATIVE = "a number >= 0", [-0.1, NAN, INF, "1", None, True]
POSITIVE = "a number > 0", [0, 0.0, -1, NAN, INF, "1", None, True]
WRONG = {
    "dictionary_size": AT_LEAST_ONE,
    "reward_batch_size": AT_LEAST_ONE,
    "score_momentum": BELOW_ONE,
    "lookahead_lr": NOT_NEGATIVE,
    "warmup_epochs": NATURAL,
    "class_balance": NOT_NEGATIVE,
    "weight_rule": ('"select", "clip", "shift" or "uniform"', ["Clip", "", None, 1]),
    "pusher": (
        "a Pusher or one of area_under_margin, authors_margin",
        ["margin", None, NegativeLoss, ["negative_loss"]],
    ),
    "reward": ('"cached" or "fresh"', ["Fresh", None, True]),
    "reward_every": AT_LEAST_ONE,
    "relabel_weight": NOT_NEGATIVE,
    "relabel_momentum": BELOW_ONE,
    "relabel_storage": ('"float16", "int8" or an integer >= 1', ["float32", 0, -1, 2.0, True, None]),
    "label_smoothing": BELOW_ONE,
    "mixup_beta": POSITIVE,
    "nonfinite": ('"raise" or "skip"', ["ignore", None, False]),
    "seed": NATURAL,
}
RIGHT = {
    "weight_rule": ["select", "clip", "shift", "uniform"],
    "class_balance": [0, 0.5, 2],
    "dictionary_size": [1],
    "reward_batch_size": [1],
    "score_momentum": [0, 0.999],
    "warmup_epochs": [0, 160],
    "relabel_weight": [0, 2],
    "lookahead_lr": [0, 0.5],
    "relabel_momentum": [0],
    "relabel_storage": ["float16", "int8", 1, 20],
    "label_smoothing": [0, 0.5],
    "pusher": ["negative_loss", NegativeLoss()],
    "seed": [0],
}


def test_every_field_is_checked():
    assert WRONG.keys() == {field.name for field in fields(FSRConfig)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, values) in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_with_its_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* is not allowed: give {WRONG[name][0]}"):
        FSRConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_a_value_at_the_edge_of_its_range_is_taken(name, value):
    assert getattr(FSRConfig(**{name: value}), name) == value


# Table 4: |R|, q, λ, η, β, p; the long-tailed rows have no re-labelling, and Section 5.2's rule. α is 1 in
# each, and no field.
TABLE_4 = {
    "cifar_noise": (2000, 200, 0.9, 0.1, 0.1, 2),
    "webvision": (5000, 200, 0.9, 0.1, 0.1, 1),
    "cifar_long_tailed": (3000, 800, 0.9, 0.1, None, 0),
    "inat2018": (2000, 350, 0.9, 0.1, None, 0),
    "cifar_long_tailed_noise": (3000, 200, 0.9, 0.1, 0.1, 2),
}


@pytest.mark.parametrize("name", TABLE_4)
def test_presets_are_table_4(name):
    config, row = FSRConfig.preset(name), TABLE_4[name]
    assert (config.dictionary_size, config.reward_batch_size, config.score_momentum) == row[:3]
    assert (config.lookahead_lr, config.relabel_weight) == (row[3], row[5])
    assert row[4] is None or config.relabel_momentum == row[4]
    assert (config.warmup_epochs, config.class_balance) == (5, 0)
    assert not config.selects
    long_tailed = row[4] is None
    assert config.weight_rule == ("shift" if long_tailed else "clip")
    assert config.label_smoothing == (0.1 if long_tailed else 0)


def test_preset_takes_overrides():
    config = FSRConfig.preset("cifar_noise", pusher="authors_margin", relabel_weight=0)
    assert (config.pusher, config.relabel_weight, config.dictionary_size) == ("authors_margin", 0, 2000)
    assert isinstance(config.get_pusher(), AuthorsMargin)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"no preset 'cifar': give one of cifar_long_tailed, .*webvision"):
        FSRConfig.preset("cifar")
    with pytest.raises(TypeError, match=r"no field 'momentum'; its fields are weight_rule, .*seed"):
        FSRConfig.preset("cifar_noise", momentum=0.9)
    with pytest.raises(ValueError, match="score_momentum=2 is not allowed"):
        FSRConfig.preset("cifar_noise", score_momentum=2)
    with pytest.raises(TypeError):
        FSRConfig(momentum=0.9)
    with pytest.raises(TypeError):
        FSRConfig(2000)


@pytest.mark.parametrize("name", ["weight_lr", "relabel_temperature", "max_weight", "compile"])
def test_fields_that_left_are_no_fields(name):
    with pytest.raises(TypeError, match=name):
        FSRConfig(**{name: 1})


def test_the_default_judges_labels_and_balances_classes():
    config = FSRConfig()
    assert config.selects
    assert (config.weight_rule, config.class_balance, config.warmup_epochs) == ("select", 1, 3)
    assert (config.relabel_weight, config.relabel_momentum) == (3, 0.8)
    assert [rule for rule in RIGHT["weight_rule"] if FSRConfig(weight_rule=rule).selects] == ["select"]


def test_frozen_checked_on_replace_and_picklable():
    config = FSRConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    with pytest.raises(ValueError, match="seed=-1"):
        dataclasses.replace(config, seed=-1)
    assert FSRConfig(**asdict(config)) == config == pickle.loads(pickle.dumps(config))
    assert isinstance(config.get_pusher(), AreaUnderMargin)
    pusher = NegativeLoss()
    assert FSRConfig(pusher=pusher).get_pusher() is pusher


def test_a_pusher_has_its_name_whether_it_is_given_by_it_or_made():
    for name, kind in PUSHERS.items():
        assert FSRConfig(pusher=kind()).pusher_name == FSRConfig(pusher=name).pusher_name == name
