"""L2R (Ren et al., ICML 2018, Algorithm 1) by two libraries of differentiable optimizers: what `cost.py` compares with.

Each peer takes the model, the virtual step's learning rate, a batch and a reward batch (images, labels), and gives

- the losses of the batch, (b,), with the graph to the model's own parameters, so that the real step needs no second
  forward of the batch, and
- its weights, (b,), detached: ω₀ = 0, one virtual SGD step on Σ ω_i ℓ_i, the reward loss there, −∂L_R/∂ω by double
  backward, clipped at 0, over their sum.

BatchNorm runs in train mode. `scaled_dot_product_attention` has a second derivative only as plain matrix products, so
the batch's forward takes these; the reward batch's forward is free to take a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import higher
except ImportError:
    higher = None
try:
    import torchopt
except ImportError:
    torchopt = None

Peer = Callable[[nn.Module, float, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def l2r_by_higher(
    model: nn.Module, lr: float, x: Tensor, y: Tensor, reward_x: Tensor, reward_y: Tensor
) -> tuple[Tensor, Tensor]:
    """L2R by `higher`: a functional copy of the model for this step, whose first parameters are the model's own."""
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (copy, virtual):
        losses, omega = _losses(copy, x, y)
        with torch.no_grad():
            for own, moved in zip(model.buffers(), copy.buffers(), strict=True):
                own.copy_(moved)
        virtual.step((omega * losses).sum())
        return losses, _weights(F.cross_entropy(copy(reward_x), reward_y), omega)


def l2r_by_torchopt(
    model: nn.Module, lr: float, x: Tensor, y: Tensor, reward_x: Tensor, reward_y: Tensor
) -> tuple[Tensor, Tensor]:
    """L2R by `torchopt`, as in its own example: the virtual parameters take the place of the model's for a while.

    The running averages of BatchNorm see the reward batch too.
    """
    own = torchopt.extract_state_dict(model, by="reference")
    losses, omega = _losses(model, x, y)
    torchopt.MetaSGD(model, lr=lr).step((omega * losses).sum())
    reward_loss = F.cross_entropy(model(reward_x), reward_y)
    torchopt.recover_state_dict(model, own)
    return losses, _weights(reward_loss, omega)


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, (b,), to be differentiated twice, and ω = 0."""
    with sdpa_kernel(SDPBackend.MATH):
        losses = F.cross_entropy(model(x), y, reduction="none")
    return losses, torch.zeros_like(losses, requires_grad=True)


def _weights(reward_loss: Tensor, omega: Tensor) -> Tensor:
    """Algorithm 1, lines 9 to 11."""
    unnormalized = (-torch.autograd.grad(reward_loss, omega)[0]).clamp(min=0)
    total = unnormalized.sum()
    return unnormalized / (total + (total == 0))


PEERS: dict[str, Peer] = {}
if higher is not None:
    PEERS["L2R by higher"] = l2r_by_higher
if torchopt is not None:
    PEERS["L2R by torchopt"] = l2r_by_torchopt
