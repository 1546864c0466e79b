"""CAE's masks, regressor and decoder, targets, loss, tokenizer, pictures, and how its files are named."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import cae
from cae import (
    CAE,
    augmentation,
    cae_loss,
    find_codebook,
    hide,
    nearest,
    normalised,
    patchify,
    reconstruct,
    token_logits,
)
from common.augment import EvalView
from common.checkpoint import load_backbone
from common.datasets import open_dataset
from common.rng import uniforms
from common.vit import path_factors, vit
from tests.helpers import flags, logged, main, parsed, records, refused, rows, state, train, write_images

CPU = torch.device("cpu")


def seeds(n):
    return uniforms(7, 0, range(n), 100, 1)


def tiny(outputs=12, dim=24, depth=2, drop_path=0.0, codebook=0):
    """A network of 16 patches of 16 x 16 images, all of its parameters away from where they start."""
    torch.manual_seed(0)
    backbone = vit("vit_tiny", 16, dim / 192, 4, depth, 3, positions="sincos-yx", layer_scale=0.1)
    model = CAE(backbone, outputs, codebook, 2, 2, 0.1, drop_path).double()
    for p in model.parameters():
        p.data += 0.1 * p.requires_grad * torch.randn_like(p)
    return model


def places(n=3, count=6):
    return hide(seeds(n), (4, 4), count, CPU)


# ------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("grid, count", [((14, 14), 98), ((14, 14), 75), ((8, 8), 32), ((4, 4), 15), ((2, 2), 1)])
def test_every_patch_is_visible_or_hidden(grid, count):
    visible, hidden = hide(seeds(50), grid, count, CPU)
    patches = grid[0] * grid[1]
    assert hidden.shape == (50, count) and visible.shape == (50, patches - count)
    for a, b in zip(visible.tolist(), hidden.tolist(), strict=True):
        assert a == sorted(a) and b == sorted(b) and sorted(a + b) == list(range(patches))
    assert len({tuple(h) for h in hidden.tolist()}) > min(25, patches / 2)


def test_blocks_have_sixteen_patches_or_more():
    """Of 14 x 14: a patch without a masked neighbour would be a block of its own."""
    _, hidden = hide(seeds(200), (14, 14), 98, CPU)
    mask = np.zeros((200, 196), bool)
    np.put_along_axis(mask, hidden.numpy(), True, 1)
    padded = np.pad(mask.reshape(200, 14, 14), ((0, 0), (1, 1), (1, 1)))
    neighbours = sum(np.roll(padded, shift, axis) for shift in (1, -1) for axis in (1, 2))
    assert (neighbours[padded] > 0).mean() > 0.995  # the last ones fill what is left


# -------------------------------------------------------------------------------------------------------- loss
def slow_loss(prediction, target, z, target_z, weight):
    prediction, target, z, target_z = (x.numpy() for x in (prediction, target, z, target_z))
    if target.ndim == 3:
        first = ((prediction - target) ** 2).sum() / prediction.size
    else:
        terms = []
        for b, m in np.ndindex(target.shape):
            e = np.exp(prediction[b, m] - prediction[b, m].max())
            terms.append(-np.log(e[target[b, m]] / e.sum()))
        first = sum(terms) / len(terms)
    return first + weight * ((z - target_z) ** 2).sum() / z.size


@pytest.mark.parametrize("tokens", [True, False])
def test_loss_equals_loops(tokens):
    prediction, z, target_z = 3 * rows(4, 5, 7), rows(4, 5, 6), rows(4, 5, 6, seed=3)
    target = torch.arange(20).view(4, 5) % 7 if tokens else rows(4, 5, 7, seed=9)
    found = cae_loss(prediction, target, z, target_z, 1.5)
    assert found.item() == pytest.approx(slow_loss(prediction, target, z, target_z, 1.5), abs=1e-12)
    halves = [cae_loss(prediction[s], target[s], z[s], target_z[s], 1.5) for s in (slice(0, 2), slice(2, 4))]
    assert sum(halves).item() / 2 == pytest.approx(found.item(), abs=1e-12), "processes can share a batch"
    inputs = [x.requires_grad_() for x in (prediction, z, target_z)]
    cae_loss(prediction, target, z, target_z).backward()
    assert prediction.grad.any() and z.grad.any() and target_z.grad is None
    assert torch.autograd.gradcheck(lambda p, z: cae_loss(p, target, z, target_z.detach()), inputs[:2])


def test_loss_of_chance():
    z = rows(2, 3, 4)
    assert cae_loss(torch.zeros(2, 3, 50), torch.ones(2, 3).long(), z, z).item() == pytest.approx(math.log(50))


# ------------------------------------------------------------------------------------------------------- model
def test_parameters_are_those_of_the_official_network():
    """148,681,472 of ViT-B with regressor, decoder and mask token; here 20 layers of 768 dimensions bias their keys."""
    with torch.device("meta"):
        model = CAE(vit("vit_base", 224, positions="sincos-yx", layer_scale=0.1), 8192)
    count = {p: p.numel() for p in model.parameters() if p.requires_grad}
    assert sum(count.values()) - 20 * 768 == 148_681_472
    assert sum(count[p] for p in model.backbone.parameters() if p in count) - 12 * 768 == 85_656_576


def norm(x, layer):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer.weight.numpy() + layer.bias.numpy()


def linear(x, weight, bias):
    return x @ weight.numpy().T + bias.numpy()


def attention(q, k, v, heads):
    """One query of one head at a time."""
    found = np.zeros_like(q)
    for part in np.split(np.arange(q.shape[1]), heads):
        for i in range(len(q)):
            scores = np.array([q[i, part] @ row[part] for row in k]) / len(part) ** 0.5
            weights = np.exp(scores - scores.max())
            found[i, part] = (weights / weights.sum()) @ v[:, part]
    return found


def mlp(x, block):
    h = linear(x, block.mlp.fc1.weight, block.mlp.fc1.bias)
    h = h * (1 + np.vectorize(math.erf)(h / 2**0.5)) / 2
    return linear(h, block.mlp.fc2.weight, block.mlp.fc2.bias) * block.ls2.gamma.numpy()


def slow_heads(model, seen, visible, hidden, factors):
    """Regressor and decoder for one image: predictions and z. factors: of the branches of all their blocks."""
    table, heads, factors = model.backbone.pos_embed[0, 1:].numpy(), model.backbone.heads, iter(factors)
    p, r = table[hidden], np.concatenate([table[visible], table[hidden]])
    x = np.repeat(model.mask_token[0].numpy(), len(hidden), 0)
    for block in model.regressor:
        y, a = np.concatenate([seen, x]), block.attn
        q = linear(norm(x + p, block.norm1), a.q.weight, a.q.bias)
        k = linear(norm(y + r, block.norm_k), a.k.weight, a.k.bias)
        v = linear(norm(y, block.norm_v), a.v.weight, a.v.bias)
        branch = linear(attention(q, k, v, heads), a.proj.weight, a.proj.bias) * block.ls1.gamma.numpy()
        x = norm(x + next(factors) * branch, block.norm2)
        x = x + next(factors) * mlp(x, block)
    z = norm(x, model.regressor_norm)
    x = z + p
    for block in model.decoder:
        a = block.attn
        q, k, v = np.split(linear(norm(x, block.norm1), a.qkv.weight, a.qkv.bias), 3, 1)
        branch = linear(attention(q, k, v, heads), a.proj.weight, a.proj.bias) * block.ls1.gamma.numpy()
        x = x + next(factors) * branch
        x = x + next(factors) * mlp(norm(x, block.norm2), block)
    return linear(norm(x, model.decoder_norm), model.head.weight, model.head.bias), z


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@torch.no_grad()
def test_regressor_and_decoder_equal_a_slow_formula(drop_path):
    """Also with branches left out, each of the four parts by numbers of its own."""
    model, x, (visible, hidden) = tiny(drop_path=drop_path), rows(3, 3, 16, 16), places()
    u = torch.from_numpy(uniforms(1, 0, range(3), 103, model.draws)) if drop_path else None
    found, z, target = model(x, visible, hidden, u)
    factors = [None, None, torch.ones(4, 3), torch.ones(4, 3)]
    if drop_path:
        assert model.draws == 16
        factors = [path_factors(u[:, i : i + 4], drop_path) for i in range(0, 16, 4)]
        assert len({tuple(f.flatten().tolist()) for f in factors}) == 4
    seen = model.backbone.tokens(x, visible, factors[0])[:, 1:]
    torch.testing.assert_close(target, model.backbone.tokens(x, hidden, factors[1])[:, 1:], rtol=0, atol=1e-12)
    for b in range(3):
        own = torch.cat(factors[2:])[:, b].tolist()
        expected = slow_heads(model, seen[b].numpy(), visible[b].numpy(), hidden[b].numpy(), own)
        np.testing.assert_allclose(found[b].numpy(), expected[0], atol=1e-10)
        np.testing.assert_allclose(z[b].numpy(), expected[1], atol=1e-10)


def test_hidden_pixels_reach_the_target_only_and_no_gradient_passes_there():
    model, x, (visible, hidden) = tiny(), rows(3, 3, 16, 16), places()
    inside = torch.zeros(3, 16, 48).scatter(1, hidden[:, :, None].expand(-1, -1, 48), 1.0)
    inside = cae.unpatchify(inside, (4, 4)) > 0
    first, changed, other = (model(x + 5 * part, visible, hidden) for part in (0 * x, inside, ~inside))
    assert torch.equal(first[0], changed[0]) and torch.equal(first[1], changed[1])
    assert torch.equal(first[2], other[2]) and not torch.allclose(first[0], other[0])
    assert not torch.allclose(first[2], changed[2])
    assert [out.requires_grad for out in first] == [True, True, False]
    sum(out.square().sum() for out in first).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["backbone.pos_embed"]


def test_weights_start_as_in_the_official_code():
    torch.manual_seed(0)
    model = CAE(vit("vit_tiny", 32, positions="sincos-yx", layer_scale=0.1), 30)
    for weight in (model.mask_token, model.backbone.cls_token, model.backbone.patch_embed.proj.weight):
        assert 0.019 < weight.abs().max() <= 0.02 and weight.std().item() == pytest.approx(0.0108, rel=0.1)
    for name, p in model.named_parameters():
        bound = (
            (6 / sum(p.shape)) ** 0.5 if p.ndim == 2 else None
        )  # Glorot: queries of the encoder with keys and values
        assert bound is None or 0.98 * bound < p.abs().max() <= bound, name
        assert not name.endswith("gamma") or (p == 0.1).all()


def test_gradient_checkpointing_changes_no_gradient():
    model, x, (visible, hidden) = tiny(), rows(3, 3, 16, 16), places()
    found = []
    for model.backbone.checkpointing in (False, True):
        model.zero_grad()
        prediction, z, target = model(x, visible, hidden)
        cae_loss(prediction, torch.zeros_like(prediction), z, target).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --------------------------------------------------------------------------------------------------- tokenizer
def dalle(width=4, tokens=11):
    """Random weights of DALL-E's encoder."""
    shapes = cae.tokenizer_shapes(width, tokens)
    return {k: rows(*s, seed=i).float() * (2 / math.prod(s[1:]) ** 0.5) for i, (k, s) in enumerate(shapes.items())}


