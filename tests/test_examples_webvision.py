"""examples/webvision.py from end to end on the digits, and its parts."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"
FLAGS = ["--limit", "96", "--image-size", "16", "--epochs", "2", "--fsr-start", "1", "--log-steps", "2"]


def run(output: Path, *flags: str) -> tuple[str, dict]:
    environment = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "webvision.py"), "--output-dir", str(output), *FLAGS, *flags]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A whole run of 2 epochs, 3 steps each, with MixUp, and a checkpoint in the midst of the second epoch."""
    output = tmp_path_factory.mktemp("webvision") / "run"
    return output, *run(output, "--checkpoint-steps", "5", "--keep", "9", "--mixup")


@pytest.fixture(scope="module")
def webvision():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("webvision")
        for name in ("webvision", "image_files", "checkpoints", "common"):
            sys.modules.pop(name, None)


def test_the_digits_have_the_official_layout(first, webvision):
    from sklearn.datasets import load_digits

    output, stdout, _ = first
    assert "No --data-dir" in stdout.splitlines()[0]
    data = output / "digits"
    lines = (data / "info" / "train_filelist_google.txt").read_text().splitlines()
    assert sum(line.startswith("google/q0001/") and line.endswith(".jpg 0") for line in lines) > 50
    (files, labels), val = webvision.read_data(data, None, 10)
    assert len(files) == len(lines) - 1  # the class beyond the tenth is left out
    assert labels.unique().tolist() == list(range(10))
    assert {name: split[1].bincount().tolist() for name, split in val.items()} == {
        "webvision": [30] * 10,
        "imagenet": [30] * 10,
    }
    assert all((data / file).is_file() for split in [(files, labels), *val.values()] for file in split[0])
    digits = load_digits()
    rows = [int(Path(file).stem) for file in files]
    assert 0.3 < (torch.tensor(digits.target[rows]) != labels).float().mean() < 0.5
    for files, labels in val.values():
        rows = [int(Path(file).stem[-6:]) for file in files]
        assert digits.target[rows].tolist() == labels.tolist()


def test_the_summary_and_the_baseline(first):
    output, stdout, summary = first
    expected = {"method": "fsr", "epochs": 2, "steps": 6, "classes": 10, "train_images": 96, "imagenet_images": 96}
    assert summary.items() >= expected.items()
    for name in ("webvision", "imagenet"):
        assert 0 <= summary[f"{name}_top1"] <= summary[f"{name}_top5"] <= 1
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    assert f"with it and --output-dir {output}-ce" in stdout


def test_the_baseline_stands_beside(webvision, tmp_path):
    beside = sys.modules["image_files"].beside
    summary = {"method": "fsr", "epochs": 2, "webvision_top1": 0.75}
    ours = webvision.parse_args(["--output-dir", str(tmp_path / "run")])
    theirs = webvision.parse_args(["--output-dir", str(tmp_path / "run-ce"), "--method", "ce"])
    assert beside(theirs, summary).endswith(f"--output-dir {tmp_path / 'run'}.")
    (tmp_path / "run-ce").mkdir()
    (tmp_path / "run-ce" / "summary.json").write_text(json.dumps({"method": "ce", "epochs": 2, "webvision_top1": 0.5}))
    lines = [line.split() for line in beside(ours, summary).splitlines()]
    assert lines == [["fsr", "ce"], ["webvision_top1", "0.75", "0.5"]]


