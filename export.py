"""Writes the backbone of a checkpoint for use elsewhere, without heads, optimiser and momentum copies: the network as a
program that runs without these scripts, or its weights under the names of another library.

    python export.py --pretrained runs/simsiam/backbone.pt --out simsiam.pt2
    python export.py --pretrained runs/simsiam/backbone.pt --to torchvision --out simsiam_resnet50.pth
    python export.py --pretrained runs/mocov3/last.pt --to timm --out mocov3_vit_small.pth --publish
    python export.py --pretrained moco_v2_800ep_pretrain.pth.tar --to detectron2 --out moco_v2.pkl

--pretrained takes the files that the evaluation scripts take. --to chooses what is written; without it the ending of
--out does, and weights get the names of torchvision (ResNets), timm (the others) or their own library:

pt2          any network, of any width, stem and channels: a program of torch.export, normalisation included, for images
             in [0, 1] of one size and batches of any size
onnx         the same for ONNX runtimes (pip install onnx onnxscript)
torchvision  state dict; a ResNet misses only fc, a ViT only heads, a Swin (of one window size) only head
timm         state dict; a ResNet has torchvision's names there, a ViT the names used here, Swins and XCiTs its own
detectron2   ResNets: a pickle of NumPy arrays, as its own converter writes it; to be used with RGB images and
             RESNETS.STRIDE_IN_1X1 False. Batch counters, which it does not know, are left out
mmdet        ResNets: torchvision's names under state_dict, for init_cfg=dict(type="Pretrained", checkpoint=FILE)

The ending of --out decides how a state dict is written: .safetensors, or .pth, .pt, .bin and .tar by torch.save.
The last lines printed are the Python that loads the file and computes features. TorchScript is deprecated in PyTorch.
--publish adds the first eight digits of the file's SHA-256 to its name, as torch.hub's check_hash expects it.
"""

import common.interrupt  # noqa: F401 (before torch)
import hashlib
import importlib.util
import io
import logging
import pickle
import re
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from common.args import Parser, fail, toggle, width
from common.checkpoint import build_backbone, find_backbone, load_file
from common.files import atomic
from common.formats import write_safetensors
from common.namings import exported
from common.networks import Library
from common.resnet import ResNet
from common.swin import Swin
from common.vit import ViT
from common.xcit import XCiT

NAMES = {ResNet: "torchvision", ViT: "timm", Swin: "timm", XCiT: "timm"}  # whose names weights get unless told
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

ENDINGS = {"pt2": [".pt2"], "onnx": [".onnx"], "detectron2": [".pkl"], "mmdet": [".pth", ".pt", ".bin", ".tar"]}
ENDINGS |= {target: [*ENDINGS["mmdet"], ".safetensors"] for target in ("torchvision", "timm")}
ONLY = {ENDINGS[target][0]: target for target in ("pt2", "onnx", "detectron2")}  # endings that say what is written


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--pretrained", required=True, help="backbone.pt, last.pt, or a published file")
    parser.add_argument("--to", choices=["pt2", "onnx", "torchvision", "timm", "detectron2", "mmdet"])
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


def home(backbone):
    """The library whose names weights get unless told otherwise, or "pt2" where no other names exist."""
    return NAMES.get(type(backbone), getattr(backbone, "library", "pt2"))


def convert(backbone, meta, target):
    """The object that the other library reads, and the tensors in it by name."""
    weights, is_vit = dict(backbone.state_dict()), isinstance(backbone, ViT)
    names = {Swin: ("torchvision", "timm"), XCiT: ("timm",)}.get(type(backbone), ())
    if type(backbone) not in (ResNet, ViT) and target not in (home(backbone), *names):
        fail(f"--to {target}: there is no {meta['arch']} with these names; --to pt2 writes any network")
    if names:
        if target == "torchvision" and len(set(backbone.config["window"])) > 1:
            fail("--to torchvision: its Swin has windows of one size in all stages; use --to timm")
        weights = exported(weights, target)
        return weights, weights
    if target in ("detectron2", "mmdet") and is_vit:
        fail(f"--to {target}: there is no {meta['arch']} with these names; a ViT goes to torchvision or timm")
    if is_vit and (backbone.relative != "none" or backbone.pos_embed is None):
        fail(f"--to {target}: its ViT has fixed or learned positions, not relative ones; try --to pt2")
    if weights.pop("input_filter", None) is not None:
        fail(f"--to {target}: this network reads filtered images, which no other library does by itself; try --to pt2")
    if target == "torchvision" and is_vit:
        if backbone.pool == "mean" or any(re.search(r"\.ls\d\.|fc_norm", name) for name in weights):
            fail("--to torchvision: its ViT has neither layer scale nor mean pooling; use --to timm")
        weights = rename(weights, TORCHVISION_VIT)
    if target == "detectron2":
        weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        weights = {k: v.float().numpy() for k, v in rename(weights, DETECTRON2).items()}
        return {"model": weights, "__author__": meta["method"], "matching_heuristics": True}, weights
    if target == "mmdet":
        return {"meta": {k: meta[k] for k in ("method", "arch", "width")}, "state_dict": weights}, weights
    return weights, weights