def slow_conv(x, w, b):
    """(C, H, W), pixel by pixel, zeros around the image."""
    reach = w.shape[2] // 2
    x, (height, width) = np.pad(x, ((0, 0), (reach, reach), (reach, reach))), x.shape[1:]
    found = np.zeros((len(w), height, width))
    for i, j in np.ndindex(height, width):
        found[:, i, j] = (w * x[None, :, i : i + w.shape[2], j : j + w.shape[3]]).sum((1, 2, 3)) + b
    return found


def slow_logits(weights, image):
    """Four groups of two blocks; between groups the largest of 2 x 2 pixels stays."""
    w = {k: v.double().numpy() for k, v in weights.items()}
    x = slow_conv(0.1 + 0.8 * image, w["blocks.input.w"], w["blocks.input.b"])
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name, y = f"blocks.group_{group}.block_{block}", x
            for i in (1, 2, 3, 4):
                y = slow_conv(np.maximum(y, 0), w[f"{name}.res_path.conv_{i}.w"], w[f"{name}.res_path.conv_{i}.b"])
            if group > 1 and block == 1:
                x = slow_conv(x, w[f"{name}.id_path.w"], w[f"{name}.id_path.b"])
            x = x + y / 8**2
        if group < 4:
            x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
    return slow_conv(np.maximum(x, 0), w["blocks.output.conv.w"], w["blocks.output.conv.b"])


