"""The weight rules: from the scores of a batch to its weights ω, normalised over all processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import functional


def unnormalized(rule: str, scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """u of each sample, (b,) (under "shift" the scores as they are), and what the other processes must know of them to
    normalise, (k,)."""
    if rule == "clip":
        weights = functional.clip_weights(scores)
        return weights, weights.sum()[None]
    if rule == "shift":
        bounded = scores if valid is None else torch.where(valid, scores, torch.inf)
        lowest = bounded.amin() if len(scores) else scores.new_tensor(torch.inf)
        count = scores.new_tensor(float(len(scores))) if valid is None else valid.sum().to(scores.dtype)
        return scores, torch.stack([lowest, scores.sum(), count])
    return torch.ones_like(scores) if valid is None else valid.to(scores.dtype), scores.new_zeros(0)


def normalize(rule: str, unnormalized: Tensor, valid: Tensor | None, size: int, sums: Tensor) -> Tensor:
    """ω of the batch, normalised over all processes (Eq. 2, Section 5.2).

    **Arguments:** `valid`, None where every sample is; `size`, b everywhere; `sums`, of each process, (W, k).
    """
    if rule == "uniform":
        return unnormalized / size
    if rule == "select":
        return unnormalized / sums.sum().clamp(min=1).to(unnormalized.dtype)
    if rule == "clip":
        total = sums.sum()
    else:
        minimum, count = sums[:, 0].amin(), sums[:, 2].sum()
        unnormalized = functional.shift_weights(unnormalized, minimum, size) * (1 if valid is None else valid)
        total = sums[:, 1].sum() - count * minimum + count / size
    weights = functional.normalize_weights(unnormalized, total).to(unnormalized.dtype)
    if total.device.type != "cpu" or not math.isfinite(total.item()):  # infinite reward gradient: plain training
        uniform = torch.ones_like(weights) / size if valid is None else valid.to(weights.dtype) / size
        weights = torch.where(total - total == 0, weights, uniform)
    return weights
