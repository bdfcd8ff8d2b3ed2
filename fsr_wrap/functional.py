"""The maths of FSR as pure functions (torch alone).

Symbols, as in the paper and the docs: b samples in the batch, q in the reward batch, C classes, d features; h the
head's input, φ the head's parameters, ℓ_i(φ) the loss of sample i, η the look-ahead's step size. Nothing here reads or
writes any state; arithmetic runs in the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

Params = dict[str, Tensor]
HeadFn = Callable[[Params, Any], Tensor]
"""A head as a function: (parameters, features (b, ...), or whatever it takes) → logits (b, C)."""
SHUT = -1e4
"""Logits below are of classes that a mask shuts out."""
_MARGIN, _ALIKE = 7.0, 3.0  # of a class with hardly any samples; how many times as large a class may be and be no tail


# --- losses ----------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, *, reduction: str = "none") -> Tensor:
    """ℓ_i, the softmax cross-entropy of each sample.

    **Arguments:**

    - `logits`: (b, C).
    - `target`: (b,) class numbers, or (b, C) soft targets in the dtype of the logits.
    - `label_smoothing`: in [0, 1); the target becomes (1−s)·target + s/C.
    - `reduction`: `"none"`, or `"sum"`.

    **Returns:** (b,), or ().
    """
    return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)


def dense_target(target: Tensor, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The target as (b, C) soft labels like the logits, smoothed."""
    if target.ndim == 1:
        target = torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return target