def test_a_resumed_run_ends_where_the_other_did(first, tmp_path):
    output, _, summary = first
    resumed = tmp_path / "resumed"
    shutil.copytree(output, resumed)
    last = "checkpoints/epoch_0002_step_00000000"
    shutil.rmtree(resumed / last)
    stdout, again = run(resumed, "--resume", "--mixup")
    assert "epoch 1, step 2" in stdout
    assert (resumed / last / "model.safetensors").read_bytes() == (output / last / "model.safetensors").read_bytes()
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_the_recipe_of_the_paper(webvision, tmp_path):
    args = webvision.parse_args(["--data-dir", str(tmp_path)])
    assert (args.model, args.image_size, args.epochs, args.batch_size) == ("resnet50", 224, 128, 16)
    assert (args.classes, args.cycles, args.lr_warmup_epochs, args.fsr_start) == (50, 7, 3, 20)
    assert args.lr * 8 * 16 / 256 == 0.1
    assert (args.output_dir, webvision.parse_args(["--method", "ce"]).output_dir) == (
        Path("runs/webvision"),
        Path("runs/webvision-ce"),
    )
    with pytest.raises(SystemExit):
        webvision.parse_args(["--method", "ce", "--mixup"])


def test_cosine_cycles_against_a_slow_twin(webvision):
    steps, epochs, warmup, cycles = 10, 34, 3, 5  # unit: one epoch
    expected = [(step + 1) / 30 for step in range(30)]
    for cycle in range(cycles):
        length = steps * 2**cycle
        cosine = (1 + torch.linspace(0, torch.pi, length + 1)[:-1].double().cos()) / 2
        expected += (0.9**cycle * cosine).tolist()
    assert len(expected) == steps * epochs
    found = [webvision.lr_factor(step, steps, epochs, warmup, cycles) for step in range(steps * epochs)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert webvision.lr_factor(0, steps, epochs, 0, cycles) == 1
    assert webvision.lr_factor(steps * epochs, steps, epochs, 0, cycles) == pytest.approx(0)


def test_wrong_data_is_named(webvision, tmp_path):
    def write(name: str, *lines: str) -> None:
        (tmp_path / "info").mkdir(exist_ok=True)
        (tmp_path / "info" / f"{name}.txt").write_text("\n".join(lines))

    def read(match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            webvision.read_data(tmp_path, None, 2)

    read(r"synsets\.txt is missing.*vision\.ee\.ethz\.ch", FileNotFoundError)
    write("synsets", "n01 a")
    read("has 1 classes: lower --classes 2")
    write("synsets", "n01 a", "n02 b, c", "n03 d")
    read(r"train_filelist_google\.txt is missing", FileNotFoundError)
    write("train_filelist_google", "google/q0001/a.jpg")
    read("Line 1 of .* is 'google/q0001/a.jpg', not a file and a class")
    write("train_filelist_google", "google/q0001/a.jpg 2")
    read("no images of the first 2 classes")
    write("train_filelist_google", "google/q0001/a b.jpg 1", "google/q0003/c.jpg 2", "")
    read(r"a b\.jpg is listed, but missing", FileNotFoundError)
    (tmp_path / "google" / "q0001").mkdir(parents=True)
    (tmp_path / "google" / "q0001" / "a b.jpg").touch()
    read(r"val_filelist\.txt is missing", FileNotFoundError)
    write("val_filelist", "val1.jpg 0")
    (tmp_path / "val_images_256").mkdir()
    (tmp_path / "val_images_256" / "val1.jpg").touch()
    train, val = webvision.read_data(tmp_path, None, 2)
    assert (train[0], train[1].tolist()) == (["google/q0001/a b.jpg"], [1])
    assert (list(val), val["webvision"][0]) == (["webvision"], ["val_images_256/val1.jpg"])
    (tmp_path / "imagenet" / "val" / "n02").mkdir(parents=True)
    (tmp_path / "imagenet" / "val" / "n02" / "x.JPEG").touch()
    read("n01 has no images", FileNotFoundError)
    (tmp_path / "imagenet" / "val" / "n01").mkdir()
    (tmp_path / "imagenet" / "val" / "n01" / "y.jpg").touch()
    _, val = webvision.read_data(tmp_path, tmp_path / "imagenet", 2)
    assert ([Path(file).name for file in val["imagenet"][0]], val["imagenet"][1].tolist()) == (
        ["y.jpg", "x.JPEG"],
        [0, 1],
    )
