"""MaskFeat's histograms of oriented gradients, loss, network, recipe, masks in training, and pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from common.masks import block_masks
from common.vit import vit
from maskfeat import (
    MaskFeat,
    augmentation,
    compare,
    default_cell,
    glyphs,
    hog,
    masked,
    maskfeat_loss,
    transformer,
)
from tests.helpers import flags, main, parsed, records, refused, rows, state, train, write_images


def ramp(right, down, size=16):
    """An image (1, 1, S, S) that brightens in one direction."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (right * x + down * y)[None, None].double()


def tiny(**settings):
    torch.manual_seed(0)
    return MaskFeat(transformer("vit_tiny", 16, 0.25, 4, 2, 3), **{"cell": 4, **settings}).double()


def some_mask(images, patches=16):
    """Every image has another number of masked patches."""
    return torch.stack([(torch.arange(patches) % 5 < 1 + i).float().roll(i) for i in range(images)])


# ---------------------------------------------------------------------------------------------------------- HOG
def slow_hog(images, patch, cell, bins, gaussian):
    """The definition, pixel by pixel."""
    smooth, side = np.array([1, 2, 1]), patch // cell
    batch, channels, height, width = images.shape
    found = np.zeros((batch, height // patch, width // patch, channels, bins, side, side))
    for b, c in np.ndindex(batch, channels):
        padded = np.pad(images[b, c], 1, mode="reflect")
        for y, x in np.ndindex(height, width):
            window = padded[y : y + 3, x : x + 3]
            gx, gy = smooth @ (window[:, 0] - window[:, 2]), smooth @ (window[0] - window[2])
            weight = 1.0
            if gaussian:
                away = [(p % patch - (patch - 1) / 2) / (patch / 2) for p in (y, x)]
                weight = math.exp(-(away[0] ** 2 + away[1] ** 2) / 2)
            k = math.floor(math.degrees(math.atan2(gx, gy)) / (180 / bins)) % bins
            place = (y % patch // cell, x % patch // cell)
            found[(b, y // patch, x // patch, c, k, *place)] += weight * math.hypot(gx, gy)
    found /= np.maximum(np.sqrt((found**2).sum(4, keepdims=True)), 1e-12)
    return found.reshape(batch, -1, channels * bins * side * side)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, patch, cell, bins, gaussian",
    [
        ((1, 3, 32, 48), 16, 8, 9, False),
        ((1, 3, 32, 32), 16, 8, 9, True),
        ((2, 1, 8, 16), 8, 4, 9, True),
        ((2, 3, 8, 12), 4, 4, 9, False),
        ((1, 2, 12, 24), 12, 4, 6, False),
        ((2, 4, 4, 6), 2, 2, 9, False),
    ],
)
def test_hog_equals_the_formula(shape, patch, cell, bins, gaussian, dtype):
    images = rows(*shape).to(dtype)
    expected = slow_hog(images.double().numpy(), patch, cell, bins, gaussian)
    found = hog(images, patch, cell, bins, gaussian)
    assert found.dtype == torch.promote_types(dtype, torch.float32), "never in 16 bits"
    assert found.shape == (shape[0], shape[2] * shape[3] // patch**2, shape[1] * bins * (patch // cell) ** 2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("right, down, k", [(1, 0, 4), (-1, 0, 4), (0, 1, 0), (0, -1, 0), (1, 1, 2), (-2, 2, 6)])
def test_hog_of_a_ramp_has_one_orientation(right, down, k):
    """Bins of 20 degrees, from the vertical: 0 and 180 are the first, 45 the third, 90 the fifth, 135 the seventh."""
    inside = hog(ramp(right, down, 48), 16)[0, 4].view(9, 4)  # the image's edges are mirrored and so have others
    assert torch.equal(inside, torch.eye(9, dtype=torch.float64)[k, :, None].expand(-1, 4))


def test_hog_ignores_scale_and_shift_of_a_channel():
    """Also a negative scale: orientations have no sign. Images normalised or not have the same target."""
    images, reference = rows(2, 3, 32, 32), hog(rows(2, 3, 32, 32))
    scale, shift = torch.tensor([0.3, -4.0, 7.0]).view(3, 1, 1), torch.tensor([5.0, -2.0, 0.1]).view(3, 1, 1)
    torch.testing.assert_close(hog(images * scale + shift), reference, rtol=0, atol=1e-9)
    assert not torch.allclose(hog(images * images), reference, atol=1e-2)


def test_hog_of_mirrored_images_is_mirrored():
    """Cells change places, and each bin with the one of the opposite slope (but for the edges of the image, where
    gradients are exactly vertical)."""
    images = rows(3, 3, 32, 32)
    parts = (hog(x, 16, 4).view(3, 2, 2, 3, 9, 4, 4).permute(0, 3, 4, 1, 5, 2, 6) for x in (images, images.flip(3)))
    there, mirrored = (part.reshape(3, 3, 9, 8, 8)[..., 1:-1] for part in parts)
    torch.testing.assert_close(mirrored, there.flip(2, 4), rtol=0, atol=1e-12)


def test_hog_of_flat_images_is_zero():
    images = rows(2, 3, 32, 32)
    images[0] = 0.7
    images[1, 1, :16] = -2.0
    found = hog(images.float()).view(2, 2, 2, 3, 9, 2, 2)
    assert (found[0] == 0).all() and (found[1, 0, :, 1, :, 0] == 0).all() and found.isfinite().all()
    length = found[1, :, :, 0].square().sum(2)
    torch.testing.assert_close(length, torch.ones_like(length))


def test_large_batches_are_taken_in_parts():
    images = rows(12, 3, 176, 176).float()
    assert images.numel() > 2**20
    assert torch.equal(hog(images), torch.cat([hog(x[None]) for x in images]))
    assert torch.equal(hog(images.contiguous(memory_format=torch.channels_last)), hog(images))


@pytest.mark.parametrize(
    "patch, cell", [(16, 8), (14, 7), (32, 8), (12, 6), (10, 5), (8, 4), (9, 9), (7, 7), (4, 4), (2, 2)]
)
def test_cells_go_with_the_patches(patch, cell):
    assert default_cell(patch) == cell


# --------------------------------------------------------------------------------------------------------- loss
def test_loss_is_the_mean_over_all_masked_values():
    prediction, target, mask = rows(4, 16, 5).requires_grad_(), rows(4, 16, 5, seed=1), some_mask(4)
    loss = maskfeat_loss(prediction, target, mask)
    errors = [
        (prediction[b, i, j] - target[b, i, j]).item() ** 2 for b, i, j in np.ndindex(4, 16, 5) if mask[b, i] == 1
    ]
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-12) and len({*mask.sum(1).tolist()}) > 1
    loss.backward()
    expected = 2 * (prediction - target).detach() * mask[:, :, None] / len(errors)
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-12, atol=0)
    zeros = torch.zeros(4, 16, 27, dtype=torch.float64)
    images = rows(4, 3, 16, 16)
    assert maskfeat_loss(zeros, hog(images, 4, 4), mask).item() == pytest.approx(1 / 9), "the line `baseline` of a run"
    assert maskfeat_loss(prediction, target, 0 * mask).item() == 0, "a small batch may have no masked patch"


# ------------------------------------------------------------------------------------------------------ network
@pytest.mark.parametrize("arch, number", [("vit_base", 85_882_476), ("vit_large", 303_413_356)])
def test_parameters_are_those_of_the_official_networks(arch, number):
    with torch.device("meta"):
        assert sum(p.numel() for p in MaskFeat(vit(arch, 224, positions="learned")).parameters()) == number


def test_weights_start_as_in_the_official_code():
    model = MaskFeat(transformer("vit_tiny", 32, patch_size=4, depth=2), cell=4)
    for name, value in model.state_dict().items():
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            assert (value == 1).all(), name
        elif name in ("backbone.norm.bias", "head.bias"):
            assert (value == 0).all(), name
        elif name.startswith("backbone.blocks") and name.endswith("bias"):
            assert (value == 0.02).all(), name
        elif name != "backbone.patch_embed.proj.bias":
            assert value.mean().abs() < 0.005 and value.std().item() == pytest.approx(0.02, rel=0.2), name


def test_masked_pixels_change_nothing():
    model, x, mask = tiny(), rows(3, 3, 16, 16), some_mask(3)
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(model(x + 5 * hidden, mask), model(x, mask))
    assert not torch.allclose(model(x + 5 * (1 - hidden), mask), model(x, mask))


def test_token_and_positions_are_in_their_places():
    """If blocks add nothing, a prediction depends on its own patch and position: of the token where it is masked."""
    model, x, mask = tiny(), rows(3, 3, 16, 16), some_mask(3)
    for block in model.backbone.blocks:
        for p in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
            p.data.zero_()
    prediction, patches = model(x, mask), model.backbone.patch_embed(x)
    for b, i in np.ndindex(3, 16):
        token = model.mask_token[0, 0] if mask[b, i] else patches[b, i]
        token = torch.nn.functional.layer_norm(token + model.backbone.pos_embed[0, 1 + i], (48,), eps=1e-6)
        expected = model.head.weight @ token + model.head.bias
        torch.testing.assert_close(prediction[b, i], expected, rtol=0, atol=1e-12)


def test_it_learns_the_orientation_of_stripes():
    """What is visible tells which orientation the masked patches have."""
    model = tiny().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(60):
        angle, phase = torch.rand(2, 16, 1, 1, 1, generator=generator)
        angle = 0.3 + (angle > 0.5)  # one of two
        images = (x * angle.cos() + y * angle.sin() + 6 * phase).sin().expand(-1, 3, -1, -1)
        mask = (torch.rand(16, 16, generator=generator) < 0.4).float()
        loss = maskfeat_loss(model(images, mask), model.target(images), mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.1 and np.mean(losses[-10:]) < 0.01


# ------------------------------------------------------------------------------------------------------- recipe
def test_recipe_is_the_papers():
    args = parsed("maskfeat", "--data", "/images")
    assert (args.arch, args.image_size, args.batch_size) == ("vit_base", 224, 2048)
    assert (args.epochs, args.warmup_epochs, args.weight_decay, args.clip) == (300, 30, 0.05, 0.02)
    assert (args.lr * args.batch_size / 256, args.min_lr) == (pytest.approx(1.6e-3), 1e-6)
    assert (args.mask_ratio, args.exact_masks, args.bins, args.gaussian) == (0.4, False, 9, False)
    assert {"gaussian", "exact_masks"} < {*args.held} and not {"grad_checkpointing", "pictures_every"} & {*args.held}
    (view,) = augmentation(224)
    assert (view.area, view.ratio, view.interpolation, view.flip) == ((0.5, 1.0), (3 / 4, 4 / 3), "bicubic", 0.5)
    assert (view.jitter_p, view.gray_p, view.blur_p, view.solarize_p) == (0, 0, 0, 0)


def test_optimizer(tmp_path, monkeypatch):
    clipped, real = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: clipped.append(most) or real(p, most))
    saved = train("maskfeat", tmp_path, "--max-steps", 7)["optimizer"]
    assert clipped == [0.02] * 7
    decayed, plain = saved["param_groups"]
    assert decayed["betas"] == plain["betas"] == (0.9, 0.999)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    shapes = {i: tuple(moments["exp_avg"].shape) for i, moments in saved["state"].items()}
    assert all(len(shapes[i]) > 1 for i in decayed["params"]) and all(len(shapes[i]) == 1 for i in plain["params"])
    # class token, mask token and positions are decayed, as in the official code
    assert sorted(shape for shape in shapes.values() if len(shape) == 3) == [(1, 1, 48), (1, 1, 48), (1, 65, 48)]
    # 4 steps of warm-up, 12 of cosine, from and to 1e-6 for 256 images: steps 1 and 5 begin them
    rates = {step: r["lr"] for step, r in records(tmp_path).items()}
    start, peak = 1e-6 / 16, 2e-4 / 16
    expected = [0, 1 / 4, 2 / 4, 3 / 4, 1, (1 + np.cos(np.pi / 12)) / 2, (1 + np.cos(np.pi / 6)) / 2]
    assert [rates[s] for s in range(1, 8)] == pytest.approx([start + (peak - start) * e for e in expected])


def masks_seen(monkeypatch, tmp_path, *more):
    """{pixels of an augmented image: its mask} over one epoch of a run."""
    seen, real = {}, MaskFeat.forward

    def forward(self, x, mask):
        seen.update({image.contiguous().numpy().tobytes(): tuple(m.tolist()) for image, m in zip(x, mask, strict=True)})
        return real(self, x, mask)

    monkeypatch.setattr(MaskFeat, "forward", forward)
    train("maskfeat", tmp_path, "--pictures-every", 0, *more)
    monkeypatch.setattr(MaskFeat, "forward", real)
    return seen


def test_a_mask_belongs_to_its_image(monkeypatch, tmp_path):
    """Its place in the batch, threads and micro-batches do not matter (nor do processes: test_scripts.py)."""
    whole = masks_seen(monkeypatch, tmp_path / "a", "--max-steps", 4)
    assert len(whole) == 64 and len(set(whole.values())) == 64
    parts = masks_seen(monkeypatch, tmp_path / "b", "--max-steps", 8, "--batch-size", 8, "--workers", 0)
    assert parts == whole
    assert masks_seen(monkeypatch, tmp_path / "c", "--max-steps", 4, "--accum", 4) == whole
    later = masks_seen(monkeypatch, tmp_path / "d", "--max-steps", 8)
    assert len(set(later.values())) == 128, "every epoch has masks of its own"
    counts = {sum(mask) for mask in later.values()}
    assert max(counts) == 26 and len(counts) > 1, "two fifths of 64, a few less where the loop stops early"
    exact = masks_seen(monkeypatch, tmp_path / "e", "--max-steps", 4, "--exact-masks")
    assert {sum(mask) for mask in exact.values()} == {26}


@pytest.mark.parametrize("ratio, side, count, minimum", [(0.4, 14, 78, 15), (0.4, 8, 26, 5), (0.6, 4, 10, 2)])
def test_blocks_are_those_of_the_official_code(ratio, side, count, minimum):
    seeds = np.linspace(0.1, 0.9, 20)
    expected = block_masks(seeds, (side, side), count, minimum, 0.3, exact=False)
    assert np.array_equal(masked(seeds, (side, side), ratio).numpy(), expected)


# ----------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("right, down, along", [(1, 0, (0, 1)), (0, 1, (1, 0)), (1, 1, (-1, 1)), (-1, 1, (1, 1))])
def test_lines_run_along_the_edges(right, down, along):
    """The brightness of the picture as seen from the middle of a cell spreads in the direction (x, y)."""
    picture = glyphs(hog(ramp(right, down, 48), 16), (3, 3), 9, 2, 20)
    assert picture.shape == (1, 120, 120) and picture.min() == 0 and 0.9 < picture.max() <= 1
    y, x = torch.meshgrid(*[torch.arange(20) - 9.5] * 2, indexing="ij")
    cell, along = picture[0, 60:80, 40:60], torch.tensor(along) / math.hypot(*along)
    off = (x * -along[1] + y * along[0]).square()  # from the line through the middle
    assert (off * cell).sum() / cell.sum() < 4 < 0.2 * ((x**2 + y**2) * cell).sum() / cell.sum()


def test_cells_and_channels_of_a_picture():
    values = torch.zeros(1, 2, 3, 9, 2, 2)
    values[0, 1, 0, 4, 0, 1] = 3.0  # of the second patch, one channel of three, the cell at the top right
    values[0, 0, 1, 4, 1, 0] = -3.0
    picture = glyphs(values.flatten(2), (1, 2), 9, 2, 10)
    assert picture.shape == (1, 20, 40) and picture.max() == 1
    assert picture[0, :10, 30:].sum() == picture.sum() > 10


def test_pictures_of_a_perfect_prediction():
    x, mask, model = rows(2, 3, 16, 16), some_mask(2), tiny()
    model.forward = lambda x, mask: model.target(x)
    images, lines = compare(model, x, mask)
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(images[0], x) and torch.equal(images[1], x * (1 - hidden))
    hidden = hidden.repeat_interleave(lines.shape[4] // 16, 2).repeat_interleave(lines.shape[4] // 16, 3)
    torch.testing.assert_close(lines[1], torch.where(hidden > 0, lines[0], lines[0] / 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an encoder of 192 dimensions, which the layouts of other people's files know."""
    out = tmp_path_factory.mktemp("run")
    train("maskfeat", out, "--width", 1, "--max-steps", 2)
    return out


def test_training_leaves_pictures(run, tmp_path):
    with Image.open(run / "reconstructions.png") as picture:
        side = 8 * 16 * 2  # 8 patches of one cell, each of 16 pixels, doubled to reach 160
        assert picture.width == 4 * (4 + side) + 4
        assert picture.height > 8 * (4 + side) + 4 + 20, "eight images, headings and a caption"
    train("maskfeat", tmp_path, "--max-steps", 1, "--pictures-every", 0)
    assert not (tmp_path / "reconstructions.png").exists()


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path, ["a.png", "b.jpg"], size=(40, 30))
    return [tmp_path / "a.png", tmp_path / "b.jpg"]


def visualize(photos, pretrained, out, *more):
    main("maskfeat", "--visualize", *photos, "--pretrained", pretrained, "--out", out, *more)
    return (out / "visualize.png").read_bytes()


def official(saved):
    """Our weights as the official code saves them: the last norm is the head's, HOG has filters."""
    names = {"backbone.norm.": "pred_head.transforms.0.0.", "head.": "pred_head.projections.0.", "backbone.": ""}
    weights = saved["model"]
    for old, new in names.items():
        weights = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in weights.items()}
    filters = {f"hogs.0.weight_{axis}": torch.zeros(3, 1, 3, 3) for axis in "xy"}
    return {"epoch": 3, "model_state": weights | filters, "optimizer_state": {}, "cfg": "text"}


def test_visualize_any_image(run, photos, tmp_path):
    last, other = run / "last.pt", tmp_path / "official.pyth"
    picture = visualize(photos, last, tmp_path)
    assert len(picture) > 1000 and not list(tmp_path.glob("*.tmp*"))
    assert visualize(photos, last, tmp_path) == picture
    assert visualize(photos, last, tmp_path, "--seed", 1) != picture, "another seed, another mask"
    assert visualize(photos, last, tmp_path, "--mask-ratio", 0.6) != picture
    torch.save(official(state(run)), other)
    assert visualize(photos, other, tmp_path) == picture


# ------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--mask-ratio 0.999", "--mask-ratio 0.999 masks 64 of 64 patches"),
        ("--mask-ratio 1", "--mask-ratio: must be less than 1"),
        ("--mask-ratio 0", "--mask-ratio 0.0 masks 0 of 64 patches"),
        ("--image-size 20 --patch-size 8", "--image-size 20 is not a multiple of the patch size 8: choose 16 or 24"),
        ("--patch-size 16", "--mask-ratio 0.4 masks 0 of 1 patches"),
        ("--patch-size 8 --cell 3", "--cell 3 does not divide the patch size 8: choose 2 or 4 or 8"),
        ("--cell 4", "--cell 4 does not divide the patch size 2: choose 2"),
        ("--cell 0", "--cell: must be greater than 0"),
        ("--bins 0", "--bins: must be greater than 0"),
        ("--min-lr 2e-4", "--min-lr 0.0002 must be smaller than --lr 0.0002"),
        ("--heads 5", "5 heads"),
        ("--pretrained x.pt", "--visualize"),
        ("--visualize x.jpg", "--pretrained"),
    ],
)
def test_mistakes(words, expected, capsys, tmp_path):
    assert expected in refused(capsys, main, "maskfeat", *flags("maskfeat", tmp_path, *words.split()))


def test_mistakes_with_visualize(run, photos, capsys, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    half = state(run)
    half["model"]["head.bias"] = half["model"]["head.bias"][1:]
    torch.save(half, tmp_path / "half.pt")
    for images, pretrained, expected in (
        (photos, run / "backbone.pt", "no head"),
        (photos, tmp_path / "no.pt", "no such file"),
        ([tmp_path / "none.jpg"], run / "last.pt", "none.jpg"),
        ([*photos, tmp_path / "text.jpg"], run / "last.pt", "text.jpg"),
        (photos, tmp_path / "half.pt", "head.bias (26,) instead of (27,)"),
    ):
        words = ["--visualize", *images, "--pretrained", pretrained, "--out", tmp_path]
        assert expected in refused(capsys, main, "maskfeat", *words)
    assert "--data" in refused(capsys, main, "maskfeat", "--out", tmp_path)