def residual(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """∂ℓ_i/∂logits_i = softmax(logits) − target, (b, C); exact for soft targets of any sum."""
    return losses_and_residual(logits, target, label_smoothing)[1]


def losses_and_residual(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """`cross_entropy` (b,) and `residual` (b, C) of one softmax; without gradients."""
    log_probability = logits.log_softmax(1)
    if target.ndim == 1 and not label_smoothing:
        label = target[:, None]
        losses = log_probability.gather(1, label).neg_()[:, 0]
        minus_one = log_probability.new_full(label.shape, -1.0)
        return losses, log_probability.exp_().scatter_add_(1, label, minus_one)
    soft = dense_target(target, logits, label_smoothing)
    losses = -(soft * log_probability).sum(1)
    probability = log_probability.exp()
    return losses, (probability if target.ndim == 1 else probability * soft.sum(1, keepdim=True)) - soft


# --- any head: torch.func --------------------------------------------------------------------------------------------


def head_gradient(
    head: HeadFn, params: Params, features: Any, target: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Params, Tensor]:
    """Σ_i ∇_φ ℓ_i(φ), the batch's gradient on the head, and Σ_i ℓ_i(φ).

    By torch.autograd on leaves of its own: torch.func.grad would keep a second-order graph, which nobody needs.

    **Arguments:**

    - `head`, `params`: the head as a function and φ.
    - `features`: (b, ...), h. `target`: (b,) or (b, C).

    **Returns:** the gradient, named and shaped like φ, and the loss, (). Divided by q, at φ' and on a reward batch, the
    gradient is G = ∇_φ' (1/q) Σ_j ℓ(y_j, head(h_j; φ')) (Eq. 3, Eq. 6's first factor).
    """
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        loss = cross_entropy(head(leaves, features), target, label_smoothing).sum()
        gradient = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(params, gradient, strict=True)), loss.detach()


def look_ahead(params: Params, gradient: Params, *, lr: float, batch_size: int) -> Params:
    """φ' = φ − η ∇_φ Σ_i ω₀ ℓ_i(φ) with uniform weights ω₀ = 1/b (Algorithm 1; Eq. 3's Θ_{t+1}).

    **Arguments:** φ; `gradient`, the sum from `head_gradient`; `lr`, η; `batch_size`, b.

    **Returns:** φ', named and shaped like φ.
    """
    return {name: value.sub(gradient[name], alpha=lr / batch_size) for name, value in params.items()}


def meta_gradient(
    head: HeadFn,
    params: Params,
    features: Any,
    target: Tensor,
    gradient: Params,
    *,
    lr: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−∂L_R/∂ω_i = η ⟨G, ∇_φ ℓ_i(φ)⟩ for every sample at once: one jvp of the loss vector along G (Eq. 6, last row).

    **Arguments:** as in `head_gradient`; `gradient` is G; `lr` is η.

    **Returns:** (b,), the scores: positive where the sample's gradient also lowers the reward loss.
    """

    def losses(params: Params) -> Tensor:
        return cross_entropy(head(params, features), target, label_smoothing)

    product: Tensor = jvp(losses, (params,), (gradient,))[1]
    return lr * product


def meta_gradient_in_reverse(
    head: HeadFn,
    params: Params,
    features: Any,
    target: Tensor,
    gradient: Params,
    *,
    lr: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`meta_gradient` of a head without forward-mode derivatives: Σ_i u_i ∇_φ ℓ_i(φ) is linear in u, and its product
    with G has the derivatives ⟨G, ∇_φ ℓ_i(φ)⟩. A backward pass of a backward pass."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        losses = cross_entropy(head(leaves, features), target, label_smoothing)
        ones = torch.ones_like(losses, requires_grad=True)
        wrt = list(leaves.values())
        sums = torch.autograd.grad(losses, wrt, ones, create_graph=True, materialize_grads=True)
        inner = sum((known * found).sum() for known, found in zip(gradient.values(), sums, strict=True))
        assert isinstance(inner, Tensor)
        return lr * torch.autograd.grad(inner, ones)[0]


def meta_gradient_one_by_one(
    head: HeadFn,
    params: Params,
    features: Any,
    target: Tensor,
    gradient: Params,
    *,
    lr: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`meta_gradient` of a head that can be differentiated once and no more: b backward passes."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        losses = cross_entropy(head(leaves, features), target, label_smoothing)
        products = []
        for loss in losses:
            one = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, materialize_grads=True)
            products.append(sum((known * found).sum() for known, found in zip(gradient.values(), one, strict=True)))
        return lr * torch.stack(products).detach() if products else losses.detach()  # type: ignore[arg-type]


# --- linear head and cross-entropy: closed form ----------------------------------------------------------------------


def _gram(left: Tensor, right: Tensor, bias: bool) -> Tensor:
    gram = left @ right.T
    return gram + 1 if bias else gram


def linear_look_ahead_logits(
    features: Tensor,
    logits: Tensor,
    batch_features: Tensor,
    batch_residual: Tensor,
    *,
    lr: float,
    batch_size: int | None = None,
    bias: bool = True,
) -> Tensor:
    """The logits that the look-ahead head φ' of a linear head gives, without forming φ'.

    For W' = W − (η/b) Eᵀh and b' = b − (η/b) Eᵀ1: logits' = logits − (η/b) (features·hᵀ + 1) E.

    **Arguments:**

    - `features`: (n, d) where to evaluate, and `logits` (n, C) there at φ.
    - `batch_features`, `batch_residual`: h (b, d) and E (b, C) of the training batch; rows of zeros add nothing.
    - `lr`: η. `batch_size`: b, the number of rows if not given. `bias`: whether the head has one.

    **Returns:** (n, C).
    """
    scale = lr / (batch_size or batch_features.shape[0])
    return torch.addmm(logits, _gram(features, batch_features, bias), batch_residual, alpha=-scale)


def linear_meta_gradient(
    features: Tensor,
    residual: Tensor,
    reward_features: Tensor,
    reward_residual: Tensor,
    *,
    lr: float,
    bias: bool = True,
) -> Tensor:
    """η ⟨G, ∇_φ ℓ_i⟩ of a linear head in closed form: score_i = η Σ_c E_ic ((h_i·H_Rᵀ + 1) Q)_c (Eq. 6, last row).

    The C×d gradient is never formed.

    **Arguments:**

    - `features`, `residual`: h (b, d) and E (b, C) of the batch at φ.
    - `reward_features`, `reward_residual`: H_R (q, d) and Q = (softmax − target)/q (q, C) at φ'.
    - `lr`: η. `bias`: whether the head has one.

    **Returns:** (b,).
    """
    return lr * ((_gram(features, reward_features, bias) @ reward_residual) * residual).sum(1)


def linear_gradient(params: Params, features: Tensor, residual: Tensor) -> Params:
    """Σ_i ∇_φ ℓ_i of a linear head, Eᵀh and Eᵀ1, named and shaped like φ. **Arguments:** φ; h (n, d), E (n, C)."""
    gradient = {"weight": residual.T @ features}
    return gradient | {"bias": residual.sum(0)} if "bias" in params else gradient


def linear_meta_gradient_along(features: Tensor, residual: Tensor, gradient: Params, *, lr: float) -> Tensor:
    """η ⟨G, ∇_φ ℓ_i⟩ of a linear head where G is at hand, summed over processes, say: η Σ_c E_ic (G_W h_i + G_b)_c.

    **Arguments:** `features` h (b, d), `residual` E (b, C); `gradient`, G: `weight` (C, d) and perhaps `bias` (C,).

    **Returns:** (b,).
    """
    return lr * (F.linear(features, gradient["weight"], gradient.get("bias")) * residual).sum(1)


# --- weights ---------------------------------------------------------------------------------------------------------


def clip_weights(scores: Tensor) -> Tensor:
    """u = max(0, score) (Eq. 2 with ω₀ subtracted first, so that zeros follow the noise rate). (b,) → (b,)."""
    return scores.clamp(min=0)


def shift_weights(scores: Tensor, minimum: Tensor, batch_size: int | Tensor) -> Tensor:
    """u = score − min(score) + 1/b: no sample is left out (Section 5.2).

    **Arguments:** `scores` (b,); `minimum` () and `batch_size` over all processes.
    """
    return scores - minimum + 1 / batch_size


def normalize_weights(unnormalized: Tensor, total: Tensor) -> Tensor:
    """ω = u / Σu (Algorithm 1's Normalize); all zeros stay all zeros. `total` is Σu over all processes.

    The released code divides by Σu + 1e-5: where the scores are small, as at the end of training, that takes weight
    from all samples alike.
    """
    return unnormalized / total.clamp(min=torch.finfo(total.dtype).tiny)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(Σω)² / Σω², between 1 and b; 0 where all weights are 0. (..., b) → (...)."""
    return weights.sum(-1).square() / weights.square().sum(-1).clamp(min=torch.finfo(weights.dtype).tiny)


# --- re-labelling and MixUp ------------------------------------------------------------------------------------------


def relabel(
    stored: Tensor,
    logits: Tensor,
    *,
    momentum: float,
    mean_square: Tensor | None = None,
    is_open: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Momentum re-labelling (Eq. 7), as released: the stored logits are first divided by their RMS over the batch.

    Classes that a mask shuts take no part, neither in the RMS nor in the pseudo-labels; their logits count as 0.

    **Arguments:**

    - `stored`: ŷ_{t−1} (b, C), zeros where a sample was never seen.
    - `logits`: f(x, Θ_t) (b, C).
    - `momentum`: β, the weight of the old value.
    - `mean_square`: (), of `stored` over all processes; computed if not given.
    - `is_open`: (b, C) bool, logits > `SHUT`; computed if not given.

    **Returns:** the pseudo-labels softmax(ŷ_{t−1}) and the new ŷ_t, both (b, C).
    """
    if is_open is None:
        is_open = logits > SHUT
    if mean_square is None:
        mean_square = (stored.square() * is_open).sum() / is_open.sum().clamp(min=1)
    normalized = stored * (mean_square + 1e-8).rsqrt()
    new = torch.lerp(F.threshold(logits, SHUT, 0.0), normalized, momentum)
    pseudo = torch.where(is_open, normalized, torch.finfo(normalized.dtype).min).softmax(1)
    return pseudo, new


def distribution(mass: Tensor) -> Tensor:
    """Rows divided by their sums, (n, C) → (n, C); zeros stay zeros."""
    return mass / mass.sum(1, keepdim=True).clamp(min=1e-6)


def sharpen(probability: Tensor) -> Tensor:
    """p² / Σp², a pseudo-label from averaged probabilities (temperature ½). (b, C) → (b, C); zeros stay zeros."""
    square = probability.square()
    return square / square.sum(1, keepdim=True).clamp(min=torch.finfo(square.dtype).tiny)


def class_margins(number: Tensor) -> Tensor:
    """By how much the logit of a label must be ahead, by class: the fewer samples, the more (Cao et al., NeurIPS 2019).

        m_c = 7·(1 − (3 n_min/n_max)^¼)·(n_min/n_c)^¼,  0 where n_max ≤ 3 n_min

    **Arguments:** `number`, n_c (C,); classes without samples have no margin, and none depends on them.

    **Returns:** (C,) float64, 4.1 for the smallest class if the largest has 100 times its samples.
    """
    there, number = number > 0, number.double()
    if not there.any():
        return torch.zeros_like(number)
    least, most = number[there].amin(), number.amax()
    largest = _MARGIN * (1 - (_ALIKE * least / most).clamp(max=1) ** 0.25)
    return torch.where(there, largest * (least / number.clamp(min=1)) ** 0.25, 0)


def held_back(logits: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """The logits, those that the target asks for lowered by their class's margin.

    **Arguments:** `logits` (b, C); `target` (b, C), rows of any sum, whose margin is that of their classes on average;
    `margin` (C,).
    """
    share = target / target.sum(1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    return logits - share * margin.to(logits.dtype)


def early_learning(logits: Tensor, average: Tensor) -> Tensor:
    """log(1 − ⟨p̄, softmax(f(x))⟩), the early-learning regulariser (Liu et al., NeurIPS 2020, Eq. 6).

    **Arguments:** `logits` (b, C); `average`, p̄ (b, C), rows that sum to 1, or to 0 for samples without one.

    **Returns:** (b,).
    """
    return torch.log1p(-(average * logits.softmax(1)).sum(1).clamp(max=1 - 1e-4))


def mixup_coefficients(uniform: Tensor, beta: float = 0.5) -> Tensor:
    """m = max(U^(1/β)/2, 1 − U^(1/β)/2), about Beta(β, β), for U uniform in [0, 1). (b,) → (b,) in [1/2, 1]."""
    half = uniform.pow(1 / beta) / 2
    return torch.maximum(half, 1 - half)