def test_tokenizer_equals_a_slow_formula():
    weights, x = dalle(), rows(2, 3, 24, 16).sigmoid()
    found = token_logits(weights, x)
    assert found.shape == (2, 11, 3, 2)
    for logits, image in zip(found, x, strict=True):
        expected = slow_logits(weights, image.numpy())
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_tokenizer_has_the_published_shapes():
    """54 million numbers; names and shapes of some layers as in OpenAI's file."""
    shapes = cae.tokenizer_shapes()
    assert len(shapes) == 74 and sum(map(math.prod, shapes.values())) == 53_786_240
    res = "blocks.group_{}.block_{}.res_path.conv_{}.w".format
    known = {"blocks.input.w": (256, 3, 7, 7), "blocks.input.b": (256,), "blocks.output.conv.w": (8192, 2048, 1, 1)}
    known |= {res(1, 1, 1): (64, 256, 3, 3), res(2, 1, 1): (128, 256, 3, 3), res(2, 2, 1): (128, 512, 3, 3)}
    known |= {res(4, 2, 4): (2048, 512, 1, 1), "blocks.group_3.block_1.id_path.w": (1024, 512, 1, 1)}
    assert known.items() <= shapes.items() and "blocks.group_1.block_1.id_path.w" not in shapes


@pytest.mark.parametrize("prefix, wrap", [("", False), ("encoder.", True), ("target_generator.", True)])
def test_tokenizer_is_found_in_its_file(prefix, wrap, tmp_path):
    weights = dalle()
    content = {prefix + k: v for k, v in weights.items()} | {"backbone.cls_token": torch.zeros(1)}
    torch.save({"state_dict": content, "meta": {}} if wrap else content, tmp_path / "t.pth")
    found = cae.load_tokenizer(tmp_path / "t.pth", 3, CPU)
    assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in found)


