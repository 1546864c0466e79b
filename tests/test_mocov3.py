"""MoCo v3: the loss, heads and recipes for ResNets and ViTs, the frozen patches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mocov3
from common.networks import Library
from common.resnet import resnet
from tests.helpers import (
    EXACT,
    SMALL,
    assert_close,
    different,
    flags,
    launch,
    logged,
    parsed,
    records,
    rows,
    state,
    train,
)

VIT = ["--arch", "vit_tiny", "--width", "0.25", "--depth", "2"]  # dimension 48, 3 heads


def vit():
    torch.manual_seed(3)  # of TINY
    return mocov3.transformer("vit_tiny", 16, 0.25, depth=2)


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_equals_the_formula_in_numpy(temperature):
    q1, q2, k1, k2 = rows(4, 6, 5)
    total = 0.0
    for queries, keys in ((q1, k2), (q2, k1)):
        queries, keys = ([x / np.sqrt(np.dot(x, x)) for x in side.numpy()] for side in (queries, keys))
        for i, q in enumerate(queries):
            shares = [np.exp(np.dot(q, k) / temperature) for k in keys]
            total -= 2 * temperature * np.log(shares[i] / sum(shares))
    loss = mocov3.mocov3_loss(q1, q2, k1, k2, temperature).item()
    assert loss == pytest.approx(total / 6, abs=1e-10)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_of_equal_right_and_wrong_keys(temperature):
    e = torch.eye(6, dtype=torch.float64)
    same = e[:1].expand(5, -1)
    expected = 2 * 2 * temperature * math.log(5)
    assert mocov3.mocov3_loss(same, 3 * same, same, same, temperature).item() == pytest.approx(expected, abs=1e-12)
    a, b = 2 * e[:3], 7 * e[3:]  # the key of the other view at cosine 1, those of the two other images at 0
    right = 2 * 2 * temperature * math.log(1 + 2 * math.exp(-1 / temperature))
    assert mocov3.mocov3_loss(a, b, b, a, temperature).item() == pytest.approx(right, abs=1e-12)
    chance = 2 * 2 * temperature * math.log(3)  # keys of the own view are no candidates: everything is at cosine 0
    assert mocov3.mocov3_loss(a, b, a, b, temperature).item() == pytest.approx(chance, abs=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_mean_over_processes_is_the_loss_of_the_whole_batch(world, monkeypatch):
    """Each rank in turn, with a gather that knows what all the others hold."""
    q1, q2, k1, k2 = rows(4, 6, 5)
    whole = [x.clone().requires_grad_() for x in (q1, q2)]
    expected = mocov3.mocov3_loss(*whole, k1, k2, 0.2)
    expected.backward()
    parts = [x.clone().requires_grad_() for x in (q1, q2)]
    losses = []
    for r in range(world):
        monkeypatch.setattr(mocov3, "rank", lambda r=r: r)
        every = iter([k2, k1])

        def gather(own, r=r, every=every):
            keys = F.normalize(next(every), dim=1)
            assert torch.equal(own, keys.chunk(world)[r]) and not own.requires_grad
            return keys

        monkeypatch.setattr(mocov3, "gather", gather)
        own = [x.chunk(world)[r] for x in (*parts, k1, k2)]
        losses.append(mocov3.mocov3_loss(*own, 0.2))
    total = sum(losses) / world  # what DistributedDataParallel makes of them
    total.backward()
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ heads
HEADS = {  # position in the official heads: (inputs, outputs) of a linear layer, or what a batch norm holds
    "resnet": {
        "projector": {0: (64, 4096), 1: "affine", 3: (4096, 256), 4: "plain"},
        "predictor": {0: (256, 4096), 1: "affine", 3: (4096, 256)},
    },
    "vit": {
        "projector": {0: (48, 4096), 1: "affine", 3: (4096, 4096), 4: "affine", 6: (4096, 256), 7: "plain"},
        "predictor": {0: (256, 4096), 1: "affine", 3: (4096, 256), 4: "plain"},
    },
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_have_the_layers_of_the_official_files(kind):
    args = parsed("mocov3")
    model = mocov3.MoCoV3(vit() if kind == "vit" else resnet(*SMALL), args.dim, args.hidden_dim)
    expected = HEADS[kind] | {"target_projector": HEADS[kind]["projector"]}
    for head, layers in expected.items():
        keys, width = {}, None
        for i, layer in layers.items():
            if isinstance(layer, tuple):
                keys[f"{i}.weight"], width = layer[::-1], layer[1]  # no bias
                continue
            names = ["running_mean", "running_var", *(["weight", "bias"] if layer == "affine" else [])]
            keys |= {f"{i}.{name}": (width,) for name in names} | {f"{i}.num_batches_tracked": ()}
        assert {k: tuple(v.shape) for k, v in getattr(model, head).state_dict().items()} == keys
    if kind == "resnet":  # of a library, too, as the recipe goes by the name
        other = mocov3.MoCoV3(Library("torchvision:resnet18", image_size=32), args.dim, args.hidden_dim)
        assert len(other.projector) == len(model.projector) and len(other.predictor) == len(model.predictor)
    h = torch.randn(5, 256)
    hidden = F.relu(model.predictor[1](model.predictor[0](h)))  # ReLU inside, none at the end
    out = model.predictor[3](hidden)
    out = F.batch_norm(out, None, None, training=True) if kind == "vit" else out
    torch.testing.assert_close(model.predictor(h), out)


# ---------------------------------------------------------------------------------------------------- the ViT
def test_vit_starts_as_the_official_one():
    torch.manual_seed(0)
    backbone = mocov3.transformer("vit_tiny", 16, 0.5, 4, 2)
    d = 96
    for block in backbone.blocks:
        bound = math.sqrt(6 / (d + d))  # each of the three matrices; taken as one it would be sqrt(6 / (d + 3 d))
        for matrix in block.attn.qkv.weight.chunk(3):
            assert 0.99 * bound < matrix.abs().max() <= bound
            assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        for layer, fan in ((block.attn.proj, d + d), (block.mlp.fc1, d + 4 * d), (block.mlp.fc2, 4 * d + d)):
            bound = math.sqrt(6 / fan)
            assert 0.99 * bound < layer.weight.abs().max() <= bound
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert not layer.bias.any()
    patches = backbone.patch_embed.proj
    bound = math.sqrt(6 / (3 * 4 * 4 + d))
    assert 0.98 * bound < patches.weight.abs().max() <= bound and not patches.bias.any()
    assert 0.3e-6 < backbone.cls_token.std() < 3e-6
    positions = backbone.pos_embed[0, 1:].view(4, 4, d)  # rows, columns: the first half tells the row
    assert torch.equal(positions[:, :1, : d // 2].expand(-1, 4, -1), positions[:, :, : d // 2])
    assert torch.equal(positions[:1, :, d // 2 :].expand(4, -1, -1), positions[:, :, d // 2 :])
    assert not torch.equal(positions[0], positions[1]) and not backbone.pos_embed[0, 0].any()


def test_small_vit_is_the_official_one():
    """Parameters counted by hand: 12 blocks of 12 D^2 + 13 D; of them neither positions nor patches are trained."""
    args = parsed("mocov3", "--arch", "vit_small")
    assert args.heads == 12 and parsed("mocov3", "--arch", "vit_base").heads is None
    backbone = mocov3.transformer("vit_small", 224, heads=args.heads)
    d = 384
    fixed = 197 * d + 3 * 16 * 16 * d + d
    trained = 12 * (12 * d * d + 13 * d) + 2 * d + d  # blocks, last norm, class token
    assert sum(p.numel() for p in backbone.parameters()) == fixed + trained
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == trained
    assert [block.attn.heads for block in backbone.blocks] == [12] * 12
    assert (backbone.config["heads"], backbone.config["positions"], backbone.config["pool"]) == (12, "sincos-yx", "cls")


def test_patch_embedding_stays_random_unless_it_is_trained(tmp_path):
    words = [*VIT, "--max-steps", 4, "--lr", 0.1]
    start = vit().state_dict()
    frozen = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    for more, still in (([], frozen), (["--train-patch-embed"], {"pos_embed"})):
        model = train("mocov3", tmp_path / str(len(more)), *words, *more)["model"]
        for network in ("backbone", "target_backbone"):
            same = {name for name, value in start.items() if torch.equal(model[f"{network}.{name}"], value)}
            assert same == still, network


def test_vit_runs_on_two_processes_as_on_one(tmp_path):
    """From the command line, in double precision; what an evaluation needs to build the network is in the file."""
    words = [*VIT, *EXACT, "--max-steps", 3, "--lr", 0.1]
    launch(("mocov3", flags("mocov3", tmp_path / "two", *words)))
    one, two = train("mocov3", tmp_path / "one", *words), state(tmp_path / "two")
    assert "backbone.blocks.1.attn.qkv.weight" in one["model"]
    assert_close(one, two, rtol=1e-7, atol=1e-8)
    meta = state(tmp_path / "two", "backbone.pt")["meta"]
    expected = {"method": "mocov3", "arch": "vit_tiny", "width": 0.25, "image_size": 16, "patch_size": 2}
    assert meta.items() >= (expected | {"depth": 2, "heads": 3, "positions": "sincos-yx", "pool": "cls"}).items()


def test_interrupted_vit_continues_bit_for_bit(tmp_path):
    whole = train("mocov3", tmp_path / "a", *VIT, "--max-steps", 6)
    train("mocov3", tmp_path / "b", *VIT, "--max-steps", 3)
    assert different(whole, train("mocov3", tmp_path / "b", *VIT, "--max-steps", 6)) == []


# ------------------------------------------------------------------------------------------------- the recipes
@pytest.mark.parametrize(
    ("arch", "epochs", "lr", "weight_decay", "momentum"),
    [
        *[("resnet50", epochs, 0.6, 1e-6, 0.99) for epochs in (20, 100, 170)],
        *[("resnet18", epochs, 0.3, 1e-6, 0.99) for epochs in (180, 300)],
        *[("resnet101", epochs, 0.3, 1.5e-6, 0.996) for epochs in (800, 1000)],
        *[("vit_small", epochs, 1.5e-4, 0.1, 0.99) for epochs in (60, 300, 1000)],
    ],
)
def test_architecture_and_epochs_pick_the_published_recipe(arch, epochs, lr, weight_decay, momentum):
    args = parsed("mocov3", "--arch", arch, "--epochs", epochs)
    assert (args.lr, args.weight_decay, args.key_momentum) == (lr, weight_decay, momentum)
    rest = (args.optimizer, args.warmup_epochs, args.temperature, args.crop_min)
    assert rest == (("adamw", 40, 0.2, 0.08) if arch.startswith("vit") else ("lars", 10, 1.0, 0.2))
    assert (args.batch_size, args.momentum, args.dim, args.hidden_dim) == (4096, 0.9, 256, 4096)


def test_flags_come_before_the_recipe():
    args = parsed("mocov3", "--key-momentum", 0, "--weight-decay", 0, "--warmup-epochs", 0, "--temperature", 0.1)
    assert (args.arch, args.epochs, args.lr) == ("resnet50", 300, 0.3)
    assert (args.key_momentum, args.weight_decay, args.warmup_epochs, args.temperature) == (0, 0, 0, 0.1)
    assert parsed("mocov3", "--arch", "vit_small", "--heads", 6).heads == 6
    args = parsed("mocov3", "--optimizer", "adamw", "--lr", 0.1, "--weight-decay", 0.2)
    assert (args.optimizer, args.lr, args.weight_decay, args.temperature) == ("adamw", 0.1, 0.2, 1.0)


def test_adamw_decays_everything_that_is_trained(tmp_path):
    words = [*VIT, "--max-steps", 2, "--lr", 0.4, "--weight-decay", 0.003]
    (group,) = train("mocov3", tmp_path, *words)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.003, (0.9, 0.999))
    assert len(group["params"]) == sum(p.requires_grad for p in mocov3.MoCoV3(vit()).parameters())


def test_start_names_the_recipe_and_the_loss_of_chance(tmp_path, capsys):
    train("mocov3", tmp_path, "--max-steps", 1, "--accum", 2, "--temperature", 0.25)
    shown = capsys.readouterr().out
    assert "nearest published (100 epochs)" in shown and "lr          0.6 x 16/256 = 0.0375" in shown
    chance = 2 * 2 * 0.25 * math.log(8)  # 8 keys to choose from: those of a micro-batch
    assert f"ln(8) = {chance:.2f}" in shown
    share = records(tmp_path)[1]["loss"] / chance
    assert f"of chance {share:.0%}" in shown and 0.5 < share < 2
    assert logged(tmp_path)[0]["args"]["key_momentum"] == 0.99
