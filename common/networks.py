"""The backbone that --arch names: a ResNet of ours, or any classification network of torchvision or timm.

    resnet18 ... resnet152       common/resnet.py: any width, any channels, a stem for small images, maps of its stages
    resnet50_sk ... 101, 152     the same with selective kernels
    torchvision:convnext_tiny    any name of torchvision.models.list_models(module=torchvision.models)
    timm:convnextv2_atto         any name of timm.list_models(), where timm is installed (pip install timm)

Networks of a library start from random weights, drawn from --seed. Nothing is downloaded.
"""

import copy
import difflib
import importlib

import torch
import torchvision
from torch import nn

from common import resnet
from common.args import fail
from common.distributed import print0

LIBRARIES = ("torchvision", "timm")


def network(arch, width=1.0, image_size=224, zero_init_residual=False, channels=3):
    """A backbone by name: images (B, channels, S, S) -> features (B, dim). zero_init_residual: of our ResNets. Ends the
    program with the nearest names for one that is unknown, and where a library cannot build what is asked for."""
    if ":" in arch:
        if image_size <= resnet.SMALL:
            print0(f"note        {arch} has no stem for small images: {image_size} px lose most of their detail in it")
        return Library(arch, width, image_size, channels)
    if arch not in resnet.ARCHS:
        known = [*resnet.ARCHS, *(f"torchvision:{name}" for name in _names("torchvision"))]
        there = f"unknown, expected one of {', '.join(resnet.ARCHS)}, torchvision:NAME or timm:NAME"
        fail(f"--arch {arch}: {there}{_nearest(arch, known)}")
    return resnet.resnet(arch, width, image_size, zero_init_residual, channels=channels)


def _names(library):
    if library == "torchvision":
        return torchvision.models.list_models(module=torchvision.models)
    try:
        return importlib.import_module("timm").list_models()
    except ImportError:
        fail("--arch timm:NAME needs timm: pip install timm")


def _nearest(word, names):
    """What to say of the names that a misspelt one may have meant."""
    plain = {name.rpartition(":")[2].replace("_", ""): name for name in reversed(names)}
    found = difflib.get_close_matches(word.lower().rpartition(":")[2].replace("_", ""), plain, 3)
    return f"; did you mean {', '.join(plain[name] for name in found)}?" if found else ""


class Library(nn.Module):
    """A classification network of a library without its classifier: images (B, channels, S, S) -> (B, dim).

    Its state dict has the names of the library. Dropout and stochastic depth are off: they draw from the generator of
    the process, and a run would depend on where it was interrupted and on how many processes it has. name, options: of
    the library's function that builds it. head: the layer that is left out, if it is a part of what is built.
    """

    def __init__(self, arch, width=1.0, image_size=224, channels=3):
        super().__init__()
        library, _, self.name = arch.partition(":")
        if library not in LIBRARIES:
            fail(f"--arch {arch}: unknown library, expected torchvision:NAME or timm:NAME")
        if self.name not in (names := _names(library)):
            fail(f"--arch {arch}: {library} has no such network{_nearest(arch, [f'{library}:{n}' for n in names])}")
        if width != 1:
            fail(f"--width {width:g}: {arch} has one width; leave the flag out, or choose another network of {library}")
        self.arch, self.library, self.head, self.sizes = arch, library, None, set()
        try:
            build = self._torchvision if library == "torchvision" else self._timm
            self.network = build(image_size, channels)
        except Exception as error:  # whatever a library says of a size that it cannot build
            self._refuse("be built for", image_size, error)
        settle(self.network)
        self.channels, self.dim = channels, 0
        self.dim = self._check(image_size)

    def _torchvision(self, size, channels):
        """torchvision's network with an identity in place of its last layer."""
        if channels != 3:
            others = f"timm:NAME, or {', '.join(resnet.ARCHS)}"
            fail(f"--channels {channels}: {self.arch} is for images of 3 channels; try {others}")
        self.options = {"weights": None}
        if self.name in ("googlenet", "inception_v3"):
            self.options |= {"aux_logits": False, "init_weights": True}
        if self.name.startswith("vit_"):
            self.options |= {"image_size": size}
        if self.name.startswith("maxvit_"):
            self.options |= {"input_size": (size, size)}
        network = torchvision.models.get_model(self.name, **self.options)
        if self.name.startswith(
            "mnasnet"
        ):  # it would load only what says of which version it is, which our files do not
            kind = type(network)
            network.__class__ = type(kind.__name__, (kind,), {"_load_from_state_dict": nn.Module._load_from_state_dict})
        layers = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.head = layers[-1]
        network.set_submodule(self.head, nn.Identity())
        return network

    def _timm(self, size, channels):
        """timm's network without classifier; those with positions take the size of the images."""
        create = importlib.import_module("timm").create_model
        self.options = {"pretrained": False, "num_classes": 0, "in_chans": channels}
        try:
            network = create(self.name, **self.options, img_size=size)
        except TypeError:  # most take images of any size
            return create(self.name, **self.options)
        self.options["img_size"] = size
        return network

    def _check(self, size):
        """Remembers that images of this size can pass, or ends the program. Returns the number of features."""
        try:
            shapes = copy.deepcopy(self.network).to("meta").eval()  # shapes without numbers; some keep what they see
            with torch.no_grad():
                dtype = next(shapes.parameters()).dtype
                images = torch.empty(2, self.channels, size, size, dtype=dtype, device="meta")
                features = shapes(images).flatten(1).shape[1]
        except Exception as error:
            self._refuse("take", size, error)
        self.sizes.add(size)
        return features

    def _refuse(self, what, size, error):
        """Ends the program with the library's reason why it has no such network for this size."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        fail(f"--arch {self.arch} cannot {what} images of {size} pixels ({reason}): try a multiple of 224, or another")

    def forward(self, x):
        if x.shape[-1] not in self.sizes and not torch.compiler.is_compiling():
            self._check(x.shape[-1])  # views of several sizes: some networks have positions for one only
        return self.network(x).flatten(1)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return self.network.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}network.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def settle(network):
    """Switches off what draws random numbers, and takes the activation out of batch norms that hold theirs."""
    for module in network.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        for name in ("drop_prob", "drop_rate"):  # timm's names
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and isinstance(getattr(module, "act", None), nn.Module):
            module.__class__ = nn.BatchNorm2d  # what synchronises batch norm knows only this kind
            module.register_forward_hook(_activate)


def _activate(module, inputs, output):
    """The second half of a batch norm that holds its activation."""
    return module.act(module.drop(output))
