"""examples/cifar.py and examples/networks.py, on folders of scikit-learn's digits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import cifar
from networks import make_network

QUICK = ["--model", "test_resnet", "--batch-size", "50", "--quiet", "--lr", "0.05", "--augment", "none"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.parquet with a column of wrong labels, and test.parquet."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = tmp_path_factory.mktemp("parquet")
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    names = ClassLabel(names=[str(number) for number in range(10)])
    features = Features({"picture": ImageFeature(), "label": names, "wrong_label": Value("int64")})
    for name, rows in (("train", order[:600]), ("test", order[600:900])):
        images = [Image.fromarray((digits.images[row] * 15).astype(np.uint8)) for row in rows]
        labels = digits.target[rows].tolist()
        wrong = [(label + 1) % 10 if number % 5 == 0 else label for number, label in enumerate(labels)]
        content = {"picture": images, "label": labels, "wrong_label": wrong}
        Dataset.from_dict(content, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def run(folder: Path, *flags: str) -> dict[str, Any]:
    args = cifar.parse(["--data", str(folder), *QUICK, *flags])
    return cifar.run(args, cifar.read(args))


def test_wrong_labels_of_a_column(parquet: Path) -> None:
    flags = ["--noise", "column:wrong_label", "--epochs", "3", "--fsr", '{"dictionary_size": 60, "warmup_epochs": 1}']
    result = run(parquet, *flags)
    assert result["wrong"] == pytest.approx(0.2)
    assert result["samples"] == 600
    assert result["fsr"]["fsr/reweighting"] == 1
    assert result["purity"] > 0.8
    assert len(result["curve"]) == 3
    assert "dictionary purity" in cifar.report(result)


def test_long_tail_with_noise_mixup_and_plain_training(parquet: Path) -> None:
    flags = ["--noise", "uniform:0.4", "--imbalance", "10", "--epochs", "2", "--few-shot", "15", "--many-shot", "30"]
    mixed = run(parquet, *flags, "--mixup", "--fsr", '{"warmup_epochs": 1, "dictionary_size": 60}')
    plain = run(parquet, *flags, "--method", "ce")
    assert {"many", "medium", "few"} <= set(mixed)
    assert mixed["samples"] == plain["samples"] < 300
    assert mixed["wrong"] == plain["wrong"] == pytest.approx(0.36, abs=0.08)
    assert plain["fsr"] == {}


def test_imagefolder(tmp_path: Path) -> None:
    digits = load_digits()
    for row in range(120):
        split = "train" if row < 90 else "test"
        path = tmp_path / split / str(digits.target[row]) / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[row] * 15).astype(np.uint8)).save(path)
    result = run(tmp_path, "--method", "ce", "--epochs", "1", "--noise", "asymmetric:0.5")
    assert result["samples"] == 90
    assert 0.1 < result["wrong"] < 0.5


def test_presets_follow_the_task() -> None:
    def config(*flags: str) -> Any:
        return cifar.make_config(cifar.parse(list(flags)))

    assert config("--noise", "uniform:0.4").dictionary_size == 2000
    assert config("--noise", "uniform:0.4", "--mixup").pusher == "authors_margin"
    assert config("--imbalance", "50").weight_rule == "shift"
    assert config("--imbalance", "50", "--deferred").warmup_epochs == 160
    assert config("--imbalance", "50", "--noise", "uniform:0.2").weight_rule == "clip"


def test_wrong_use_is_said(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cifar.parse(["--noise", "0.4"])
    assert "uniform:RATE" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no column 'fine_label'"):
        run(parquet, "--label", "fine_label")


def test_asymmetric_noise_confuses_the_classes_of_the_released_code() -> None:
    labels = np.arange(10).repeat(400)
    noisy = cifar.add_noise(labels, "asymmetric", 0.4, 10, np.random.default_rng(0))
    for true, wrong in ((9, 1), (2, 0), (4, 7), (3, 5), (5, 3)):
        found = noisy[labels == true]
        assert set(found) == {true, wrong}
        assert 0.33 < (found == wrong).mean() < 0.47
    assert (noisy[labels == 0] == 0).all()


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("wrn28_10", 36.5)])
def test_networks_have_the_papers_size(name: str, millions: float) -> None:
    model = make_network(name, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    if name != "wrn28_10":
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
