"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLIP
from test_wrapper import N, digits, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pusher": "meta_margin", "relabel_storage": 3},
        {"nonfinite": "skip"},
        CLIP,
        {**CLIP, "weight_rule": "shift"},
        {**CLIP, "pusher": "meta_margin"},
        {**CLIP, "nonfinite": "skip"},
        {**CLIP, "reward": "fresh"},
        {**CLIP, "reward_batch_size": 18, "relabel_storage": 3},  # inner products in place of the head's gradient
        {**CLIP, "relabel_storage": "int8"},
    ],
)
def test_loss_does_not_wait_for_the_device(options: dict[str, Any]) -> None:
    """No synchronisation in `loss()`; an epoch's end may wait."""
    model, fsr = make(**options)
    model.cuda()
    x, y, _ = (tensor.cuda() for tensor in digits(0.3))
    batches = torch.arange(N, device="cuda").split(60)
    for index in (*batches, *batches[:2]):
        fsr.loss(model(x[index]), y[index], index).backward()
    assert fsr.is_reweighting
    for index in batches[2:-1]:
        logits, label = model(x[index]), y[index]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = fsr.loss(logits, label, index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        loss.backward()
    assert 0 < (fsr.weights > 0).float().mean() <= 1


@pytest.mark.parametrize("options", [{}, CLIP])
def test_the_same_weights_as_on_the_host(options: dict[str, Any]) -> None:
    (host, on_host), (device, on_device) = make(norm=False, **options), make(norm=False, **options)
    device.cuda()
    x, y, _ = digits(0.3)
    for _ in range(2):
        for index in torch.arange(N).split(60):
            on_host.loss(host(x[index]), y[index], index).backward()
            on_device.loss(device(x[index].cuda()), y[index].cuda(), index).backward()
    torch.testing.assert_close(on_device.weights.cpu(), on_host.weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(on_device.scores.cpu(), on_host.scores, rtol=1e-3, atol=1e-4)


def test_what_is_out_of_range_is_left_out_at_once_and_raised_later() -> None:
    model, fsr = make()
    model.cuda()
    x, y, _ = (tensor.cuda() for tensor in digits(0.3))
    index = torch.arange(60, device="cuda")
    wrong = y[:60].clone()
    wrong[7] = 99
    loss = fsr.loss(model(x[:60]), wrong, index)
    assert loss.isfinite()
    assert fsr.weights[7] == 0
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="label outside"):
        fsr.loss(model(x[:60]), y[:60], index)


@pytest.mark.parametrize("options", [{}, CLIP])
def test_a_state_dict_on_the_device_loads_and_is_saved_again(options: dict[str, Any], tmp_path: Path) -> None:
    model, fsr = make(**options)
    model.cuda()
    x, y, _ = (tensor.cuda() for tensor in digits(0.3))

    def train() -> None:
        for index in torch.arange(N, device="cuda").split(60):
            fsr.loss(model(x[index]), y[index], index).backward()

    train()
    best = copy.deepcopy(fsr.state_dict())
    train()
    fsr.load_state_dict(best)
    fsr.save(tmp_path)
    train()
    assert fsr.epoch == 2
