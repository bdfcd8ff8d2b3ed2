"""State dicts in and out of one safetensors file: nothing is pickled, and a file is whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE_NAME = "fsr.safetensors"
_KEY = "fsr_wrap"


def write_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Writes a state dict of tensors, numbers, strings, lists, tuples and dicts to `folder/fsr.safetensors`.

    The tensors are the file's own; all else is JSON in its header. It is written under another name and renamed, so
    that a file of that name is always whole.

    **Returns:** the file. **Raises:** `TypeError` for a value of another kind; nothing is then written.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(state, "", tensors))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / FILE_NAME, folder / f".{FILE_NAME}.{os.getpid()}"
    try:
        save_file(tensors, partial, metadata={_KEY: skeleton})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    return final


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict that `write_state` wrote, on the host.

    **Raises:** `FileNotFoundError`; `ValueError` if the file is damaged or of something else.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: give the folder that save() wrote to.")
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = (file.metadata() or {})[_KEY]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = _put_together(json.loads(skeleton), tensors)
    except (SafetensorError, KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not a file of save(): {error!r}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: it holds no state dict.")
    return state


def _take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with its tensors put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _take_apart(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_take_apart(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save() writes tensors, numbers and strings; {name} is a {type(value).__name__}.")


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in content}
    items = [_put_together(item, tensors) for item in content]
    return {"tuple": tuple, "list": list}[kind](items)
