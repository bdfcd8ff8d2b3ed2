"""Figure 5 (right) of the paper: accuracy and dictionary purity of each pusher, without MixUp and with.

python examples/benchmarks/noisy_fashion_mnist.py --data-dir DIR --noise 0.4 --pushers --out docs/results/pushers.json
python examples/benchmarks/plot_pushers.py docs/results/pushers.json --out docs/results/pushers.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from figures import pyplot

from fsr_wrap.pushers import PUSHERS

PANELS = {"last": "test accuracy, last epoch", "purity": "dictionary purity"}
WAYS = {"": ("without MixUp", "#2a86b8"), "-mixup": ("with MixUp", "#c8553d")}


def main() -> None:
    """One panel a measure, two bars a pusher: the mean over the seeds, with their range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plt = pyplot()
    runs = json.loads(args.file.read_text())["results"]["0.4"]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 3.4), sharey=True)
    rows = np.arange(len(PUSHERS))[::-1]
    for panel, (measure, label) in zip(panels, PANELS.items(), strict=True):
        for way, (title, color) in WAYS.items():
            values = [[run[measure] for run in runs[f"pusher-{name}{way}"]] for name in PUSHERS]
            mean = np.array([np.mean(value) for value in values])
            reach = np.abs(np.array([[min(value), max(value)] for value in values]).T - mean)
            height = rows + (0.2 if not way else -0.2)
            panel.barh(height, mean, height=0.36, xerr=reach, color=color, label=title, error_kw={"linewidth": 1})
        panel.set(xlabel=label, yticks=rows, yticklabels=[name.replace("_", " ") for name in PUSHERS])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(0.6, 0.9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
