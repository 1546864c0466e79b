"""Swins and XCiTs in evaluations: our own files, features, fine-tuning, layers."""

import json

import numpy as np
import pytest
import torch

import eval_finetune as ft
import eval_svm
from common import xcit as module
from common.checkpoint import load_backbone
from common.features import Features, usual_interpolation
from common.swin import swin
from common.xcit import xcit
from eval_linear import features
from tests.helpers import main, refused, rows

SHAPES = {
    "swin": ("swin_tiny", 0.25, lambda size=16: swin("swin_tiny", size, 0.25, 2, 4, (1, 2), channels=3, eps=1e-6)),
    "xcit": ("xcit_tiny_12", 0.125, lambda size=16: xcit("xcit_tiny_12", size, 0.125, 4, 2)),
}


@pytest.fixture(params=SHAPES)
def written(request, tmp_path):
    """(path of a backbone.pt, its network)"""
    torch.manual_seed(0)
    arch, width, make = SHAPES[request.param]
    network, path = make().eval(), tmp_path / "backbone.pt"
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    meta = {"method": "dino", "arch": arch, "width": width, "image_size": 16, "channels": 3}
    meta |= {"mean": [0.5] * 3, "std": [0.25] * 3, **network.config}
    torch.save({"backbone": network.state_dict(), "step": 3, "meta": meta}, path)
    return path, network


def test_own_files_say_all(written, capsys):
    path, network = written
    backbone, meta = load_backbone(path)
    x = rows(2, 3, 16, 16).float()
    assert torch.equal(backbone.eval()(x), network(x)) and meta["image_size"] == 16
    count = len(network.state_dict())
    assert f": dino, {meta['arch']}, width " in (out := capsys.readouterr().out)
    assert f"tensors matched {count}/{count}\n" in out
    assert {k: meta[k] for k in network.config} == network.config
    other, meta = load_backbone(path, image_size=24)  # the tables stay, windows may shift now
    assert meta["image_size"] == 24 and other(rows(2, 3, 24, 24).float()).isfinite().all()
    assert "--arch vit_tiny: " in refused(capsys, load_backbone, path, arch="vit_tiny")
    assert "--width 0.5: " in refused(capsys, load_backbone, path, width=0.5)
    broken = torch.load(path)
    broken["backbone"].pop(next(k for k in broken["backbone"] if k.endswith("fc2.bias")))
    torch.save(broken, path)
    assert f"only {count - 1}/{count} tensors match" in refused(capsys, load_backbone, path)


def test_shifts_follow_the_size_of_the_images(tmp_path):
    path, network = tmp_path / "backbone.pt", SHAPES["swin"][2]()
    meta = {"method": "x", "arch": "swin_tiny", "width": 0.25, "image_size": 16, **network.config}
    meta |= {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save({"backbone": network.state_dict(), "meta": meta}, path)
    for size, shifts in ((None, [0, 0, 0]), (32, [0, 0, 2]), (8, [0, 0, 0])):
        backbone, _ = load_backbone(path, image_size=size)
        assert [b.attn.shift for b in backbone.blocks] == shifts


def test_random_ones(capsys):
    for arch in ("swin_tiny", "xcit_tiny_12"):
        backbone, meta = load_backbone("random", arch, 0.25, 32)
        assert meta["arch"] == arch and meta["patch_size"] == (2 if "swin" in arch else 4)
        assert backbone(rows(1, 3, 32, 32).float()).shape == (1, backbone.dim)


def test_pooled_features_and_the_last_blocks(written, capsys):
    _, network = written
    name = network.pool
    assert Features(network).names == [name] and Features(network).dims == [network.dim]
    other = "cls" if name == "mean" else "mean"
    kind = type(network).__name__
    assert f"--features {other}: the features of {kind} are {name}" in refused(capsys, Features, network, [other])
    assert usual_interpolation(network) == "bicubic"
    levels = eval_svm.Levels(network, 16)
    assert levels.names == [name] and levels.dim == network.dim
    if name == "mean":
        x = rows(2, 3, 16, 16).float()
        (found,) = features(network, x, {"blocks"}, torch.autocast("cpu", enabled=False))["blocks"]
        assert found.shape == (2, 24 + 2 * 48)  # all three blocks: of four there are only these
        torch.testing.assert_close(found[:, -48:], network(x))


def test_evaluations(written, tmp_path):
    path, network = written
    common = ["--pretrained", path, "--workers", "0", "--out", tmp_path]
    main("features", "--data", "fake:20", *common[:4], "--out", tmp_path / "features")
    found = np.load(tmp_path / "features/features.npy")
    assert found.shape[1] == network.dim and np.isfinite(found).all() and found.std() > 0
    common = ["--data", "fake:64", *common]
    (scores,) = main("eval_knn", *common, "--k", "5")["knn"].values()
    assert scores["top1"] > 50, "classes of these images are tints"
    result = main("eval_linear", *common, "--protocol", "dino", "--epochs", "1", "--batch-size", "32")
    assert result["complete"]
    words = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "32", "--drop-path", "0.2"]
    result = main("eval_finetune", *common, *words)
    assert result["recipe"] == "vit" and json.loads((tmp_path / "eval_finetune.json").read_text()) == result
    main("eval_semi", *common, *words, "--labels", "50%")
    backbone, meta = load_backbone(tmp_path / "finetune_last.pt")
    assert meta["pool"] == network.pool and type(backbone) is type(network)


