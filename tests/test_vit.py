"""The vision transformer: positions, attention, masked tokens, stochastic depth, its names and its settings."""

import math

import numpy as np
import pytest
import torch

from common import vit as module
from common.optim import param_groups
from common.vit import (
    ARCHS,
    TABLE,
    Attention,
    Block,
    ViT,
    default_patch,
    fit_positions,
    path_factors,
    relative_bias,
    resize_positions,
    resize_table,
    sincos,
    vit,
)
from tests.helpers import refused, rows


def tiny(image_size=16, patch_size=4, dim=24, depth=3, heads=3, **more):
    torch.manual_seed(0)
    return ViT(dim, depth, heads, patch_size, image_size, **more).double()


# --------------------------------------------------------------------------------------------------- positions
def slow_positions(dim, grid, order):
    """Number by number: sin and cos of the first coordinate, then of the second, each in dim / 4 frequencies."""
    quarter, table = range(dim // 4), []
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = (column, row) if order == "xy" else (row, column)
            angles = [[p / 10000 ** (i / len(quarter)) for i in quarter] for p in places]
            table.append([f(a) for half in angles for f in (math.sin, math.cos) for a in half])
    return np.array(table)


@pytest.mark.parametrize("order", ["xy", "yx"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_positions_are_the_formula(order, grid):
    np.testing.assert_allclose(sincos(16, grid, order).numpy(), slow_positions(16, grid, order), atol=1e-14)


def test_model_holds_the_table_and_its_class_token_has_no_position():
    for positions in ("sincos-xy", "sincos-yx"):
        model = tiny(positions=positions)
        expected = slow_positions(24, (4, 4), positions[-2:])
        np.testing.assert_allclose(model.pos_embed[0, 1:].numpy(), expected, atol=1e-6)  # it began in single precision
        assert not model.pos_embed[0, 0].any() and not model.pos_embed.requires_grad
        assert "pos_embed" in model.state_dict()
    learned = tiny(positions="learned")
    assert learned.pos_embed.requires_grad and 0.01 < learned.pos_embed.std() < 0.03


def slow_cubic(values, size):
    """Cubic convolution (Keys 1981, a = -0.75) of a sequence to another length, by centres, borders repeated."""
    out = []
    for k in range(size):
        centre = (k + 0.5) * len(values) / size - 0.5
        first = math.floor(centre) - 1
        total = 0.0
        for tap in range(first, first + 4):
            t = abs(centre - tap)
            weight = 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            total = total + weight * values[min(max(tap, 0), len(values) - 1)]
        out.append(total)
    return np.stack(out)


def test_resizing_positions():
    table = rows(1, 1 + 3 * 4, 8)
    assert resize_positions(table, (3, 4), (3, 4)) is table
    resized = resize_positions(table, (3, 4), (6, 10))
    assert resized.shape == (1, 1 + 60, 8)
    assert torch.equal(resized[:, :1], table[:, :1]), "the class token's stays"
    maps = slow_cubic(table[0, 1:].view(3, 4, 8).numpy(), 6)
    maps = slow_cubic(maps.transpose(1, 0, 2), 10).transpose(1, 0, 2)
    np.testing.assert_allclose(resized[0, 1:].view(6, 10, 8).numpy(), maps, atol=1e-12)


def test_positions_of_projects_that_add_a_tenth():
    """They scale by (new + 0.1) / old: the features of a network differ from theirs by some thousandths."""
    model, images = tiny(image_size=148, dim=48, positions="learned").eval(), rows(2, 3, 64, 64)
    own, table = model(images), model.pos_embed
    maps = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    maps = torch.nn.functional.interpolate(maps, scale_factor=(16 + 0.1) / 37, mode="bicubic")
    assert maps.shape[2:] == (16, 16)
    theirs = tiny(image_size=64, dim=48, positions="learned").eval()
    theirs.load_state_dict(model.state_dict() | {"pos_embed": torch.cat([table[:, :1], maps.flatten(2).mT], 1)})
    share = (theirs(images) - own).abs().max() / own.abs().max()
    assert 0 < share < 0.01


def test_any_image_size_with_whole_patches():
    model = tiny()
    assert model(rows(2, 3, 16, 16)).shape == (2, 24)
    assert model.tokens(rows(2, 3, 8, 24)).shape == (2, 1 + 2 * 6, 24)
    with pytest.raises(ValueError, match="18 x 16"):
        model(rows(2, 3, 18, 16))
    model = tiny(image_size=(8, 24))  # made for images that are not square
    np.testing.assert_allclose(model.pos_embed[0, 1:].numpy(), slow_positions(24, (2, 6), "xy"), atol=1e-6)
    tokens, position = model.embed(rows(1, 3, 8, 24))
    bare = model.patch_embed(rows(1, 3, 8, 24))
    torch.testing.assert_close(tokens - bare, model.pos_embed[:, 1:])
    assert torch.equal(position, model.pos_embed[:, :1])


def test_patch_embedding_is_a_linear_layer_of_each_patch():
    model, x = tiny(), rows(2, 3, 16, 16)
    tokens, proj = model.patch_embed(x), model.patch_embed.proj
    for i, (row, column) in enumerate(np.ndindex(4, 4)):
        patch = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        torch.testing.assert_close(tokens[:, i], patch @ proj.weight.flatten(1).T + proj.bias)


# --------------------------------------------------------------------------------------------------- attention
def slow_attention(layer, x, heads, bias=None):
    """One query, one head, one number after the other. bias: (heads, N, N)."""
    qkv, (batch, tokens, dim) = layer.qkv(x).detach().numpy(), x.shape
    size = dim // heads
    out = np.zeros((batch, tokens, dim))
    for b, h, i in np.ndindex(batch, heads, tokens):
        q, k, v = (qkv[b, :, part * dim + h * size : part * dim + (h + 1) * size] for part in range(3))
        added = np.zeros(tokens) if bias is None else bias[h, i].detach().numpy()
        weights = np.array([np.exp(q[i] @ k[j] / np.sqrt(size) + added[j]) for j in range(tokens)])
        out[b, i, h * size : (h + 1) * size] = sum(w * v[j] for j, w in enumerate(weights / weights.sum()))
    return layer.proj(torch.from_numpy(out))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_equals_loops(heads):
    torch.manual_seed(heads)
    layer, x = Attention(16, heads).double(), 2 * rows(2, 5, 16)
    torch.testing.assert_close(layer(x), slow_attention(layer, x, heads), atol=1e-12, rtol=0)


def test_attention_with_a_bias_equals_loops():
    torch.manual_seed(0)
    layer, x, bias = Attention(16, 2).double(), 2 * rows(2, 5, 16), 2 * rows(2, 5, 5)
    torch.testing.assert_close(layer(x, bias), slow_attention(layer, x, 2, bias), atol=1e-12, rtol=0)
    assert not torch.allclose(layer(x, bias), layer(x), atol=1e-2)
    before = layer(x, bias)
    layer.qkv.bias.data[16:32] += rows(16)  # one number more for all keys of a query: files without it say the same
    torch.testing.assert_close(layer(x, bias), before, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------- relative positions
def slow_bias(table, grid):
    """Pair by pair: the row for the offset of the query from the key; the last three rows for the class token."""
    (rows_, columns), places = grid, [None, *np.ndindex(*grid)]
    bias = np.zeros((table.shape[1], len(places), len(places)))
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            if query and key:
                row = (query[0] - key[0] + rows_ - 1) * (2 * columns - 1) + query[1] - key[1] + columns - 1
            else:
                row = len(table) - (3 if key else 2 if query else 1)
            bias[:, i, j] = table[row]
    return bias


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (1, 1)])
def test_relative_bias_equals_loops(grid):
    table = rows((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2)
    assert np.array_equal(relative_bias(table, grid, grid).numpy(), slow_bias(table.numpy(), grid))


def test_tables_resized_to_their_own_size_are_themselves():
    table = rows(11 * 11 + 3, 2)
    assert resize_table(table, (6, 6), (6, 6)) is table
    assert fit_positions({"blocks.0.attn." + TABLE: table, "x": table}, (6, 6))[1] is None


@pytest.mark.parametrize("old, new, more", [((6, 6), (7, 7), 0), ((14, 14), (24, 24), 3), ((4, 5), (7, 8), 3)])
def test_resized_tables_are_splines_through_stretched_offsets(old, new, more):
    """Against scipy's splines in two dimensions, on places found by another root finder."""
    from scipy.interpolate import RectBivariateSpline
    from scipy.optimize import brentq

    table, places = rows((2 * old[0] - 1) * (2 * old[1] - 1) + more, 2), []
    for a, b in zip(old, new, strict=True):
        factor = brentq(lambda q, a=a, b=b: sum(q**i for i in range(a - 1)) - (b - 1), 1, 9, xtol=1e-14)
        half = [sum(factor**i for i in range(n)) for n in range(1, a)]
        places.append([*(-x for x in reversed(half)), 0, *half])
    resized, (high, wide) = resize_table(table, old, new), (2 * side - 1 for side in old)
    assert resized.shape == ((2 * new[0] - 1) * (2 * new[1] - 1) + more, 2)
    assert torch.equal(resized[len(resized) - more :], table[len(table) - more :]), "those of the class token stay"
    for head in range(2):
        values = table[: high * wide, head].view(high, wide).numpy()
        spline = RectBivariateSpline(*places, values, s=0)(*(range(1 - side, side) for side in new))
        found = resized[: len(resized) - more, head].view(2 * new[0] - 1, -1).numpy()
        assert np.abs(found - spline).max() < 1e-6
    centre = found[new[0] - 1, new[1] - 1]
    assert centre == pytest.approx(values[old[0] - 1, old[1] - 1], abs=1e-12), "a place itself stays where it is"


@pytest.mark.parametrize("relative", ["shared", "block"])
def test_relative_positions_start_at_zero_and_reach_every_block(relative):
    plain, model, x = tiny(positions="none"), tiny(positions="none", relative=relative), rows(2, 3, 16, 16)
    names = {"shared": {f"rel_pos_bias.{TABLE}"}, "block": {f"blocks.{i}.attn.{TABLE}" for i in range(3)}}[relative]
    assert model.state_dict().keys() - plain.state_dict().keys() == names and "pos_embed" not in plain.state_dict()
    torch.testing.assert_close(model(x), plain(x), atol=1e-12, rtol=0)
    for i, name in enumerate(sorted(names)):
        table = model.get_parameter(name)
        assert table.shape == (7 * 7 + 3, 3) and not table.any()
        table.data.copy_(rows(52, 3, seed=i))
    seen, y = [], model._enter(x)
    for i, block in enumerate(model.blocks):
        table = model.get_parameter(sorted(names)[i if relative == "block" else 0])
        bias = torch.from_numpy(slow_bias(table.detach().numpy(), (4, 4)))
        hook = block.attn.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        y = block(y, bias=bias)
        hook.remove()
    torch.testing.assert_close(model(x), model.norm(y)[:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(seen[1][1], slow_attention(model.blocks[1].attn, seen[1][0], 3, model.biases((4, 4))[1]))
    values = model.blocks[2].attn.qkv(seen[2][0])[:, :, 48:].unflatten(2, (3, 8)).transpose(1, 2)
    output = model.blocks[2].attn.proj((model.attention(x) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, seen[2][1], atol=1e-12, rtol=0)
    model(x).square().sum().backward()
    grads = [model.get_parameter(name).grad.abs().sum(1) for name in names]
    assert all((g > 0).all() if relative == "shared" else g.sum() > 0 for g in grads)
    larger = model(rows(2, 3, 24, 16))  # the tables are interpolated
    assert larger.isfinite().all()
    with pytest.raises(ValueError, match="left out"):
        model.tokens(x, keep=torch.tensor([[0], [1]]))


def test_a_shared_table_becomes_one_of_each_block():
    model, x = tiny(positions="none", relative="shared"), rows(2, 3, 16, 16)
    torch.nn.init.normal_(model.rel_pos_bias[TABLE])
    before = model(x)
    model.unshare()
    assert torch.equal(model(x), before) and model.relative == "block"
    tables = [block.attn.get_parameter(TABLE) for block in model.blocks]
    assert len({t.data_ptr() for t in tables}) == 3 and not any(n.startswith("rel_pos") for n in model.state_dict())
    tables[1].data.zero_()
    assert not torch.allclose(model(x), before)
    after = model(x)
    model.unshare()
    assert torch.equal(model(x), after), "nothing to do"
    plain = tiny()
    before = plain(x)
    plain.unshare()
    torch.testing.assert_close(plain(x), before, atol=1e-12, rtol=0)
    assert not plain.blocks[0].attn.get_parameter(TABLE).any()


def test_checkpointing_takes_relative_positions(positions="none"):
    x, found = rows(2, 3, 16, 16), []
    for checkpointing in (False, True):
        model = tiny(positions=positions, relative="shared")
        torch.nn.init.ones_(model.rel_pos_bias[TABLE][:7])
        model.checkpointing = checkpointing
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------- mask tokens
@pytest.mark.parametrize("positions", ["none", "learned", "sincos-xy"])
def test_a_mask_token_stands_in_place_of_embedded_patches(positions):
    """It gets the position of the patch, of whose pixels nothing is left."""
    model, x, token = tiny(positions=positions), rows(2, 3, 16, 16), rows(1, 1, 24)
    mask = torch.zeros(2, 16)
    mask[0, 5] = mask[1, 0] = mask[1, 15] = 1
    tokens, bare = model.embed(x, mask, token)[0], model.patch_embed(x)
    table = torch.zeros(16, 24) if positions == "none" else model.pos_embed[0, 1:]
    for b, i in np.ndindex(2, 16):
        assert torch.equal(tokens[b, i], (token[0, 0] if mask[b, i] else bare[b, i]) + table[i])
    changed = x.clone()
    changed[0, :, 4:8, 4:8] += 1
    changed[1, :, :4, :4] += 1
    assert torch.equal(model.tokens(x, mask=mask, token=token), model.tokens(changed, mask=mask, token=token))
    assert not torch.allclose(model.tokens(x), model.tokens(x, mask=mask, token=token))


def test_heads_matter_although_no_shape_shows_them():
    three, six = tiny(heads=3), tiny(heads=6)
    six.load_state_dict(three.state_dict())
    x = rows(2, 3, 16, 16)
    assert not torch.allclose(three(x), six(x), atol=1e-3)


def test_block_is_pre_norm_with_exact_gelu():
    torch.manual_seed(0)
    block, x = Block(16, 2).double(), rows(2, 5, 16)

    def norm(x, layer):
        return torch.nn.functional.layer_norm(x, (16,), layer.weight, layer.bias, 1e-6)

    y = x + slow_attention(block.attn, norm(x, block.norm1), 2)
    hidden = block.mlp.fc1(norm(y, block.norm2))
    y = y + block.mlp.fc2(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
    torch.testing.assert_close(block(x), y, atol=1e-12, rtol=0)
    assert block.mlp.fc1.out_features == 64


# --------------------------------------------------------------------------------------------- tokens and pooling
def test_class_token_or_mean_of_the_others():
    x = rows(2, 3, 16, 16)
    cls = tiny(pool="cls")
    assert torch.equal(cls(x), cls.tokens(x)[:, 0])
    mean = tiny(pool="mean")
    assert not [name for name in mean.state_dict() if name.startswith("norm.")]
    tokens = mean.tokens(x)  # without a final norm
    pooled = tokens[:, 1:].mean(1)
    torch.testing.assert_close(mean(x), torch.nn.functional.layer_norm(pooled, (24,), eps=1e-6))  # that of the start
    assert not [name for name in cls.state_dict() if name.startswith("fc_norm")]


def test_without_class_token():
    """No token and no position of one; features are the mean of the tokens after the final norm, or before a norm."""
    x = rows(2, 3, 16, 16)
    model, own = tiny(pool="norm-mean", class_token=False), tiny(pool="mean", class_token=False)
    assert set(tiny().state_dict()) - set(model.state_dict()) == {"cls_token"} and model.pool == own.pool == "mean"
    np.testing.assert_allclose(model.pos_embed[0].numpy(), slow_positions(24, (4, 4), "xy"), atol=1e-6)
    tokens = model.tokens(x)
    assert tokens.shape == (2, 16, 24) and torch.equal(model(x), tokens.mean(1))
    bare = model.patch_embed(x) + model.pos_embed
    for block in model.blocks:
        bare = block(bare)
    torch.testing.assert_close(tokens, model.norm(bare), atol=1e-12, rtol=0)
    torch.testing.assert_close(own(x), own.fc_norm(bare.mean(1)), atol=1e-12, rtol=0)
    keep = torch.tensor([[5, 0, 10], [1, 2, 3]])
    changed = x.clone()
    changed[0, :, :4, 4:8] += 3  # patch 1
    assert torch.equal(model.tokens(x, keep)[0], model.tokens(changed, keep)[0])
    assert torch.equal(model.maps(x)[1, :, 1, 2], tokens[1, 4 + 2]) and model.attention(x).shape == (2, 3, 16, 16)
    assert model(rows(2, 3, 8, 24)).shape == (2, 24), "positions of another grid"
    both = tiny(pool="norm-mean")
    assert torch.equal(both(x), both.tokens(x)[:, 1:].mean(1)), "also beside a class token"
    with pytest.raises(ValueError, match="pool cls"):
        tiny(class_token=False)


def test_relative_positions_without_class_token():
    """The row and the column of the class token drop out."""
    model, x = tiny(positions="none", pool="norm-mean", class_token=False), rows(2, 3, 16, 16)
    before = model(x)
    model.unshare()
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=0)
    table = model.blocks[1].attn.get_parameter(TABLE)
    table.data.copy_(rows(52, 3))
    expected = slow_bias(table.detach().numpy(), (4, 4))[:, 1:, 1:]
    assert np.array_equal(model.biases((4, 4))[1].detach().numpy(), expected) and model(x).isfinite().all()


def test_maps_are_the_patch_tokens_in_their_places():
    model, x = tiny(), rows(2, 3, 8, 16)
    maps, tokens = model.maps(x), model.tokens(x)
    assert maps.shape == (2, 24, 2, 4) and torch.equal(maps[1, :, 1, 2], tokens[1, 1 + 4 + 2])


def test_last_blocks():
    """The output after block i is that of a network which ends there; all pass the final norm."""
    model, x = tiny(), rows(2, 3, 16, 16)
    outputs = model.last(x, 3)
    assert len(outputs) == 3 and len(model.last(x, 2)) == 2
    assert torch.equal(outputs[2], model.tokens(x))
    for depth in (1, 2):
        shorter = tiny(depth=depth)
        shorter.load_state_dict({k: v for k, v in model.state_dict().items() if k in shorter.state_dict()})
        assert torch.equal(outputs[depth - 1], shorter.tokens(x))
    norms = torch.stack(outputs)  # of mean 0 and variance 1: weight and bias of the norm are those of the start
    torch.testing.assert_close(norms.mean(-1), torch.zeros(3, 2, 17, dtype=torch.float64), atol=1e-6, rtol=0)


def test_attention_of_the_last_block_makes_its_output():
    model, x = tiny(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = model.attention(x)
    assert found.shape == (2, 3, 17, 17) and (found.sum(3) - 1).abs().max() < 1e-12
    seen, block = [], model.blocks[-1]
    hook = block.attn.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(x)
    hook.remove()
    values = block.attn.qkv(seen[0][0])[:, :, 48:].unflatten(2, (3, 8)).transpose(1, 2)  # the last third of 3 x 24
    assert (block.attn.proj((found @ values).transpose(1, 2).flatten(2)) - seen[0][1]).abs().max() < 1e-12


def test_keeping_all_tokens_equals_keeping_none_out():
    model, x = tiny(), rows(2, 3, 16, 16)
    everything = model.tokens(x)
    in_order = torch.arange(16).expand(2, -1)
    assert torch.equal(model.tokens(x, in_order), everything)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    shuffled = model.tokens(x, order)  # attention knows no order: positions came before
    torch.testing.assert_close(shuffled[:, 0], everything[:, 0])
    for b in range(2):
        torch.testing.assert_close(shuffled[b, 1:], everything[b, 1:][order[b]])


def test_tokens_left_out_have_no_influence():
    model, x = tiny(), rows(1, 3, 16, 16)
    keep = torch.tensor([[5, 0, 10]])
    changed = x.clone()
    changed[:, :, :4, 4:8] += 3  # patch 1
    assert torch.equal(model.tokens(x, keep), model.tokens(changed, keep))
    changed[:, :, 4:8, 4:8] += 3  # patch 5
    assert not torch.allclose(model.tokens(x, keep), model.tokens(changed, keep))
    assert model.tokens(x, keep).shape == (1, 4, 24)


def test_checkpointing_changes_nothing():
    x, found = rows(2, 3, 16, 16), []
    for checkpointing in (False, True):
        model = tiny()
        model.checkpointing = checkpointing
        paths = path_factors(torch.rand(2, 6, generator=torch.Generator().manual_seed(0)).double(), 0.5)
        y = model(x, paths)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------- stochastic depth
def test_path_factors():
    u = torch.rand(20000, 2 * 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = path_factors(u, 0.4)
    assert factors.shape == (10, 20000)
    for block in range(5):
        p = 0.4 * block / 4
        for row in factors[2 * block : 2 * block + 2]:
            assert set(row.tolist()) <= {0.0, 1 / (1 - p)}
            assert (row == 0).double().mean().item() == pytest.approx(p, abs=5 * (0.24 / 20000) ** 0.5)
            assert row.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(path_factors(u, 0.0), torch.ones(10, 20000, dtype=torch.float64))
    assert torch.equal(path_factors(u[:, :2], 0.4), torch.ones(2, 20000, dtype=torch.float64)), "one block: rate 0"


def test_dropped_branches_are_left_out():
    """A sample with all factors 0 passes unchanged but for the final norm; the other one is not changed by that."""
    model, x = tiny(), rows(2, 3, 16, 16)
    only = torch.zeros(6, 2, dtype=torch.float64)
    only[2:4] = 1  # rows 2 and 3 belong to the second block
    alone = tiny(depth=1)
    renamed = {k.replace("blocks.1.", "blocks.0."): v for k, v in model.state_dict().items() if "blocks.0." not in k}
    alone.load_state_dict({k: v for k, v in renamed.items() if k in alone.state_dict()})
    assert torch.equal(model(x, only), alone(x))
    paths = torch.ones(6, 2, dtype=torch.float64)
    assert torch.equal(model(x, paths), model(x))
    paths[:, 1] = 0
    out = model(x, paths)
    torch.testing.assert_close(out[0], model(x)[0])
    torch.testing.assert_close(out[1], model.norm(model.cls_token + model.pos_embed[:, :1])[0, 0])
    one = torch.zeros(2, 1, dtype=torch.float64)
    one[1] = 2.0  # no attention, twice the MLP
    block, y = model.blocks[0], rows(1, 5, 24)
    torch.testing.assert_close(block(y, one), y + 2 * block.mlp(block.norm2(y)))


# ------------------------------------------------------------------------------------------------------ settings
def test_layer_scale():
    plain, scaled = tiny(), tiny(layer_scale=0.1)
    missing, unexpected = scaled.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f"blocks.{i}.ls{j}.gamma" for i in range(3) for j in (1, 2)] and not unexpected
    x, block = rows(2, 5, 24), scaled.blocks[0]
    y = x + 0.1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + 0.1 * block.mlp(block.norm2(y)), atol=1e-7, rtol=0)


def test_fixed_positions_get_no_gradient_and_no_decay():
    model = tiny()
    model(rows(2, 3, 16, 16)).sum().backward()
    assert model.pos_embed.grad is None and model.blocks[0].attn.qkv.weight.grad is not None
    trained = {id(p) for group in param_groups(model, 0.1) for p in group["params"]}
    assert id(model.pos_embed) not in trained and id(model.cls_token) in trained


def test_names_are_timms():
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = [*(f"blocks.{i}.{layer}" for i in range(3) for layer in layers), "patch_embed.proj", "norm"]
    state = tiny().state_dict()
    assert set(state) == {"cls_token", "pos_embed", *(f"{layer}.{p}" for layer in layers for p in ("weight", "bias"))}
    assert state["blocks.0.attn.qkv.weight"].shape == (72, 24)
    assert (state["cls_token"].shape, state["pos_embed"].shape) == ((1, 1, 24), (1, 17, 24))
    assert state["patch_embed.proj.weight"].shape == (24, 3, 4, 4)


def test_equal_to_torchvisions():
    """The same weights under torchvision's names give the same features (there, too, eps is 1e-6)."""
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(16, 4, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=96).double()
    theirs.heads = torch.nn.Identity()
    renames = {"class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.pos_embedding": "pos_embed"}
    renames |= {"encoder.layers.encoder_layer_": "blocks.", "encoder.ln": "norm", "ln_": "norm", "mlp.0": "mlp.fc1"}
    renames |= {"self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj", "mlp.3": "mlp.fc2"}
    state = theirs.state_dict()
    for old, new in renames.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    ours = tiny(positions="learned")
    ours.load_state_dict(state)
    x = rows(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs.eval()(x), atol=1e-12, rtol=0)


def test_initialisation_is_glorots():
    torch.manual_seed(0)
    model = ViT(96, 1, 3, 8, 32)
    for layer, inputs in ((model.blocks[0].attn.qkv, 3 * 96), (model.patch_embed.proj, 3 * 8 * 8)):
        bound = math.sqrt(6 / (96 + inputs))
        assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert 0.015 < model.cls_token.std() < 0.025
    assert torch.equal(model.norm.weight, torch.ones(96))
    before = model.cls_token.clone()
    module.initialise(model)
    assert torch.equal(model.cls_token, before), "linear layers only"
    module.initialise(model, std=0.02)
    for layer in (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc2, model.patch_embed.proj):
        assert 0.019 < layer.weight.std() < 0.021 and layer.weight.abs().max() > 0.05 and not layer.bias.any()


def test_by_name():
    with torch.device("meta"):
        for arch, (dim, depth, heads, patch) in ARCHS.items():
            model = vit(arch, 224)
            assert (model.dim, len(model.blocks), model.heads, model.patch_size) == (dim, depth, heads, patch)
            names = ("patch_size", "depth", "heads", "positions", "pool", "relative")
            assert model.config == dict(zip(names, (patch, depth, heads, "sincos-xy", "cls", "none"), strict=True))
    small = vit("vit_tiny", 32, width=0.25, depth=2, heads=2, positions="learned", pool="mean")
    assert (small.dim, small.patch_size, small.grid, len(small.blocks), small.heads) == (48, 4, (8, 8), 2, 2)
    again = vit("vit_tiny", 32, width=0.25, **small.config)
    again.load_state_dict(small.state_dict())
    x = rows(2, 3, 32, 32).float()
    assert torch.equal(again(x), small(x)), "name, width, size and config say all"
    small = vit("vit_tiny", 32, width=0.25, depth=2, heads=2, pool="norm-mean", class_token=False)
    again = vit("vit_tiny", 32, width=0.25, **small.config)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    small = vit("vit_tiny", 32, width=0.25, depth=2, heads=2, positions="none", relative="shared")
    again = vit("vit_tiny", 32, width=0.25, **small.config)
    again.load_state_dict(small.state_dict())


def test_patches_of_small_images_are_about_an_eighth_of_them_and_divide_them():
    patches = {8: 1, 16: 2, 24: 3, 32: 4, 36: 4, 64: 8, 96: 12, 100: 10, 128: 16, 160: 16, 224: 16}
    assert {size: default_patch("vit_base", size) for size in patches} == patches
    assert default_patch("vit_huge", 224) == 14


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"arch": "vit_giant"}, "--arch vit_giant: unknown"),
        ({"width": 0.01}, "--width 0.01"),
        ({"width": 1, "heads": 5}, "5 heads"),
        ({"patch_size": 15}, "--patch-size"),
        ({"image_size": 20, "patch_size": 40}, "--patch-size"),
        ({"image_size": 101}, "--image-size 101"),
        ({"image_size": 150}, "--image-size 150 is not a multiple of the patch size 16: choose 144 or 160"),
    ],
)
def test_settings_that_cannot_be(settings, expected, capsys):
    assert expected in refused(capsys, vit, **{"arch": "vit_tiny", **settings})
