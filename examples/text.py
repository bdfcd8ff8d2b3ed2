"""Any sequence classifier and any text data set, through transformers' Trainer: cross-entropy and FSR side by side.

    python examples/text.py                                   # two minutes on two cores, nothing to download
    python examples/text.py --model distilbert-base-uncased --data ag_news --noise 0.4 --epochs 5 --lr 5e-5

Without `--data`, the texts are paragraphs of the docstrings of installed packages (numpy, scikit-learn, matplotlib,
PyTorch, transformers), and the class is the package. Without `--model`, a tiny BERT is made from a configuration, with
a vocabulary of the texts' own words. A share of the training labels is made wrong.
"""

from __future__ import annotations

import argparse
import ast
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import positive, share
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fsr_wrap import with_index
from fsr_wrap.integrations.transformers import add_fsr

PACKAGES = ("numpy", "sklearn", "matplotlib", "torch", "transformers")
Split = tuple[list[str], np.ndarray]
"""Texts and their classes."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a sequence classifier of the Hugging Face hub, or a folder (default: a tiny BERT)")
    add("--data", help="a data set of the hub, or a folder, with splits train and test (default: docstrings)")
    add("--text-column", default="text", help="(%(default)s)")
    add("--label-column", default="label", help="(%(default)s)")
    add("--method", choices=("both", "ce", "fsr"), default="both", help="(%(default)s)")
    add("--noise", type=share, default=0.4, help="the share of training labels that are made wrong (%(default)s)")
    add("--epochs", type=positive, default=16, help="(%(default)s)")
    add("--batch-size", type=positive, default=50, help="per device (%(default)s)")
    add("--lr", type=float, default=1e-3, help="(%(default)s)")
    add("--max-length", type=positive, default=48, help="tokens of a text (%(default)s)")
    add("--limit", type=positive, help="use at most so many texts of each split")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--output-dir", type=Path, default=Path("runs/text"), help="(%(default)s)")
    return parser.parse_args(argv)


# --- data ------------------------------------------------------------------------------------------------------------


def paragraphs(package: str, most: int) -> list[str]:
    """Of the docstrings in a package's files: different ones, without the names of the packages, `most` at most."""
    spec = find_spec(package)
    assert spec is not None
    root = Path((spec.submodule_search_locations or [""])[0])
    names, found = re.compile("|".join((*PACKAGES, "scikit-learn", "pytorch")), re.IGNORECASE), dict[str, None]()
    for file in sorted(root.rglob("*.py"), key=lambda path: path.stat().st_size, reverse=True)[:400]:
        if "test" in file.as_posix().removeprefix(root.as_posix()):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    words = names.sub(" ", paragraph).split()
                    if 10 <= len(words) <= 80 and ">>>" not in words:
                        found[" ".join(words)] = None
        if len(found) >= most:
            break
    return list(found)[:most]


def docstrings(most: int = 1000) -> tuple[Split, Split]:
    """Training and test texts, four to one."""
    parts = [paragraphs(package, most) for package in PACKAGES]
    texts = [text for part in parts for text in part]
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.random.default_rng(0).permutation(len(texts))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return ([texts[i] for i in train], labels[train]), ([texts[i] for i in test], labels[test])


def read(args: argparse.Namespace) -> tuple[Split, Split]:
    """Training and test split."""
    if not args.data:
        return docstrings()
    splits = load_dataset(args.data).shuffle(seed=args.seed)  # many are sorted by class, and --limit takes the first
    if {"train", "test"} - set(splits):
        raise SystemExit(f"{args.data} has the splits {', '.join(splits)}: train and test are needed.")
    columns = args.text_column, args.label_column
    train, test = ([splits[name][column] for column in columns] for name in ("train", "test"))
    return (list(train[0]), np.array(train[1])), (list(test[0]), np.array(test[1]))


def spoil(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    """A share of the labels, each changed to another class at random."""
    random = np.random.default_rng(seed)
    wrong = random.random(len(labels)) < share
    return np.where(wrong, (labels + random.integers(1, classes, len(labels))) % classes, labels)


# --- model -----------------------------------------------------------------------------------------------------------


def word_tokenizer(texts: list[str], words: int = 8000) -> PreTrainedTokenizerFast:
    """Knows the commonest words of the texts."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=words, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def make_model(args: argparse.Namespace, tokenizer: Any, classes: int) -> torch.nn.Module:
    """The model that was asked for, or a tiny one."""
    if args.model:
        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    length = {"vocab_size": len(tokenizer), "max_position_embeddings": args.max_length}
    return BertForSequenceClassification(BertConfig(**size, **length, num_labels=classes))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


# --- training --------------------------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, method: str, tokenizer: Any, classes: int, train_set: Dataset, test_set: Dataset
) -> float:
    """One run. **Returns:** the accuracy on the test texts."""
    set_seed(args.seed)
    model = make_model(args, tokenizer, classes)
    options = TrainingArguments(
        str(args.output_dir / method),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4 * args.batch_size,
        learning_rate=args.lr,
        warmup_steps=20,
        seed=args.seed,
        logging_strategy="epoch",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    data = {"train_dataset": with_index(train_set), "eval_dataset": test_set}
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, options, **data, data_collator=collator, compute_metrics=accuracy)
    if method == "fsr":
        add_fsr(trainer)
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def main(args: argparse.Namespace) -> dict[str, float]:
    """**Returns:** the test accuracy of each method."""
    (texts, labels), (test_texts, test_labels) = (
        (texts[: args.limit], labels[: args.limit]) for texts, labels in read(args)
    )
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise SystemExit(f"--label-column {args.label_column}: class numbers from 0 on are needed.")
    classes = int(max(labels.max(), test_labels.max())) + 1
    given = spoil(labels, args.noise, classes, args.seed)
    print(f"{len(texts)} texts, {classes} classes, {(given != labels).mean():.0%} of the labels wrong", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else word_tokenizer(texts)

    def encode(texts: list[str], labels: np.ndarray) -> Dataset:
        tokens = tokenizer(texts, truncation=True, max_length=args.max_length)
        return Dataset.from_dict({**tokens, "label": labels.tolist()})

    train_set, test_set = encode(texts, given), encode(test_texts, test_labels)
    found = {}
    for method in ("ce", "fsr") if args.method == "both" else (args.method,):
        start = time.perf_counter()
        found[method] = train(args, method, tokenizer, classes, train_set, test_set)
        print(f"{method}: test accuracy {found[method]:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    main(parse_args())
