"""Find the head (Θ^meta), check it, and take the look-ahead step on it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import functional as fsr
from .calls import Call, other_streams_kept, swapped, torch_stream_kept
from .checks import as_logits, warn
from .distributed import gather_rows, sum_all, whole, world_size
from .functional import Params
from .tap import Capture

REFUSED = {
    "DataParallel": "nn.DataParallel splits the batch behind our back: use DistributedDataParallel instead.",
    "FullyShardedDataParallel": "FSDP1 flattens the head's parameters: use fully_shard (FSDP2), with Accelerate "
    "fsdp_version=2, or DistributedDataParallel.",
    "DeepSpeedEngine": "DeepSpeed takes the optimizer's place and hides the parameters: use DistributedDataParallel or "
    "fully_shard (FSDP2).",
}
PAIRS = (  # of a classifier and one for distillation, whose mean the logits are
    ("head", "head_dist"),
    ("cls_classifier", "distillation_classifier"),
    ("classifier", "classifier_distill"),
    ("head", "dist_head"),
)
CLASSIFIER_NAMES = ("classifier", "score", "fc", "head", "heads", "output_layer")


# --- finding ---------------------------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile, whatever the nesting.

    **Raises:** `TypeError` for kinds of parallelism that are not supported.
    """
    while True:
        _refuse_by_name(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_parallelism(model: nn.Module) -> None:
    """Whether the processes have samples of their own, and parameters that can be put together.

    **Raises:** `TypeError` saying what to use instead.
    """
    sharded = False
    for module in model.modules():
        _refuse_by_name(module)
        sharded |= _is_fully_sharded(module)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise TypeError(f"{name} is sharded by DeepSpeed ZeRO-3. {REFUSED['DeepSpeedEngine']}")
        placements = getattr(parameter, "placements", ())
        if placements and (not sharded or sum(placement.is_shard() for placement in placements) > 1):
            raise TypeError(
                f"{name} is a tensor-parallel DTensor {tuple(placements)}: FSR supports DistributedDataParallel and "
                "fully_shard (FSDP2), where every process has samples of its own."
            )


def _is_fully_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _refuse_by_name(module: nn.Module) -> None:
    for kind in type(module).__mro__:
        if kind.__name__ in REFUSED:
            raise TypeError(REFUSED[kind.__name__])


def resolve_head(model: nn.Module, head: str | nn.Module) -> tuple[str, nn.Module]:
    """The head's dotted name and module.

    **Arguments:**

    - `model`: the user's own module, unwrapped.
    - `head`: a dotted name (`module.` and `_orig_mod.` prefixes are ignored), a module of the model, or `"auto"`: what
        timm's `get_classifier()` returns, else the last linear layer of a module named like a classifier, else the
        last linear layer. Where a model has several classifiers and puts out their mean, it is a `Mean` of them.

    **Raises:** `ValueError` naming candidates if there is no such head; `TypeError` for anything else.
    """
    if isinstance(head, nn.Module):
        head = unwrap(head)
        for name, module in model.named_modules():
            if module is head:
                return name, module
        raise ValueError(f"The head {type(head).__name__} is not a part of the model. {_candidates(model)}")
    if not isinstance(head, str):
        raise TypeError(f'head must be a dotted name, a module of the model or "auto", not {type(head).__name__}.')
    if head == "auto":
        return _auto(model)
    name = re.sub(r"(^|\.)(module|_orig_mod)(?=\.)", "", "." + head).strip(".")
    for candidate in (head, name):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    raise ValueError(f"The model has no module named {head!r}. {_candidates(model)}")


def resolve_part(
    model: nn.Module, head: str | nn.Module | Sequence[str | nn.Module]
) -> tuple[str, nn.Module, frozenset[str] | None]:
    """Θ^meta: a name, the module that maps features to logits, and which of its parameters are meant (None: all).

    **Arguments:** `head` as in `resolve_head`, or a list of such, or `"all"`; the module is then the whole model.

    **Raises:** as `resolve_head`; `ValueError` if the head has no forward, or the parts no parameters that are trained.
    """
    if isinstance(head, (list, tuple)) and len(head) == 1:
        head = head[0]
    if isinstance(head, nn.Module) or (isinstance(head, str) and head != "all"):
        name, module = resolve_head(model, head)
        if type(module) in (nn.ModuleList, nn.ModuleDict):
            raise ValueError(
                f"The head {name!r} is a {type(module).__name__}, which has no forward: pass one of its modules, "
                'a list of them (a deeper Θ^meta), or "auto", which joins the classifiers of timm\'s CrossViT and such.'
            )
        return name, module, None
    if not isinstance(head, (str, list, tuple)):
        raise TypeError(f'head must be a name, a module, a list of them, "auto" or "all", not {type(head).__name__}.')
    found = [("", model)] if head == "all" else [resolve_head(model, one) for one in head]
    ids = {id(parameter) for _, part in found for parameter in part.parameters() if parameter.requires_grad}
    names = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in ids)
    if not names:
        raise ValueError(f"{head!r} has no parameters that are trained.")
    return "all" if head == "all" else ", ".join(name for name, _ in found), model, names


