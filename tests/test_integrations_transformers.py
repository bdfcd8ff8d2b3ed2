"""transformers' own Trainer with FSR, against plain training and loops written out."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from helpers import CLIP, judge_soon
from test_loops import trace
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from fsr_wrap import FSRConfig, FSRWrapper, with_index
from fsr_wrap.integrations.transformers import add_fsr

CLASSES, N, WORDS, LENGTH = 3, 90, 30, 8
SMALL = {"dictionary_size": 15, "reward_batch_size": 12}
RULES: dict[str, dict[str, Any]] = {"select": SMALL, "clip": {**SMALL, **CLIP}}
RULE = pytest.mark.parametrize("rule", RULES)

TEXT: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "roberta": {},
    "modernbert": {},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {},
}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 16, "patch_size": 4},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "dinov2": {"image_size": 16, "patch_size": 4, "mlp_ratio": 2},
}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}


@pytest.fixture(autouse=True, scope="module")
def libraries_are_not_collected() -> Iterator[None]:
    """Each train() collects garbage, which takes half a second with all that is imported here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def shared_state() -> Iterator[None]:
    """Accelerate shares its state over the process."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_model(kind: str = "bert", seed: int = 0, **more: Any) -> nn.Module:
    own = {**(TINY if kind != "swin" else {}), **(TEXT | IMAGES)[kind], **more, "num_labels": CLASSES}
    if kind in TEXT:
        own = {**SPECIAL, **own}
    auto = AutoModelForSequenceClassification if kind in TEXT else AutoModelForImageClassification
    torch.manual_seed(seed)
    return auto.from_config(AutoConfig.for_model(kind, **own))


def make_data(kind: str = "bert", noise: float = 0.3) -> tuple[Any, Tensor]:
    """A data set that is easy to learn, some of its labels made wrong, with a column that no model takes; and which."""
    generator = torch.Generator().manual_seed(1)
    true = torch.arange(N) % CLASSES
    wrong = torch.rand(N, generator=generator) < noise
    label = torch.where(wrong, (true + 1) % CLASSES, true)
    columns: dict[str, Any] = {"label": label.tolist(), "note": ["a note"] * N}
    if kind in IMAGES:
        images = 0.3 * torch.randn(N, 3, 16, 16, generator=generator)
        images[torch.arange(N), true] += 1
        columns["pixel_values"] = images
    else:
        words = torch.randint(10, WORDS, (N, LENGTH), generator=generator)
        words[:, :3] = 4 + true[:, None]
        words[:, -1] = 2
        columns |= {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return [{name: values[i] for name, values in columns.items()} for i in range(N)], wrong


def hugging_face(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows).with_format("torch")


def make_args(folder: Path, **more: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    short = {"per_device_train_batch_size": 15, "num_train_epochs": 3, "learning_rate": 3e-3, "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{**quiet, "save_strategy": "no", "logging_steps": 1000, **short, **more})


def build(
    folder: Path, kind: str = "bert", rule: str = "clip", *, soon: bool = True, steady: bool = False, **args: Any
) -> tuple[Trainer, nn.Module, FSRWrapper]:
    """A Trainer with FSR that re-weights from the second epoch on."""
    model, train_set = make_model(kind, **(STEADY if steady else {})), with_index(make_data(kind)[0])
    trainer = Trainer(model, make_args(folder, **args), train_dataset=train_set, eval_dataset=make_data(kind)[0])
    fsr = add_fsr(trainer, **RULES[rule])
    return trainer, model, judge_soon(fsr, CLASSES) if soon else fsr


def watch(fsr: FSRWrapper) -> list[tuple[Tensor, Tensor]]:
    """Indices and weights of every batch."""
    seen: list[tuple[Tensor, Tensor]] = []
    loss = fsr.loss

    def watched(outputs: Any, target: Tensor, index: Tensor) -> Tensor:
        value = loss(outputs, target, index)
        if torch.is_grad_enabled():
            seen.append((index, fsr.weights.clone()))
        return value

    fsr.loss = watched  # type: ignore[method-assign]
    return seen


# --- what is trained -------------------------------------------------------------------------------------------------


@RULE
@pytest.mark.parametrize("kind", [*TEXT, *IMAGES])
def test_each_architecture_is_reweighted(kind: str, rule: str, tmp_path: Path) -> None:
    trainer, model, fsr = build(tmp_path, kind, rule, num_train_epochs=2)
    seen = watch(fsr)
    trainer.train()
    assert fsr.epoch == 2
    assert len(seen) == 12
    assert all(torch.equal(weights, torch.full((15,), 1 / 15)) or rule == "select" for _, weights in seen[:6])
    later = torch.cat([weights for _, weights in seen[6:]])
    taken = 1 - 15 * later.mean() if rule == "select" else (later == 0).float().mean()
    assert 0.1 < taken < 0.9
    assert torch.cat([index for index, _ in seen[:6]]).sort().values.equal(torch.arange(N))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@RULE
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_wrong_labels_get_less(kind: str, rule: str, tmp_path: Path) -> None:
    trainer, _, fsr = build(tmp_path, kind, rule, num_train_epochs=8)
    seen = watch(fsr)
    trainer.train()
    index, weights = (torch.cat(parts) for parts in zip(*seen[-6:], strict=True))
    wrong = make_data(kind)[1]
    share = float(weights[wrong[index]].sum() / weights.sum())
    assert share < (0.8 if rule == "select" else 0.5) * wrong.float().mean()


def test_the_default_trains_plainly_until_labels_are_learned_by_heart(tmp_path: Path) -> None:
    trainer, _, fsr = build(tmp_path, rule="select", soon=False, num_train_epochs=2)
    trainer.train()
    assert fsr.epoch == 2
    assert not fsr.is_reweighting


@pytest.mark.parametrize("accumulation", [1, 4])
@RULE
def test_gradients_are_those_of_a_loop_written_out(rule: str, accumulation: int, tmp_path: Path) -> None:
    """Seven batches an epoch, the last of them short, so the last step is of fewer samples too."""
    more = {"per_device_train_batch_size": 14, "gradient_accumulation_steps": accumulation}
    fixed = {"lr_scheduler_type": "constant", "weight_decay": 0.0}
    model, twin = (make_model(**STEADY) for _ in range(2))
    data = with_index(make_data()[0])
    trainer = Trainer(model, make_args(tmp_path, **more, **fixed), train_dataset=data)
    fsr = judge_soon(add_fsr(trainer, **RULES[rule]), CLASSES)
    seen, found = watch(fsr), []
    fsr.register_step_pre_hook(lambda *_: found.append([parameter.grad.clone() for parameter in model.parameters()]))
    trainer.train()

    steps = [
        seen[epoch : epoch + 7][at : at + accumulation] for epoch in (0, 7, 14) for at in range(0, 7, accumulation)
    ]
    assert len(found) == len(steps)
    inner = torch.optim.AdamW(twin.parameters(), 3e-3, weight_decay=0.0)
    twin_fsr = judge_soon(FSRWrapper(twin, inner, dataset=data, **RULES[rule]), CLASSES)
    rows = default_data_collator(make_data()[0])
    for gradients, batches in zip(found, steps, strict=True):
        size = sum(len(index) for index, _ in batches)
        for index, _ in batches:
            logits = twin(rows["input_ids"][index], rows["attention_mask"][index]).logits
            (twin_fsr.loss(logits, rows["labels"][index], index) * len(index) / size).backward()
        expected = [parameter.grad for parameter in twin.parameters()]
        torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-6)
        twin_fsr.step()
        twin_fsr.zero_grad()
    assert fsr.is_reweighting
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_while_plain_it_is_the_trainers_own_training(optim: str, tmp_path: Path) -> None:
    """Optimizer, its groups, the schedule, clipping, smoothing and the mean over accumulated batches."""
    args = {"optim": optim, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3, "logging_steps": 1}
    args |= {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "label_smoothing_factor": 0.1}
    args |= {"per_device_train_batch_size": 14, "num_train_epochs": 2}
    runs = []
    for with_fsr in (True, False):
        model, data = make_model(), make_data()[0]
        trainer = Trainer(model, make_args(tmp_path, **args), train_dataset=with_index(data), eval_dataset=data)
        if with_fsr:
            fsr = add_fsr(trainer, **{**RULES["clip"], "warmup_epochs": 9})
            assert fsr.config.label_smoothing == 0.1
        trainer.train()
        groups = [{**group, "params": len(group["params"])} for group in trainer.optimizer.param_groups]
        logs = [[log.get(name) for name in ("learning_rate", "loss", "grad_norm")] for log in trainer.state.log_history]
        evaluated = trainer.evaluate()["eval_loss"]
        runs.append((groups, [log for log in logs if log[0] is not None], evaluated, model.state_dict()))
    (groups, logs, evaluated, state), (plain_groups, plain_logs, plain_evaluated, plain_state) = runs
    assert groups == plain_groups
    assert len(logs) == 6
    torch.testing.assert_close(torch.tensor(logs), torch.tensor(plain_logs), rtol=1e-4, atol=1e-5)
    assert evaluated == pytest.approx(plain_evaluated, abs=1e-5)
    for name, value in state.items():
        if "key.bias" not in name:  # whose gradient is nothing but rounding
            torch.testing.assert_close(value, plain_state[name], rtol=1e-4, atol=1e-4)


def test_the_optimizers_that_the_trainer_was_given(tmp_path: Path) -> None:
    """A plain one is wrapped; an FSRWrapper is taken as it is."""
    model, data = make_model(), with_index(make_data()[0])
    inner = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1)
    trainer = Trainer(model, make_args(tmp_path), train_dataset=data, optimizers=(inner, schedule))
    assert add_fsr(trainer).optimizer is inner
    assert trainer.lr_scheduler is schedule

    fsr = FSRWrapper(model, inner, dataset=data)
    trainer = Trainer(model, make_args(tmp_path), train_dataset=data, optimizers=(fsr, None))
    assert add_fsr(trainer) is trainer.optimizer is fsr
    trainer.train()
    assert fsr.epoch == 3


def train_in_each_process(folder: str, world: int) -> dict[str, Any]:
    """Five batches an epoch, two of them a step, with checkpoints in mid-epoch."""
    warnings.filterwarnings("error", message="This state dict was taken in mid-epoch")
    args = {"per_device_train_batch_size": 18 // world, "gradient_accumulation_steps": 2}
    args |= {"save_strategy": "steps", "save_steps": 4}
    trainer, model, fsr = build(Path(folder), rule="select", steady=True, **args)
    gradients: list[Tensor] = []
    parameters = list(model.parameters())
    fsr.register_step_pre_hook(lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in parameters])))
    trainer.train()
    assert trainer.args.world_size == world
    return {"gradients": torch.stack(gradients), "scores": fsr.scores.clone(), "reweighting": fsr.is_reweighting}


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Whatever the Trainer does to the loss for the number of processes."""
    one = train_in_each_process(str(tmp_path / "one"), 1)
    both = processes.run(2, train_in_each_process, str(tmp_path / "two"), 2)
    assert one["reweighting"]
    assert len(one["gradients"]) == 9
    for other in both:
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


