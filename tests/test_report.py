"""The page of labels that look wrong: what it holds, what it escapes, how large it is; and the command."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CLIP
from PIL import Image
from safetensors.torch import save_file
from test_wrapper import Net, digits, make, step, train
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from fsr_wrap import FSRWrapper, with_index
from fsr_wrap.cli import main
from fsr_wrap.pictures import as_image, clipped, find, look
from fsr_wrap.pushers import AreaUnderMargin
from fsr_wrap.saved import read_memory

HOSTILE = "<script>alert(1)</script>"
NAMES = [
    HOSTILE,
    "</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b",
    "<!--",
    "five",
    "six",
    "seven",
    "'8'",
    "{{9}}",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """What a page holds, by element; and whether every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []
        [script] = [text for text in self.texts.get("script", []) if text.startswith("{")] or ["{}"]
        self.rows = json.loads(script)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def cards(self) -> list[dict[str, str | None]]:
        return [attributes for attributes in self.all("li") if "data-index" in attributes]


class Pictures(Dataset[Any]):
    """Square pictures; the colour of each is its index."""

    def __init__(self, length: int, side: int = 8) -> None:
        self.length, self.side = length, side

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((self.side, self.side, 3), (index // 256, index % 256, 7), dtype=np.uint8), 0


def colour(uri: str | None) -> int:
    """Which of `Pictures` it is."""
    assert uri is not None
    red, green, blue = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).getpixel((0, 0))
    assert blue == 7
    return red * 256 + green


@pytest.fixture(scope="module")
def trained() -> FSRWrapper:
    model, fsr = make()
    train(model, fsr, 4, 0.3)
    return fsr


@pytest.fixture(scope="module")
def folder(trained: FSRWrapper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    trained.save(folder)
    return folder


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_and_the_table_say_what_label_issues_says(trained: FSRWrapper, tmp_path: Path) -> None:
    path = trained.report(tmp_path / "a" / "b", with_index(Pictures(400)), [f"class {c}" for c in range(10)])
    assert path == tmp_path / "a" / "b" / "index.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.html", "label_issues.csv"]
    issues = trained.label_issues()
    flagged = issues[issues.is_label_issue].sort_values("label_quality", kind="stable")
    assert 50 < len(flagged) < 200
    page = Page(path)
    number = len(flagged) if len(flagged) < 100 else f"About {len(flagged)}"
    assert page.texts["h1"] == [f"{number} of 400 labels look wrong"]
    assert page.rows["index"] == flagged.index.tolist()
    assert page.rows["given"] == flagged.given_label.tolist()
    assert page.rows["suggested"] == flagged.predicted_label.tolist()
    assert [int(card["data-index"] or -1) for card in page.cards] == flagged.index.tolist()
    assert [colour(image["src"]) for image in page.all("img")] == flagged.index.tolist()
    table = pd.read_csv(path.parent / "label_issues.csv", index_col="index")
    assert table.index.tolist()[: len(flagged)] == flagged.index.tolist()
    assert sorted(table.index) == list(range(400))
    assert (table.given_name == "class " + table.given_label.astype(str)).all()
    counts = sum(int(text) for text in page.texts["button"] if text.isdigit())
    assert counts == len(flagged)  # the matrix has all of them
    assert [caption.partition("<")[0] for caption in page.texts["figcaption"]] == [
        "How sure it is",
        "Agreement with the given labels",
        "Weights",
        "Loss",
    ]


def test_after_an_epoch_or_two_nothing_is_flagged_and_the_page_says_why(tmp_path: Path) -> None:
    model = Net()
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), num_samples=400)
    train(model, fsr, 2, 0.3)
    with pytest.warns(UserWarning, match="After 2 epochs FSR cannot tell yet") as told:
        page = Page(fsr.report(tmp_path))
    assert len(told) == 1
    assert page.texts["h1"] == ["Too early to tell which of 400 labels look wrong"]
    assert page.rows == {}  # nothing is listed
    assert fsr.label_issues(share=0.1).is_label_issue.sum() == 40
    train(model, fsr, 1, 0.3)
    assert fsr.label_issues().is_label_issue.sum() > 40


