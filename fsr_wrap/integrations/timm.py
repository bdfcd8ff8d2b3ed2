"""timm's loader, with the index of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from timm.data.dataset import AugMixDataset, IterableImageDataset
from timm.data.loader import create_loader as timm_create_loader
from timm.data.loader import fast_collate
from timm.data.mixup import FastCollateMixup
from torch import Tensor
from torch.utils.data import default_collate

from ..data import IndexedDataset, with_index
from ..distributed import world_size


def create_loader(
    dataset: Any,
    input_size: Any,
    batch_size: int,
    is_training: bool = False,
    *,
    collate_fn: Callable[..., Any] | None = None,
    use_prefetcher: bool = True,
    **options: Any,
) -> IndexedLoader:
    """`timm.data.create_loader`, whose batches have the indices of their samples.

    ```python
    loader = create_loader(dataset, input_size, batch_size, is_training=True)
    fsr = FSRWrapper(model, optimizer, dataset=dataset, samples_per_epoch=loader.samples_per_epoch)
    for x, y, index in loader:
        loss = fsr.loss(model(x), y, index)
    ```

    `loader.samples_per_epoch` is how many samples an epoch has, as timm's training loader drops the last batch. With
    augmentation splits (`AugMixDataset`) a batch is all first views, then all second ones, as timm has them; each
    counts. With timm's `FastCollateMixup` there is a fourth, the samples' own classes:
    `for x, target, index, y in loader: loss = fsr.loss(model(x), target, index, label=y)`.

    **Arguments:** as timm's. `dataset`: with or without `with_index`.

    **Raises:** `TypeError` for a stream (TFDS, WebDataset), whose samples come in another order in each epoch, so that
    their place tells nothing; `ValueError` for an `AugMixDataset` of a set that is indexed already, and for a
    `FastCollateMixup` without prefetcher.
    """
    if isinstance(dataset, IterableImageDataset):
        raise TypeError(
            f"The samples of {type(dataset.reader).__name__}, a stream, have no index that stays theirs: use a data "
            "set of files, create_dataset('', root=...), or of Hugging Face, create_dataset('hfds/...')."
        )
    if isinstance(dataset, AugMixDataset) and isinstance(dataset.dataset, IndexedDataset):
        raise ValueError("AugMixDataset takes pairs: AugMixDataset(dataset), and the index is added here.")
    if isinstance(collate_fn, FastCollateMixup) and not use_prefetcher:
        raise ValueError("FastCollateMixup makes bytes, which only the prefetcher normalises: use_prefetcher=True.")
    collate = _Collate(collate_fn or (fast_collate if use_prefetcher else default_collate))
    options = {"is_training": is_training, "collate_fn": collate, "use_prefetcher": use_prefetcher, **options}
    loader = timm_create_loader(with_index(dataset), input_size, batch_size, **options)
    return IndexedLoader(loader, collate, batch_size, max(1, options.get("num_aug_splits", 0)))


class _Target(NamedTuple):
    """What a batch has beside the images, in the place of timm's target; moved to the device by timm's prefetcher."""

    target: Tensor
    indices: Tensor
    label: Tensor | None

    def to(self, *args: Any, **kwargs: Any) -> _Target:
        label = None if self.label is None else self.label.to(*args, **kwargs)
        return _Target(self.target.to(*args, **kwargs), self.indices.to(*args, **kwargs), label)


class _Collate:
    """A collate function of pairs, with the index put beside the target."""

    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[tuple[Any, ...]]) -> tuple[Tensor, _Target]:
        index = torch.tensor([sample[-1] for sample in batch])
        images, target = self.collate([sample[:-1] for sample in batch])[:2]
        number = len(target)  # of fewer, mode="half" of a mixup; of more, the views of augmentation splits
        index = index[:number]
        index = index.repeat(number // len(index))
        mixed = isinstance(self.collate, FastCollateMixup)
        label = torch.tensor([int(sample[1]) for sample in batch[:number]]) if mixed else None
        return images, _Target(target, index, label)


class IndexedLoader:
    """What `create_loader` gives: timm's loader, to which all else is passed on.

    `samples_per_epoch`: how many samples an epoch has, in all processes.
    """

    def __init__(self, loader: Any, collate: _Collate, batch_size: int, views: int) -> None:
        self.loader: Any = loader
        self._collate = collate
        halved = isinstance(collate.collate, FastCollateMixup) and "half" in collate.collate.mode
        per_batch = batch_size // 2 if halved else batch_size * views
        self.samples_per_epoch: int = len(loader) * per_batch * world_size()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for images, target in self.loader:
            yield images, *(part for part in target if part is not None)

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def mixup_enabled(self) -> bool:
        """Whether the `FastCollateMixup` mixes, as timm's loop sets it to stop mixing."""
        return bool(getattr(self._collate.collate, "mixup_enabled", False))

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        if isinstance(self._collate.collate, FastCollateMixup):
            self._collate.collate.mixup_enabled = value

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet: while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)