def without(name):
    return {k: v for k, v in dalle().items() if k != name}


BAD = {
    "res": (
        dalle() | {"blocks.group_2.block_2.res_path.conv_1.w": torch.zeros(2, 2, 3, 3)},
        "conv_1.w is (2, 2, 3, 3)",
    ),
    "missing": (without("blocks.output.conv.b"), "blocks.output.conv.b is missing, DALL-E's encoder has (11,)"),
    "no logits": (without("blocks.output.conv.w"), "blocks.output.conv.w is missing"),
    "more": (dalle() | {"blocks.group_5.w": torch.zeros(2)}, "blocks.group_5.w is (2,)"),
    "scalar": (dalle() | {"blocks.input.w": torch.zeros(())}, "blocks.input.w is ()"),
    "other": ({"cls_token": torch.zeros(1)}, "t.pth is not DALL-E's encoder: there is no blocks.input.w in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_another_file_is_no_tokenizer(case, capsys, tmp_path):
    content, message = BAD[case]
    torch.save(content, tmp_path / "t.pth")
    words = ["--target", "dalle", "--tokenizer", tmp_path / "t.pth"]
    error = refused(capsys, main, "cae", "--data", "fake:64", "--out", tmp_path, *words)
    assert message in error and "--tokenizer" in error


# ----------------------------------------------------------------------------------------------------- targets
def words(out, target):
    """The tiny flags of a run with another target than that of SCRIPTS."""
    tiny = " ".join(flags("cae", out))
    return tiny.replace(
        "--target kmeans --codebook 8", f"--target {target}{' --codebook 8' * (target == 'kmeans')}"
    ).split()


def watched(monkeypatch, tmp_path, target, *more):
    """What a short run of a target saw and predicted: a list of (views, visible, hidden, target) of its batches."""
    seen, forward, loss = [], CAE.forward, cae_loss

    def watch(model, x, visible, hidden, u=None):
        seen.append([x, visible, hidden, u])
        return forward(model, x, visible, hidden, u)

    def keep(prediction, found, *rest):
        seen[-1].append(found)
        return loss(prediction, found, *rest)

    monkeypatch.setattr(CAE, "forward", watch)
    monkeypatch.setattr(cae, "cae_loss", keep)
    main("cae", *words(tmp_path, target), "--pictures-every", 0, *more)
    monkeypatch.undo()
    return seen


def slow_patches(image, size, norm_pix):
    """(C, H, W) -> one list of numbers per patch."""
    found = []
    for i in range(0, image.shape[1], size):
        for j in range(0, image.shape[2], size):
            patch = image[:, i : i + size, j : j + size].transpose(1, 2, 0).ravel()
            spread = np.sqrt(patch.var(ddof=1) + 1e-6)
            found.append((patch - patch.mean()) / spread if norm_pix else patch)
    return np.array(found)


@pytest.mark.parametrize("case", ["pixel", "pixel --no-norm-pix", "kmeans", "kmeans --no-norm-pix", "hog"])
def test_targets_are_those_of_the_hidden_patches(case, monkeypatch, tmp_path):
    """Of the images as they are augmented, in the order in which the network predicts them."""
    target, *more = case.split()
    seen = watched(monkeypatch, tmp_path, target, "--max-steps", 2, "--precision", "fp64", *more)
    saved = state(tmp_path)["model"]
    assert len(seen) == 2 and ("codebook" in saved) == (target == "kmeans")
    for x, _, hidden, _, found in seen:
        assert hidden.shape == (16, 32) and len(found) == 16
        for image, places, values in zip(x.numpy(), hidden.tolist(), found, strict=True):
            if target == "hog":
                expected = 3 * cae.hog(torch.from_numpy(image)[None], 2, 2)[0, places].numpy()
                lengths = (expected.reshape(-1, 9) ** 2).sum(1)  # of a flat cell it is 0
                assert np.isclose(lengths, 9).mean() > 0.9
            else:
                expected = slow_patches(image, 2, not more)[places]
            if target == "kmeans":
                distances = ((expected[:, None] - saved["codebook"].numpy()) ** 2).sum(2)
                expected = distances.argmin(1)
            np.testing.assert_allclose(values.numpy(), expected, atol=1e-9)


def test_a_codebook_stays_with_the_head_that_was_trained_on_it(tmp_path):
    main("cae", *words(tmp_path / "a", "kmeans"), "--max-steps", 1)
    main("cae", *words(tmp_path / "b", "kmeans"), "--max-steps", 1, "--seed", 5, "--init", tmp_path / "a/last.pt")
    a, b = (state(tmp_path / run)["model"]["codebook"] for run in "ab")
    assert a.any() and torch.equal(a, b)


@pytest.mark.parametrize("stats", [[], ["--stats", "auto"]])
def test_the_tokenizer_sees_the_same_crop_eight_pixels_per_patch(stats, monkeypatch, tmp_path):
    """In [0, 1], however the network's view is normalised; its tokens are those of the hidden patches."""
    torch.save(dalle(), tmp_path / "t.pth")
    images, real = [], token_logits

    def keep(weights, x):
        images.append(x)
        return real(weights, x)

    monkeypatch.setattr(cae, "token_logits", keep)
    more = ["--max-steps", 1, "--patch-size", 4, "--tokenizer", tmp_path / "t.pth", *stats]
    ((x, _, hidden, _, target),) = watched(monkeypatch, tmp_path, "dalle", *more)
    (small,) = images
    assert small.shape == (16, 3, 32, 32) and 0 <= small.min() < 0.2 and 0.8 < small.max() <= 1
    mean, std = (torch.tensor(state(tmp_path)["meta"][k]).view(-1, 1, 1) for k in ("mean", "std"))
    again = torch.nn.functional.avg_pool2d(small, 2)  # twice as many pixels of the same crop, mirrored or not
    error = (again - (x * std + mean)).abs().mean((1, 2, 3))
    mirrored = (again.flip(3) - (x * std + mean)).abs().mean((1, 2, 3))
    assert error.max() < 0.05 and mirrored.mean() > 2 * error.mean()
    assert torch.equal(target, real(dalle(), small).argmax(1).flatten(1).gather(1, hidden))


def test_codebook_is_found_by_kmeans(tmp_path):
    """Each centroid is the mean of the patches that it is nearest to; the first and only one is the mean of all."""
    data = open_dataset(str(write_images(tmp_path, [f"{i}.png" for i in range(12)], size=(16, 16))), "train")
    view = EvalView(16, resize=16, interpolation="bicubic")
    rest = (4, False, 3, CPU, 0, torch.float64)
    x = torch.stack([data[i][0] if torch.is_tensor(data[i][0]) else torch.empty(0) for i in range(12)]).double() / 255
    x = (x - torch.tensor(view.mean).view(-1, 1, 1)) / torch.tensor(view.std).view(-1, 1, 1)
    patches = patchify(x, 4)
    torch.testing.assert_close(find_codebook(data, view, 1, *rest)[0], patches.mean((0, 1)), atol=1e-6, rtol=0)
    codebook = find_codebook(data, view, 5, *rest)
    labels = nearest(patches, codebook)
    for k in range(5):
        torch.testing.assert_close(codebook[k], patches[labels == k].mean(0), atol=1e-6, rtol=0)


def test_nearest_is_the_nearest():
    patches, codebook = rows(4, 9, 12), rows(7, 12)
    distances = (patches[:, :, None] - codebook).square().sum(3)
    assert torch.equal(nearest(patches, codebook), distances.argmin(2))


# ------------------------------------------------------------------------------------------------------ recipe
def test_recipe_is_the_papers():
    args = parsed("cae", "--data", "/images")
    assert (args.arch, args.image_size, args.batch_size, args.target) == ("vit_base", 224, 2048, "dalle")
    assert (args.epochs, args.warmup_epochs, args.crop_min, args.clip) == (300, 10, 0.08, 3.0)
    rates = [rate * args.batch_size / 256 for rate in (args.lr, args.min_lr)]
    assert rates == pytest.approx([1.5e-3, 1e-5]) and args.weight_decay == 0.05
    assert (args.regressor_depth, args.decoder_depth, args.align_weight) == (4, 4, 2.0)
    assert (args.layer_scale, args.drop_path, args.masked) == (0.1, 0.1, None)
    assert {"target", "tokenizer", "codebook", "masked"} <= {*args.held}
    large, small = augmentation(224, tokens=112)
    assert (large.area, large.ratio, large.interpolation, large.flip) == ((0.08, 1.0), (3 / 4, 4 / 3), "bicubic", 0.5)
    assert (large.size, small.size, small.area, small.flip, small.mean) == (224, 112, large.area, 0.5, large.mean)
    assert (large.jitter_p, large.gray_p, large.blur_p, large.solarize_p) == (0, 0, 0, 0)


def test_optimizer(tmp_path):
    saved = train("cae", tmp_path, "--max-steps", 6, "--min-lr", 1.6e-5)["optimizer"]
    decayed, plain = saved["param_groups"]
    assert decayed["betas"] == plain["betas"] == (0.9, 0.999)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    shapes = {i: tuple(moments["exp_avg"].shape) for i, moments in saved["state"].items()}
    assert all(len(shapes[i]) > 1 for i in decayed["params"]) and all(len(shapes[i]) == 1 for i in plain["params"])
    assert sorted(shape for shape in shapes.values() if len(shape) == 3) == [(1, 1, 48)] * 2
    # 4 steps of warm-up from 0, 12 of cosine down to the smallest rate
    rates, peak = {step: r["lr"] for step, r in records(tmp_path).items()}, 1.875e-4 * 16 / 256
    expected = [0, peak / 4, peak / 2, 3 * peak / 4, peak, 1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi / 12)) / 2]
    assert [rates[s] for s in range(1, 7)] == pytest.approx(expected)


