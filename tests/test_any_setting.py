"""examples/benchmarks/any_setting.py: what is drawn is what is trained on, and the table says what came out."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import any_setting
from any_setting import Network, draw, make_data, make_recipe
from cases import FASHION_CONFUSIONS


@pytest.fixture(autouse=True)
def fashion(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """6,000 and 500 images that have their class in their first pixel."""
    labels, test = torch.arange(6000) % 10, torch.arange(500) % 10
    images = [torch.cat([y[:, None].float(), torch.rand(len(y), 783)], 1) for y in (labels, test)]
    found = images[0], labels, images[1], test
    monkeypatch.setattr(any_setting, "read_fashion", lambda folder: found)
    return found


def test_a_number_draws_one_setting_and_numbers_draw_all_kinds() -> None:
    settings = [draw(number) for number in range(300)]
    assert settings == [draw(number) for number in range(300)]
    assert {s.noise for s in settings} == {"none", *any_setting.NOISE}
    assert {s.classes for s in settings} == {2, 3, 10}
    assert {s.imbalance for s in settings} == {1, 20, 100}
    assert len({s.optimizer for s in settings}) == len({s.network for s in settings}) == 5
    assert all((s.rate > 0) == (s.noise != "none") for s in settings)
    assert all(s.epochs >= 5 and s.images * s.epochs <= max(any_setting.MOST_VISITS, 5 * s.images) for s in settings)


@pytest.mark.parametrize("noise", ["none", *any_setting.NOISE])
def test_labels_are_wrong_as_the_setting_says(noise: str) -> None:
    rate = 0.0 if noise == "none" else 0.4
    setting = replace(draw(0), images=4000, classes=10, imbalance=1, noise=noise, rate=rate)
    x, given, right, test_x, test_y = make_data(setting, None)
    assert len(x) == len(given) == 4000
    assert len(test_x) == len(test_y) == 500
    by_class = [x[right == c, 0].unique() for c in range(10)]
    assert all(len(value) == 1 for value in by_class)  # images and labels belong together
    wrong = given != right
    expected = {"none": 0.0, "uniform": 0.36, "one class": 0.036, "half of the images": 0.18}.get(noise, 0.4)
    assert wrong.float().mean().item() == pytest.approx(expected, abs=0.03)
    if noise == "pair":
        assert torch.equal(given[wrong], (right[wrong] + 1) % 10)
    elif noise == "one class":
        assert (right[wrong] == 0).all()
    elif noise == "look-alike":
        classes = torch.randperm(10, generator=torch.Generator().manual_seed(setting.number))
        assert torch.equal(classes[given[wrong]], torch.tensor(FASHION_CONFUSIONS)[classes[right[wrong]]])


def test_classes_and_tail_are_as_the_setting_says() -> None:
    few = replace(draw(0), images=900, classes=3, noise="none", rate=0.0)
    x, given, right, _, test_y = make_data(few, None)
    assert torch.equal(given, right)
    assert sorted(set(right.tolist())) == sorted(set(test_y.tolist())) == [0, 1, 2]
    assert len(x) == 900
    tail = make_data(replace(few, images=5000, classes=10, imbalance=20), None)[2]
    counts = torch.bincount(tail)
    assert counts[0] / counts[-1] == pytest.approx(20, rel=0.1)
    assert (counts.diff() < 0).all()


@pytest.mark.parametrize("network", ["MLP", "wide", "deep", "dropout", "convolutions"])
@pytest.mark.parametrize("optimizer", ["one-cycle", "step", "constant", "AdamW, cosine", "Adam, constant"])
def test_every_network_trains_with_every_optimizer(network: str, optimizer: str) -> None:
    setting = replace(draw(0), network=network, optimizer=optimizer, lr=0.01)
    model = Network(network, 3)
    inner, schedule = make_recipe(setting, model.parameters(), 8)
    before = [p.detach().clone() for p in model.parameters()]
    used = []
    for _ in range(8):
        used.append(inner.param_groups[0]["lr"])
        model(torch.randn(4, 784)).square().sum().backward()
        inner.step()
        inner.zero_grad()
        schedule.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    last = {"one-cycle": 1e-5, "step": 1e-4, "AdamW, cosine": 1e-3}.get(optimizer, 0.01)
    assert max(used) == pytest.approx(0.01, rel=0.1)
    assert used[-1] <= last * 1.0001


@pytest.mark.parametrize("name", any_setting.NAMES)
def test_where_training_diverges_accuracy_is_that_of_guessing(name: str) -> None:
    small = replace(draw(0), images=300, classes=3, network="wide", optimizer="constant", lr=1e12, batch=50, epochs=6)
    run = any_setting.train(name, small, make_data(small, None))
    assert len(run["curve"]) == 6
    assert run["last"] == pytest.approx(1 / 3, abs=0.01)


def test_another_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(*_: Any) -> Tensor:
        raise ValueError("another")

    monkeypatch.setattr(any_setting.METHODS["ce"], "loss", loss)
    small = replace(draw(0), images=300, classes=3, network="wide", epochs=5)
    with pytest.raises(ValueError, match="another"):
        any_setting.train("ce", small, make_data(small, None))


def test_runs_are_resumed_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    small = replace(draw(0), images=300, classes=3, network="wide", batch=64, epochs=5)
    monkeypatch.setattr(any_setting, "draw", lambda number: replace(small, number=number))
    flags = ["--out", str(tmp_path / "runs"), "--settings", "2", "--first", "7"]
    monkeypatch.setattr("sys.argv", ["any_setting.py", *flags])
    any_setting.main()
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert [file.name for file in files] == ["7.json", "8.json"]
    before = files[0].stat().st_mtime_ns
    any_setting.main()
    assert files[0].stat().st_mtime_ns == before
    packed = tmp_path / "all.json"
    monkeypatch.setattr("sys.argv", ["any_setting.py", "--out", str(tmp_path / "runs"), "--pack", str(packed)])
    any_setting.main()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["any_setting.py", "--out", str(packed), "--table"])
    any_setting.main()
    shown = capsys.readouterr().out
    assert "| wrong labels | 2 | FSR |" in shown
    assert shown.count("| wide |") == 2


def test_the_table_of_settings_is_that_of_the_committed_runs() -> None:
    results = Path(__file__).resolve().parents[1] / "docs" / "results" / "any_setting.json"
    runs = json.loads(results.read_text())
    assert [run["number"] for run in runs] == list(range(210, 210 + len(runs)))
    assert any_setting.table(runs) == results.with_suffix(".md").read_text().rstrip()
    for run in runs:
        drawn = {**asdict(draw(run["number"])), "images": run["images"]}
        assert {name: run[name] for name in drawn} == drawn
