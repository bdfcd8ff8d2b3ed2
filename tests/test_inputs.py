"""What models are called with: several tensors, dicts, masks, integers; and classes that a mask shuts."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CLIP, assert_close, judge_soon, slow_meta_step
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification

from fsr_wrap import FSRWrapper
from fsr_wrap.relabel import PseudoLabels

N, B, Q, T, C, WORDS = 48, 12, 10, 6, 4, 20
SELECT = {"weight_rule": "select", "class_balance": 1.0, "relabel_weight": 3.0, "relabel_momentum": 0.8}
RANDOM = torch.Generator().manual_seed(5)
WORD = torch.randint(1, WORDS, (N, T), generator=RANDOM)
MASK = torch.arange(T) < torch.randint(2, T + 1, (N, 1), generator=RANDOM)
SIDE = torch.randn(N, 3, generator=RANDOM, dtype=torch.float64)
Y = torch.randint(C, (N,), generator=RANDOM)


class Reader(nn.Module):
    """A bag of words under a mask, beside numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 5)
        self.body = nn.Linear(8, 6)
        self.fc = nn.Linear(6, C)

    def read(self, word: Tensor, mask: Tensor, side: Tensor, scale: Any = 1.0) -> Tensor:
        assert word.dtype == torch.int64
        assert mask.dtype == torch.bool
        pooled = (self.embedding(word) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.fc(self.body(torch.cat([pooled, side * scale], 1)).tanh())

    def forward(self, *args: Any, batch: Any = None, **kwargs: Any) -> Any:
        if batch is not None or (args and not isinstance(args[0], Tensor)):
            batch = args[0] if batch is None else batch
            return {"logits": self.read(**batch, **kwargs) if isinstance(batch, dict) else self.read(*batch)}
        return self.read(*args, **kwargs)


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "by position": lambda model, i: model(WORD[i], MASK[i], SIDE[i]),
    "by keyword": lambda model, i: model(side=SIDE[i], word=WORD[i], mask=MASK[i], scale=0.5),
    "both": lambda model, i: model(WORD[i], MASK[i], side=SIDE[i], scale=torch.tensor(0.5)),
    "a dict": lambda model, i: model({"mask": MASK[i], "word": WORD[i], "side": SIDE[i]}),
    "a dict by keyword": lambda model, i: model(batch={"mask": MASK[i], "word": WORD[i], "side": SIDE[i]}),
    "a list": lambda model, i: model([WORD[i], MASK[i], SIDE[i]]),
}


def wrap(model: nn.Module, head: Any, **options: Any) -> FSRWrapper:
    recipe = {**CLIP, "dictionary_size": 16, "reward_batch_size": Q, "relabel_weight": 0.0, **options}
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    return FSRWrapper(model, inner, head, num_samples=N, **recipe)


def make(head: Any = "all", **options: Any) -> tuple[Reader, FSRWrapper]:
    torch.manual_seed(1)
    model = Reader().double()
    return model, judge_soon(wrap(model, head, **options), C)


def train(model: nn.Module, fsr: FSRWrapper, call: Callable[..., Any], first: int = 0) -> None:
    for index in torch.arange(N).roll(first).split(B):
        fsr.loss(call(model, index), Y[index], index).backward()
        fsr.step()
        fsr.zero_grad()


def watch_draws(fsr: FSRWrapper, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Tensor, Tensor]]:
    """Afterwards: the dataset indices and labels of the last reward batch."""
    memory = fsr._memory
    drawn: list[Tensor] = []
    draw = memory.reward_batch

    def noted() -> Any:
        label, payload = draw()
        assert memory.plan is not None
        drawn[:] = [fsr.dictionary.slots[memory.plan[0, memory.planned - 1]], label]
        return label, payload

    monkeypatch.setattr(memory, "reward_batch", noted)
    return lambda: (drawn[0], drawn[1])


def assert_slow(
    model: nn.Module, fsr: FSRWrapper, call: Callable[..., Any], chosen: Callable[[str], bool], draws: Any, lr: float
) -> None:
    """The weights of a batch are those of the slow twin, which calls the model on the samples of the data set."""
    index = torch.arange(7, 7 + B)
    params = {name: p for name, p in model.named_parameters() if chosen(name)}

    def forward(params: dict[str, Tensor], at: Tensor) -> Tensor:
        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, params, args, kwargs)

        out = call(run, at.long())
        return out if isinstance(out, Tensor) else out["logits"]

    fsr.loss(call(model, index), Y[index], index)
    where, label = draws()
    batch, reward = (index.double(), Y[index]), (where.double(), label)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = slow_meta_step(forward, params, batch, reward, lr=lr)[0].clamp(min=0)
    assert 0 < (expected > 0).sum() < B
    assert_close(fsr.weights, expected / expected.sum(), 1e-6)


