"""The loader: every published layout gives the features of the network it was written from, all else one line."""

import argparse
import copy
import json
import os
import pickle
import shutil
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import deepcluster
from common.checkpoint import IMAGENET, init_from, load_backbone, save_file, save_run
from common.formats import write_safetensors
from common.resnet import resnet
from common.swin import Swin, swin
from common.vit import ViT, vit
from common.xcit import XCiT, xcit
from tests import helpers
from tests.helpers import different, main, parsed, state, train


def lively(network, seed=0):
    """All parameters and statistics away from their initial values, so that no tensor may be missed."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point() and "pos_embed" not in name:
            value.add_(torch.rand(value.shape, generator=generator) * 0.1 - 0.05)
    return network.eval()


torch.manual_seed(0)
RESNET = lively(resnet("resnet50", 0.0625, 224))
BASIC = lively(resnet("resnet18", 0.125, 224))
STEM = lively(resnet("resnet18", 0.125, 32))
NO_RELU = copy.deepcopy(STEM)
NO_RELU.relu = nn.Identity()  # what nn.Sequential(*children) leaves of lightly's ResNet, whose ReLU is a function
VIT = lively(vit("vit_tiny", 32, patch_size=8, depth=2))
LEARNED = lively(vit("vit_tiny", 32, patch_size=8, depth=2, positions="learned"))
SCALED = lively(vit("vit_tiny", 32, patch_size=8, depth=2, positions="learned", layer_scale=0.1))
SMALL = lively(ViT(384, 1, 12, 8, 32, "sincos-yx"))
SHAPE = {"width": 0.25, "patch_size": 1, "window": 4}  # 32, 16, 8, 4: the last window is the whole map
SWIN, SWIN_6 = (lively(swin("swin_tiny", 32, **SHAPE, depths=(2, 1, 2, 1), eps=eps)) for eps in (1e-5, 1e-6))
SWIN_3 = lively(swin("swin_tiny", 32, width=0.25, patch_size=1, window=[4, 4, 8], depths=(1, 2, 1)))  # the whole map, 8
XCIT, NANO = lively(xcit("xcit_small_12", 32, 0.25, 4, 2)), lively(xcit("xcit_nano_12", 32))
IMAGES, LARGER = (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) for size in (32, 48))


def loaded(path, content, **options):
    """(backbone, meta) of a file with this content."""
    torch.save(content, path, **options)
    return load_backbone(path)


def same(backbone, network):
    return torch.equal(backbone.eval()(IMAGES), network(IMAGES))


def close(backbone, network, images=IMAGES, tolerance=1e-4):
    torch.testing.assert_close(backbone.eval()(images), network(images), rtol=tolerance, atol=tolerance)


def refused(capsys, path, content=None, **flags):
    """The one line with which a file is refused, which gets this content first."""
    if content is not None:
        torch.save(content, path)
    return helpers.refused(capsys, load_backbone, path, **flags)


def under(prefix, network, change=0.0):
    """The network's tensors with a prefix; a changed copy is what must not be taken for it."""
    return {prefix + k: v + change if v.is_floating_point() else v for k, v in network.state_dict().items()}


def changed(weights):
    return {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}


def head(*names):
    return {name: torch.ones(3) for name in names}


def renamed(weights, *pairs):
    for old, new in pairs:
        weights = {name.replace(old, new): value for name, value in weights.items()}
    return weights


def prefixed(prefix, weights):
    return {prefix + k: v for k, v in weights.items()}


def mmcls(network):
    """Names of mmcls, whose final norm is called as the first one of a block is."""
    pairs = [("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."), ("mlp.fc1", "ffn.layers.0.0")]
    pairs += [("mlp.fc2", "ffn.layers.1"), (".norm1.", ".ln1."), (".norm2.", ".ln2."), ("^norm.", "^ln1."), ("^", "")]
    return renamed(under("^", network), *pairs)


