"""Which labels look wrong, as one HTML page and a CSV file beside it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from .checks import warn
from .data import check_map_style, is_stream
from .issues import check_class_names, is_too_early, label_issues_from_memory
from .lookup import check_labels, indices_of
from .memory import Memory
from .selection import HELD
from .shares import rank_within

if TYPE_CHECKING:
    from .wrapper import FSRWrapper

PAGE_NAME, TABLE_NAME = "index.html", "label_issues.csv"
_ROWS = 50_000  # flagged labels that the page itself lists
_PICTURES, _BUDGET = 240, 2_500_000  # at most, and characters for all of them
_WORST = 120  # of them, before those of each pair of classes
_PAIRS, _MATRIX, _CLASSES = 12, 20, 300  # most that are shown
_MISSING = 'The report needs {name}: pip install "fsr_wrap[report]"'


@dataclass(frozen=True)
class _Card:
    """One of the worst offenders."""

    index: int
    given: int
    suggested: int
    quality: float
    picture: str | None = None
    text: str | None = None


class _Page:
    """What the page says, from what a run knows.

    **Arguments:** `table`, of `label_issues`; `memory`; `names`, of the classes, or None.
    """

    def __init__(self, table: Any, memory: Memory, names: list[str] | None) -> None:
        assert memory.num_classes is not None
        self._memory, self._classes, self.names = memory, memory.num_classes, names
        self._labels = _numbers(table["given_label"])
        self.known = self._labels >= 0
        self._quality = torch.tensor(table["label_quality"].to_numpy())
        self._is_issue = torch.tensor(table["is_label_issue"].to_numpy())
        worst = self._quality.nan_to_num(torch.inf).argsort(stable=True)
        self.flagged = worst[self._is_issue[worst]]  # dataset indices, the worst first
        self.given, self.suggested = self._labels[self.flagged], _numbers(table["predicted_label"])[self.flagged]

    def name(self, label: int) -> str:
        return str(label) if self.names is None else self.names[label]

    def summary(self) -> dict[str, Any]:
        """In plain words."""
        number, total = len(self.flagged), int(self.known.sum())
        history, selection = self._memory.history.epochs, self._memory.selection
        first = next((int(entry["epoch"] or 0) + 1 for entry in history if entry["reweighting"]), None)
        return {
            "flagged": number,
            "total": total,
            "unseen": len(self.known) - total,
            "about": _about(number),
            "share": number / max(1, total),
            "classes": self._classes,
            "epochs": self._memory.epoch,
            "first": first,
            "selects": selection is not None,
            "too_early": is_too_early(self._memory),
            "by_heart": selection is not None and not selection.early,
            "held": 0 if selection is None else int((selection.code[:-1].cpu()[: len(self.known)] == HELD).sum()),
            "rule": self._memory.config.weight_rule,
            "suggests": self._memory.pseudo is not None,
        }

    def pairs(self) -> list[dict[str, Any]]:
        """Which classes are taken for each other most often, in both directions together."""
        there = self.suggested >= 0
        given, suggested = self.given[there], self.suggested[there]
        low, high = torch.minimum(given, suggested), torch.maximum(given, suggested)
        found, number = _most(low * self._classes + high, _PAIRS)
        out = []
        for pair, count in zip(found, number, strict=True):
            one, other = divmod(pair, self._classes)
            number_there = int(((given == one) & (suggested == other)).sum())
            both = 0 < number_there < count
            if not number_there:
                one, other = other, one
            out.append({"one": one, "other": other, "number": count, "both": both})
        return out

    def classes(self) -> list[dict[str, Any]]:
        """Of each class that was given: how many, how many look wrong, and what most of these are taken for."""
        number = torch.bincount(self._labels[self.known], minlength=self._classes)
        wrong = torch.bincount(self.given, minlength=self._classes)
        share = wrong / number.clamp(min=1)
        out = []
        for label in share.argsort(descending=True, stable=True).tolist()[:_CLASSES]:
            if number[label]:
                taken = self.suggested[(self.given == label) & (self.suggested >= 0)]
                first = int(torch.bincount(taken).argmax()) if len(taken) else None
                row = {"label": label, "number": int(number[label]), "wrong": int(wrong[label])}
                out.append({**row, "share": float(share[label]), "first": first})
        return out

    def matrix(self) -> dict[str, Any] | None:
        """How many of each given class (rows) are taken for each other one, of the classes that most are about."""
        there = self.suggested >= 0
        if not bool(there.any()):
            return None
        involved = torch.cat([self.given[there], self.suggested[there]])
        labels = sorted(_most(involved, _MATRIX)[0])
        place = torch.full((self._classes,), -1)
        place[labels] = torch.arange(len(labels))
        given, suggested = place[self.given[there]], place[self.suggested[there]]
        inside = (given >= 0) & (suggested >= 0)
        cells = torch.bincount((given * len(labels) + suggested)[inside], minlength=len(labels) ** 2)
        rows = cells.view(len(labels), len(labels)).tolist()
        return {"labels": labels, "rows": rows, "most": max(1, int(cells.max())), "all": self._classes == len(labels)}

    def rows(self) -> dict[str, Any]:
        """The flagged labels as columns, the worst first; as many as the page lists."""
        part = self.flagged[:_ROWS]
        quality = (self._quality[part] * 1000).round().int()
        columns = {"index": part, "given": self.given[:_ROWS], "suggested": self.suggested[:_ROWS], "quality": quality}
        mentioned = torch.cat([columns["given"], columns["suggested"]]).unique().tolist()
        names = {label: self.name(label) for label in mentioned if label >= 0}
        return {**{name: column.tolist() for name, column in columns.items()}, "names": names}

    def cards(self, dataset: Any, to_image: Callable[[Any], Any] | None, column: str) -> list[_Card]:
        """The worst offenders, and the worst of each pair of classes, with what they look like."""
        from .pictures import clipped, look, thumbnail

        position = _positions(self._memory, dataset, column, self._is_issue)
        cards: list[_Card] = []
        spent = 0
        for place in self._chosen().tolist():
            index, given, suggested = (int(c[place]) for c in (self.flagged, self.given, self.suggested))
            if len(cards) == _PICTURES or spent > _BUDGET:
                break
            where = position(index)
            if where is None:
                continue
            found = look(dataset, where, to_image)
            facts = (index, given, suggested, float(self._quality[index]))
            if isinstance(found, str):
                cards.append(_Card(*facts, text=clipped(found)))
            elif found is not None:
                cards.append(_Card(*facts, picture=thumbnail(found)))
                spent += len(cards[-1].picture or "")
        return sorted(cards, key=lambda card: card.quality)

    def _chosen(self) -> Tensor:
        """Places among the flagged: the worst ones, then the worst of each pair of classes, the second of each, …"""
        _, pair = (self.given * (self._classes + 1) + self.suggested).unique(return_inverse=True)
        rank = rank_within(torch.arange(len(pair)), pair)
        rank[:_WORST] = -1
        return rank.argsort(stable=True)

    def charts(self) -> list[dict[str, str]]:
        """Histogram and curves, those of which there is something to see."""
        from .charts import curves, histogram

        history, quality = self._memory.history.epochs, self._quality
        others = quality[self.known & ~self._is_issue]
        threshold = float(quality[self.flagged].max()) if len(self.flagged) else None
        drawn: list[tuple[str, str | None]] = [
            ("How sure it is", histogram(quality[self.flagged].numpy(), others.numpy(), threshold))
        ]
        losses = {"loss": "training loss"} | ({} if self._memory.config.selects else {"reward_loss": "reward loss"})
        agreement = {"agreement": "labels trained on", "held_out_agreement": "labels held out"}
        agreement |= {"dictionary_agreement": "labels of the reward data"}
        taken = "weight taken away" if self._memory.config.selects else "samples of no weight"
        weights = {"zero_weight_ratio": taken, "effective_share": "effective sample size"}
        weights |= {"wrong_share": "wrong labels, estimated"}
        if history:
            drawn += [
                ("Agreement with the given labels", curves(history, agreement, share=True)),
                ("Weights", curves(history, weights, share=True)),
                ("Loss", curves(history, losses, share=False)),
            ]
        return [{"title": title, "svg": svg} for title, svg in drawn if svg is not None]


def write_report(
    folder: str | os.PathLike[str],
    memory: Memory,
    *,
    dataset: Any = None,
    column: str = "index",
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    to_image: Callable[[Any], Any] | None = None,
) -> Path:
    """See `FSRWrapper.report`; from a memory alone, one that was saved say. **Returns:** the page."""
    check_packages()
    environment = _environment()
    table = label_issues_from_memory(memory, None, class_names)
    page = _Page(table, memory, check_class_names(memory, class_names))
    environment.globals["name"] = page.name
    content = environment.get_template("report.html.j2").render(
        summary=page.summary(),
        pairs=page.pairs(),
        classes=page.classes(),
        matrix=page.matrix(),
        rows=page.rows(),
        cards=[] if dataset is None else page.cards(dataset, to_image, column),
        has_dataset=dataset is not None,
        charts=page.charts(),
        table_name=TABLE_NAME,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / TABLE_NAME, table)
    with _whole_file(folder / PAGE_NAME) as path:
        path.write_text(content, encoding="utf-8")
    return folder / PAGE_NAME


def report_at_end(fsr: FSRWrapper, folder: str | os.PathLike[str], dataset: Any) -> None:
    """`fsr.report` when training is over: if it fails there is a warning, and what comes after training is done."""
    try:
        fsr.report(folder, None if is_stream(dataset) else dataset)
    except Exception as error:
        warn(
            f"The report could not be written ({type(error).__name__}: {error}). Training is not affected; once this "
            "is fixed, call fsr.report(folder, dataset=train_set)."
        )


def write_table(path: Path | TextIO, table: Any) -> None:
    """The table of `label_issues` as CSV: the flagged labels first, the worst of them on top."""
    order = table.assign(_right=~table["is_label_issue"]).sort_values(["_right", "label_quality"], kind="stable").index
    with _whole_file(path) if isinstance(path, Path) else contextlib.nullcontext(path) as partial:
        table.loc[order].to_csv(partial, float_format="%.6g")


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A file beside it that takes its name when all is well; itself, if it is a pipe or a device."""
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()  # where a link leads
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_packages() -> None:
    """**Raises:** `ImportError` naming what the report needs and is not installed, and how to get it."""
    for name in ("jinja2", "matplotlib", "pandas", "PIL"):
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(_MISSING.format(name={"PIL": "pillow"}.get(name, name))) from error