def test_gradients_are_clipped(tmp_path):
    """The first step's second moments are a thousandth of the squared gradient: their sum tells its norm."""
    norms = []
    for clip in (3.0, 0.25, 0):
        saved = train("cae", tmp_path / str(clip), "--max-steps", 1, "--clip", clip)["optimizer"]["state"]
        norms.append(sum(s["exp_avg_sq"].sum().item() for s in saved.values()) ** 0.5 * 1000**0.5)
    assert norms[0] == pytest.approx(min(3.0, norms[2]), rel=1e-3) and norms[1] == pytest.approx(0.25, rel=1e-3)
    assert norms[2] > 0.3


def test_masks_and_paths_belong_to_their_image(monkeypatch, tmp_path):
    """Its place in the batch, threads and micro-batches do not matter (nor do processes: test_scripts.py)."""

    def numbers(name, *more):
        found = watched(monkeypatch, tmp_path / name, "pixel", *more)
        images, hidden, u = (torch.cat([batch[i] for batch in found]) for i in (0, 2, 3))
        keys = [image.contiguous().numpy().tobytes() for image in images]
        return dict(zip(keys, zip(hidden.tolist(), u.tolist(), strict=True), strict=True))

    whole = numbers("a", "--max-steps", 4)
    assert len(whole) == 64 and len({str(v) for v in whole.values()}) == 64
    assert numbers("b", "--max-steps", 8, "--batch-size", 8, "--workers", 0) == whole
    assert numbers("c", "--max-steps", 4, "--accum", 4) == whole
    later = numbers("d", "--max-steps", 8)
    assert len({str(v) for v in later.values()}) == 128, "every epoch has numbers of its own"


