"""ResNets (He et al. 2016) with torchvision's blocks and key names, a width multiplier and a stem for small images."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common.args import fail

ARCHS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
SMALL = 64  # pixels up to which the stem is a 3x3 convolution of stride 1 without max-pooling


class ResNet(nn.Module):
    """The convolutional part: images (B, channels, H, W) -> pooled features (B, dim).

    width multiplies the channels of every layer, the stem's included (Chen et al. 2020, SimCLR, section 2.1).
    Keys and initialisation are torchvision's, so that `torchvision.models.resnet50().load_state_dict(...,
    strict=False)` finds all but fc.

    input_filter: weights (C, 3, k, k), k odd, of a fixed convolution that conv1, which then has C input channels, gets
    instead of the image. It is a buffer: not trained, but saved with the weights, so that it cannot be forgotten.
    """

    def __init__(self, block, layers, width=1.0, small=False, zero_init_residual=False, input_filter=None, channels=3):
        super().__init__()
        self.channels = round(64 * width)
        self.register_buffer("input_filter", input_filter)
        inputs = channels if input_filter is None else len(input_filter)
        if small:
            self.conv1 = nn.Conv2d(inputs, self.channels, 3, stride=1, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(inputs, self.channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        for i, blocks in enumerate(layers):
            planes = round(64 * 2**i * width)
            setattr(self, f"layer{i + 1}", self._layer(block, planes, blocks, stride=1 if i == 0 else 2))
        self.dim = self.channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    def _layer(self, block, planes, blocks, stride):
        downsample = None
        if stride != 1 or self.channels != planes * block.expansion:
            conv = nn.Conv2d(self.channels, planes * block.expansion, 1, stride=stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(planes * block.expansion))
        layer = [block(self.channels, planes, stride, downsample)]
        self.channels = planes * block.expansion
        layer += [block(self.channels, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layer)

    def stages(self, x):
        """The five maps that linear and SVM evaluations read: the stem before max-pooling, then layer1 to layer4."""
        if self.input_filter is not None:
            x = F.conv2d(x, self.input_filter, padding=self.input_filter.shape[-1] // 2)
        maps = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(maps[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return torch.flatten(self.stages(x)[-1].mean((2, 3)), 1)


def resnet(arch, width=1.0, image_size=224, zero_init_residual=False, input_filter=None, channels=3):
    """A ResNet by name. Images of at most 64 pixels get the small stem. channels: of the images."""
    if arch not in ARCHS:
        what = "only our ResNets have the maps and the filter used here" if ":" in arch else "unknown"
        fail(f"--arch {arch}: {what}, expected one of {', '.join(ARCHS)}")
    block, layers = ARCHS[arch]
    if not 1 / 64 <= width <= 64:
        fail(f"--width {width} must lie between 1/64, which leaves one channel of 64, and 64")
    return ResNet(block, layers, width, image_size <= SMALL, zero_init_residual, input_filter, channels)
