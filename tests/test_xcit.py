"""XCiT: attention among channels against loops, positions, the class token's blocks, stochastic depth, names."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.xcit import ARCHS, Block, ClassBlock, CrossCovariance, Positions, default_patch, path_factors, xcit
from tests.helpers import refused, rows


def lively(model):
    """In double precision, with norms, biases, temperatures and scales as after training."""
    model = model.double()
    for name, p in model.named_parameters():
        if p.ndim == 1 or name.endswith("temperature"):
            torch.nn.init.uniform_(p, 0.5, 1.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def tiny(**more):
    torch.manual_seed(0)
    settings = {"width": 0.125, "patch_size": 4, "depth": 2, "heads": 3} | more
    return lively(xcit("xcit_tiny_12", 32, **settings)).eval()  # 24 dimensions


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cross_covariance_attention_equals_loops(heads):
    torch.manual_seed(heads)
    layer, x = lively(CrossCovariance(16, heads)), 2 * rows(2, 7, 16)
    qkv, size, out = layer.qkv(x).detach().numpy(), 16 // heads, np.zeros((2, 7, 16))
    for b, h in np.ndindex(2, heads):
        q, k, v = (qkv[b, :, part * 16 + h * size : part * 16 + (h + 1) * size] for part in range(3))  # (7, size)
        for i in range(size):
            cosines = [q[:, i] @ k[:, j] / math.sqrt((q[:, i] ** 2).sum() * (k[:, j] ** 2).sum()) for j in range(size)]
            weights = np.exp(np.array(cosines) * layer.temperature[h, 0, 0].item())
            out[b, :, h * size + i] = sum(w * v[:, j] for j, w in enumerate(weights / weights.sum()))
    torch.testing.assert_close(layer(x), layer.proj(torch.from_numpy(out)), atol=1e-10, rtol=0)


def test_positions_are_the_formula():
    """First the row, then the column; of each 16 sines and 16 cosines in turn, of the share 1/n ... n/n of a circle."""
    layer, expected = Positions(10).double(), np.zeros((3, 5, 64))
    for row, column, i in np.ndindex(3, 5, 32):
        for part, share in enumerate(((row + 1) / (3 + 1e-6), (column + 1) / (5 + 1e-6))):
            angle = 2 * math.pi * share / 10000 ** (2 * (i // 2) / 32)
            expected[row, column, 32 * part + i] = math.cos(angle) if i % 2 else math.sin(angle)
    projected = torch.from_numpy(expected) @ layer.token_projection.weight.flatten(1).T + layer.token_projection.bias
    torch.testing.assert_close(layer(3, 5)[0].permute(1, 2, 0), projected, atol=1e-12, rtol=0)
    assert Positions(10).half()(3, 5).dtype == torch.float16  # the angles themselves are computed in single precision


def test_block_is_attention_then_convolutions_then_mlp():
    torch.manual_seed(0)
    block, x = lively(Block(8, 2, 1.0)).eval(), rows(2, 15, 8)
    y = x + block.gamma1 * block.attn(block.norm1(x))
    local, maps = block.local_mp, block.norm3(y).mT.reshape(2, 8, 3, 5)
    padded, out = F.pad(maps, (1, 1, 1, 1)), torch.zeros(2, 8, 3, 5).double()
    for i, j in np.ndindex(3, 5):
        out[:, :, i, j] = (padded[:, :, i : i + 3, j : j + 3] * local.conv1.weight[:, 0]).sum((2, 3)) + local.conv1.bias
    out = out * 0.5 * (1 + torch.erf(out / 2**0.5))
    mean, deviation = local.bn.running_mean[:, None, None], (local.bn.running_var + 1e-5).sqrt()[:, None, None]
    out = (out - mean) / deviation * local.bn.weight[:, None, None] + local.bn.bias[:, None, None]
    out = F.conv2d(out, local.conv2.weight, local.conv2.bias, padding=1, groups=8)
    y = y + block.gamma3 * out.flatten(2).mT
    y = y + block.gamma2 * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x, (3, 5)), y, atol=1e-12, rtol=0)
    assert block.norm1.eps == 1e-6


@pytest.mark.parametrize("norm_all", [True, False])
def test_class_block_equals_loops(norm_all):
    torch.manual_seed(0)
    block, x = lively(ClassBlock(8, 2, 1.0, norm_all)), rows(1, 6, 8)
    normed = block.norm1(x)
    q, k, v = block.attn.qkv(normed)[0].chunk(3, 1)
    seen = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = torch.stack([(q[0, h] @ k[j, h] / 2).exp() for j in range(6)])
        seen.append((weights / weights.sum()) @ v[:, h])
    first = x[0, 0] + block.gamma1 * block.attn.proj(torch.cat(seen))
    others = x[0, 1:] + block.gamma1 * normed[0, 1:]
    first, others = block.norm2(first), block.norm2(others) if norm_all else others
    expected = torch.cat([(first + block.gamma2 * block.mlp(first))[None], 2 * others])
    torch.testing.assert_close(block(x)[0], expected, atol=1e-12, rtol=0)


def test_the_whole_network():
    """Stem, positions, blocks, class token, norm; GELU stands between the convolutions, not after the last."""
    model, x = tiny(), rows(2, 3, 32, 48)
    y = model.patch_embed["proj"][0](x)
    y = model.patch_embed["proj"][2](F.gelu(y))
    assert y.shape == (2, 24, 8, 12) and y.min() < -0.5
    y = (y + model.pos_embeder(8, 12)).flatten(2).mT
    for block in model.blocks:
        y = block(y, (8, 12))
    y = torch.cat([model.cls_token.expand(2, -1, -1), y], 1)
    y = model.cls_attn_blocks[1](model.cls_attn_blocks[0](y))
    torch.testing.assert_close(model(x), model.norm(y)[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (64, 16), (17, 30), (3, 5), (1, 1)])
def test_any_image_size(size):
    found = tiny()(rows(2, 3, *size))
    assert found.shape == (2, 24) and found.isfinite().all()


# -------------------------------------------------------------------------------------------------- stochastic depth
def test_path_factors_are_the_same_at_any_depth():
    u = torch.rand(20000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = path_factors(u, 0.2)
    assert factors.shape == (6, 20000) and set(factors.flatten().tolist()) == {0.0, 1.25}
    assert all(row.mean().item() == pytest.approx(1, abs=0.02) for row in factors)
    assert torch.equal(path_factors(u, 0.0), torch.ones(6, 20000, dtype=torch.float64))


def test_dropped_branches_are_left_out():
    model, x = tiny(), rows(2, 3, 32, 32)
    assert model.draws == 6
    paths = torch.ones(6, 2, dtype=torch.float64)
    assert torch.equal(model(x, paths), model(x))
    paths[:, 1] = 0
    out = model(x, paths)
    torch.testing.assert_close(out[0], model(x)[0])
    without = tiny(depth=1)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if k in without.state_dict()})
    torch.testing.assert_close(out[1], without(x, torch.zeros(3, 2).double())[1])
    block, y = model.blocks[0], rows(1, 12, 24)
    for row, branch in enumerate((
        lambda y: block.gamma1 * block.attn(block.norm1(y)),
        lambda y: block.gamma3 * block.local_mp(block.norm3(y), (3, 4)),
        lambda y: block.gamma2 * block.mlp(block.norm2(y)),
    )):  # fmt: skip
        only = torch.zeros(3, 1, dtype=torch.float64)
        only[row] = 2
        torch.testing.assert_close(block(y, (3, 4), only), y + 2 * branch(y))


# ----------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "arch, patch, count",
    [("xcit_small_12", 16, 26_253_304), ("xcit_small_12", 8, 26_213_032), ("xcit_medium_24", 16, 84_395_752)],
)
def test_numbers_of_parameters(arch, patch, count):
    """Of the official networks, which have a classifier of 1000 classes: published as 26 and 84 million."""
    with torch.device("meta"):
        model = xcit(arch, patch_size=patch)
    assert sum(p.numel() for p in model.parameters()) + 1000 * (model.dim + 1) == count


def test_defaults_and_settings(capsys):
    patches = {8: 2, 16: 2, 28: 4, 32: 4, 55: 4, 56: 8, 96: 8, 128: 8, 160: 16, 224: 16}
    assert {size: default_patch(size) for size in patches} == patches
    for arch, (dim, depth, heads, _) in ARCHS.items():
        with torch.device("meta"):
            model = xcit(arch, depth=1)
        assert (model.dim, model.draws, model.blocks[0].attn.heads) == (dim, 3, heads)
        usual = {"patch_size": 16, "depth": 1, "heads": heads, "norm_all": arch != "xcit_nano_12"}
        assert model.config == usual and arch.endswith(f"_{depth}")
    deep = xcit("xcit_tiny_24", width=0.25, depth=1)
    assert torch.equal(deep.blocks[0].gamma3, torch.full((48,), 1e-5)), "published ones of 24 blocks start so"
    model = tiny(channels=1, norm_all=False)
    again = xcit("xcit_tiny_12", 32, 0.125, channels=1, **model.config).double().eval()
    again.load_state_dict(model.state_dict())
    x = rows(2, 1, 32, 32)
    assert torch.equal(model(x), again(x)), "name, width, size and config say all"
    assert "--arch xcit_huge: unknown" in refused(capsys, xcit, "xcit_huge")
    assert "patches of 2, 4, 8, 16, 32 pixels" in refused(capsys, xcit, "xcit_small_12", patch_size=14)
    assert "dimension 36 must be a multiple of 8 " in refused(capsys, xcit, "xcit_small_12", width=36 / 384)


def test_names_are_the_official_ones():
    pairs = lambda *layers: {f"{layer}.{p}" for layer in layers for p in ("weight", "bias")}  # noqa: E731
    norms = lambda *layers: {f"{n}.{p}" for n in layers for p in ("running_mean", "running_var", "num_batches_tracked")}  # noqa: E731
    expected = {"cls_token"} | pairs("norm", "pos_embeder.token_projection")
    for i in (0, 2):
        stem = f"patch_embed.proj.{i}"
        expected |= {f"{stem}.0.weight"} | pairs(f"{stem}.1") | norms(f"{stem}.1")
    for i in (0, 1):
        layers = (
            "norm1 norm2 norm3 attn.qkv attn.proj mlp.fc1 mlp.fc2 local_mp.conv1 local_mp.bn local_mp.conv2".split()
        )
        expected |= pairs(*(f"blocks.{i}.{layer}" for layer in layers)) | norms(f"blocks.{i}.local_mp.bn")
        expected |= {f"blocks.{i}.{name}" for name in ("gamma1", "gamma2", "gamma3", "attn.temperature")}
        layers = "norm1 norm2 attn.qkv attn.proj mlp.fc1 mlp.fc2".split()
        expected |= pairs(*(f"cls_attn_blocks.{i}.{layer}" for layer in layers))
        expected |= {f"cls_attn_blocks.{i}.gamma{j}" for j in (1, 2)}
    assert set(tiny().state_dict()) == expected
    assert tiny().blocks[0].attn.temperature.shape == (3, 1, 1)


def test_gradient_reaches_everything():
    model = tiny().train()
    model(rows(4, 3, 32, 32)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle
