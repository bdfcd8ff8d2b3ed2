import io
import math
import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from helpers import SlowDictionary, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from fsr_wrap import RewardDictionary

quick = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Plan:
    """A small world: how many samples and classes, |R|, the buffer's length, the largest batch, how many epochs."""

    samples: int
    classes: int
    size: int
    buffer: int | None
    batch: int
    epochs: int
    seed: int

    def labels(self, rng: random.Random) -> list[int]:
        """Skewed, so that some classes have no sample, one or few."""
        return [min(int(rng.expovariate(1.0)), self.classes - 1) for _ in range(self.samples)]

    def batches(self, rng: random.Random, order: list[int]):
        while order:
            length = rng.randint(1, self.batch)
            yield order[:length]
            order = order[length:]


plans = st.builds(
    Plan,
    samples=st.integers(1, 60),
    classes=st.integers(1, 8),
    size=st.integers(1, 24),
    buffer=st.none() | st.integers(1, 12),
    batch=st.integers(1, 20),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)


def leave(index: list[int], visit: list[int]):
    """A payload that tells whose visit it is, and which."""
    i, v = torch.tensor(index), torch.tensor(visit)
    return torch.stack([i, v], 1), (1000.0 * i + v)[:, None, None].expand(-1, 2, 3)


def push(dictionary, index, label, score, visit) -> None:
    dictionary.push(torch.tensor(index), torch.tensor(label), torch.tensor(score), leave(index, visit))


def members(dictionary: RewardDictionary) -> dict[int, tuple]:
    """index → (label, score, visit) in the dictionary's order, the payloads looked at."""
    rows = dictionary._members.row[dictionary.slots >= 0]
    pairs, floats = (arena[rows] for arena in dictionary._arena)
    index, visit = dictionary.index.tolist(), pairs[:, 1].tolist()
    assert pairs[:, 0].tolist() == index
    assert_close(floats, leave(index, visit)[1].contiguous(), 0.0)
    entries = zip(dictionary.label.tolist(), dictionary.score.tolist(), visit, strict=True)
    found = dict(zip(index, entries, strict=True))
    assert len(found) == len(index) == len(dictionary)
    assert bool(dictionary) == bool(found)
    return found


def carry_mask(dictionary: RewardDictionary, visited) -> torch.Tensor:
    return torch.tensor([i >= 0 and i not in visited for i in dictionary.slots.tolist()])


# --- against a full sort ---------------------------------------------------------------------------------------------


@quick
@given(plan=plans, carry=st.booleans(), skip=st.booleans())
def test_the_dictionary_is_a_full_sort(plan, carry, skip):
    """Each sample at most once an epoch; scores with ties; old members compete on where they are carried."""
    rng = random.Random(plan.seed)
    dictionary = RewardDictionary(plan.classes, plan.size, buffer=plan.buffer)
    twin, labels, visits = SlowDictionary(plan.classes, plan.size), plan.labels(rng), 0
    for _ in range(plan.epochs):
        order = [i for i in range(plan.samples) if not skip or rng.random() < 0.6]
        rng.shuffle(order)
        for index in plan.batches(rng, order):
            score = [rng.choice([-math.inf, *(v / 4 for v in range(-4, 5))]) for _ in index]
            visit = list(range(visits, visits + len(index)))
            visits += len(index)
            push(dictionary, index, [labels[i] for i in index], score, visit)
            twin.push(index, [labels[i] for i in index], score, visit)
        dictionary.update(carry_mask(dictionary, twin.visited) if carry else None)
        twin.update(carry)
        if not visits:
            assert not dictionary
            continue
        assert list(members(dictionary).items()) == list(twin.members.items())


@quick
@given(plan=plans)
def test_scores_that_only_rise_are_a_full_sort_too(plan):
    rng = random.Random(plan.seed)
    dictionary = RewardDictionary(plan.classes, plan.size, buffer=plan.buffer)
    twin, labels = SlowDictionary(plan.classes, plan.size), plan.labels(rng)
    for epoch in range(plan.epochs):
        last = dict.fromkeys(range(plan.samples), 0.0)
        for visit in range(6):
            index = [rng.randrange(plan.samples) for _ in range(plan.batch)]
            for i in index:
                last[i] += rng.choice([0, 0, 0.25, 2])
            label, score = [labels[i] for i in index], [last[i] for i in index]
            push(dictionary, index, label, score, [10 * epoch + visit] * len(index))
            twin.push(index, label, score, [10 * epoch + visit] * len(index))
        dictionary.update()
        twin.update(carry=False)
        assert list(members(dictionary).items()) == list(twin.members.items())