@pytest.mark.parametrize("reward", ["cached", "fresh"])
@pytest.mark.parametrize(
    ("head", "chosen"), [("all", lambda name: True), (["embedding", "fc"], lambda name: name.startswith(("emb", "fc")))]
)
@pytest.mark.parametrize("how", CALLS)
def test_a_deep_head_takes_what_the_model_takes(
    how: str, head: Any, chosen: Callable[[str], bool], reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fsr = make(head, reward=reward, lookahead_lr=0.3)
    draws = watch_draws(fsr, monkeypatch)
    train(model, fsr, CALLS[how])
    assert_slow(model, fsr, CALLS[how], chosen, draws, 0.3)
    assert sorted(str(column.dtype) for column in fsr.dictionary._arena) == [
        "torch.bool",
        "torch.float64",
        "torch.int64",
    ]


@pytest.mark.parametrize("how", CALLS)
def test_fresh_features_of_what_the_model_takes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fsr = make("fc", reward="fresh", lookahead_lr=0.3)
    draws = watch_draws(fsr, monkeypatch)
    train(model, fsr, CALLS[how])
    assert_slow(model, fsr, CALLS[how], lambda name: name.startswith("fc"), draws, 0.3)


def bert(**more: Any) -> nn.Module:
    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=WORDS, num_labels=C, max_position_embeddings=T, **sizes, **more)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config).double()


@pytest.mark.parametrize("reward", ["cached", "fresh"])
@pytest.mark.parametrize("labels", [False, True])
def test_bert(labels: bool, reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: Any, i: Tensor) -> Any:
        more = {"labels": Y[i]} if labels else {}
        return model(input_ids=WORD[i], attention_mask=MASK[i].long(), **more)

    model = bert()
    fsr = wrap(model, "all", reward=reward, lookahead_lr=0.3)
    draws = watch_draws(fsr, monkeypatch)
    train(model, fsr, call)
    assert_slow(model, fsr, call, lambda name: True, draws, 0.3)


@pytest.mark.parametrize("options", [SELECT, {"relabel_weight": 1.0}, {"relabel_weight": 1.0, "reward": "fresh"}])
def test_mixed_inputs_beside_others(options: dict[str, Any]) -> None:
    """The clean forward puts the clean numbers in their place, and leaves words and masks."""
    model, fsr = make(**options, score_momentum=0.0, pusher="negative_loss")
    fsr.loss(model(WORD[:B], MASK[:B], side=SIDE[:B]), Y[:B], torch.arange(B)).backward()  # tells the number of classes
    for index in [torch.arange(B, N), *torch.arange(N).split(B)]:
        side, target = fsr.mixup(SIDE[index], Y[index])
        fsr.loss(model(WORD[index], MASK[index], side=side), target, index).backward()
        clean = model(WORD[index], MASK[index], side=SIDE[index]).detach()
        fsr.step()
        fsr.zero_grad()
    assert fsr.is_reweighting
    assert_close(fsr.scores[index], -nn.functional.cross_entropy(clean, Y[index], reduction="none"), 1e-6)
    if options is SELECT:
        assert not fsr.dictionary._arena
        return
    held = fsr.dictionary.draw(8, torch.Generator().manual_seed(0))
    assert_close(list(held.payload), [WORD[held.index], MASK[held.index], SIDE[held.index]], 0.0)


@pytest.mark.parametrize("options", [SELECT, {"pusher": "meta_margin", "relabel_weight": 1.0}])
def test_resumes_and_is_copied(options: dict[str, Any]) -> None:
    call = CALLS["both"]
    model, fsr = make(**options)
    train(model, fsr, call)
    other, resumed = make(**options)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(fsr.state_dict()))
    twin, copied = pickle.loads(pickle.dumps((model, fsr)))
    for one in ((model, fsr), (other, resumed), (twin, copied)):
        train(*one, call, first=5)
    for one in (other, twin):
        assert_close(list(one.parameters()), list(model.parameters()), 0.0)


