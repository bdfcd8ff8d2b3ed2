"""timm's own loaders, mixing, optimizers and schedules with FSR."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import CLIP, assert_close, judge_soon, worker_warnings
from PIL import Image
from test_loops import trace
from timm.data import AugMixDataset, FastCollateMixup, IterableImageDataset, Mixup, create_dataset
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from fsr_wrap import FSRWrapper, with_index
from fsr_wrap.integrations.timm import IndexedLoader, create_loader

CLASSES, N, SIZE, BATCH = 3, 46, 16, 8
RULES: dict[str, dict[str, Any]] = {
    name: {"dictionary_size": 12, "reward_batch_size": 9, **rule} for name, rule in {"select": {}, "clip": CLIP}.items()
}
RULE = pytest.mark.parametrize("rule", RULES)
PLAIN = {
    "no_aug": True,
    "num_workers": 0,
    "persistent_workers": False,
    "device": torch.device("cpu"),
    "mean": (0.0,) * 3,
    "std": (1.0,) * 3,
}

# timm leaves the files of images for the garbage collector to close.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in a folder a class; each tells its number by its colour, and its class by where it is bright."""
    root = tmp_path_factory.mktemp("images")
    for number in range(N):
        pixels = np.full((SIZE, SIZE, 3), 4 * number, dtype=np.uint8)
        label = number % CLASSES
        pixels[:, :, 2] = 255 * (np.arange(SIZE) // 5 == label)
        place = root / "train" / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return root


def dataset(folder: Path) -> Any:
    return create_dataset("", root=str(folder), split="train", is_training=True)


def numbers(folder: Path) -> tuple[Tensor, Tensor]:
    """The number that each sample of the data set shows, and its class."""
    names = [Path(name).stem for name in dataset(folder).filenames()]
    number = torch.tensor([int(name) for name in names])
    return number, number % CLASSES


def shown(images: Tensor) -> Tensor:
    """The number in an image's corner of the first channel."""
    return (images[:, 0, 0, 0] * 255 / 4).round().long()


# --- the loader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetcher", [True, False])
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@worker_warnings
def test_each_image_comes_with_its_index(folder: Path, prefetcher: bool, indexed: bool, workers: int) -> None:
    data = with_index(dataset(folder)) if indexed else dataset(folder)
    options = {**PLAIN, "use_prefetcher": prefetcher, "num_workers": workers}
    loader = create_loader(data, (3, SIZE, SIZE), BATCH, is_training=True, **options)
    number, label = numbers(folder)
    found = []
    for images, target, index in loader:
        assert images.shape == (BATCH, 3, SIZE, SIZE)
        assert images.dtype == torch.float32
        assert torch.equal(shown(images), number[index])
        assert torch.equal(target, label[index])
        found.append(index)
    assert len(torch.cat(found).unique()) == loader.samples_per_epoch == len(loader) * BATCH == 40
    assert data.transform is not None
    assert loader.dataset.transform is data.transform


def test_soft_targets_of_the_data_set_pass(folder: Path) -> None:
    data = dataset(folder)
    data.target_transform = lambda label: F.one_hot(torch.tensor(label), CLASSES).float()
    options = {**PLAIN, "use_prefetcher": False, "collate_fn": default_collate}
    _, label = numbers(folder)
    for _, target, index in create_loader(data, (3, SIZE, SIZE), BATCH, **options):
        assert torch.equal(target, F.one_hot(label[index], CLASSES).float())


def test_evaluation_loader(folder: Path) -> None:
    loader = create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, **PLAIN, crop_pct=1.0)
    index = torch.cat([index for _, _, index in loader])
    assert torch.equal(index, torch.arange(N))


@pytest.mark.parametrize("views", [2, 3])
def test_augmentation_splits(folder: Path, views: int) -> None:
    """All first views, then all second ones."""
    data = AugMixDataset(dataset(folder), views)
    options = {**PLAIN, "no_aug": False, "auto_augment": "augmix-m5", "num_aug_splits": views, "scale": (1.0, 1.0)}
    loader = create_loader(data, (3, SIZE, SIZE), BATCH, is_training=True, **options)
    assert loader.samples_per_epoch == 40 * views
    model, optimizer = make()
    fsr = FSRWrapper(model, optimizer, dataset=data, samples_per_epoch=loader.samples_per_epoch, **RULES["clip"])
    for images, target, index in loader:
        assert len(images) == len(target) == len(index) == BATCH * views
        assert torch.equal(index[:BATCH], index[BATCH : 2 * BATCH])
        assert torch.equal(target, numbers(folder)[1][index])
        fsr.loss(model(images), target, index).backward()
    assert fsr.epoch == 1
    with pytest.raises(ValueError, match=r"AugMixDataset\(dataset\), and the index is added here"):
        create_loader(AugMixDataset(with_index(dataset(folder))), (3, SIZE, SIZE), BATCH)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_repeated_augmentation(folder: Path, one_process_group: None) -> None:
    """Each sample comes three times in a row, and has one score."""
    options = {**PLAIN, "distributed": True, "num_aug_repeats": 3}
    loader = create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, is_training=True, **options)
    number, _ = numbers(folder)
    model, optimizer = make()
    fsr = FSRWrapper(model, optimizer, dataset=loader.dataset, samples_per_epoch=loader.samples_per_epoch)
    for images, target, index in loader:
        assert torch.equal(shown(images), number[index])
        fsr.loss(model(images), target, index).backward()
    assert fsr.epoch == 1
    assert fsr.scores.isfinite().sum() == len({int(i) for *_, index in loader for i in index})


@pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
def test_fast_collate_mixup(folder: Path, mode: str) -> None:
    """Soft targets, the samples' own indices and classes; mixing can be turned off as timm's loop does."""
    mix = FastCollateMixup(mixup_alpha=1.0, mode=mode, num_classes=CLASSES, label_smoothing=0.0)
    loader = create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, is_training=True, collate_fn=mix, **PLAIN)
    number, own = numbers(folder)
    size = BATCH // 2 if mode == "half" else BATCH
    model, optimizer = make()
    fsr = FSRWrapper(model, optimizer, dataset=loader.dataset, samples_per_epoch=loader.samples_per_epoch)
    for images, target, index, label in loader:
        assert len(images) == len(target) == len(index) == size
        assert torch.equal(label, own[index])
        assert (target.gather(1, label[:, None]) > 0).all()
        fsr.loss(model(images), target, index, label=label).backward()
    assert fsr.epoch == 1
    loader.mixup_enabled = False
    assert not loader.mixup_enabled
    images, target, index, label = next(iter(loader))
    assert torch.equal(target.argmax(1), label)
    assert torch.equal(shown(images), number[index])
    with pytest.raises(ValueError, match="use_prefetcher=True"):
        create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, collate_fn=mix, use_prefetcher=False)


def test_streams_are_refused(folder: Path) -> None:
    class Reader:
        pass

    with pytest.raises(TypeError, match="The samples of Reader, a stream, have no index"):
        create_loader(IterableImageDataset("", reader=Reader()), (3, SIZE, SIZE), BATCH)


# --- training with timm's pieces -------------------------------------------------------------------------------------


def make(**optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=SIZE, patch_size=8)
    return model, create_optimizer_v2(model, **{"opt": "sgd", "lr": 0.1, **optimizer})


def wrapped(loader: IndexedLoader, rule: str = "clip", **optimizer: Any) -> tuple[nn.Module, FSRWrapper]:
    model, inner = make(**optimizer)
    fsr = FSRWrapper(model, inner, dataset=loader.dataset, samples_per_epoch=loader.samples_per_epoch, **RULES[rule])
    return model, judge_soon(fsr, CLASSES)


@RULE
def test_wrong_labels_get_less(folder: Path, rule: str) -> None:
    loader = create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, is_training=True, **PLAIN)
    wrong = torch.rand(N, generator=torch.Generator().manual_seed(4)) < 0.25
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    options = {"dataset": loader.dataset, "samples_per_epoch": loader.samples_per_epoch, **RULES[rule]}
    fsr = judge_soon(FSRWrapper(model, create_optimizer_v2(model, "adamw", lr=1e-2), **options), CLASSES)
    lost = kept = 0.0
    for epoch in range(20):
        for images, target, index in loader:
            target = torch.where(wrong[index], (target + 1) % CLASSES, target)
            fsr.loss(model(images), target, index).backward()
            fsr.step()
            fsr.zero_grad()
            if epoch >= 10:
                lost += float(fsr.weights[wrong[index]].sum())
                kept += float(fsr.weights.sum())
    assert lost / kept < 0.5 * wrong.float().mean()