def swin_torchvision(network):
    pairs = [(f"^layers.{s}.blocks.", f"features.{2 * s + 1}.") for s in range(4)]
    pairs += [(f"^layers.{s}.downsample.", f"features.{2 * s + 2}.") for s in range(4)]
    pairs += [("^patch_embed.proj.", "features.0.0."), ("^patch_embed.norm.", "features.0.2."), ("^", "")]
    return renamed(under("^", network), *pairs, ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"))


def swin_mmcls(network):
    """As `PatchMerging` of mmcls with nn.Unfold: channel by channel the four neighbours, row by row."""
    pairs = [("patch_embed.proj.", "patch_embed.projection."), ("^layers.", "^stages."), (".attn.", ".attn.w_msa.")]
    pairs += [("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"), ("^norm.", "^norm3."), ("^", "")]
    weights = renamed(under("^", network), *pairs)
    order = [0, 2, 1, 3]  # there column by column
    return {
        name: v.unflatten(-1, (4, -1))[..., order, :].transpose(-1, -2).flatten(-2) if "downsample" in name else v
        for name, v in weights.items()
    }


def swin_transformers(network):
    pairs = [("^patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("^patch_embed.", "embeddings.")]
    pairs += [("^norm.", "layernorm."), ("^layers.", "encoder.layers."), ("attn.proj", "attention.output.dense")]
    pairs += [(".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), ("attn.rel", "attention.self.rel")]
    pairs += [("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("^", "")]
    result = {}
    for name, value in renamed(under("^", network), *pairs).items():
        for part, third in zip(("query", "key", "value"), value.chunk(3) if "qkv" in name else [], strict=False):
            result[name.replace("attn.qkv", f"attention.self.{part}")] = third
        result |= {} if "qkv" in name else {name: value}
    return result


def xcit_timm(network):
    """Its blocks of the class token have a layer each for queries, keys and values."""
    result = {}
    for name, value in renamed(under("", network), ("pos_embeder", "pos_embed")).items():
        parts = value.chunk(3) if name.startswith("cls_attn") and "qkv" in name else []
        result |= {name.replace("qkv", part): third for part, third in zip("qkv", parts, strict=False)}
        result |= {} if parts else {name: value}
    return result


def children(network):
    """nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]): 2 is the ReLU, 3 the pooling, 8 the mean."""
    stages = [(f"layer{i}.", f"{i + 3}.") for i in range(1, 5)]
    return renamed(under("^", network), *stages, ("^conv1.", "0."), ("^bn1.", "1."), ("^", ""))


def lightly(network):
    """lightly's own ResNet as such a sequence: no modules for ReLU and pooling, and another name of the shortcut."""
    stages = [(f"^{i}.", f"{i - 2}.") for i in range(4, 8)]
    return renamed(prefixed("^", children(network)), *stages, ("downsample", "shortcut"), ("^", ""))


def obow(network):
    """Its blocks by number: the stem's parts have names, the stages do not."""
    stages = [(f"^layer{i}.", f"{i}.") for i in range(1, 5)]
    return renamed(under("^", network), *stages, ("^conv1.", "0.Conv."), ("^bn1.", "0.bn."), ("^", ""))


def transformers(network, new=False):
    """Names of transformers: in its files, and in its networks since version 5 (new)."""
    if hasattr(network, "conv1"):
        pairs = [(f"^layer{i}.", f"encoder.stages.{i - 1}.layers.") for i in range(1, 5)]
        pairs += [("^conv1.", "embedder.embedder.convolution."), ("^bn1.", "embedder.embedder.normalization.")]
        pairs += [(f".conv{i}.", f".layer.{i - 1}.convolution.") for i in (1, 2, 3)]
        pairs += [(f".bn{i}.", f".layer.{i - 1}.normalization.") for i in (1, 2, 3)]
        pairs += [("downsample.0", "shortcut.convolution"), ("downsample.1", "shortcut.normalization"), ("^", "")]
        return renamed(under("^", network), *pairs)
    query, proj = (
        ("attention.{}_proj", "attention.o_proj") if new else ("attention.attention.{}", "attention.output.dense")
    )
    pairs = [("^patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("^norm.", "layernorm.")]
    pairs += [
        ("^pos_embed", "embeddings.position_embeddings"),
        ("^cls_token", "embeddings.cls_token"),
        ("attn.proj", proj),
    ]
    pairs += [("^blocks.", "^layers." if new else "^encoder.layer."), (".norm1.", ".layernorm_before.")]
    pairs += [
        (".norm2.", ".layernorm_after."),
        (".ls1.gamma", ".layer_scale1.lambda1"),
        (".ls2.gamma", ".layer_scale2.lambda1"),
    ]
    pairs += [] if new else [("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")]
    result = {}
    for name, value in renamed(under("^", network), *pairs, ("^", "")).items():
        for part, third in zip(("query", "key", "value"), value.chunk(3) if "qkv" in name else [], strict=False):
            result[name.replace("attn.qkv", query.format(part[0] if new else part))] = third
        result |= {} if "qkv" in name else {name: value}
    return result


def inside(word, weights):
    """A word of a wrapper after the first part of every name."""
    return {name.replace(".", f".{word}.", 1): value for name, value in weights.items()}


LIGHTNING = {
    "epoch": 1,
    "global_step": 2,
    "pytorch-lightning_version": "2.0",
    "loops": {},
    "hyper_parameters": {"a": 1},
}
ARGS = argparse.Namespace(lr=np.float64(0.1), out=Path("a/b"), flag=np.bool_(True), n=np.int64(3))

# name of the layout in the printed line, the network, and a file as its authors write it
TORCHVISION, TIMM = "unknown method (names of torchvision)", "unknown method (names of timm)"
TRANSFORMERS, OFFICIAL = "unknown method (names of transformers)", "unknown method (names of official)"
FILES = {
    "moco": ("MoCo", RESNET, {"epoch": 200, "arch": "resnet50", "optimizer": {"state": {}}, "state_dict":
        under("module.encoder_q.", RESNET) | under("module.encoder_k.", RESNET, 1.0)
        | head("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.bias", "module.queue")}),
    "mocov3 resnet": ("MoCo v3", RESNET, {"state_dict":
        under("module.base_encoder.", RESNET) | under("module.momentum_encoder.", RESNET, 1.0)
        | head("module.base_encoder.fc.0.weight", "module.predictor.0.weight")}),
    "mocov3 vit": ("MoCo v3", SMALL, {"state_dict":
        under("module.momentum_encoder.", SMALL, 1.0) | under("module.base_encoder.", SMALL)
        | head("module.base_encoder.head.0.weight", "module.predictor.0.weight")}),
    "simsiam": ("SimSiam", BASIC, {"state_dict":
        under("module.encoder.", BASIC) | head("module.encoder.fc.6.bias", "module.predictor.0.weight")}),
    "swav": ("SwAV", BASIC,
        under("module.", BASIC) | head("module.projection_head.0.weight", "module.prototypes.weight")),
    "swav flat": ("SwAV", BASIC, under("", BASIC) | head("projection_head.0.weight", "prototypes.weight")),
    "swav training": ("SwAV", BASIC,
        {"state_dict": under("module.", BASIC) | head("module.prototypes.weight"), "epoch": 3}),
    "npid": ("NPID", BASIC, {"epoch": 1, "lemniscate": {}, "state_dict":
        under("module.", BASIC) | head("module.fc.weight")}),
    "npid cifar": ("NPID", STEM, {"lemniscate": {}, "acc": 1.0, "net":
        renamed(under("module.", STEM), ("downsample", "shortcut")) | head("module.linear.weight")}),
    "barlowtwins": ("Barlow Twins", BASIC, {"epoch": 1, "optimizer": {}, "model":
        under("module.backbone.", BASIC) | head("module.projector.0.weight", "module.bn.running_mean")}),
    "vicreg": ("VICReg", BASIC, {"epoch": 1, "optimizer": {}, "model":
        under("module.backbone.", BASIC) | head("module.projector.0.weight", "module.projector.0.bias")}),
    "scan pretext": ("SCAN", STEM,
        renamed(under("backbone.", STEM), ("downsample", "shortcut")) | head("contrastive_head.0.weight")),
    "scan": ("SCAN", STEM, {"head": 0, "model":
        renamed(under("backbone.", STEM), ("downsample", "shortcut")) | head("cluster_head.0.weight")}),
    "directclr": ("DirectCLR", BASIC, {"model":
        under("module.backbone.", BASIC) | head("module.online_head.weight")}),
    "feature transformation": ("one of Feature Transformation, PyContrast", BASIC,
        {"model_ema": under("encoder.", BASIC, 1.0), "contrast": head("memory"), "model":
        under("module.encoder.", BASIC) | head("module.head.0.weight")}),
    "pixpro": ("PixPro", RESNET, {"optimizer": {}, "model":
        under("module.encoder.", RESNET) | under("module.encoder_k.", RESNET, 1.0)
        | head("module.projector.linear1.weight", "module.projector_k.linear1.weight")}),
    "supcontrast": ("one of SupCon, SimCLR", STEM, {"opt": ARGS, "model":
        renamed(under("encoder.module.", STEM), ("downsample", "shortcut")) | head("head.0.weight")}),
    "dino backbone": (TIMM, LEARNED, under("", LEARNED)),
    "dino full": ("DINO", LEARNED, {"args": ARGS, "epoch": 1, "dino_loss": head("center"),
        "student": under("module.backbone.", LEARNED, 1.0) | head("module.head.mlp.0.weight"),
        "teacher": under("backbone.", LEARNED) | head("head.mlp.0.weight", "head.last_layer.weight_g")}),
    "dino full resnet": ("DINO", BASIC, {"args": ARGS,
        "student": under("module.backbone.", BASIC, 1.0), "teacher": under("module.backbone.", BASIC)}),
    "ibot": ("iBOT", LEARNED, {"ibot_loss": head("center"),
        "student": under("module.backbone.", LEARNED, 1.0) | head("module.backbone.masked_embed"),
        "teacher": under("backbone.", LEARNED) | head("head.mlp.0.weight")}),
    "dinov2": ("DINOv2", SCALED, {"teacher": renamed(under("backbone.", SCALED), ("blocks.", "blocks.0."))
        | head("backbone.mask_token", "dino_head.mlp.0.weight", "ibot_head.mlp.0.weight")}),
    "dinov2 backbone": (TIMM, SCALED, under("", SCALED) | head("mask_token")),
    "esvit": ("EsViT", LEARNED, {"args": ARGS, "student": under("module.", LEARNED, 1.0),
        "teacher": under("module.", LEARNED) | head("module.head.mlp.0.weight", "module.head_dense.mlp.0.weight")}),
    "obow": ("OBoW", BASIC, {"epoch": 1, "network":
        prefixed("feature_extractor_teacher._feature_blocks.", changed(obow(BASIC)))
        | prefixed("feature_extractor._feature_blocks.", obow(BASIC)) | head("bow_predictor.layers_w.0.weight")}),
    "obow, torchvision": ("OBoW", BASIC, {"network": under("", BASIC) | head("fc.weight", "fc.bias")}),
    "vissl": ("VISSL", RESNET, {"iteration": 1, "classy_state_dict": {"train": True, "base_model": {"model":
        {"trunk": under("_feature_blocks.", RESNET), "heads": head("0.clf.0.weight")}, "meters": {}}}}),
    "vissl vit": ("VISSL", LEARNED, {"classy_state_dict": {"base_model": {"model": {"trunk": under("", LEARNED)}}}}),
    "mae": ("MAE", VIT, {"model": under("", VIT)}),
    "mae with decoder": ("MAE", VIT, {"args": ARGS, "scaler": {}, "model":
        under("", VIT) | head("mask_token", "decoder_pos_embed", "decoder_embed.weight")
        | head("decoder_blocks.0.attn.qkv.weight", "decoder_norm.weight", "decoder_pred.bias")}),
    "maskfeat": ("MaskFeat", LEARNED, {"epoch": 1, "cfg": "text", "model_state":
        renamed(under("^", LEARNED), ("^norm.", "pred_head.transforms.0.0."), ("^", ""))
        | head("mask_token", "hogs.0.weight_x", "hogs.0.weight_y", "pred_head.projections.0.weight")}),
    "mmselfsup resnet": ("MMSelfSup", RESNET, {"meta": {"epoch": 1, "config": "text"}, "state_dict":
        under("backbone.", RESNET) | under("encoder_q.0.", RESNET) | under("encoder_k.0.", RESNET, 1.0)
        | head("queue", "neck.mlp.0.weight")}),
    "mmselfsup relative_loc": ("MMSelfSup", RESNET, {"meta": {"epoch": 70}, "optimizer": {}, "state_dict":
        under("backbone.", RESNET) | head("neck.fc.weight", "neck.bn.running_mean", "head.fc_cls.weight")}),
    "mmselfsup rotation_pred": ("MMSelfSup", RESNET, {"meta": {"epoch": 70}, "state_dict":
        under("backbone.", RESNET) | head("head.fc_cls.weight", "head.fc_cls.bias")}),
    "mmselfsup interclr": ("MMSelfSup", RESNET, {"meta": {"epoch": 200}, "state_dict":
        under("encoder_q.0.", RESNET) | under("encoder_k.0.", RESNET, 1.0) | under("backbone.", RESNET)
        | head("encoder_q.1.mlp.0.weight", "encoder_k.1.mlp.0.weight", "neck.mlp.0.weight", "queue", "queue_ptr")}),
    "mmselfsup densecl, that of its authors in training": ("MMSelfSup", RESNET, {"meta": {}, "state_dict":
        under("encoder_q.0.", RESNET) | under("encoder_k.0.", RESNET, 1.0) | under("backbone.", RESNET)
        | head("encoder_q.1.mlp.0.weight", "encoder_q.1.mlp2.0.weight", "queue", "queue2", "queue2_ptr")}),
    "densecl release": (TORCHVISION, RESNET, {"state_dict": under("", RESNET), "author": "DenseCL"}),
    "mmselfsup vit": ("MMSelfSup", VIT, {"meta": {}, "state_dict":
        prefixed("backbone.", mmcls(VIT)) | head("neck.decoder_embed.weight", "backbone.mask_token")}),
    "mmselfsup mocov3": ("MMSelfSup, MoCo v3", SMALL, {"meta": {}, "state_dict":
        prefixed("backbone.", mmcls(SMALL)) | prefixed("base_encoder.0.", mmcls(SMALL))}),
    "mmselfsup extracted": ("unknown method (names of mmcls)", LEARNED, {"state_dict": mmcls(LEARNED), "author": "x"}),
    "solo-learn": ("solo-learn", BASIC, LIGHTNING | {"state_dict":
        under("backbone.", BASIC) | under("momentum_backbone.", BASIC, 1.0)
        | head("classifier.weight", "projector.0.weight")}),
    "solo-learn, older": ("solo-learn", BASIC, LIGHTNING | {"state_dict":
        under("encoder.", BASIC) | head("classifier.weight", "predictor.0.weight")}),
    "lightly": ("lightly", STEM, LIGHTNING | {"state_dict": under("backbone.", STEM)
        | under("teacher_backbone.", STEM, 1.0) | head("projection_head.layers.0.weight", "online_classifier.weight")}),
    "lightly, sequence": ("lightly", STEM, LIGHTNING | {"state_dict": prefixed("backbone.", children(STEM))
        | prefixed("backbone_momentum.", changed(children(STEM))) | head("projection_head.layers.0.weight")}),
    "lightly, own resnet": ("lightly", NO_RELU, LIGHTNING | {"state_dict":
        prefixed("backbone.", lightly(STEM)) | head("projection_head.layers.0.weight")}),
    "lightly, vit": ("lightly", VIT, LIGHTNING | {"state_dict":
        under("backbone.vit.", VIT) | head("backbone.mask_token", "decoder.mask_token")}),
    "lightly, dino": ("one of DINO, DINOv2, iBOT", BASIC, LIGHTNING | {"state_dict":
        prefixed("student_backbone.", changed(children(BASIC))) | prefixed("teacher_backbone.", children(BASIC))
        | head("student_head.layers.0.weight", "teacher_head.layers.0.weight")}),
    "lightly, dinov2": ("one of DINO, DINOv2, iBOT", SCALED, LIGHTNING | {"state_dict":
        under("student_backbone.vit.", SCALED, 1.0) | under("teacher_backbone.vit.", SCALED)
        | head("student_backbone.mask_token", "teacher_head.dino_head.layers.0.weight")}),
    "transformers vit": (TRANSFORMERS, LEARNED, transformers(LEARNED) | head("pooler.dense.weight")),
    "transformers vit, new names": (TRANSFORMERS, LEARNED, prefixed("vit.", transformers(LEARNED, True))
        | head("classifier.weight")),
    "transformers dinov2": (TRANSFORMERS, SCALED, transformers(SCALED) | head("embeddings.mask_token")),
    "transformers mae": ("MAE", VIT, prefixed("vit.", transformers(VIT)) | head("decoder.decoder_embed.weight")),
    "transformers resnet": (TRANSFORMERS, RESNET, prefixed("resnet.", transformers(RESNET)) | head("classifier.1.w")),
    "timm resnet": (TORCHVISION, STEM, under("", STEM) | head("fc.weight", "fc.bias")),
    "timm vit": (TIMM, LEARNED, under("", LEARNED) | head("head.weight", "head.bias")),
    "torchvision references": (TORCHVISION, BASIC, {"model": under("", BASIC) | head("fc.weight"), "args": ARGS}),
    "swin": (OFFICIAL, SWIN, {"model": under("", SWIN) | head("head.weight", "layers.0.blocks.1.attn_mask")
        | head("layers.0.blocks.0.attn.relative_position_index"), "max_accuracy": 1.0}),
    "swin torchvision": (TORCHVISION, SWIN, swin_torchvision(SWIN) | head("head.weight")
        | head("features.1.0.attn.relative_position_index")),
    "swin timm": (TIMM, SWIN, head("head.fc.weight")
        | renamed(under("", SWIN), *((f"layers.{s}.down", f"layers.{s + 1}.down") for s in (2, 1, 0)))),
    "swin timm, three stages": (TIMM, SWIN_3,
        renamed(under("", SWIN_3), *((f"layers.{s}.down", f"layers.{s + 1}.down") for s in (1, 0)))),
    "swin esvit": ("EsViT", SWIN_6, {"args": ARGS, "student": under("module.", SWIN_6, 1.0),
        "teacher": under("module.", SWIN_6) | head("module.head.mlp.0.weight", "module.head_dense.mlp.0.weight")}),
    "swin esvit, views": ("EsViT", SWIN_6, {"student": under("module.", SWIN_6, 1.0) | head("module.head.mlp.0.bias"),
        "teacher": under("", SWIN_6) | head("head.mlp.0.weight", "head.last_layer.weight_g")}),
    "swin simmim": ("SimMIM", SWIN, {"lr_scheduler": {}, "model":
        under("encoder.", SWIN) | head("encoder.mask_token", "decoder.0.weight", "decoder.0.bias")}),
    "swin mmselfsup": ("MMSelfSup", SWIN, {"meta": {}, "state_dict":
        prefixed("backbone.", swin_mmcls(SWIN)) | head("backbone.mask_token", "neck.decoder.0.weight")}),
    "swin transformers": (TRANSFORMERS, SWIN, prefixed("swin.", swin_transformers(SWIN))
        | head("swin.embeddings.mask_token", "decoder.0.weight")),
    "xcit": (OFFICIAL, XCIT, {"model": under("", XCIT) | head("head.weight", "head.bias")}),
    "xcit timm": (TIMM, XCIT, xcit_timm(XCIT) | head("head.weight")),
    "xcit dino": ("DINO", XCIT, {"args": ARGS, "student": under("module.backbone.", XCIT, 1.0),
        "teacher": under("module.backbone.", XCIT) | head("module.head.mlp.0.weight")}),
    "xcit dino backbone": (OFFICIAL, NANO, under("", NANO)),
    "averaged": (TORCHVISION, BASIC, under("module.", BASIC) | head("n_averaged")),
    "compiled": (TORCHVISION, BASIC, {"model": under("module._orig_mod.", BASIC)}),
    "compiled inside": (TORCHVISION, BASIC, {"state_dict": under("backbone._orig_mod.", BASIC)}),
    "compiled in pieces": (TORCHVISION, BASIC, {"state_dict": inside("_orig_mod", under("module.module.", BASIC))}),
    "sharded": (TIMM, LEARNED, {"module": inside("_fsdp_wrapped_module", under("_fsdp_wrapped_module.", LEARNED))}),
    "flat, backbone": (TORCHVISION, BASIC, under("backbone.", BASIC) | head("neck.weight")),
    "flat, backbone.vit": (TIMM, LEARNED, under("backbone.vit.", LEARNED) | head("backbone.mask_token")),
    **{f"one prefix {p}": (TORCHVISION, BASIC, LIGHTNING | {"state_dict": under(p, BASIC) | head("loss.weight")})
       for p in ("model.", "net.", "resnet.", "model.encoder.trunk.")},
    **{f"plain, not {p}": (TIMM, LEARNED, {"state_dict": under(p, LEARNED, 1.0) | under("encoder.", LEARNED)})
       for p in ("momentum_encoder.", "target_encoder.", "encoder_ema.", "k_encoder.", "teacher.encoder.")},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_published_layout(name, tmp_path, capsys):
    """Bit for bit the features of the network, so every tensor is in its place, and no momentum copy was taken."""
    layout, network, content = FILES[name]
    backbone, meta = loaded(tmp_path / "file.pth", content)
    assert same(backbone, network)
    out = capsys.readouterr().out
    count = len(network.state_dict())
    assert f": {layout}, {meta['arch']}" in out and f"tensors matched {count}/{count}\n" in out
    assert "normalised  with ImageNet's" in out and meta["mean"] == IMAGENET["mean"]
    if isinstance(network, Swin):
        assert {k: meta[k] for k in network.config} == network.config and meta["image_size"] == 32
        blocks = "4/4/8, 1/2/1" if network is SWIN_3 else "4/4/4/4, 2/1/2/1"
        assert meta["arch"] == "swin_tiny" and f"patches of 1, windows of {blocks} blocks" in out
    elif isinstance(network, XCiT):
        assert {k: meta[k] for k in network.config} == network.config and meta["image_size"] == 224
        assert (meta["arch"], meta["width"]) == (("xcit_nano_12", 1) if network is NANO else ("xcit_small_12", 0.25))
    elif hasattr(network, "tokens"):
        assert meta["heads"] == network.heads and meta["depth"] == len(network.blocks) and meta["patch_size"] == 8
        assert f"{network.heads} heads (assumed" in out and meta["image_size"] == 32
    else:
        size = 32 if network in (STEM, NO_RELU) else 224
        arch = ("resnet50", 0.0625, 224) if network is RESNET else ("resnet18", 0.125, size)
        assert (meta["arch"], meta["width"], meta["image_size"]) == arch and ("3x3 stem" in out) == (size == 32)


def test_files_of_old_torch(tmp_path):
    """The format before zip files, half precision, and batch norms that did not count."""
    rounded = copy.deepcopy(RESNET).half().float()
    content = {k: v.half() for k, v in under("module.", RESNET).items() if "num_batches" not in k}
    backbone, _ = loaded(tmp_path / "old.pth", {"state_dict": content}, _use_new_zipfile_serialization=False)
    assert backbone.conv1.weight.dtype == torch.float32 and backbone.bn1.num_batches_tracked == 0
    close(backbone, rounded)


def test_torchvision_networks(tmp_path):
    """Against torchvision's own forward pass; also as a sequence of its children, which their order numbers."""
    torch.manual_seed(0)
    theirs = lively(torchvision.models.resnet18())
    ours, meta = loaded(tmp_path / "tv.pth", theirs.state_dict())
    sequence = nn.Sequential(*list(theirs.children())[:-1])
    numbered, _ = loaded(tmp_path / "a.ckpt", {"state_dict": prefixed("backbone.", sequence.state_dict())})
    theirs.fc = nn.Identity()
    close(ours, theirs)
    close(numbered, theirs)
    assert meta["arch"] == "resnet18" and meta["width"] == 1
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 3, 192, 768)
    nn.init.normal_(theirs.encoder.pos_embedding)
    content = lively(theirs).state_dict()
    theirs.heads = nn.Identity()
    first_release = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in content.items()}
    for weights in (content, first_release):
        ours, meta = loaded(tmp_path / "tv.pth", weights)
        close(ours, theirs)
        assert meta["positions"] == "learned" and ours.pos_embed.requires_grad


def test_stem_of_solo_learn_is_padded_by_two(tmp_path):
    """Its small stem: Conv2d(3, 64, 3, stride 1, padding 2), so the map is two pixels larger than the image."""
    backbone, _ = loaded(tmp_path / "a.ckpt", {"state_dict": under("backbone.", STEM) | head("classifier.weight")})
    assert [b.stages(IMAGES)[0].shape[-1] for b in (backbone, STEM)] == [34, 32]


def test_flags_that_agree_with_the_file(tmp_path):
    torch.save(resnet("resnet18", 0.5, 32).state_dict(), tmp_path / "half.pth")
    backbone, meta = load_backbone(tmp_path / "half.pth", arch="resnet18", width=0.5)
    assert meta["width"] == 0.5 and backbone.dim == 256


# ------------------------------------------------------------------------------------------------------- heads
def test_number_of_heads_comes_from_layout_and_table(tmp_path, capsys):
    """Twelve heads and six have the same tensors and different features. Without its layout, MoCo v3's ViT-S is known
    by its table of positions; with any other table the usual six are taken, and that is said."""
    six = ViT(384, 1, 6, 8, 32, "sincos-yx")
    six.load_state_dict(SMALL.state_dict())
    assert not torch.allclose(six(IMAGES), SMALL(IMAGES), atol=1e-3)
    backbone, meta = loaded(tmp_path / "flat.pth", under("", SMALL))
    assert meta["heads"] == 12 and meta["positions"] == "sincos-yx" and same(backbone, SMALL)
    _, meta = loaded(tmp_path / "flat.pth", under("", lively(ViT(384, 1, 6, 8, 32, "sincos-xy"))))
    assert meta["heads"] == 6 and meta["positions"] == "sincos-xy"
    with_scale = lively(ViT(384, 1, 6, 8, 32, "sincos-yx", layer_scale=0.1))  # no network of MoCo v3 has a scale
    assert loaded(tmp_path / "flat.pth", under("", with_scale))[1]["heads"] == 6
    assert "6 heads (assumed from layout and dimension: the tensors do not show it)" in capsys.readouterr().out


def test_dimension_without_a_usual_number_of_heads(tmp_path, capsys):
    assert "number of heads" in refused(capsys, tmp_path / "a.pth", lively(ViT(96, 1, 3, 8, 32)).state_dict())
    _, meta = load_backbone(tmp_path / "a.pth", arch="vit_tiny")
    assert meta["heads"] == 3 and meta["width"] == 0.5
    assert loaded(tmp_path / "b.pth", lively(ViT(128, 1, 2, 8, 32)).state_dict())[1]["heads"] == 2


def test_huge_has_sixteen_heads_of_eighty(tmp_path):
    backbone, meta = loaded(tmp_path / "h.pth", {"model": ViT(1280, 1, 16, 14, 28, mlp_ratio=0.5).state_dict()})
    assert (meta["arch"], meta["heads"], meta["patch_size"], backbone.blocks[0].attn.heads) == ("vit_huge", 16, 14, 16)


def test_mean_pooling_and_layer_scale_show_in_the_names(tmp_path):
    network = lively(ViT(192, 2, 3, 8, 32, "learned", "mean", mlp_ratio=3, layer_scale=0.1))
    backbone, meta = loaded(tmp_path / "finetuned.pth", {"model": under("", network) | head("head.weight")})
    assert meta["pool"] == "mean" and same(backbone, network)


def test_a_network_without_class_token_shows_in_its_positions(tmp_path):
    """As I-JEPA saves it: encoder, predictor and the moving average of the encoder, which is taken."""
    network = lively(ViT(192, 2, 3, 8, 32, "sincos-xy", "norm-mean", class_token=False))
    parts = {"encoder": changed(network.state_dict()), "target_encoder": network.state_dict()}
    parts["predictor"] = head("predictor_blocks.0.attn.qkv.weight", "predictor_embed.weight", "mask_token")
    state = {name: prefixed("module.", part) for name, part in parts.items()}
    backbone, meta = loaded(tmp_path / "a.pth.tar", state | {"opt": {}, "scaler": None, "epoch": 300})
    assert (meta["method"], meta["pool"], meta["class_token"]) == ("I-JEPA", "norm-mean", False)
    assert same(backbone, network) and meta["positions"] == "sincos-xy"
    larger, _ = load_backbone(tmp_path / "a.pth.tar", image_size=48)
    assert larger.grid == (6, 6) and larger.pos_embed.shape == (1, 36, 192)
    close(larger, network, LARGER, 1e-5)
    del state["target_encoder"]
    assert not same(loaded(tmp_path / "b.pth.tar", state)[0], network)
    bare = {k: v for k, v in VIT.state_dict().items() if k != "cls_token"}
    with pytest.raises(SystemExit):  # its positions are those of a network that has one
        loaded(tmp_path / "c.pth", bare)


def test_positions_of_another_grid_are_resized(tmp_path, capsys):
    """What the network does by itself with larger images."""
    torch.save({"model": VIT.state_dict()}, tmp_path / "a.pth")
    backbone, meta = load_backbone(tmp_path / "a.pth", image_size=48)
    assert backbone.grid == (6, 6) and meta["image_size"] == 48 and backbone.pos_embed.shape == (1, 37, 192)
    close(backbone, VIT, LARGER, 1e-5)
    assert "4 x 4 patches resized to 6 x 6" in capsys.readouterr().out
    assert "--image-size 50" in refused(capsys, tmp_path / "a.pth", image_size=50)


# --------------------------------------------------------------------------------------------------- our files
class Method(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.projector = backbone, nn.Linear(backbone.dim, 3)


OURS = {
    "resnet34": (0.3, lambda: resnet("resnet34", 0.3, 16)),  # a width that the channels alone do not give back
    "resnet18": (0.125, lambda: resnet("resnet18", 0.125, 32, input_filter=torch.rand(2, 3, 5, 5))),
    "vit_tiny": (0.25, lambda: vit("vit_tiny", 32, 0.25, patch_size=4, depth=2, heads=6, positions="learned")),
    "vit_small": (0.25, lambda: vit("vit_small", 32, 0.25, patch_size=8, depth=1, pool="mean")),
}


@pytest.mark.parametrize("arch", OURS)
def test_our_files(arch, tmp_path, capsys):
    (width, build), none = OURS[arch], argparse.Namespace(state_dict=dict)
    model = Method(lively(build()))
    args = parsed("simsiam", "--arch", arch, "--width", width, "--image-size", 32, "--out", tmp_path)
    recipe = argparse.Namespace(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_run(args, 3, 10, model, none, none, model.backbone, recipe)
    for name in ("backbone.pt", "last.pt"):
        backbone, meta = load_backbone(tmp_path / name)
        assert same(backbone, model.backbone)
        assert meta["method"] == "method" and meta["arch"] == arch and meta["width"] == width
        assert meta["mean"] == [0.1, 0.2, 0.3] and meta["std"] == [0.4, 0.5, 0.6]
        assert meta == state(tmp_path, name)["meta"]
    out = capsys.readouterr().out
    assert "assumed" not in out and "normalised" not in out
    assert f"--width 2.0: {tmp_path}/last.pt holds width {width}" in refused(capsys, tmp_path / "last.pt", width=2.0)


@pytest.mark.parametrize("arch, width", [("resnet18", 0.25), ("vit_tiny", None)])
def test_random_initialisation_depends_on_the_seed_only(arch, width):
    (a, meta), (b, _), (c, _) = (load_backbone("random", arch, width, 32, seed=seed) for seed in (5, 5, 6))
    assert meta["method"] == "random" and meta["image_size"] == 32 and meta["std"] == IMAGENET["std"]
    assert same(a, b.eval()) and not same(a, c.eval())
    assert width or (meta["heads"] == 3 and meta["patch_size"] == 4)


# ------------------------------------------------------------------------------------------------------ --init
def test_init_reads_the_same_files(tmp_path, capsys):
    model = Method(resnet("resnet18", 0.125, 32))
    projector = model.projector.weight.clone()
    torch.save({"state_dict": under("module.encoder_q.", STEM)}, tmp_path / "moco.pth")
    init_from(tmp_path / "moco.pth", model)
    assert same(model.backbone, STEM) and torch.equal(model.projector.weight, projector)
    assert f"{len(STEM.state_dict())} of {len(model.state_dict())} tensors" in capsys.readouterr().out


def test_init_takes_heads_from_a_run_and_never_part_of_a_backbone(tmp_path, capsys):
    old, new, wide = (Method(resnet("resnet18", width, 32)) for width in (0.125, 0.125, 0.25))
    lively(old)
    content = {"model": old.state_dict(), "backbone_prefix": "backbone.", "meta": {"arch": "resnet18"}}
    save_file(tmp_path / "last.pt", content)
    init_from(tmp_path / "last.pt", new)
    assert different(old.state_dict(), new.state_dict()) == []
    before = copy.deepcopy(wide.state_dict())
    error = helpers.refused(capsys, init_from, tmp_path / "last.pt", wide)
    assert "--init" in error and "conv1.weight (8, 3, 3, 3) instead of (16, 3, 3, 3)" in error
    assert different(before, wide.state_dict()) == []


def test_init_knows_about_heads_and_positions(tmp_path, capsys):
    torch.save({"state_dict": under("module.base_encoder.", SMALL)}, tmp_path / "mocov3.pth")
    error = helpers.refused(capsys, init_from, tmp_path / "mocov3.pth", Method(ViT(384, 1, 6, 8, 32)))
    assert "12 attention heads, this model has 6" in error
    model = Method(ViT(384, 1, 12, 8, 48, "sincos-yx"))
    init_from(tmp_path / "mocov3.pth", model)
    close(model.backbone, SMALL, LARGER, 1e-5)


# ---------------------------------------------------------------------------------------------------- refusals
def without(network, *parts):
    return {k: v for k, v in network.state_dict().items() if not k.startswith(parts)}


BROKEN = {
    "half a resnet": (  # a stem of 6 tensors, 3 blocks of 18 and 4 of 18, and a downsampling of 6 for each of the two
        without(RESNET, "layer3.", "layer4."),
        ["only 144/318 tensors match resnet50: layer3.0.conv1.weight missing", "and 169 more"]),
    "no stem": (without(RESNET, "conv1.weight"), ["conv1.weight missing"]),
    "one bias": (without(VIT, "blocks.1.mlp.fc2.bias"),
        ["only 29/30 tensors match vit_tiny: blocks.1.mlp.fc2.bias missing\n"]),
    "half a vit": ({"model": without(VIT, "blocks.0.norm2", "blocks.0.mlp", "blocks.1.norm2", "blocks.1.mlp")},
        ["18/30", "blocks.0.norm2.weight missing", "and 7 more"]),
    "another shape": (RESNET.state_dict() | {"layer2.0.bn1.bias": torch.zeros(5)},
        ["317/318", "layer2.0.bn1.bias (5,) instead of (8,)"]),
    "squeeze and excitation": (under("", RESNET) | head("layer1.0.se.fc1.weight"),
        ["file.pth: 318/318 tensors match resnet50: layer1.0.se.fc1.weight unexpected"]),
    "registers": (under("", VIT) | head("reg_token"), ["30/30", "reg_token unexpected"]),
    "a swin": (head("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"), ["no backbone found"]),
    "a text model": ({"model": head("embeddings.word.weight", "encoder.layer.0.key.weight")}, ["no backbone found"]),
    "only a head": ({"epoch": 1, "state_dict": head("module.linear.weight")},
        ["no backbone found", "the names in state_dict are linear.weight"]),
    "a convolutional stem": (
        {k: v for k, v in under("", SMALL).items() if "patch_embed" not in k} | head("patch_embed.proj.0.weight"),
        ["only 16/18 tensors match vit_small: patch_embed.proj.weight missing", "embed.proj.0.weight unexpected"]),
    "a distilled vit": (transformers(LEARNED) | head("embeddings.distillation_token"),
        ["distillation_token unexpected"]),
    "an empty dictionary": ({}, ["no backbone found", "none at all"]),
    "a list": ([1, 2], ["no backbone found", "0, 1 ..."]),
    "a tensor": (torch.zeros(3), ["holds a Tensor, not a dictionary"]),
    "no weights": ({"state_dict": 3, "model": [1], "backbone": "x", 5: 6}, ["no backbone found"]),
    "a wrong table": (VIT.state_dict() | {"pos_embed": torch.zeros(1, 16, 192)},
        ["pos_embed (1, 16, 192) instead of (1, 17, 192)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_never_a_partial_load(case, tmp_path, capsys):
    content, words = BROKEN[case]
    error = refused(capsys, tmp_path / "file.pth", content)
    for word in ["--pretrained", "file.pth", *words]:
        assert word in error, error


def test_wide_resnet_of_torchvision_is_refused(tmp_path, capsys):
    """Its blocks alone are wider, which no width here means."""
    with torch.device("meta"):
        names = torchvision.models.wide_resnet50_2().state_dict()
    content = {k: torch.zeros(()).expand(v.shape) for k, v in names.items()}
    assert "layer1.0.conv1.weight (128, 64, 1, 1) instead of (64, 64, 1, 1)" in refused(
        capsys, tmp_path / "a.pth", content
    )


def test_flags_that_contradict_the_file(tmp_path, capsys):
    torch.save(RESNET.state_dict(), tmp_path / "a.pth")
    assert "--arch resnet101: " in refused(capsys, tmp_path / "a.pth", arch="resnet101")
    assert "--arch vit_base: " in refused(capsys, tmp_path / "a.pth", arch="vit_base")
    assert "--width 1.0: " in refused(capsys, tmp_path / "a.pth", width=1.0)
    assert "holds arch resnet50; leave the flag out" in refused(capsys, tmp_path / "a.pth", arch="resnet18")
    assert "300/" in refused(capsys, tmp_path / "half.pth", without(RESNET, "layer4.2"), arch="resnet50")


@pytest.mark.parametrize("order", ["model teacher", "teacher model"])
def test_the_longest_complete_backbone_is_taken(order, tmp_path):
    """A whole network before a larger one that is not whole, and the larger of two whole ones; wherever they stand."""
    broken = without(RESNET, "layer4.2")  # 300 tensors, more than the 120 of the other network
    for larger, expected in ((broken, STEM), (RESNET.state_dict(), RESNET)):
        content = dict(zip(order.split(), (larger, STEM.state_dict()), strict=True))
        backbone, _ = loaded(tmp_path / "a.pth", {k: content[k] for k in ("model", "teacher")})
        assert same(backbone, expected)


# ----------------------------------------------------------------------------------------------------- pickles
class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Config(dict):
    """A dictionary of another library, as yacs has one."""


@pytest.mark.parametrize("place", ["weights", "args", "namespace", "legacy", "pickle"])
def test_no_pickle_is_executed(place, tmp_path, capsys):
    folder, file = tmp_path / "made", tmp_path / "bad.pth"
    content = {"model": RESNET.state_dict(), "args": Payload(folder)}
    if place == "weights":
        content = RESNET.state_dict() | {"fc.weight": Payload(folder)}
    if place == "namespace":
        content["args"] = argparse.Namespace(a=Payload(folder))
    if place == "pickle":
        file.write_bytes(pickle.dumps(Payload(folder), protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=place != "legacy")
    error = refused(capsys, file)
    assert not folder.exists()
    if place == "pickle":  # which trust would run, and not read
        assert "is a pickle that torch.save did not write" in error
        refused(capsys, file, trust_pickle=True)
        assert not folder.exists()
    else:
        assert "mkdir" in error and "cannot be read safely" in error and "add --trust-pickle" in error
    if place == "args":
        load_backbone(file, trust_pickle=True)
        assert folder.exists(), "the payload works"


def test_objects_of_other_libraries_need_trust(tmp_path, capsys):
    assert "Config" in refused(capsys, tmp_path / "a.pth", {"model": STEM.state_dict(), "config": Config(a=1)})
    backbone, _ = load_backbone(tmp_path / "a.pth", trust_pickle=True)
    assert same(backbone, STEM)
    error = helpers.refused(capsys, init_from, tmp_path / "a.pth", Method(resnet("resnet18", 0.125, 32)))
    assert "convert it by export.py --trust-pickle" in error


def test_evaluation_of_a_published_file(tmp_path, capsys):
    torch.save({"state_dict": under("module.encoder_q.", STEM), "config": Config(a=1)}, tmp_path / "moco.pth")
    words = ["--pretrained", tmp_path / "moco.pth", *"--data fake:64 --image-size 16 --k 5 --workers 0".split()]
    assert "add --trust-pickle" in helpers.refused(capsys, main, "eval_knn", *words)
    result = main("eval_knn", *words, "--trust-pickle")
    assert (result["method"], result["arch"], result["width"], result["image_size"]) == ("MoCo", "resnet18", 0.125, 16)


def test_classes_that_are_not_installed(tmp_path, capsys, monkeypatch):
    """Objects of other libraries beside the weights, saved where their library was: with trust they are left out."""
    module = types.ModuleType("not_here_any_more")
    for base in (nn.Module, dict, list):
        kind = type(f"A{base.__name__}", (base,), {"__module__": module.__name__})
        setattr(module, kind.__name__, kind)
    memory = module.AModule()
    memory.register_buffer("memory", torch.ones(3))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = module.Adict(a=module.Alist([1, {"b": 2}]), c={module.Adict: 1})
    content = {"epoch": 3, "state_dict": under("module.", BASIC), "lemniscate": memory, "config": config}
    files = [tmp_path / "new.pth", tmp_path / "old.pth"]
    for zipped, file in enumerate(files):
        torch.save(content, file, _use_new_zipfile_serialization=not zipped)
    monkeypatch.delitem(sys.modules, module.__name__)
    for file in files:
        assert "it holds not_here_any_more.AModule" in refused(capsys, file)
        backbone, meta = load_backbone(file, trust_pickle=True)
        assert same(backbone, BASIC) and meta["method"] == "NPID"
    file.write_bytes(b"\x80\x02cyacs_is_not_here.config\nCfgNode\n.")
    assert "is a pickle that torch.save did not write" in refused(capsys, file, trust_pickle=True)


def test_whole_networks(tmp_path, capsys):
    """Pickled with their class, which needs trust, as TorchScript does."""
    network = lively(torchvision.models.resnet18())
    torch.save(network, tmp_path / "whole.pth")
    torch.jit.script(network).save(tmp_path / "script.pt")
    network.fc = nn.Identity()
    for name, held in (("whole.pth", "torchvision.models.resnet.ResNet"), ("script.pt", "a TorchScript program")):
        assert f"cannot be read safely: it holds {held}" in refused(capsys, tmp_path / name)
        backbone, _ = load_backbone(tmp_path / name, trust_pickle=True)
        close(backbone, network)


def test_damaged_files(tmp_path, capsys):
    path, weights = tmp_path / "part.pth", {"state_dict": under("module.encoder_q.", STEM)}
    torch.save(weights, path)
    whole = path.read_bytes()
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    with open(path, "wb") as file:
        write_safetensors(STEM.state_dict(), file)
    tensors = path.read_bytes()
    for data in (whole, old, tensors):
        for size in (*range(40, 2000, 97), len(data) // 2, len(data) - 100, len(data) - 1):
            path.write_bytes(data[:size])
            assert f"part.pth is cut short (a broken download?): {size} bytes" in refused(capsys, path), size
    for content, text in (
        (b"", "is empty (0 bytes)"),
        (b"PK\x03\x04 no zip", "is cut short"),
        (b"\x80\x02", "is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b'{"message": "Not found"}', "is not a checkpoint but text"),
        ("Zugriff \u00fcberschritten".encode(), "is not a checkpoint but text"),
        (b"\0" * 4096, "begins with zeros"),
        (b"\x1f\x8b\x08" + b"\0" * 99, "is an archive: unpack it"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "is an HDF5 file"),
        (pickle.dumps({"a": 1}, 2), "is a pickle that torch.save did not write"),
        (pickle.dumps({"a": 1}, 4), "is a pickle that torch.save did not write"),
    ):
        path.write_bytes(content)
        assert f"part.pth {text}" in refused(capsys, path)
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    assert "is a zip archive of a.npy, not a checkpoint" in refused(capsys, tmp_path / "a.npz")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.add(path, "part.pth")
    assert "is an archive: unpack it" in refused(capsys, tmp_path / "a.tar")
    assert "no such file" in refused(capsys, tmp_path / "missing.pth")
    assert "is a folder: name the file in it" in refused(capsys, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_the_weights_ends_with_one_line(seed, tmp_path, capsys):
    """Tensors that are missing, of another shape, of another name or no tensors: refused, or nothing was changed."""
    torch.manual_seed(seed)
    for network, build in ((BASIC, dict), (SCALED, dict), (LEARNED, transformers), (STEM, lightly)):
        weights = build(network) if build is not dict else network.state_dict()
        for _ in range(6):
            broken = dict(weights)
            for i in torch.randperm(len(weights))[: int(torch.randint(1, 9, ()))]:
                name, value = list(weights.items())[i]
                shapes = [value[None], value.flatten()[:3], torch.zeros(0), value.new_zeros(2, *value.shape)]
                broken[name] = [*shapes, "text", None][int(torch.randint(6, ()))]
            line = refused(capsys, tmp_path / "a.pth", {"state_dict": broken})
            assert "a.pth: " in line


# ------------------------------------------------------------------------------------- safetensors, Hugging Face
def saved(folder, weights, name="model.safetensors", **config):
    folder.mkdir(exist_ok=True)
    with open(folder / name, "wb") as file:
        write_safetensors(weights, file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_folders_of_hugging_face(tmp_path, capsys):
    """A file, or its folder, with what is written beside it: heads, mean and standard deviation."""
    network = lively(ViT(96, 2, 3, 8, 32, "learned"))
    folder = saved(tmp_path / "vit", transformers(network) | head("pooler.dense.weight"), num_attention_heads=3)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}')
    for path in (folder, folder / "model.safetensors"):
        backbone, meta = load_backbone(path)
        assert same(backbone, network) and meta["mean"] == [0.5, 0.4, 0.3] and meta["std"] == [0.1, 0.2, 0.3]
    out = capsys.readouterr().out
    assert "3 heads, tensors" in out and "normalised" not in out
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    assert "number of heads is not known" in refused(capsys, tmp_path / "alone.safetensors")
    usual = {"mean": [0.5] * 3, "std": [0.5] * 3}
    _, meta = load_backbone(saved(tmp_path / "timm", LEARNED.state_dict(), pretrained_cfg=usual))
    assert meta["mean"] == meta["std"] == [0.5] * 3
    for text in ("[1, 2]", "no json", '{"image_mean": "x", "image_std": [1], "num_attention_heads": "x"}'):
        (tmp_path / "timm" / "config.json").write_text(text)
        assert load_backbone(tmp_path / "timm")[1]["mean"] == IMAGENET["mean"]
    folder = saved(tmp_path / "act", transformers(LEARNED), num_attention_heads=3, hidden_act="gelu_new")
    assert "config.json has hidden_act gelu_new" in refused(capsys, folder)
    folder = saved(tmp_path / "caffe", transformers(RESNET), downsample_in_bottleneck=True)
    assert "config.json has downsample_in_bottleneck True" in refused(capsys, folder)


def test_weights_in_several_files(tmp_path, capsys):
    weights = transformers(RESNET)
    first = {k: v for k, v in weights.items() if "stages.3" not in k}
    second = {k: v for k, v in weights.items() if "stages.3" in k}
    saved(tmp_path / "a", first, "model-00001-of-00002.safetensors")
    saved(tmp_path / "a", second, "model-00002-of-00002.safetensors")
    assert same(load_backbone(tmp_path / "a")[0], RESNET)
    torch.save(weights, saved(tmp_path / "b", {}, "other.safetensors") / "pytorch_model.bin")
    assert same(load_backbone(tmp_path / "b")[0], RESNET)
    (tmp_path / "a" / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "a holds model-00002-of-00002.safetensors, which is a Git LFS pointer" in refused(capsys, tmp_path / "a")


def test_numbers_of_safetensors(tmp_path, capsys):
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        weights = {k: v.to(kind) if v.is_floating_point() else v for k, v in BASIC.state_dict().items()}
        backbone, _ = load_backbone(saved(tmp_path, weights))
        expected = {k: v.float() for k, v in weights.items()}
        assert all(torch.equal(v.float(), expected[k]) for k, v in backbone.state_dict().items())
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    assert "a has numbers of type F8_E4M3" in refused(capsys, tmp_path)


# --------------------------------------------------------------------------------------------- what a file does not say
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_first_layer_of_two_channels_sees_edges(prefix, tmp_path, capsys):
    """As MMSelfSup's DeepCluster has it, whose filter is not in the file or stands beside the network."""
    network = lively(resnet("resnet18", 0.125, 224, input_filter=deepcluster.sobel_filter(3)))
    weights = {k: v for k, v in under(prefix, network).items() if "input_filter" not in k}
    content = {"state_dict": weights | head(f"{prefix}sobel_layer.sobel.0.weight"), "author": "MMSelfSup"}
    backbone, meta = loaded(tmp_path / "a.pth", content | {"meta": {}})
    assert torch.equal(backbone.input_filter, deepcluster.sobel_filter(3)) and meta["channels"] == 3
    network.input_filter.copy_(deepcluster.sobel_filter(3))  # which lively had changed
    assert same(backbone, network) and meta["method"] == "DeepCluster"
    assert "of edges (Sobel: conv1 has 2 channels; --channels 2 if the images have two)" in capsys.readouterr().out
    backbone, meta = load_backbone(tmp_path / "a.pth", channels=2)
    assert backbone.input_filter is None and meta["channels"] == 2 and meta["method"] != "DeepCluster"
    assert "--channels 1" in refused(capsys, tmp_path / "a.pth", channels=1)


def test_copies_are_named_and_can_be_chosen(tmp_path, capsys):
    cut = dict(list(under("", BASIC, 1.0).items())[:3])
    content = {"state_dict": under("", BASIC), "state_dict_ema": under("", BASIC, 2.0), "last": {"model": cut}}
    assert same(loaded(tmp_path / "a.pth", content)[0], BASIC)
    assert (
        "taken is state_dict; the file also has state_dict_ema, last.model (--pretrained-key" in capsys.readouterr().out
    )
    backbone, _ = load_backbone(tmp_path / "a.pth", key="state_dict_ema")
    assert torch.equal(backbone.bn1.bias, BASIC.bn1.bias + 2)
    assert "no whole backbone under --pretrained-key last; there is state_dict" in refused(
        capsys, tmp_path / "a.pth", key="last"
    )
    init_from(tmp_path / "a.pth", Method(resnet("resnet18", 0.125, 224)))
    assert "(export.py --pretrained-key takes another)" in capsys.readouterr().out
    loaded(tmp_path / "a.pth", {"state_dict": under("backbone.", BASIC) | under("encoder_q.0.", BASIC)})
    assert "taken is" not in capsys.readouterr().out, "one network under two names"
    content = {"state_dict": under("module.encoder_q.", BASIC) | under("module.encoder_k.", BASIC, 1.0)}
    torch.save(content, tmp_path / "a.pth")
    backbone, meta = load_backbone(tmp_path / "a.pth", key="encoder_k")
    assert torch.equal(backbone.bn1.bias, BASIC.bn1.bias + 1) and meta["method"] == "unknown"


def test_copies_in_our_own_files(tmp_path):
    """The target network of a run has the settings of the backbone."""
    model = {"backbone." + k: v for k, v in LEARNED.state_dict().items()} | under("target.", LEARNED, 1.0)
    meta = {"method": "byol", "arch": "vit_tiny", "mean": [0.1] * 3, "std": [0.2] * 3, **LEARNED.config}
    torch.save({"model": model, "backbone_prefix": "backbone.", "meta": meta}, tmp_path / "last.pt")
    assert same(load_backbone(tmp_path / "last.pt")[0], LEARNED)
    backbone, told = load_backbone(tmp_path / "last.pt", key="target")
    assert (
        torch.equal(backbone.norm.bias, LEARNED.norm.bias + 1)
        and told["method"] == "byol"
        and told["mean"] == [0.1] * 3
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path, capsys):
    weights = under("", BASIC)
    weights["layer2.0.bn1.bias"] = weights["layer2.0.bn1.bias"].clone()
    weights["layer2.0.bn1.bias"][1] = value
    words = "layer2.0.bn1.bias holds numbers that are not finite"
    assert words in refused(capsys, tmp_path / "a.pth", {"model": weights})
    assert words in helpers.refused(capsys, init_from, tmp_path / "a.pth", Method(resnet("resnet18", 0.125, 224)))


def test_unusual_depth_is_named(tmp_path, capsys):
    loaded(tmp_path / "a.pth", lively(ViT(384, 11, 6, 8, 32)).state_dict())
    assert "vit_small, 11 blocks instead of 12, patches of 8" in capsys.readouterr().out


def test_given_mean_and_deviation(tmp_path, capsys):
    torch.save(LEARNED.state_dict(), tmp_path / "a.pth")
    _, meta = load_backbone(tmp_path / "a.pth", mean=[0.5], std=[0.1, 0.2, 0.3])
    assert meta["mean"] == [0.5] * 3 and meta["std"] == [0.1, 0.2, 0.3]
    assert "normalised" not in capsys.readouterr().out
    assert "--mean: 2 numbers for images of 3 channels" in refused(capsys, tmp_path / "a.pth", mean=[0.5, 0.5])
    _, meta = load_backbone("random", "resnet18", 0.125, 32, channels=1, mean=[0.5], std=[0.5])
    assert meta["mean"] == meta["std"] == [0.5]
    words = ["--pretrained", tmp_path / "a.pth", *"--data fake:64 --k 5 --workers 0 --mean 0.5 --std 0.5".split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main("eval_knn", *words)["method"] == "unknown"


# ------------------------------------------------------------------------------------------------- why --init refuses
def test_init_says_why_and_what_would_help(tmp_path, capsys):
    for file, model, words in (
        (resnet("resnet18", 0.125, 224), resnet("resnet18", 0.125, 64),
            "images of at most 64 px get a 3x3 stem, the file has 7x7: --image-size 96; only 119/120"),
        (STEM, resnet("resnet18", 0.125, 96), "images above 64 px get a 7x7 stem, the file has 3x3: --image-size 64"),
        (BASIC, resnet("resnet50", 0.125, 96), "the file has resnet18, this model is resnet50: --arch resnet18"),
        (BASIC, resnet("resnet18", 0.25, 96), "the file has width 0.125, this model 0.25: --width 0.125"),
        (BASIC, resnet("resnet18", 0.125, 96, channels=4), "for images of 3 channels, this model for 4: --channels 3"),
        (LEARNED, resnet("resnet18", 0.125, 96), "the file has vit_tiny, this model is resnet18: --arch vit_tiny"),
        (LEARNED, vit("vit_tiny", 32, patch_size=4, depth=2), "patches of 8 pixels, this model of 4: --patch-size 8"),
        (LEARNED, vit("vit_tiny", 32, patch_size=8, depth=3), "the file has 2 blocks, this model 3: --depth 2"),
        (BASIC, resnet("resnet18", 0.125, 96, input_filter=deepcluster.sobel_filter(3)), "through a fixed filter"),
    ):  # fmt: skip
        torch.save(file.state_dict(), tmp_path / "a.pth")
        assert words in helpers.refused(capsys, init_from, tmp_path / "a.pth", Method(model))


@pytest.mark.parametrize("build", [lambda c: resnet("resnet18", 0.125, 32, channels=c),
    lambda c: vit("vit_tiny", 32, patch_size=8, depth=1, channels=c)])  # fmt: skip
def test_init_adapts_the_first_layer(build, tmp_path, capsys):
    """Grey images give what they gave as three equal channels; three channels give what their mean gave."""
    colour, grey = lively(build(3)), lively(build(1))
    for file, channels in ((colour, 1), (grey, 3), (grey, 5)):
        torch.save(file.state_dict(), tmp_path / "a.pth")
        model = Method(build(channels))
        init_from(tmp_path / "a.pth", model)
        images = IMAGES[:, :1].expand(-1, channels, -1, -1) * torch.rand(channels)[:, None, None]
        same_there = images.expand(-1, 3, -1, -1) if channels == 1 else images.mean(1, keepdim=True)
        torch.testing.assert_close(model.backbone.eval()(images), file(same_there), rtol=1e-4, atol=1e-4)
        was = 3 if file is colour else 1
        assert f"first layer for {channels} channels instead of {was}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["backbone.pt", "last.pt"])
def test_our_own_files_name_their_method(tmp_path, capsys, name):
    train("byol", tmp_path, "--max-steps", 1)
    capsys.readouterr()
    _, meta = load_backbone(tmp_path / name)
    assert meta["method"] == "byol" and f"{name}: byol, resnet18" in capsys.readouterr().out
