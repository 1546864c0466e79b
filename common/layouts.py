"""Published checkpoints: where a file keeps its backbone and under which names, as tables.

A backbone is looked for wherever the name of one of its tensors ends a name in the file: what stands before it, the
dictionaries around it included, is the place. A naming turns the names there into those used here (ResNet:
torchvision's, ViT: timm's, Swin and XCiT: the official ones), a layout says whose file has such a place. Architecture,
width and stem are then read from the shapes. Whether all of this was right is decided by the strict comparison in
checkpoint.py, not here.
"""

import math
import re
from typing import NamedTuple

import numpy as np
import torch
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import conv4, namings, resnet, swin, vit, xcit
from common.namings import shaped

# What parallel, compiled, sharded and averaged modules put into names, wherever they stand.
WRAPPERS = "module _module _orig_mod _forward_module _fsdp_wrapped_module _checkpoint_wrapped_module _fpw_module"
WRAPPERS = rf"(?<![^.])(?:{WRAPPERS.replace(' ', '|')})\."


class Layout(NamedTuple):
    name: str  # of the method; of the library where it has several; "unknown": nothing is known
    place: str  # pattern of the whole path before the backbone's names, wrappers dropped
    also: str = ""  # pattern of what else there must be: the start of a key of the file, or of a name beside the place
    heads: tuple = ()  # (dim, attention heads) where the number is not the usual one
    padding: int = 1  # of a 3x3 stem
    eps: float = 1e-5  # of the norms of a Swin


# From the particular to the general: the first that fits. Of several complete backbones with equally many tensors the
# one that stands first here is taken. Assumed, because the files do not say it: solo-learn pads its 3x3 stem by 2; only
# MoCo v3 gives a ViT-S 12 heads.
LAYOUTS = (
    Layout("solo-learn", r"state_dict\.(backbone|encoder)\.", "classifier\\.", padding=2),
    Layout("MoCo", r"state_dict\.encoder_q\."),
    Layout("MoCo v3", r"state_dict\.base_encoder\.", heads=(384, 12)),
    Layout("SimSiam", r"state_dict\.encoder\.", "predictor\\."),
    Layout("SwAV", r"(state_dict\.)?", "prototypes\\."),
    Layout("NPID", r"(state_dict|net)\.", "lemniscate$"),
    Layout("DirectCLR", r"model\.backbone\.", "online_head\\."),
    Layout("Barlow Twins", r"model\.backbone\.", r"bn\.running_mean"),
    Layout("VICReg", r"model\.backbone\.", r"projector\.0\.bias"),
    Layout("SCAN", r"(model\.)?backbone\.", r"(cluster|contrastive)_head\."),
    Layout("PixPro", r"model\.encoder\.", "projector_k\\."),
    Layout("one of SupCon, SimCLR", r"model\.encoder\.", "opt$"),
    Layout("one of Feature Transformation, PyContrast", r"model\.encoder\.", "contrast$"),
    Layout("iBOT", r"teacher\.backbone\.", "ibot_loss$"),
    Layout("DINOv2", r"teacher\.backbone\.", "dino_head\\."),
    Layout("EsViT", r"teacher\.(backbone\.)?", "head_dense\\.", eps=1e-6),
    Layout("DINO", r"teacher\.backbone\."),
    Layout("I-JEPA", r"target_encoder\.", "predictor", heads=(1408, 16)),
    Layout("EsViT", r"teacher\.", "head\\.", eps=1e-6),
    Layout("CAE", r"model\.encoder\.", r"(alignment_encoder|teacher)\.", heads=(384, 12)),
    Layout("SimMIM", r"model\.encoder\.", r"decoder\.0\."),
    Layout("MaskFeat", r"model_state\.", "pred_head\\."),
    Layout("MAE", r"(model\.)?", "decoder_embed\\."),
    Layout("OBoW", r"network\.(feature_extractor\.)?(_feature_blocks\.)?"),
    Layout("VISSL", r"classy_state_dict\.base_model\.model\.trunk\.(_feature_blocks\.)?"),
    Layout("MMSelfSup, MoCo v3", r"state_dict\.backbone\.", "base_encoder\\.", heads=(384, 12)),
    Layout("MMSelfSup", r"state_dict\.backbone\.", "meta$"),
    Layout("lightly", r"state_dict\.backbone\.(vit\.)?", r"(projection|prediction)_head|decoder\.|student_"),
    Layout("one of DINO, DINOv2, iBOT", r"state_dict\.teacher_backbone\.(vit\.)?", "student_"),
)
UNKNOWN = Layout("unknown", ".*")
# Words of a place that mark a copy: places with none of them come first, then a teacher's.
COPIES = {"student", "momentum", "ema", "target", "key", "k", "shadow", "old", "average", "averaged"}


