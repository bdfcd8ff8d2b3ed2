"""The picture that goes with a link to the site: the name, what it is for, and accuracy by epoch.

python examples/benchmarks/card.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from compare import load
from figures import pyplot

DOCS = Path(__file__).resolve().parents[2] / "docs"
CASE = "fashion-uniform40"


def main() -> None:
    runs = [run for run in load(DOCS / "results" / "compare.json") if run["case"] == CASE]
    plt = pyplot()
    figure = plt.figure(figsize=(12, 6.3), dpi=100)
    figure.text(0.06, 0.70, "fsr_wrap", color="white", fontsize=58, weight="bold")
    lines = "Training robust to wrong labels", "and long-tailed classes,", "without clean data.", "", "For PyTorch."
    figure.text(0.06, 0.21, "\n".join(lines), color="#c5ccd6", fontsize=24, linespacing=1.4)
    panel = figure.add_axes((0.6, 0.2, 0.34, 0.6), facecolor="none")
    for method, title, color, place in (
        ("fsr", "FSR", "#4fb3e8", (0.85, 1)),
        ("ce", "plain training", "#e8a04f", (0.2, 0.15)),
    ):
        curve = np.mean([run["curve"] for run in runs if run["method"] == method], axis=0)
        panel.plot(np.arange(1, len(curve) + 1), curve, color=color, linewidth=5)
        panel.text(*place, title, color=color, fontsize=22, transform=panel.transAxes)
    panel.set_xticks([])
    panel.set_yticks([0.7, 0.75, 0.8, 0.85])
    panel.tick_params(labelsize=14)
    panel.set_title("40 % of the labels redrawn", fontsize=16, pad=24)
    panel.set_xlabel("epoch", fontsize=17)
    panel.set_ylabel("test accuracy", fontsize=17)
    panel.spines[["top", "right"]].set_visible(False)
    card = DOCS / "assets" / "card.png"
    figure.savefig(card, transparent=False, facecolor="#14202e", metadata={"Software": None})


if __name__ == "__main__":
    main()
