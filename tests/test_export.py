"""export.py: other libraries read what it writes, as a user runs it."""

import argparse
import hashlib
import json
import pickle
import re
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common.augment import EvalView
from common.checkpoint import load_backbone
from common.conv4 import conv4
from common.datasets import open_dataset
from common.loader import eval_batches
from common.networks import Library
from common.resnet import resnet
from common.swin import swin
from common.vit import ViT, vit
from common.xcit import xcit
from tests.helpers import ROOT, command, main, refused, train

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run(source, target, out, *more):
    """The path that export.py's main wrote."""
    return main("export", "--pretrained", source, "--to", target, "--out", out, *more)


@pytest.fixture
def moco(tmp_path):
    """A ResNet-18 as MoCo stores it, and the file."""
    torch.manual_seed(0)
    network = resnet("resnet18")
    for name, value in network.state_dict().items():
        if "running" in name:
            value.copy_(torch.rand_like(value) + 0.5)
    state = {f"module.encoder_q.{k}": v for k, v in network.state_dict().items()}
    torch.save({"state_dict": {**state, "module.queue": torch.ones(128, 1000)}}, tmp_path / "moco.pth.tar")
    return network.eval(), tmp_path / "moco.pth.tar"


# ----------------------------------------------------------------------------------------------------- ResNets
def test_torchvision_misses_only_the_classifier(moco, tmp_path, capsys):
    network, file = moco
    out = run(file, "torchvision", tmp_path / "a.pth")
    theirs = torchvision.models.resnet18()
    result = theirs.load_state_dict(torch.load(out, weights_only=True), strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and result.unexpected_keys == []
    theirs.fc = nn.Identity()
    torch.testing.assert_close(theirs.eval()(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4)
    # without its classifier of 513,000, torchvision's 11,689,512 parameters are 11.18 M; 9,600 statistics and the queue
    text = capsys.readouterr().out
    assert "backbone 11.18 M, of them trainable 11.18 M" in text and "11.31 M numbers in all" in text
    assert hashlib.sha256(out.read_bytes()).hexdigest() in text


def test_the_whole_of_a_resnet50(tmp_path):
    with torch.device("meta"):
        theirs = torchvision.models.resnet50()
    torch.save(resnet("resnet50", 0.0625).state_dict(), tmp_path / "own.pth")
    written = torch.load(run(tmp_path / "own.pth", "torchvision", tmp_path / "a.pth"), weights_only=True)
    assert set(theirs.state_dict()) - set(written) == {"fc.weight", "fc.bias"} and len(written) == 318


# Our names and detectron2's, written out from its ResNet: every kind of tensor that a bottleneck network has.
DETECTRON2 = """
conv1.weight stem.conv1.weight  bn1.weight stem.conv1.norm.weight  bn1.bias stem.conv1.norm.bias
bn1.running_mean stem.conv1.norm.running_mean  layer1.0.conv1.weight res2.0.conv1.weight
layer1.0.bn1.weight res2.0.conv1.norm.weight  layer1.0.conv2.weight res2.0.conv2.weight
layer1.0.bn2.bias res2.0.conv2.norm.bias  layer1.0.downsample.0.weight res2.0.shortcut.weight
layer1.0.downsample.1.running_var res2.0.shortcut.norm.running_var  layer2.3.conv3.weight res3.3.conv3.weight
layer2.3.bn3.running_var res3.3.conv3.norm.running_var  layer3.5.bn1.running_mean res4.5.conv1.norm.running_mean
layer4.2.conv1.weight res5.2.conv1.weight  layer4.0.downsample.1.weight res5.0.shortcut.norm.weight
""".split()


def test_detectron2_pickle(tmp_path):
    network = resnet("resnet50", 0.0625)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    with open(run(tmp_path / "own.pth", "detectron2", tmp_path / "a.pkl"), "rb") as file:
        content = pickle.load(file, encoding="latin1")
    assert content["matching_heuristics"] is True and isinstance(content["__author__"], str)
    own, model = network.state_dict(), content["model"]
    for ours, theirs in zip(DETECTRON2[::2], DETECTRON2[1::2], strict=True):
        assert isinstance(model[theirs], np.ndarray) and np.array_equal(model[theirs], own[ours].numpy()), theirs
    assert len(model) == 53 * 5  # convolutions, each with a batch norm of four; counters are left out
    stages = {name.split(".")[0] for name in model}
    assert stages == {"stem", "res2", "res3", "res4", "res5"}
    assert not any(word in name for name in model for word in ("layer", "bn", "downsample", "batches"))


def test_mmdet_file(moco, tmp_path):
    network, file = moco
    content = torch.load(run(file, "mmdet", tmp_path / "a.pth"), weights_only=True)
    assert content.keys() == {"meta", "state_dict"} and content["meta"]["arch"] == "resnet18"
    assert content["state_dict"].keys() == network.state_dict().keys()


# -------------------------------------------------------------------------------------------------------- ViTs
def test_vit_for_torchvision(tmp_path):
    """Names and order of queries, keys and values: torchvision's network gives the same features."""
    torch.manual_seed(0)
    network = vit("vit_tiny", 32, patch_size=8, depth=2)
    for value in network.state_dict().values():
        value.add_(torch.rand_like(value) * 0.1 - 0.05)
    torch.save({"model": network.state_dict()}, tmp_path / "mae.pth")
    out = run(tmp_path / "mae.pth", "torchvision", tmp_path / "a.pth")
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 3, 192, 768)
    result = theirs.load_state_dict(torch.load(out, weights_only=True), strict=False)
    assert result.missing_keys == ["heads.head.weight", "heads.head.bias"] and result.unexpected_keys == []
    theirs.heads = nn.Identity()
    torch.testing.assert_close(theirs.eval()(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4)


TIMM = """cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias
blocks.0.norm1.weight blocks.0.norm1.bias blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias blocks.0.attn.proj.weight
blocks.0.attn.proj.bias blocks.0.norm2.weight blocks.0.norm2.bias blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias
blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias"""


def test_vit_for_timm(tmp_path, capsys):
    network = ViT(384, 1, 12, 8, 32, "sincos-yx")
    weights = {f"module.base_encoder.{k}": v for k, v in network.state_dict().items()}
    torch.save({"state_dict": weights | {"module.base_encoder.head.0.weight": torch.ones(2)}}, tmp_path / "v3.pth")
    written = torch.load(run(tmp_path / "v3.pth", "timm", tmp_path / "a.pth"), weights_only=True)
    assert set(written) == set(TIMM.split())
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in written.items())
    out = capsys.readouterr().out
    assert "note        12 attention heads, patches of 8, images of 32 pixels" in out
    # the frozen table of positions, 17 x 384, is not trained
    total = sum(p.numel() for p in network.parameters())
    assert f"backbone {total / 1e6:.2f} M, of them trainable {(total - 17 * 384) / 1e6:.2f} M" in out


# ------------------------------------------------------------------------------------------- what is printed runs
def lively(network):
    """Statistics, scales and shifts that a network which has learned may have."""
    torch.manual_seed(0)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.mul_(1 + 0.2 * torch.rand_like(value)).add_(0.1 * torch.rand_like(value) * (value.ndim < 2))
    return network.eval()


NETWORKS = {
    "large stem": lambda: resnet("resnet18"),
    "small stem": lambda: resnet("resnet50", image_size=32),
    "narrow": lambda: resnet("resnet18", 0.25, 32),
    "grey": lambda: resnet("resnet18", channels=1),
    "edges": lambda: resnet("resnet18", 0.125, input_filter=torch.rand(2, 3, 3, 3)),
    "no first relu": lambda: without_relu(resnet("resnet18")),
    "vit": lambda: vit("vit_tiny", 32, 0.25, patch_size=8, depth=2, heads=2),
    "vit of means": lambda: vit("vit_tiny", 32, 0.25, 8, 2, positions="learned", pool="mean", layer_scale=0.1),
    "bare vit": lambda: vit("vit_tiny", 32, 0.25, 8, 2, pool="norm-mean", class_token=False),
    "grey vit": lambda: vit("vit_tiny", 32, 0.25, patch_size=8, depth=2, channels=1),
    "relative": lambda: vit("vit_tiny", 32, 0.25, 8, 2, positions="none", relative="shared", layer_scale=0.1),
    "swin": lambda: swin("swin_tiny", 32, 0.25, depths=(1, 1, 1, 1)),
    "xcit": lambda: xcit("xcit_small_12", 32, 0.25, depth=1),
    "library": lambda: Library("torchvision:squeezenet1_1", image_size=32),
    "timm": lambda: Library("timm:test_vit", image_size=32, channels=2),
}
FORMATS = {  # what a file's name decides, and the names in torchvision and timm
    "pt2": ["narrow", "edges", "no first relu", "vit", "vit of means", "relative", "swin", "xcit", "library", "timm"],
    "onnx": ["narrow", "vit", "edges"],
    "torchvision": ["large stem", "small stem", "grey", "no first relu", "vit", "grey vit", "library"],
    "timm": [
        "large stem",
        "small stem",
        "grey",
        "no first relu",
        "vit",
        "vit of means",
        "bare vit",
        "grey vit",
        "timm",
    ],
    "safetensors": ["large stem"],
}
USED = [(target, name) for target, names in FORMATS.items() for name in names]


def without_relu(network):
    network.relu = nn.Identity()
    return network


@pytest.mark.parametrize("target, name", USED, ids=[f"{target}-{name}" for target, name in USED])
def test_the_printed_lines_compute_the_features(target, name, tmp_path, capsys):
    """Exactly what is printed, run elsewhere, gives the features of this network, for batches of any size."""
    needed = {"onnx": ["onnxruntime", "onnxscript"], "timm": ["timm"], "safetensors": ["safetensors"]}.get(target, [])
    for library in [*needed, *(["timm"] if name == "timm" else [])]:
        pytest.importorskip(library)
    network = lively(NETWORKS[name]())
    channels = 1 if "grey" in name else 2 if name == "timm" else 3
    mean, std = [0.3, 0.4, 0.5][:channels], [0.2, 0.25, 0.3][:channels]
    is_vit = isinstance(network, ViT)
    meta = {"method": "x", "arch": getattr(network, "arch", "vit_tiny" if is_vit else "resnet18"), "mean": mean}
    meta |= {"arch": {"small stem": "resnet50", "swin": "swin_tiny", "xcit": "xcit_small_12"}.get(name, meta["arch"])}
    meta |= {
        "width": 0.25 if name in ("narrow", "swin", "xcit") or is_vit else 0.125 if name == "edges" else 1.0,
        "std": std,
    }
    meta |= {"image_size": 32, "channels": channels} | getattr(network, "config", {})
    source = {"backbone": network.state_dict(), "meta": meta}
    if name == "no first relu":  # as lightly's own networks have it, in a file without meta
        names = {"conv1.": "0.", "bn1.": "1.", **{f"layer{i}.": f"{i + 1}." for i in range(1, 5)}}
        source = {f"backbone.{next(v + k[len(n):] for n, v in names.items() if k.startswith(n))}": value
                  for k, value in network.state_dict().items()}  # fmt: skip
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    torch.save(source, tmp_path / "own.pt")
    file = tmp_path / {"pt2": "a.pt2", "onnx": "a.onnx", "safetensors": "a.safetensors"}.get(target, "a.pth")
    words = ["--to", target] if target in ("torchvision", "timm") else []
    main("export", "--pretrained", tmp_path / "own.pt", "--out", file, *words)
    printed = capsys.readouterr().out
    assert printed.count("to use it:\n") == 1
    code = textwrap.dedent(printed.partition("to use it:\n")[2])
    assert "common" not in code and "# images (B," in code
    size = 224 if name == "no first relu" else 32
    statistics = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    mean, std = statistics
    for batch in (1, 3):
        images = torch.rand(batch, channels, size, size)
        scope = {"images": images}
        with torch.no_grad():
            exec(code, scope)
            expected = network((images - mean) / std)
        assert expected.shape == (batch, network.dim) and expected.std() > 1e-4
        scale = expected.abs().max().item()
        torch.testing.assert_close(torch.as_tensor(scope["features"]), expected, rtol=1e-5, atol=1e-5 * max(1, scale))


def test_relative_positions_go_to_no_other_library(tmp_path, capsys):
    network = NETWORKS["relative"]()
    meta = {"arch": "vit_tiny", "width": 0.25, "image_size": 32, "channels": 3, "method": "x", **network.config}
    torch.save({"backbone": network.state_dict(), "meta": meta}, tmp_path / "own.pt")
    for target in ("timm", "torchvision"):
        words = ["--pretrained", tmp_path / "own.pt", "--to", target, "--out", tmp_path / "a.pth"]
        assert f"--to {target}: its ViT has fixed or learned positions" in refused(capsys, main, "export", *words)


def test_lines_of_the_readme(tmp_path):
    """A backbone in somebody's own code: the lines as they stand there, but for the path."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"((?:^(?: {4}|$).*\n)*^    .*import load_backbone\n(?:^(?: {4}|$).*\n)*)", text, re.M)
    if not found:
        pytest.skip("the README shows no such lines")
    network = lively(resnet("resnet18", 0.25, 32))
    meta = {"arch": "resnet18", "width": 0.25, "image_size": 32, "channels": 3, "mean": [0.3] * 3, "std": [0.2] * 3}
    torch.save({"backbone": network.state_dict(), "meta": meta}, tmp_path / "backbone.pt")
    code = re.sub(r'"runs/[^"]*"', repr(str(tmp_path / "backbone.pt")), textwrap.dedent(found[1]))
    scope = {"images": IMAGES}
    exec(code, scope)
    torch.testing.assert_close(scope["features"], network((IMAGES - 0.3) / 0.2), rtol=1e-5, atol=1e-5)


def test_program_gives_the_rows_of_features_py(tmp_path, capsys):
    """A file of a short run: the exported program and features.py agree on the images of a data set."""
    train("simsiam", tmp_path, "--max-steps", 2, "--image-size", 32, "--data", "digits", "--lr", 1)
    main("features", "--pretrained", tmp_path / "backbone.pt", "--data", "digits", "--workers", 0, "--out", tmp_path)
    main("export", "--pretrained", tmp_path / "backbone.pt", "--out", tmp_path / "net.pt2")
    network = torch.export.load(tmp_path / "net.pt2").module()
    data, view = open_dataset("digits", "val"), EvalView(32, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.cat([x for x, _, _ in eval_batches(data, view, 100, torch.device("cpu"), 0)])
    rows = torch.from_numpy(np.load(tmp_path / "features.npy"))
    assert len(images) == len(rows) > 300 and rows.std() > 1e-3
    torch.testing.assert_close(network(images).detach(), rows, rtol=1e-5, atol=1e-5)


def test_networks_that_a_library_lacks(tmp_path, capsys, monkeypatch):
    """The weights are written all the same, for whoever builds the network; a line names the way that needs none."""
    torch.save(resnet("resnet18", 0.25, 32).state_dict(), tmp_path / "own.pth")
    for target in ("torchvision", "timm", "mmdet"):
        run(tmp_path / "own.pth", target, tmp_path / f"{target}.pth")
        out = capsys.readouterr().out
        assert "to use it" not in out and "one that runs by itself is written by --out NAME.pt2" in out
    network = swin("swin_tiny", 32, 0.25, depths=(1, 1, 1, 1))
    meta = {"arch": "swin_tiny", "width": 0.25, "image_size": 32, "channels": 3} | network.config
    torch.save({"backbone": network.state_dict(), "meta": meta}, tmp_path / "swin.pt")
    words = ["--pretrained", tmp_path / "conv4.pt", "--out", tmp_path / "b.pth"]
    meta = {"arch": "conv4", "width": 0.25, "image_size": 32, "channels": 3}
    torch.save({"backbone": conv4("conv4", 32, 0.25).state_dict(), "meta": meta}, tmp_path / "conv4.pt")
    assert "b.pth: weights of conv4 get no other names here: the name must end in .pt2 or .onnx" in refused(
        capsys, main, "export", *words
    )
    words[1] = tmp_path / "swin.pt"
    main("export", *words)
    assert "layers.3.downsample.norm.weight" in torch.load(tmp_path / "b.pth")  # timm's, as of a ViT
    monkeypatch.setattr(torch.export, "export", lambda *args, **more: 1 / 0)
    message = refused(capsys, main, "export", *words[:3], tmp_path / "b.pt2")
    assert "--to pt2: PyTorch's exporter cannot take swin_tiny (division by zero): write its weights" in message
    squeeze = Library("torchvision:squeezenet1_1", image_size=32)
    meta = {"arch": squeeze.arch, "width": 1.0, "image_size": 32, "channels": 3}
    torch.save({"backbone": squeeze.state_dict(), "meta": meta}, tmp_path / "library.pt")
    for target, name in (("timm", "a.pth"), ("mmdet", "a.pth"), ("detectron2", "a.pkl")):
        message = refused(capsys, run, tmp_path / "library.pt", target, tmp_path / name)
        assert f"--to {target}: there is no torchvision:squeezenet1_1 with these names; --to pt2 writes any" in message


def test_configurations_of_detection(moco, tmp_path, capsys, monkeypatch):
    """What is printed for detectron2 and MMDetection, run against stand-ins for the two."""
    cfg = SimpleNamespace(INPUT=SimpleNamespace(), MODEL=SimpleNamespace(RESNETS=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "detectron2", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "detectron2.config", SimpleNamespace(get_cfg=lambda: cfg))
    out = run(moco[1], "detectron2", tmp_path / "a.pkl")
    exec(textwrap.dedent(capsys.readouterr().out.partition("to use it:\n")[2]), {})
    assert (cfg.INPUT.FORMAT, cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH) == ("RGB", str(out), 18)
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False and cfg.MODEL.RESNETS.RES2_OUT_CHANNELS == 64
    # the pixel statistics that both projects have for ImageNet in their own configurations
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53] and cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    scope = {}
    out = run(moco[1], "mmdet", tmp_path / "a.pth")
    exec(textwrap.dedent(capsys.readouterr().out.partition("to use it:\n")[2]), scope)
    assert scope["backbone"]["depth"] == 18 and scope["backbone"]["init_cfg"]["checkpoint"] == str(out)
    assert scope["data_preprocessor"] == {"mean": cfg.MODEL.PIXEL_MEAN, "std": cfg.MODEL.PIXEL_STD, "bgr_to_rgb": True}


# ------------------------------------------------------------------------------------------------- publication
def test_published_name_passes_the_check_of_torch_hub(tmp_path):
    """torch.hub hashes what it downloads and compares with the digits in the name; a wrong digit is found."""
    torch.save(resnet("resnet18", 0.125, 32).state_dict(), tmp_path / "own.pth")
    out = run(tmp_path / "own.pth", "torchvision", tmp_path / "moco-v2.1.pth", "--publish")
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert out.name == f"moco-v2_1-{digest[:8]}.pth"
    assert not (tmp_path / "moco-v2.1.pth").exists() and not list(tmp_path.glob("*.tmp"))
    fetched = torch.hub.load_state_dict_from_url(
        out.as_uri(), model_dir=str(tmp_path / "hub"), check_hash=True, progress=False, weights_only=True
    )
    assert fetched.keys() == resnet("resnet18", 0.125, 32).state_dict().keys()
    wrong = tmp_path / "moco-00000000.pth"
    wrong.write_bytes(out.read_bytes())
    with pytest.raises(RuntimeError, match="invalid hash"):
        torch.hub.load_state_dict_from_url(
            wrong.as_uri(), model_dir=str(tmp_path / "hub"), check_hash=True, progress=False
        )


def test_round_trip_and_equal_bytes(tmp_path, capsys):
    """What was exported is read again, and the same network gives the same file."""
    network = resnet("resnet18", 0.125, 32).eval()
    torch.save(network.state_dict(), tmp_path / "own.pth")
    for target in ("torchvision", "timm", "mmdet"):
        first = run(tmp_path / "own.pth", target, tmp_path / f"{target}.pth")
        backbone, _ = load_backbone(first)
        assert torch.equal(backbone.eval()(IMAGES), network(IMAGES))
        assert run(tmp_path / "own.pth", target, tmp_path / "again.pth").read_bytes() == first.read_bytes()
    out = capsys.readouterr().out
    assert "3x3 stem: conv1 has stride 1 and padding 1, there is no max-pooling" in out
    assert "width 0.125: every layer has 0.125 times" in out


def test_safetensors(moco, tmp_path):
    """Against the format's description: a length, JSON, and the numbers, which are read again here and by others."""
    network, file = moco
    out = run(file, "torchvision", tmp_path / "model.safetensors")
    data = out.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + size]), data[8 + size :]
    assert header.pop("__metadata__") == {"format": "pt"} and (8 + size) % 8 == 0
    own = network.state_dict()
    assert header.keys() == own.keys()
    ends = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == ends and begin % own[name].itemsize == 0, "without gaps, aligned"
        kind = {"F32": np.float32, "I64": np.int64}[entry["dtype"]]
        assert np.array_equal(np.frombuffer(numbers[begin:end], kind).reshape(entry["shape"]), own[name].numpy()), name
        ends = end
    assert ends == len(numbers)
    backbone, _ = load_backbone(out)
    assert torch.equal(backbone.eval()(IMAGES), network(IMAGES))
    assert run(file, "timm", tmp_path / "again.safetensors").read_bytes() == data