@pytest.mark.parametrize("target", ["dalle", "kmeans", "pixel", "hog"])
def test_only_the_papers_target_is_called_cae(target, tmp_path, capsys):
    torch.save(dalle(), tmp_path / "t.pth")
    more = ["--tokenizer", tmp_path / "t.pth"] if target == "dalle" else []
    main("cae", *words(tmp_path, target), "--max-steps", 2, *more)
    out, meta = capsys.readouterr().out, state(tmp_path, "backbone.pt")["meta"]
    assert (
        meta["method"] == state(tmp_path)["meta"]["method"] == ("cae" if target == "dalle" else f"cae, target {target}")
    )
    values = {"dalle": "11 tokens of DALL-E", "kmeans": "8 centroids", "pixel": "12 pixels"}
    assert f"target      {values.get(target, '27 gradient histograms')}" in out
    assert ("the results are not CAE's" in out) == (target != "dalle")
    assert ("loss ln(" in out) == (target in ("dalle", "kmeans"))
    for record in records(tmp_path).values():
        assert 0 < record["std"] < 1.2 and record["align"] > 0
        assert ("accuracy" in record) == (target in ("dalle", "kmeans"))
    assert (tmp_path / "reconstructions.png").exists() == (target in ("kmeans", "pixel"))
    load_backbone(tmp_path / "last.pt")
    assert f": {meta['method']}, vit_tiny" in capsys.readouterr().out


