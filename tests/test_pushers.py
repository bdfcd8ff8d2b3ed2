import math

import pytest
import torch
from helpers import CLIP, assert_close, slow_cross_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wrapper import digits, make

from fsr_wrap.pushers import LAST, NEVER, ONCE, PUSHERS, NegativeLoss, ScoreTable, Visit, get_pusher, is_first_visit


@pytest.fixture
def visit():
    learned = torch.tensor([NEVER, ONCE, LAST] * 20, dtype=torch.uint8)
    return Visit(torch.randn(60, 4), torch.randint(4, (60,)), torch.rand(60), torch.randn(60, 4), learned)


def loss_of(logits, label):
    return slow_cross_entropy(logits.double(), label)


def margin(logits, label):
    return torch.stack(
        [row[y] - max(row[c] for c in range(len(row)) if c != y) for row, y in zip(logits, label.tolist(), strict=True)]
    )


def certainty(logits):
    probabilities = [sorted(row.tolist()) for row in logits.double().exp() / logits.double().exp().sum(1, keepdim=True)]
    return torch.tensor([row[-1] - row[-2] for row in probabilities])


def forgetting(logits, label, learned):
    best = [max(range(len(row)), key=lambda c: row[c]) for row in logits.tolist()]
    wrong = [found != given for found, given in zip(best, label.tolist(), strict=True)]
    return torch.tensor([-1.0 if now and before != ONCE else 0.0 for now, before in zip(wrong, learned, strict=True)])


ORACLES = {
    "meta_margin": lambda v: loss_of(v.logits, v.label) - loss_of(v.lookahead_logits, v.label),
    "authors_margin": lambda v: v.loss - loss_of(v.lookahead_logits, v.label),
    "negative_loss": lambda v: -loss_of(v.logits, v.label),
    "area_under_margin": lambda v: margin(v.logits, v.label),
    "max_margin": lambda v: certainty(v.logits),
    "forgetting_event": lambda v: forgetting(v.logits, v.label, v.learned.tolist()),
}


@pytest.mark.parametrize("name", PUSHERS)
def test_pusher_against_its_oracle(name, visit):
    before = visit.logits.clone()
    pusher = get_pusher(name)
    assert_close(pusher(visit), ORACLES[name](visit), 1e-5)
    assert_close(visit.logits, before, 0.0)
    assert pusher.needs_lookahead == (name in ("meta_margin", "authors_margin"))
    assert pusher.needs_learned == (name == "forgetting_event")


def test_get_pusher_takes_a_pusher():
    pusher = NegativeLoss()
    assert get_pusher(pusher) is pusher
    with pytest.raises(KeyError):
        get_pusher("unknown")


def test_first_visit():
    index = torch.tensor([3, 1, 3, 2, 1, 3])
    assert is_first_visit(index).tolist() == [True, True, False, True, False, False]
    assert is_first_visit(torch.arange(5)).all()
    assert is_first_visit(torch.arange(0)).tolist() == []


# --- the table -------------------------------------------------------------------------------------------------------


def visit_all(table, index, score, epoch=0):
    rows, kept = table.update(torch.tensor(index), torch.tensor(score), epoch)
    assert rows.tolist() == [i if p > -math.inf else -1 for i, p in zip(index, kept.tolist(), strict=True)]
    return kept.tolist()


def test_first_visit_takes_the_score_and_later_ones_average():
    table = ScoreTable(3, momentum=0.75)
    assert visit_all(table, [2, 0], [4.0, -8.0], epoch=0) == [4.0, -8.0]
    assert visit_all(table, [2], [8.0], epoch=1) == [0.75 * 4 + 0.25 * 8]
    assert visit_all(table, [2], [1.0], epoch=2) == [0.75 * 5 + 0.25 * 1]
    state = table.state_dict()
    assert_close(state["score"], torch.tensor([-8.0, math.nan, 4.0]))
    assert state["epoch"].tolist() == [0, -1, 2]