def test_the_page_says_why_labels_were_judged_or_not(
    trained: FSRWrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(text: str) -> bool:
        return any(text in told for told in Page(trained.report(tmp_path)).texts["p"])

    selection = trained._memory.selection
    assert selection is not None
    for early, text in ((False, "began to learn labels by heart; since"), (True, "knew most of the right labels")):
        monkeypatch.setattr(selection, "early", early)
        assert says(text)
    for entry in trained._memory.history.epochs:
        monkeypatch.setitem(entry, "reweighting", False)
    monkeypatch.setattr(selection, "code", torch.tensor([0, 1, 2, 1]).repeat(101)[:401])
    assert says("but for 200 that were held out")


def test_the_page_needs_nothing_else(trained: FSRWrapper, tmp_path: Path) -> None:
    page = Page(trained.report(tmp_path, Pictures(400)))
    for tag, attributes in page.found:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:image/", "#")) or value in ("", "label_issues.csv"), (tag, value)
    assert "@import" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    assert "default-src 'none'" in page.source
    assert "prefers-color-scheme: dark" in page.source
    identities = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    drawn = [
        name for name in identities if re.fullmatch(r"[mp][0-9a-f]{10}", name or "")
    ]  # the same mark in two charts
    assert len(set(identities)) - len(set(drawn)) == len(identities) - len(drawn)


def test_names_and_texts_are_escaped(trained: FSRWrapper, tmp_path: Path) -> None:
    texts = [{"text": f"{index} </script>{HOSTILE}<!-- &amp; {{{{ 7 }}}} " + "é" * 600} for index in range(400)]

    class Texts(Pictures):
        def __getitem__(self, index: int) -> Any:
            return texts[index]

    page = Page(trained.report(tmp_path, Texts(400), NAMES))
    assert len(page.all("script")) == 2
    assert page.all("img") == []
    shown = {NAMES[label] for label in page.rows["given"]}
    assert set(page.rows["names"].values()) >= shown > {HOSTILE, "</script>"}
    assert shown < set(page.texts["b"])
    [first, *_] = page.cards
    index = int(first["data-index"] or -1)
    expected = clipped(texts[index]["text"])
    assert len(expected) == 400
    assert expected.strip() in [text.strip() for text in page.texts["p"]]
    table = pd.read_csv(tmp_path / "label_issues.csv")
    assert HOSTILE in set(table.given_name)


def test_many_samples_stay_small(tmp_path: Path) -> None:
    """50,000 samples, 40 % wrong, with the pictures that take most room: noise."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(100, (50_000,), generator=generator)
    x = torch.eye(100)[clean] + 0.1 * torch.randn(50_000, 100, generator=generator)
    given = torch.where(torch.rand(50_000, generator=generator) < 0.4, (clean * 7 + 1) % 100, clean)
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    fsr = FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=20.0), num_samples=50_000)
    for index in torch.arange(50_000).repeat(4).split(2500):
        step(model, fsr, x[index], given[index], index)

    class Noise(Pictures):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(3, 300, 300), 0

    path = fsr.report(tmp_path, Noise(50_000))
    flagged = int(fsr.label_issues().is_label_issue.sum())
    page = Page(path)
    assert 10_000 < flagged < 30_000
    assert len(page.rows["index"]) == flagged
    assert len(page.cards) > 100
    assert path.stat().st_size < 5e6
    assert f"{flagged:,}" in page.source
    shown = [int(card["data-index"] or -1) for card in page.cards]
    assert page.rows["index"][:100] == shown[:100]
    pairs = [(card["data-given"], card["data-suggested"]) for card in page.cards]
    assert len(set(pairs)) > 60  # of about 100 that there are


def test_without_averaged_predictions_it_says_what_is_missing(tmp_path: Path) -> None:
    model, fsr = make(**{**CLIP, "relabel_weight": 0.0})
    train(model, fsr, 3, 0.3)
    page = Page(fsr.report(tmp_path))
    assert "relabel_weight=0" in page.source
    assert "What is taken for what" not in page.source
    assert "suggested" not in " ".join(page.texts["th"])
    assert "re-weighted from epoch 2 of 3" in page.texts["header"][0]
    assert set(page.rows["suggested"]) == {-1}
    assert "dataset=train_set" in page.source
    assert "Loss" in page.source


def test_where_nothing_looks_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fsr = make()
    train(model, fsr, 1)
    memory = fsr._memory
    memory.selection.share.zero_()
    memory.pseudo.columns["logits"][:-1] = torch.eye(10)[memory.given.known().long()].half()
    page = Page(fsr.report(tmp_path, Pictures(400)))
    assert page.texts["h1"] == ["None of 400 labels looks wrong"]
    assert page.all("script") == page.all("img") == []
    assert len(page.all("svg")) == 4


def test_samples_that_never_came_are_counted(tmp_path: Path) -> None:
    model, fsr = make()
    x, y, _ = digits(0.3)
    for index in torch.arange(300).split(50):
        step(model, fsr, x[index], y[index], index)
    page = Page(fsr.report(tmp_path))
    assert "100 samples were never seen" in page.texts["header"][0]
    assert "No epoch has ended yet" in page.source


def test_what_cannot_be_reported_leaves_no_file(trained: FSRWrapper, tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    target = tmp_path / "new"
    for dataset, error, message in (
        (Pictures(399), ValueError, "399 samples, and 400 were trained on"),
        (Stream(), TypeError, "Stream is no data set"),
        ("train", TypeError, "str is no data set"),
    ):
        with pytest.raises(error, match=message):
            trained.report(target, dataset)
    with pytest.raises(ValueError, match=r"to_image gave a Tensor of shape \(64,\)"):
        trained.report(target, Pictures(400), to_image=lambda sample: torch.zeros(64))
    with pytest.raises(ValueError, match="class_names"):
        trained.report(target, class_names=["a", "b"])
    with pytest.raises(RuntimeError, match="knows nothing"):
        make_new().report(target)
    assert not target.exists()


def make_new() -> FSRWrapper:
    model = nn.Linear(3, 2)
    return FSRWrapper(model, torch.optim.SGD(model.parameters(), lr=0.1), num_samples=1000)


@pytest.mark.parametrize(("module", "name"), [("jinja2", "jinja2"), ("matplotlib", "matplotlib"), ("PIL", "pillow")])
def test_what_is_not_installed_is_named(
    module: str, name: str, trained: FSRWrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {name}: pip install "fsr_wrap\[report\]"'):
        trained.report(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_its_script_runs(trained: FSRWrapper, tmp_path: Path) -> None:
    path = trained.report(tmp_path, Pictures(400), NAMES)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    logged = ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    ran = subprocess.run([str(CHROMIUM), *options, *logged], capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in ran.stderr
    (tmp_path / "dom.html").write_text(ran.stdout)
    page = Page(tmp_path / "dom.html")
    flagged = len(page.rows["index"])
    assert f"1–25 of {flagged}" in page.texts["span"]
    assert len([text for text in page.texts["td"] if re.fullmatch(r"0\.\d{3}", text)]) == 25
    hidden = [card for card in page.cards if "hidden" in card]
    assert len(page.cards) - len(hidden) == 24
    assert [form for form in page.all("form") if "hidden" in form] == []
    assert set(page.texts["option"]) >= {NAMES[label] for label in page.rows["given"]}


# --- pictures --------------------------------------------------------------------------------------------------------


def gradient(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 3 * 8 * 8).view(3, 8, 8)


@pytest.mark.parametrize(
    ("value", "mode", "extremes"),
    [
        (gradient(0, 1), "RGB", (0, 255)),
        (gradient(0.25, 0.75), "RGB", (64, 191)),
        (gradient(-2.1, 2.6), "RGB", (0, 255)),  # normalised
        (gradient(0, 255), "RGB", (0, 255)),
        (gradient(0, 1).half(), "RGB", (0, 255)),
        (gradient(0, 1).permute(1, 2, 0), "RGB", (0, 255)),
        (gradient(0, 1)[2:], "L", (171, 255)),
        (gradient(0, 1)[2], "L", (171, 255)),
        (gradient(0, 1)[None], "RGB", (0, 255)),
        (torch.full((3, 8, 8), 3.0), "RGB", (3, 3)),
        (torch.full((3, 8, 8), torch.nan), "RGB", (0, 0)),
        (np.arange(64, dtype=np.uint8).reshape(8, 8), "L", (0, 63)),
        (np.arange(64, dtype=np.int64).reshape(8, 8) * 4, "L", (0, 252)),
        (torch.eye(8).bool(), "L", (0, 255)),
        (Image.new("L", (8, 8), 9), "L", (9, 9)),
        (Image.new("1", (8, 8), 1), "L", (255, 255)),
        (Image.new("I;16", (8, 8), 70), "L", (70, 70)),
        (Image.new("P", (8, 8), 0), "RGB", (0, 0)),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "RGB", (255, 255)),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "RGB", (255, 255)),
    ],
)
def test_images_of_all_kinds(value: Any, mode: str, extremes: tuple[int, int]) -> None:
    image = as_image(value)
    assert image is not None
    assert (image.mode, image.size) == (mode, (8, 8))
    pixels = np.asarray(image)
    assert (pixels.min(), pixels.max()) == extremes


def damaged() -> bytes:
    """A PNG file whose second chunk has another name."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue().replace(b"IDAT", b"\x00DAT")


@pytest.mark.parametrize(
    "value",
    [
        *(torch.rand(64), torch.rand(2, 3), torch.rand(5, 16, 16), 3, None, b"none", {"bytes": b"none"}, "text"),
        *(damaged(), {"bytes": damaged()}, Image.new("L", (0, 8))),
    ],
)
def test_what_is_no_image(value: Any) -> None:
    assert as_image(value) is None


def encoded() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("sample", "found"),
    [
        ((torch.rand(3, 8, 8), 1, 5), (8, 8)),
        ({"label": 1, "image": Image.new("RGB", (4, 6))}, (4, 6)),
        ({"img": {"bytes": encoded(), "path": None}, "label": 0}, (8, 8)),
        ({"a": encoded(), "b": "a caption"}, (8, 8)),
        (encoded(), (8, 8)),
        (({"x": torch.rand(4), "pixel_values": torch.rand(3, 8, 8)}, 1), (8, 8)),
        ({"text": "how are you", "label": 1}, "how are you"),
        (("how are you", 1), "how are you"),
        ({"premise": "it rains", "hypothesis": "wet", "label": 0}, "premise: it rains\nhypothesis: wet"),
        ({"input_ids": torch.arange(9), "label": 0}, None),
        ((torch.rand(64), 1), None),
        (7, None),
    ],
)
def test_what_is_found_in_a_sample(sample: Any, found: Any) -> None:
    shown = find(sample)
    assert (shown.size if isinstance(shown, Image.Image) else shown) == found