# --- what must leave no trace ----------------------------------------------------------------------------------------


@RULE
def test_evaluation_leaves_no_trace(rule: str, tmp_path: Path) -> None:
    """Of data without index, and of the training set with it; the loss is the Trainer's own. The model has no dropout,
    as every pass over a loader draws a number."""
    trainer, model, fsr = build(tmp_path, rule=rule, steady=True)
    trainer.train()
    other, other_model, other_fsr = build(tmp_path, rule=rule, steady=True, eval_strategy="steps", eval_steps=6)
    other.eval_dataset = {"plain": other.eval_dataset, "indexed": other.train_dataset}
    before = other.evaluate()
    assert before["eval_plain_loss"] == before["eval_indexed_loss"]
    other.train()
    assert trace(model, fsr) == trace(other_model, other_fsr)

    logits = trainer.predict(trainer.train_dataset).predictions
    rows = default_data_collator(make_data()[0])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        float(F.cross_entropy(torch.tensor(logits), rows["labels"])), abs=1e-5
    )
    assert trace(model, fsr) == trace(other_model, other_fsr)


@RULE
def test_resumes_in_mid_epoch_bit_for_bit(rule: str, tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2, "logging_steps": 2}
    trainer, model, fsr = build(tmp_path, rule=rule, **args, per_device_train_batch_size=12)
    trainer.train()
    assert fsr.is_reweighting
    resumed, twin, twin_fsr = build(tmp_path, rule=rule, **args, per_device_train_batch_size=12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trace(model, fsr) == trace(twin, twin_fsr)
    assert [log["step"] for log in resumed.state.log_history] == [log["step"] for log in trainer.state.log_history]


def test_a_copy_of_the_model_copies_no_trainer(tmp_path: Path) -> None:
    trainer, model, _ = build(tmp_path, num_train_epochs=1)
    trainer.train()
    twin = copy.deepcopy(model)
    rows = default_data_collator(make_data()[0][:4])
    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    model.eval(), twin.eval()
    assert torch.equal(twin(**inputs, index=torch.arange(4)).logits, model(**inputs).logits)
    [hook] = [hook for hook in twin._forward_pre_hooks.values() if hook.__name__ == "take_off"]
    assert set(hook.__self__.__dict__) == {"column", "value"}


# --- options of the Trainer ------------------------------------------------------------------------------------------


SAME: dict[str, dict[str, Any]] = {  # options that change nothing in what is computed
    "all columns": {"remove_unused_columns": False},
    "a Hugging Face data set": {},
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    trainer, model, fsr = build(tmp_path_factory.mktemp("plain"), num_train_epochs=2)
    trainer.train()
    return trace(model, fsr)


@pytest.mark.parametrize("option", SAME)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_options_that_change_nothing(option: str, plain: dict[str, int], tmp_path: Path) -> None:
    trainer, model, fsr = build(tmp_path, num_train_epochs=2, **SAME[option])
    if option == "a Hugging Face data set":
        trainer.train_dataset = with_index(hugging_face(make_data()[0]))
    trainer.train()
    assert trace(model, fsr) == plain


@RULE
def test_bf16(rule: str, tmp_path: Path) -> None:
    trainer, _, fsr = build(tmp_path, rule=rule, bf16=True)
    seen = watch(fsr)
    trainer.train()
    assert (seen[-1][1] <= (0.9 / 15 if rule == "select" else 0)).any()
    assert fsr.weights.dtype == torch.float32


def test_load_best_model_at_end(tmp_path: Path) -> None:
    """The best model's parameters come back; what FSR knows stays."""
    args = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer, _, fsr = build(tmp_path, steady=True, **args, metric_for_best_model="loss", greater_is_better=True)
    twin_trainer, _, twin_fsr = build(tmp_path / "twin", steady=True)
    trainer.train()
    twin_trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses))
    assert trace(nn.Module(), fsr) == trace(nn.Module(), twin_fsr)