@pytest.mark.parametrize("optimizer", [{"opt": "adamw", "layer_decay": 0.7}, {"opt": "lookahead_sgd"}])
def test_layer_decay_schedule_and_averaged_weights(folder: Path, optimizer: dict[str, Any]) -> None:
    """While FSR is plain, all are those of a run without it; when it is not, the average has no hand in it."""
    more = {**optimizer, "weight_decay": 0.05, "lr": 1e-3}
    loader = create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, is_training=True, **PLAIN)

    def run(with_fsr: bool, average: bool = True, warmup: int = 9) -> tuple[nn.Module, Any, Any, list[Any]]:
        model, inner = make(**more)
        options = {**RULES["clip"], "warmup_epochs": warmup, "samples_per_epoch": loader.samples_per_epoch}
        used = FSRWrapper(model, inner, dataset=loader.dataset, **options) if with_fsr else inner
        schedule, _ = create_scheduler_v2(used, sched="cosine", num_epochs=3, warmup_epochs=1, updates_per_epoch=5)
        ema, rates = ModelEmaV3(model, decay=0.9), []
        torch.manual_seed(2)
        for epoch in range(3):
            for images, target, index in loader:
                logits = model(images)
                plain = nn.functional.cross_entropy(logits, target) if not with_fsr else None
                loss = used.loss(logits, target, index) if plain is None else plain
                loss.backward()
                used.step()
                used.zero_grad()
                if average:
                    ema.update(model)
                    ema(images)
                rates.append([group["lr"] for group in used.param_groups])
            schedule.step(epoch + 1)
        return model, ema, used, rates

    model, ema, _, rates = run(True)
    twin, twin_ema, _, twin_rates = run(False)
    assert rates == twin_rates
    assert len(set(rates[-1])) > 3 or "layer_decay" not in optimizer
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), 1e-4)
    assert_close(dict(ema.module.state_dict()), dict(twin_ema.module.state_dict()), 1e-4)
    model, _, fsr, _ = run(True, warmup=1)
    twin, _, twin_fsr, _ = run(True, average=False, warmup=1)
    assert fsr.is_reweighting
    assert trace(model, fsr) == trace(twin, twin_fsr)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@RULE
def test_mixup_by_the_loop_teaches_the_given_labels(folder: Path, rule: str, mode: str) -> None:
    loader = create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, is_training=True, **PLAIN)
    model, fsr = wrapped(loader, rule)
    mix = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, mode=mode, num_classes=CLASSES)
    np.random.seed(0)  # noqa: NPY002  timm draws from numpy's global stream
    for _ in range(3):
        for images, label, index in loader:
            mixed, target = mix(images, label)
            fsr.loss(model(mixed), target, index, label=label).backward()
            fsr.step()
            fsr.zero_grad()
    own = numbers(folder)[1]
    assert fsr.is_reweighting
    seen = fsr._memory.given.known()
    assert torch.equal(seen[seen >= 0].long(), own[seen >= 0])
    if rule == "clip":
        assert torch.equal(fsr.dictionary.label, own[fsr.dictionary.index])


@RULE
def test_resumes_as_if_nothing_had_happened(folder: Path, rule: str) -> None:
    """In mid-epoch, by timm's own order of things: model, optimizer, schedule, average."""
    loader = create_loader(dataset(folder), (3, SIZE, SIZE), BATCH, is_training=True, **PLAIN)
    torch.manual_seed(5)
    parts = [part for _ in range(3) for part in loader]

    def train(model: nn.Module, fsr: FSRWrapper, batches: list[Any]) -> None:
        for images, target, index in batches:
            fsr.loss(model(images), target, index).backward()
            fsr.step()
            fsr.zero_grad()

    model, fsr = wrapped(loader, rule)
    train(model, fsr, parts[:8])
    saved = copy.deepcopy({"state_dict": model.state_dict(), "optimizer": fsr.state_dict()})
    train(model, fsr, parts[8:])
    twin, twin_fsr = wrapped(loader, rule)
    twin.load_state_dict(saved["state_dict"])
    twin_fsr.load_state_dict(saved["optimizer"])
    train(twin, twin_fsr, parts[8:])
    assert trace(model, fsr) == trace(twin, twin_fsr)


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, mixes, averages, saves, and goes on; without --fsr it is the same loop with plain cross-entropy."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    example = importlib.import_module("timm_train")

    def few_digits(root: Path) -> None:
        for number in range(80):
            place = root / ("train" if number < 60 else "validation") / str(number % 10) / f"{number}.png"
            example.write_digit(np.full((8, 8), number % 10), place)

    monkeypatch.setattr(example, "write_digits", few_digits)
    flags = ["--output", str(tmp_path), "--batch-size", "20"]
    accuracy = example.main(example.parse_args([*flags, "--fsr", "--epochs", "2", "--mixup", "0.2", "--model-ema"]))
    assert 0 < accuracy <= 100
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    assert saved["optimizer"]["fsr"]["epoch"] == 2
    example.main(example.parse_args([*flags, "--fsr", "--epochs", "3", "--resume", str(tmp_path / "last.pth.tar")]))
    assert torch.load(tmp_path / "last.pth.tar", weights_only=False)["optimizer"]["fsr"]["epoch"] == 3
    example.main(example.parse_args([*flags, "--epochs", "1", "--layer-decay", "0.8", "--clip-grad", "1"]))
    assert "fsr" not in torch.load(tmp_path / "last.pth.tar", weights_only=False)["optimizer"]