def test_a_sample_counts_once_an_epoch_at_its_first_visit():
    table = ScoreTable(4, momentum=0.5)
    assert visit_all(table, [1], [8.0]) == [8.0]
    first = visit_all(table, [1, 3, 1], [100.0, 2.0, 4.0], epoch=1)
    assert first == [54.0, 2.0, -math.inf]
    assert table.is_new(torch.tensor([0, 1, 2, 3]), 1).tolist() == [True, False, True, False]
    assert visit_all(table, [3, 0], [9.0, 9.0], epoch=1) == [-math.inf, 9.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_or_has_no_index_leaves_no_trace(bad):
    table = ScoreTable(4, momentum=0.5)
    visit_all(table, [0], [1.0])
    before = table.state_dict()
    assert visit_all(table, [0, 1], [bad, bad], epoch=1) == [-math.inf] * 2
    assert visit_all(table, [-1, -1], [5.0, 5.0], epoch=1) == [-math.inf] * 2
    assert_close(table.state_dict(), before, 0.0)
    assert visit_all(table, [0, 0, 1], [bad, 2.0, 2.0], epoch=1) == [-math.inf, 1.5, 2.0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_table_against_a_dict_over_many_batches(data):
    samples, momentum = data.draw(st.integers(1, 12)), data.draw(st.floats(0, 0.99))
    table, twin = ScoreTable(samples, momentum), {}
    for epoch in range(data.draw(st.integers(1, 4))):
        for _ in range(data.draw(st.integers(0, 4))):
            number = st.floats(-1e3, 1e3) | st.sampled_from([math.nan, math.inf])
            rows = data.draw(st.lists(st.tuples(st.integers(-1, samples - 1), number), max_size=9))
            index, score = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [])
            _, kept = table.update(torch.tensor(index).long(), torch.tensor(score), epoch)
            for (i, p), momentary in zip(rows, kept.tolist(), strict=True):
                if i < 0 or not math.isfinite(p) or (i in twin and twin[i][1] == epoch):
                    assert momentary == -math.inf
                    continue
                old = twin[i][0] if i in twin else p
                twin[i] = (momentum * old + (1 - momentum) * p, epoch)
                assert momentary == pytest.approx(twin[i][0], rel=1e-5, abs=1e-2)
    missing = (math.nan, -1)
    columns = zip(*[twin.get(i, missing) for i in range(samples)], strict=True)
    expected = {name: torch.tensor(column) for name, column in zip(("score", "epoch"), columns, strict=True)}
    state = table.state_dict()
    assert_close(state.pop("score"), expected.pop("score"), 1e-2)
    assert_close(state, expected, 0.0)


def test_double_scores_are_kept_as_float():
    table = ScoreTable(2, 0.5)
    _, out = table.update(torch.tensor([0]), torch.tensor([0.1], dtype=torch.float64), 0)
    assert table.score.dtype == torch.float32
    assert_close(out, torch.tensor([0.1]))


def test_the_spare_row_is_not_seen():
    table = ScoreTable(3, 0.5)
    visit_all(table, [0, -1], [math.nan, 7.0])
    assert table.num_samples == 3
    assert all(len(column) == 3 for column in table.state_dict().values())
    table.grow(5)
    assert table.state_dict()["score"].isnan().all()
    assert (table.state_dict()["epoch"] == -1).all()


@pytest.mark.parametrize("held", [1, 3, 100])
def test_grow_keeps_what_was_there(held):
    table = ScoreTable(held, 0.5)
    visit_all(table, [held - 1, 0], [1.0, 3.0], epoch=4)
    before = table.state_dict()
    table.grow(held)
    assert table.num_samples == held
    table.grow(held + 1)
    assert table.num_samples == held + 1
    after = table.state_dict()
    assert_close({name: column[:held] for name, column in after.items()}, before, 0.0)
    assert after["score"][held:].isnan().all()
    assert (after["epoch"][held:] == -1).all()
    table.grow(1000)
    assert table.num_samples == 1000
    assert visit_all(table, [999, 0], [2.0, 5.0], epoch=5)[0] == 2.0


def test_a_table_of_no_samples_grows():
    table = ScoreTable(0, 0.5)
    table.grow(2)
    assert visit_all(table, [1], [2.0]) == [2.0]


def test_there_is_no_last_epoch():
    """Epochs are stored in 16 bits; a run of more of them goes on."""
    table = ScoreTable(1, 0.5)
    for epoch in (0, 1, 2**15 - 1, 2**15, 10**6, 10**6 + 1):
        assert visit_all(table, [0], [1.0], epoch=epoch) == [1.0]
        assert visit_all(table, [0], [1.0], epoch=epoch) == [-math.inf]


def test_state_round_trip():
    table = ScoreTable(4, 0.5)
    visit_all(table, [1, 2], [1.0, 2.0])
    state = table.state_dict()
    copy = ScoreTable(4, 0.5)
    copy.load_state_dict(state)
    assert_close(copy.state_dict(), state, 0.0)
    assert visit_all(copy, [1, 0], [3.0, 4.0], 1) == visit_all(table, [1, 0], [3.0, 4.0], 1) == [2.0, 4.0]
    assert_close(state["score"], torch.tensor([math.nan, 1.0, 2.0, math.nan]))  # a copy, not a view


# --- forgetting, over whole runs -------------------------------------------------------------------------------------


def forget(fsr, model, batches):
    """Trains, and gives what each visit found: index → right or not, at its first visit of each epoch."""
    x, y, _ = digits(0.3)
    visits = {}
    for index in batches:
        logits = model(x[index])
        for i, right in zip(index.tolist(), (logits.argmax(1) == y[index]).tolist(), strict=True):
            visits.setdefault(i, {}).setdefault(fsr.epoch, right)
        fsr.loss(logits, y[index], index).backward()
        fsr.step()
        fsr.zero_grad()
    return visits


def order(samples, epochs):
    generator = torch.Generator().manual_seed(3)
    return [i for _ in range(epochs) for i in torch.randperm(samples, generator=generator).split(50)]


def test_forgetting_over_a_run_against_a_slow_twin():
    model, fsr = make(norm=False, pusher="forgetting_event", score_momentum=0.75)
    samples = len(digits(0.3)[0])
    visits = forget(fsr, model, order(samples, 6))
    expected, states = [], []
    for i in range(samples):
        average, before, ever = None, False, False
        for right in visits[i].values():
            event = -1.0 if not right and (before or not ever) else 0.0
            average = event if average is None else 0.75 * average + 0.25 * event
            before, ever = right, ever or right
        expected.append(average)
        states.append(LAST if before else ONCE if ever else NEVER)
    assert_close(fsr.scores, torch.tensor(expected), 1e-6)
    state = fsr.state_dict()["fsr"]["table"]
    assert state["learned"].tolist() == states
    assert state["learned"].dtype == torch.uint8
    assert len(set(states)) == 3
    assert -1 < sorted(expected)[len(expected) // 2] <= 0


def test_forgetting_resumes_bit_for_bit(tmp_path):
    batches = order(len(digits(0.3)[0]), 4)
    model, fsr = make(norm=False, pusher="forgetting_event")
    stop = len(batches) // 2 - 3
    forget(fsr, model, batches[:stop])
    fsr.save(tmp_path)
    other, again = make(norm=False, pusher="forgetting_event")
    other.load_state_dict(model.state_dict())
    again.load(tmp_path)
    forget(fsr, model, batches[stop:])
    forget(again, other, batches[stop:])
    assert_close(again.state_dict()["fsr"], fsr.state_dict()["fsr"], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_only_forgetting_keeps_what_visits_found():
    batches = order(len(digits(0.3)[0]), 1)
    model, fsr = make(norm=False, **CLIP, pusher="max_margin")
    forget(fsr, model, batches)
    state = fsr.state_dict()
    assert set(state["fsr"]["table"]) == {"score", "epoch"}
    _, other = make(norm=False, **CLIP, pusher="forgetting_event")
    with pytest.raises(ValueError, match=r"pusher='max_margin', this run has 'forgetting_event'.*pass 'max_margin'"):
        other.load_state_dict(state)
    assert other.epoch == 0


def test_what_visits_found_moves_with_the_table_as_it_grows():
    table = ScoreTable(2, 0.5, learned=True)
    right = torch.tensor([True, False, True])
    table.update(torch.tensor([0, 1, -1]), torch.zeros(3), 0, right=right)
    table.update(torch.tensor([0, 1]), torch.zeros(2), 1, right=~right[:2])
    assert table.state_dict()["learned"].tolist() == [ONCE, LAST]
    table.grow(4)
    assert table.state_dict()["learned"].tolist() == [ONCE, LAST, NEVER, NEVER]
    table.update(torch.tensor([0, 0, 2]), torch.zeros(3), 1, right=torch.tensor([True, True, False]))
    assert table.state_dict()["learned"].tolist() == [ONCE, LAST, NEVER, NEVER]  # one visit an epoch counts