class Program(nn.Module):
    """Images (B, channels, H, W) in [0, 1] -> features (B, dim): normalisation and backbone."""

    def __init__(self, backbone, mean, std):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images):
        return self.backbone((images - self.mean) / self.std)


def compile_program(backbone, meta, target):
    """The network as torch.export's program or as an ONNX model: batches of any size, images of one."""
    program = Program(backbone, meta["mean"], meta["std"]).eval()
    example = torch.zeros(2, meta["channels"], *sides(backbone, meta))
    shapes = {"images": {0: torch.export.Dim("batch")}}
    if target == "pt2":
        with torch.no_grad():
            return torch.export.export(program, (example,), dynamic_shapes=shapes)
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        fail(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}, or write a .pt2")
    names = {"input_names": ["images"], "output_names": ["features"], "dynamic_shapes": shapes}
    with warnings.catch_warnings():  # of the exporter, about itself
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        model = torch.onnx.export(program, (example,), dynamo=True, verbose=False, **names).model_proto
    if model.ByteSize() >= 2**31:
        fail(f"--to onnx: a network of {model.ByteSize() / 1e9:.1f} GB does not fit in one such file: write a .pt2")
    return model


def sides(backbone, meta):
    """Height and width of the images."""
    if isinstance(backbone, ViT):
        return tuple(side * backbone.patch_size for side in backbone.grid)
    return (meta["image_size"],) * 2


# ------------------------------------------------------------------------------------------------------- usage
def network_lines(backbone, meta, target, weights):
    """Lines of Python that build the library's network without a classifier, or none if it has no such network."""
    channels = meta["channels"]
    if isinstance(backbone, Library):
        options = ", ".join(f"{k}={v!r}" for k, v in backbone.options.items())
        if target == "timm":
            return [f"network = timm.create_model({backbone.name!r}, {options})"]
        build = f"network = torchvision.models.get_model({backbone.name!r}, {options})"
        return [build, f"network.set_submodule({backbone.head!r}, torch.nn.Identity())"]
    if isinstance(backbone, (Swin, XCiT)):
        return transformer_lines(backbone, meta, target)
    if isinstance(backbone, ViT):
        size, patch, dim, depth = sides(backbone, meta), backbone.patch_size, backbone.dim, len(backbone.blocks)
        hidden = backbone.blocks[0].mlp.fc1.out_features
        size = size[0] if size[0] == size[1] else size
        if target == "torchvision":
            if isinstance(size, tuple):
                return []
            shape = f"{size}, {patch}, {depth}, {backbone.heads}, {dim}, {hidden}"
            lines = [f"network = torchvision.models.VisionTransformer({shape})"]
            lines += ["network.heads = torch.nn.Identity()"]
            if channels != 3:
                lines += [f"network.conv_proj = torch.nn.Conv2d({channels}, {dim}, {patch}, stride={patch})"]
            return lines
        shape = {"img_size": size, "patch_size": patch, "in_chans": channels, "num_classes": 0}
        shape |= {"global_pool": {"cls": "token", "mean": "avg"}[backbone.pool], "embed_dim": dim, "depth": depth}
        ratio = hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim
        shape |= {"num_heads": backbone.heads, "mlp_ratio": ratio}
        shape |= {"init_values": 1e-5} if "blocks.0.ls1.gamma" in weights else {}
        shape |= {} if backbone.prefix else {"class_token": False}
        shape |= {"fc_norm": False} if backbone.pool == "mean" and "norm.weight" in weights else {}
        return [f"network = timm.models.VisionTransformer({', '.join(f'{k}={v!r}' for k, v in shape.items())})"]
    if meta["width"] != 1:
        return []
    conv, relu = backbone.conv1, "act1" if target == "timm" else "relu"
    stem = conv.kernel_size == (3, 3)
    if target == "timm":
        lines = [f"network = timm.create_model({meta['arch']!r}, num_classes=0, in_chans={channels})"]
    else:
        lines = [f"network = torchvision.models.{meta['arch']}()", "network.fc = torch.nn.Identity()"]
    if stem or (channels != 3 and target == "torchvision"):
        rest = f"{conv.kernel_size[0]}, {conv.stride[0]}, {conv.padding[0]}, bias=False"
        lines += [f"network.conv1 = torch.nn.Conv2d({channels}, {conv.out_channels}, {rest})"]
    if stem:
        lines += ["network.maxpool = torch.nn.Identity()"]
    if isinstance(backbone.relu, nn.Identity):
        lines += [f"network.{relu} = torch.nn.Identity()"]
    return lines


