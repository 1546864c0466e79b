"""Writes the backbone of a checkpoint in the format of another library, without heads, optimiser and momentum copies.

    python export.py --pretrained runs/simsiam/backbone.pt --to torchvision --out simsiam_resnet50.pth
    python export.py --pretrained runs/mocov3/last.pt --to timm --out mocov3_vit_small.pth --publish
    python export.py --pretrained moco_v2_800ep_pretrain.pth.tar --to detectron2 --out moco_v2.pkl

--pretrained takes whatever the evaluation scripts take. --to chooses names and container:

torchvision  state dict; a ResNet misses only fc, a ViT only heads
timm         state dict; a ResNet has torchvision's names there, a ViT the names used here
detectron2   ResNets: a pickle of NumPy arrays, as its own converter writes it; to be used with RGB images and
             RESNETS.STRIDE_IN_1X1 False. Batch counters, which it does not know, are left out
mmdet        ResNets: torchvision's names under state_dict, for init_cfg=dict(type="Pretrained", checkpoint=FILE)

The ending of --out decides how a state dict is written: .safetensors, or .pth, .pt, .bin and .tar by torch.save.
--publish adds the first eight digits of the file's SHA-256 to its name, as torch.hub's check_hash expects it.
"""

import hashlib
import io
import pickle
import re
import sys
from pathlib import Path

import torch
from torch import nn

from common.args import Parser, fail, toggle, width
from common.checkpoint import build_backbone, find_backbone, load_file
from common.files import atomic
from common.formats import write_safetensors

# Names of a ViT here -> in torchvision; applied in this order.
TORCHVISION_VIT = {
    r"^cls_token$": "class_token",
    r"^pos_embed$": "encoder.pos_embedding",
    r"^patch_embed\.proj\.": "conv_proj.",
    r"^norm\.": "encoder.ln.",
    r"^blocks\.": "encoder.layers.encoder_layer_",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".self_attention.in_proj_",
    r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
}
# Names of a ResNet here -> in detectron2, where a batch norm belongs to its convolution and the first one is the stem.
DETECTRON2 = {
    r"^(?!layer)": "stem.",
    r"^layer1\.": "res2.",
    r"^layer2\.": "res3.",
    r"^layer3\.": "res4.",
    r"^layer4\.": "res5.",
    r"\bbn([123])\.": r"conv\1.norm.",
    r"\.downsample\.0\.": ".shortcut.",
    r"\.downsample\.1\.": ".shortcut.norm.",
}

ENDINGS = {"detectron2": [".pkl"], "mmdet": [".pth", ".pt", ".bin", ".tar"]}
ENDINGS |= {target: [*ENDINGS["mmdet"], ".safetensors"] for target in ("torchvision", "timm")}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--pretrained", required=True, help="backbone.pt, last.pt, or a published file")
    parser.add_argument("--to", required=True, choices=["torchvision", "timm", "detectron2", "mmdet"])
    parser.add_argument("--out", required=True, help="file to write; its ending decides the format")
    parser.add_argument("--pretrained-key", metavar="NAME", help="take the backbone under this name in the file")
    parser.add_argument("--publish", action=toggle, default=False, help="add the file's hash to its name")
    text = "allow --pretrained to run code while it is read"
    parser.add_argument("--trust-pickle", action=toggle, default=False, help=text)
    parser.add_argument("--arch", help="refuse any other architecture")
    parser.add_argument("--width", type=width, help="refuse any other width")
    return parser.parse_args(argv)


def rename(weights, table):
    """The weights with every pattern of the table replaced in every name."""
    result = {}
    for name, value in weights.items():
        for pattern, replacement in table.items():
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def convert(backbone, meta, target):
    """The object that the other library reads, and the tensors in it by name."""
    weights, is_vit = dict(backbone.state_dict()), hasattr(backbone, "tokens")
    if target in ("detectron2", "mmdet") and is_vit:
        fail(f"--to {target}: there is no {meta['arch']} with these names; a ViT goes to torchvision or timm")
    if weights.pop("input_filter", None) is not None:
        fail(f"--to {target}: this network reads filtered images, which no other library does by itself")
    if target == "torchvision" and is_vit:
        if any(re.search(r"\.ls\d\.|fc_norm", name) for name in weights):
            fail("--to torchvision: its ViT has neither layer scale nor mean pooling; use --to timm")
        weights = rename(weights, TORCHVISION_VIT)
    if target == "detectron2":
        weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        weights = {k: v.float().numpy() for k, v in rename(weights, DETECTRON2).items()}
        return {"model": weights, "__author__": meta["method"], "matching_heuristics": True}, weights
    if target == "mmdet":
        return {"meta": {k: meta[k] for k in ("method", "arch", "width")}, "state_dict": weights}, weights
    return weights, weights


def remarks(backbone, meta):
    """What the receiving network needs besides names and shapes."""
    mean, std = (" ".join(f"{x:.4g}" for x in meta[k]) for k in ("mean", "std"))
    yield f"images in [0, 1] of {meta['channels']} channels, normalised with mean {mean} and standard deviation {std}"
    if hasattr(backbone, "tokens"):
        yield f"{meta['heads']} attention heads, patches of {meta['patch_size']}, images of {meta['image_size']} pixels"
        return
    if backbone.conv1.kernel_size == (3, 3):
        yield f"3x3 stem: conv1 has stride 1 and padding {backbone.conv1.padding[0]}, there is no max-pooling"
    if isinstance(backbone.relu, nn.Identity):
        yield "no ReLU after the first batch norm"
    if meta["width"] != 1:
        yield f"width {meta['width']:g}: every layer has {meta['width']:g} times the usual number of channels"


def write(content, path, publish):
    """Writes a pickle (.pkl), safetensors or torch file. Returns its path and hash."""
    buffer, formats = io.BytesIO(), {".pkl": pickle.dump, ".safetensors": write_safetensors}
    formats.get(path.suffix, torch.save)(content, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    if publish:  # no other dot or dash before the hash: torch.hub takes the first "-<hexadecimal>."
        path = path.with_name(f"{path.stem.replace('.', '_')}-{digest[:8]}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    return path, digest


def main(args):
    out = Path(args.out)
    if out.suffix not in ENDINGS[args.to]:
        fail(f"--out {out}: for {args.to} the name must end in {' or '.join(ENDINGS[args.to])}")
    if out.exists() and Path(args.pretrained).exists() and out.samefile(args.pretrained):
        fail(f"--out {out} is the file of --pretrained: choose another name")
    state = load_file(args.pretrained, "--pretrained", args.trust_pickle)
    found = find_backbone(state, f"--pretrained {args.pretrained}", args.arch, args.pretrained_key)
    backbone, meta = build_backbone(found, args.pretrained, args.arch, args.width)
    content, weights = convert(backbone, meta, args.to)
    try:
        path, digest = write(content, out, args.publish)
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")

    sizes = [p.numel() for p in backbone.parameters()]
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    print(f"parameters  backbone {sum(sizes) / 1e6:.2f} M, of them trainable {trainable / 1e6:.2f} M")
    print(f"            {found.total / 1e6:.2f} M numbers in all of the network in {args.pretrained}")
    for remark in remarks(backbone, meta):
        print(f"note        {remark}")
    print(f"exported    {path}: {len(weights)} tensors, {args.to}, sha256 {digest}")
    return path


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