def _is_linear(module: nn.Module) -> bool:
    kind: type = type(module)
    if _is_fully_sharded(module):  # of a class of its own then: (FSDPModule, nn.Linear)
        kind = kind.__mro__[2]
    if kind is nn.Conv2d:
        assert isinstance(module, nn.Conv2d)
        plain = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding in ((0, 0), "valid", "same")
        return plain and module.groups == 1
    return kind is nn.Linear or (kind.__module__, kind.__name__) == ("timm.layers.linear", "Linear")


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear) or _is_linear(part)]


def _candidates(model: nn.Module) -> str:
    names = [name for name, _ in _linears(model)][-3:]
    found = f"Its last linear layers are {names}; pass" if names else "It has no linear layer; pass"
    return f'{found} head="dotted.name" of the module whose output are the logits.'


class Mean(nn.ModuleList):
    """Linear classifiers of one model, each on features of its own, whose mean are the logits: what distilled models
    have, and those of several branches."""


def _auto(model: nn.Module) -> tuple[str, nn.Module]:
    places: list[nn.Module] = []
    several: list[nn.Module] = []
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(
            "The model has no classifier: create it with num_classes > 0, put a linear layer behind it, or pass head=."
        )
    if callable(getattr(model, "get_classifier", None)):
        classifier = model.get_classifier()  # type: ignore[operator]
        if isinstance(classifier, (tuple, list, nn.ModuleList)):
            several = list(classifier)
        elif isinstance(classifier, nn.Identity):
            raise ValueError("The model has no classifier: create it with num_classes > 0, or pass head=.")
        elif isinstance(classifier, nn.Module):
            places.append(classifier)
        if isinstance(auxiliary := getattr(model, "aux_head", None), nn.Module):
            several = [*places, auxiliary]
    several = several or _pair([*places, model])
    names = {id(module): name for name, module in model.named_modules()}
    if several:
        return _mean(model, several, names)
    places += [part for name in CLASSIFIER_NAMES if isinstance(part := getattr(model, name, None), nn.Module)]
    places.append(model)
    for place in places:
        linears = [module for _, module in _linears(place)]
        if linears and id(linears[-1]) in names:
            return names[id(linears[-1])], linears[-1]
    raise ValueError(f"No head was found in {type(model).__name__}. {_candidates(model)}")


def _pair(places: list[nn.Module]) -> list[nn.Module]:
    """A classifier and its companion for distillation, if one of these places has both."""
    for place in places:
        for pair in PAIRS:
            parts = [part for name in pair if isinstance(part := getattr(place, name, None), nn.Module)]
            if len(parts) == 2 and all(_linears(part) for part in parts):
                return parts
    return []


def _mean(model: nn.Module, classifiers: list[nn.Module], names: dict[int, str]) -> tuple[str, nn.Module]:
    """The last linear layers of several classifiers, as one head."""
    weighted = any(hasattr(model, name) for name in ("weights", "aux_head"))  # timm's EfficientViM and VOLO
    parts = [linear for classifier in classifiers for _, linear in _linears(classifier)[None if weighted else -1 :]]
    found = [names[id(part)] for part in parts if id(part) in names]
    if weighted or len(found) < len(classifiers) or not all(_is_linear(part) for part in parts):
        raise ValueError(
            f"{type(model).__name__} has several classifiers, and its logits are not their plain mean: pass "
            f"head={found}, a deeper Θ^meta, with which a step costs more, or one of them if its output are the logits."
        )
    return (" + ".join(found), Mean(parts)) if len(parts) > 1 else (found[0], parts[0])