def test_group_by_length_and_a_shorter_epoch(tmp_path: Path) -> None:
    """`dataloader_drop_last` makes the epoch shorter, which FSR is told."""
    try:
        TrainingArguments(train_sampling_strategy="group_by_length")
        option: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    except TypeError:  # before transformers 5
        option = {"group_by_length": True}
    more = {"per_device_train_batch_size": 20, "dataloader_drop_last": True, "gradient_accumulation_steps": 2}
    trainer, _, fsr = build(tmp_path, **option, **more)
    seen = watch(fsr)
    trainer.train()
    assert [len(index) for index, _ in seen] == [20] * 12
    assert fsr.epoch == 3


@RULE
def test_a_stream(rule: str, tmp_path: Path) -> None:
    """Its epochs end where the Trainer's do."""
    data, model = hugging_face(make_data()[0]).with_format(None), make_model()
    stream = with_index(data.to_iterable_dataset())
    trainer = Trainer(model, make_args(tmp_path, max_steps=18), train_dataset=stream)
    fsr = judge_soon(add_fsr(trainer, **RULES[rule]), CLASSES)
    trainer.train()
    assert fsr.epoch == 3
    assert fsr.is_reweighting


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_fresh_reward_data(kind: str, tmp_path: Path) -> None:
    """The number of items, which the Trainer passes to models that take any keyword, is not among what is kept."""
    more = {"per_device_train_batch_size": 14, "gradient_accumulation_steps": 4}
    trainer, _, fsr = build(tmp_path, kind, **more, num_train_epochs=1)
    data = trainer.train_dataset
    model = make_model(kind)
    trainer = Trainer(model, make_args(tmp_path, **more, num_train_epochs=2), train_dataset=data)
    fsr = add_fsr(trainer, **RULES["clip"], reward="fresh")
    trainer.train()
    assert fsr.is_reweighting