class Naming(NamedTuple):
    name: str
    family: str
    mark: str  # a tensor name that only this naming has
    renames: dict  # pattern -> replacement, applied in this order
    stem_relu: bool = True


RESNET = {r"\.shortcut\.": ".downsample."}
# nn.Sequential(*resnet.children()): torchvision's has ReLU and max-pooling at 2 and 3; in lightly's ResNet for small
# images they are functions, so that such a sequence has lost the ReLU of the stem.
CHILDREN = {r"^0\.": "conv1.", r"^1\.": "bn1."}
CHILDREN_TORCHVISION = CHILDREN | {rf"^{i + 3}\.": f"layer{i}." for i in range(1, 5)}
CHILDREN_LIGHTLY = CHILDREN | {rf"^{i + 1}\.": f"layer{i}." for i in range(1, 5)} | RESNET
CHILDREN_OBOW = {r"^0\.Conv\.": "conv1.", r"^0\.bn\.": "bn1.", r"^([1-4])\.": r"layer\1."}
RESNET_TRANSFORMERS = {
    r"^embedder\.embedder\.convolution\.": "conv1.",
    r"^embedder\.embedder\.normalization\.": "bn1.",
    **{rf"^encoder\.stages\.{i}\.layers\.": f"layer{i + 1}." for i in range(4)},
    **{rf"\.layer\.{i}\.convolution\.": f".conv{i + 1}." for i in range(3)},
    **{rf"\.layer\.{i}\.normalization\.": f".bn{i + 1}." for i in range(3)},
    r"\.shortcut\.convolution\.": ".downsample.0.",
    r"\.shortcut\.normalization\.": ".downsample.1.",
}
VIT_TIMM = {r"^pred_head\.transforms\.0\.0\.": "norm."}  # where the last norm is part of a head, as in MaskFeat
VIT_CHUNKS = {r"^blocks\.\d+\.(\d+)\.": r"blocks.\1."}
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
VIT_TRANSFORMERS = {  # the names in its files, and those in its networks since version 5
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.": "",
    r"^layernorm\.": "norm.",
    r"^(encoder\.)?layers?\.": "blocks.",
    r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.": r".attn.\2.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
}
NAMINGS = (
    Naming("torchvision", "resnet", "layer1.0.conv1.weight", RESNET),
    Naming("torchvision in sequence", "resnet", "7.0.conv1.weight", CHILDREN_TORCHVISION),
    Naming("OBoW", "resnet", "1.0.conv1.weight", CHILDREN_OBOW),
    Naming("lightly in sequence", "resnet", "2.0.conv1.weight", CHILDREN_LIGHTLY, stem_relu=False),
    Naming("transformers", "resnet", "encoder.stages.0.layers.0.layer.0.convolution.weight", RESNET_TRANSFORMERS),
    Naming("official", "swin", "layers.0.downsample.norm.weight", {}),  # timm has it in the stage that follows
    Naming("timm", "swin", "layers.0.blocks.0.attn.relative_position_bias_table", namings.SWIN_TIMM),
    Naming("torchvision", "swin", "features.1.0.attn.relative_position_bias_table", namings.SWIN_TORCHVISION),
    Naming("mmcls", "swin", "stages.0.blocks.0.attn.w_msa.relative_position_bias_table", namings.SWIN_MMCLS),
    Naming("transformers", "swin", "encoder.layers.0.blocks.0.layernorm_before.weight", namings.SWIN_TRANSFORMERS),
    Naming("official", "xcit", "pos_embeder.token_projection.weight", {}),
    Naming("timm", "xcit", "pos_embed.token_projection.weight", namings.XCIT_TIMM),
    Naming("timm", "vit", "blocks.0.attn.qkv.weight", VIT_TIMM),
    Naming("DINOv2", "vit", "blocks.0.0.attn.qkv.weight", VIT_CHUNKS),
    Naming("mmcls", "vit", "layers.0.attn.qkv.weight", VIT_MMCLS),
    Naming("torchvision", "vit", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", VIT_TORCHVISION),
    Naming("transformers", "vit", "embeddings.patch_embeddings.projection.weight", VIT_TRANSFORMERS),
)

# Tensors beside the backbone that no evaluation needs. Others that are left over change what the network computes.
HEADS = (
    r"fc\d?|linear|(\w+_)?heads?(_\w+)?|classifier|projector|predictor|prototypes|pre_logits|pooler|decoder|sobel_layer"
)
HEADS = rf"({HEADS}|hogs)\.|mask(ed)?_(token|embed)$|decoder_|n_averaged$|.*\.(relative_position_index|attn_mask)$"
# What transformers can also build with the same names: the settings of config.json that give the networks built here.
CONFIG = {
    "vit": {"hidden_act": "gelu"},
    "swin": {"hidden_act": "gelu"},
    "resnet": {"hidden_act": "relu", "downsample_in_bottleneck": False},
}


# Grey and its two derivatives (Sobel) of a colour image, as one convolution: what a first layer of 2 channels sees.
EDGES = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
EDGES = torch.stack([EDGES, EDGES.T])[:, None].repeat(1, 3, 1, 1) / 3
FIXED = {"sincos-xy": "MAE", "sincos-yx": "MoCo v3"}  # whose positions these are, if nothing else is known


class Found(NamedTuple):
    """A backbone in a file: its tensors under the names used here, heads dropped."""

    name: str
    family: str
    weights: dict
    place: str  # path and prefix of its tensors in the file, which ends with a dot unless it is ""
    naming: Naming
    layout: Layout
    total: int  # numbers in the network that it is part of: with heads, momentum copies, queues
    meta: dict  # what our own files say, and a config.json; {} for others


def containers(state):
    """The dictionaries in a file that hold tensors: {path: {name: tensor}}, without the names of wrappers."""
    found, rest, seen = {}, [("", state)], set()
    while rest:
        path, part = rest.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        for key, value in part.items():
            name = re.sub(WRAPPERS, "", f"{key}.")
            if isinstance(value, (list, tuple)):
                value = {i: item for i, item in enumerate(value) if isinstance(item, (dict, list, tuple))}
            if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
                value = torch.from_numpy(value)
            if isinstance(value, dict):
                rest.append((path + name, value))
            elif isinstance(value, torch.Tensor):
                found.setdefault(path, {})[name.removesuffix(".")] = value
    return found


def _total(tensors):
    return sum(v.numel() for v in tensors.values() if v.is_floating_point())


def _own(state):
    """Our backbone.pt or last.pt: a Found, or None for any other file."""
    meta = state.get("meta")
    place = "backbone." if "backbone" in state else "model." if "backbone_prefix" in state else None
    if place is None or not isinstance(meta, dict):
        return None
    prefix, tensors = str(state.get("backbone_prefix", "")), containers(state).get(place, {})
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    arch = str(meta.get("arch"))
    known = {"vit": vit.ARCHS, "swin": swin.ARCHS, "xcit": xcit.ARCHS, "conv4": conv4.ARCHS}
    family = next((family for family in known if arch in known[family]), "library" if ":" in arch else "resnet")
    return Found("unknown", family, weights, place + prefix, NAMINGS[0], UNKNOWN, _total(tensors), meta)


def _told(state):
    """What the config.json of other projects says: number of heads, mean and standard deviation of the images."""
    config = state.get("config.json", {})
    more = config.get("pretrained_cfg")
    told = {k: v for k, v in (more if isinstance(more, dict) else {}).items() if k in ("mean", "std")}
    told |= {k: config[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in config}
    told = {k: v for k, v in told.items() if isinstance(v, list) and all(isinstance(x, (int, float)) for x in v)}
    heads = config.get("num_attention_heads")
    return told | ({"heads": heads} if isinstance(heads, int) and heads > 0 else {})


def candidates(state, key=None):
    """All backbones in the dictionary of a file, as Found, the most probable first: the one of our own files, or those
    of any file; with a key those whose path in the file has this part."""
    own, found = _own(state), []
    if own and not key:
        return [own]
    for container, tensors in containers(state).items():
        places = {}
        for naming, name in ((naming, name) for naming in NAMINGS for name in tensors):
            if f".{name}".endswith(f".{naming.mark}"):
                places.setdefault(name.removesuffix(naming.mark), naming)
        for prefix, naming in places.items():
            place = container + prefix
            if key and f".{key}." not in f".{place}":
                continue
            number, layout = next(
                pair for pair in enumerate((*LAYOUTS, UNKNOWN)) if _fits(pair[1], place, state, tensors)
            )
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            weights, name = _renamed(part, naming.renames), layout.name
            weights = namings.merged(weights) if (naming.name, naming.family) == ("mmcls", "swin") else weights
            if naming.family == "vit" and not weights.keys() & {"cls_token", "pos_embed", "patch_embed.proj.weight"}:
                continue  # a stage of another network
            if not own and _reads_edges(weights):
                weights, name = weights | {"input_filter": EDGES}, "DeepCluster"
            meta, words = own.meta if own else _told(state), set(re.split("[._]", place.lower()))
            entry = Found(name, naming.family, weights, place, naming, layout, _total(tensors), meta)
            found.append(((number, 2 * bool(words & COPIES) or int("teacher" in words), len(place)), entry))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _fits(layout, place, state, tensors):
    """Is this the layout of a place? What else must be there may be a key of the file."""
    if not re.fullmatch(layout.place, place):
        return False
    return not layout.also or any(re.match(layout.also, str(k)) for part in (state, tensors) for k in part)


def _renamed(weights, renames):
    weights = namings.renamed(weights, renames | {r"\.gamma_([12])$": r".ls\1.gamma"})
    weights = {k: v for k, v in weights.items() if not re.match(HEADS, k)}
    for name in [name for name in weights if name.endswith(".attn.q_bias")]:  # a bias of all keys changes no attention
        start = name.removesuffix("q_bias")
        if (values := weights.pop(f"{start}v_bias", None)) is not None:
            parts = weights.pop(name), torch.zeros_like(values), values
            weights[f"{start}qkv.bias"] = torch.cat(parts)
    for name in [name for name in weights if ".attn.q." in name]:  # queries, keys and values are one layer here
        parts = [weights.get(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        if all(part is not None and part.shape == parts[0].shape and part.ndim for part in parts):
            weights = {k: v for k, v in weights.items() if not any(v is part for part in parts)}
            weights[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return weights


def _reads_edges(weights):
    """Does this network of others read two channels, but not have the filter that makes them of a colour image?"""
    stem = weights.get("conv1.weight")
    return stem is not None and stem.ndim == 4 and stem.shape[1] == 2 and "input_filter" not in weights


# ------------------------------------------------------------------------------------------------------ shapes
def resnet_shape(weights):
    """What the shapes tell of a ResNet: arch (the nearest one), width, small (a 3x3 stem), channels of the images."""
    blocks = [len({k.split(".")[1] for k in weights if k.startswith(f"layer{i}.")}) for i in range(1, 5)]
    kind = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    kind = resnet.SelectiveBottleneck if "layer1.0.conv2.mix.0.weight" in weights else kind

    def distance(arch):
        block, counts = resnet.ARCHS[arch]
        return block is not kind, sum(abs(a - b) for a, b in zip(blocks, counts, strict=True))

    deep = "conv1.6.weight" in weights  # three convolutions
    first = shaped(weights, "conv1.0.weight" if deep else "conv1.weight", 64, 3, 7, 7)
    stem = shaped(weights, "conv1.6.weight", 64, 32, 3, 3) if deep else first
    inputs = shaped(weights, "input_filter", 2, 3, 3, 3) if "input_filter" in weights else first
    small = first.shape[-1] == 3 and not deep
    told = {"arch": min(resnet.ARCHS, key=distance), "width": len(stem) / 64, "small": small}
    return told | {"channels": inputs.shape[1], "filtered": "input_filter" in weights}


def vit_shape(weights, heads=(), arch=None):
    """What the shapes tell of a ViT: the arguments of common.vit.vit.

    They do not tell the number of heads. heads: (dim, heads) where the layout knows it, else the usual one of the
    dimension is taken, or that of arch if no architecture has this dimension; None if nothing helps.
    """
    dim = shaped(weights, "cls_token", 1, 1, 768).shape[2]
    proj = shaped(weights, "patch_embed.proj.weight", dim, 3, 16, 16)
    table = shaped(weights, "pos_embed", 1, 197, len(proj))
    first = 0 if "cls_token" not in weights and math.isqrt(table.shape[1]) ** 2 == table.shape[1] else 1
    dim, patch = len(proj), proj.shape[-1]
    name = next((name for name, row in vit.ARCHS.items() if row[0] == dim), arch if arch in vit.ARCHS else "vit_tiny")
    usual = {1152: 16, 1408: 16}.get(dim, None if dim % 64 else dim // 64)  # timm's so400m and ViT-g
    if name == arch or vit.ARCHS[name][0] == dim:
        usual = vit.ARCHS[name][2]
    side = round((table.shape[1] - first) ** 0.5)
    positions = _positions(table[:, first:], dim, side)
    tables = {"block": f"blocks.0.attn.{vit.TABLE}", "shared": f"rel_pos_bias.{vit.TABLE}"}
    relative = next((kind for kind, name in tables.items() if name in weights), "none")
    bias = shaped(weights, tables.get(relative), 0, 0)
    if relative != "none" and "pos_embed" not in weights:
        side, positions = vit.table_side(bias), "none"
    scaled = "blocks.0.ls1.gamma" in weights
    if dim == 384 and positions == "sincos-yx" and not scaled:  # of published ViT-S only MoCo v3's are so
        heads = (384, 12)
    usual = heads[1] if heads and heads[0] == dim else bias.shape[1] or usual
    hidden = len(shaped(weights, "blocks.0.mlp.fc1.weight", 4 * dim, dim))
    usual = usual if usual and dim % usual == 0 and dim % 4 == 0 else None
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    told = {"arch": name, "width": dim / vit.ARCHS[name][0], "image_size": max(1, side) * patch, "patch_size": patch}
    told |= {"channels": proj.shape[1], "depth": depth, "heads": usual, "positions": positions}
    told |= {"relative": relative, "class_token": first == 1, "pool": "cls" if first else "norm-mean"}
    told |= {"pool": "mean"} if "fc_norm.weight" in weights and "norm.weight" not in weights else {}
    # the ratio is rounded down after multiplying with dim; the values of the scale are in the file, this asks for them
    return told | {"mlp_ratio": (hidden + 0.5) / dim, "layer_scale": float(scaled)}


def _positions(table, dim, side):
    """Which of the two fixed position tables of patches this is; "learned" if neither."""
    for order in ("xy", "yx") if table.shape[1:] == (side * side, dim) and dim % 4 == 0 else ():
        if torch.allclose(table[0].double(), vit.sincos(dim, (side, side), order), atol=1e-3):
            return f"sincos-{order}"
    return "learned"


def _family(weights):
    marks = {
        "pos_embed": "vit",
        "layers.0.blocks.0.norm1.weight": "swin",
        "pos_embeder.token_projection.weight": "xcit",
        "blocks.0.norm1.weight": "vit",
    }
    return next((family for mark, family in marks.items() if mark in weights), "resnet")


def shape_of(family, weights, layout=UNKNOWN, arch=None):
    """What the shapes tell of a network: the arguments that build it. arch: what it is said to be."""
    if family == "vit":
        return vit_shape(weights, layout.heads, arch)
    if family == "swin":
        return namings.swin_shape(weights, layout.eps)
    return namings.xcit_shape(weights) if family == "xcit" else resnet_shape(weights)


# Why a model cannot take the weights of a file, and the flags that make it like the network there. {0}: of the file.
REASONS = {
    "small": "images {2} 64 px get a {3} stem, the file has {4}: --image-size {5}",
    "arch": "the file has {0}, this model is {1}: --arch {0}",
    "width": "the file has width {0:g}, this model {1:g}: --width {0:g}",
    "channels": "the file is for images of {0} channels, this model for {1}: --channels {0}",
    "patch_size": "the file has patches of {0} pixels, this model of {1}: --patch-size {0}",
    "depth": "the file has {0} blocks, this model {1}: --depth {0}",
    "depths": "the file has {0} blocks in its stages, this model {1}",
    "window": "the file has windows of {0} in its stages, this model of {1}: --window",
    "pool": "the file pools by {0}, this model by {1}",
    "class_token": "only one of the two has a class token",
    "relative": "the file has relative positions: {0}, this model: {1}",
    "layer_scale": "only one of the two scales its layers",
    "filtered": "only one of the two sees the images through a fixed filter (input_filter)",
}


def explain(found, backbone):
    """The reasons why the weights that were found are not those of a backbone, in words."""
    there, here = (shape_of(_family(weights), weights) for weights in (found.weights, backbone.state_dict()))
    there = {"arch": found.meta["arch"]} if found.family == "library" else there
    here = {"arch": backbone.arch} if hasattr(backbone, "arch") else here
    differ = [k for k in REASONS if k in there and k in here and there[k] != here[k]]
    stems = ("above", "7x7", "3x3", resnet.SMALL) if there.get("small") else ("of at most", "3x3", "7x7", 96)
    return "; ".join(REASONS[k].format(there[k], here[k], *stems) for k in differ)
