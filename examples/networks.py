"""The paper's networks for 32×32 images: ResNet-20/32 and Wide-ResNet-28-10."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """He et al. (CVPR 2016), CIFAR form: a shortcut without parameters (option A)."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, 0, self.extra)))


class WideBlock(nn.Module):
    """Zagoruyko and Komodakis (BMVC 2016): pre-activation, a 1×1 shortcut where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class CifarNet(nn.Module):
    """A stem, three stages of blocks at strides 1, 2, 2, global pooling and the head `fc`."""

    def __init__(self, block: type[nn.Module], depth: int, widths: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        stem, *stages = widths
        self.stem = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(stem) if block is BasicBlock else nn.Identity()
        blocks: list[nn.Module] = []
        width_in = stem
        for stage, width in enumerate(stages):
            for number in range(depth):
                blocks.append(block(width_in, width, 2 if stage and not number else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.last_bn = nn.Identity() if block is BasicBlock else nn.BatchNorm2d(width_in)
        self.fc = nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x))
        x = F.relu(x) if isinstance(self.stem_bn, nn.BatchNorm2d) else x
        return self.fc(F.relu(self.last_bn(self.blocks(x))).mean((2, 3)))


def make_network(name: str, num_classes: int) -> nn.Module:
    """`resnet20`, `resnet32` and `wrn28_10` in the paper's CIFAR form; any other name is timm's, untrained."""
    if name in ("resnet20", "resnet32"):
        return CifarNet(BasicBlock, (int(name[6:]) - 2) // 6, (16, 16, 32, 64), num_classes)
    if name == "wrn28_10":
        return CifarNet(WideBlock, 4, (16, 160, 320, 640), num_classes)
    import timm

    return timm.create_model(name, pretrained=False, num_classes=num_classes)
