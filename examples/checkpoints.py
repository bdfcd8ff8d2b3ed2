"""Checkpoints from which a run goes on bit for bit, also in mid-epoch, and also on another number of processes.

On another number of processes a run goes on with the same batches, but not to the same bit: each process has its own
BatchNorm statistics and augmentation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from common import positive
from torch import Tensor

from fsr_wrap import FSRWrapper

FREE = {"output_dir", "resume", "checkpoint_steps", "keep", "batch_size"}  # flags that a resumed run may change

LABELS = "checksum of the labels"  # in the settings of a run


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--resume, --checkpoint-steps and --keep; --output-dir is the example's own."""
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir, if there is one")
    add("--checkpoint-steps", type=positive, help="write a checkpoint every so many steps too, not only every epoch")
    add("--keep", type=positive, default=2, help="keep the last so many checkpoints (%(default)s)")


def get_settings(args: argparse.Namespace, free: set[str], total_batch: int, labels: Tensor) -> dict[str, str]:
    """What a run must have in common with a checkpoint to go on from it: every flag that is not `free`, and the data.

    **Arguments:** `args`; `free`, the names of flags that may change; `total_batch`, images a step over all processes;
    `labels`, those trained on.
    """
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in free | FREE}
    checksum = zlib.crc32(labels.numpy().tobytes())
    return {**flags, "images a step over all processes": str(total_batch), LABELS: str(checksum)}


@dataclass
class Progress:
    """How far training is, and with which settings; saved in every checkpoint."""

    settings: dict[str, str]
    steps_per_epoch: int
    epoch: int = 0
    step: int = 0  # of the epoch

    @property
    def total_steps(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def end_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0

    def check(self, saved: dict[str, str]) -> None:
        """**Raises:** `SystemExit` if a checkpoint's settings are not this run's."""
        differing = [name for name, value in self.settings.items() if saved.get(name) != value]
        if differing:
            found = ", ".join(f"{name} {saved.get(name)} (now {self.settings[name]})" for name in differing)
            raise SystemExit(
                f"The checkpoint was written with {found}: go on with the same settings, or pass another --output-dir."
            )


@dataclass
class Checkpoints:
    """The checkpoints of a run, a folder each; whatever bears its final name is complete.

    **Arguments:** `folder`, where they are, None for nowhere; `every`, steps from one to the next within an epoch, None
    for none there; `keep`, how many stay; `progress` is saved and restored with all that Accelerate prepared.
    """

    accelerator: Accelerator
    progress: Progress
    fsr: FSRWrapper | None
    folder: Path | None
    every: int | None
    keep: int

    def find(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return sorted(self.folder.glob("epoch_*")) if self.folder else []

    def save_in_epoch(self) -> None:
        """Writes a checkpoint if one is due after this step; the last step of an epoch is the caller's to save."""
        progress = self.progress
        if self.every and progress.step < progress.steps_per_epoch and progress.total_steps % self.every == 0:
            self.save()

    def save(self) -> None:
        """Writes all state, under its final name only when complete, and removes the oldest. Every process calls it."""
        if self.folder is None:
            return
        accelerator, progress = self.accelerator, self.progress
        partial, final = self.folder / "partial", self.folder / f"epoch_{progress.epoch:04d}_step_{progress.step:08d}"
        if self.fsr is not None:
            self.fsr.consolidate()  # Accelerate writes the first process's state alone
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=2), encoding="utf-8")
            partial.replace(final)
            for old in self.find()[: -self.keep]:
                shutil.rmtree(old.replace(partial))  # so that a half-removed one has no final name either

    @staticmethod
    def read(checkpoint: Path) -> dict[str, Any]:
        """How far the run was, and its settings."""
        return json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))

    def forget(self) -> None:
        """Removes the checkpoints of an earlier run on the same labels; those of other labels stay."""
        with self.accelerator.main_process_first():
            labels = {self.read(checkpoint)["settings"].get(LABELS) for checkpoint in self.find()}
            if self.folder and self.accelerator.is_main_process and labels == {self.progress.settings[LABELS]}:
                shutil.rmtree(self.folder)

    def restore(self, resume: bool) -> None:
        """Loads the newest checkpoint if `resume`; else sees to it that old ones do not mix with new ones.

        **Raises:** `SystemExit` if the checkpoints are another run's.
        """
        found = self.find()
        if resume and found:
            saved = self.read(found[-1])
            self.progress.check(saved["settings"])
            self.accelerator.load_state(str(found[-1]))
            vars(self.progress).update(saved)
            self.accelerator.print(f"Resumed from {found[-1]}: epoch {self.progress.epoch}, step {self.progress.step}")
        elif resume:
            self.accelerator.print(f"There is no checkpoint in {self.folder} yet: starting from the beginning")
        elif found:
            raise SystemExit(f"{self.folder} has checkpoints of another run: pass --resume, or another --output-dir.")
