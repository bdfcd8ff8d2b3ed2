"""Draws the learning curves of the committed results.

python examples/benchmarks/plot.py docs/results/fashion.json docs/results/cifar10n.json --out docs/results/curves.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt

TITLES = {"fashion": "Fashion-MNIST, 40 % uniform noise", "cifar10n": "CIFAR-10N, 40 % human errors (10,000 images)"}
ROWS = {
    "fashion": {"ce": "cross-entropy", "default": "FSR (default)"},
    "cifar10n": {"CE": "cross-entropy", "FSR": "FSR (default)"},
}


def read_runs(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method; of Fashion-MNIST those at noise 0.4."""
    results = json.loads(path.read_text())["results"]
    return results.get("0.4", results)


def main() -> None:
    """One panel a file: test accuracy by epoch, mean and range over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, panels = plt.subplots(1, len(args.files), figsize=(5 * len(args.files), 3.4), squeeze=False)
    for panel, path in zip(panels[0], args.files, strict=True):
        runs = read_runs(path)
        for (method, label), color in zip(ROWS[path.stem].items(), ("#b2484a", "#2a6f97"), strict=True):
            curves = np.array([run["curve"] for run in runs[method]])
            epochs = np.arange(1, curves.shape[1] + 1)
            panel.plot(epochs, curves.mean(0), color=color, label=label)
            panel.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
        panel.set(title=TITLES[path.stem], xlabel="epoch", ylabel="test accuracy")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