def test_samples_left_out_leave_the_others_alone() -> None:
    """Infinite masks are no error; a sample of NaN is skipped, also where its tokens cannot be zeros."""

    class Additive(Reader):
        def forward(self, word: Tensor, bias: Tensor, side: Tensor) -> Tensor:
            pooled = (bias.softmax(1)[..., None] * self.embedding(word)).sum(1)
            return self.fc(self.body(torch.cat([pooled, side], 1)).tanh())

    def call(model: nn.Module, i: Tensor) -> Tensor:
        bias = torch.zeros(N, T, dtype=torch.float64).masked_fill(~MASK, -torch.inf)
        side = torch.where(torch.arange(N)[:, None] == 7, torch.nan, SIDE) if spoilt else SIDE
        return model(WORD[i], bias[i], side[i])

    spoilt = False
    torch.manual_seed(1)
    model = Additive().double()
    fsr = wrap(model, "all", nonfinite="skip")
    train(model, fsr, call)
    spoilt = True
    logits = call(model, torch.arange(B))
    assert logits.isnan().any(1).nonzero().flatten().tolist() == [7]
    loss = fsr.loss(logits, Y[:B], torch.arange(B))
    assert loss.isfinite()
    assert fsr.weights[7] == 0
    assert_close(fsr.weights.sum(), 1.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch.compile itself
@pytest.mark.parametrize("reward", ["cached", "fresh"])
def test_a_compiled_model(reward: str) -> None:
    torch._dynamo.reset()

    class Plain(Reader):
        def forward(self, word: Tensor, mask: Tensor, side: Tensor) -> Tensor:
            return self.read(word, mask, side)

    def call(model: nn.Module, i: Tensor) -> Tensor:
        return model(WORD[i], MASK[i], side=SIDE[i])

    runs = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model: nn.Module = Plain().double()
        fsr = wrap(model, "all", reward=reward)
        model = torch.compile(model, backend="eager") if compiled else model
        train(model, fsr, call)
        train(model, fsr, call)
        runs.append(list(model.parameters()))
    assert_close(runs[0], runs[1], 1e-9)


def test_a_compiled_step() -> None:
    """`loss()` is left out of the graphs, so that there is one, of the model."""
    torch._dynamo.reset()
    x, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 4
    runs = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), 0.1), num_samples=40)

        def forward(index: Tensor, model: nn.Module = model, fsr: FSRWrapper = fsr) -> Tensor:
            return fsr.loss(model(x[index]), y[index], index)

        graphs: list[Any] = []

        def count(graph: Any, _: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph

        step = torch.compile(forward, backend=count) if compiled else forward
        for _ in range(3):
            for index in torch.arange(40).split(10):
                step(index).backward()
                fsr.step()
                fsr.zero_grad()
        runs.append([*model.parameters(), fsr.scores])
        assert len(graphs) == compiled
    assert_close(runs[0], runs[1], 1e-9)


# --- what cannot be kept ---------------------------------------------------------------------------------------------


class Bag(UserDict):  # as transformers' BatchEncoding
    pass


@dataclasses.dataclass
class Record:
    word: Tensor
    mask: Tensor
    side: Tensor


class Object:
    def __init__(self, i: Tensor) -> None:
        self.word, self.mask, self.side = WORD[i], MASK[i], SIDE[i]


class Unpacking(Reader):
    def forward(self, batch: Any, *others: Any) -> Tensor:
        if isinstance(batch, Bag):
            return self.read(**batch)
        return self.read(batch.word, batch.mask, batch.side)


@pytest.mark.parametrize(("head", "reward"), [("all", "cached"), (["body", "fc"], "cached"), ("fc", "fresh")])
@pytest.mark.parametrize("kind", ["Bag", "Record", "Object"])
def test_containers_that_hide_their_tensors_are_refused(kind: str, head: Any, reward: str) -> None:
    batches = {
        "Bag": lambda i: Bag(word=WORD[i], mask=MASK[i], side=SIDE[i]),
        "Record": lambda i: Record(WORD[i], MASK[i], SIDE[i]),
        "Object": Object,
    }
    torch.manual_seed(1)
    model = Unpacking().double()
    fsr = wrap(model, head, reward=reward)
    index = torch.arange(B)
    for more in ((), (SIDE[index],)):  # also beside a tensor that is seen
        with pytest.raises(
            ValueError, match=rf"called with a {kind}, .* does not see the tensors in it: call model\(\*\*"
        ):
            fsr.loss(model(batches[kind](index), *more), Y[index], index)
    assert fsr._memory.consumed == 0
    for rule in ({}, {**SELECT, "reward": "fresh"}):
        fsr = wrap(model, "fc", **rule)  # the head's own input is all that is kept, or nothing at all
        fsr.loss(model(batches[kind](index)), Y[index], index)


@pytest.mark.parametrize(("head", "reward"), [("all", "cached"), ("fc", "fresh")])
def test_packed_sequences_are_refused(head: str, reward: str) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc = nn.Embedding(WORDS, 5), nn.Linear(5, C)

        def forward(self, word: Tensor, start: Tensor, side: Any = 0) -> Tensor:
            before = torch.cat([torch.zeros(1, 5), self.embedding(word).cumsum(0)])[start]
            return self.fc(before.diff(dim=0) + (side if isinstance(side, int) else side.sum(1, keepdim=True)))

    def packed(index: Tensor) -> tuple[Tensor, Tensor]:
        start = torch.cat([torch.zeros(1, dtype=torch.int64), MASK[index].sum(1).cumsum(0)])
        return WORD[index][MASK[index]], start

    first, second = torch.arange(B), torch.arange(B, 2 * B)
    model = Packed()
    fsr = wrap(model, head, reward=reward)
    with pytest.raises(ValueError, match=f"hold no tensor of one row a sample, here {B}, so there is nothing to keep"):
        fsr.loss(model(*packed(first)), Y[first], first)
    # Beside a tensor that has rows they are seen as soon as they change.
    fsr.loss(model(*packed(first), SIDE[first].float()), Y[first], first)
    with pytest.raises(ValueError, match="no row for each sample and is another than before, of values that change"):
        fsr.loss(model(*packed(second), SIDE[second].float()), Y[second], second)
    with pytest.raises(ValueError, match="called with other arguments than before: "):
        fsr.loss(model(*packed(first), side=SIDE[first].float()), Y[first], first)
    assert fsr._memory.consumed == B


@pytest.mark.parametrize("how", ["cached", "fresh"])
def test_a_tensor_without_rows_stays_so_in_a_batch_of_its_length(how: str) -> None:
    class Scaled(Reader):
        def forward(self, side: Tensor, scale: Tensor) -> Tensor:
            assert scale.shape == (3,)
            return self.fc(self.body(torch.cat([side * scale, side.new_zeros(len(side), 5)], 1)).tanh())

    torch.manual_seed(1)
    model, scale = Scaled().double(), torch.ones(3, dtype=torch.float64)
    fsr = wrap(model, "all" if how == "cached" else "fc", reward=how)
    for index in (*torch.arange(N).split(B), *torch.arange(N).split(3)):
        fsr.loss(model(SIDE[index], scale.clone()), Y[index], index).backward()
    assert [tensor.shape[1:] for tensor in fsr.dictionary._arena] == [(3,)]
    with pytest.raises(ValueError, match="of values that change"):
        fsr.loss(model(SIDE[:B], 2 * scale), Y[:B], torch.arange(B))


def test_a_head_that_is_called_with_a_dict() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, C)

        def forward(self, h: Any) -> Tensor:
            return self.fc(h["h"])

    class Outer(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Inner()

        def read(self, *args: Any) -> Tensor:
            return self.fc({"h": self.body(args[2].new_zeros(len(args[2]), 8))})

    model = Outer().double()
    fsr = wrap(model, "fc")
    with pytest.raises(RuntimeError, match="'fc' is called with no tensor, but dict, and FSR needs one"):
        fsr.loss(CALLS["by position"](model, torch.arange(B)), Y[:B], torch.arange(B))


VARYING = {
    "whole": ("all", "cached", r'Pad the model\'s inputs .* padding="max_length"\). Or pass head= of one module'),
    "fresh": ("fc", "fresh", r'Pad the model\'s inputs .* Or pass reward="cached"'),
    "cached": ("pooled", "cached", r"the inputs of the head 'pooled': pool them"),
}


@pytest.mark.parametrize("which", VARYING)
def test_varying_lengths(which: str) -> None:
    """The advice is one that can be followed: what is cached is not to be cached."""

    class Pooled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.pooled, self.fc = nn.Embedding(WORDS, 6), Pooled(6, 5), nn.Linear(5, C)

        def forward(self, word: Tensor) -> Tensor:
            return self.fc(self.pooled(self.embedding(word)).relu())

    class Last(Pooling):
        def __init__(self) -> None:
            super().__init__()
            self.pooled = Pooled(6, C)

        def forward(self, word: Tensor) -> Tensor:
            return self.pooled(self.embedding(word))

    head, reward, message = VARYING[which]
    model = (Last if head == "pooled" else Pooling)()
    fsr = wrap(model, head, reward=reward)
    index = torch.arange(B)
    fsr.loss(model(WORD[index]), Y[index], index)
    with pytest.raises(ValueError, match=message) as caught:
        fsr.loss(model(WORD[index, :4]), Y[index], index)
    assert ('reward="cached"' in str(caught.value)) == (reward == "fresh")
    assert fsr._memory.consumed == B
    fsr = wrap(model, head, reward=reward, **SELECT)  # keeps nothing of them
    for length in (T, 4, 5):
        fsr.loss(model(WORD[index, :length]), Y[index], index)


def test_logits_of_tokens_from_a_whole_model_are_not_its_logits() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc = nn.Embedding(WORDS, 6), nn.Linear(6, C)

        def forward(self, word: Tensor) -> Tensor:
            return self.fc(self.embedding(word))

    model = Tokens()
    fsr = wrap(model, "all")
    with pytest.raises(ValueError, match=r"puts out \(12, 6, 4\), but the logits are \(12, 4\)"):
        fsr.loss(model(WORD[:B])[:, -1], Y[:B], torch.arange(B))


# --- classes that a mask shuts ---------------------------------------------------------------------------------------


class Shut(nn.Module):
    """Four classes, and more that a mask shuts."""

    def __init__(self, more: int, value: float) -> None:
        super().__init__()
        self.body, self.fc, self.value = nn.Linear(3, 6), nn.Linear(6, C + more), value

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.body(x).tanh())
        return logits.masked_fill(torch.arange(logits.shape[1]) >= C, self.value)


