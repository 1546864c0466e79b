"""MoCo v3: the loss, the key network's moving average, heads and recipes for ResNets and ViTs, the frozen patches."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mocov3
from common.resnet import resnet
from tests.helpers import command, flags, records, state, tensors, train

TARGETS = {"backbone.": "target_backbone.", "projector.": "target_projector."}
VIT = ["--arch", "vit_tiny", "--width", "0.25", "--depth", "2"]  # dimension 48, 3 heads


def small_model(kind="resnet"):
    torch.manual_seed(0)
    vit = kind == "vit"
    backbone = mocov3.transformer("vit_tiny", 16, 0.25, 4, 2) if vit else resnet("resnet18", 0.125, 16)
    return mocov3.MoCoV3(backbone, dim=8, hidden_dim=12).double()


def vectors(count=4, rows=6, width=5, seed=0):
    return torch.randn(count, rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()


def images(rows=4):
    return [x.view(rows, 3, 16, 16) for x in vectors(2, rows, 3 * 16 * 16)]


def pairs(names):
    """(name in the query network, name in the key network) of everything that both have."""
    return [(n, new + n.removeprefix(old)) for n in names for old, new in TARGETS.items() if n.startswith(old)]


def parsed(*words):
    return mocov3.parse_args(["--data", "fake:64", *map(str, words)])


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_equals_the_formula_in_numpy(temperature):
    q1, q2, k1, k2 = vectors()
    total = 0.0
    for queries, keys in ((q1, k2), (q2, k1)):
        queries, keys = ([x / np.sqrt(np.dot(x, x)) for x in rows.numpy()] for rows in (queries, keys))
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


def test_gradient_goes_into_queries_only():
    q1, q2, k1, k2 = (x.requires_grad_() for x in vectors())
    assert torch.autograd.gradcheck(lambda a, b: mocov3.mocov3_loss(a, b, k1, k2, 0.2), (q1, q2))
    mocov3.mocov3_loss(q1, q2, k1, k2, 0.2).backward()
    assert q1.grad.abs().max() > 0 and q2.grad.abs().max() > 0 and k1.grad is None and k2.grad is None


@pytest.mark.parametrize("world", [2, 3])
def test_mean_over_processes_is_the_loss_of_the_whole_batch(world, monkeypatch):
    """Each rank in turn, with a gather that knows what all the others hold."""
    q1, q2, k1, k2 = vectors()
    whole = [x.clone().requires_grad_() for x in (q1, q2)]
    expected = mocov3.mocov3_loss(*whole, k1, k2, 0.2)
    expected.backward()
    parts = [x.clone().requires_grad_() for x in (q1, q2)]
    losses = []
    for r in range(world):
        monkeypatch.setattr(mocov3, "rank", lambda r=r: r)
        every = iter([k2, k1])

        def gather(rows, r=r, every=every):
            keys = F.normalize(next(every), dim=1)
            assert torch.equal(rows, keys.chunk(world)[r]) and not rows.requires_grad
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
    args = parsed(*(VIT if kind == "vit" else ["--arch", "resnet18"]))
    model = mocov3.MoCoV3(small_model(kind).backbone, args.dim, args.hidden_dim)
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
    args = parsed("--arch", "vit_small")
    assert args.heads == 12 and parsed("--arch", "vit_base").heads is None
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
    seed = torch.get_rng_state()
    torch.manual_seed(3)
    start = mocov3.transformer("vit_tiny", 16, 0.25, None, 2).state_dict()
    torch.set_rng_state(seed)
    frozen = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    for more, still in (([], frozen), (["--train-patch-embed"], {"pos_embed"})):
        model = train("mocov3", tmp_path / str(len(more)), *words, *more)["model"]
        for network in ("backbone", "target_backbone"):
            same = {name for name, value in start.items() if torch.equal(model[f"{network}.{name}"], value)}
            assert same == still, network


def test_vit_runs_on_two_processes_as_on_one(tmp_path):
    """From the command line, in double precision; what an evaluation needs to build the network is in the file."""
    words = [*VIT, "--precision", "fp64", "--max-steps", 3, "--lr", 0.1]
    command("mocov3.py", *flags("mocov3", tmp_path / "two", *words), processes=2, check=0)
    one, two = tensors(train("mocov3", tmp_path / "one", *words)), tensors(state(tmp_path / "two"))
    assert one.keys() == two.keys() and "/model/backbone.blocks.1.attn.qkv.weight" in one
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    meta = torch.load(tmp_path / "two" / "backbone.pt", weights_only=True)["meta"]
    expected = {"method": "mocov3", "arch": "vit_tiny", "width": 0.25, "image_size": 16, "patch_size": 2}
    assert meta.items() >= (expected | {"depth": 2, "heads": 3, "positions": "sincos-yx", "pool": "cls"}).items()


def test_interrupted_vit_continues_bit_for_bit(tmp_path):
    whole = tensors(train("mocov3", tmp_path / "a", *VIT, "--max-steps", 6))
    train("mocov3", tmp_path / "b", *VIT, "--max-steps", 3)
    parts = tensors(train("mocov3", tmp_path / "b", *VIT, "--max-steps", 6))
    assert whole.keys() == parts.keys()
    assert [n for n in whole if not torch.equal(whole[n], parts[n])] == []


# ------------------------------------------------------------------------------------------------ key network
@pytest.mark.parametrize("kind", HEADS)
def test_key_network_starts_as_a_copy_without_gradient(kind):
    model = small_model(kind)
    values = model.state_dict()
    both = pairs(values)
    assert len(both) == sum(name.startswith("target_") for name in values) > 30
    for online, target in both:
        assert torch.equal(values[online], values[target]), online
        assert values[online].data_ptr() != values[target].data_ptr(), online
    q1, q2, k1, k2 = model(*images())
    assert not k1.requires_grad and not k2.requires_grad
    mocov3.mocov3_loss(q1, q2, k1, k2, 0.2).backward()
    fixed = {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    for name, p in model.named_parameters():
        assert p.requires_grad is not (name.startswith("target_") or name in fixed), name
        assert (p.grad is None) is not p.requires_grad, name


@pytest.mark.parametrize("kind", HEADS)
def test_views_pass_apart_through_either_network(kind):
    model = small_model(kind)
    with torch.no_grad():
        for name, p in model.named_parameters():  # the networks differ
            if name.startswith("target_"):
                p.add_(torch.randn_like(p))
    x1, x2 = images()
    out = model(x1, x2)
    for x, query, key in ((x1, out[0], out[2]), (x2, out[1], out[3])):
        expected = model.predictor(model.projector(model.backbone(x))), model.target_projector(model.target_backbone(x))
        torch.testing.assert_close((query, key), expected, rtol=0, atol=1e-12)
    assert len({x.sum().item() for x in out}) == 4


def test_moving_average_moves_parameters_but_no_buffers():
    model = small_model()
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():  # everything differs between the networks, statistics too
        value.copy_(torch.rand(value.shape, generator=generator) * 100)
    before = copy.deepcopy(model.state_dict())
    model.update_target(0.75)
    after, parameters = model.state_dict(), dict(model.named_parameters())
    for online, target in pairs(before):
        expected = 0.75 * before[target] + 0.25 * before[online] if target in parameters else before[target]
        torch.testing.assert_close(after[target], expected, rtol=1e-12, atol=0, msg=target)
    for name in before:
        if not name.startswith("target_"):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("accum", [1, 2])
def test_keys_come_from_the_average_with_the_weights_before_the_step(accum, tmp_path, monkeypatch):
    """Order within a step: average (once, with the m of the step), keys, gradient step; against a slow loop over the
    weights that the query network had before each step."""
    calls = []
    for name in ("update_target", "forward"):
        original = getattr(mocov3.MoCoV3, name)

        def record(self, *args, original=original, name=name):
            before = {n: p.detach().clone() for n, p in self.named_parameters()}
            calls.append((name, before))
            return original(self, *args)

        monkeypatch.setattr(mocov3.MoCoV3, name, record)
    words = ["--precision", "fp64", "--max-steps", 4, "--accum", accum, "--key-momentum", 0.6, "--lr", 5]
    saved = train("mocov3", tmp_path, *words, "--warmup-epochs", 0)["model"]
    assert [name for name, _ in calls] == (["update_target"] + ["forward"] * accum) * 4
    keys = {t: calls[0][1][o] for o, t in pairs(calls[0][1])}  # the copy of the start
    for step in range(4):
        _, before = calls[step * (1 + accum)]
        m = 1 - 0.4 * (1 + math.cos(math.pi * step / 16)) / 2  # 4 epochs of 4 steps
        keys = {t: m * keys[t] + (1 - m) * before[o] for o, t in pairs(before)}
        for _, seen in calls[step * (1 + accum) + 1 :][:accum]:
            for target, value in keys.items():
                torch.testing.assert_close(seen[target], value, rtol=0, atol=1e-12, msg=target)
    for target, value in keys.items():
        torch.testing.assert_close(saved[target], value, rtol=0, atol=1e-12, msg=target)
    last = calls[-1][1]
    assert not torch.equal(saved["projector.0.weight"], last["projector.0.weight"])  # the step came after its keys
    assert not torch.equal(last["projector.0.weight"], calls[0][1]["projector.0.weight"])


def test_momentum_rises_from_its_start_to_one():
    assert mocov3.key_momentum(0, 100, 0.99) == pytest.approx(0.99, abs=1e-15)
    assert mocov3.key_momentum(50, 100, 0.99) == pytest.approx(0.995, abs=1e-15)
    assert mocov3.key_momentum(25, 100, 0.99) == pytest.approx(1 - 0.005 * (1 + math.sqrt(0.5)), abs=1e-15)
    assert mocov3.key_momentum(100, 100, 0.99) == 1
    values = [mocov3.key_momentum(k, 100, 0.99) for k in range(101)]
    assert values == sorted(values)


def test_loaded_weights_start_both_networks(tmp_path):
    """With m = 1 the key network stays what --init made it: the query network of the file, to the bit."""
    first = train("mocov3", tmp_path / "a", "--max-steps", 3, "--lr", 5)["model"]
    words = ["--max-steps", 3, "--lr", 5, "--key-momentum", 1, "--init", tmp_path / "a" / "last.pt"]
    second = train("mocov3", tmp_path / "b", *words)["model"]
    names = pairs(n for n, p in small_model().named_parameters() if not n.startswith("target_"))
    assert [t for o, t in names if not torch.equal(second[t], first[o])] == []
    assert sum(not torch.equal(second[o], first[o]) for o, _ in names) > len(names) / 2


# ------------------------------------------------------------------------------------------------- the recipes
@pytest.mark.parametrize(
    ("arch", "epochs", "lr", "weight_decay", "momentum"),
    [
        ("resnet50", 20, 0.6, 1e-6, 0.99),
        ("resnet50", 100, 0.6, 1e-6, 0.99),
        ("resnet50", 170, 0.6, 1e-6, 0.99),
        ("resnet18", 180, 0.3, 1e-6, 0.99),
        ("resnet50", 300, 0.3, 1e-6, 0.99),
        ("resnet50", 800, 0.3, 1.5e-6, 0.996),
        ("resnet101", 1000, 0.3, 1.5e-6, 0.996),
        ("vit_tiny", 60, 1.5e-4, 0.1, 0.99),
        ("vit_small", 300, 1.5e-4, 0.1, 0.99),
        ("vit_base", 1000, 1.5e-4, 0.1, 0.99),
    ],
)
def test_architecture_and_epochs_pick_the_published_recipe(arch, epochs, lr, weight_decay, momentum):
    args = parsed("--arch", arch, "--epochs", epochs)
    assert (args.lr, args.weight_decay, args.key_momentum) == (lr, weight_decay, momentum)
    rest = (args.optimizer, args.warmup_epochs, args.temperature, args.crop_min)
    assert rest == (("adamw", 40, 0.2, 0.08) if arch.startswith("vit") else ("lars", 10, 1.0, 0.2))
    assert (args.batch_size, args.momentum, args.dim, args.hidden_dim) == (4096, 0.9, 256, 4096)


def test_flags_come_before_the_recipe():
    args = parsed("--key-momentum", 0, "--weight-decay", 0, "--warmup-epochs", 0, "--temperature", 0.1)
    assert (args.arch, args.epochs, args.lr) == ("resnet50", 300, 0.3)
    assert (args.key_momentum, args.weight_decay, args.warmup_epochs, args.temperature) == (0, 0, 0, 0.1)
    assert parsed("--arch", "vit_small", "--heads", 6).heads == 6
    args = parsed("--optimizer", "adamw", "--lr", 0.1, "--weight-decay", 0.2)
    assert (args.optimizer, args.lr, args.weight_decay, args.temperature) == ("adamw", 0.1, 0.2, 1.0)


def test_weight_decay_and_groups_of_the_optimisers(tmp_path):
    """LARS leaves biases and norms alone, AdamW decays everything that is trained."""
    words = ["--max-steps", 2, "--lr", 0.4, "--weight-decay", 0.003]
    weights, others = train("mocov3", tmp_path / "lars", *words)["optimizer"]["param_groups"]
    assert (weights["weight_decay"], others["weight_decay"], weights["trust"]) == (0.003, 0, 0.001)
    assert (weights["momentum"], others["momentum"], weights["adapt"], others["adapt"]) == (0.9, 0.9, True, False)
    count = sum(p.requires_grad for p in small_model().parameters())
    assert len(weights["params"]) + len(others["params"]) == count
    (group,) = train("mocov3", tmp_path / "vit", *VIT, *words)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.003, (0.9, 0.999))
    assert len(group["params"]) == sum(p.requires_grad for p in small_model("vit").parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "adamw", "--lr", "0.1"], "--optimizer adamw needs --lr and --weight-decay"),
        (["--arch", "vit_small", "--optimizer", "lars"], "those of the table are for adamw"),
        (["--key-momentum", "1.5"], "--key-momentum must lie between 0 and 1"),
        (["--key-momentum", "nan"], "--key-momentum must lie between 0 and 1"),
        (["--patch-size", "4"], "--patch-size is for ViTs"),
        (["--train-patch-embed"], "--train-patch-embed is for ViTs"),
        (["--temperature", "0"], "--temperature must be greater than 0"),
        (["--batch-size", "4", "--accum", "4"], "needs 2 images or more"),
        ([*VIT, "--epochs", "20"], "--warmup-epochs 40 must be smaller than --epochs 20"),
        (["--arch", "vit_tiny", "--image-size", "16", "--patch-size", "5"], "choose 15 or 20, or --patch-size"),
        (["--arch", "vit_giant"], "vit_huge"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        mocov3.main(parsed("--batch-size", 16, "--out", tmp_path, *words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_start_names_the_recipe_and_the_loss_of_chance(tmp_path, capsys):
    train("mocov3", tmp_path, "--max-steps", 1, "--accum", 2, "--temperature", 0.25)
    shown = capsys.readouterr().out
    assert "nearest published (100 epochs)" in shown and "lr          0.6 x 16/256 = 0.0375" in shown
    chance = 2 * 2 * 0.25 * math.log(8)  # 8 keys to choose from: those of a micro-batch
    assert f"ln(8) = {chance:.2f}" in shown
    share = records(tmp_path)[1]["loss"] / chance
    assert f"of chance {share:.0%}" in shown and 0.5 < share < 2
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["args"]["key_momentum"] == 0.99


# ------------------------------------------------------------------------------------------------------ views
def test_views_follow_the_recipe():
    first, second = mocov3.augmentation(224)
    for view in (first, second):
        assert (view.size, view.crop, view.ratio, view.interpolation) == (224, (0.2, 1.0), (3 / 4, 4 / 3), "bilinear")
        assert (view.flip, view.jitter, view.jitter_p, view.gray_p) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (view.blur_sigma, view.gray_first) == ((0.1, 2.0), False)
        assert (view.mean, view.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (first.blur_p, first.solarize_p, second.blur_p, second.solarize_p) == (1.0, 0.0, 0.1, 0.2)
    small = mocov3.augmentation(32, crop_min=0.08, flip=0)
    assert [(v.blur_p, v.solarize_p, v.crop, v.flip) for v in small] == [(0, s, (0.08, 1.0), 0) for s in (0, 0.2)]
