"""The network of few-shot learning: four blocks of a 3x3 convolution with 64 channels, batch norm, ReLU and 2x2
max-pooling, whose last map is the feature (Vinyals et al. 2016)."""

import itertools

import torch
from torch import nn

from common.args import fail

ARCHS = {"conv4": 64}


class Conv4(nn.Module):
    """Images (B, channels, S, S) -> the last map as features (B, dim): 1,600 for 84 pixels, 64 for 28."""

    def __init__(self, width, image_size, channels=3):
        super().__init__()
        sides = [channels, *[width] * 4]
        self.encoder = nn.Sequential(*(self._block(*pair) for pair in itertools.pairwise(sides)))
        self.dim = width * (image_size // 16) ** 2

    @staticmethod
    def _block(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x):
        return torch.flatten(self.encoder(x), 1)


def conv4(arch, image_size=84, width=1.0, channels=3):
    """Conv4 by name. width multiplies its 64 channels. Features belong to one image size, of 16 pixels or more."""
    if arch not in ARCHS:
        fail(f"--arch {arch}: unknown, expected {', '.join(ARCHS)}")
    if image_size < 16:
        fail(f"--image-size {image_size}: {arch} halves the side four times and needs 16 pixels or more")
    if (outputs := round(ARCHS[arch] * width)) < 1:
        fail(f"--width {width:g} leaves {arch} no channel")
    return Conv4(outputs, image_size, channels)