def transformer_lines(backbone, meta, target):
    """The same for Swins and XCiTs."""
    config, size, channels = backbone.config, meta["image_size"], meta["channels"]
    shape = {"img_size": size, "patch_size": config["patch_size"], "in_chans": channels, "num_classes": 0}
    if isinstance(backbone, XCiT):
        if config["patch_size"] not in (8, 16) or channels != 3:
            return []
        shape |= {"embed_dim": backbone.dim, "depth": config["depth"], "num_heads": config["heads"]}
        return [f"network = timm.models.Xcit({_words(shape | {'tokens_norm': config['norm_all']})})"]
    dim, windows = backbone.dim // 2 ** (len(config["depths"]) - 1), [(w, w) for w in config["window"]]
    known = {"embed_dim": dim, "depths": config["depths"], "num_heads": config["heads"]}
    norm = f"norm_layer=partial(torch.nn.LayerNorm, eps={config['eps']:g})"
    lines = ["from functools import partial"]
    if target == "timm":
        known |= {"window_size": windows}
        return [*lines, f"network = timm.models.SwinTransformer({_words(shape | known)}, {norm})"]
    patch = config["patch_size"]
    known |= {"patch_size": [patch] * 2, "window_size": list(windows[0])}
    lines += [f"network = torchvision.models.SwinTransformer({_words(known)}, {norm})"]
    if channels != 3:
        lines += [f"network.features[0][0] = torch.nn.Conv2d({channels}, {dim}, {patch}, {patch})"]
    return [*lines, "network.head = torch.nn.Identity()"]


def _words(settings):
    return ", ".join(f"{k}={v!r}" for k, v in settings.items())


def usage(path, backbone, meta, target, weights):
    """Lines of Python that load the file, up to features of `images`; none where the library has no such network."""
    name, (height, width) = repr(str(path)), sides(backbone, meta)
    images = f"images (B, {meta['channels']}, {height}, {width}) in [0, 1] -> (B, {backbone.dim})"
    mean, std = ([float(x) for x in meta[k]] for k in ("mean", "std"))
    if target == "pt2":
        return [
            "import torch",
            f"network = torch.export.load({name}).module()",
            f"features = network(images)  # {images}",
        ]
    if target == "onnx":
        run = 'features = network.run(None, {"images": images.numpy()})[0]'
        return ["import onnxruntime", f"network = onnxruntime.InferenceSession({name})", f"{run}  # {images}"]
    if target in ("mmdet", "detectron2"):
        if backbone.conv1.kernel_size == (3, 3) or isinstance(backbone.relu, nn.Identity) or meta["channels"] != 3:
            return []
        depth, pixels = meta["arch"].removeprefix("resnet"), [[round(255 * x, 3) for x in y] for y in (mean, std)]
        if target == "mmdet":  # of a configuration
            init = f'init_cfg=dict(type="Pretrained", checkpoint={name})'
            base = round(64 * meta["width"])
            lines = [f'backbone = dict(type="ResNet", depth={depth}, base_channels={base}, style="pytorch", {init})']
            lines += [f"data_preprocessor = dict(mean={pixels[0]}, std={pixels[1]}, bgr_to_rgb=True)"]
            return lines
        if meta["width"] != 1:
            return []
        values = {"WEIGHTS": str(path), "PIXEL_MEAN": pixels[0], "PIXEL_STD": pixels[1], "RESNETS.DEPTH": int(depth)}
        values |= {"RESNETS.STRIDE_IN_1X1": False} | ({"RESNETS.RES2_OUT_CHANNELS": 64} if int(depth) < 50 else {})
        lines = ["from detectron2.config import get_cfg", "cfg = get_cfg()", 'cfg.INPUT.FORMAT = "RGB"']
        return lines + [f"cfg.MODEL.{k} = {v!r}" for k, v in values.items()]
    build = network_lines(backbone, meta, target, weights)
    if not build:
        return []
    load, more = f"torch.load({name}, weights_only=True)", ""
    if path.suffix == ".safetensors":
        load, more = f"load_file({name})", "from safetensors.torch import load_file"
    lines = ["import torch", f"import {target}", *([more] if more else []), *build, f"network.load_state_dict({load})"]
    lines += [f"mean, std = torch.tensor([{mean}, {std}]).view(2, -1, 1, 1)"]
    return [*lines, f"features = network.eval()((images - mean) / std)  # {images}"]


