"""Published checkpoints: where a file keeps its backbone and under which names, as tables.

A backbone is found in two steps: a layout says which of the file's tensors belong to it, a naming turns their names
into those used here (ResNet: torchvision's, ViT: timm's). Architecture, width and stem are then read from the shapes.
Whether all of this was right is decided by the strict comparison in checkpoint.py, not here.
"""

import argparse
import pathlib
import re
from typing import NamedTuple

import numpy as np
import torch
from torchvision.models.resnet import Bottleneck

from common import resnet, vit


class Layout(NamedTuple):
    name: str
    container: str  # the key under which the file keeps the weights; "": the file is the dictionary of weights
    prefix: str  # of the backbone's tensors; a "module." of the parallel wrapper before it is dropped from all names
    also: str = ""  # what else the file must hold: one of its keys, or the start of a tensor's name
    heads: tuple = ()  # (dim, attention heads) where the number is not the usual one
    padding: int = 1  # of a 3x3 stem


# From the particular to the general: of two complete backbones with equally many tensors the first one is taken.
# Assumed, because the files do not say it: solo-learn pads its 3x3 stem by 2; only MoCo v3 gives a ViT-S 12 heads.
LAYOUTS = (
    Layout("solo-learn", "state_dict", "backbone.", also="classifier.", padding=2),
    Layout("solo-learn", "state_dict", "encoder.", also="classifier.", padding=2),
    Layout("MoCo", "state_dict", "encoder_q."),
    Layout("MoCo v3", "state_dict", "base_encoder.", heads=(384, 12)),
    Layout("SimSiam", "state_dict", "encoder.", also="predictor."),
    Layout("SwAV", "", "", also="prototypes."),
    Layout("SwAV", "state_dict", "", also="prototypes."),
    Layout("DirectCLR", "model", "backbone.", also="online_head."),
    Layout("Barlow Twins", "model", "backbone."),
    Layout("Feature Transformation", "model", "encoder."),
    Layout("DINO", "teacher", "backbone."),
    Layout("MAE", "model", "", also="decoder_embed."),
    Layout("MMSelfSup, MoCo v3", "state_dict", "backbone.", also="base_encoder.", heads=(384, 12)),
    Layout("MMSelfSup", "state_dict", "backbone.", also="meta"),
    Layout("lightly", "state_dict", "backbone."),
    Layout("lightly", "state_dict", "backbone.vit."),
    *(Layout("", container, "") for container in ("", "state_dict", "model", "teacher", "network")),
)


class Naming(NamedTuple):
    name: str
    family: str
    mark: str  # the name by which it is told
    renames: dict  # pattern -> replacement, applied in this order
    stem_relu: bool = True


# nn.Sequential(*resnet.children()): torchvision's has ReLU and max-pooling at 2 and 3; in lightly's ResNet for small
# images they are functions, so that such a sequence has lost the ReLU of the stem.
CHILDREN = {r"^0\.": "conv1.", r"^1\.": "bn1."}
CHILDREN_TORCHVISION = CHILDREN | {rf"^{i + 3}\.": f"layer{i}." for i in range(1, 5)}
CHILDREN_LIGHTLY = CHILDREN | {rf"^{i + 1}\.": f"layer{i}." for i in range(1, 5)} | {r"\.shortcut\.": ".downsample."}
VIT_MMCLS = {
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^ln1\.": "norm.",
    r"^layers\.": "blocks.",
    r"\.ln([12])\.": r".norm\1.",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}