def test_one_of_several_copies(tmp_path, capsys):
    first, second = resnet("resnet18", 0.125, 32), resnet("resnet18", 0.125, 32)
    torch.save({"state_dict": first.state_dict(), "state_dict_ema": second.state_dict()}, tmp_path / "two.pth")
    for network, more in ((first, []), (second, ["--pretrained-key", "state_dict_ema"])):
        written = torch.load(run(tmp_path / "two.pth", "timm", tmp_path / "a.pth", *more), weights_only=True)
        assert torch.equal(written["conv1.weight"], network.conv1.weight)
    assert "the file also has state_dict_ema (--pretrained-key takes another)" in capsys.readouterr().out


def test_command_line(moco, tmp_path):
    words = ["--pretrained", moco[1], "--to", "torchvision", "--out", tmp_path / "new" / "a.pth"]
    done = command("export.py", *words, check=0)
    assert "tensors matched 120/120" in done.stdout and "120 tensors, torchvision" in done.stdout
    assert len(torch.load(tmp_path / "new" / "a.pth", weights_only=True)) == 120


# ---------------------------------------------------------------------------------------------------- mistakes
def test_mistakes_end_with_one_line(tmp_path, capsys, monkeypatch):
    file = tmp_path / "own.pth"
    torch.save(vit("vit_tiny", 32, patch_size=8, depth=1).state_dict(), file)
    for target, name in (("detectron2", "a.pkl"), ("mmdet", "a.pth")):
        assert f"--to {target}" in refused(capsys, run, file, target, tmp_path / name)
    assert "for detectron2 the name must end in .pkl" in refused(capsys, run, file, "detectron2", tmp_path / "a.pth")
    for name in ("a.pkl", "a.onnx", "a.npz", "a"):
        assert f"{name}: for timm the name must end in .pth or .pt" in refused(
            capsys, run, file, "timm", tmp_path / name
        )
    assert "for mmdet" in refused(capsys, run, file, "mmdet", tmp_path / "a.safetensors")
    assert "choose another name" in refused(capsys, run, file, "timm", file)
    assert "no such file" in refused(capsys, run, "random", "timm", tmp_path / "a.pth")
    assert "--arch resnet18" in refused(capsys, run, file, "timm", tmp_path / "a.pth", "--arch", "resnet18")
    assert "cannot be written" in refused(capsys, run, file, "timm", file / "a.pth")
    assert "--to" in refused(capsys, run, file, "torchscript", tmp_path / "a.pth")
    for target in ("onnx", "pt2"):
        assert f"for {target} the name must end in .{target}" in refused(capsys, run, file, target, tmp_path / "a.pth")
    for name in ("a", "a.npz", "a.onxx", "a.PTH", "a.pt2.zip"):
        words = ["--pretrained", file, "--out", tmp_path / name]
        assert f"{name}: for an export the name must end in .pt2 or .onnx or .pkl or .pth" in refused(
            capsys, main, "export", *words
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(capsys, run, file, "onnx", tmp_path / "a.onnx")
    assert "--to onnx needs onnx and onnxscript: pip install onnx onnxscript, or write a .pt2" in message
    torch.save(ViT(192, 1, 3, 8, 32, pool="mean").state_dict(), file)
    assert "mean pooling" in refused(capsys, run, file, "torchvision", tmp_path / "a.pth")
    edges = resnet("resnet18", 0.125, 32, input_filter=torch.rand(2, 3, 3, 3))
    torch.save({"backbone": edges.state_dict(), "meta": {"arch": "resnet18", "width": 0.125}}, file)
    assert "filtered images" in refused(capsys, run, file, "torchvision", tmp_path / "a.pth")
    torch.save({"model": edges.state_dict(), "args": argparse.ArgumentParser}, file)
    assert "--trust-pickle" in refused(capsys, run, file, "torchvision", tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["own.pth"], "nothing was written"
