"""Samples of a data set as people look at them: small pictures, or texts."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from .calls import other_streams_kept, torch_stream_kept
from .data import IndexedDataset, is_hugging_face

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 112  # pixels of a thumbnail
_SMALL = 64  # up to which a picture is kept without loss
_TEXT = 400  # characters
_FIRST = "image", "img", "picture", "pixel_values", "text", "sentence", "content"  # where to look in dicts
_TRANSFORMS = "transform", "transforms"


def untransformed(dataset: Any) -> Any:
    """The data set without augmentation and normalisation where it can be had so: the samples at the same positions.

    It is another object; the data set is left as it is.
    """
    if is_hugging_face(dataset, "Dataset"):
        return dataset.with_format(None)
    if isinstance(dataset, IndexedDataset):
        return untransformed(dataset.dataset)
    if isinstance(dataset, Subset):
        part = copy.copy(dataset)
        part.dataset = untransformed(dataset.dataset)
        return part
    if isinstance(dataset, ConcatDataset):
        whole = copy.copy(dataset)
        whole.datasets = [untransformed(part) for part in dataset.datasets]
        return whole
    names = (
        [name for name in _TRANSFORMS if vars(dataset).get(name) is not None] if hasattr(dataset, "__dict__") else []
    )
    if names:
        dataset = copy.copy(dataset)
        for name in names:
            setattr(dataset, name, None)
    return dataset


def look(dataset: Any, position: int, to_image: Callable[[Any], Any] | None = None) -> Image | str | None:
    """A sample as a picture, or as a text, or None if it is neither.

    **Arguments:** `to_image`, of a sample as the data set gives it, what is to be shown: an image of PIL, an array, a
    tensor or a text. Without it the sample is looked at before the data set's own transforms, if that can be done.

    **Raises:** `ValueError` if `to_image` gives something else.
    """
    with streams_kept():
        if to_image is not None:
            given = to_image(dataset[position])
            shown = given if isinstance(given, str) else as_image(given)
            if shown is None:
                raise ValueError(
                    f"to_image gave a {_described(given)}: give an image of PIL, an array or a tensor of (H, W), "
                    "(H, W, 3) or (3, H, W), or a text."
                )
            return shown
        try:
            found = find(untransformed(dataset)[position])
        except Exception:  # a data set of the user's own may need its transform
            found = None
        return find(dataset[position]) if found is None else found


@contextmanager
def streams_kept() -> Iterator[None]:
    """Within it, augmentations may draw; the user's random numbers afterwards are those of before."""
    with other_streams_kept(), torch_stream_kept(torch.device("cpu")):
        yield


def find(sample: Any) -> Image | str | None:
    """The first picture in a sample, else its texts, else None."""
    if isinstance(sample, str):
        return sample
    image = as_image(sample)
    if image is not None:
        return image
    if isinstance(sample, Mapping):
        keys = sorted(sample, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
        parts = [sample[key] for key in keys]
        texts = [f"{key}: {sample[key]}" for key in sample if isinstance(sample[key], str) and sample[key]]
    elif isinstance(sample, (tuple, list)):
        parts, texts = list(sample), []
    else:
        return None
    found = [find(part) for part in parts if not isinstance(part, str)]
    pictures = [one for one in found if one is not None and not isinstance(one, str)]
    if pictures:
        return pictures[0]
    strings = [part for part in parts if isinstance(part, str) and part]
    nested = [one for one in found if isinstance(one, str)]
    if len(strings) > 1:
        return "\n".join(texts or strings)
    return next(iter([*strings, *nested]), None)


def as_image(value: Any) -> Image | None:
    """The value as an image of grey or of colours; None if it is none."""
    import PIL.Image
    from PIL import ImageOps

    if isinstance(value, bytes) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)):
        try:
            value = PIL.Image.open(io.BytesIO(value if isinstance(value, bytes) else value["bytes"]))
            value.load()
        except Exception:  # damaged or huge ones raise many kinds
            return None
    if not isinstance(value, PIL.Image.Image):
        return _from_array(value)
    if 0 in value.size:
        return None
    value = ImageOps.exif_transpose(value)
    if value.mode in ("L", "RGB"):
        return value
    if value.mode in ("I", "F") or value.mode.startswith("I;"):
        import numpy

        return _from_array(numpy.asarray(value).astype("float64"))
    if "A" in value.mode or "transparency" in value.info:
        value = value.convert("RGBA")
        white = PIL.Image.new("RGBA", value.size, "white")
        white.alpha_composite(value)
        value = white
    return value.convert("L" if value.mode == "1" else "RGB")


def _from_array(value: Any) -> Image | None:
    import numpy
    import PIL.Image

    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, numpy.ndarray) or value.dtype.kind not in "buif":
        return None
    while value.ndim > 2 and len(value) == 1:
        value = value[0]
    if value.ndim == 3 and value.shape[-1] not in (1, 3, 4) and len(value) in (3, 4):
        value = numpy.moveaxis(value, 0, -1)
    if value.ndim == 3 and value.shape[-1] in (1, 3, 4):
        value = value[..., :3] if value.shape[-1] > 1 else value[..., 0]
    elif value.ndim != 2:
        return None
    if min(value.shape[:2]) < 4:
        return None
    return PIL.Image.fromarray(_bytes(value))


def _bytes(value: Any) -> Any:
    """Numbers as bytes: as they are, of [0, 1], of [0, 255], or else, where they were normalised, from the least to the
    largest."""
    import numpy

    if value.dtype == numpy.uint8:
        return value
    value = numpy.nan_to_num(value.astype("float64"))
    low, high = float(value.min()), float(value.max())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    return ((value - low) / max(high - low, 1e-12) * 255).round().clip(0, 255).astype("uint8")


def thumbnail(image: Image) -> str:
    """A small picture as a data URI."""
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    if max(image.size) <= _SMALL:
        kind = "png"
        image.save(file, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.save(file, "JPEG", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def clipped(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= _TEXT else text[: _TEXT - 1].rstrip() + "…"


def _described(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"{type(value).__name__}{shape}"