VIT_TORCHVISION = {
    r"^class_token$": "cls_token",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.ln\.": "norm.",
    r"^encoder\.layers\.encoder_layer_": "blocks.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",  # linear_1, linear_2: torchvision's first version of this network
    r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
}
NAMINGS = (
    Naming("torchvision", "resnet", "layer1.0.conv1.weight", {}),
    Naming("torchvision", "resnet", "conv1.weight", {}),
    Naming("children of torchvision's", "resnet", "7.0.conv1.weight", CHILDREN_TORCHVISION),
    Naming("children of lightly's", "resnet", "2.0.conv1.weight", CHILDREN_LIGHTLY, stem_relu=False),
    Naming("timm", "vit", "blocks.0.attn.qkv.weight", {}),
    Naming("mmcls", "vit", "layers.0.attn.qkv.weight", VIT_MMCLS),
    Naming("torchvision", "vit", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", VIT_TORCHVISION),
)

# Tensors beside the backbone that no evaluation needs. Others that are left over change what the network computes.
HEADS = r"(fc|heads?|classifier|projector|predictor|projection_head|prototypes|pre_logits)\.|mask_token$|decoder_"


class Found(NamedTuple):
    """A backbone in a file: its tensors under the names used here, heads dropped."""

    name: str
    family: str
    weights: dict
    layout: Layout
    stem_relu: bool
    total: int  # numbers in the network that it is part of: with heads, momentum copies, queues
    meta: dict  # what our own files say; {} for others


def harmless_types():
    """What published files hold beside tensors and what can do nothing but store values: arguments, paths, numbers."""
    types = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    scalar = np.float64(0).__reduce__()[0]
    types += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    for module in ("pathlib", "pathlib._local"):  # the second name is that of Python 3.13
        for name in ("Posix", "PurePosix", "Windows", "PureWindows"):
            kind = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
            types.append((kind, f"{module}.{name}Path"))
    return types


def _tensors(state, container):
    """The tensors of a container, without "module."."""
    part = state.get(container) if container else state
    if not isinstance(part, dict):
        return {}
    return {k.removeprefix("module."): v for k, v in part.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def _own(state):
    """Our backbone.pt or last.pt: a Found, or None for any other file."""
    meta = state.get("meta")
    container = "backbone" if "backbone" in state else "model" if "backbone_prefix" in state else None
    if container is None or not isinstance(meta, dict):
        return None
    prefix = "" if container == "backbone" else str(state["backbone_prefix"])
    tensors = _tensors(state, container)
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    family = "vit" if str(meta.get("arch")) in vit.ARCHS else "resnet"
    return Found("unknown", family, weights, Layout("", container, prefix), True, _total(tensors), meta)


def _total(tensors):
    return sum(v.numel() for v in tensors.values() if v.is_floating_point())


def candidates(state):
    """All backbones in the dictionary of a file, as Found: the one of our own files, or those of the layouts above."""
    if own := _own(state):
        return [own]
    found, seen = [], set()
    for layout in LAYOUTS:
        tensors, place = _tensors(state, layout.container), (layout.container, layout.prefix)
        named = layout.also in state or any(k.startswith(layout.also) for k in tensors)
        if not named or place in seen:
            continue
        part = {k.removeprefix(layout.prefix): v for k, v in tensors.items() if k.startswith(layout.prefix)}
        naming = next((n for n in NAMINGS if n.mark in part), None)
        if naming:
            seen.add(place)
            name, weights = layout.name or naming.name, _renamed(part, naming.renames)
            found.append(Found(name, naming.family, weights, layout, naming.stem_relu, _total(tensors), {}))
    return found


def _renamed(weights, renames):
    for pattern, replacement in renames.items():
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    return {name: value for name, value in weights.items() if not re.match(HEADS, name)}


# ------------------------------------------------------------------------------------------------------ shapes
def _shaped(weights, name, *shape):
    """A tensor of the file; where there is none with as many dimensions, one of the usual shape."""
    value = weights.get(name)
    return value if value is not None and value.ndim == len(shape) else torch.empty(shape)


def resnet_shape(weights):
    """What the shapes tell of a ResNet: arch (the nearest one), width, small (a 3x3 stem), channels of the images."""
    blocks = [len({k.split(".")[1] for k in weights if k.startswith(f"layer{i}.")}) for i in range(1, 5)]
    bottleneck = "layer1.0.conv3.weight" in weights

    def distance(arch):
        block, counts = resnet.ARCHS[arch]
        return (block is Bottleneck) != bottleneck, sum(abs(a - b) for a, b in zip(blocks, counts, strict=True))

    stem = _shaped(weights, "conv1.weight", 64, 3, 7, 7)
    inputs = _shaped(weights, "input_filter", 2, 3, 3, 3) if "input_filter" in weights else stem
    # 2 in a foreign file: edges (Sobel) of colour images, made by a filter that the file does not have
    channels = 3 if inputs.shape[1] == 2 else inputs.shape[1]
    small = stem.shape[-1] == 3
    return {"arch": min(resnet.ARCHS, key=distance), "width": len(stem) / 64, "small": small, "channels": channels}


def vit_shape(weights, heads=(), arch=None):
    """What the shapes tell of a ViT: the arguments of common.vit.vit.

    They do not tell the number of heads. heads: (dim, heads) where the layout knows it, else the usual one of the
    dimension is taken, or that of arch if no architecture has this dimension; None if nothing helps.
    """
    proj = _shaped(weights, "patch_embed.proj.weight", 768, 3, 16, 16)
    table = _shaped(weights, "pos_embed", 1, 197, len(proj))
    dim, patch = len(proj), proj.shape[-1]
    name = next((name for name, row in vit.ARCHS.items() if row[0] == dim), arch if arch in vit.ARCHS else "vit_tiny")
    usual = None if dim % 64 else dim // 64
    if name == arch or vit.ARCHS[name][0] == dim:
        usual = vit.ARCHS[name][2]
    side = round((table.shape[1] - 1) ** 0.5)
    positions = _positions(table, dim, side)
    if dim == 384 and positions == "sincos-yx":  # among published ViT-S only those of MoCo v3 have this table
        heads = (384, 12)
    usual = heads[1] if heads and heads[0] == dim else usual
    hidden = len(_shaped(weights, "blocks.0.mlp.fc1.weight", 4 * dim, dim))
    usual = usual if usual and dim % usual == 0 and dim % 4 == 0 else None
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    told = {"arch": name, "width": dim / vit.ARCHS[name][0], "image_size": side * patch, "patch_size": patch}
    told |= {"channels": proj.shape[1], "depth": depth, "heads": usual, "positions": positions}
    told["pool"] = "mean" if "fc_norm.weight" in weights and "norm.weight" not in weights else "cls"
    # the ratio is rounded down after multiplying with dim; the values of the scale are in the file, this asks for them
    return told | {"mlp_ratio": (hidden + 0.5) / dim, "layer_scale": float("blocks.0.ls1.gamma" in weights)}


def _positions(table, dim, side):
    """Which of the two fixed position tables this is; "learned" if neither."""
    for order in ("xy", "yx") if table.shape[1] == 1 + side * side and dim % 4 == 0 else ():
        if torch.allclose(table[0, 1:].double(), vit.sincos(dim, (side, side), order), atol=1e-3):
            return f"sincos-{order}"
    return "learned"
