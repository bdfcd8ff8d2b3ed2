"""State dicts in and out of one safetensors file: nothing is pickled, and a file is whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "fsr.safetensors"
NOTE_NAME = "fsr.json"
_KEY, _DIGEST = "fsr_wrap", "sha256"
_PARTIAL = ".fsr."  # names of hidden folders begin so
_STALE = 3600.0  # seconds without a change, after which nobody works in such a folder where locks cannot tell
_Plain = (bool, int, float, str, type(None))


def write_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Writes a state dict of tensors, numbers, strings, lists, tuples and dicts to `folder/fsr.safetensors`.

    The tensors are the file's own; all else is JSON in its header, with a SHA-256 digest of the whole content. It is
    written in a hidden folder of its own and renamed, so that a file of that name is always whole, of one save or
    another; what a killed save leaves there, the next one removes. After it, `fsr.json` says to people what the file
    is; it is never read back.

    **Returns:** the file. **Raises:** `TypeError` for a value of another kind, `OSError` if it cannot be written; the
    last file then stays.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(state, "", tensors))
    metadata = {_KEY: skeleton, _DIGEST: _digest(skeleton, tensors)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _clear_up(folder)
    with _own_folder(folder) as partial:
        (partial / NOTE_NAME).write_text(json.dumps(_note(state.get("fsr", {})), indent=2) + "\n", encoding="utf-8")
        try:
            save_file(tensors, partial / FILE_NAME, metadata)
        except KeyError as error:  # as of complex128
            message = f"save() writes tensors of the dtypes that safetensors knows, which {error} is not."
            raise TypeError(message) from error
        except SafetensorError as error:
            raise OSError(f"{folder / FILE_NAME} cannot be written: {error}") from error
        with contextlib.suppress(OSError):  # safetensors 0.8 lets nobody but the owner read it
            shutil.copymode(partial / NOTE_NAME, partial / FILE_NAME)
        for name in (FILE_NAME, NOTE_NAME):
            with open(partial / name, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial / name, folder / name)
    _sync_names(folder)
    return folder / FILE_NAME


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """A new hidden folder, locked as long as its process lives in it; gone afterwards."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
        lock = _lock(partial)
        if partial.exists():  # nobody took it for a dead one's before it was locked
            break
        _unlock(lock)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(lock)


def _clear_up(folder: Path) -> None:
    """Removes what killed saves left: where nobody holds the lock, or nobody can and it is old."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            lock = _lock(partial, wait=False)
            if lock is not None or time.time() - partial.stat().st_mtime > _STALE:
                shutil.rmtree(partial, ignore_errors=True)
            _unlock(lock)


def _lock(folder: Path, wait: bool = True) -> int | None:
    """A descriptor that holds the folder's lock until it is closed or the process dies; None where there is none to
    have. **Raises:** `BlockingIOError` if another process has it and one need not wait."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:  # gone, or a file system without locks
        _unlock(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict that `write_state` wrote, on the host and independent of the file.

    **Raises:** `FileNotFoundError`; `ValueError` if the file is damaged, in any bit of its content, or of something
    else.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: give the folder that save() wrote to.")
    while True:
        found = _version(path)
        try:
            return _read(path)
        except ValueError:
            if _version(path) == found:
                raise  # else a save came between: safetensors opens the file twice


def _version(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata[_DIGEST] != _digest(metadata[_KEY], tensors):
            raise ValueError("its digest is that of another content")
        state: dict[str, Any] = _put_together(json.loads(metadata[_KEY]), tensors)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged header leads safetensors and torch to
        raise ValueError(f"{path} is damaged, or not a file of save(): {error!r}") from error
    return state


def _take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with its tensors put into `tensors`."""
    if hasattr(value, "__tensor_flatten__"):  # a subclass that has no memory of its own, as 8-bit optimizers use
        raise TypeError(
            f"save() writes plain tensors; {name} is a {type(value).__name__}. Use torch.save(fsr.state_dict(), file), "
            "and fsr.load_state_dict."
        )
    if isinstance(value, Tensor) and value.layout is torch.strided:
        while name in tensors:  # as of {"a/b": ..., "a": {"b": ...}}
            name += "'"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, _Plain):
                raise TypeError(f"save() takes numbers and strings as keys; {name} has a {type(key).__name__} as one.")
        return {"dict": [[key, _take_apart(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_take_apart(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, _Plain):
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


def _digest(skeleton: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the JSON and of each tensor's name, dtype, shape and bytes."""
    order = sorted(tensors)
    table = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in order]
    digest = hashlib.sha256(json.dumps([skeleton, table]).encode())
    for name in order:  # contiguous, and read where they stand
        digest.update((ctypes.c_char * tensors[name].nbytes).from_address(tensors[name].data_ptr()))
    return digest.hexdigest()


def _note(fsr: dict[str, Any]) -> dict[str, Any]:
    """What people want to know of a checkpoint, from FSR's part of the state dict."""
    known = {**fsr, "format": "fsr_wrap", "num_classes": fsr.get("dictionary", {}).get("num_classes")}
    names = ("format", "version", "num_samples", "num_classes", "config", "world_size", "epoch")
    return {name: known.get(name) for name in names}


def _sync_names(folder: Path) -> None:
    """Waits until the names in the folder are on the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