# --- the head as a function ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The training batch at the head, detached: `features` (b, ...) or a `Call`, `target` (b,) or (b, C), and
    `residual` (b, C), ∂ℓ_i/∂logits at φ."""

    features: Any
    target: Tensor
    residual: Tensor
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Reward:
    """This process's part of the reward batch: `features` (n, ...) or a `Call`, `target` (n,) or (n, C); and q
    everywhere."""

    features: Any
    target: Tensor
    label_smoothing: float
    batch_size: int


class MetaStep(Protocol):
    """The look-ahead taken on one batch, ready to be asked."""

    def logits(self, features: Any, logits: Tensor) -> Tensor:
        """The look-ahead head's logits at features whose logits at φ are given; (n, C)."""
        ...

    def scores(self, reward: Reward) -> tuple[Tensor, Tensor]:
        """−∂L_R/∂ω of each sample, (b,), and this process's part of the reward loss, ()."""
        ...


def _scale(lr: float) -> float:
    """Of the scores: η, or 1 where no look-ahead is taken (L2R's meta-gradient at ω₀ = 0, in units of its η)."""
    return lr or 1.0


class KernelStep:
    """A linear head by inner products of features; no gradient of C×d is formed, nor sent. For many classes.

    **Arguments:** `params`, φ; `batch_size`, b over all processes; `length`, the largest b of one.
    """

    def __init__(self, head: Head, batch: Batch, lr: float, params: Params, batch_size: int, length: int):
        self._head, self._batch, self._lr, self._params, self._size = head, batch, lr, params, batch_size
        self._rows = gather_rows((batch.features, batch.residual), length)

    def logits(self, features: Tensor, logits: Tensor) -> Tensor:
        return fsr.linear_look_ahead_logits(
            features, logits, *self._rows, lr=self._lr, batch_size=self._size, bias=self._head.has_bias
        )

    def scores(self, reward: Reward) -> tuple[Tensor, Tensor]:
        size = reward.batch_size
        logits = self.logits(reward.features, self._head.call(self._params, reward.features))
        losses, residual = fsr.losses_and_residual(logits, reward.target, reward.label_smoothing)
        length = -(-size // world_size())
        everywhere = gather_rows((reward.features, residual / size), length)
        scores = fsr.linear_meta_gradient(
            self._batch.features, self._batch.residual, *everywhere, lr=_scale(self._lr), bias=self._head.has_bias
        )
        return scores, losses.sum() / size


class GradientStep:
    """Any head, by its gradients: of a linear one they are products, of others torch.func's.

    **Arguments:** `params`, φ; `gradient`, Σ_i ∇_φ ℓ_i (not used if `lr` is 0) and `batch_size`, b, over all processes.
    """

    def __init__(self, head: Head, batch: Batch, lr: float, params: Params, gradient: Params, batch_size: int):
        self._head, self._batch, self._lr, self._params = head, batch, lr, params
        self._ahead = fsr.look_ahead(params, gradient, lr=lr, batch_size=batch_size) if lr else params

    def logits(self, features: Any, logits: Tensor) -> Tensor:
        return self._head.forward(self._ahead, features)

    def scores(self, reward: Reward) -> tuple[Tensor, Tensor]:
        gradient, loss = self.reward_gradient(reward)
        return self.scores_along(gradient), loss

    def reward_gradient(self, reward: Reward) -> tuple[Params, Tensor]:
        """G over all processes, named and shaped like φ, and this process's part of the reward loss, ()."""
        smoothing, size = reward.label_smoothing, reward.batch_size
        total, loss = self._head.gradient(self._ahead, reward.features, reward.target, label_smoothing=smoothing)
        return {name: value / size for name, value in sum_all(total).items()}, loss / size

    def scores_along(self, gradient: Params) -> Tensor:
        """−∂L_R/∂ω of each sample, (b,), for a G that is known."""
        batch, lr = self._batch, _scale(self._lr)
        if self._head.is_linear:
            return fsr.linear_meta_gradient_along(batch.features, batch.residual, gradient, lr=lr)
        if not len(batch.residual):
            return batch.residual.new_zeros(0)
        where = (batch.features, batch.target, gradient)
        smoothing = batch.label_smoothing
        return self._head.meta_gradient(self._head.call, self._params, *where, lr=lr, label_smoothing=smoothing)


class Head:
    """The head as a function of Θ^meta and its input, apart from the user's forward.

    Dropout inside the head is off here; BatchNorm inside it runs as in the user's forward, on copies of its statistics.

    **Arguments:** `name` and `module`, from `resolve_head`; `part`, the names of the parameters in the module that are
    Θ^meta, all of them if not given.
    """

    def __init__(self, name: str, module: nn.Module, part: frozenset[str] | None = None):
        self.name, self.module, self.part = name, module, part
        self.parts = tuple(module) if isinstance(module, Mean) else (module,)
        self.is_linear = all(_is_linear(one) for one in self.parts)
        self.has_bias = len(self.parts) == 1 and getattr(module, "bias", None) is not None
        self.meta_gradient = fsr.meta_gradient
        self.log_prior: Tensor | None = None  # (C,), see `FSRConfig.class_balance`
        self._is_tried = self.is_linear
        if not self.is_linear and any(_is_fully_sharded(part) for part in module.modules()):
            raise TypeError(f"The head {name!r} is no linear layer: do not call fully_shard on it or its parts alone.")

    @property
    def num_classes(self) -> int:
        """C of a linear head."""
        return self.parts[0].weight.shape[0]  # type: ignore[index,return-value]

    def params(self, dtype: torch.dtype) -> Params:
        """φ, detached. Of K linear heads (W_k, b_k) it is the one matrix (W_1 ... W_K, b_1 ... b_K), see `features`."""
        if len(self.parts) > 1:
            each = [Head("", part).params(dtype) for part in self.parts]
            biases = [params["bias"][:, None] for params in each if "bias" in params]
            return {"weight": torch.cat([*(params["weight"] for params in each), *biases], 1)}
        if self.is_linear:
            weight, bias = self.module.weight, self.module.bias
            params = {"weight": whole(weight.detach()).to(dtype).flatten(1)}  # type: ignore[operator]
            return params if bias is None else params | {"bias": whole(bias.detach()).to(dtype)}  # type: ignore[operator]
        return {
            name: whole(value.detach()).to(dtype)
            for name, value in self.module.named_parameters()
            if self.part is None or name in self.part
        }

    def features(self, captured: Any, dtype: torch.dtype) -> Any:
        """The captured input in the dtype of the meta arithmetic; flat for a linear head, integers as they are.

        The mean of K linear heads is linear in all their parameters: one matrix times (h_1 ... h_K, 1 ... 1) / K.
        """
        if isinstance(captured, Call) or captured.is_floating_point():
            captured = captured.to(dtype)
        if len(self.parts) > 1:
            ones = captured.new_ones(len(captured), sum(part.bias is not None for part in self.parts))
            return torch.cat([captured, ones], 1) / len(self.parts)
        return captured.flatten(1) if self.is_linear else captured

    def call(self, params: Params, features: Any) -> Tensor:
        """(φ, features) → what the loss is of, (b, C): the logits, plus the classes' log-prior where there is one."""
        logits = self.forward(params, features)
        return logits if self.log_prior is None else logits + self.log_prior

    def forward(self, params: Params, features: Any) -> Tensor:
        """(φ, features) → logits (b, C)."""
        if self.is_linear:
            return torch.nn.functional.linear(features, params["weight"], params.get("bias"))
        one = next(iter(params.values()))
        dtype, device = one.dtype, one.device
        args, kwargs = features.inputs() if isinstance(features, Call) else ((features,), {})
        tensors = {
            name: value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
            for name, value in self.module.named_buffers()
        }
        if self.part is not None:
            rest = [item for item in self.module.named_parameters() if item[0] not in params]
            tensors |= {name: value.detach().to(dtype) for name, value in rest}
        with (
            swapped(self.module, {**tensors, **params}),
            torch_stream_kept(device),
            _dropout_off(self.module),
            sdpa_kernel(SDPBackend.MATH),  # which torch.func.jvp can differentiate
        ):
            return as_logits(self.module(*args, **kwargs)).flatten(1)

    def logits(self, features: Any, dtype: torch.dtype) -> Tensor:
        """The head as it is, in the meta arithmetic's dtype; (n, C)."""
        return self.forward(self.params(dtype), features)

    def gradient(
        self, params: Params, features: Any, target: Tensor, *, label_smoothing: float
    ) -> tuple[Params, Tensor]:
        """Σ_i ∇_φ ℓ_i(φ) of samples in this process, and Σ_i ℓ_i(φ), ()."""
        if not self.is_linear:
            return fsr.head_gradient(self.call, params, features, target, label_smoothing=label_smoothing)
        losses, residual = fsr.losses_and_residual(self.call(params, features), target, label_smoothing)
        return fsr.linear_gradient(params, features, residual), losses.sum()

    def batch_gradient(self, params: Params, batch: Batch) -> Params:
        """Σ_i ∇_φ ℓ_i(φ) of a batch in this process, at the φ of its residuals."""
        if self.is_linear:
            return fsr.linear_gradient(params, batch.features, batch.residual)
        where = (params, batch.features, batch.target)
        return fsr.head_gradient(self.call, *where, label_smoothing=batch.label_smoothing)[0]

    def check(self, capture: Capture, logits: Tensor) -> bool:
        """Checks that this module's output are the logits.

        **Returns:** False if nothing could be seen: all logits are NaN or infinite, or those of a head that is all
        zeros.

        **Raises:** `ValueError` saying what to pass instead.
        """
        where = f"The head {self.name!r} ({type(self.module).__name__})"
        advice = 'Pass head="dotted.name" of the module whose output are the logits'
        if len(self.parts) > 1:
            advice = (
                "Pass the mean of these classifiers' outputs to loss(), as the model gives it in evaluation (timm: "
                "model.set_distilled_training(False)), or head= the one whose output the logits are"
            )
        if capture.output.numel() != logits.numel():
            raise ValueError(
                f"{where} puts out {tuple(capture.output.shape)}, but the logits are {tuple(logits.shape)}. {advice}."
            )
        width = sum(part.weight[0].numel() for part in self.parts) if self.is_linear else 0  # type: ignore[index,misc]
        if self.is_linear and capture.features.flatten(1).shape[1] != width:
            raise ValueError(
                f"{where} takes {tuple(capture.features.shape)}: one feature vector a sample is needed. {advice}, "
                "applied to a pooled feature."
            )
        if any(_active_dropout(part) for part in self.module.modules()):
            return True  # its training-time output is random; the shapes agree
        dtype = meta_dtype(logits)
        expected, features = logits.detach().to(dtype), self.features(capture.features, dtype)
        found = self.logits(features, dtype)
        counts = expected.isfinite() & (expected > fsr.SHUT)
        expected, found = torch.where(counts, expected, 0), torch.where(counts, found, 0)
        gap = (expected - found).abs().amax() / (expected.abs().amax() + 1e-6) if counts.any() else 0.0
        coarse = logits.dtype in (torch.float16, torch.bfloat16) or capture.autocast is not None
        if not gap <= (0.1 if coarse else 0.01) and not self._is_random(features, dtype, logits.device):
            raise ValueError(
                f"{where} gives other logits than those passed to loss() (relative gap {float(gap):.2g}). {advice}, "
                "and pass the logits as they leave it, before any scaling."
            )
        # Where all processes must put the head together to look at it, they do so once.
        common = expected[0] if len(expected) > 1 else 0
        return any(map(_is_fully_sharded, self.parts)) or bool((expected != common).any())

    def _is_random(self, features: Any, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the head gives the same with the same random numbers, and something else with others."""
        outputs = []
        for same in (True, True, False):
            with torch_stream_kept(device), other_streams_kept() if same else nullcontext():
                if not same:
                    torch.rand(1, device=device)
                    random.random()
                outputs.append(self.logits(features, dtype))
        return torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])

    def find_derivative(self, features: Any, logits: Tensor) -> None:
        """Finds a way to differentiate the head, by trial: forward mode if it can, else reverse mode.

        **Raises:** `TypeError` if there is none.
        """
        if self._is_tried or not len(logits):
            return
        dtype, problem = meta_dtype(logits), None
        params, features = self.params(dtype), self.features(features, dtype)
        target = torch.arange(len(logits), device=logits.device) % logits.shape[1]
        for way in (fsr.meta_gradient, fsr.meta_gradient_in_reverse, fsr.meta_gradient_one_by_one):
            try:
                gradient, _ = self.gradient(params, features, target, label_smoothing=0.0)
                products = way(self.call, params, features, target, gradient, lr=1.0)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                problem = problem or error
                continue
            expected = sum(value.square().sum() for value in gradient.values())
            if not (products.sum() - expected).abs() > 0.01 * products.abs().sum() + 1e-12:
                self.meta_gradient, self._is_tried = way, True
                break
        else:
            raise TypeError(f"The head {self.name!r} cannot be differentiated apart from the model.") from problem
        if self.meta_gradient is fsr.meta_gradient_one_by_one:
            warn(
                f"The head {self.name!r} can be differentiated once only, so a step takes a backward pass through it "
                "for each sample. Pass a smaller head, or give its autograd.Function a jvp.",
            )


def meta_dtype(logits: Tensor) -> torch.dtype:
    """float32, or the logits' dtype if it is wider."""
    return torch.promote_types(logits.dtype, torch.float32)


def _active_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


@contextmanager
def _dropout_off(module: nn.Module) -> Iterator[None]:
    active = [part for part in module.modules() if _active_dropout(part)]
    for part in active:
        part.training = False
    try:
        yield
    finally:
        for part in active:
            part.training = True
