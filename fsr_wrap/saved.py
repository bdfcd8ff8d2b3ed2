"""What a run left on the disk, read without its model: FSR's memory, and a data set to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import FSRConfig
from .memory import Memory
from .pushers import PUSHERS, Pusher
from .state import FILE_NAME, read_state

_PICTURES = ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"  # as torchvision has them


def read_memory(checkpoint: str | os.PathLike[str]) -> Memory:
    """FSR's memory as `save()` wrote it.

    **Arguments:** `checkpoint`, the folder that `save()` was given, or the file in it.

    **Raises:** `FileNotFoundError`; `ValueError` if the file is damaged or of something else, or has nothing of FSR.
    """
    path = Path(checkpoint)
    if path.is_file() and path.name != FILE_NAME:
        raise ValueError(f"{path} is not a file of save(): give the folder, or its {FILE_NAME}.")
    state = read_state(path.parent if path.is_file() else path).get("fsr")
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise ValueError(f"{path} has no state of FSR: give what fsr.save(folder) wrote.")
    return Memory.from_state_dict(state, _config(state), state.get("num_samples"))


def _config(state: dict[str, Any]) -> FSRConfig:
    """The run's. A pusher of the user's own is known by its name alone, which is all that is asked of it here."""
    names = {field.name for field in fields(FSRConfig)}
    found = {name: value for name, value in state["config"].items() if name in names}
    pusher = found.get("pusher")
    if isinstance(pusher, str) and pusher not in PUSHERS:
        own = {"__call__": lambda self, visit: visit.loss, "needs_learned": "learned" in state.get("table", {})}
        found["pusher"] = type(pusher, (Pusher,), own)()
    return FSRConfig(**found)


class Folder:
    """Pictures in one folder a class, in the order of torchvision's `ImageFolder`: classes by name, then files."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir())
        self.files = [(path, label) for label, name in enumerate(self.classes) for path in _pictures(root / name)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        path, label = self.files[index]
        return path.read_bytes(), label


def _pictures(folder: Path) -> Iterator[Path]:
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(_PICTURES):
                yield Path(place) / name


class Parquet:
    """The rows of Parquet files as dicts, as a Hugging Face data set keeps them; pictures as the bytes they are."""

    def __init__(self, paths: list[Path]) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("Parquet files need pyarrow: pip install pyarrow") from error
        try:
            self.table = pyarrow.concat_tables([pyarrow.parquet.read_table(path, memory_map=True) for path in paths])
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{paths[0]} cannot be read: {_first_line(error)}") from error
        self.classes = _class_names(self.table.schema.metadata or {})

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Any:
        [row] = self.table.slice(index, 1).to_pylist()
        return row


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Those of a Hugging Face data set's `ClassLabel`; None if it has none, or several with other names."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"].values()
        found = {tuple(feature["names"]) for feature in features if isinstance(feature, dict) and "names" in feature}
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    return [str(name) for name in found.pop()] if len(found) == 1 else None


def read_data(path: Path) -> Folder | Parquet:
    """A data set to look at: one Parquet file, a folder of them, or a folder of pictures, one folder a class.

    **Raises:** `FileNotFoundError`; `ValueError` if it is none of these.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is no data set that is known: give a .parquet file or a folder.")
        return Parquet([path])
    files = sorted(path.glob("*.parquet"))
    if files:
        return Parquet(files)
    folder = Folder(path)
    if not len(folder):
        raise ValueError(f"{path} has neither Parquet files nor folders with pictures, one of each class.")
    return folder


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
