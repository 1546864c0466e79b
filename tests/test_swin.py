"""Swin transformers: windows, shifts and their masks, stages, names, and equality with torchvision's networks."""

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.swin_transformer import SwinTransformer

from common.namings import SWIN_TORCHVISION, TO_TORCHVISION, renamed
from common.swin import ARCHS, WindowAttention, default_patch, default_window, padding, swin, with_window
from common.vit import TABLE, path_factors, resize_table
from tests.helpers import refused, rows

SMALL = {"width": 0.25, "depths": (2, 2)}  # dimensions 24 and 48


def small(image_size=32, window=4, **more):
    torch.manual_seed(0)
    model = swin("swin_tiny", image_size, **(SMALL | {"patch_size": 2, "window": window} | more)).double()
    for name, p in model.named_parameters():
        if p.ndim == 1 or name.endswith("table"):  # norms, biases and tables as after training
            torch.nn.init.normal_(p, 0.5 if name.endswith("norm.weight") else 0.0, 0.5)
    return model


def slow_attention(layer, x):
    """One query after the other: it sees the places of its window that the roll has not brought from the other side."""
    (batch, height, width, dim), w, s, heads = x.shape, layer.window, layer.shift, layer.heads
    high, wide = -(-height // w) * w, -(-width // w) * w
    full = torch.zeros(batch, high, wide, dim, dtype=x.dtype)
    full[:, :height, :width] = x
    qkv, table = layer.qkv(full).detach().numpy(), layer.relative_position_bias_table.detach().numpy()
    size, out = dim // heads, np.zeros((batch, height, width, dim))

    def place(row, column):  # in the rolled map, and what of it came from the other side
        return (row - s) % high, (column - s) % wide, row < s, column < s

    places = {(i, j): place(i, j) for i in range(high) for j in range(wide)}
    for b, h, i, j in np.ndindex(batch, heads, height, width):
        row, column, *side = places[i, j]
        query, logits, values = qkv[b, i, j, h * size : (h + 1) * size], [], []
        for (k, m), (r, c, *other) in places.items():
            if (r // w, c // w, other) == (row // w, column // w, side):
                key = qkv[b, k, m, dim + h * size : dim + (h + 1) * size]
                bias = table[(row - r + w - 1) * (2 * w - 1) + column - c + w - 1, h]
                logits.append(query @ key / np.sqrt(size) + bias)
                values.append(qkv[b, k, m, 2 * dim + h * size : 2 * dim + (h + 1) * size])
        weights = np.exp(logits) / np.exp(logits).sum()
        out[b, i, j, h * size : (h + 1) * size] = weights @ np.array(values)
    return layer.proj(torch.from_numpy(out))


@pytest.mark.parametrize(
    "window, shift, height, width",
    [(3, 0, 6, 9), (3, 1, 6, 9), (4, 2, 8, 8), (4, 2, 3, 3), (3, 1, 5, 7), (4, 0, 5, 2), (2, 1, 1, 3)],
    ids=["plain", "shifted", "even", "one padded window", "padded", "padded, plain", "one row"],
)
def test_window_attention_equals_loops(window, shift, height, width):
    torch.manual_seed(window)
    layer = WindowAttention(8, 2, window, shift).double()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = 2 * rows(2, height, width, 8)
    torch.testing.assert_close(layer(x), slow_attention(layer, x), atol=1e-12, rtol=0)


# ----------------------------------------------------------------------------------------- torchvision's networks
@pytest.mark.parametrize(
    "arch, name, millions", [("tiny", "swin_t", 28), ("small", "swin_s", 50), ("base", "swin_b", 88)]
)
def test_equal_to_torchvisions(arch, name, millions):
    """At 224 pixels and at 160, where windows are padded; at 96 if built for that, since torchvision does not shift
    windows that hold the whole map, whatever they were built for."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name).eval()
    count = sum(p.numel() for p in theirs.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.5)  # published, with the classifier
    theirs.head = torch.nn.Identity()
    weights = renamed(theirs.state_dict(), SWIN_TORCHVISION)
    weights = {k: v for k, v in weights.items() if not k.endswith("relative_position_index")}
    with torch.device("meta"):
        models = {224: swin(f"swin_{arch}"), 96: swin(f"swin_{arch}", 96, window=(7, 7, 7, 7))}
    ours = models[224]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert ours.dim == 1024 if arch == "base" else 768
    for model in models.values():
        model.load_state_dict(weights, assign=True)
    sizes = (224, 160, 96) if arch == "tiny" else (224,)
    with torch.no_grad():
        for size in sizes:
            x, model = rows(1, 3, size, size).float(), models.get(size, ours)
            torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=0)
            assert theirs(x).std() > 0.1
    back = renamed(ours.state_dict(), TO_TORCHVISION)
    assert set(theirs.state_dict()) - set(back) == {k for k in theirs.state_dict() if k.endswith("position_index")}
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in back.items())


def test_small_networks_equal_torchvisions():
    """In double precision: three stages, patches of 2, maps that are padded before they are merged, and eps."""
    for eps in (1e-5, 1e-2):
        ours = small(26, depths=(2, 2, 2), window=(3, 3, 3), eps=eps)  # 13, 7, 4
        norm = lambda dim, eps=eps: torch.nn.LayerNorm(dim, eps=eps)  # noqa: E731
        theirs = SwinTransformer([2, 2], 24, [2, 2, 2], [3, 6, 12], [3, 3], norm_layer=norm).double().eval()
        theirs.head = torch.nn.Identity()
        theirs.load_state_dict(renamed(ours.state_dict(), TO_TORCHVISION), strict=False)
        x = rows(2, 3, 26, 26)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------ windows and sizes
def test_windows_shrink_to_the_map_they_are_built_for():
    """As in the official code: the last stage has 7 x 7 tokens at 224 pixels, and a table of 13 x 13 rows."""
    with torch.device("meta"):
        model, given = swin("swin_tiny", window=14), swin("swin_tiny", window=(14, 14, 14, 14))
        seven, six = swin("swin_tiny"), swin("swin_base", 192)
    assert model.config["window"] == [14, 14, 14, 7] and given.config["window"] == [14, 14, 14, 14]
    tables = [b.attn.relative_position_bias_table.shape for b in model.blocks]
    assert tables == [(729, 3)] * 2 + [(729, 6)] * 2 + [(729, 12)] * 6 + [(169, 24)] * 2
    assert [b.attn.shift for b in model.blocks] == [0, 7, 0, 7, *[0] * 6, 0, 0]  # 14 x 14 in the third: no shift
    assert [b.attn.shift for b in given.blocks] == [b.attn.shift for b in model.blocks]
    assert [b.attn.shift for b in seven.blocks] == [0, 3, 0, 3, *[0, 3] * 3, 0, 0]
    assert six.config["window"] == [6, 6, 6, 6] and [b.attn.shift for b in six.blocks][-2:] == [0, 0]


def test_defaults_and_settings():
    assert {s: default_patch(s) for s in (8, 16, 32, 48, 64, 96, 224)} == {
        8: 1,
        16: 1,
        32: 2,
        48: 3,
        64: 4,
        96: 4,
        224: 4,
    }
    assert [default_window(*pair) for pair in ((224, 4), (192, 4), (32, 2), (96, 4), (44, 4))] == [7, 6, 4, 6, 7]
    for arch, (dim, depths, heads) in ARCHS.items():
        with torch.device("meta"):
            model = swin(arch)
        shape = {"patch_size": 4, "depths": list(depths), "heads": [heads, 2 * heads, 4 * heads, 8 * heads]}
        assert model.config == shape | {"window": [7, 7, 7, 7], "eps": 1e-5}
        assert (model.dim, model.stride, model.draws) == (8 * dim, 32, 2 * sum(depths))
    model = small(channels=1, eps=1e-6)
    again = swin("swin_tiny", 32, 0.25, channels=1, **model.config).double()
    again.load_state_dict(model.state_dict())
    x = rows(2, 1, 32, 32)
    assert torch.equal(model(x), again(x)), "name, width, size and config say all"


@pytest.mark.parametrize(
    "words, settings",
    [
        ("--arch swin_huge: unknown", ("swin_huge",)),
        ("dimension 19 must be a multiple of 3", ("swin_tiny", 224, 0.2)),
        ("--image-size 2 is less than the patch size 4", ("swin_tiny", 2, 1.0, 4)),
    ],
)
def test_impossible_networks(words, settings, capsys):
    assert words in refused(capsys, swin, *settings)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (17, 40), (4, 2), (50, 33)])
def test_any_image_size(size):
    model = small()
    tokens = model.tokens(rows(2, 3, *size))
    grid = [-(-(side // 2) // 2) for side in size]
    assert tokens.shape == (2, grid[0] * grid[1], 48) and tokens.isfinite().all()


def test_a_shift_stays_when_the_map_gets_smaller():
    """Built for 32 pixels, a second block still shifts its only window at 8, as in the official code for several sizes;
    built for 8, it does not."""
    large, little = small(), small(8, window=(4, 4))
    little.load_state_dict(large.state_dict())
    assert [b.attn.shift for b in large.blocks] == [0, 2, 0, 2] and not any(b.attn.shift for b in little.blocks)
    x = rows(2, 3, 8, 8)
    assert not torch.allclose(large(x), little(x), atol=1e-3)


def test_other_windows():
    """The same weights, tables interpolated, and shifts as in a network that was made for this size and window."""
    model = small(window=4)
    same = with_window(model, 4, 32)
    x = rows(2, 3, 48, 48)
    assert torch.equal(same(x), model(x)) and same.config == model.config
    other = with_window(model, 6, 48)
    made = small(48, window=6)
    assert other.config == made.config and [b.attn.shift for b in other.blocks] == [b.attn.shift for b in made.blocks]
    for name, value in model.state_dict().items():
        expected = resize_table(value, (4, 4), (6, 6)) if name.endswith(TABLE) else value
        assert torch.equal(other.state_dict()[name], expected)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), other(x))
    assert padding(other, 48) == "" == padding(None, 48)
    assert padding(other, 32) == "windows do not divide the maps, which are padded: 16 x 16 by 6, 8 x 8 by 6"


# ----------------------------------------------------------------------------------------------------------- steps
def test_steps_make_the_forward_pass():
    model, x = small(), rows(2, 3, 32, 32)
    embedded = model.embed(x)
    assert embedded.shape == (2, 16, 16, 24)
    patch = model.patch_embed["proj"](x)[1, :, 3, 5]
    norm = torch.nn.functional.layer_norm(patch, (24,), *model.patch_embed["norm"].parameters(), 1e-5)
    torch.testing.assert_close(embedded[1, 3, 5], norm)
    (encoded,) = model.encode(embedded)
    assert encoded.shape == (2, 8, 8, 48)
    assert torch.equal(model.tokens(x), encoded.flatten(1, 2)) and torch.equal(model(x), model.tokens(x).mean(1))


def test_what_a_mask_token_replaces_has_no_influence():
    model, x = small(), rows(2, 3, 32, 32)
    mask, token = torch.zeros(1, 16, 16, 1, dtype=torch.bool), torch.full((24,), 0.1).double()
    mask[:, 4:8, 8:12] = True
    changed = x.clone()
    changed[:, :, 8:16, 16:24] += 1
    first, second = (model.encode(model.embed(v).where(~mask, token))[0] for v in (x, changed))
    assert torch.equal(first, second) and not torch.allclose(model.tokens(x), model.tokens(changed))
    flat = mask.expand(2, -1, -1, -1).flatten(1)
    assert torch.equal(model.embed(x, flat, token[None, None]), model.embed(x).where(~mask, token))
    assert torch.equal(model.maps(x, mask=flat, token=token[None, None]), first.permute(0, 3, 1, 2))
    assert torch.equal(model.maps(x).mean((2, 3)), model(x))


def test_last_blocks():
    """After block i what a network gives that ends there; only the last stage's pass the final norm."""
    model, x = small(), rows(2, 3, 32, 32)
    found = model.last(x, 3)
    assert [t.shape for t in found] == [(2, 256, 24), (2, 64, 48), (2, 64, 48)]
    assert torch.equal(found[2], model.tokens(x)) and len(model.last(x, 9)) == 4
    y = model.embed(x)
    for block in model.layers[0].blocks:
        y = block(y)
    assert torch.equal(found[0], y.flatten(1, 2))
    y = model.layers[1].blocks[0](model.layers[0].downsample(y))
    assert torch.equal(found[1], model.norm(y).flatten(1, 2))


def test_dropped_branches_are_left_out():
    model, x = small(), rows(2, 3, 32, 32)
    paths = path_factors(torch.rand(2, model.draws, generator=torch.Generator().manual_seed(0)).double(), 0.5)
    assert paths.shape == (8, 2) and torch.equal(model(x, torch.ones_like(paths)), model(x))
    paths = torch.ones(8, 2, dtype=torch.float64)
    paths[:, 1] = 0
    out = model(x, paths)
    torch.testing.assert_close(out[0], model(x)[0])
    bare = model.norm(model.layers[0].downsample(model.embed(x[1:])))
    torch.testing.assert_close(out[1], bare.mean((0, 1, 2)))
    one, block, y = torch.tensor([[0.0], [2.0]]).double(), model.blocks[1], rows(1, 8, 8, 24)
    torch.testing.assert_close(block(y, one), y + 2 * block.mlp(block.norm2(y)))


def test_names_are_the_official_ones_and_nothing_but_parameters_is_saved():
    model = small()
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    names = [
        f"layers.{s}.blocks.{b}.{layer}.{p}"
        for s in (0, 1)
        for b in (0, 1)
        for layer in layers
        for p in ("weight", "bias")
    ]
    names += [f"layers.{s}.blocks.{b}.attn.relative_position_bias_table" for s in (0, 1) for b in (0, 1)]
    names += [f"{layer}.{p}" for layer in ("patch_embed.proj", "patch_embed.norm", "norm") for p in ("weight", "bias")]
    names += [f"layers.0.downsample.{n}" for n in ("reduction.weight", "norm.weight", "norm.bias")]
    assert set(model.state_dict()) == set(names) == {name for name, _ in model.named_parameters()}


def test_initialisation():
    torch.manual_seed(0)
    model = swin("swin_tiny", 32, patch_size=2)
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 2000:
            assert 0.018 < p.std() < 0.022, name
    assert not model.blocks[0].attn.qkv.bias.any() and not model.blocks[5].mlp.fc2.bias.any()


def test_gradient_reaches_everything():
    model = small()
    model(rows(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