def remarks(backbone, meta, target):
    """What the receiving network needs besides names and shapes."""
    mean, std = (" ".join(f"{x:.4g}" for x in meta[k]) for k in ("mean", "std"))
    if target in ("pt2", "onnx"):
        yield f"images in [0, 1]: they are normalised inside with mean {mean} and standard deviation {std}"
        return
    yield f"images in [0, 1] of {meta['channels']} channels, normalised with mean {mean} and standard deviation {std}"
    if isinstance(backbone, ViT):
        yield f"{meta['heads']} attention heads, patches of {meta['patch_size']}, images of {meta['image_size']} pixels"
    if not isinstance(backbone, ResNet):
        return
    if backbone.conv1.kernel_size == (3, 3):
        yield f"3x3 stem: conv1 has stride 1 and padding {backbone.conv1.padding[0]}, there is no max-pooling"
    if isinstance(backbone.relu, nn.Identity):
        yield "no ReLU after the first batch norm"
    if meta["width"] != 1:
        yield f"width {meta['width']:g}: every layer has {meta['width']:g} times the usual number of channels"


def write(content, path, publish):
    """Writes a program (.pt2, .onnx), a pickle (.pkl), safetensors or a torch file. Returns its path and hash."""
    buffer, formats = io.BytesIO(), {".pkl": pickle.dump, ".safetensors": write_safetensors}
    formats |= {".pt2": torch.export.save, ".onnx": lambda model, file: file.write(model.SerializeToString())}
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
    known = ENDINGS.get(args.to, [*ONLY, *ENDINGS["timm"]])
    if out.suffix not in known:
        fail(f"--out {out}: for {args.to or 'an export'} the name must end in {' or '.join(known)}")
    if out.exists() and Path(args.pretrained).exists() and out.samefile(args.pretrained):
        fail(f"--out {out} is the file of --pretrained: choose another name")
    state = load_file(args.pretrained, "--pretrained", args.trust_pickle)
    found = find_backbone(state, f"--pretrained {args.pretrained}", args.arch, args.pretrained_key)
    backbone, meta = build_backbone(found, args.pretrained, args.arch, args.width)
    target = args.to or ONLY.get(out.suffix) or home(backbone)
    if target in ("pt2", "onnx"):
        if out.suffix not in ENDINGS[target]:
            fail(f"--out {out}: weights of {meta['arch']} get no other names here: the name must end in .pt2 or .onnx")
        try:
            content, weights = compile_program(backbone, meta, target), dict(backbone.state_dict())
        except Exception as error:  # of thousands of networks some do what cannot be traced
            reason = str(error).strip().splitlines()[0][:120]
            fail(f"--to {target}: PyTorch's exporter cannot take {meta['arch']} ({reason}): write its weights instead")
    else:
        content, weights = convert(backbone, meta, target)
    try:
        path, digest = write(content, out, args.publish)
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")

    sizes = [p.numel() for p in backbone.parameters()]
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    print(f"parameters  backbone {sum(sizes) / 1e6:.2f} M, of them trainable {trainable / 1e6:.2f} M")
    print(f"            {found.total / 1e6:.2f} M numbers in all of the network in {args.pretrained}")
    for remark in remarks(backbone, meta, target):
        print(f"note        {remark}")
    print(f"exported    {path}: {len(weights)} tensors, {target}, sha256 {digest}")
    if lines := usage(path, backbone, meta, target, weights):
        print("to use it:", *(f"    {line}" for line in lines), sep="\n")
    else:
        print(f"note        {target} has no network of this kind; one that runs by itself is written by --out NAME.pt2")
    return path


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
