"""FSR's state through torch.distributed.checkpoint (DCP).

DCP keeps of an optimizer's state dict what belongs to parameters and to groups of them, and reads from a checkpoint
what a fresh optimizer has already. So for DCP, FSR's part is one value of the first group: a list of bytes, which is
written once, whatever the number of processes, and read whole, whatever the wrapper that reads it knows.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import torch

from .checks import warn

_KEY = "fsr"
_PIECE = 2**30  # bytes; pickle takes no 4 GiB at a time


def asked_by_dcp() -> bool:
    """Whether DCP is what asks for a state dict, or sets one; directly, through Accelerate or through a Stateful."""
    return _asking() is not None


def _asking() -> Any:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.checkpoint"):
            return frame
        frame = frame.f_back  # type: ignore[assignment]
    return None


def pack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with FSR's part in its first group, where DCP takes it along."""
    rest = {name: value for name, value in state_dict.items() if name != _KEY}
    info = _asking().f_locals.get("info")
    if getattr(info, "flatten_optimizer_state_dict", False):
        warn(
            "flatten_optimizer_state_dict=True keeps nothing but parameters' state, so FSR's is not in this "
            "state dict: leave the option out, or call fsr.save(folder) beside it and fsr.load(folder) after loading.",
        )
        return rest
    file = io.BytesIO()
    torch.save(state_dict[_KEY], file)
    content = file.getvalue()
    pieces = [content[start : start + _PIECE] for start in range(0, len(content), _PIECE)]
    first, *others = rest["param_groups"]
    return {**rest, "param_groups": [{**first, _KEY: pieces}, *others]}


def unpack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict as `FSRWrapper.state_dict` gives it, wherever FSR's part is; without one if there is none."""
    groups = state_dict["param_groups"]
    pieces = next((group[_KEY] for group in groups if _KEY in group), None)
    if pieces is None:
        return dict(state_dict)
    groups = [{name: value for name, value in group.items() if name != _KEY} for group in groups]
    state = torch.load(io.BytesIO(b"".join(pieces)), map_location="cpu", weights_only=True)
    return {**state_dict, "param_groups": groups, _KEY: state}
