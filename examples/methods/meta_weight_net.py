"""Meta-Weight-Net, MWN (Shu et al., NeurIPS 2019).

A sample's weight is a function of its loss, V(ℓ; Φ): 1-100-1, ReLU, sigmoid. Each step:

    θ' = θ − lr · ∇_θ (1/b) Σ V(ℓ_i; Φ) ℓ_i,  lr the current rate    (virtual: no momentum, no weight decay)
    Φ ← Adam(1e-3, weight decay 1e-4) on ∇_Φ of the clean loss at θ'
    loss = (1/b) Σ V(ℓ_i; Φ) ℓ_i, with the new Φ; the weights are not normalised and carry no gradient

V is given the losses' values, so that the derivative by Φ goes through θ' alone. The last line takes the first line's
losses again: the released code's second forward pass of the batch gives the same ones.
The paper trains for 60,000 steps. In runs of a few thousand V does little: while the network underfits, any larger
weight is a larger step and lowers the clean loss, so that V rises to 1 for all losses, where the sigmoid is flat.
Source: the paper and xjtushujun/meta-weight-net (MIT; read for facts).
Needs clean images (1,000). Cost: 3 to 6. State: Φ and Adam's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from .base import Method, Task, frozen_statistics
from .l2r import draw_clean


class MetaWeightNet(Method):
    title = "MWN"
    cost = "3–6"
    needs_clean = True
    state = ("net", "adam")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()).to(task.labels.device)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1e-3, weight_decay=1e-4)

    def weights(self, losses: Tensor) -> Tensor:
        """V, (b,)."""
        return self.net(losses.detach()[:, None])[:, 0]

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        rate = self.optimizer.param_groups[0]["lr"]
        virtual = grad((self.weights(losses) * losses).mean(), params, create_graph=True, materialize_grads=True)
        ahead = [(p - rate * g).detach().requires_grad_() for p, g in zip(params, virtual, strict=True)]
        clean_x, clean_y = draw_clean(self.task)
        with frozen_statistics(model):
            logits = functional_call(model, dict(zip(names, ahead, strict=True)), (clean_x,))
        direction = grad(F.cross_entropy(logits, clean_y), ahead, materialize_grads=True)
        # θ' depends on Φ through −lr·virtual alone.
        own = list(self.net.parameters())
        gradients = grad(virtual, own, [-rate * d for d in direction], retain_graph=True)
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        self.adam.step()
        return (self.weights(losses).detach() * losses).mean()
