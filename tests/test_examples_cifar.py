"""examples/cifar.py and examples/networks.py, on folders of scikit-learn's digits."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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

from fsr_wrap import FSRConfig

QUICK = ["--model", "test_resnet", "--batch-size", "50", "--quiet", "--lr", "0.05", "--augment", "none"]
SHORT = ["--limit", "200", "--epochs", "3", "--augment", "crop", "--noise", "column:wrong_label"]  # 4 steps an epoch
SHORT += ["--image-size", "16", "--test-limit", "100", "--fsr", '{"warmup_epochs": 1, "dictionary_size": 20}']


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
    flags = [
        "--noise",
        "column:wrong_label",
        "--epochs",
        "3",
        "--paper",
        "--fsr",
        '{"dictionary_size": 60, "warmup_epochs": 1}',
    ]
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


@pytest.mark.parametrize("method", ["co-teaching", "l2r", "f-correction", "crust"])
def test_other_methods(method: str, parquet: Path, tmp_path: Path) -> None:
    """A killed run ends where the other did, whatever the method keeps."""
    flags = [*SHORT, "--epochs", "2", "--method", method, "--limit", "150", "--batch-size", "50"]
    flags += ["--clean-images", "40"] if method == "l2r" else []
    expected = run(parquet, *flags)
    assert len(expected["curve"]) == 2
    assert expected["fsr"] == {}
    assert "purity" not in expected
    resumable = [*flags, "--output-dir", str(tmp_path), "--checkpoint-steps", "1"]
    run_until_killed(parquet, *resumable, at=STEP, call=6)
    assert run(parquet, *resumable, "--resume") == expected


def test_clean_images_stay_out_of_training(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def data(*flags: str) -> cifar.Data:
        return cifar.read(cifar.parse(["--data", str(parquet), "--noise", "column:wrong_label", *flags]))

    with_clean = data("--method", "mwn", "--clean-images", "100")
    assert len(with_clean.images) == 500
    together = torch.cat([with_clean.images, with_clean.aside_images])
    assert len(together) == len(data().images) == 600
    labels = torch.cat([with_clean.clean, with_clean.aside_labels])
    assert labels.bincount().tolist() == data().clean.bincount().tolist()
    with pytest.raises(SystemExit, match="leaves 0, not --clean-images 1000"):
        data("--method", "l2r", "--limit", "600")
    with pytest.raises(SystemExit):
        data("--method", "l2r", "--clean-images", "0")
    assert "needs clean images" in capsys.readouterr().err


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

    assert config("--noise", "uniform:0.4", "--seed", "3") == FSRConfig(seed=3)
    assert config("--noise", "uniform:0.4", "--paper") == FSRConfig.preset("cifar_noise")
    assert config("--noise", "uniform:0.4", "--mixup").pusher == "authors_margin"
    assert config("--imbalance", "50", "--paper").weight_rule == "shift"
    assert config("--imbalance", "50", "--deferred").warmup_epochs == 160
    assert config("--imbalance", "50", "--noise", "uniform:0.2", "--paper").weight_rule == "clip"


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


# --- resuming --------------------------------------------------------------------------------------------------------


STEP = (cifar, "train_loss")


class Killed(Exception):
    """Nothing after it happens any more."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second one costs more than it brings where the model is so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_until_killed(folder: Path, *flags: str, at: tuple[Any, str], call: int) -> None:
    """Runs until the function `at` (of what, name) is called for the `call`-th time."""
    function, calls = getattr(*at), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*at, counted)
        with pytest.raises(Killed):
            run(folder, *flags)


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def final_model(output: Path) -> bytes:
    return (output / "checkpoints" / "epoch_0003_step_00000000" / "model.safetensors").read_bytes()


