"""How the benchmarks' figures look."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """Matplotlib for files that read in light and in dark: no background, and text of a grey between."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#808080")
    plt.rcParams.update(grey | {"savefig.transparent": True, "svg.hashsalt": "fsr_wrap"})
    return plt