def test_another_column(tmp_path: Path) -> None:
    data = with_index([{**row, "index": "x"} for row in make_data()[0]], column="fsr_index")
    trainer = Trainer(make_model(), make_args(tmp_path, num_train_epochs=2), train_dataset=data)
    fsr = add_fsr(trainer, column="fsr_index", **RULES["clip"])
    trainer.train()
    assert fsr.is_reweighting


def test_metrics_are_in_the_logs(tmp_path: Path) -> None:
    """In those of training, for every other callback too, and once."""
    trainer, _, _ = build(tmp_path, logging_steps=6, eval_strategy="epoch")
    passed_on: list[dict[str, Any]] = []
    trainer.callback_handler.callbacks[-1].on_log = lambda *_, logs, **__: passed_on.append(logs)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["fsr/epoch"] for log in logs] == [1, 2, 3]
    assert [log["fsr/reweighting"] for log in logs] == [1, 1, 1]
    assert logs[0]["fsr/zero_weight_ratio"] == 0 < logs[1]["fsr/zero_weight_ratio"]
    assert [log["fsr/loss"] for log in passed_on if "loss" in log] == [log["fsr/loss"] for log in logs]
    assert not any("fsr/loss" in log for log in trainer.state.log_history if "eval_loss" in log)


@pytest.mark.parametrize("kind", ["rows", "Hugging Face", "stream"])
def test_the_report_is_written(kind: str, tmp_path: Path) -> None:
    rows = hugging_face(make_data()[0]).with_format(None) if kind != "rows" else make_data()[0]
    data = with_index(rows.to_iterable_dataset() if kind == "stream" else rows)
    trainer = Trainer(make_model(), make_args(tmp_path, max_steps=12), train_dataset=data)
    add_fsr(trainer, report=tmp_path / "report", **RULES["clip"])
    trainer.train()
    assert (tmp_path / "report" / "index.html").is_file()
    assert (tmp_path / "report" / "label_issues.csv").is_file()