@pytest.mark.parametrize("rule", [SELECT, {"relabel_weight": 1.0}], ids=["select", "clip"])
@pytest.mark.parametrize("storage", ["float16", "int8", 2])
@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_shut_classes_change_nothing(value: float, storage: Any, rule: dict[str, Any]) -> None:
    """Training is that of a model without them, pseudo-labels and all."""
    runs, weight = [], torch.randn(C, 6, dtype=torch.float64)
    for more in (0, 2):
        torch.manual_seed(1)
        model = Shut(more, value).double()
        model.fc = nn.Linear(6, C + more).double()
        with torch.no_grad():
            model.fc.weight[:C], model.fc.bias[:C] = weight, 0.0
            model.fc.bias[C:] = -50.0  # the look-ahead knows the head, not the mask behind it
        options = {**rule, "dictionary_size": 3 * (C + more), "relabel_storage": storage}
        fsr = judge_soon(wrap(model, "fc", **options), C + more)
        losses = []
        for k in range(3):
            for index in torch.arange(N).roll(k).split(B):
                loss = fsr.loss(model(SIDE[index]), Y[index], index)
                loss.backward()
                fsr.step()
                fsr.zero_grad()
                losses.append(loss.item())
        runs.append([model.body.weight, model.fc.weight[:C], torch.tensor(losses)])
    assert_close(runs[1], runs[0], 1e-3)


def test_a_class_that_opens_later_has_a_pseudo_label_again() -> None:
    store = PseudoLabels(2, 3, 0.1)
    index, low = torch.arange(2), torch.tensor([[2.0, 1.0, -1e9], [1.0, 2.0, -1e9]])
    for logits in (low, low, torch.tensor([[2.0, 1.0, 3.0], [-1e9, -1e9, -1e9]]), torch.tensor([[2.0, 1.0, 3.0]] * 2)):
        stored, squares = store.stored(index, torch.float32)
        pseudo = store.update(index, logits, stored, squares.mean())
        assert pseudo.isfinite().all()
    assert pseudo[0].argmax() == 2
    stored, _ = store.stored(index, torch.float32)
    pseudo = store.update(index, low, stored, stored.square().mean())
    assert pseudo[:, 2].eq(0).all()
    assert_close(pseudo.sum(1), torch.ones(2))