Whole = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def whole(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Runs from beginning to end without a checkpoint in mid-epoch; returns the result and the folder."""

    @functools.cache
    def whole(*flags: str) -> tuple[dict[str, Any], Path]:
        output = tmp_path_factory.mktemp("whole")
        return run(parquet, *SHORT, *flags, "--output-dir", str(output)), output

    return whole


FLAGS = {
    "restarts": [],
    "mixup": ["--mixup"],
    "long tail": ["--imbalance", "2", "--schedule", "steps", "--batch-size", "40"],
    "ce": ["--method", "ce", "--schedule", "cosine"],
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_a_killed_run_ends_where_the_other_did(
    flags: list[str], parquet: Path, whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, output = whole(*flags)
    resumable = [*SHORT, *flags, "--output-dir", str(tmp_path), "--checkpoint-steps", "3"]
    run_until_killed(parquet, *resumable, at=STEP, call=8)
    assert checkpoints(tmp_path) == ["epoch_0001_step_00000000", "epoch_0001_step_00000002"]
    assert run(parquet, *resumable, "--resume") == expected
    assert "epoch 1, step 2" in capsys.readouterr().out
    assert final_model(tmp_path) == final_model(output)


def test_killed_while_a_checkpoint_is_written(parquet: Path, whole: Whole, tmp_path: Path) -> None:
    expected, output = whole()
    resumable = [*SHORT, "--output-dir", str(tmp_path), "--checkpoint-steps", "3", "--keep", "1"]
    run_until_killed(parquet, *resumable, at=(Path, "replace"), call=4)  # the third checkpoint gets its name
    assert checkpoints(tmp_path) == ["epoch_0001_step_00000000", "partial"]
    run_until_killed(parquet, *resumable, "--resume", at=(shutil, "rmtree"), call=2)  # the one before it is removed
    assert checkpoints(tmp_path) == ["epoch_0001_step_00000002", "partial"]
    assert run(parquet, *resumable, "--resume") == expected
    assert checkpoints(tmp_path) == ["epoch_0003_step_00000000"]
    assert final_model(tmp_path) == final_model(output)


def test_a_finished_run_trains_nothing(parquet: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, output = whole(*FLAGS["long tail"])
    before = checkpoints(output)
    monkeypatch.setattr(cifar, "train_loss", None)
    assert run(parquet, *SHORT, *FLAGS["long tail"], "--output-dir", str(output), "--resume") == expected
    assert checkpoints(output) == before


def test_resuming_before_the_first_checkpoint(
    parquet: Path, whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, output = whole()
    resumable = [*SHORT, "--output-dir", str(tmp_path)]
    run_until_killed(parquet, *resumable, at=STEP, call=2)
    assert run(parquet, *resumable, "--resume") == expected
    assert "no checkpoint" in capsys.readouterr().out
    assert final_model(tmp_path) == final_model(output)


def test_a_checkpoint_of_other_settings_is_refused(parquet: Path, whole: Whole) -> None:
    _, output = whole()
    before = final_model(output)

    def refused(match: str, *flags: str) -> None:
        with pytest.raises(SystemExit, match=match):
            run(parquet, *SHORT, "--output-dir", str(output), *flags)

    refused("has checkpoints of another run: pass --resume")
    refused(r"written with --seed 0 \(now 3\), checksum of the labels", "--resume", "--seed", "3")
    refused("--noise column:wrong_label .now none", "--resume", "--noise", "none")
    refused("--limit 200 .now 150", "--resume", "--limit", "150")
    refused("with --model test_resnet .now resnet20.: go on", "--resume", "--model", "resnet20")
    refused("--mixup False .now True", "--resume", "--mixup")
    refused("images a step over all processes 50 .now 25", "--resume", "--batch-size", "25")
    assert final_model(output) == before


def test_checkpoints_need_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--resume"], ["--checkpoint-steps", "3"]):
        with pytest.raises(SystemExit):
            cifar.parse(flags)
        assert "need --output-dir" in capsys.readouterr().err


def test_a_killed_run_on_two_processes(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends where the uninterrupted one does; and one process goes on with what two have written."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, parquet, tmp_path]
    environment = {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch 1, step 2" in done.stdout
    assert final_model(tmp_path / "killed") == final_model(tmp_path / "whole")
    flags = [*SHORT, "--mixup", "--output-dir", str(tmp_path / "fewer"), "--resume"]
    assert len(run(parquet, *flags, "--batch-size", "50")["curve"]) == 3
    assert "epoch 1, step 2" in capsys.readouterr().out


def in_two_processes(parquet: Path, output: Path) -> None:
    """What each of two processes does: a whole run, one that is killed, and the rest of that one."""
    flags = [*SHORT, "--mixup", "--batch-size", "25", "--output-dir"]
    expected = run(parquet, *flags, str(output / "whole"))
    run_until_killed(parquet, *flags, str(output / "killed"), "--checkpoint-steps", "3", at=STEP, call=8)
    if os.environ["RANK"] == "0":
        shutil.copytree(output / "killed", output / "fewer")
    resumed = run(parquet, *flags, str(output / "killed"), "--resume")
    assert resumed["curve"] == expected["curve"]
    assert resumed["purity"] == expected["purity"]


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]), Path(sys.argv[2]))