def test_logged_figures_are_those_of_the_batch(monkeypatch, tmp_path):
    ((*_, target),) = watched(monkeypatch, tmp_path, "kmeans", "--max-steps", 1, "--drop-path", 0)
    assert 0 <= (record := records(tmp_path)[1])["accuracy"] <= 1
    assert record["accuracy"] * target.numel() == pytest.approx(round(record["accuracy"] * target.numel()), abs=1e-3)
    assert record["loss"] > 2 * record["align"]


def test_codebook_stays_when_a_run_goes_on(monkeypatch, tmp_path):
    first = train("cae", tmp_path, "--max-steps", 1)["model"]["codebook"]
    monkeypatch.setattr(cae, "find_codebook", lambda *args: pytest.fail("found a second time"))
    assert torch.equal(train("cae", tmp_path, "--max-steps", 2)["model"]["codebook"], first) and first.any()


# ---------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("codebook", [0, 5])
def test_pictures_of_a_perfect_prediction_are_the_target(norm_pix, codebook):
    """Without tokens that is the image; with tokens, the nearest centroid stands in each hidden patch."""
    x, (visible, hidden), model = 2 * rows(3, 3, 16, 16) - 1, places(), tiny(codebook=codebook)
    truth = normalised(x, 4, norm_pix)[torch.arange(3)[:, None], hidden]
    if codebook:
        model.codebook.copy_(rows(codebook, 48))
        truth = torch.nn.functional.one_hot(nearest(truth, model.codebook), codebook).double()
    model.forward = lambda *inputs: (truth, None, None)
    original, seen, predicted, target = reconstruct(model, x, visible, hidden, norm_pix)
    assert torch.equal(original, x)
    torch.testing.assert_close(predicted, target)
    for b in range(3):
        shown, expected = slow_patches(target[b].numpy(), 4, False), slow_patches(x[b].numpy(), 4, False)
        for i in hidden[b].tolist() if codebook else ():
            centre, spread = (expected[i].mean(), (expected[i].var(ddof=1) + 1e-6) ** 0.5) if norm_pix else (0, 1)
            choices = model.codebook.numpy() * spread + centre
            expected[i] = choices[((choices - expected[i]) ** 2).sum(1).argmin()]
        np.testing.assert_allclose(shown, expected, atol=1e-9)
        left = slow_patches(seen[b].numpy(), 4, False)
        assert (left[hidden[b]] == 0).all() and np.array_equal(left[visible[b]], expected[visible[b]])


def test_training_leaves_pictures(tmp_path):
    train("cae", tmp_path, "--max-steps", 2)
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.width == 4 * (4 + 160) + 4 and picture.height > 8 * 164 + 20
        grey = (np.asarray(picture)[24 : 20 + 8 * 164] == 204).all(2)
    visible = np.stack([grey[:, 4 + i * 164 :][:, :160] for i in range(4)])[:, np.arange(len(grey)) % 164 < 160]
    assert visible.mean((1, 2)) == pytest.approx([0, 0.5, 0, 0], abs=1e-3), "half of the patches are hidden"


