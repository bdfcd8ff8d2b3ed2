"""Cross-entropy ("SoftMax") and label smoothing.

    −Σ_c t_c log p_c,  t = (1 − s)·onehot(y) + s/C,  s = 0 or 0.1 (Szegedy et al., CVPR 2016, Section 7).

Cost: 1. State: none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method


class CrossEntropy(Method):
    title = "cross-entropy"
    smoothing = 0.0

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, label_smoothing=self.smoothing)


class LabelSmoothing(CrossEntropy):
    title = "label smoothing"
    smoothing = 0.1
