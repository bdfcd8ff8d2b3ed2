"""The head of a network, features on the way to it, and what a network says of the whole training set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Task, evaluating


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The head: the last linear layer and its dotted name. **Raises:** `ValueError` if there is none."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to be its head.")
    return found[-1]


def stages(model: nn.Module) -> list[nn.Module]:
    """Where features are taken at several depths: activations and groups of layers among the model's own children."""
    return [child for child in model.children() if isinstance(child, (nn.Sequential, nn.ReLU))] or [
        last_linear(model)[1]
    ]


def record(model: nn.Module, x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    """The logits, and of each module its features (b, d), averaged over space: the input of a linear layer, the output
    of any other module."""
    seen: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        value = inputs[0] if isinstance(module, nn.Linear) else output
        seen[module] = value.flatten(2).mean(2) if value.ndim > 2 else value

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return logits, [seen[module] for module in modules]


def record_all(
    task: Task, model: nn.Module, modules: Sequence[nn.Module] = (), index: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits (n, C) and features of the training set, or of the samples `index`, in evaluation mode."""
    index = torch.arange(task.num_samples, device=task.labels.device) if index is None else index
    with evaluating(model):
        parts = [record(model, task.inputs(part), modules) for part in index.split(500)]
    features = [torch.cat([part[1][layer] for part in parts]) for layer in range(len(modules))]
    return torch.cat([logits for logits, _ in parts]), features