@quick
@given(plan=plans)
def test_repeated_visits_with_any_scores(plan):
    rng = random.Random(plan.seed)
    dictionary = RewardDictionary(plan.classes, plan.size, buffer=plan.buffer)
    labels = plan.labels(rng)
    for epoch in range(plan.epochs):
        last = {}
        for visit in range(8):
            index = [rng.randrange(plan.samples) for _ in range(plan.batch)]
            scores = {i: rng.randint(-3, 3) / 2 for i in index}
            visit += 10 * epoch
            last.update({i: (labels[i], score, visit) for i, score in scores.items()})
            push(dictionary, index, [labels[i] for i in index], [scores[i] for i in index], [visit] * len(index))
        dictionary.update()
        found = members(dictionary)
        assert all(last[i] == entry for i, entry in found.items())
        visited = Counter(labels[i] for i in last)
        counts = {cls: min(n, dictionary.quota) for cls, n in visited.items()}
        assert Counter(label for label, _, _ in found.values()) == counts


@pytest.mark.parametrize("buffer", [3, 128, None])
def test_payloads_survive_many_epochs(buffer):
    """The arena is never written where an entry still points."""
    rng, n = random.Random(0), 300
    dictionary, twin = RewardDictionary(7, 60, buffer=buffer), SlowDictionary(7, 60)
    for epoch in range(12):
        order = rng.sample(range(n), 200)
        for start in range(0, 200, 32):
            index = order[start : start + 32]
            entry = index, [i % 7 for i in index], [rng.random() for _ in index], [epoch * n + i for i in index]
            entry[2][:] = torch.tensor(entry[2]).tolist()  # as float32 holds them
            push(dictionary, *entry)
            twin.push(*entry)
            if epoch:
                members(dictionary)  # still intact while the next epoch runs
        dictionary.update(carry_mask(dictionary, twin.visited))
        twin.update(carry=True)
        assert list(members(dictionary).items()) == list(twin.members.items())


def test_ties_go_to_the_lower_index():
    dictionary = RewardDictionary(1, 2)
    push(dictionary, [9, 4, 7], [0, 0, 0], [1.0, 1.0, 1.0], [0, 0, 0])
    dictionary.update()
    assert dictionary.index.tolist() == [4, 7]


def test_of_two_visits_in_a_batch_the_last_one_counts():
    dictionary = RewardDictionary(1, 2)
    push(dictionary, [3, 5, 3], [0, 0, 0], [9.0, 2.0, 1.0], [0, 1, 2])
    dictionary.update()
    assert members(dictionary) == {5: (0, 2.0, 1), 3: (0, 1.0, 2)}


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_sample_that_must_not_enter_does_not(bad):
    dictionary = RewardDictionary(2, 4)
    push(dictionary, [0, 1], [0, 1], [bad, bad], [0, 0])
    dictionary.update()
    assert not dictionary
    assert len(dictionary) == 0


def test_an_old_member_not_carried_is_gone():
    dictionary = RewardDictionary(2, 4)
    push(dictionary, [0, 1], [0, 1], [5.0, 5.0], [0, 0])
    dictionary.update()
    push(dictionary, [2], [0], [1.0], [1])
    dictionary.update(torch.tensor([False, False, True, False]))
    assert members(dictionary) == {2: (0, 1.0, 1), 1: (1, 5.0, 0)}
    dictionary.update()
    assert not dictionary


def test_the_quota_is_at_least_one():
    dictionary = RewardDictionary(50, 7)
    assert dictionary.quota == 1
    assert len(dictionary.slots) == 50


# --- drawing ---------------------------------------------------------------------------------------------------------


def filled(counts: list[int], size: int, seed: int = 0) -> RewardDictionary:
    """A dictionary of that many visited samples a class."""
    labels = [cls for cls, count in enumerate(counts) for _ in range(count)]
    dictionary = RewardDictionary(len(counts), size)
    push(dictionary, list(range(len(labels))), labels, torch.rand(len(labels)).tolist(), [0] * len(labels))
    dictionary.update(generator=torch.Generator().manual_seed(seed))
    return dictionary


@pytest.mark.parametrize("q", [5, 11, 64, 200])
def test_draws_are_balanced(q):
    dictionary = filled([30, 1, 8, 0, 3, 100], size=48)
    held = members(dictionary)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        batch = dictionary.draw(q, generator)
        counts = Counter(batch.label.tolist())
        assert counts.keys() == {0, 1, 2, 4, 5}
        assert max(counts.values()) - min(counts.values()) <= 1
        pairs, _ = batch.payload
        for i, label, (payload, visit) in zip(batch.index.tolist(), batch.label.tolist(), pairs.tolist(), strict=True):
            assert held[i][0] == label
            assert (payload, visit) == (i, 0)


def test_over_many_draws_classes_and_members_are_uniform():
    dictionary = filled([30, 2, 8], size=24)
    generator = torch.Generator().manual_seed(1)
    drawn = Counter(i for _ in range(300) for i in dictionary.draw(100, generator).index.tolist())
    assert drawn.keys() == set(dictionary.index.tolist())
    for index, label in zip(dictionary.index.tolist(), dictionary.label.tolist(), strict=True):
        expected = 10_000 / [8, 2, 8][label]
        assert abs(drawn[index] - expected) < 6 * math.sqrt(expected)


