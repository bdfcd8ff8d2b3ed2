"""Learning to reweight, L2R (Ren et al., ICML 2018).

    u_i = max(⟨∇ℓ_i, ∇L_clean⟩, 0),  ω_i = u_i / Σu  (0 if all are 0),  loss = Σ ω_i ℓ_i

This is the paper's Algorithm 1 without its virtual step: it begins at weights of 0, where the virtual network is the
network itself and the derivative by a weight is that inner product, times a rate that cancels. The inner products come
from differentiating the batch's gradient by the weights. A clean batch is as large as the batch; its forward pass
leaves BatchNorm's running averages alone.
Source: the paper (the released code's licence is non-commercial; only its batch size was looked at).
Needs clean images (the paper 1,000). Cost: 3 to 6. State: none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from .base import Method, Task, frozen_statistics


def inner_products(losses: Tensor, params: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """⟨∇ℓ_i, direction⟩, (b,): the derivative by ε of Σ_i ε_i ⟨∇ℓ_i, direction⟩. The losses' graph stays."""
    epsilon = torch.ones_like(losses, requires_grad=True)
    gradients = grad(losses, params, epsilon, create_graph=True, materialize_grads=True)
    return grad(gradients, epsilon, direction, retain_graph=True)[0]


def draw_clean(task: Task) -> tuple[Tensor, Tensor]:
    """A random batch of the clean images and their labels."""
    x, y = task.clean
    rows = torch.randint(len(y), (min(task.batch_size, len(y)),), device=y.device)
    return x[rows], y[rows]


class L2R(Method):
    title = "L2R"
    cost = "3–6"
    needs_clean = True

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        clean_x, clean_y = draw_clean(self.task)
        with frozen_statistics(model):
            direction = grad(F.cross_entropy(model(clean_x), clean_y), params, materialize_grads=True)
        losses = F.cross_entropy(model(x), y, reduction="none")
        useful = inner_products(losses, params, direction).clamp(min=0)
        total = useful.sum()
        return (useful / (total + (total == 0)) * losses).sum()