def _environment() -> Any:
    """Where templates are."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fsr_wrap")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = _percent
    return environment


def _numbers(column: Any) -> Tensor:
    """Class numbers, -1 where there is none."""
    return torch.tensor(column.fillna(-1).to_numpy("int64"))


def _positions(memory: Memory, dataset: Any, column: str, flagged: Tensor) -> Callable[[int], int | None]:
    """Where in the data set the sample of a flagged index is, None if it is not there.

    **Raises:** `TypeError` for a stream or no data set; `ValueError` as in `indices_of` and `check_labels`.
    """
    check_map_style(dataset, "fsr.report(folder, dataset=train_set)")
    number = indices_of(dataset, column, len(flagged))
    check_labels(memory, dataset, number, flagged)
    where = flagged[number].nonzero()[:, 0].flip(0)  # of several positions the first
    return dict(zip(number[where].tolist(), where.tolist(), strict=True)).get


def _most(values: Tensor, number: int) -> tuple[list[int], list[int]]:
    """The most frequent values, and how often each is there."""
    found, count = values.unique(return_counts=True)
    order = count.argsort(descending=True, stable=True)[:number]
    return found[order].tolist(), count[order].tolist()


def _about(number: int) -> str:
    """Three digits of it."""
    size = 10 ** max(0, len(str(number)) - 3)
    rounded = round(number / size) * size
    return f"{rounded:,}" if number < 100 else f"about {rounded:,}"


def _percent(share: float) -> str:
    """Without a false 0 % or 100 %."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
