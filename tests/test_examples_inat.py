"""examples/inat2018.py from end to end on the digits, and its parts."""

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
    command = [sys.executable, str(EXAMPLES / "inat2018.py"), "--output-dir", str(output), *FLAGS, *flags]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A whole run of 2 epochs, 3 steps each, with a checkpoint in the midst of the second."""
    output = tmp_path_factory.mktemp("inat")
    return output, *run(output, "--checkpoint-steps", "5", "--keep", "9")


@pytest.fixture(scope="module")
def inat():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("inat2018")
        for name in ("inat2018", "image_files", "checkpoints", "common"):
            sys.modules.pop(name, None)


def test_the_digits_have_the_official_layout(first):
    output, stdout, _ = first
    assert "No --data-dir" in stdout.splitlines()[0]
    data = output / "digits2018"
    counts = {}
    for name in ("train", "val"):
        content = json.loads((data / f"{name}2018.json").read_text())
        ids = [category["id"] for category in content["categories"]]
        assert len(ids) == 10
        assert max(ids) >= 10  # with gaps
        for image in content["images"]:
            top, _, category, file = Path(image["file_name"]).parts
            assert (top, int(category) in ids, Path(file).suffix) == ("train_val2018", True, ".jpg")
            assert (data / image["file_name"]).is_file()
        labels = [annotation["category_id"] for annotation in content["annotations"]]
        assert len(labels) == len(content["images"])
        counts[name] = [labels.count(category) for category in ids]
    assert len(set(counts["val"])) == 1
    assert counts["train"][0] > 100
    assert any(20 <= count <= 100 for count in counts["train"])
    assert counts["train"][-1] < 20


def test_the_summary(first):
    output, _, summary = first
    expected = {"method": "fsr", "epochs": 2, "steps": 6, "classes": 10, "train_images": 96}
    assert summary.items() >= expected.items()
    assert 0 <= summary["top1"] <= summary["top5"] <= 1
    assert {"many", "medium", "few"} <= summary.keys()
    assert list((output / "logs").rglob("events.out.tfevents.*"))


def test_a_resumed_run_ends_where_the_other_did(first, tmp_path):
    output, _, summary = first
    resumed = tmp_path / "resumed"
    shutil.copytree(output, resumed)
    last = "checkpoints/epoch_0002_step_00000000"
    shutil.rmtree(resumed / last)
    stdout, again = run(resumed, "--resume")
    assert "epoch 1, step 2" in stdout
    assert "epoch 1/2" not in stdout
    assert len(list((resumed / "checkpoints").iterdir())) == 2
    assert (resumed / last / "model.safetensors").read_bytes() == (output / last / "model.safetensors").read_bytes()
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    _, summary = run(tmp_path, "--limit", "97", "--epochs", "1")
    assert (summary["train_images"], summary["steps"]) == (97, 3)


def test_only_the_digits_own_last_run_is_forgotten(inat, first, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first[0], copy)
    checkpoints = sys.modules["checkpoints"]
    last = copy / "checkpoints" / "epoch_0002_step_00000000"
    settings = json.loads((last / "progress.json").read_text())["settings"]

    def forget(settings):
        progress = checkpoints.Progress(settings, 3)
        checkpoints.Checkpoints(inat.Accelerator(), progress, None, copy / "checkpoints", None, 2).forget()

    forget({**settings, checkpoints.LABELS: "another"})  # a run with --data-dir was in the same folder
    assert (last / "model.safetensors").is_file()
    forget({**settings, "--epochs": "7"})
    assert not (copy / "checkpoints").exists()
    forget(settings)  # there are none


def test_digits_start_anew_where_digits_were_and_nowhere_else(first, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first[0], copy)
    for progress in (copy / "checkpoints").glob("*/progress.json"):
        saved = json.loads(progress.read_text())
        saved["settings"]["checksum of the labels"] = "1"
        progress.write_text(json.dumps(saved))
    before = sorted(copy.glob("checkpoints/*/*"))
    with pytest.raises(AssertionError, match="has checkpoints of another run"):
        run(copy)
    assert sorted(copy.glob("checkpoints/*/*")) == before
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(first[0] / "checkpoints", copy / "checkpoints")
    assert "No --data-dir" in run(copy)[0]


def test_the_recipe_of_the_paper(inat, tmp_path):
    args = inat.parse_args(["--data-dir", str(tmp_path)])
    assert (args.model, args.image_size, args.epochs, args.batch_size) == ("resnet50", 224, 90, 32)
    assert (args.lr_warmup_epochs, args.decay_epochs, args.fsr_start) == (5, [60, 80], 60)
    factors = {epoch: inat.lr_factor(epoch * 10, 10, 5, [60, 80]) for epoch in (0, 5, 59, 60, 80)}
    assert factors == pytest.approx({0: 0.02, 5: 1, 59: 1, 60: 0.1, 80: 0.01})


def write(folder: Path, name: str, category: int, *, annotated: bool = True) -> None:
    content = {"images": [{"id": 1, "file_name": "train_val2018/a.jpg"}], "categories": [{"id": 3}, {"id": 7}]}
    content["annotations"] = [{"image_id": 1, "category_id": category}] if annotated else []
    (folder / f"{name}2018.json").write_text(json.dumps(content))


def test_wrong_data_is_named(inat, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train2018.json is missing.*visipedia/inat_comp"):
        inat.read_data(tmp_path)
    write(tmp_path, "train", 7)
    with pytest.raises(FileNotFoundError, match=r"a\.jpg is listed, but missing"):
        inat.read_data(tmp_path)
    (tmp_path / "train_val2018").mkdir()
    (tmp_path / "train_val2018" / "a.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"val2018\.json is missing"):
        inat.read_data(tmp_path)
    write(tmp_path, "val", 4)
    with pytest.raises(ValueError, match="1 images without a category"):
        inat.read_data(tmp_path)
    write(tmp_path, "val", 7, annotated=False)
    with pytest.raises(ValueError, match="1 images without a category"):
        inat.read_data(tmp_path)
    write(tmp_path, "val", 3)
    train, val, counts = inat.read_data(tmp_path)
    assert (train[1].tolist(), val[1].tolist(), counts) == ([1], [0], [0, 1])


def test_common(inat):
    common = sys.modules["common"]
    assert common.long_tail_counts(5000, 10, 100)[::9] == [5000, 50]
    logits, target = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([1, 2])
    assert common.topk_correct(logits, target, 1).tolist() == [False, False]
    assert common.topk_correct(logits, target, 2).tolist() == [True, False]
    assert common.topk_correct(logits, target, 5).tolist() == [True, True]
    correct, labels = torch.tensor([True, True, False, True]), torch.tensor([0, 1, 1, 2])
    assert common.shot_accuracy(correct, labels, [200, 50, 30, 3], 100, 20) == {"many": 1.0, "medium": 0.75}
