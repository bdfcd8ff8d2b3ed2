"""The state file: round trips, damage, kills, and what a run takes up again from it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLIP, judge_soon, worker_warnings
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from test_wrapper import digits, make, snapshot, step, train
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from fsr_wrap import FSRWrapper, with_index
from fsr_wrap.state import read_state, write_state

FILES = ["fsr.json", "fsr.safetensors"]
quick = settings(max_examples=60, deadline=None, derandomize=True)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def exactly(value: Any) -> Any:
    """The value as something that compares by type and bit, keys and their order included."""
    if isinstance(value, Tensor):
        flat = value.new_empty(value.numel()).copy_(value.reshape(-1))
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return [(exactly(key), exactly(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [exactly(item) for item in value]
    return type(value), repr(value)


# --- save and load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
def test_save_and_load_without_pickle(build: Any, tmp_path: Path) -> None:
    models, wrappers = [], []
    for seed in (0, 5):
        model, fsr = make(seed=seed)
        fsr.optimizer = build(model.parameters(), lr=0.01)
        models.append(model)
        wrappers.append(fsr)
    train(models[0], wrappers[0], 2, 0.3, batch_size=48)
    wrappers[0].save(tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    wrappers[1].load(tmp_path)
    assert names(tmp_path) == FILES
    assert snapshot(models[0], wrappers[0]) == snapshot(models[1], wrappers[1])
    assert train(models[0], wrappers[0], 1, 0.3) == train(models[1], wrappers[1], 1, 0.3)


def test_a_note_for_people(tmp_path: Path) -> None:
    model, fsr = make(seed=3, **CLIP)
    fsr.save(tmp_path)
    note = json.loads((tmp_path / "fsr.json").read_text())
    assert (note["epoch"], note["num_classes"]) == (0, None)  # no batch has come yet
    train(model, fsr, 2)
    fsr.save(tmp_path)
    note = json.loads((tmp_path / "fsr.json").read_text())
    state = fsr.state_dict()["fsr"]
    assert note == {
        "format": "fsr_wrap",
        "version": state["version"],
        "num_samples": 400,
        "num_classes": 10,
        "config": state["config"],
        "world_size": state.get("world_size"),
        "epoch": 2,
    }
    (tmp_path / "fsr.json").write_text("nobody reads this")
    fsr.load(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_who_may_read_the_note_may_read_the_file(tmp_path: Path) -> None:
    write_state(tmp_path, {"a": torch.zeros(3)})
    (tmp_path / "other").touch()
    assert len({(tmp_path / name).stat().st_mode for name in [*FILES, "other"]}) == 1


def test_what_was_loaded_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = write_state(tmp_path, {"a": torch.arange(5000)})
    loaded = read_state(tmp_path)["a"]
    with open(path, "rb+") as file:
        file.seek(-40000, os.SEEK_END)
        file.write(b"\xff" * 40000)
    assert torch.equal(loaded, torch.arange(5000))


# --- saves that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        (object(), "strange is a object"),
        ({1, 2}, "strange is a set"),
        ({(1, 2): 3}, "strange has a tuple as one"),
        (torch.zeros(2).to_sparse(), "strange is a Tensor"),
        (TwoTensor(torch.zeros(2), torch.zeros(2)), "plain tensors; .*/strange is a TwoTensor"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_a_failed_save_keeps_the_last_one(strange: Any, message: str, tmp_path: Path) -> None:
    model, fsr = make()
    train(model, fsr, 1)
    fsr.save(tmp_path)
    kept = [(tmp_path / name).read_bytes() for name in FILES]
    fsr.param_groups[0]["strange"] = strange
    with pytest.raises(TypeError, match=message):
        fsr.save(tmp_path)
    assert names(tmp_path) == FILES
    assert [(tmp_path / name).read_bytes() for name in FILES] == kept


def test_a_full_disk_keeps_the_last_one(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    write_state(tmp_path, {"a": torch.zeros(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"fsr\.safetensors cannot be written"):
            write_state(tmp_path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == FILES
    assert len(read_state(tmp_path)["a"]) == 3


def fork_a_saver(folder: Path, states: list[dict[str, Any]]) -> int:
    """A child that saves the states in turn, without an end; its number."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads did not come along
            for state in itertools.cycle(states):
                write_state(folder, state)
        finally:
            os._exit(1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@worker_warnings
def test_a_save_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    states = {letter: {"letter": letter, "a": torch.full((300_000,), ord(letter))} for letter in "ABC"}
    expected = {letter: exactly(state) for letter, state in states.items()}
    chance = random.Random(0)
    found, killed_at_work = Counter[str](), 0
    for _ in range(20):
        write_state(tmp_path, states["C"])
        assert names(tmp_path) == FILES
        assert exactly(read_state(tmp_path)) == expected["C"]
        child = fork_a_saver(tmp_path, [states["A"], states["B"]])
        time.sleep(chance.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        loaded = read_state(tmp_path)
        assert exactly(loaded) == expected[loaded["letter"]]
        found[loaded["letter"]] += 1
        killed_at_work += names(tmp_path) != FILES
    assert found["A"] > 0
    assert found["B"] > 0
    assert killed_at_work > 0


# --- damage ----------------------------------------------------------------------------------------------------------


def parts(good: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes."""
    length = struct.unpack("<Q", good[:8])[0]
    return json.loads(good[8 : 8 + length]), good[8 + length :]


def whole(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip_bits(good: bytes, chance: random.Random) -> bytes:
    out = bytearray(good)
    for _ in range(chance.choice([1, 1, 3])):
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def overwrite(good: bytes, chance: random.Random) -> bytes:
    start, length = chance.randrange(len(good)), chance.choice([1, 8, 100, 5000])
    return (good[:start] + chance.randbytes(length) + good[start + length :])[: len(good)]


def truncate(good: bytes, chance: random.Random) -> bytes:
    return good[: chance.choice([chance.randrange(len(good)), chance.randrange(100), len(good) - 1])]


def extend(good: bytes, chance: random.Random) -> bytes:
    return good + bytes(chance.choice([1, 8, 1000]))


def header_size(good: bytes, chance: random.Random) -> bytes:
    sizes = [0, 1, 2, len(good), 10**8 - 1, 10**8, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
    near = struct.unpack("<Q", good[:8])[0] + chance.choice([-8, -1, 1, 8])
    return struct.pack("<Q", chance.choice([*sizes, near])) + good[8:]


def change_a_digit(good: bytes, chance: random.Random) -> bytes:
    """A number of the header, or of the JSON in it, becomes another."""
    length = struct.unpack("<Q", good[:8])[0]
    place = chance.choice([i for i in range(8, 8 + length) if chr(good[i]).isdigit()])
    return good[:place] + str((good[place] - 48 + chance.randrange(1, 10)) % 10).encode() + good[place + 1 :]


def exchange_fields(good: bytes, chance: random.Random) -> bytes:
    """Two tensors' offsets, dtypes, shapes or all of these change places."""
    header, data = parts(good)
    one, two = chance.sample([name for name in header if name != "__metadata__"], 2)
    for field in chance.choice([["data_offsets"], ["dtype"], ["shape"], ["dtype", "shape", "data_offsets"]]):
        header[one][field], header[two][field] = header[two][field], header[one][field]
    return whole(header, data)


def exchange_bytes(good: bytes, chance: random.Random) -> bytes:
    """Two tensors of one size change their contents."""
    header, data = parts(good)
    spans = [tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"]
    (a, b), (c, d) = chance.choice([(x, y) for x in spans for y in spans if x[1] - x[0] == y[1] - y[0] and x[1] < y[0]])
    return whole(header, data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])


def duplicate_a_key(good: bytes, chance: random.Random) -> bytes:
    header, data = parts(good)
    name = chance.choice(["__metadata__", *header])
    other = copy.deepcopy(header[chance.choice([key for key in header if key != "__metadata__"])])
    if name == "__metadata__":
        other = {**header[name], "fsr_wrap": header[name]["fsr_wrap"].replace("0", "1", 1)}
    twin, text = json.dumps({name: other})[1:-1], json.dumps(header)[1:-1]
    return whole("{" + ", ".join([twin, text] if chance.random() < 0.5 else [text, twin]) + "}", data)


def drop(good: bytes, chance: random.Random) -> bytes:
    """A tensor's entry, the metadata, or a part of the metadata is gone or another thing."""
    header, data = parts(good)
    place, key = chance.choice(
        [(header["__metadata__"], key) for key in header["__metadata__"]] * 20 + [(header, key) for key in header]
    )
    del place[key]
    if chance.random() < 0.5:
        place[key] = chance.choice(["", "{}", "null", "[" * 100_000, "1e999", {}, [], None, 3])
    return whole(header, data)


def strange_entry(good: bytes, chance: random.Random) -> bytes:
    """A tensor more, of a shape or dtype that cannot be."""
    header, data = parts(good)
    shape = chance.choice([[2**63, 0], [2**64 - 1, 0], [0, 2**40, 2**40], [2**62, 4], [-1], [1.5], [0] * 100_000, [0]])
    dtype = chance.choice(["F32", "F4", "F8_E8M0", "BOOL", "strange"])
    header[chance.choice(["more", "__metadata__ ", "\ud800"])] = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [len(data)] * 2,
    }
    return whole(header, data)


def write_otherwise(good: bytes, chance: random.Random) -> bytes:
    """The same content: blanks, another order of the header's keys, one more entry in the metadata."""
    header, data = parts(good)
    header["__metadata__"]["by"] = chance.randbytes(4).hex()
    return whole(json.dumps(dict(chance.sample(list(header.items()), len(header))), indent=chance.randrange(3)), data)


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bits,
    overwrite,
    truncate,
    extend,
    header_size,
    change_a_digit,
    exchange_fields,
    exchange_bytes,
    duplicate_a_key,
    drop,
    strange_entry,
    write_otherwise,
]


def is_refused(fsr: FSRWrapper, folder: Path) -> bool:
    try:
        fsr.load(folder)
    except ValueError as error:
        if "is damaged" not in str(error):
            raise
        return True
    return False


def peak_memory() -> int:
    """The most bytes that this process ever held."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_damage_is_noticed(tmp_path: Path) -> None:
    model, fsr = make()
    train(model, fsr, 2, 0.3)
    fsr.save(tmp_path)
    path = tmp_path / "fsr.safetensors"
    good, before, state = path.read_bytes(), snapshot(model, fsr), exactly(read_state(tmp_path))
    fsr.load(tmp_path)
    peak = peak_memory()
    chance = random.Random(0)
    loaded, refused = {m.__name__: 0 for m in MUTATIONS}, {m.__name__: 0 for m in MUTATIONS}
    for number in range(2000):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        path.unlink()  # cutting a file off and writing it anew makes some file systems wait for the disk
        path.write_bytes(mutate(good, chance))
        if is_refused(fsr, tmp_path):
            refused[mutate.__name__] += 1
        else:
            assert exactly(read_state(tmp_path)) == state, (number, mutate.__name__)
            loaded[mutate.__name__] += 1
        assert number % 20 or snapshot(model, fsr) == before
    assert snapshot(model, fsr) == before
    assert loaded.pop("write_otherwise") > 160
    assert sum(refused.values()) > 1600, (loaded, refused)  # what is not refused is harmless
    assert peak_memory() - peak < 200e6


def test_other_files_are_refused(tmp_path: Path) -> None:
    model, fsr = make()
    before = snapshot(model, fsr)
    with pytest.raises(FileNotFoundError, match="save"):
        fsr.load(tmp_path / "nowhere")
    for content in (
        b"",
        b"\x80\x04.",
        bytes(1000),
        b"\xff" * 1000,
        whole({}, b""),
        whole("[]", b""),
        whole("[" * 10**6, b""),
    ):
        (tmp_path / "fsr.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or not a file of save"):
            fsr.load(tmp_path)
    assert snapshot(model, fsr) == before


# --- any state -------------------------------------------------------------------------------------------------------

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
DTYPES += [torch.float32, torch.float64, torch.float8_e4m3fn]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, as any dtype; in one piece, a transposed, strided or repeated view."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    flat = torch.randint(256, (torch.Size(shape).numel(), dtype.itemsize), generator=generator, dtype=torch.uint8)
    flat = flat > 127 if dtype == torch.bool else flat.view(dtype)
    tensor = flat.reshape(shape)
    form = draw(st.sampled_from(["whole", "transposed", "strided", "repeated"]))
    if form == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.ndim))))
    if form == "strided" and tensor.ndim:
        return tensor[1::2]
    return tensor.expand(2, *shape) if form == "repeated" else tensor


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["a", "b", "a/b", "1"]) | st.integers(-2, 2), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@quick
@given(trees)
def test_any_tree_comes_back(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_state(folder, {"tree": tree})
        assert exactly(read_state(folder)) == exactly({"tree": tree})


def test_names_that_look_alike(tmp_path: Path) -> None:
    one = {"a/b": 0, "a": {"b": 1, "b'": 2}, "": {"a": {"b": 3}}, 1: 4, "1": 5, "__metadata__": 6}

    def fill(value: Any) -> Any:
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else torch.tensor(value)

    write_state(tmp_path, fill(one))
    assert exactly(read_state(tmp_path)) == exactly(fill(one))


# --- any run ---------------------------------------------------------------------------------------------------------

SAMPLES, KINDS = 20, 3
IMAGES = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(SAMPLES) % KINDS
batches = st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=10)
options = st.fixed_dictionaries(
    {
        "reward": st.sampled_from(["cached", "fresh"]),
        "weight_rule": st.sampled_from(["select", "clip", "shift"]),
        "relabel_weight": st.sampled_from([0.0, 2.0]),
    }
)


def small_run(seed: int, build: Any, **options: Any) -> tuple[nn.Module, FSRWrapper]:
    torch.manual_seed(seed)
    model = nn.Linear(4, KINDS)
    inner = build(model.parameters(), lr=0.05)
    options |= {"num_samples": SAMPLES, "dictionary_size": 6, "reward_batch_size": 4, "warmup_epochs": 1}
    return model, judge_soon(FSRWrapper(model, inner, **options), KINDS)


@pytest.mark.filterwarnings("ignore:FSR counts")  # among so few samples, chance may look like a loader's epoch
@settings(quick, max_examples=30)
@given(
    st.lists(batches, max_size=10),
    batches,
    options,
    st.sampled_from([torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]),
)
def test_any_run_goes_on(before: list[list[int]], after: list[int], options: dict[str, Any], build: Any) -> None:
    model, fsr = small_run(0, build, **options)
    for batch in before:
        step(model, fsr, IMAGES[batch], LABELS[batch], torch.tensor(batch))
    other_model, other = small_run(1, build, **options)
    with tempfile.TemporaryDirectory() as folder:
        fsr.save(folder)
        other.load(folder)
    other_model.load_state_dict(model.state_dict())
    assert snapshot(model, fsr) == snapshot(other_model, other)
    last = IMAGES[after], LABELS[after], torch.tensor(after)
    assert step(model, fsr, *last) == step(other_model, other, *last)
    assert snapshot(model, fsr) == snapshot(other_model, other)


# --- any data set ----------------------------------------------------------------------------------------------------


@quick
@given(st.data())
def test_the_index_always_means_the_same_sample(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30))
    rows: Any = TensorDataset(torch.arange(length) * 10)
    if data.draw(st.booleans()):
        rows = [(10 * i,) for i in range(length)]
    dataset = part = with_index(rows)
    positions = list(range(length))
    for _ in range(data.draw(st.integers(0, 3))):  # subsets of subsets, in any order, with repeats
        chosen = data.draw(st.lists(st.integers(-len(positions), len(positions) - 1), min_size=1, max_size=40))
        part, positions = Subset(part, chosen), [positions[i] for i in chosen]
    for _ in range(2):
        loader = DataLoader(part, batch_size=data.draw(st.integers(1, 7)), shuffle=data.draw(st.booleans()))
        samples = [(int(x), int(i)) for xs, indices in loader for x, i in zip(xs, indices, strict=True)]
        assert sorted(i for _, i in samples) == sorted(positions)
        assert all(x == 10 * i == dataset[i][0] for x, i in samples)


def test_stored_images_keep_their_memory_format(tmp_path: Path) -> None:
    """Convolutions round otherwise in the other format, and the run would not go on bit for bit."""
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        model = body.to(memory_format=torch.channels_last)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"dictionary_size": 6, "reward_batch_size": 5, **CLIP, "reward": "fresh"}
        runs.append((model, FSRWrapper(model, inner, num_samples=20, **options)))
    x, y = torch.randn(20, 3, 6, 6).contiguous(memory_format=torch.channels_last), torch.arange(20) % 3

    def train(model: nn.Module, fsr: FSRWrapper) -> list[float]:
        losses = []
        for index in torch.arange(20).split(5):
            losses.append(step(model, fsr, x[index], y[index], index))
        return losses

    (model, fsr), (other, resumed) = runs
    train(model, fsr)
    fsr.save(tmp_path)
    other.load_state_dict(model.state_dict())
    resumed.load(tmp_path)
    drawn = resumed.dictionary.draw(4, torch.Generator().manual_seed(0)).payload[0]
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    fsr.dictionary.draw(4, torch.Generator().manual_seed(0))
    assert train(model, fsr) == train(other, resumed)


@pytest.mark.parametrize("rule", [{}, CLIP])
@pytest.mark.parametrize("number", [400, 700])
def test_a_run_that_did_not_know_how_many_samples_there_are_goes_on_with_one_that_does(
    rule: dict[str, Any], number: int
) -> None:
    model, fsr = make(num_samples=None, **rule)
    for _ in range(3):
        train(model, fsr, 1, 0.3)
        fsr.end_epoch()
    assert len(fsr.scores) == 512
    other_model, other = make(num_samples=number, **rule)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(fsr.state_dict()))
    assert len(other.scores) == number
    assert torch.equal(other.scores[:400], fsr.scores[:400])
    assert_frame_equal(other.label_issues()[:400], fsr.label_issues(), rtol=1e-4)
    again = make(num_samples=number, **rule)[1]
    again.load_state_dict(other.state_dict())
    assert train(model, fsr, 1, 0.3) == train(other_model, other, 1, 0.3)
    with pytest.raises(ValueError, match="samples of up to index 399, this data set has 300"):
        make(num_samples=300, **rule)[1].load_state_dict(fsr.state_dict())


@pytest.mark.parametrize("rule", [{}, CLIP])
def test_a_run_that_knew_how_many_samples_there_are_goes_on_with_one_that_does_not(rule: dict[str, Any]) -> None:
    model, fsr = make(**rule)
    train(model, fsr, 3, 0.3)
    other_model, other = make(num_samples=None, **rule)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(fsr.state_dict()))
    x, y, _ = digits(0.3)
    index = torch.arange(50)
    assert step(model, fsr, x[index], y[index], index) == step(other_model, other, x[index], y[index], index)
    assert_frame_equal(other.label_issues(), fsr.label_issues())


@pytest.mark.parametrize("processes", [(1, 2), (2, 2), (2, 1)])
def test_metrics_do_not_depend_on_the_number_of_processes(
    processes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fsr = make()
    x, y, _ = digits()
    step(model, fsr, x[:50], y[:50], torch.arange(50))
    monkeypatch.setattr("fsr_wrap.memory.world_size", lambda: processes[0])
    state, told = copy.deepcopy(fsr.state_dict()), fsr.metrics()
    assert state["fsr"]["sizes"]
    other = make()[1]
    monkeypatch.setattr("fsr_wrap.memory.world_size", lambda: processes[1])
    other.load_state_dict(state)
    assert other.metrics() == pytest.approx(told)


def test_classes_of_other_names_are_noticed(tmp_path: Path) -> None:
    images, labels, _ = digits()

    def make_named(names: list[str]) -> FSRWrapper:
        dataset: Any = TensorDataset(images, labels)
        dataset.classes = names
        model = nn.Linear(64, 10)
        fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), dataset=with_index(dataset))
        fsr.loss(model(images[:50]), labels[:50], torch.arange(50))
        return fsr

    names = [f"class {number}" for number in range(10)]
    make_named(names).save(tmp_path)
    make_named(names).load(tmp_path)
    other = make_named(names[::-1])
    with pytest.warns(UserWarning, match="other names, 'class 0' in place of 'class 9' first"):
        other.load(tmp_path)
