"""The report's charts, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[dict[str, Any]]

# Colours that stand for those of the page, which knows whether it is light or dark.
_PAGE = {"#010101": "currentColor", "#010102": "var(--one)", "#010103": "var(--two)", "#010104": "var(--three)"}
_PAGE |= {"#010105": "var(--line)", "#010106": "var(--shade)"}
TEXT, ONE, TWO, THREE, LINE, SHADE = _PAGE
# What a page of several charts does not need, or has once.
_CUT = {
    r"<metadata>.*?</metadata>": "",
    r"<style.*?</style>": "",
    r'(<svg[^>]*?) width="[^"]*"': r"\1",
    r'(<svg[^>]*?) height="[^"]*"': r"\1",
    r'<g id="[^"]*"': "<g",
    r" font-family: [^;]*;": "",
    r"(\d\.\d\d)\d+": r"\1",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "axes.prop_cycle": f"cycler('color', ['{ONE}', '{TWO}', '{THREE}'])",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "ytick.left": False,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def curves(history: History, lines: dict[str, str], *, share: bool) -> str | None:
    """What the history says by epoch, as a chart; None if there is nothing of it.

    **Arguments:** `lines`, the history's names and how they are called; `share`, whether they lie in [0, 1].
    """
    there = {name: label for name, label in lines.items() if any(_known(entry.get(name)) for entry in history)}
    if not there:
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        epochs = [entry["epoch"] + 1 for entry in history]
        active = [entry["epoch"] + 1 for entry in history if entry.get("reweighting")]
        if active:
            axes.axvspan(active[0] - 0.5, epochs[-1] + 0.5, color=SHADE, lw=0)
        for name, label in there.items():
            values = [entry[name] if _known(entry.get(name)) else float("nan") for entry in history]
            axes.plot(epochs, values, label=label, marker="o" if len(epochs) < 3 else None)
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if share:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.set_ylim(bottom=0)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=1, borderaxespad=0.2, handlelength=1.4)

    return _svg(draw, ", ".join(there.values()) + " by epoch", extra=0.2 * len(there))


def _known(value: Any) -> bool:
    return value is not None and abs(value) < float("inf")


def histogram(flagged: Any, others: Any, threshold: float | None) -> str:
    """How the quality of labels is distributed, of those flagged and of the others, (n,) arrays in [0, 1]."""

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter

        labels, colours = ["look right", "look wrong"], [ONE, TWO]
        axes.hist([others, flagged], bins=40, range=(0, 1), stacked=True, label=labels, color=colours, rwidth=0.86)
        if threshold is not None:
            axes.axvline(threshold, color=TEXT, lw=1, ls=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_xlabel("label quality")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2, borderaxespad=0.2, handlelength=1.0)

    return _svg(draw, "How many labels are of which quality", extra=0.2)


def _svg(draw: Any, title: str, extra: float) -> str:
    """The chart with the page's colours and fonts. `extra`: inches for the legend."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {**_STYLE, "svg.hashsalt": title}]):
        figure = Figure(figsize=(5.0, 2.3 + extra), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for pattern, wanted in _CUT.items():
        text = re.sub(pattern, wanted, text, flags=re.DOTALL)
    for found, wanted in _PAGE.items():
        text = text.replace(found, wanted)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
