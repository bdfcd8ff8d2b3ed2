"""One comparison for all tests, and slow, obvious twins of the fast paths."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fsr_wrap.confusions import log_ratio


def assert_close(actual, expected, tol: float = 1e-6) -> None:
    """Trees of tensors, arrays and numbers are equal up to `tol`, relative and absolute; NaN equals NaN."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        actual, expected = [actual[key] for key in expected], list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, tol)
    elif isinstance(expected, (Tensor, np.ndarray, float)):
        actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
        torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, equal_nan=True, check_dtype=False)
    else:
        assert actual == expected


# --- the rules -------------------------------------------------------------------------------------------------------

PAPER = {
    "weight_rule": "clip",
    "class_balance": 0.0,
    "warmup_epochs": 5,
    "relabel_weight": 2.0,
    "relabel_momentum": 0.1,
}
CLIP = {**PAPER, "warmup_epochs": 1}  # re-weights from the second epoch on


def read_log_ratio(average, given: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """`log_ratio` of averaged predictions, as they are read at an epoch's end."""
    _, confidence, predicted, _, rival = average.read(given, log_prior)
    return log_ratio(average, given, confidence, predicted, rival, log_prior)


def judge_soon(fsr, num_classes: int, share: float = 0.3):
    """The wrapper; under `weight_rule="select"` it judges labels at the end of each epoch from the first one on, and
    pulls predictions to their average at once, as if training had shown by then that labels are learned by heart."""
    memory = fsr._memory
    if memory.config.selects:
        memory.prepare(torch.arange(1), num_classes, torch.device("cpu"))
        memory.selection.active = memory.selection.estimated = True
        memory.selection.share.fill_(share)
    return fsr


# --- losses, with double back-propagation ----------------------------------------------------------------------------


def slow_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−Σ_c t_c log p_c of each sample, one at a time."""
    losses = []
    for i in range(len(logits)):
        soft = target[i] if target.ndim == 2 else torch.eye(logits.shape[1], dtype=logits.dtype)[target[i]]
        soft = (1 - label_smoothing) * soft + label_smoothing / logits.shape[1]
        losses.append(-(soft * (logits[i] - logits[i].exp().sum().log())).sum())
    return torch.stack(losses)


def slow_meta_step(
    forward: Callable[[dict[str, Tensor], Tensor], Tensor],
    params: dict[str, Tensor],
    batch: tuple[Tensor, Tensor],
    reward: tuple[Tensor, Tensor],
    *,
    lr: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """−∂L_R/∂ω at ω = 1/b through the look-ahead φ'(ω) = φ − η ∇_φ Σ ω_i ℓ_i(φ); and L_R and φ' there."""
    params = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    omega = torch.full((len(batch[0]),), 1 / len(batch[0]), dtype=batch[0].dtype, requires_grad=True)
    loss = (omega * slow_cross_entropy(forward(params, batch[0]), batch[1], label_smoothing)).sum()
    gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    ahead = {name: value - lr * g for (name, value), g in zip(params.items(), gradient, strict=True)}
    reward_loss = slow_cross_entropy(forward(ahead, reward[0]), reward[1], label_smoothing).mean()
    scores = -torch.autograd.grad(reward_loss, omega)[0]
    return scores, reward_loss.detach(), {name: value.detach() for name, value in ahead.items()}


# --- heads: a module, and its twin written out -----------------------------------------------------------------------

FEATURES, HIDDEN, CLASSES = 5, 6, 4


def _linear(p: dict[str, Tensor], h: Tensor) -> Tensor:
    out = h.flatten(1) @ p["weight"].flatten(1).T
    return out + p["bias"] if "bias" in p else out


def _mlp(p: dict[str, Tensor], h: Tensor) -> Tensor:
    return (h @ p["0.weight"].T + p["0.bias"]).tanh() @ p["2.weight"].T + p["2.bias"]


def _batch_norm(p: dict[str, Tensor], h: Tensor) -> Tensor:
    z = h @ p["0.weight"].T + p["0.bias"]
    z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
    return z.tanh() @ p["3.weight"].T + p["3.bias"]


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[dict[str, Tensor], Tensor], Tensor]]] = {
    "linear": (lambda: nn.Linear(FEATURES, CLASSES), _linear),
    "linear without bias": (lambda: nn.Linear(FEATURES, CLASSES, bias=False), _linear),
    "conv": (lambda: nn.Conv2d(FEATURES, CLASSES, 1), _linear),
    "mlp": (lambda: nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)), _mlp),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)
        ),
        _batch_norm,
    ),
}
LINEAR_HEADS = ["linear", "linear without bias", "conv"]


def make_problem(head: str, soft: bool, b: int = 7, q: int = 9):
    """A head in float64, its twin, its parameters, a batch and a reward batch (features, target)."""
    make, forward = HEADS[head]
    module = make().double()
    shape = (FEATURES, 1, 1) if head == "conv" else (FEATURES,)
    params = {name: value.detach() for name, value in module.named_parameters()}
    target = torch.rand(b, CLASSES, dtype=torch.float64) if soft else torch.randint(CLASSES, (b,))
    batch = torch.randn(b, *shape, dtype=torch.float64), target
    reward = torch.randn(q, *shape, dtype=torch.float64), torch.randint(CLASSES, (q,))
    return module, forward, params, batch, reward


def slow_relabel(stored, logits, momentum):
    """Eq. 7 as released, in numpy float64: v·rsqrt(mean(v²) + 1e-8), softmax, β·old + (1−β)·new."""
    stored, logits = np.asarray(stored, np.float64), np.asarray(logits, np.float64)
    old = stored / math.sqrt(np.mean(stored**2) + 1e-8)
    exponential = np.exp(old)
    return exponential / exponential.sum(1, keepdims=True), momentum * old + (1 - momentum) * logits


# --- the dictionary --------------------------------------------------------------------------------------------------


class SlowDictionary:
    """Eq. 4 by a full sort: remembers every visit of the epoch, and the members between epochs."""

    def __init__(self, num_classes: int, size: int):
        self.num_classes, self.quota = num_classes, max(1, size // num_classes)
        self.members: dict[int, tuple] = {}  # index → (label, score, what the visit left)
        self.visited: dict[int, tuple] = {}

    def push(self, index, label, score, left) -> None:
        for i, entry in zip(index, zip(label, score, left, strict=True), strict=True):
            if entry[1] > -math.inf:
                self.visited[i] = entry

    def update(self, carry: bool) -> None:
        pool = {**(self.members if carry else {}), **self.visited}
        self.members, self.visited = {}, {}
        for cls in range(self.num_classes):
            order = sorted((i for i in pool if pool[i][0] == cls), key=lambda i: (-pool[i][1], i))
            self.members.update({i: pool[i] for i in order[: self.quota]})


def worker_warnings(test):
    """Marks a test that starts two loader workers, which torch or Python warn about on some machines."""
    test = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")(test)
    return pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")(test)
