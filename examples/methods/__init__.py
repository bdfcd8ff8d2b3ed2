"""The methods that FSR is compared with, a small file each, and FSR's own recipes, by name.

Each is written from its paper's formula, at its published defaults. Epoch counts that were published for runs of
another length are scaled; each file says which. They are for comparison: clear rather than fast, and for one process.
"""

from __future__ import annotations

from typing import Any

from .balanced_softmax import BalancedSoftmax
from .base import Method, Task
from .class_balanced import ClassBalancedFocal, ClassBalancedSoftmax
from .co_teaching import CoTeaching
from .cross_entropy import CrossEntropy, LabelSmoothing
from .crust import CRUST
from .d2l import D2L
from .elr import ELR
from .focal import Focal
from .forward_correction import ForwardCorrection
from .fsr import FSR, FSRClip, FSRLongTail, FSRPaper
from .gce import GCE, TruncatedGCE
from .incv import INCV
from .l2r import L2R
from .ldam import LDAM
from .mentornet import MentorNetPD
from .meta_weight_net import MetaWeightNet
from .mixup import MixUp
from .pencil import PENCIL
from .remix import Remix
from .rog import RoG
from .sce import SCE
from .selc import SELC
from .sop import SOP

__all__ = ["METHODS", "Method", "Task", "make_method"]

METHODS: dict[str, type[Method]] = {
    "ce": CrossEntropy,
    "label-smoothing": LabelSmoothing,
    "gce": GCE,
    "gce-truncated": TruncatedGCE,
    "sce": SCE,
    "elr": ELR,
    "selc": SELC,
    "sop": SOP,
    "pencil": PENCIL,
    "f-correction": ForwardCorrection,
    "mixup": MixUp,
    "d2l": D2L,
    "rog": RoG,
    "crust": CRUST,
    "mentornet-pd": MentorNetPD,
    "co-teaching": CoTeaching,
    "incv": INCV,
    "l2r": L2R,
    "mwn": MetaWeightNet,
    "focal": Focal,
    "cb-softmax": ClassBalancedSoftmax,
    "cb-focal": ClassBalancedFocal,
    "balanced-softmax": BalancedSoftmax,
    "ldam-drw": LDAM,
    "remix": Remix,
    "fsr": FSR,
    "fsr-clip": FSRClip,
    "fsr-paper": FSRPaper,
    "fsr-long-tail": FSRLongTail,
}


def make_method(name: str, task: Task, **options: Any) -> Method:
    """A method of `METHODS` for the task. **Raises:** `ValueError` for an unknown name or what the task lacks."""
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}: give one of {', '.join(METHODS)}.")
    return METHODS[name](task, **options)