@pytest.mark.parametrize("q", [1, 3, 7, 16])
def test_classes_take_turns_where_q_is_small(q):
    classes = 17
    dictionary = filled([3] * classes, size=40)
    for _ in range(5):
        seen = Counter()
        for _ in range(math.ceil(classes / q)):
            batch = dictionary.draw(q)
            assert len(set(batch.label.tolist())) == q
            seen.update(batch.label.tolist())
        assert len(seen) == classes


def test_the_order_of_turns_comes_from_the_generator():
    orders = [filled([3] * 17, size=40, seed=seed).draw(17).label.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_draws_are_reproducible_and_leave_the_global_stream_alone():
    dictionary = filled([20, 20], size=40)
    state = torch.get_rng_state()
    one, two, three = (dictionary.draw(10, torch.Generator().manual_seed(s)).index.tolist() for s in (3, 3, 4))
    assert one == two != three
    assert_close(torch.get_rng_state(), state, 0.0)


def test_an_empty_dictionary_draws_nothing():
    dictionary = RewardDictionary(3, 6)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"empty.*update"):
            dictionary.draw(4)
        push(dictionary, [0], [1], [1.0], [0])
    dictionary.update()
    assert dictionary.draw(4).index.tolist() == [0] * 4


# --- memory, shapes, state -------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_data_set():
    sizes = []
    for n in (256, 20_000):
        dictionary = RewardDictionary(10, 1000)
        for start in range(0, n, 256):
            index = torch.arange(start, start + 256)
            dictionary.push(index, index % 10, torch.rand(256), (torch.zeros(256, 3),))
        dictionary.update()
        sizes.append(dictionary.nbytes)
        assert dictionary._arena[0].shape[0] <= 2.25 * 1000 + 128
    assert sizes[0] == sizes[1]


def test_payloads_of_another_shape_are_refused():
    dictionary = RewardDictionary(2, 4)
    dictionary.check_payload((torch.zeros(3, 5),))
    dictionary.push(torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.ones(3), (torch.zeros(3, 5),))
    dictionary.check_payload((torch.zeros(8, 5),))
    for payload in [(torch.zeros(3, 6),), (torch.zeros(3, 5), torch.zeros(3))]:
        with pytest.raises(ValueError, match=r"shapes \[\(5,\)\] a sample, this batch has \[.*Pad to one shape"):
            dictionary.push(torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.ones(3), payload)
    dictionary.update()
    assert dictionary.index.tolist() == [0, 1]


def test_payloads_are_kept_in_the_widest_dtype_that_came():
    dictionary = RewardDictionary(1, 2)
    for i, dtype in enumerate([torch.bfloat16, torch.float32]):
        dictionary.push(torch.tensor([i]), torch.tensor([0]), torch.ones(1), (torch.full((1, 2), 3.0, dtype=dtype),))
    dictionary.update()
    (payload,) = dictionary.draw(4).payload
    assert payload.dtype == torch.float32
    assert payload.eq(3).all()


def test_stored_payloads_do_not_follow_the_users_tensors():
    dictionary, features = RewardDictionary(1, 2), torch.ones(2, 3)
    dictionary.push(torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.ones(2), (features,))
    features.zero_()
    dictionary.update()
    assert dictionary.draw(2).payload[0].eq(1).all()


def test_state_round_trip_mid_epoch():
    rng = random.Random(0)

    def batches(epoch):
        order = rng.sample(range(80), 80)
        for start in range(0, 80, 9):
            index = order[start : start + 9]
            yield index, [i % 5 for i in index], [rng.random() for _ in index], [epoch] * len(index)

    dictionary = RewardDictionary(5, 20, buffer=20)
    for batch in batches(0):
        push(dictionary, *batch)
    dictionary.update(generator=torch.Generator().manual_seed(0))
    rest = list(batches(1))
    for batch in rest[:4]:
        push(dictionary, *batch)
    dictionary.draw(3)  # leaves the turn in the middle

    file = io.BytesIO()
    torch.save(dictionary.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    copy = RewardDictionary.from_state_dict(state)
    drawn = []
    for run in (dictionary, copy):
        generator, batches_drawn = torch.Generator().manual_seed(1), []
        for batch in rest[4:]:
            push(run, *batch)
            batches_drawn.append(run.draw(7, generator))
        run.update(torch.zeros(20, dtype=torch.bool), generator)
        batches_drawn.append(run.draw(7, generator))
        drawn.append([(batch.index, batch.label, batch.payload) for batch in batches_drawn])
    assert_close(drawn[0], drawn[1], 0.0)
    assert members(copy) == members(dictionary)
    assert_close(copy.state_dict(), dictionary.state_dict(), 0.0)
    again = RewardDictionary.from_state_dict(state).state_dict()  # neither run wrote into the state
    assert_close(again, torch.load(io.BytesIO(file.getvalue()), weights_only=True), 0.0)


def test_moving_keeps_everything():
    dictionary = filled([5, 5], size=6)
    before, held = dictionary.state_dict(), members(dictionary)
    dictionary.to(torch.device("cpu"))
    assert dictionary.device.type == "cpu"
    assert members(dictionary) == held
    assert_close(dictionary.state_dict(), before, 0.0)