def test_layers_of_a_swin():
    """Official fine-tuning for masked images: embedding 0, blocks from 1, merging with the stage before it."""
    model = ft.Classifier(swin("swin_tiny", 32, 0.25, 2, depths=(2, 2, 4)), 10)
    ids = {name: ft.layer_id(name, 8, [2, 2, 4]) for name, _ in model.named_parameters()}
    assert model.depth == 8 and set(ids.values()) == set(range(10))
    assert {v for k, v in ids.items() if "patch_embed" in k} == {0}
    assert ids["backbone.layers.0.blocks.0.norm1.weight"] == 1 and ids["backbone.layers.1.blocks.1.attn.qkv.bias"] == 4
    assert (
        ids["backbone.layers.0.downsample.reduction.weight"] == 2 and ids["backbone.layers.1.downsample.norm.bias"] == 4
    )
    assert (
        ids["backbone.layers.2.blocks.3.mlp.fc2.weight"] == 8 and ids["backbone.norm.weight"] == ids["head.bias"] == 9
    )
    of = {id(p): g for g in ft.parameter_groups(model, 0.05, 0.5) for p in g["params"]}
    named = dict(model.named_parameters())
    assert len(of) == len(named) and of[id(named["backbone.layers.1.blocks.0.attn.qkv.weight"])]["scale"] == 0.5**6
    free = {name for name, p in named.items() if of[id(p)]["weight_decay"] == 0}
    assert {n for n in named if named[n].ndim > 1} & free == {n for n in named if n.endswith("bias_table")}


def test_layers_of_an_xcit_and_its_drop_path():
    model = ft.Classifier(xcit("xcit_tiny_12", 32, 0.125, depth=2), 10)
    ids = {name: ft.layer_id(name, model.depth, model.depths) for name, _ in model.named_parameters()}
    assert ids["backbone.pos_embeder.token_projection.weight"] == ids["backbone.patch_embed.proj.0.0.weight"] == 0
    assert ids["backbone.blocks.1.local_mp.bn.weight"] == 2 and ids["backbone.cls_attn_blocks.0.gamma1"] == 3
    assert model.path_factors is module.path_factors and model.draws == 6


@pytest.mark.parametrize("name, target", [("swin", "torchvision"), ("swin", "timm"), ("xcit", "timm")])
def test_weights_for_other_libraries(name, target, tmp_path, capsys):
    """The printed Python loads them strictly and gives the same features; read back they are what they were."""
    if target == "timm":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    if name == "swin":
        network = swin("swin_tiny", 64, 0.25, 4, 2 if target == "torchvision" else 4, (1, 2, 1, 1), eps=1e-6).eval()
    else:
        network = xcit("xcit_tiny_12", 64, 0.25, 8, 2).eval()
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    meta = {"arch": f"{name}_tiny" + "_12" * (name == "xcit"), "width": 0.25, "image_size": 64, "channels": 3}
    meta |= {"method": "x", "mean": [0.5] * 3, "std": [0.25] * 3, **network.config}
    torch.save({"backbone": network.state_dict(), "meta": meta}, tmp_path / "a.pt")
    main("export", "--pretrained", tmp_path / "a.pt", "--to", target, "--out", tmp_path / "b.pth")
    lines = capsys.readouterr().out.split("to use it:\n")[1].splitlines()
    scope = {"images": (images := torch.rand(2, 3, 64, 64))}
    exec("\n".join(line[4:] for line in lines if line.startswith("    ")), scope)
    expected = network((images - 0.5) / 0.25)
    torch.testing.assert_close(scope["features"], expected, atol=1e-5, rtol=1e-5)
    backbone, _ = load_backbone(tmp_path / "b.pth")
    torch.testing.assert_close(backbone.eval()((images - 0.5) / 0.25), expected, atol=1e-4, rtol=1e-4)  # but for eps


def test_windows_that_torchvision_lacks(tmp_path, capsys):
    network = swin("swin_tiny", 32, 0.25, 2, 4)  # 16, 8, 4, 2
    meta = {"arch": "swin_tiny", "width": 0.25, "image_size": 32, "channels": 3, "method": "x"}
    torch.save({"backbone": network.state_dict(), "meta": meta | network.config}, tmp_path / "a.pt")
    words = ["--pretrained", tmp_path / "a.pt", "--to", "torchvision", "--out", tmp_path / "b.pth"]
    assert "windows of one size in all stages; use --to timm" in refused(capsys, main, "export", *words)
