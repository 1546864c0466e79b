"""Swins and XCiTs in the files of others: their names in other libraries, and what their shapes tell.

Tables are patterns and replacements, applied in this order, from the names of a library to those used here.
"""

import re

import torch

from common import swin, xcit

SWIN_TORCHVISION = {
    r"^features\.0\.0\.": "patch_embed.proj.",
    r"^features\.0\.2\.": "patch_embed.norm.",
    **{rf"^features\.{2 * s + 1}\.": f"layers.{s}.blocks." for s in range(8)},
    **{rf"^features\.{2 * s + 2}\.": f"layers.{s}.downsample." for s in range(8)},
    r"\.mlp\.0\.": ".mlp.fc1.",
    r"\.mlp\.3\.": ".mlp.fc2.",
}
TO_TORCHVISION = {
    r"^patch_embed\.proj\.": "features.0.0.",
    r"^patch_embed\.norm\.": "features.0.2.",
    **{rf"^layers\.{s}\.blocks\.": f"features.{2 * s + 1}." for s in range(8)},
    **{rf"^layers\.{s}\.downsample\.": f"features.{2 * s + 2}." for s in range(8)},
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
}
SWIN_TIMM = {rf"^layers\.{s + 1}\.downsample\.": f"layers.{s}.downsample." for s in range(7)}  # at the start of a stage
TO_TIMM = {rf"^layers\.{s}\.downsample\.": f"layers.{s + 1}.downsample." for s in reversed(range(7))}
SWIN_MMCLS = {
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^stages\.": "layers.",
    r"\.w_msa\.": ".",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
    r"^norm\d\.": "norm.",
}
SWIN_TRANSFORMERS = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.norm\.": "patch_embed.norm.",
    r"^embeddings\.": "",
    r"^layernorm\.": "norm.",
    r"^encoder\.": "",
    r"\.attention\.self\.([qkv])(uery|ey|alue)\.": r".attn.\1.",
    r"\.attention\.self\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}
XCIT_TIMM = {r"^pos_embed\.": "pos_embeder."}


def renamed(weights, table):
    """The weights with every pattern of a table replaced in every name."""
    for pattern, replacement in table.items():
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    return weights


def merged(weights):
    """mmcls's weights of a Swin with the four neighbours that become one token in the official order: there channel by
    channel, each with its neighbours row by row; here neighbour by neighbour, column by column."""
    found = dict(weights)
    for name, value in weights.items():
        if ".downsample." in name and value.shape[-1] % 4 == 0:
            found[name] = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
    return found


def exported(weights, target):
    """Weights of a Swin or an XCiT under the names of a library: "torchvision" (Swin only) or "timm"."""
    if target == "torchvision":  # which saves what it can compute, too
        for name, table in [(n, t) for n, t in weights.items() if n.endswith(".relative_position_bias_table")]:
            window = (round(len(table) ** 0.5) + 1) // 2
            weights = weights | {name.replace("bias_table", "index"): swin.pairs(window, table.device)}
        return renamed(weights, TO_TORCHVISION)
    if "cls_token" not in weights:
        return renamed(weights, TO_TIMM)
    found = {}
    for name, value in renamed(weights, {r"^pos_embeder\.": "pos_embed."}).items():
        split = name.startswith("cls_attn") and ".attn.qkv." in name
        parts = zip("qkv", value.chunk(3), strict=True) if split else [("qkv", value)]
        found |= {name.replace(".attn.qkv.", f".attn.{part}."): tensor for part, tensor in parts}
    return found


def shaped(weights, name, *shape):
    """A tensor of the file; where there is none with as many dimensions, one of the usual shape."""
    value = weights.get(name)
    return value if value is not None and value.ndim == len(shape) else torch.empty(shape)


def _count(weights, start):
    """How many numbers follow `start` in the names."""
    return len({name[len(start) :].split(".")[0] for name in weights if name.startswith(start)})


def swin_shape(weights, eps=1e-5):
    """What the shapes tell of a Swin: the arguments of common.swin.swin. Not eps; the size of the images is that of
    which the window of the last stage is the whole map, as in all published networks."""
    stages = max(1, _count(weights, "layers."))
    depths = [_count(weights, f"layers.{s}.blocks.") for s in range(stages)]
    proj = shaped(weights, "patch_embed.proj.weight", 96, 3, 4, 4)
    tables = [f"layers.{s}.blocks.0.attn.relative_position_bias_table" for s in range(stages)]
    tables = [shaped(weights, name, 169, 3 * 2**s) for s, name in enumerate(tables)]
    window, heads = [(round(len(t) ** 0.5) + 1) // 2 for t in tables], [t.shape[1] for t in tables]

    def distance(arch):
        dim, blocks, first = swin.ARCHS[arch]
        return first != heads[0], sum(abs(a - b) for a, b in zip(blocks, depths, strict=False)), abs(dim - len(proj))

    arch, patch = min(swin.ARCHS, key=distance), proj.shape[-1]
    told = {"arch": arch, "width": len(proj) / swin.ARCHS[arch][0], "patch_size": patch, "channels": proj.shape[1]}
    told |= {"image_size": patch * 2 ** (stages - 1) * window[-1]}
    return told | {"depths": depths, "heads": heads, "window": window, "eps": eps}


def xcit_shape(weights):
    """What the shapes tell of an XCiT: the arguments of common.xcit.xcit. norm_all does not show: only the published
    network with the shape of the nano one lacks it."""
    convs = sorted(n for n in weights if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", n))
    first = shaped(weights, convs[0] if convs else "", 48, 3, 3, 3)
    dim, depth = shaped(weights, "cls_token", 1, 1, 384).shape[2], _count(weights, "blocks.")
    heads = len(shaped(weights, "blocks.0.attn.temperature", 8, 1, 1))

    def distance(arch):
        row = xcit.ARCHS[arch]
        return row[2] != heads, row[0] != dim, abs(row[1] - depth)

    arch = min(xcit.ARCHS, key=distance)
    told = {"arch": arch, "width": dim / xcit.ARCHS[arch][0], "image_size": 224, "channels": first.shape[1]}
    told |= {"patch_size": 2 ** max(1, len(convs)), "depth": depth, "heads": heads}
    return told | {"norm_all": (dim, depth, heads) != xcit.ARCHS["xcit_nano_12"][:3]}