class Augmented(Pictures):
    """As torchvision's: with a transform, which draws."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.transform: Any = lambda x: torch.rand(3, 8, 8) + random.random() + np.random.rand()  # noqa: NPY002

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return (x if self.transform is None else self.transform(x)), y


class Needed(Augmented):
    """A data set that does without no transform."""

    def __getitem__(self, index: int) -> Any:
        return self.transform(None), 0


def test_pictures_are_as_before_the_transforms_which_stay() -> None:
    dataset = Augmented(10)
    kept = dataset.transform
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    for view in (dataset, with_index(dataset), Subset(with_index(dataset), range(10)), dataset + Augmented(2)):
        image = look(view, 3)
        assert isinstance(image, Image.Image)
        assert image.getpixel((0, 0)) == (0, 3, 7)
    assert isinstance(look(Needed(4), 0), Image.Image)
    assert isinstance(look(dataset, 3, lambda sample: sample[0]), Image.Image)
    assert dataset.transform is kept
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_hugging_face_samples_are_found_by_their_index(trained: FSRWrapper, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(Pictures(400)[index][0]) for index in range(400)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    plain = datasets.Dataset.from_dict({"image": images, "label": [0] * 400}, features=features)
    for dataset in (with_index(plain).shuffle(seed=0).select(range(300)), plain.with_format("torch")):
        page = Page(trained.report(tmp_path, dataset))
        found = [int(card["data-index"] or -1) for card in page.cards]
        assert [colour(image["src"]) for image in page.all("img")] == found
        assert len(found) > 30
    assert page.rows["index"] == found


def test_flat_vectors_need_to_be_told_how_they_look(trained: FSRWrapper, tmp_path: Path) -> None:
    x, y, _ = digits(0.3)
    dataset = with_index(TensorDataset(x, y))
    assert "pass <code>to_image=</code>" in Page(trained.report(tmp_path, dataset)).source
    page = Page(trained.report(tmp_path, dataset, to_image=lambda sample: sample[0].view(8, 8)))
    assert len(page.all("img")) == len(page.rows["index"])


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_the_wrapper_says(
    trained: FSRWrapper, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.report(tmp_path / "own")
    for checkpoint in (folder, folder / "fsr.safetensors"):
        assert main(["issues", str(checkpoint), "--csv", str(tmp_path / "out" / "issues.csv")]) == 0
        assert main(["report", str(checkpoint), "--out", str(tmp_path / "report")]) == 0
        own = (tmp_path / "own" / "label_issues.csv").read_bytes()
        assert (tmp_path / "out" / "issues.csv").read_bytes() == own
        assert (tmp_path / "report" / "label_issues.csv").read_bytes() == own
        assert (tmp_path / "report" / "index.html").read_bytes() == (tmp_path / "own" / "index.html").read_bytes()
    flagged = int(trained.label_issues().is_label_issue.sum())
    told = capsys.readouterr()
    assert f"{flagged} of 400 labels look wrong" in told.out
    assert told.err == ""
    assert main(["issues", str(folder), "--csv", "-"]) == 0
    assert capsys.readouterr().out.encode() == own
    (tmp_path / "link.csv").symlink_to(tmp_path / "out" / "issues.csv")
    (tmp_path / "out" / "issues.csv").write_text("older")
    assert main(["issues", str(folder), "--csv", str(tmp_path / "link.csv")]) == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "out" / "issues.csv").read_bytes() == own


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_stays_a_pipe(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        assert main(["issues", str(folder), "--csv", str(pipe)]) == 0
        assert len(read.result().splitlines()) == 401
    assert pipe.is_fifo()


def test_the_command_shows_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x, y, _ = digits(0.3)
    order = y.argsort(stable=True)  # as in folders, class by class
    model, fsr = make()
    for _ in range(4):
        for index in torch.randperm(400).split(50):
            step(model, fsr, x[order[index]], y[order[index]], index)
    fsr.save(folder := tmp_path / "checkpoint")
    fsr._memory.class_names = [f"name {number}" for number in range(10)]
    fsr.save(named := tmp_path / "named")
    labels = y[order].tolist()
    names = [f"name {number}" for number in range(10)]
    root = tmp_path / "folders"
    rows = []
    for index in range(400):
        place = root / names[labels[index]] / f"{index:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(Pictures(400)[index][0]).save(place)
        rows.append({"image": {"bytes": place.read_bytes(), "path": None}, "label": labels[index]})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    table = pyarrow.Table.from_pylist(rows)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (tmp_path / "parts").mkdir()
    for number in range(2):
        part = table.slice(200 * number, 200).replace_schema_metadata(metadata)
        parquet.write_table(part, tmp_path / "parts" / f"{number}.parquet")
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "all.parquet")
    for data in (root, tmp_path / "parts", tmp_path / "all.parquet"):
        assert main(["report", str(folder), "--out", str(tmp_path / "out"), "--data", str(data)]) == 0
        page = Page(tmp_path / "out" / "index.html")
        found = [int(card["data-index"] or -1) for card in page.cards]
        assert [colour(image["src"]) for image in page.all("img")] == found == page.rows["index"]
        assert set(page.rows["names"].values()) <= set(names)
    # Where a run knows the names of its classes, it knows folders that were renamed since; else others in number.
    (root / names[0]).rename(root / "the first, renamed")
    capsys.readouterr()
    assert main(["report", str(named), "--out", str(tmp_path / "other"), "--data", str(root)]) == 2
    assert "classes have other names, 'name 1' in place of 'name 0' first" in capsys.readouterr().err
    for path in list((root / "name 2").iterdir())[1:]:
        path.rename(root / "name 9" / path.name)
    assert main(["report", str(folder), "--out", str(tmp_path / "other"), "--data", str(root)]) == 2
    assert "It is not the data set that was trained on, or not in its order" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def spoil(kind: str, folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that is none."""
    path = tmp_path / "fsr.safetensors"
    if kind == "damaged":
        content = bytearray((folder / "fsr.safetensors").read_bytes())
        content[-5] ^= 1
        path.write_bytes(bytes(content))
    elif kind == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "text":
        path.write_text("no tensors\nat all")
    elif kind == "empty":
        make_new().save(tmp_path)
    elif kind == "other name":
        path = tmp_path / "model.safetensors"
        save_file({"weight": torch.zeros(3)}, path)
    return tmp_path if kind in ("empty", "damaged") else path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "There is no "),
        ("damaged", "is damaged, or not a file of save()"),
        ("foreign", "is damaged, or not a file of save()"),
        ("text", "is damaged, or not a file of save()"),
        ("empty", "FSR knows nothing yet"),
        ("other name", "is not a file of save()"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line(
    kind: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoil(kind, folder, tmp_path)
    out = tmp_path / "out"
    for arguments in (["issues", str(path), "--csv", str(out / "a.csv")], ["report", str(path), "--out", str(out)]):
        assert main(arguments) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("fsr-wrap: ")
        assert message in told.err
        assert told.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "There is no "),
        ("notes.txt", "give a .parquet file or a folder"),
        ("bad.parquet", "cannot be read"),
        ("empty", "neither Parquet files nor folders with pictures"),
        ("short", "1 samples, and 400 were trained on"),
    ],
)
def test_data_that_is_none_is_one_line(
    name: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name in ("empty", "short"):
        (path / "cats").mkdir(parents=True)
    if name == "short":
        Image.new("L", (8, 8)).save(path / "cats" / "a.png")
    if "." in name:
        path.write_text("nothing")
    assert main(["report", str(folder), "--out", str(tmp_path / "out"), "--data", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


class OwnPusher(AreaUnderMargin):
    """A user's own, which the command cannot know."""


def test_a_checkpoint_of_a_pusher_of_ones_own(tmp_path: Path) -> None:
    model, fsr = make(pusher=OwnPusher())
    train(model, fsr, 2, 0.3)
    fsr.save(tmp_path)
    memory = read_memory(tmp_path)
    assert memory.config.pusher_name == "OwnPusher"
    assert main(["issues", str(tmp_path), "--csv", str(tmp_path / "a.csv")]) == 0
    fsr.report(tmp_path / "own")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "own" / "label_issues.csv").read_bytes()


def test_it_is_a_module_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fsr_wrap", "issues", str(tmp_path / "none"), "--csv", str(tmp_path / "a.csv")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("fsr-wrap: There is no ")
    with pytest.raises(SystemExit, match="2"):
        main(["issues", str(tmp_path)])