# ------------------------------------------------------------------------------------------------ official files
def official(network, rename=()):
    """The encoder's tensors under the names of CAE's code: no bias of keys, gammas."""
    weights = {}
    for name, value in network.state_dict().items():
        for old, new in (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), *rename):
            name = name.replace(old, new)
        if name.endswith("attn.qkv.bias"):
            q, k, v = value.chunk(3)
            k.zero_()
            weights |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            weights[name] = value
    return weights


MMCLS = [("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."), ("mlp.fc1", "ffn.layers.0.0")]
MMCLS += [("mlp.fc2", "ffn.layers.1"), (".norm", ".ln"), ("norm.", "ln1.")]


@pytest.mark.parametrize("kind", ["CAE", "CAE, older", "MMSelfSup"])
def test_official_files_are_read(kind, tmp_path, capsys):
    torch.manual_seed(0)
    network = vit("vit_tiny", 32, patch_size=8, depth=2, positions="sincos-yx", layer_scale=0.1).eval()
    for p in network.parameters():
        p.data += 0.05 * p.requires_grad * torch.randn_like(p)
    weights, x = official(network, MMCLS if kind == "MMSelfSup" else ()), rows(2, 3, 32, 32).float()
    place, copy, rest = {
        "CAE": ("encoder.", "alignment_encoder.", ["regresser.norm.weight", "decoder.head.weight", "rd_pos_embed"]),
        "CAE, older": ("encoder.", "teacher.", ["pretext_neck.head.weight"]),
        "MMSelfSup": ("backbone.", "teacher.", ["neck.decoders.0.norm1.weight"]),
    }[kind]
    content = {copy + k: v + 1 for k, v in weights.items()} | {place + k: v for k, v in weights.items()}
    content |= dict.fromkeys([*rest, "mask_token"], torch.ones(1))
    whole = {"state_dict": content, "meta": {}} if kind == "MMSelfSup" else {"model": content, "epoch": 1}
    torch.save(whole, tmp_path / "file.pth")
    found, meta = load_backbone(tmp_path / "file.pth")
    assert meta["method"] == kind.partition(",")[0] and meta["positions"] == "sincos-yx"
    torch.testing.assert_close(found.eval().tokens(x), network.tokens(x), atol=1e-5, rtol=1e-5)
    if kind == "CAE":  # and a run may go on from it
        more = "--arch vit_tiny --width 1 --image-size 32 --patch-size 8 --max-steps 1".split()
        saved = train("cae", tmp_path / "run", *more, "--init", tmp_path / "file.pth")["model"]
        assert torch.equal(saved["backbone.norm.weight"], network.norm.weight)


# ------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "case, expected",
    [
        ("--target dalle", "--target dalle needs --tokenizer FILE"),
        ("--target dalle --tokenizer encoder.pkl", "OpenAI's file is a program"),
        ("--target dalle --tokenizer none.pth", "--tokenizer none.pth: no such file"),
        ("--target dalle --tokenizer none.pth --channels 1", "DALL-E's tokenizer is for 3"),
        ("--target kmeans --tokenizer x.pth", "--tokenizer is for --target dalle, not for kmeans"),
        ("--codebook 8", "--codebook is for --target kmeans, not for pixel"),
        ("--target hog --norm-pix", "--norm-pix is for --target kmeans or pixel, not for hog"),
        ("--target clip", "--target"),
        ("--target kmeans --codebook 4097", "--codebook 4097 is larger than the 4096 patches"),
        ("--target kmeans --codebook 1", "--codebook: must be at least 2"),
        ("--masked 64", "--masked 64 of 64 patches: at least one"),
        ("--masked 0", "--masked: must be greater than 0"),
        ("--patch-size 16", "--masked 0 of 1 patches"),
        ("--patch-size 5", "--patch-size"),
        ("--heads 5", "5 heads"),
        ("--lr 1e-6", "--min-lr 1.25e-06 must be smaller than --lr 1e-06"),
        ("--drop-path 1", "--drop-path: must be less than 1"),
        ("--regressor-depth 0", "--regressor-depth: must be greater than 0"),
    ],
)
def test_mistakes(case, expected, capsys, tmp_path):
    assert expected in refused(capsys, main, "cae", *words(tmp_path, "pixel"), *case.split())


def test_one_image_is_enough(tmp_path):
    more = "--batch-size 1 --max-steps 1 --data fake:1 --patch-size 8 --masked 3 --codebook 3".split()
    saved = train("cae", tmp_path, *more)
    assert saved["step"] == 1 and logged(tmp_path)[-1]["step"] == 1
