"""ResNets (He et al. 2016) with torchvision's blocks and key names, a width multiplier and a stem for small images.

resnet50_sk, resnet101_sk, resnet152_sk have selective kernels (Li et al. 2019) and the stem and shortcuts of ResNet-D
(He et al. 2019), as the second version of SimCLR has them (Chen et al. 2020b), with its numbers of parameters. Only our
own files hold such networks: the published ones are TensorFlow's, which are not read here.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common.args import fail


class SelectiveKernel(nn.Module):
    """A 3x3 convolution, norm and ReLU in two streams, (B, C, H, W) -> (B, C, H', W'), and for each channel the mean of
    both with weights that depend on the image. Both kernels are 3x3, as in the second version of SimCLR."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        middle = max(channels // 16, 32)
        self.mix = nn.Sequential(
            nn.Conv2d(channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, 2 * channels, 1, bias=False),
        )

    def forward(self, x):
        streams = F.relu(self.bn(self.conv(x)), inplace=True).unflatten(1, (2, -1))  # (B, 2, C, H', W')
        scores = self.mix(streams.sum(1).mean((2, 3), keepdim=True))
        return (streams * scores.unflatten(1, (2, -1)).softmax(1).type_as(streams)).sum(1)


class SelectiveBottleneck(Bottleneck):
    """torchvision's block with a selective kernel instead of its 3x3 convolution; the ReLU after it changes nothing."""

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__(inplanes, planes, stride, downsample)
        self.conv2, self.bn2 = SelectiveKernel(planes, stride), nn.Identity()


ARCHS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet50_sk": (SelectiveBottleneck, (3, 4, 6, 3)),
    "resnet101_sk": (SelectiveBottleneck, (3, 4, 23, 3)),
    "resnet152_sk": (SelectiveBottleneck, (3, 8, 36, 3)),
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
        self.channels, self.small = round(64 * width), small
        self.register_buffer("input_filter", input_filter)
        inputs = channels if input_filter is None else len(input_filter)
        self.conv1 = self._stem(inputs)
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

    def _stem(self, inputs):
        if self.small:
            return nn.Conv2d(inputs, self.channels, 3, stride=1, padding=1, bias=False)
        return nn.Conv2d(inputs, self.channels, 7, stride=2, padding=3, bias=False)

    def _shortcut(self, outputs, stride):
        conv = nn.Conv2d(self.channels, outputs, 1, stride=stride, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def _layer(self, block, planes, blocks, stride):
        downsample = None
        if stride != 1 or self.channels != planes * block.expansion:
            downsample = self._shortcut(planes * block.expansion, stride)
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


class Pool(nn.Module):
    """Mean of 2x2 pixels. Beyond the last row and column of an odd map lie zeros, with stride 1 nothing that counts:
    the paddings of the published networks."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        if self.stride == 1:
            return F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False)[:, :, 1:, 1:]
        return F.avg_pool2d(x, 2, self.stride, ceil_mode=True, divisor_override=4)


class SelectiveResNet(ResNet):
    """Selective kernels and ResNet-D: three 3x3 convolutions as the stem of large images, shortcuts that average before
    they are projected. Stem and shortcuts have timm's key names."""

    def _stem(self, inputs):
        if self.small:
            return super()._stem(inputs)
        half, layers = max(1, self.channels // 2), []
        for outputs, stride in ((half, 2), (half, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        return nn.Sequential(*layers, nn.Conv2d(half, self.channels, 3, padding=1, bias=False))

    def _shortcut(self, outputs, stride):
        return nn.Sequential(Pool(stride), *super()._shortcut(outputs, 1))


def resnet(arch, width=1.0, image_size=224, zero_init_residual=False, input_filter=None, channels=3):
    """A ResNet by name. Images of at most 64 pixels get the small stem. channels: of the images."""
    if arch not in ARCHS:
        what = "only our ResNets have the maps and the filter used here" if ":" in arch else "unknown"
        fail(f"--arch {arch}: {what}, expected one of {', '.join(ARCHS)}")
    block, layers = ARCHS[arch]
    if not 1 / 64 <= width <= 64:
        fail(f"--width {width} must lie between 1/64, which leaves one channel of 64, and 64")
    make = SelectiveResNet if block is SelectiveBottleneck else ResNet
    return make(block, layers, width, image_size <= SMALL, zero_init_residual, input_filter, channels)