# --- what is refused -------------------------------------------------------------------------------------------------


class TakesIndex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(LENGTH, CLASSES)

    def forward(self, input_ids: Tensor, index: Tensor) -> Tensor:
        return self.fc(input_ids.float())


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a loss of its own": ({"compute_loss_func": F.cross_entropy}, {}, "compute_loss_func would take"),
    "model_init": ({"model": None, "model_init": lambda: make_model()}, {}, r"Trainer\(model=model_init\(\)"),
    "no data": ({"train_dataset": None}, {}, r"train_dataset=with_index\(train_set\)"),
    "the model's own index": ({"model": TakesIndex()}, {}, "column='fsr_index'"),
    "another smoothing": ({"smoothing": 0.1}, {"label_smoothing": 0.2}, "label_smoothing_factor of args, 0.1"),
    "another in the config": (
        {"smoothing": 0.1},
        {"config": FSRConfig(label_smoothing=0.2)},
        "leave one out",
    ),
    "an unknown option": ({}, {"warm_up": 3}, "no field 'warm_up'"),
    "no head": ({}, {"head": "nowhere"}, "no module named 'nowhere'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_with_fsr_is_refused(name: str, tmp_path: Path) -> None:
    changed, options, message = REFUSED[name]
    args = make_args(tmp_path, label_smoothing_factor=changed.pop("smoothing", 0.0) if "smoothing" in changed else 0.0)
    parts = {"model": make_model(), "train_dataset": with_index(make_data()[0]), **changed}
    parts = {key: value for key, value in parts.items() if value is not None}
    trainer = Trainer(args=args, **parts)
    hooks = len(trainer.model._forward_pre_hooks)
    before = {key: trainer.__dict__[key] for key in ("optimizer", "compute_loss_func", "_signature_columns")}
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises((TypeError, ValueError), match=message):
        add_fsr(trainer, **options)
    assert before == {key: trainer.__dict__[key] for key in before}
    assert callbacks == trainer.callback_handler.callbacks
    assert len(trainer.model._forward_pre_hooks) == hooks


def test_other_refusals(tmp_path: Path) -> None:
    trainer, model, fsr = build(tmp_path)
    with pytest.raises(ValueError, match="call add_fsr once"):
        add_fsr(trainer)
    with pytest.raises(TypeError, match="not FSRWrapper"):
        add_fsr(fsr)  # type: ignore[arg-type]
    data = trainer.train_dataset
    trainer = Trainer(model, make_args(tmp_path), train_dataset=data, optimizers=(fsr, None))
    with pytest.raises(ValueError, match="pass head to that one"):
        add_fsr(trainer, head="classifier")
    trainer = Trainer(
        model, make_args(tmp_path, label_smoothing_factor=0.1), train_dataset=data, optimizers=(fsr, None)
    )
    with pytest.raises(ValueError, match=r"label_smoothing_factor of args, 0\.1"):
        add_fsr(trainer)
    trainer = Trainer(model, make_args(tmp_path), train_dataset=data)
    trainer.args._n_gpu = 2
    with pytest.raises(TypeError, match="torchrun --nproc-per-node=2"):
        add_fsr(trainer)


@pytest.mark.parametrize("missing", ["index", "labels"])
def test_batches_without_what_is_needed_are_refused(missing: str, tmp_path: Path) -> None:
    data = make_data()[0] if missing == "index" else with_index([{**row, "label": None} for row in make_data()[0]])
    trainer = Trainer(make_model(), make_args(tmp_path), train_dataset=data)
    fsr = add_fsr(trainer)
    with pytest.raises(ValueError, match=f"batches have no '{missing}'"):
        trainer.train()
    with pytest.raises(RuntimeError, match="knows nothing yet"):
        fsr.scores  # noqa: B018


def test_a_trainer_that_computes_its_loss_itself_is_refused(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return model(**inputs).loss

    model = make_model()
    before = copy.deepcopy(model.state_dict())
    trainer = Own(model, make_args(tmp_path), train_dataset=with_index(make_data()[0]))
    add_fsr(trainer)
    with pytest.raises(RuntimeError, match=r"super\(\).compute_loss"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("package", ["tqdm", "accelerate"])
def test_text_example_finds_paragraphs(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = text_example(monkeypatch)
    found = example.paragraphs(package, 30)
    assert len(set(found)) == len(found) >= 5
    assert not any(name in text.lower() for name in ("accelerate", "tqdm") for text in found)


def test_text_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cross-entropy and FSR, end to end, on texts of two small packages."""
    example = text_example(monkeypatch)
    found = example.main(example.parse_args(["--limit", "60", "--epochs", "2", "--output-dir", str(tmp_path)]))
    assert set(found) == {"ce", "fsr"}
    assert all(0 <= value <= 1 for value in found.values())
    labels = torch.arange(1000).numpy() % 4
    spoilt = example.spoil(labels, 0.4, 4, seed=0)
    assert 0.35 < (spoilt != labels).mean() < 0.45
    assert set(spoilt) == {0, 1, 2, 3}


def text_example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    example = importlib.import_module("text")
    monkeypatch.setattr(example, "PACKAGES", ("tqdm", "accelerate"))
    return example


def test_what_a_report_needs_is_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_model(), make_args(tmp_path), train_dataset=with_index(make_data()[0]))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'needs jinja2: pip install "fsr_wrap\[report\]"'):
        add_fsr(trainer, report=tmp_path / "report")


def test_a_report_that_fails_does_not_end_what_comes_after_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = Trainer(make_model(), make_args(tmp_path, num_train_epochs=3), train_dataset=with_index(make_data()[0]))
    fsr = add_fsr(trainer, report=tmp_path / "file" / "report", **RULES["clip"])
    with pytest.warns(UserWarning, match=r"The report could not be written \(\w+Error: .*call fsr\.report"):
        trainer.train()
    assert fsr.epoch == 3
